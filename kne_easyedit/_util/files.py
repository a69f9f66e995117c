"""The cache folder, paths, and files and folders that appear only when they are complete.

Of the standard library alone, so that every other module may import it at no cost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import shorten

__all__ = [
    "atomic_directory",
    "atomic_write",
    "cache_home",
    "exclusive_lock",
    "expand_path",
    "name_file",
    "new_directory",
    "parse_json",
    "parse_versioned",
]


logger = logging.getLogger(__name__)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def expand_path(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` and environment variables expanded, absolute (relative to the working directory)."""
    return Path(os.path.expandvars(os.fspath(path))).expanduser().absolute()


def cache_home() -> Path:
    """The user's cache folder of this project: absolute, and it may not exist yet.

    It is ``KNE_CACHE``, else ``kne_easyedit`` in ``XDG_CACHE_HOME``, else in ``~/.cache``. An empty variable counts as
    unset, and so does a relative ``XDG_CACHE_HOME``, as its specification demands.
    """
    own = os.environ.get("KNE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    return parent / "kne_easyedit"


@contextlib.contextmanager
def atomic_directory(final: str | os.PathLike[str], exclusive: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside ``final`` that is renamed to it once the block has succeeded.

    After any exception the temporary folder is removed and ``final`` is untouched, so a folder under the final name is
    always complete. Missing parents are created. Only a killed process leaves its (hidden) temporary folder behind.

    Args:
        final: The folder.
        exclusive: If another process was faster, its ``final`` is kept and ours is dropped in either case. Without
            this nothing is said: for results that do not depend on who made them.

    Raises:
        FileExistsError: Another process was faster, and ``exclusive`` is true.
        OSError: The folder cannot be made.
    """
    final = Path(final)
    temporary = beside(final)
    try:
        # Not tempfile.mkdtemp: its folders are closed to everybody else, also after the rename.
        temporary.mkdir(parents=True)
        with naming(final):
            yield temporary
        try:
            temporary.rename(final)
        except OSError as error:
            if not final.is_dir():
                raise
            if exclusive:
                raise FileExistsError(
                    f"{final} was written by another process in the meantime, and is kept; choose another folder"
                ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # renamed by now, unless something failed


@contextlib.contextmanager
def new_directory(final: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """Yields an empty folder whose files become those of ``final``, which does not exist, or is empty.

    A folder that does not exist appears complete (`atomic_directory`). An empty one stays what it is: it may be the
    working directory, or where a volume is mounted, and can then be neither removed nor replaced. The files are moved
    into it, ``last`` at the end: who finds that one finds all.

    Args:
        final: The folder.
        last: The file by which others recognise it.

    Raises:
        FileExistsError: It holds something, also if another process was faster. It is as it was.
        OSError: It cannot be written.
    """
    final = Path(final)
    if not final.is_dir():
        with atomic_directory(final, exclusive=True) as temporary:
            yield temporary
        return
    _require_empty(final, [])
    temporary = final / f".{uuid.uuid4().hex[:12]}.tmp"
    names: list[str] = []
    try:
        temporary.mkdir()
        with naming(final):
            yield temporary
        _require_empty(final, [temporary])
        names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == last)
        for name in names:
            (temporary / name).rename(final / name)
        names = []
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in (final / name for name in names):  # not all of them: none
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _require_empty(folder: Path, but: list[Path]) -> None:
    if found := sorted(path.name for path in folder.iterdir() if path not in but):
        raise FileExistsError(
            f"{folder} exists already; choose another folder, or remove it first: it holds {shorten(found[0])}"
        )


def atomic_write(path: str | os.PathLike[str], data: bytes | str | Iterable[str]) -> None:
    """Writes ``data`` (text, or its parts one by one, as UTF-8, line ends as they are) to ``path`` atomically.

    Readers see the old content or the new one, never a part, even after a crash. After an error the old file is
    untouched and no temporary file remains. Missing parents are created.

    Raises:
        OSError: It cannot be written, for example because the disk is full; the error names the file.
    """
    path = Path(path)
    temporary = beside(path)
    parts: Iterable[bytes | str] = [data] if isinstance(data, (bytes, str)) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            file.writelines(part.encode("utf-8") if isinstance(part, str) else part for part in parts)
            file.flush()
            os.fsync(file.fileno())  # or the rename might reach the disk before the content does
        temporary.replace(path)
    except OSError as error:
        name_file(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)  # renamed by now, unless something failed


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, errors of the system that name no file name ``path`` (`name_file`)."""
    try:
        yield
    except OSError as error:
        name_file(error, path)
        raise


def name_file(error: OSError, path: Path) -> None:
    """Puts the file's name into an error of the system that has none, as that of a full disk."""
    if error.errno is not None and error.filename is None:
        error.filename = str(path)


@contextlib.contextmanager
def exclusive_lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds a folder for this process, without effect on Windows; the folder is made if it does not exist.

    Args:
        folder: The folder; the lock is its file ``.lock``.
        wait: For another process that holds it.

    Raises:
        ValueError: Another process holds it, and ``wait`` is false; or the lock is a symbolic link.
        OSError: The folder cannot be made or written. (Where a file system has no locks, a warning says so.)
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / ".lock"
    try:  # A folder from elsewhere may hold a link: it is not followed, and nothing is emptied.
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a symbolic link, and a folder's lock is its own file; delete the link") from error
    with os.fdopen(held, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:  # any other error is not about another process
            raise ValueError(
                f"{folder}: another run is writing into it; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                name_file(error, path)
                raise
            logger.warning(
                "%s: this file system has no locks (%s): let one process alone write into this folder at a time",
                folder,
                error.strerror,
            )
        yield


def beside(path: Path) -> Path:
    """A fresh hidden name in the same folder: a rename is atomic only within one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text, UTF-8.

    Raises:
        ValueError: It is no JSON; the message may follow a file's name.
    """
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("no JSON of a sensible depth (lists or mappings are nested a thousand times)") from error
    except ValueError as error:  # Python reads no integers of thousands of digits
        raise ValueError("no JSON of sensible numbers (one has thousands of digits)") from error


def parse_versioned(content: str | bytes, form: str, newest: int) -> dict[str, Any]:
    """The mapping of a JSON text that names its format and that format's version (``schema_version``).

    Args:
        content: The text.
        form: Its format.
        newest: The last version that is known here; they begin at 1.

    Raises:
        ValueError: It is no JSON, of another format, or of a later version; the message may follow a file's name.
    """
    found = parse_json(content)
    if not isinstance(found, dict) or found.get("format") != form:
        raise ValueError(f"its field 'format' is not {form!r}")
    version = found.get("schema_version")
    if type(version) is not int or not 1 <= version <= newest:
        raise ValueError(
            f"schema_version: {shorten(version)}, this version reads 1 to {newest}; a later kne_easyedit wrote it: "
            f"install that"
        )
    return found
