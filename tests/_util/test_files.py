import errno
from pathlib import Path

import pytest

from kne_easyedit._util import files as paths
from kne_easyedit._util.files import atomic_directory, atomic_write, cache_home, exclusive_lock, new_directory


class TestCacheHome:
    @pytest.fixture(autouse=True)
    def bare_environment(self, monkeypatch, tmp_path):
        monkeypatch.delenv("KNE_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))

    def test_default_is_in_the_home_folder(self, tmp_path):
        assert cache_home() == tmp_path / ".cache" / "kne_easyedit"

    def test_xdg_cache_home(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
        assert cache_home() == Path("/some/cache/kne_easyedit")

    @pytest.mark.parametrize("value", ["", "relative/cache"])
    def test_an_empty_or_relative_xdg_cache_home_is_ignored(self, monkeypatch, tmp_path, value):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_home() == tmp_path / ".cache" / "kne_easyedit"

    def test_kne_cache_wins_and_is_taken_as_it_is(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
        monkeypatch.setenv("KNE_CACHE", "/mine")
        assert cache_home() == Path("/mine")

    def test_kne_cache_knows_the_tilde_and_becomes_absolute(self, monkeypatch, tmp_path):
        monkeypatch.setenv("KNE_CACHE", "~/mine")
        assert cache_home() == tmp_path / "mine"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("KNE_CACHE", "here")
        assert cache_home() == tmp_path / "here"

    def test_an_empty_kne_cache_counts_as_unset(self, monkeypatch, tmp_path):
        monkeypatch.setenv("KNE_CACHE", "")
        assert cache_home() == tmp_path / ".cache" / "kne_easyedit"

    def test_asking_creates_nothing(self, tmp_path):
        cache_home()
        assert list(tmp_path.iterdir()) == []


class TestAtomicDirectory:
    def test_appears_complete_and_only_at_the_end(self, tmp_path):
        final = tmp_path / "a" / "model"  # the parent is missing, too
        with atomic_directory(final) as folder:
            assert folder.parent == final.parent, "a rename must not cross file systems"
            (folder / "sub").mkdir()
            (folder / "sub" / "weights").write_text("w")
            assert not final.exists()
        assert (final / "sub" / "weights").read_text() == "w"
        assert list(final.parent.iterdir()) == [final]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_after_an_exception_nothing_is_left(self, tmp_path, error):
        with pytest.raises(error), atomic_directory(tmp_path / "model") as folder:
            (folder / "half").write_text("h")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_a_faster_process_keeps_its_folder(self, tmp_path):
        final = tmp_path / "model"
        with atomic_directory(final) as ours:
            (ours / "file").write_text("ours")
            with atomic_directory(final) as theirs:
                (theirs / "file").write_text("theirs")
        assert (final / "file").read_text() == "theirs"
        assert list(tmp_path.iterdir()) == [final]

    def test_a_faster_process_is_an_error_if_the_result_is_our_own(self, tmp_path):
        final = tmp_path / "model"
        with pytest.raises(FileExistsError, match="by another process in the meantime"):  # noqa: SIM117
            with atomic_directory(final, exclusive=True) as ours:
                (ours / "file").write_text("ours")
                with atomic_directory(final, exclusive=True) as theirs:
                    (theirs / "file").write_text("theirs")
        assert (final / "file").read_text() == "theirs"
        assert list(tmp_path.iterdir()) == [final]

    def test_an_exception_leaves_an_older_folder_alone(self, tmp_path):
        final = tmp_path / "model"
        final.mkdir()
        (final / "file").write_text("old")
        with pytest.raises(ValueError), atomic_directory(final):
            raise ValueError
        assert (final / "file").read_text() == "old"
        assert list(tmp_path.iterdir()) == [final]

    def test_a_file_in_the_way_is_an_error_and_survives(self, tmp_path):
        final = tmp_path / "model"
        final.write_text("a file")
        with pytest.raises(OSError), atomic_directory(final) as folder:
            (folder / "file").write_text("x")
        assert final.read_text() == "a file"
        assert list(tmp_path.iterdir()) == [final]

    def test_permissions_are_those_of_an_ordinary_folder(self, tmp_path):
        (tmp_path / "ordinary").mkdir()
        with atomic_directory(tmp_path / "model"):
            pass
        assert (tmp_path / "model").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


class TestAtomicWrite:
    @pytest.mark.parametrize(
        ("data", "written"), [("é\r\n\n", b"\xc3\xa9\r\n\n"), (b"\x00\xff", b"\x00\xff"), ("", b"")]
    )
    def test_writes_text_and_bytes_as_they_are(self, tmp_path, data, written):
        target = tmp_path / "new" / "file"
        atomic_write(target, data)
        assert target.read_bytes() == written
        assert list(target.parent.iterdir()) == [target]

    def test_replaces_the_old_content(self, tmp_path):
        target = tmp_path / "file"
        target.write_text("something longer than the new content")
        atomic_write(str(target), "new")
        assert target.read_text() == "new"

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_an_error_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, step):
        target = tmp_path / "file"
        target.write_text("old")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(paths.os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            atomic_write(target, "new")
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    def test_the_wrong_type_is_refused_and_harms_nothing(self, tmp_path):
        target = tmp_path / "file"
        target.write_text("old")
        with pytest.raises(TypeError):
            atomic_write(target, 3)
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]


class TestNewDirectory:
    @staticmethod
    def fill(folder: Path) -> None:
        with new_directory(folder, last="a.json") as unfinished:
            (unfinished / "a.json").write_text("a")
            (unfinished / "z").mkdir()
            (unfinished / "z" / "b").write_text("b")

    def test_an_empty_folder_stays_the_folder_that_it_is(self, tmp_path, monkeypatch):
        """It may be the working directory, or where a volume is mounted: it cannot be removed or renamed."""
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        before = here.stat().st_ino
        self.fill(Path())
        assert here.stat().st_ino == before and sorted(path.name for path in here.iterdir()) == ["a.json", "z"]
        assert (here / "z" / "b").read_text() == "b"
        self.fill(tmp_path / "new")  # the converse: it is made
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.json", "z"]

    def test_what_tells_others_that_it_is_complete_comes_last(self, tmp_path, monkeypatch):
        order, rename = [], Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: order.append(self.name) or rename(self, to))
        self.fill(tmp_path)
        assert order == ["z", "a.json"]

    @pytest.mark.parametrize("moved", [0, 1])
    def test_after_an_error_it_is_empty_again(self, tmp_path, monkeypatch, moved):
        rename, left = Path.rename, [moved]

        def fails(self, to):
            if not left[0]:
                raise OSError("disk")
            left[0] -= 1
            return rename(self, to)

        monkeypatch.setattr(Path, "rename", fails)
        with pytest.raises(OSError, match="disk"):
            self.fill(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_what_another_process_wrote_meanwhile_is_kept(self, tmp_path):
        with (
            pytest.raises(FileExistsError, match=r"exists already; choose another folder.*theirs"),
            new_directory(tmp_path, last="a.json") as unfinished,
        ):
            (unfinished / "a.json").write_text("ours")
            (tmp_path / "theirs").write_text("theirs")
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    """As some network folders: said with the folder, and the work goes on; any other fault names the file."""
    fcntl = pytest.importorskip("fcntl")

    def failing(number: int):
        def flock(*_):
            raise OSError(number, "no")

        return flock

    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with exclusive_lock(tmp_path / "folder"):
        (tmp_path / "folder/written").touch()
    assert "folder: this file system has no locks" in caplog.text
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match=r"\.lock"), exclusive_lock(tmp_path / "folder"):
        pass


@pytest.mark.parametrize("content", [b"precious", None], ids=["there", "dangling"])
def test_a_lock_that_is_a_link_is_refused_and_nothing_is_written_through_it(tmp_path, content):
    """A folder from elsewhere may hold one."""
    folder, victim = tmp_path / "store", tmp_path / "victim"
    folder.mkdir()
    if content is not None:
        victim.write_bytes(content)
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(ValueError, match=r"\.lock is a symbolic link"), exclusive_lock(folder):
        pass
    assert victim.exists() is (content is not None) and (content is None or victim.read_bytes() == content)
    (folder / ".lock").unlink()
    for _ in range(2):
        with exclusive_lock(folder):
            pass
