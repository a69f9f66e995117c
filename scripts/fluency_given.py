"""How fluent the unedited model is after it has been given the new answer: what an edit that changes no more would be.

The fluency metric continues the prompt. An edited model begins with the new answer, so that its text is another than
the unedited model's whatever else the edit does.

python scripts/fluency_given.py --data test_cf.json --records 40 --texts 8
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from kne_easyedit import KNEHyperParams, bridge
from kne_easyedit.benchmark.intervals import Interval, interval, paired
from kne_easyedit.bridge.importing import module
from kne_easyedit.cli.common import shipped
from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer
from kne_easyedit.facts.records import load_records
from kne_easyedit.models.loading import load_model


def fluency(model: Any, tokenizer: Tokenizer, prompt: str, texts: int, seed: int) -> float:
    """EasyEdit's n-gram entropy x 100 of the continuations of a prompt up to 100 tokens, mean over some texts."""
    torch.manual_seed(seed)
    generate, entropy = module("util.generate").generate_fast, module("evaluate.evaluate_utils").n_gram_entropy
    found = generate(model, tokenizer, [prompt], n_gen_per_prompt=texts, max_out_len=100)
    return statistics.fmean(100 * entropy([text]) for text in found)


def compared(
    model: Any, tokenizer: Tokenizer, requests: Sequence[dict], texts: int, seed: int
) -> tuple[Interval, Interval, Interval]:
    """Fluency after the prompts, after prompts and new answers, and the second minus the first, over the records."""
    plain: dict[int, float] = {}
    given: dict[int, float] = {}
    for request in tqdm(requests, unit="record"):
        prompt, number = request["prompt"], request["index"]
        plain[number] = fluency(model, tokenizer, prompt, texts, seed)
        given[number] = fluency(model, tokenizer, prompt + SEPARATOR + request["target_new"], texts, seed)
    means = [interval(list(found.values())) for found in (plain, given)] + [paired(given, plain)]
    if None in means:
        raise SystemExit("no record can be asked")
    first, second, difference = (mean for mean in means if mean is not None)
    return first, second, difference


def main() -> None:
    """Samples the texts, and prints both means and their difference, with intervals over records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="embedded", help="KnowEdit file (default %(default)s)")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--texts", type=int, default=8, help="texts of each prompt (default %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    bridge.register()
    requests, _ = load_records(arguments.data, arguments.records, on_bad="skip")
    model, tokenizer = load_model(KNEHyperParams.from_hparams(shipped() / "KNE" / "smollm2-135m.yaml"))
    tokenizer.padding_side = "left"
    plain, given, difference = compared(model, tokenizer, requests, arguments.texts, arguments.seed)
    print(f"the unedited model                 {plain.shown()}")
    print(f"the same, given the new answer     {given.shown()}")
    print(f"difference                         {difference.shown('{:+.1f}')}   {difference.records} records")
    print(f"word splitting                     {bridge.fluency_variant()}")


if __name__ == "__main__":
    main()
