"""Measures edits. Every figure on editing in docs/performance.md comes from one of these commands.

    python scripts/bench_editing.py step      # one training step against a plain forward and backward pass
    python scripts/bench_editing.py rate      # one training step against its own matrix products
    python scripts/bench_editing.py below     # training high layers only: with all layers at every step, and without
    python scripts/bench_editing.py neighbours  # one training step with neighbours against one without
    python scripts/bench_editing.py profile   # where an edit's time goes
    python scripts/bench_editing.py methods   # seconds an edit: KNE, and EasyEdit's FT and AdaLoRA
    python scripts/bench_editing.py workers   # threads of one process against processes of one thread; --busy: on a
                                              # machine that has other work
    python scripts/bench_editing.py memory    # memory above the weights of one edit of a published architecture with
                                              # random weights: measured, and as `kne doctor` states it

Measurements are interleaved, and medians are taken: machines are noisy. The facts are the first of --data.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from architectures import ARCHITECTURES, fitting_tokenizer, random_model, settings_of
from editing_memory import memory
from localization_measures import timed
from step_rate import below, rate
from torch import nn

from kne_easyedit import KNEHyperParams, compute_edit, restore
from kne_easyedit._util.files import atomic_write
from kne_easyedit._util.machine import available_cores, hardware, keep_large_blocks
from kne_easyedit._util.workers import run_parallel
from kne_easyedit.cli.common import shipped
from kne_easyedit.editing.adapter import ADAPTER, row_adapter, rows_by_module
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.objectives import objectives_for
from kne_easyedit.editing.projection import projections_for
from kne_easyedit.editing.reading import Reading
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import IGNORE, Batch, Tokenizer, collate, encode_request
from kne_easyedit.facts.records import load_requests
from kne_easyedit.localization.localizer import find_ensemble
from kne_easyedit.models.devices import device_of, environment
from kne_easyedit.models.loading import load_model
from kne_easyedit.models.state import preserve_state


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", type=Path, default=shipped() / "KNE" / "smollm2-135m.yaml")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--records", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--busy", type=int, default=0, help="workers: other processes that take all that they get (default %(default)s)"
    )
    parser.add_argument(
        "--architecture", choices=ARCHITECTURES, default="llama2-7b", help="memory: default %(default)s"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="memory")
    parser.add_argument("--device", default="cpu", help="memory")
    parser.add_argument("--out", type=Path, help="memory: folder for the figures as JSON")
    parser.add_argument(
        "what", choices=("step", "rate", "below", "neighbours", "profile", "methods", "workers", "memory")
    )
    arguments = parser.parse_args()
    keep_large_blocks()
    if arguments.what == "memory":
        random: Any = random_model(arguments.architecture, getattr(torch, arguments.dtype), arguments.device)
        requests = load_requests(arguments.data, arguments.records)
        figures = memory(
            random,
            fitting_tokenizer(requests, random.config.vocab_size),
            requests[0],
            settings_of(arguments.architecture, random, num_steps=3),
        )
        if arguments.out:
            atomic_write(arguments.out / "editing_memory.json", json.dumps(figures, indent=1) + "\n")
        return
    hparams = KNEHyperParams.from_hparams(arguments.hparams)
    baselines = baselines_of(arguments.hparams) if arguments.what == "methods" else {}
    model, tokenizer = load_model(hparams)
    requests = load_requests(
        arguments.data, arguments.records, 0 if arguments.data != "embedded" else hparams.localization_size
    )
    print(f"{hparams.model_name}, {len(requests)} facts of {arguments.data}; {environment(model)}; {hardware()}")
    find_ensemble(model, tokenizer, requests, hparams)
    if arguments.what == "workers":
        workers(model, tokenizer, requests, hparams, arguments.repeats, arguments.busy)
        return
    if arguments.what == "rate":
        rate(model, tokenizer, requests, hparams, arguments.repeats, training_step)
        return
    if arguments.what == "methods":
        methods(model, tokenizer, requests, hparams, arguments.repeats, baselines)
        return
    {"step": step, "below": below, "neighbours": neighbours, "profile": profile}[arguments.what](
        model, tokenizer, requests, hparams, arguments.repeats
    )


def step(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[dict], hparams: KNEHyperParams, repeats: int
) -> float:
    """One step of KNE (loss, gradients of the rows, AdamW) against loss and gradients of the embedded prompt only.

    Returns:
        The median ratio of the facts.
    """
    ensemble, ratios = find_ensemble(model, tokenizer, requests, hparams), []
    for request in requests:
        batch = collate([encode_request(tokenizer, request)]).to(device_of(model))
        with preserve_state(model):
            times: dict[str, list[float]] = {"KNE": [], "plain": []}
            for _ in range(repeats + 1):
                times["plain"].append(timed(partial(plain_pass, model, batch))[0])
                with row_adapter(model, ensemble, hparams) as layers:
                    parameters = [layer.lora_A[ADAPTER].weight for layer in layers.values()]
                    trained = partial(training_step, model, batch, torch.optim.AdamW(parameters, lr=hparams.lr))
                    trained()  # AdamW creates its moments in the first step
                    times["KNE"].append(median(timed(trained)[0] for _ in range(3)))
        kne, without = (median(values[1:]) for values in (times["KNE"], times["plain"]))
        ratios.append(kne / without)
        print(
            f"{batch.input_ids.shape[1]:>3} tokens: KNE {1000 * kne:6.1f} ms, plain {1000 * without:6.1f} ms, "
            f"ratio {ratios[-1]:.2f}"
        )
    print(f"median ratio {median(ratios):.2f}")
    return median(ratios)


def plain_pass(model: Any, batch: Batch) -> None:
    """The answers' loss, and its gradient with respect to the embedded tokens."""
    embedded = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_(True)
    with torch.enable_grad():
        out = model(inputs_embeds=embedded, attention_mask=batch.attention_mask, use_cache=False)
        answers = batch.labels[:, 1:] != IGNORE
        loss = nn.functional.cross_entropy(out.logits[:, :-1][answers].float(), batch.labels[:, 1:][answers])
        torch.autograd.grad(loss, embedded)


