"""``kne edits``: a store of edits: listed, switched on and off, put into another order, measured again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import require_folder
from kne_easyedit.cli.edited import add_base, load_base, load_edit, open_edits, open_store

if TYPE_CHECKING:
    from kne_easyedit.edits.store import Entry

MEASURED = ("off", "reorder", "remove")
"""Actions that may cost other edits their answers: these are measured again."""


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser("edits", help="list, add, on, off, reorder, check, remove: a store of edits")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    several = {"nargs": "+", "metavar": "ID", "help": "names that `kne edits list` shows"}
    for name, function, text, ids in (
        ("list", _list, "the edits in their order, and which are on", None),
        ("add", _add, "put finished edits into a store, switched on", None),
        ("on", _on, "switch edits on", several),
        ("off", _off, "switch edits off; the others are then bit for bit what they are without them", several),
        (
            "reorder",
            _reorder,
            "another order; active edits are added in it",
            {**several, "help": "all, in their order"},
        ),
        ("check", _check, "measure every active edit's answers again; exit code 1 if one is lost", None),
        ("remove", _remove, "remove edits and their files", several),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
        if ids is not None:
            action.add_argument("ids", **ids)
        if name == "add":
            action.add_argument("edits", nargs="+", type=Path, metavar="DIR", help="folders of edits")
            action.add_argument("--name", help="the id, if it is one edit (default: the start of its digest)")
        if name in MEASURED:
            action.add_argument(
                "--no-check", action="store_true", help="do not load the model where edits counted on what is changed"
            )
        if name in (*MEASURED, "check"):
            add_base(action)
        action.set_defaults(command=function, interrupted="each change was made whole, or not at all")


def _list(arguments: argparse.Namespace) -> int:
    entries = open_store(arguments.store).list()
    print(f"store {arguments.store}: {len(entries)} edits, {sum(entry.on for entry in entries)} on")
    width = max((len(entry.id) for entry in entries), default=0)
    for entry in entries:
        facts = printable("; ".join(entry.facts[:2])) + (
            f"; and {len(entry.facts) - 2} more" if len(entry.facts) > 2 else ""
        )
        print(f"{entry.order:>3}  {'on ' if entry.on else 'off'}  {entry.id:<{width}}  {facts}")
        if entry.trained_on:
            lacking = f"; not active before it: {', '.join(entry.missing)}" if entry.missing else ""
            below = printable(f"trained on top of {', '.join(entry.trained_on)}{lacking}")
            print(f"{'':>{10 + width}}{below}")
    return 0


def _add(arguments: argparse.Namespace) -> int:
    from kne_easyedit.edits.store import EditStore

    if arguments.name is not None and len(arguments.edits) > 1:
        raise ValueError("--name: names one edit; add several one by one, or without names")
    require_folder(arguments.store, "STORE")
    edits = [load_edit(path) for path in arguments.edits]  # all are read before one is added
    store = EditStore(arguments.store)
    for path, edit in zip(arguments.edits, edits):
        print(f"{store.add(edit, arguments.name)}: {path} ({printable('; '.join(edit.facts[:2]))})")
    return 0


def _on(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    _require_known(store.list(), arguments.ids)
    for one in dict.fromkeys(arguments.ids):
        store.on(one)
    return _list(arguments)


def _off(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    _require_known(store.list(), arguments.ids)
    worse = [entry for one in dict.fromkeys(arguments.ids) for entry in store.off(one)]
    return _changed(worse, arguments)


def _reorder(arguments: argparse.Namespace) -> int:
    return _changed(open_store(arguments.store).reorder(arguments.ids), arguments)


def _remove(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    _require_known(store.list(), arguments.ids)
    worse = [entry for one in dict.fromkeys(arguments.ids) for entry in store.remove(one)]
    return _changed(worse, arguments)


def _changed(worse: Sequence[Entry], arguments: argparse.Namespace) -> int:
    """Shows the store, and measures edits that were trained on top of what is not active before them any more."""
    _list(arguments)
    there = {entry.id for entry in open_store(arguments.store).list() if entry.on}
    names = sorted({entry.id for entry in worse} & there)
    if not names:
        return 0
    later = f"`kne edits check {arguments.store}` loads the model and measures them again"
    print(f"{', '.join(names)} may have lost answers by this{f'; {later}' if arguments.no_check else ''}")
    if not arguments.no_check:
        try:
            _check(arguments)
        except (OSError, ValueError) as error:  # what was asked is done: it is no failure that the base is elsewhere
            print(f"not measured: {printable(str(error))}; {later}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.store)
    if not any(entry.on for entry in store.list()):
        print(f"store {arguments.store}: no edit is on, the model is the base")
        return 0
    model, _ = load_base(open_edits(arguments.store), arguments)
    lost = 0
    for found in store.check(model, force=arguments.force):
        print(f"\n{found.entry.id}")
        for before, now in zip(found.trained, found.now):
            gone = before.greedy and not now.greedy
            lost += gone
            print(
                f"  {'LOST' if gone else 'ok  ' if now.greedy else 'weak'}  {printable(now.fact.prompt)}  ->  "
                f"{printable(now.fact.target)}   "
                f"P {before.probability:.2%} -> {now.probability:.2%}, loss {before.loss:.3f} -> {now.loss:.3f}"
            )
        if found.entry.missing:
            print(f"  trained on top of {printable(', '.join(found.entry.missing))}, which is not active before it")
        if found.shared:
            most = sorted(found.shared.items(), key=lambda item: -item[1])[:3]
            print("  changes rows that others change, too: " + ", ".join(f"{id} ({count})" for id, count in most))
    print(
        f"\n{lost} {'fact is' if lost == 1 else 'facts are'} lost" if lost else "\nevery fact that was reached is there"
    )
    return 1 if lost else 0


def _require_known(entries: Sequence[Entry], ids: Sequence[str]) -> None:
    """Raises ValueError for an id that the store has not got, before the first of several is changed."""
    from kne_easyedit._util.messages import require_one_of

    for one in ids:
        require_one_of("id", one, [entry.id for entry in entries])
