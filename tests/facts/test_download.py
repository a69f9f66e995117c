"""``kne data fetch``: what is there stays, what is missing comes, and digests tell whether a file has changed."""

from __future__ import annotations

import hashlib

import pytest

from kne_easyedit.cli import main
from kne_easyedit.facts.download import FILES, fetch


@pytest.fixture
def publisher(monkeypatch):
    """Stands for the hub: every file's content is its name. Counts the downloads."""
    import huggingface_hub

    asked = []

    def download(repository, name, repo_type, local_dir):
        assert (repository, repo_type) == ("zjunlp/KnowEdit", "dataset")
        asked.append(name)
        from pathlib import Path

        file = Path(local_dir) / "file"
        file.write_text(name)
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_all_files_come_with_digests_and_once(publisher, tmp_path, capsys):
    assert main(["data", "fetch", "--out", str(tmp_path)]) == 0
    assert publisher == list(FILES)
    assert all((tmp_path / name).read_text() == name for name in FILES)
    sums = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert sums == [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}" for name in FILES]
    assert [state for *_, state in fetch(tmp_path)] == ["there"] * len(FILES)
    assert len(publisher) == len(FILES)
    (tmp_path / FILES[2]).unlink()
    assert [state for *_, state in fetch(tmp_path)].count("downloaded") == 1
    (tmp_path / FILES[1]).write_bytes(b"")  # an interrupted copy by hand
    assert [state for *_, state in fetch(tmp_path)] == ["there", "downloaded", *["there"] * (len(FILES) - 2)]
    assert f"KNOWEDIT={tmp_path}" in capsys.readouterr().out


def test_a_file_that_has_changed_is_named(publisher, tmp_path):
    list(fetch(tmp_path))
    (tmp_path / FILES[1]).write_text("other")
    with pytest.raises(ValueError, match=r"test_cf.json: has changed since it was downloaded"):
        list(fetch(tmp_path))


def test_without_network_the_way_out_is_named_and_nothing_is_left(monkeypatch, tmp_path, capsys):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert main(["data", "fetch", "--out", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert (
        "cannot be downloaded" in error
        and "KNOWEDIT=FOLDER" in error
        and "https://huggingface.co/datasets/zjunlp/KnowEdit" in error
    )
    assert not (tmp_path / "data").exists()