def training_step(model: nn.Module, batch: Batch | Reading, optimizer: torch.optim.Optimizer) -> None:
    """What `train_rows` does in one step."""
    parameters = optimizer.param_groups[0]["params"]
    with torch.enable_grad():
        loss = answer_loss(model, batch)
        loss.item()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = gradient
        optimizer.step()


def neighbours(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[dict], hparams: KNEHyperParams, repeats: int
) -> dict[str, float]:
    """Seconds a step without neighbours, with some of them and with all, and those of preparing them before the first.

    The number of neighbours is that of ``hparams``, of relations and subjects. A step that is projected away from their
    inputs (``input_projection`` of ``hparams``) is measured as ``hparams`` has it, with its other objectives.

    Returns:
        Neighbours in a step -> the median of the facts: a step as a multiple of one without.
    """
    ensemble, steps = find_ensemble(model, tokenizer, requests, hparams), 4
    plain_steps = replace(hparams, num_steps=steps, stop_loss=0.0, edit_gain=1.0)
    work = replace(plain_steps, neighbour_weight=1.0)
    everything = hparams.neighbour_relation_size + hparams.neighbour_subject_size
    counts = {"none": None, **{str(k): k for k in (1, 2, 3, 4, 6) if k < everything}, "all": 0}
    kinds = [*counts, *(["projected"] if hparams.input_projection else [])]
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for request in requests:
        fact = encode_request(tokenizer, request)
        prepared: list[float] = []
        times: dict[str, list[float]] = {name: [] for name in kinds}
        trained: dict[str, tuple[KNEHyperParams, list, dict]] = {
            name: (
                work,
                [] if k is None else objectives_for(model, tokenizer, [request], replace(work, neighbours_per_step=k)),
                {},
            )
            for name, k in counts.items()
        }
        if hparams.input_projection:
            found = projections_for(model, tokenizer, [request], plain_steps, list(rows_by_module(model, ensemble)))
            trained["projected"] = plain_steps, objectives_for(model, tokenizer, [request], plain_steps), found
        for _ in range(repeats):
            prepared.append(timed(partial(objectives_for, model, tokenizer, [request], work))[0])
            for name, (settings, own, closed) in trained.items():
                # The last pass, of the final loss, has no step: half the cost of one.
                spent = timed(partial(train_rows, model, [fact], ensemble, settings, own, projections=closed))[0]
                times[name].append(spent / (steps + 0.5))
        plain = median(times["none"])
        for name, values in times.items():
            ratios[name].append(median(values) / plain)
        parts = ", ".join(f"{name} {median(values) / plain:.2f}" for name, values in times.items() if name != "none")
        print(
            f"{len(fact.ids):>3} tokens, {1000 * plain:.0f} ms a step; with neighbours, as a multiple: {parts}; "
            f"to prepare them {median(prepared) / plain:.1f}"
        )
    print("median " + ", ".join(f"{name} {median(values):.2f}" for name, values in ratios.items() if name != "none"))
    return {name: median(values) for name, values in ratios.items() if name != "none"}


