"""Which method works in which mode of which EasyEdit, and thanks to which patches: docs/compatibility.md.

    python scripts/compatibility.py --easyedit pypi ~/EasyEdit ~/EasyEdit-2024 --out docs/compatibility.md
    python scripts/compatibility.py --easyedit pypi ~/EasyEdit --smollm2 test_cf.json --out docs/compatibility.md

A cell is one method in one of EasyEdit's own modes on a tiny random model: it works if nothing fails and the model is
bit by bit what it was afterwards (in sequential mode: if the edits have stayed). A patch is needed if the cell works
with all patches and fails with all but this one. Every version runs in processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

METHODS = ("KNE", "FT", "FT-L", "LoRA", "AdaLoRA", "ROME", "MEMIT", "KN")
MODES = ("edit", "sequential_edit", "batch_edit 1", "batch_edit 10", "batch_edit 100", "normal_edit", "edit_requests")
HPARAMS = Path(__file__).resolve().parents[1] / "hparams"
WORDS = "The capital language river name mother city of in is was to that through flows spoken a are He She".split()
SUBJECTS = [f"Land{i}" for i in range(101)]
TARGETS = [f"Town{i}" for i in range(10)]
SENTINEL = "CELLS "
FORGETS = "this version begins a new adapter with every edit and loses those before"
"""The one limit that shows by no error."""


# One process, one EasyEdit


def tiny_model():
    """A random Llama of four layers and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS, *SUBJECTS, *TARGETS, ".", ","])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def settings(label: str, stats: Path, tiny: bool):
    """The shipped settings for SmolLM2, cut down for a tiny model."""
    from kne_easyedit import bridge

    hparams = bridge.load_method(label, HPARAMS / label / "smollm2-135m.yaml")
    if hasattr(hparams, "stats_dir"):
        hparams.stats_dir = str(stats)
    if not tiny:
        return hparams
    hparams.model_name = "tiny-model"
    smaller = {
        "num_steps": 3,
        "v_num_grad_steps": 3,
        "v_loss_layer": 3,
        "mom2_n_samples": 7,
        "attribution_steps": 2,
        "localization_data": None,
    }
    for name, value in smaller.items():
        if hasattr(hparams, name):
            setattr(hparams, name, value)
    if getattr(hparams, "layers", None):
        hparams.layers = [1, 2] if label == "MEMIT" else [2]
    return hparams


def limit(label: str, mode: str) -> str | None:
    """Why this EasyEdit cannot do it, whatever is patched; None if it can."""
    from kne_easyedit import bridge
    from kne_easyedit.bridge.method_editor import is_batchable
    from kne_easyedit.bridge.methods import traits_of

    editor = bridge.register().BaseEditor
    alg_name = traits_of(label).alg_name
    name = mode.split()[0]
    try:
        bridge.load_method(label, HPARAMS / label / "smollm2-135m.yaml")
    except ValueError as error:
        return str(error)
    if name != "sequential_edit" and not hasattr(editor, name):
        return f"this version has no {name}"
    if name in ("batch_edit", "normal_edit") and not is_batchable(alg_name):
        return (
            "KN edits the first of several facts"
            if alg_name == "KN"
            else f"EasyEdit counts {alg_name} among the singleton methods"
        )
    if name == "normal_edit" and alg_name == "MEMIT":
        return "normal_edit passes no subject, MEMIT needs one"
    if name == "normal_edit" and alg_name == "LoRA":
        return "normal_edit writes back whole weights only: the adapter stays"
    if name == "batch_edit" and alg_name == "LoRA" and "unload" not in _source(editor.batch_edit):
        return "this version's batch_edit writes back whole weights only: the adapter stays"
    if name == "sequential_edit" and alg_name == "LoRA" and bridge.is_legacy():
        return FORGETS
    if name == "sequential_edit" and alg_name == "KN" and bridge.is_legacy():
        return "this version undoes every KN edit at once"
    return None


def _source(function) -> str:
    import inspect

    text = inspect.getsource(function)
    return (
        text + inspect.getsource(inspect.getmodule(function).restore_after_edit)
        if "restore_after_edit" in text
        else text
    )


def requests(count: int) -> dict[str, list]:
    """Facts in the form that `edit` takes."""
    subjects, targets = SUBJECTS[:count], [TARGETS[i % len(TARGETS)] for i in range(count)]
    probes = {
        "reasoning": {
            "prompt": [["The river of Land1 is"] for _ in subjects],
            "ground_truth": [["Town1"] for _ in subjects],
        }
    }
    return {
        "prompts": [f"The capital of {subject} is" for subject in subjects],
        "target_new": targets,
        "ground_truth": list(targets[::-1]),
        "subject": subjects,
        "portability_inputs": probes,
        "locality_inputs": json.loads(json.dumps(probes)),
    }


