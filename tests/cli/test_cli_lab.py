"""``kne lab``: what it says and refuses before its page is there, and what it leaves behind. The page: tests/lab."""

from __future__ import annotations

import json
import re
import sys
import urllib.request

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit import cli
from kne_easyedit.cli import lab
from kne_easyedit.lab import page, server


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("lab")
    make_llama().save_pretrained(folder / "tiny-model")
    make_tokenizer().save_pretrained(folder / "tiny-model")
    (folder / "kne.yaml").write_text(json.dumps(tiny_hparams(model_name=str(folder / "tiny-model")).to_dict()))
    return ["--hparams", str(folder / "kne.yaml")]


@pytest.fixture
def no_page(monkeypatch) -> list[str]:
    """No page is served; the addresses on which it would be."""
    asked = []

    class Nothing:
        url = "http://nowhere/"

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(page, "require_gradio", lambda: None)
    monkeypatch.setattr(
        server, "serve", lambda session, about, host, port: asked.append((about, host, port)) or Nothing()
    )
    monkeypatch.setattr(lab, "_wait", lambda: None)
    return asked


def test_it_serves_until_ctrl_c_and_its_temporary_store_is_gone(settings, monkeypatch, capsys, tmp_path):
    pytest.importorskip("gradio", reason="THE PAGE WAS NOT SERVED: gradio (extra lab) is not installed")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def look():
        text = capsys.readouterr().out
        url = re.search(r"Open (http://127\.0\.0\.1:\d+/)", text)[1]
        with urllib.request.urlopen(url) as answer:
            seen.extend([text, answer.status, answer.read().decode(), *tmp_path.glob("kne-lab-*")])
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "_wait", look)
    assert cli.main(["lab", *settings]) == 130
    text, status, html, folder = seen
    assert "a temporary store: its edits are gone" in text and "warning" not in text
    assert status == 200 and "kne lab" in html and "googleapis" not in html
    assert not folder.exists() and "what is in its store stays" in capsys.readouterr().err


def test_without_gradio_the_way_out_is_named_before_the_model_is_loaded(settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("kne_easyedit.models.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(["lab", *settings]) == 1
    assert 'pip install "kne_easyedit[lab]"' in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_who_listens_for_others_is_warned(settings, no_page, capsys, tmp_path, host, warned):
    store = tmp_path / "store"
    assert cli.main(["lab", *settings, "--host", host, "--port", "7999", "--store", str(store)]) == 0
    ((about, *address), closed) = no_page
    assert address == [host, 7999] and str(store) in about and closed == "closed"
    assert ("there is no password" in capsys.readouterr().out) is warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--store", __file__], "--store: .* is a file"), (["--set", "p=7"], "p"), (["--hparams", "nowhere"], "nowhere")],
)
def test_what_cannot_be_served_is_refused(settings, no_page, capsys, arguments, message):
    assert cli.main(["lab", *settings, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err) and no_page == []


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_port_is_a_number_of_a_port(port, capsys):
    with pytest.raises(SystemExit):
        cli.main(["lab", "--port", port])
    assert "--port" in capsys.readouterr().err


def test_the_page_names_no_path_beside_those_that_were_given(settings, no_page):
    assert cli.main(["lab", *settings]) == 0
    assert "kne-lab-" not in no_page[0][0]