def profile(
    model: nn.Module, tokenizer: Tokenizer, requests: Sequence[dict], hparams: KNEHyperParams, repeats: int
) -> None:
    """Share of an edit that is spent outside the model's forward passes and autograd."""
    inside = {"forward": 0.0, "backward": 0.0}
    shares = []
    for request in list(requests) * repeats:
        inside.update(forward=0.0, backward=0.0)
        with timing(model, "forward", inside, "forward"), timing(torch.autograd, "grad", inside, "backward"):
            start = time.perf_counter()
            edit = compute_edit(model, tokenizer, [request], hparams)
            computed = time.perf_counter()
            originals = write_rows(model, edit)
            total = time.perf_counter() - start
        writing = start + total - computed
        restore(model, originals)
        shares.append(1 - sum(inside.values()) / total)
        print(
            f"{total:5.2f} s, {edit.steps:>2} steps: forward {inside['forward'] / total:5.1%}, "
            f"backward {inside['backward'] / total:5.1%}, writing the rows {writing / total:5.1%}, "
            f"all outside {shares[-1]:5.1%}"
        )
    print(f"median outside forward and backward {median(shares):.1%}")


def baselines_of(file: Path) -> dict[str, Path]:
    """The shipped files of the methods that KNE is compared with, for the model of a file of KNE's settings.

    Raises:
        FileNotFoundError: A method has no file of that name.
    """
    found = {method: shipped() / method / f"{file.stem}.yaml" for method in ("FT", "AdaLoRA")}
    for method, path in found.items():
        if not path.is_file():
            there = ", ".join(sorted(its.name for its in path.parent.glob("*.yaml")))
            raise FileNotFoundError(
                f"--hparams: {method} has no {path.name}, and its file is found by the name of KNE's; "
                f"{path.parent} has {there}"
            )
    return found


def methods(
    model: nn.Module,
    tokenizer: Tokenizer,
    requests: Sequence[dict],
    hparams: KNEHyperParams,
    repeats: int,
    baselines: Mapping[str, Path],
) -> None:
    """Seconds an edit of KNE and of ``baselines`` (method -> file), on the same facts, taking turns."""
    from kne_easyedit import bridge

    settings = {"KNE": hparams} | {method: bridge.load_method(method, file) for method, file in baselines.items()}
    found: dict[str, list[float]] = {method: [] for method in settings}
    steps: dict[str, list[int]] = {method: [] for method in settings}
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(folder)  # EasyEdit writes ./logs
        try:
            for _ in range(max(1, repeats // 2)):
                for request in requests:
                    for method, its in settings.items():
                        with contextlib.redirect_stdout(io.StringIO()):
                            editor = bridge.MethodEditor(its, model, tokenizer)
                            found[method].append(timed(partial(editor.apply, [request]))[0])
                            steps[method].append(len(editor.losses))
                            editor.undo()
        finally:
            os.chdir(here)
    for method, values in found.items():
        print(
            f"{method:<8} {median(values):6.2f} s an edit, {median(steps[method]):.0f} losses computed; "
            f"{median(values) / median(found['KNE']):5.2f} of KNE's time"
        )


def workers(
    model: Any, tokenizer: Tokenizer, requests: Sequence[dict], hparams: KNEHyperParams, repeats: int, busy: int
) -> None:
    """Ten training steps and fifty tokens of text a fact: how many facts a minute by one process and by one a core."""
    ensemble, work = (
        find_ensemble(model, tokenizer, requests, hparams),
        replace(hparams, num_steps=10, stop_loss=0.0, edit_gain=1.0),
    )

    def of_one_fact(request: dict) -> Iterator[str]:
        train_rows(model, [encode_request(tokenizer, request)], ensemble, work)
        tokens = tokenizer(request["prompt"], return_tensors="pt")
        model.generate(
            **tokens, min_new_tokens=50, max_new_tokens=50, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        yield request["prompt"]

    arrangements = {
        "1 process, all threads": (1, available_cores()),
        "1 process, 1 thread": (1, 1),
        f"{available_cores()} processes, 1 thread each": (available_cores(), 1),
    }

    def all_facts(processes: int) -> None:
        list(run_parallel(of_one_fact, facts, processes))

    facts = (list(requests) * available_cores())[: 2 * available_cores()]
    found: dict[str, list[float]] = {name: [] for name in arrangements}
    with contextlib.ExitStack() as others:
        for _ in range(busy):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            others.callback(other.kill)
        for _ in range(repeats):
            for name, (processes, threads) in arrangements.items():
                torch.set_num_threads(threads)
                found[name].append(timed(partial(all_facts, processes))[0])
    for name, seconds in found.items():
        print(
            f"{name:<28} {60 * len(facts) / median(seconds):6.1f} facts a minute, with {busy} other processes on "
            f"{available_cores()} cores"
        )


@contextlib.contextmanager
def timing(owner: Any, name: str, into: dict[str, float], key: str) -> Iterator[None]:
    """Adds the seconds that ``owner.name(...)`` takes to ``into[key]``."""
    original = getattr(owner, name)

    def timed_call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            into[key] += time.perf_counter() - start

    setattr(owner, name, timed_call)
    try:
        yield
    finally:
        if isinstance(owner, nn.Module):
            delattr(owner, name)
        else:
            setattr(owner, name, original)


if __name__ == "__main__":
    main()
