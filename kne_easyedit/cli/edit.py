"""``kne edit``: one fact, or a file of facts, edited into a model and saved as a small folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kne_easyedit._util.messages import printable
from kne_easyedit.cli.common import (
    BEGINS_AGAIN,
    add_general,
    add_settings_of_model,
    load_settings,
    not_negative,
    of_the_paper,
    positive,
    require_folder,
    require_new,
)

if TYPE_CHECKING:
    from kne_easyedit.edits.store import EditStore
    from kne_easyedit.facts.encoding import Tokenizer
    from kne_easyedit.hparams import KNEHyperParams


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "edit", help="edit a fact, or a file of facts: answers before and after; the edit is saved as a small folder"
    )
    add_settings_of_model(parser)
    parser.add_argument(
        "--paper", action="store_true", help="train as the paper does, which changes neighbours of the facts, too"
    )
    parser.add_argument(
        "--load-in",
        choices=("8bit", "4bit"),
        help="load the base quantised (bitsandbytes) and keep the edit beside it: kne ask, kne adapter",
    )
    parser.add_argument("--prompt", help="the beginning of a sentence, e.g. 'The capital of France is'")
    parser.add_argument("--target", help="the new answer")
    parser.add_argument("--subject", help="what the prompt is about, as it stands there; some settings use it")
    parser.add_argument("--old", metavar="ANSWER", help="the old answer (default: what the model says)")
    parser.add_argument(
        "--requests", metavar="FILE", help="a file of facts in place of --prompt: CSV, JSON or JSON Lines"
    )
    parser.add_argument("--records", type=positive, metavar="N", help="only the first N facts of the file")
    parser.add_argument(
        "--on-bad-record",
        choices=("fail", "skip"),
        default="fail",
        help="facts that cannot be used (default %(default)s)",
    )
    parser.add_argument(
        "--neighbours",
        type=not_negative,
        default=4,
        metavar="N",
        help="neighbours asked of each fact; 0: none (default %(default)s)",
    )
    add_general(parser)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder of the edit: new, or empty")
    where.add_argument(
        "--store", type=Path, metavar="STORE", help="train on top of a store's active edits, and add it to them"
    )
    parser.add_argument("--name", help="its name in the store (default: the start of its digest)")
    parser.set_defaults(command=_edit, interrupted=BEGINS_AGAIN)


def _edit(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from kne_easyedit.benchmark.before_after import Questions
    from kne_easyedit.benchmark.general import Examination, general_rows
    from kne_easyedit.cli.side_by_side import FACTS, print_questions, print_rows
    from kne_easyedit.editing.edit import apply_kne_to_model, compute_edit, require_reached
    from kne_easyedit.editing.kne_edit import KNEEdit
    from kne_easyedit.edits.beside import kept_beside
    from kne_easyedit.edits.kept_answers import rows_added
    from kne_easyedit.edits.on_top import localized_and_applied
    from kne_easyedit.edits.store import EDITS_FOLDER
    from kne_easyedit.models.loading import load_model

    store = _store(arguments)
    requests = _requests(arguments)
    examination = Examination(arguments.perplexity, arguments.ability, arguments.ability_limit)
    examination.require()
    quantised = {} if arguments.load_in is None else {"load_in": arguments.load_in}
    hparams = load_settings(arguments, {**(of_the_paper() if arguments.paper else {}), **quantised})
    model, tokenizer = load_model(hparams)
    requests = _taken(requests, model, tokenizer, hparams, arguments)
    beside = kept_beside(model, hparams)
    if beside and store is not None:
        raise ValueError(
            "--store: nothing can be added to a quantised base, so no edit is trained on top of others there; give "
            "--out, and add it to a store by kne edits add"
        )
    if store is not None:
        localized_and_applied(store, model, tokenizer, requests, hparams)
    questions = Questions(
        model,
        tokenizer,
        requests,
        neighbours=arguments.neighbours,
        of_facts=FACTS,
        separator=hparams.separator,
        chat=hparams.use_chat_template,
    )
    before = questions.ask(model)
    general_before = examination.of(model, tokenizer)
    edits: list[KNEEdit] = []
    start = time.monotonic()
    with tqdm(total=hparams.num_steps, desc="training", unit="step", leave=False, disable=None) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()

        if beside:
            edits.append(compute_edit(model, tokenizer, requests, hparams, on_step=on_step))
            require_reached(edits[0], hparams)
        else:
            apply_kne_to_model(model, tokenizer, requests, hparams, on_trained=edits.append, on_step=on_step)
    (edit,) = edits
    seconds = time.monotonic() - start
    where = arguments.out
    if store is None:
        edit.save(where)
    else:
        where = arguments.store / EDITS_FOLDER / store.add(edit, arguments.name)
        store.apply(model)  # written by itself it is rounded by itself: what is asked is the state that the store has
    print(
        f"{len(requests)} {'fact' if len(requests) == 1 else 'facts'} in {seconds:.1f} s: {edit.steps} steps, loss "
        f"{edit.losses[0]:.3f} -> {edit.losses[-1]:.3f}, {edit.size} rows of {len(edit.deltas)} modules"
    )
    with rows_added(model, edit.deltas if beside else {}):
        print_questions(questions, before, questions.ask(model), arguments.neighbours)
        if examination:
            print("\nbeside the facts:")
            print_rows([("", "before", "after"), *general_rows(general_before, examination.of(model, tokenizer))])
    if len(requests) > FACTS:
        print(f"\n... and {len(requests) - FACTS} facts more: kne show {where}")
    print(f"\nWritten to {where}; the model's own files stay. Ask it: kne ask {arguments.store or where}")
    if beside:
        print(f"The base is quantised: the edit is kept beside it. To serve it: kne adapter {where} --out ADAPTER")
    return 0


def _store(arguments: argparse.Namespace) -> EditStore | None:
    """The store to add to; None for a folder of its own. Raises ValueError if there can be neither."""
    from kne_easyedit.edits.listing import checked_id
    from kne_easyedit.edits.places import way_out_of_unlisted
    from kne_easyedit.edits.store import EDITS_FOLDER, EditStore

    if arguments.store is None:
        if arguments.name is not None:
            raise ValueError("--name: names an edit of a store; give one by --store")
        require_new(arguments.out)
        return None
    require_folder(arguments.store, "--store")
    store = EditStore(arguments.store)
    if arguments.name is not None:
        name = checked_id(arguments.name).casefold()
        if name in {entry.id.casefold() for entry in store.list()}:
            raise ValueError(f"--name: {arguments.name!r} is taken in {arguments.store}; choose another name")
        places = arguments.store / EDITS_FOLDER
        if unlisted := [p for p in (places.iterdir() if places.is_dir() else ()) if p.name.casefold() == name]:
            raise ValueError(
                f"--name: {unlisted[0]} is there, and not in the store's list; {way_out_of_unlisted(unlisted[0])}"
            )
    return store


def _requests(arguments: argparse.Namespace) -> list[dict]:
    """The facts to edit. Raises ValueError, naming the options, and as `load_records`."""
    from kne_easyedit.facts.records import load_records, to_request

    single = {
        "prompt": arguments.prompt,
        "target_new": arguments.target,
        "subject": arguments.subject,
        "ground_truth": arguments.old,
    }
    given = {name: value for name, value in single.items() if value is not None}
    if arguments.requests is not None:
        if given:
            raise ValueError("--requests: a file of facts takes the place of --prompt, --target, --subject and --old")
        found, complaints = load_records(arguments.requests, arguments.records, on_bad=arguments.on_bad_record)
        for complaint in complaints:
            print(f"skipped: {printable(complaint)}")
        if not found:
            raise ValueError(f"--requests: no fact of {arguments.requests} can be used")
        return found
    if arguments.records is not None:
        raise ValueError("--records: counts the facts of a file; name it by --requests")
    if not {"prompt", "target_new"} <= given.keys():
        raise ValueError("--prompt and --target belong together: a fact has both; or name a file by --requests")
    try:
        return [to_request(given)]
    except ValueError as error:
        raise ValueError(f"--prompt, --target, --subject: {error}") from error


def _taken(
    requests: list[dict], model: Any, tokenizer: Tokenizer, hparams: KNEHyperParams, arguments: argparse.Namespace
) -> list[dict]:
    """The requests that tokenizer and model can take. Raises ValueError, naming option or record, for others."""
    from kne_easyedit.facts.encoding import chat_prompt, natural
    from kne_easyedit.facts.records import require_taken

    found = []
    for request in requests:
        prompt = request["prompt"]
        asked = chat_prompt(tokenizer, prompt) if hparams.use_chat_template else natural(prompt)
        try:
            require_taken(asked, request["target_new"], tokenizer, model, hparams.separator)
            found.append(request)
        except ValueError as error:
            if arguments.requests is None:
                raise ValueError(f"--prompt, --target: {error}") from error
            complaint = f"{arguments.requests}: record {request['index']}: {error}"
            if arguments.on_bad_record == "fail":
                raise ValueError(f"{complaint} (--on-bad-record skip leaves such records out)") from error
            print(f"skipped: {printable(complaint)}")
    if not found:
        raise ValueError(f"--requests: no fact of {arguments.requests} can be used")
    return found