def attempt(label: str, mode: str, stats: Path, model=None, tokenizer=None, facts: dict | None = None) -> None:
    """Runs one cell. Raises whatever fails, or AssertionError if the model is not as the mode should leave it."""
    from kne_easyedit import bridge
    from kne_easyedit.models.fingerprint import model_digest

    tiny = model is None
    if tiny:
        model, tokenizer = tiny_model()
    name, _, size = mode.partition(" ")
    size = int(size or 1)
    facts = facts or requests(max(3, size + 1) if name == "batch_edit" else 3)
    count, legacy = len(facts["prompts"]), bridge.is_legacy()
    editor = bridge.editor_for(settings(label, stats, tiny), model, tokenizer)
    before = model_digest(model)
    if name in ("edit", "sequential_edit"):
        stay = name == "sequential_edit"
        how = {"keep_original_weight": not stay} if legacy else {"sequential_edit": stay}
        metrics, edited, _ = editor.edit(**facts, verbose=False, **how)
    elif name == "batch_edit":
        editor.hparams.batch_size = size
        plain = {key: facts[key] for key in ("prompts", "target_new", "ground_truth", "subject")}
        metrics, edited, _ = editor.batch_edit(
            **plain, verbose=False, **({"keep_original_weight": True} if legacy else {})
        )
    elif name == "normal_edit":
        _, edited, _ = editor.normal_edit(prompts=facts["prompts"], target_new=facts["target_new"])
        metrics = [None] * count
    else:
        keys = ("prompt", "target_new", "ground_truth", "subject")
        columns = zip(facts["prompts"], facts["target_new"], facts["ground_truth"], facts["subject"])
        rows = [{**dict(zip(keys, row)), "portability": {}, "locality": {}} for row in columns]
        metrics, edited, _ = editor.edit_requests(
            rows, verbose=False, **({"keep_original_weight": True} if legacy else {})
        )
    assert len(metrics) == count, f"{len(metrics)} metrics for {count} facts"
    changed = (
        model_digest(model) != before
        or hasattr(model, "peft_config")
        or hasattr(edited, "peft_config")
        and name == "sequential_edit"
    )
    assert changed == (name == "sequential_edit"), (
        "the edits have not stayed" if not changed else "the model is not what it was"
    )


def cells(methods: list[str]) -> Iterator[dict]:
    """Every cell of this process's EasyEdit on the tiny model."""
    import torch

    from kne_easyedit.bridge import TextSource, use_text_source

    torch.set_num_threads(1)
    small = TextSource(samples=8, length=6)
    with tempfile.TemporaryDirectory() as stats, use_text_source(small):
        for label in methods:
            for mode in MODES:
                cannot = limit(label, mode)
                yield {
                    "method": label,
                    "mode": mode,
                    "cannot": cannot,
                    "error": None if cannot else _error(label, mode, Path(stats)),
                }


def smollm2_cells(data: str, methods: list[str], size: int = 3) -> Iterator[dict]:
    """Figures of three real records on the real model: every method edit by edit, KNE and FT in the other modes, too."""
    import dataclasses

    from kne_easyedit.benchmark import Run, run
    from kne_easyedit.facts.records import load_requests
    from kne_easyedit.models.loading import load_model

    hparams = {
        label: settings(label, Path("stats").resolve(), False) for label in methods if limit(label, "edit") is None
    }
    model, tokenizer = load_model(next(iter(hparams.values())))
    found = load_requests(data, size)
    for mode, batch in (("single", 1), ("sequential", 1), ("batch", size)):
        able = {
            label: dataclasses.replace(h) for label, h in hparams.items() if mode == "single" or label in ("KNE", "FT")
        }
        if not able:
            continue
        summary = run(
            Run(
                model,
                tokenizer,
                found,
                able,
                data,
                Path(mode),
                mode=mode,
                batch_size=batch,
                before_folder=Path("before"),
            )
        )
        for method, figures in summary["methods"].items():
            names = ("edit_success", "portability", "locality", "fluency", "seconds_per_edit")
            yield {
                "method": method,
                "mode": mode,
                **{name: figures[name] for name in names},
                "retention": figures.get("retention"),
            }


def _error(label: str, mode: str, stats: Path) -> str | None:
    hidden = io.StringIO()
    try:
        with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            attempt(label, mode, stats)
    except Exception as error:  # every failure of a cell is a result
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else 'no message'}"
    return None


# All versions


