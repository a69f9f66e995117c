"""``kne show``: an edit's facts, layers, rows, how large the change is, a picture, what it shares with others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import require_file
from kne_easyedit.cli.edited import is_store, load_edit, open_store

BAR = 24
"""Widest bar, in characters."""
NAMED = 10
"""Facts that are printed at most."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "show", help="an edit's facts, layers, rows and size against the weights, a picture, collisions with others"
    )
    parser.add_argument("edit", type=Path, metavar="DIR", help="an edit's folder")
    parser.add_argument(
        "--with",
        dest="others",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="DIR",
        help="edits to compare it with",
    )
    parser.add_argument("--model", help="folder or hub name of the base (default: as the edit names it)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the picture (default: edit.png in DIR)")
    parser.set_defaults(command=_show, interrupted="nothing was changed")


def _show(arguments: argparse.Namespace) -> int:
    from kne_easyedit.edits.sizes import ensemble_of, shared_rows, sizes_of

    if arguments.picture is not None:
        require_file(arguments.picture, "--picture")
    edit = load_edit(arguments.edit)
    others = [(path, load_edit(path)) for path in arguments.others]
    _print_facts(edit, arguments.edit)
    name = arguments.model or str(edit.hparams.get("model_name") or edit.base.name)
    try:
        sizes = sizes_of(edit, _folder(name))
    except (ValueError, OSError) as error:
        print(f"(the base's weights are not compared: {printable(error)})")
        sizes = sizes_of(edit)
    largest = max(size.change for size in sizes) or 1.0
    print(f"\n{'module':<44} {'rows':>6} {'of':>6} {'change':>9} {'of weights':>10}")
    for size in sizes:
        share = "-" if size.share is None else f"{size.share:.2%}"
        print(
            f"{printable(size.module):<44} {size.rows:>6} {size.outputs:>6} {size.change:>9.4f} {share:>10}  "
            f"{'#' * round(BAR * size.change / largest)}"
        )
    whole = "of the changed rows' weights" if sizes[0].share is not None else "the base's weights are not at hand"
    print("change: Frobenius norm of what is added; of weights: the same as a share of the rows' own norm")
    total = sum(size.change**2 for size in sizes) ** 0.5
    weights = [size.weights for size in sizes]
    if all(value is not None for value in weights):
        whole = f"{total / sum(value**2 for value in weights if value is not None) ** 0.5:.2%} {whole}"
    print(f"in all {edit.size} rows of {len(sizes)} modules, norm {total:.4f}: {whole}")
    for path, other in others:
        _print_shared(edit, str(path), other, shared_rows(edit, other))
    _print_store(edit, arguments.edit.absolute())
    picture = arguments.picture or arguments.edit / "edit.png"
    if _draw(ensemble_of(edit), picture, "\n".join(map(printable, edit.facts[:3]))):
        print(f"\nWritten to {picture}")
    return 0


def _print_facts(edit: Any, folder: Path) -> None:
    base = edit.hparams.get("model_name") or edit.base.name
    print(f"edit {edit.digest[:12]} in {folder}, of {printable(base)} ({printable(edit.base.architecture)})")
    answers = {(one.fact.prompt, one.fact.target): one for one in edit.answers}
    for request in edit.requests[:NAMED]:
        found = answers.get((request["prompt"], request.get("target_new")))
        said = f"   P {found.probability:.2%}{'' if found.greedy else ', not the greedy answer'}" if found else ""
        old = f"   (old: {printable(request['ground_truth'])})" if request.get("ground_truth") else ""
        print(f"  {printable(request['prompt'])}  ->  {printable(request.get('target_new'))}{said}{old}")
    if len(edit.requests) > NAMED:
        print(f"  ... and {len(edit.requests) - NAMED} facts more (edit.json)")
    print(
        f"{edit.steps} steps, loss {edit.losses[0]:.3f} -> {edit.losses[-1]:.3f}; made with "
        + printable(", ".join(f"{name} {version}" for name, version in edit.versions.items()))
    )
    if edit.trained_on:
        print(printable(f"trained on top of {', '.join(one[:12] for one in edit.trained_on)}: it counts on these"))


def _print_store(edit: Any, folder: Path) -> None:
    """Of an edit in a store: the rows that it shares with the others there, most first."""
    from kne_easyedit.edits.sizes import shared_rows
    from kne_easyedit.edits.store import EDITS_FOLDER

    home = folder.parent.parent
    if folder.parent.name != EDITS_FOLDER or not is_store(home):
        return
    store, found, apart = open_store(home), [], 0
    for entry in store.list():
        if entry.id == folder.name:
            continue
        try:
            other = store.edit(entry.id)
        except (ValueError, OSError) as error:
            print(f"\n(not compared: {printable(error)})")
            continue
        shared = shared_rows(edit, other)
        if shared.rows:
            found.append((shared, entry, other))
        else:
            apart += 1
    found.sort(key=lambda one: -one[0].rows)
    for shared, entry, other in found[:NAMED]:
        _print_shared(edit, f"{entry.id} of this store, which is {'on' if entry.on else 'off'}", other, shared)
    if len(found) > NAMED:
        print(f"\nand rows in common with {len(found) - NAMED} edits more of this store")
    if apart:
        print(f"\nno row in common with {apart} {'other edits' if apart > 1 else 'other edit'} of this store")


def _print_shared(edit: Any, path: str, other: Any, found: Any) -> None:
    print(f"\nwith {path} ({printable('; '.join(other.facts[:2]))}):")
    if reason := edit.base.conflict(other.base):
        print(f"  of another base: {printable(reason)}")
    if not found.rows:
        print("  no row is changed by both")
        return
    print(
        f"  {found.rows} rows are changed by both: {found.rows / edit.size:.0%} of this edit's, "
        f"{found.rows / other.size:.0%} of the other's; in these rows the cosine of the changes is {found.cosine:+.2f}"
    )
    print(f"  most in {printable(', '.join(f'{name} ({count})' for name, count in found.modules[:3]))}")


def _folder(name: str) -> Path | None:
    """The folder of the base's files; None if it is not on this machine."""
    from kne_easyedit.doctor.model import local_folder

    try:
        return local_folder(name)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"(the base's weights are not compared: {printable(error)})")
        return None


def _draw(ensemble: Any, path: Path, title: str) -> bool:
    from kne_easyedit.localization.figures import draw_ensemble

    try:
        draw_ensemble(ensemble, path, title)
    except ImportError as error:
        print(f"\n(no picture: {error})")
        return False
    return True
