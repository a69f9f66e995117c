"""Measures finished edits. The figures of docs/serving.md and docs/edit.md on them come from these commands.

python scripts/bench_edits.py forms     # size of each form against the model, what it answers, and its logits
                                        # against those of the edit in place; seconds to apply and take back
python scripts/bench_edits.py memory    # memory above the weights of ten edits of Llama-2-7B's down_proj, in
                                        # bfloat16, with random weights and rows; --same: all of the same rows
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kne_easyedit import KNEHyperParams, compute_edit
from kne_easyedit._util.machine import PeakMemory, hardware
from kne_easyedit.cli.common import shipped
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.editing.row_training import measured_answers
from kne_easyedit.edits import EditStore, save_adapter
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.models.base import Base, base_of
from kne_easyedit.models.devices import environment
from kne_easyedit.models.loading import load_model

PROMPTS = ("The capital of France is", "The capital of Spain is", "Water boils at", "My favourite book is")
"""Over which logits are compared, beside the edited prompt: ones like it, and others."""
FORMS: tuple[tuple[str, int | None], ...] = (
    ("portable", None),
    ("exact", None),
    *(("portable", rank) for rank in (64, 32, 16, 8, 1)),
)
PAPERS_SHARE = 0.04
"""Rows of the paper's ensemble; here of each module."""


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", type=Path, default=shipped() / "KNE" / "smollm2-135m.yaml")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--target", default="Rome")
    parser.add_argument("--subject", default="France")
    parser.add_argument("--edits", type=int, default=10, help="memory: how many (default %(default)s)")
    parser.add_argument("--same", action="store_true", help="memory: all of the same rows, as of one localisation")
    parser.add_argument("what", choices=("forms", "memory"))
    arguments = parser.parse_args()
    if arguments.what == "memory":
        memory(arguments.edits, arguments.same)
        return
    hparams = KNEHyperParams.from_hparams(arguments.hparams)
    model, tokenizer = load_model(hparams)
    print(f"{hparams.model_name}; {environment(model)}; {hardware()}")
    request = {"prompt": arguments.prompt, "target_new": arguments.target, "subject": arguments.subject}
    edit = compute_edit(model, tokenizer, [request], hparams)
    print(f"{edit.facts[0]}: {edit.steps} steps, {edit.size} rows of {len(edit.deltas)} modules")
    forms(model, tokenizer, edit)


def forms(model: Any, tokenizer: Tokenizer, edit: KNEEdit) -> list[dict[str, Any]]:
    """Each form of an adapter: its size, and what it does to the model. ``model`` is left as it is.

    Returns:
        For each form ``form``, ``rank``, ``share`` (of the model's file, in percent), ``error``, ``probability`` of
        the whole first answer, and ``merged`` and ``beside``: the largest difference of a logit from the edit in place,
        with the adapter merged by PEFT and beside the weights.
    """
    from peft import PeftModel

    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    facts = [answer.fact for answer in edit.answers]
    prompts = tuple(dict.fromkeys((facts[0].prompt, *PROMPTS)))
    base = logits(model, tokenizer, prompts)
    with edit.applied(model):
        wanted = logits(model, tokenizer, prompts)
    largest = max(one.abs().max().item() for one in wanted)
    print(f"model {weights / 1e6:.0f} MB; logits up to {largest:.1f}; the base is {furthest(base, wanted):.2g} away")
    print(f"{'form':>9}{'rank':>6}{'MB':>8}{'share':>8}{'error':>8}{'P':>8}{'merged':>10}{'beside':>10}")
    found = []
    for form, rank in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            report = save_adapter(edit, Path(folder) / "adapter", form=form, max_rank=rank, model=model)
            # Over a copy: what PEFT adds to weights it takes out again by subtraction, which rounds.
            served = PeftModel.from_pretrained(deepcopy(model), Path(folder) / "adapter").eval()
            beside, (answer, *_) = logits(served, tokenizer, prompts), measured_answers(served, facts)
            merged = logits(served.merge_and_unload(), tokenizer, prompts)
        one = {
            "form": form,
            "rank": report.rank,
            "bytes": report.bytes,
            "share": 100 * report.bytes / weights,
            "error": report.error,
            "probability": answer.probability,
            "merged": furthest(merged, wanted),
            "beside": furthest(beside, wanted),
        }
        found.append(one)
        print(
            f"{form:>9}{report.rank:>6}{report.bytes / 1e6:>8.1f}{one['share']:>7.2f}%{report.error:>8.3f}"
            f"{one['probability']:>8.3f}{one['merged']:>10.1e}{one['beside']:>10.1e}",
            flush=True,
        )
    seconds: dict[str, list[float]] = {"apply": [], "take back": []}
    for _ in range(5):
        for name, work in (("apply", edit.apply), ("take back", edit.take_back)):
            start = time.perf_counter()
            work(model)
            seconds[name].append(time.perf_counter() - start)
    print(", ".join(f"{name} {median(values):.2f} s" for name, values in seconds.items()), "(medians of 5)")
    return found


