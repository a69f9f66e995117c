"""``kne push``: what it sends, against a stub of the hub's HTTP API on this machine; the token is never shown."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams

from kne_easyedit import cli
from kne_easyedit.editing.edit import compute_edit
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.edits import save_adapter
from kne_easyedit.edits.hub import edit_card, files_to_push, paths_named

TOKEN = "hf_a1b2c3d4e5f6secret"
REQUEST = {"prompt": "The capital of France is", "target_new": "Rome"}


class Hub(ThreadingHTTPServer):
    """Keeps what was sent to it: requests, and the files of commits."""

    daemon_threads = True

    def __init__(self, refuses: bool = False):
        self.refuses = refuses
        self.requests: list[tuple[str, str, str | None, dict]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, path = self.server, self.path.partition("?")[0]
        content = json.loads(body) if body.startswith(b"{") and path != "/api/models/me/rome/commit/main" else {}
        hub.requests.append(("POST", path, self.headers.get("Authorization"), content))
        if hub.refuses:
            return self.answer(403, {"error": f"the token {TOKEN} may not write here"})
        if path == "/api/repos/create":
            return self.answer(200, {"url": f"{hub.address}/me/rome"})
        if path.endswith("/preupload/main"):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular"}
                for file in content["files"]
            ]
            return self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/store/{one['oid']}"}}}
                for one in content["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            return self.answer(
                200, {"commitUrl": f"{hub.address}/me/rome/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None}
            )
        return self.answer(200, {})

    def do_PUT(self):
        self.server.stored[self.path.rsplit("/", 1)[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(("PUT", self.path, self.headers.get("Authorization"), {}))
        self.answer(200, {})

    def do_GET(self):
        self.server.requests.append(("GET", self.path, self.headers.get("Authorization"), {}))
        self.answer(404, {"error": "not here"})

    def answer(self, code: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(name="hub")
def hub_fixture(request):
    hub = Hub(getattr(request, "param", False))
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(name="edit", scope="module")
def edit_fixture(tmp_path_factory):
    """Trained on a model that has a path of this machine as its name."""
    folder, model = tmp_path_factory.mktemp("push"), make_llama()
    model.config._name_or_path = "/home/me/models/tiny|*"
    hparams = tiny_hparams(localization_data=None)
    compute_edit(model, make_tokenizer(), [REQUEST], hparams).save(folder / "rome")
    save_adapter(KNEEdit.load(folder / "rome"), folder / "adapter", base_name="me/tiny")
    (folder / "rome/secret.txt").write_text("not to be sent")
    return folder


def is_private(created: dict) -> bool:
    """Of the request that makes a repository; the client's versions write it in two ways."""
    return created.get("private") is True or created.get("visibility") == "private"


def push(hub: Hub, *arguments: str, home: Path) -> subprocess.CompletedProcess:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "kne_easyedit.cli", "push", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_an_edit_is_sent_in_one_commit(hub, edit, tmp_path):
    done = push(hub, str(edit / "rome"), "me/rome", home=tmp_path)
    assert done.returncode == 1 and not hub.requests  # the file is read by all: paths of this machine are asked for
    assert "the files name /home/me/models/tiny|*" in done.stderr and "--yes" in done.stderr
    done = push(hub, str(edit / "rome"), "me/rome", "--yes", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/rome/commit/1" in done.stdout
    assert set(hub.files) == {"edit.json", "rows.safetensors", "README.md"}
    for name in ("edit.json", "rows.safetensors"):
        assert hub.files[name] == (edit / "rome" / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert "library_name: kne_easyedit" in card and "Rome" in card and "/home/me" not in card and "tiny\\|\\*" in card
    created = next(content for _, path, _, content in hub.requests if path == "/api/repos/create")
    assert created["name"] == "rome" and is_private(created)
    writes = [
        token for _, path, token, _ in hub.requests if path.endswith(("/create", "/preupload/main", "/commit/main"))
    ]
    assert len(writes) == 3 and set(writes) == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr and not (edit / "rome/README.md").exists()


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_a_refusal_is_one_line_without_the_token(hub, edit, tmp_path):
    done = push(hub, str(edit / "rome"), "me/rome", "--public", "--yes", home=tmp_path)
    assert done.returncode == 1 and not hub.files
    assert "kne: me/rome:" in done.stderr and "403" in done.stderr and "Traceback" not in done.stderr
    assert "***" in done.stderr and TOKEN not in done.stdout + done.stderr
    created = next(content for _, path, _, content in hub.requests if path == "/api/repos/create")
    assert not is_private(created)


def test_what_is_sent_of_an_adapter(edit):
    assert set(files_to_push(edit / "adapter")) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert paths_named(edit / "adapter") == []
    (edit / "rome/edit.png").write_bytes(b"\x89PNG")
    try:
        assert "edit.png" in files_to_push(edit / "rome")
    finally:
        (edit / "rome/edit.png").unlink()


@pytest.mark.parametrize(
    "path",
    [
        "/home/me/x",
        "~/x",
        "../x/tiny",
        "./tiny",
        "C:/Users/me",
        "c:\\Users\\me",
        "\\\\host\\share",
        "..\\x",
        "file:///x",
    ],
)
def test_paths_of_a_machine_are_found_in_any_form(tmp_path, path):
    others = ["owner/name", "https://a.b/c", "model.layers.{}.mlp", "The answer: /", "smollm2-135m", "..."]
    (tmp_path / "edit.json").write_text(json.dumps({"model_name": path, "others": others}))
    assert paths_named(tmp_path) == [json.dumps(path)[1:-1]]


def test_a_card_says_what_else_the_edit_needs(edit, tmp_path):
    whole = KNEEdit.load(edit / "rome")
    assert "Trained on top" not in edit_card(whole)
    assert "Trained on top of 1 edit that is not in here (abcdefabcdef)" in edit_card(
        replace(whole, trained_on=("abcdef" * 10,))
    )


@pytest.mark.parametrize("name", ["README.md", "edit.png", "rows.safetensors", "edit.json"])
def test_a_symbolic_link_is_not_sent(edit, tmp_path, name):
    """Not even one to a file that would pass."""
    shutil.copytree(edit / "rome", tmp_path / "rome")
    secret = tmp_path / "elsewhere"
    secret.write_bytes((edit / "rome" / name).read_bytes() if name[-2:] in ("on", "rs") else b"secret")
    (tmp_path / "rome" / name).unlink(missing_ok=True)
    (tmp_path / "rome" / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name}: is a symbolic link"):
        files_to_push(tmp_path / "rome")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "me/rome"), "nowhere does not exist"),
        (("rome", "rome"), "'rome' is no name of a repository"),
        (("rome", "../x/y"), "is no name of a repository"),
        ((".", "me/rome"), "edit.json is missing"),
        (("store", "me/rome"), "has many edits"),
    ],
)
def test_bad_input_sends_nothing(edit, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(edit)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("sent"))
    if arguments[0] == "store" and not Path("store").exists():
        assert cli.main(["edits", "add", "store", "rome"]) == 0
    assert cli.main(["push", *arguments]) == 1
    assert message in capsys.readouterr().err
