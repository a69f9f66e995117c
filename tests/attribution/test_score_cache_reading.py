"""Only what was read and proved wrong is removed from the cache; what somebody else wrote is checked by type."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FACTS, LLAMA_DOWN, make_llama, tiny_hparams
from stored_scores import STEPS

from kne_easyedit import cli
from kne_easyedit.attribution import score_cache as cache_module
from kne_easyedit.attribution.score_cache import DamagedEntry, ScoreCache, read_entry
from kne_easyedit.localization.localizer import localize
from kne_easyedit.models.fingerprint import model_digest

REQUESTS = [{"prompt": prompt, "target_new": target} for prompt, target in FACTS]
ERRORS = {
    "too many open files": errno.EMFILE,
    "a failing disk": errno.EIO,
    "no permission": errno.EACCES,
    "not permitted": errno.EPERM,
}


def refuse(monkeypatch, path, number):
    """Reading ``path`` gives the error ``number``, however it is opened."""
    opened, error = Path.open, OSError(number, os.strerror(number), str(path))

    def refusing(self, *args, **kwargs):
        if self == path:
            raise error
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(Path, "read_bytes", lambda self: self.open("rb").read())


class TestUnreadable:
    @pytest.mark.parametrize("kind", ERRORS)
    @pytest.mark.parametrize("way", ["entry", "get", "missing", "put"])
    def test_is_an_error_and_stays(self, kind, way, cache, target, facts, stored, scores, monkeypatch, caplog):
        content = stored.read_bytes()
        with monkeypatch.context() as patched:
            refuse(patched, stored, ERRORS[kind])
            with pytest.raises(OSError, match=f"score cache: {stored} cannot be read .*it is left as it is") as caught:
                getattr(cache, way)(target, facts[0], *[scores] * (way == "put"))
        assert caught.value.errno == ERRORS[kind]
        assert stored.read_bytes() == content and not caplog.text
        assert torch.equal(cache.get(target, facts[0]), scores)

    def test_says_nothing_about_the_entry(self, stored, monkeypatch):
        refuse(monkeypatch, stored, errno.EMFILE)
        with pytest.raises(OSError) as caught:
            read_entry(stored)
        assert not isinstance(caught.value, DamagedEntry)

    def test_a_folder_in_the_place_of_an_entry(self, cache, target, facts, stored):
        stored.unlink()
        stored.mkdir()
        with pytest.raises(IsADirectoryError, match="cannot be read"):
            cache.get(target, facts[0])
        assert stored.is_dir()

    def test_localising_stops_and_goes_on(self, llama, tokenizer, tmp_path, target, facts, monkeypatch):
        hparams = tiny_hparams(cache_dir=str(tmp_path))
        first = localize(llama, tokenizer, REQUESTS, hparams)
        path = ScoreCache(tmp_path, llama, STEPS).path(target, facts[1])
        with monkeypatch.context() as patched:
            refuse(patched, path, errno.EMFILE)
            with pytest.raises(OSError, match="cannot be read"):
                localize(llama, tokenizer, REQUESTS, hparams)
        assert localize(llama, tokenizer, REQUESTS, hparams) == first

    @pytest.mark.parametrize("command", ["info", "verify", "prune"])
    def test_commands_name_it_and_keep_it(self, command, tmp_path, stored, monkeypatch, capsys):
        refuse(monkeypatch, stored, errno.EIO)
        damaged = ["--damaged"] if command == "prune" else []
        assert cli.main(["cache", command, *damaged, "--cache-dir", str(tmp_path)]) == (0 if command == "info" else 1)
        out = capsys.readouterr().out
        unread = f"score cache: {stored} cannot be read"
        wanted = {"info": "1 cannot be read", "verify": f"not checked: {unread}", "prune": f"kept: {unread}"}
        assert wanted[command] in out and "damaged" not in out
        assert stored.exists()


class TestReplaced:
    """Between reading a damaged entry and removing it another process may have written a sound one."""

    @pytest.fixture
    def overtaken(self, stored, monkeypatch, scores, cache, target, facts):
        sound = stored.read_bytes()
        stored.write_bytes(sound[:-3])
        read = cache_module.read_entry

        def reading(path):
            try:
                return read(path)
            except DamagedEntry:
                other = path.with_name("other")
                other.write_bytes(sound)
                other.replace(path)
                raise

        monkeypatch.setattr(cache_module, "read_entry", reading)
        return sound

    def test_is_kept_when_scores_are_asked_for(self, overtaken, cache, target, facts, stored):
        assert cache.get(target, facts[0]) is None
        assert stored.read_bytes() == overtaken

    def test_is_kept_when_pruning(self, overtaken, tmp_path, stored, capsys):
        assert cli.main(["cache", "prune", "--damaged", "--cache-dir", str(tmp_path)]) == 0
        assert stored.read_bytes() == overtaken and "0 entries" in capsys.readouterr().out


class TestForeign:
    """Entries whose digest matches, since somebody has computed it, but whose fields are of other types."""

    @pytest.fixture
    def forged(self, stored, scores):
        def forge(scores=scores, rekeyed=None, **fields):
            content = stored.read_bytes()
            metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
            del metadata["sha256"]
            metadata |= fields
            path = stored
            if rekeyed is not None:
                metadata["key"] = json.dumps(rekeyed(json.loads(metadata["key"])))
                path = stored.with_name(f"{cache_module.digest(json.loads(metadata['key']))}.safetensors")
            path.write_bytes(
                cache_module.save(
                    {"scores": scores}, {**metadata, "sha256": cache_module.scores_digest(scores, metadata)}
                )
            )
            return path

        return forge

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("layers", "[0, 1, 2, true]", "no layers"),
            ("layers", "[0, 1, 2, 3.0]", "no layers"),
            ("layers", '"0123"', "no layers"),
            ("layers", '["0", "1", "2", "3"]', "no layers"),
            ("layers", '{"0": 1, "1": 1, "2": 1, "3": 1}', "no layers"),
            ("layers", "[0, 1, 1, 2]", "not ascending and distinct"),
            ("layers", "[3, 2, 1, 0]", "not ascending"),
            ("layers", "[-1, 0, 1, 2]", "no layers"),
            ("layers", "[" * 100_000, ""),
            ("layers", "[" * 100_000 + "]" * 100_000, "too deep"),
            ("layers", f"[0, 1, 2, {'9' * 5000}]", "digits"),
            ("layers", "7", "no layers"),
            ("layers", "null", "no layers"),
            ("seconds", "nan", "seconds: 'nan' is no duration"),
            ("seconds", "inf", "no duration"),
            ("seconds", "-1", "no duration"),
            ("seconds", "fast", "could not convert"),
            ("key", "[]", "no key"),
            ("key", "{}", "no key"),
            ("key", "3", "no key"),
            ("key", "[" * 100_000 + "]" * 100_000, "too deep"),
            ("key", '["kne-scores-2"]', "no key"),
            ("model", "", "another fact or model"),
        ],
    )
    def test_metadata(self, forged, cache, target, facts, field, value, reason):
        path = forged(**{field: value})
        with pytest.raises(DamagedEntry, match=f"{path.name}: .*{reason}") as caught:
            read_entry(path)
        assert len(str(caught.value)) < 600 + len(str(path))
        assert cache.get(target, facts[0]) is None and not path.exists()

    @pytest.mark.parametrize("at, value", [(1, 5), (2, None), (3, "4"), (3, True), (3, 4.5)])
    def test_key(self, forged, at, value):
        path = forged(rekeyed=lambda key: [*key[:at], value, *key[at + 1 :]])
        with pytest.raises(DamagedEntry, match="its key is no key"):
            read_entry(path)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float16], ids=str)
    def test_scores(self, forged, scores, dtype):
        with pytest.raises(DamagedEntry, match="its scores are of type"):
            read_entry(forged(scores=scores.to(dtype)))

    def test_converse(self, forged, scores):
        assert torch.equal(read_entry(forged(seconds="3")).scores, scores)

    @pytest.mark.parametrize("length", [2**63, 2**40, 10**6])
    def test_a_header_longer_than_the_file(self, stored, length):
        stored.write_bytes(length.to_bytes(8, "little") + stored.read_bytes()[8:])
        with pytest.raises(DamagedEntry, match=stored.name):
            read_entry(stored)

    def test_a_header_of_lists_in_lists(self, stored):
        header = b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        stored.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(DamagedEntry, match=stored.name):
            read_entry(stored)

    def test_a_huge_file(self, stored):
        with stored.open("r+b") as file:
            file.truncate(2**31)  # sparse: takes no space, and would take 2 GiB of memory
        with pytest.raises(DamagedEntry, match="bytes are more than any entry has"):
            read_entry(stored)


def test_a_model_that_is_not_loaded_is_named():
    with pytest.raises(
        ValueError, match=r"model: model.layers.1.mlp.down_proj.weight is not loaded .*load the model's weights"
    ):
        model = make_llama()
        model.get_submodule(LLAMA_DOWN.format(1)).to("meta")
        model_digest(model)


def test_a_cache_in_the_place_of_a_file_is_still_named(llama, tokenizer, tmp_path):
    """Converse: nothing is there to be read, and what is wrong is the folder."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"score cache: .*file.* cannot be written"):
        localize(llama, tokenizer, REQUESTS, tiny_hparams(cache_dir=str(tmp_path / "file")))
    shutil.rmtree(tmp_path)
