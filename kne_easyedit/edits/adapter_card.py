"""The README.md of an adapter: what it changes, and how each program that serves it is told to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from kne_easyedit._util.cards import card_head, has_hub_form
from kne_easyedit._util.markdown import literal, table_of_rows

LISTED = 100
"""Facts that a card names at most; of the others it gives the number."""


def is_hub_name(name: str) -> bool:
    """Whether a name has the form ``owner/model`` of the hub, and is no folder here.

    A folder of another machine, or one that is gone, is not told apart: a commit of the hub tells (``Base.revision``).
    """
    return has_hub_form(name) and not Path(name).is_dir()


def shown_name(name: str, on_hub: bool) -> str:
    """A model's name for others to read: the hub's name, or the last part of a path."""
    return name if on_hub else PurePosixPath(PureWindowsPath(name).as_posix()).name


def facts_table(facts: Sequence[tuple[str, str]]) -> list[str]:
    """The lines of a card that list prompts and answers, `LISTED` at most."""
    if not facts:
        return ["The facts are not recorded."]
    table = table_of_rows([["after", "the model says"], *([literal(p), literal(t)] for p, t in facts[:LISTED])])
    return [table, *([f"\nAnd {len(facts) - LISTED} more."] if len(facts) > LISTED else [])]


def adapter_card(
    *,
    base: str,
    on_hub: bool,
    facts: Sequence[tuple[str, str]],
    config: Mapping[str, Any],
    form: str,
    ranks: Mapping[str, int],
    error: float,
    notes: Sequence[str],
) -> str:
    """The text of the card, Markdown with a YAML head. Names and facts of others have no effect in it.

    Args:
        base: Path or hub name of the base model; of a path only the last part is shown.
        on_hub: Whether it is the hub's name.
        facts: Prompts and answers.
        config: adapter_config.json.
        form: ``portable`` or ``exact``.
        ranks: Module name -> its rank without padding.
        error: Relative error of a reduction; 0: none.
        notes: Sentences of what was decided.
    """
    tags = ["lora", "knowledge-editing", "kne"]
    rank = max(config["r"], *ranks.values())
    name = shown_name(base, on_hub) or "the base model"
    lines = [
        *card_head("peft", base if on_hub else None, tags, pipeline_tag="text-generation"),
        f"# Edited facts for {literal(name)}",
        "",
        "A LoRA adapter that changes facts in a language model (Knowledge Neuronal Ensemble, arXiv 2412.20637), made "
        "by kne_easyedit. It belongs to the base model named here, of the same revision, and to no other.",
        "",
        *facts_table(facts),
        "",
        f"- Base: {literal(name)}" + (f", revision {literal(config['revision'])}" if config.get("revision") else ""),
        f"- Form: {form}; {len(ranks)} modules, {sum(ranks.values())} ranks, at most {max(ranks.values())} in one",
        *([f"- Reduced by singular value decomposition, relative error {error:.3g}"] if error else []),
        *[f"- {literal(note)}" for note in notes],
        "",
        "## Use",
        "",
        *_usage(name, form, rank),
    ]
    return "\n".join(lines) + "\n"


def _usage(name: str, form: str, rank: int) -> list[str]:
    base = json.dumps(name)
    served = [
        f"- vLLM: `--enable-lora --max-lora-rank {rank} --lora-modules edit=FOLDER`",
        "- SGLang: `--lora-paths edit=FOLDER`",
        "- llama.cpp: converted to GGUF, `--lora edit.gguf` (`scripts/serve_gguf.py` of kne_easyedit converts it)",
    ]
    other = [
        "Ranks differ between modules and the scaling is rank-stabilised: PEFT reads this rightly, vLLM, SGLang and "
        "llama.cpp do not. Save the edit in the portable form for them."
    ]
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({base})",
        'model = PeftModel.from_pretrained(model, "FOLDER")  # or model.load_adapter("FOLDER")',
        "```",
        "",
        *(served if form == "portable" else other),
    ]