def in_process(home: str, off: str, methods: list[str], keep: Path, smollm2: str | None = None) -> dict:
    """The cells of one EasyEdit, with some patches switched off, in a process of its own; kept in ``keep``."""
    kept = kept_file(keep, home, off, methods, smollm2 is not None)
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    found = _in_process(home, off, methods, smollm2)
    if "failed" not in found:  # a process that was killed must be run again
        keep.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def kept_file(keep: Path, home: str, off: str, methods: list[str], smollm2: bool) -> Path:
    return keep / f"{Path(home).name}-{off or 'all-patches'}{'-smollm2' if smollm2 else ''}-{'-'.join(methods)}.json"


def _in_process(home: str, off: str, methods: list[str], smollm2: str | None) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("EASYEDIT_HOME", "KNE_PATCHES_OFF")}
    environment |= {
        "KNE_PATCHES_OFF": off,
        **({} if home == "pypi" else {"EASYEDIT_HOME": str(Path(home).expanduser().resolve())}),
    }
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--cells",
        *methods,
        *(["--smollm2", str(Path(smollm2).resolve())] if smollm2 else []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    lines = [line.removeprefix(SENTINEL) for line in result.stdout.splitlines() if line.startswith(SENTINEL)]
    if result.returncode or not lines:
        if off in ("", "all") and not smollm2:
            raise RuntimeError(f"{home}: {result.stderr[-2000:]}")
        return {"failed": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(lines[-1])


def version(home: str, methods: list[str], keep: Path) -> dict:
    """All cells of one EasyEdit: with every patch, with none, and with all but one."""
    from tqdm import tqdm

    whole = in_process(home, "", methods, keep)
    found = {(c["method"], c["mode"]): {**c, "needs": []} for c in whole["cells"]}
    for patch in tqdm(
        [p for p, state in whole["patches"].items() if state == "applied"], desc=f"{home}: one patch less", unit="patch"
    ):
        less = in_process(home, patch, methods, keep)
        failing = {(c["method"], c["mode"]) for c in less["cells"] if c["error"]} if "cells" in less else set(found)
        for key, cell in found.items():
            if key in failing and not cell["error"] and not cell["cannot"]:
                cell["needs"].append(patch)
    return {
        "easyedit": whole["easyedit"],
        "patches": whole["patches"],
        "faults": whole["faults"],
        "cells": list(found.values()),
    }


def text_of(found: dict[str, dict], smollm2: dict[str, dict], data: str | None) -> str:
    """The page."""
    marks: dict[str, str] = {}

    def note(reason: str) -> str:
        return marks.setdefault(reason, f"[{len(marks) + 1}]")

    parts = [HEAD]
    for home, of_version in found.items():
        easyedit = of_version["easyedit"]
        name = (
            "PyPI release 0.0.1.dev0 (October 2023)"
            if home == "pypi"
            else f"checkout of {easyedit['version'][:10]} ({of_version.get('date', '')})"
        )
        parts.append(f"\n## {name}\n")
        parts.append("| mode | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
        table = {(c["method"], c["mode"]): c for c in of_version["cells"]}
        for mode in MODES:
            row = []
            for method in METHODS:
                cell = table[method, mode]
                if cell["cannot"]:
                    row.append(f"cannot {note(cell['cannot'])}")
                elif cell["error"]:
                    row.append(f"**fails** {note(cell['error'])}")
                else:
                    row.append(
                        "works" + (f" with {note('patches ' + ', '.join(cell['needs']))}" if cell["needs"] else "")
                    )
            parts.append(f"| {mode} | " + " | ".join(row) + " |")
        applied = [name for name, state in of_version["patches"].items() if state == "applied"]
        parts.append(f"\nPatches applied to this version: {', '.join(applied)}.")
    parts.append("\n## Notes\n")
    parts += [f"- {mark} {reason}" for reason, mark in marks.items()]
    parts.append(OTHERS)
    parts.append("## What the patches mend\n\n| patch | fault |\n|---|---|")
    parts += [f"| {name} | {fault} |" for name, fault in next(iter(found.values()))["faults"].items()]
    if smollm2:
        parts.append(SMOLLM2.format(data=Path(data).name))
        parts.append(
            "| EasyEdit | mode | method | edit success | portability | locality | fluency | seconds an edit |\n|---|---|---|---|---|---|---|---|"
        )
        for home, rows in smollm2.items():
            for row in rows.get("cells", ()):
                figures = " | ".join(
                    "-" if row[n] is None else f"{row[n]:.2f}"
                    for n in ("edit_success", "portability", "locality", "fluency")
                )
                parts.append(
                    f"| {_short(home, found)} | {row['mode']} | {row['method']} | {figures} | {row['seconds_per_edit']:.1f} |"
                )
            if "failed" in rows:
                parts.append(f"| {_short(home, found)} | | | failed: {rows['failed']} | | | | |")
    return "\n".join(parts) + "\n"


def _short(home: str, found: dict) -> str:
    return "PyPI 2023" if home == "pypi" else found[home]["easyedit"]["version"][:7]


HEAD = """# Which EasyEdit, which mode, which method

Written by `scripts/compatibility.py` (see its head for the command). "works": nothing fails and the model is bit by
bit what it was afterwards (sequential_edit: the edits have stayed), on a tiny random model on a CPU; "with [n]": only
thanks to the patches that the note names, each of which alone makes the cell fail when it is missing; "cannot": EasyEdit
has no such thing, for the reason of the note. `kne doctor` lists the patches of the EasyEdit that you use;
`KNE_PATCHES_OFF=name,name` switches some off."""
OTHERS = """
## Other methods

Methods of the July 2026 tree beside those above, with EasyEdit's own settings (fewer steps, other layers) on a tiny random
model called "tiny-llama", by `MethodEditor`: edit, evaluate, undo, alone and two in a row (`tests/bridge/test_easyedit_methods.py`).

| method | |
|---|---|
| MEMIT-FE, R-ROME, EMMET, EAMET, QLoRA | edited and undone bit by bit |
| AlphaEdit, SPHERE | the same, for models with `llama`, `gpt2-xl` (AlphaEdit: or `qwen`) in their name; refused for others |
| DPO, WISE | the same, for requests with `target_neg`, `loc_prompt`; refused for others |
| GRACE | refused without scikit-learn; not run with it |
| MEND | refused without the file of its trained editor (`archive`); not run with one |
| IKE | refused: edits prompts, not weights |
| FT-Api, DeepEdit-Api | refused: edit a model behind an API |
| MELO, SERAC | refused: put the model into a wrapper, or beside a memory, and give nothing by which that could be undone |
| ULTRAEDIT | refused: gives no original weights |
| SimIE | refused: starts every edit from the first weights that it has seen |
| DINM | refused: wants safety records |
| DEFER | refused: its edited model cannot answer several prompts at once |
| PMET | fails in its own code on the tiny model (probabilities that are no numbers); not run elsewhere |
| CORE | not run: EasyEdit has no settings of it |

"""
SMOLLM2 = """
## On a real model

SmolLM2-135M-Instruct, the first 3 records of {data}, the shipped settings, edit by edit, KNE and FT also in a row and 3
facts at once (`kne run`'s modes), on 2 CPU cores that had other work. Three records say that a method runs, not how good
it is (MEMIT's weight of the second moments, 15000 as EasyEdit has it for Llama-2-7B, was too large for this model, and
the shipped file has had 1000 since). Methods of which a version has no row were not run there, or it does not have them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--easyedit", nargs="+", metavar="FOLDER", help="checkouts, and 'pypi' for the installed release"
    )
    parser.add_argument("--dates", nargs="*", default=[], help="a date for each checkout, for the headings")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--smollm2",
        metavar="DATA",
        help="KnowEdit file: also edit 3 of its records of SmolLM2 (half an hour a version)",
    )
    parser.add_argument(
        "--smollm2-methods",
        nargs="+",
        default=list(METHODS),
        choices=METHODS,
        help="only these on SmolLM2 (default: all)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("outputs/compatibility"),
        help="folder of what is done: an interrupted run goes on from there",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/compatibility.md"))
    parser.add_argument("--cells", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cells:
        from kne_easyedit import bridge
        from kne_easyedit.bridge import patches

        bridge.register()
        found = list(smollm2_cells(arguments.smollm2, arguments.cells) if arguments.smollm2 else cells(arguments.cells))
        states = {patch.name: patch.state for patch in patches.report()}
        faults = {patch.name: patch.fault for patch in patches.report()}
        print(
            SENTINEL + json.dumps({"easyedit": bridge.describe(), "patches": states, "faults": faults, "cells": found})
        )
        return
    found = {}
    dates = dict(zip([home for home in arguments.easyedit if home != "pypi"], arguments.dates))
    for home in arguments.easyedit:
        found[home] = {**version(home, arguments.methods, arguments.keep), "date": dates.get(home, "")}
    real = {}
    for home in arguments.easyedit if arguments.smollm2 else ():
        whole = kept_file(arguments.keep, home, "", list(METHODS), True).is_file()  # done with all methods before
        real[home] = in_process(
            home, "", list(METHODS) if whole else arguments.smollm2_methods, arguments.keep, arguments.smollm2
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text_of(found, real, arguments.smollm2), encoding="utf-8")
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
