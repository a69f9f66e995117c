"""``kne cache``: lists, checks, removes and merges entries of the score cache."""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from kne_easyedit._util.claims import FILE
from kne_easyedit.cli.common import positive


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds ``cache`` to the commands of ``kne``."""
    parser = commands.add_parser("cache", help="info, verify, prune, merge: the stored scores of all models")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, function, text in (
        ("info", _info, "models, modules, entries and sizes"),
        ("verify", _verify, "read every entry and check every bit; exit code 1 if one is damaged or cannot be read"),
        ("prune", _prune, "remove entries"),
        ("merge", _merge, "take in the entries of other caches; exit code 1 if one is damaged"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "--cache-dir", type=Path, help="folder of the cache (default: KNE_CACHE or the user's cache folder)"
        )
        action.set_defaults(command=function)
        if name == "merge":
            action.add_argument(
                "caches", nargs="+", type=Path, metavar="FOLDER", help="caches of other machines (their KNE_CACHE)"
            )
        if name == "prune":
            which = action.add_mutually_exclusive_group(required=True)
            which.add_argument(
                "--damaged",
                action="store_true",
                help="entries that `verify` finds damaged, and temporary files of killed processes",
            )
            which.add_argument("--older-than", type=positive, metavar="DAYS", help="entries written more than DAYS ago")
            which.add_argument(
                "--model",
                type=_digest,
                metavar="DIGEST",
                help="all entries of one model, by the digest that `info` shows",
            )
            which.add_argument("--all", action="store_true", help="all entries")
            action.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _info(arguments: argparse.Namespace) -> int:
    from kne_easyedit.attribution.score_cache import DamagedEntry, read_entry, scores_folder

    _require_cache(arguments.cache_dir, "--cache-dir")
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    names, damaged, unreadable = {}, 0, 0
    for path, size in _sizes(arguments.cache_dir):
        try:
            entry = read_entry(path)
            names[path.parent.name] = entry.model_name
            kind = (
                path.parent.name,
                f"{entry.template}, {entry.quadrature}, m = {entry.steps}, {len(entry.layers)} layers",
            )
        except DamagedEntry:
            damaged += 1
            kind = (path.parent.name, "damaged, or of another version")
        except FileNotFoundError:  # removed by another process
            continue
        except OSError:
            unreadable += 1
            kind = (path.parent.name, "cannot be read (kne cache verify says why)")
        found[kind][0] += 1
        found[kind][1] += size
    print(f"score cache {scores_folder(arguments.cache_dir)}")
    for digest in sorted({digest for digest, _ in found}):
        print(f"\nmodel {digest}  {names.get(digest, 'unknown')}")
        for (_, label), (entries, size) in sorted(item for item in found.items() if item[0][0] == digest):
            noun = "entry  " if entries == 1 else "entries"
            print(f"  {entries:>6} {noun} {_bytes(size):>10}  ({_bytes(size / entries)} each)  {label}")
    entries, size = (sum(values) for values in zip(*found.values())) if found else (0, 0)
    complaints = (f"; {damaged} damaged: kne cache prune --damaged" if damaged else "") + (
        f"; {unreadable} cannot be read" if unreadable else ""
    )
    print(f"\n{entries} entries, {_bytes(size)} in all{complaints}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from kne_easyedit.attribution.score_cache import entry_files

    _require_cache(arguments.cache_dir, "--cache-dir")
    paths = list(entry_files(arguments.cache_dir))
    checked = map(_complaint, tqdm(paths, desc="verify", unit="entry", disable=not paths))
    complaints = [complaint for complaint in checked if complaint]
    for complaint in complaints:
        print(complaint)
    print(f"{len(paths) - len(complaints)} of {len(paths)} entries are sound")
    return 1 if complaints else 0


def _complaint(path: Path) -> str | None:
    """The result of checking one entry; None if it is sound, or if another process has removed it."""
    from kne_easyedit.attribution.score_cache import DamagedEntry, read_entry

    try:
        read_entry(path)
    except DamagedEntry as error:
        return f"damaged: {error}"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"not checked: {error.strerror}"
    return None


def _prune(arguments: argparse.Namespace) -> int:
    from kne_easyedit.attribution.score_cache import (
        DamagedEntry,
        leftover_files,
        read_entry,
        remove_damaged,
        scores_folder,
        stat_of,
    )

    _require_cache(arguments.cache_dir, "--cache-dir")
    oldest = time.time() - 86400 * (arguments.older_than or 0)
    if arguments.model and not list(scores_folder(arguments.cache_dir).glob(f"{arguments.model}*/")):
        raise ValueError(
            f"--model {arguments.model!r}: no such model in {scores_folder(arguments.cache_dir)}; "
            "`kne cache info` lists them"
        )
    removed = freed = unreadable = 0
    for path, size in _sizes(arguments.cache_dir):
        if arguments.damaged:
            try:
                read_entry(path)
            except DamagedEntry as error:
                if arguments.dry_run or remove_damaged(path, error):
                    removed, freed = removed + 1, freed + size
            except FileNotFoundError:  # removed by another process
                pass
            except OSError as error:
                unreadable += 1
                print(f"kept: {error.strerror}")
            continue
        found = stat_of(path)
        young = arguments.older_than and found and found.st_mtime > oldest
        other = arguments.model and not path.parent.name.startswith(arguments.model)
        if found is None or young or other:
            continue
        removed, freed = removed + 1, freed + size
        if not arguments.dry_run:
            path.unlink(missing_ok=True)
    for path in leftover_files(arguments.cache_dir) if arguments.damaged or arguments.all else ():
        removed, freed = removed + 1, freed + (found.st_size if (found := stat_of(path)) else 0)
        if not arguments.dry_run:
            path.unlink(missing_ok=True)
    if not arguments.dry_run:
        for folder in scores_folder(arguments.cache_dir).glob("*/"):
            if {path.name for path in folder.iterdir()} <= {FILE}:
                (folder / FILE).unlink(missing_ok=True)
                folder.rmdir()
    done = "would be removed" if arguments.dry_run else "removed"
    print(f"{removed} entries, {_bytes(freed)}, {done} from {scores_folder(arguments.cache_dir)}")
    return 1 if unreadable else 0


def _merge(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from kne_easyedit.attribution.score_cache import entry_files, scores_folder

    for folder in arguments.caches:
        _require_cache(folder)
        if scores_folder(folder).resolve() == scores_folder(arguments.cache_dir).resolve():
            raise ValueError(f"{folder}: is the cache that the others are taken into (--cache-dir)")
    found: Counter[str] = Counter()
    for path in tqdm([path for folder in arguments.caches for path in entry_files(folder)], desc="merge", unit="entry"):
        found[_merged(path, arguments.cache_dir)] += 1
    print(
        f"{found['copied']} entries copied, {found['completed']} completed by more layers, {found['known']} known "
        f"already, {found['damaged']} damaged; now in {scores_folder(arguments.cache_dir)}"
    )
    return 1 if found["damaged"] else 0


def _require_cache(folder: Path | None, option: str = "") -> None:
    """Raises ValueError if a folder that was named is no score cache; the user's own may not exist yet."""
    from kne_easyedit.attribution.score_cache import scores_folder

    if folder is not None and not scores_folder(folder).is_dir():
        what = f"{option}: {folder}" if option else f"{folder}"
        raise ValueError(f"{what}: no score cache; it has no folder {scores_folder(folder).name!r}")


def _merged(path: Path, folder: Path | None) -> str:
    """What `merge_entry` says; ``damaged``, after a line that says why, for an entry that is so."""
    from kne_easyedit.attribution.score_cache import DamagedEntry
    from kne_easyedit.attribution.score_merge import merge_entry

    try:
        return merge_entry(path, folder)
    except DamagedEntry as error:
        print(f"left out: {error}")
        return "damaged"
    except FileNotFoundError:
        if path.exists():  # another file is missing
            raise
        return "gone"


def _sizes(folder: Path | None) -> Iterator[tuple[Path, int]]:
    """The files of all entries with their sizes in bytes."""
    from kne_easyedit.attribution.score_cache import entry_files, stat_of

    for path in entry_files(folder):
        if found := stat_of(path):
            yield path, found.st_size


def _digest(text: str) -> str:
    if len(text) < 4 or not set(text) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a digest: at least 4 of the hexadecimal digits that `kne cache info` shows"
        )
    return text


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