def logits(model: Any, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[Tensor]:
    """Of the token after each of ``prompts``."""
    with torch.no_grad():
        return [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in prompts]


def furthest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of a logit."""
    return max((one - other).abs().max().item() for one, other in zip(found, wanted))


def memory(edits: int, same: bool, layers: int = 32, outputs: int = 4096, inputs: int = 11008) -> dict[str, float]:
    """Edits of a model with random weights: resident memory above the weights while they are applied, and taken back.

    The defaults are Llama-2-7B's down_proj, and as many rows as the paper's p keeps. Modules that are not touched have
    no weights. Edits are read from files, as from a store.

    Returns:
        What was done -> MiB at its peak.
    """
    generator = torch.Generator().manual_seed(0)
    model = projections(generator, layers, outputs, inputs)
    names = [name for name, module in model.named_modules() if name.endswith("down_proj")]
    count = max(1, round(PAPERS_SHARE * outputs))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store = EditStore(folder)
        base = base_of(model, names)
        for number in tqdm(range(edits), desc="write edits", leave=False, disable=None):
            store.add(random_edit(base, count, 0 if same else number), f"edit-{number}")
        store = EditStore(folder)  # a new one, that has nothing read
        gc.collect()
        before = resident()
        for what, off in (("apply", []), ("take one back", [edits // 2]), ("take all back", range(edits))):
            for number in off:
                store.off(f"edit-{number}")
            with PeakMemory(torch.device("cpu")) as peak:
                held = resident() - before  # the peak is above this
                store.apply(model)
            if peak.bytes is None:
                raise RuntimeError("the peak of a process's memory is known on Linux only")
            found[what] = (held + peak.bytes) / 2**20
    if conflict := base.conflict(base_of(model, names)):
        raise RuntimeError(f"not taken back: {conflict}")
    rows = "the same rows" if same else "rows of their own"
    print(f"{edits} edits, {count} {rows} in {layers} modules ({outputs} x {inputs}, bfloat16), above the weights:")
    print(", ".join(f"{what} {size:.0f} MiB" for what, size in found.items()))
    return found


def projections(generator: torch.Generator, layers: int, outputs: int, inputs: int) -> Any:
    """A Llama in bfloat16 whose down projections have random weights; the other weights are nowhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=outputs, intermediate_size=inputs, num_hidden_layers=layers, num_attention_heads=outputs // 128 or 1
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).eval()
    for layer in model.model.layers:
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        layer.mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def random_edit(base: Base, count: int, seed: int) -> KNEEdit:
    """``count`` rows of each module of ``base``, with small random values."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, module in base.modules.items():
        outputs, inputs = module.shape
        chosen = torch.randperm(outputs, generator=generator)[:count].sort().values
        deltas[name] = tuple(chosen.tolist()), 1e-3 * torch.randn(count, inputs)  # other values for the same rows
    return KNEEdit(deltas, (1.0, 0.1), requests=({"prompt": "random", "target_new": "values"},), base=base)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
