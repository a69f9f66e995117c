"""How far EasyEdit's fluency differs between its two ways of splitting words, on the same generated texts.

NLTK_DATA=folder_with_punkt_tab python scripts/bench_fluency.py --data test_cf.json --records 40
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import nltk
import torch
from tqdm import tqdm

from kne_easyedit import KNEHyperParams, bridge
from kne_easyedit.bridge.fluency import NO_PUNKT, PUNKT
from kne_easyedit.bridge.importing import module
from kne_easyedit.cli.common import shipped
from kne_easyedit.facts.records import load_requests
from kne_easyedit.models.loading import load_model


def main() -> None:
    """Generates texts, and prints their fluency in both variants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", default="embedded", help="KnowEdit file whose prompts are continued (default %(default)s)"
    )
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    bridge.register()
    if bridge.fluency_variant() != PUNKT:
        raise SystemExit("nltk's punkt_tab is not here; set NLTK_DATA to a folder that has tokenizers/punkt_tab")
    model, tokenizer = load_model(KNEHyperParams.from_hparams(shipped() / "KNE" / "smollm2-135m.yaml"))
    tokenizer.padding_side = "left"
    generate, evaluators = module("util.generate").generate_fast, module("evaluate.evaluate_utils")
    plain = evaluators.nltk
    lenient = type(nltk)("nltk")
    lenient.__dict__.update(vars(nltk), word_tokenize=partial(nltk.word_tokenize, preserve_line=True))
    found: dict[str, list[float]] = {PUNKT: [], NO_PUNKT: []}
    for request in tqdm(load_requests(arguments.data, arguments.records), unit="text"):
        torch.manual_seed(arguments.seed)
        texts = generate(model, tokenizer, [request["prompt"]], n_gen_per_prompt=1, max_out_len=100)
        for variant, library in ((PUNKT, plain), (NO_PUNKT, lenient)):
            evaluators.nltk = library
            found[variant].append(100 * evaluators.n_gram_entropy(texts))
    differences = [a - b for a, b in zip(found[NO_PUNKT], found[PUNKT])]
    for variant, values in found.items():
        print(f"{variant:<14} {statistics.fmean(values):.2f}")
    mean, low, high = statistics.fmean(differences), min(differences), max(differences)
    print(f"{NO_PUNKT} - {PUNKT}: mean {mean:+.2f}, from {low:+.2f} to {high:+.2f}, {len(differences)} texts")


if __name__ == "__main__":
    main()
