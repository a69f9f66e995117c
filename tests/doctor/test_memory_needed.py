"""The memory that an edit needs, by calculation and as an edit allocates it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import yaml
from conftest import (
    FACTS,
    GPT2_DOWN,
    GPTJ_DOWN,
    LLAMA_DOWN,
    make_gpt2,
    make_gptj,
    make_llama,
    tiny_hparams,
)
from edits import REQUESTS
from methods import HPARAMS, TINY
from transformers import LlamaConfig

from kne_easyedit.doctor import memory as of_memory
from kne_easyedit.doctor.memory import TOKENS, MemoryNeeded, memory_needed
from kne_easyedit.editing.adapter import ADAPTER, row_adapter
from kne_easyedit.editing.after_answers import COMPARED, texts_after_answers
from kne_easyedit.editing.divergence import Divergence
from kne_easyedit.editing.projection import input_projections
from kne_easyedit.editing.row_edit import write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import encode
from kne_easyedit.localization.ensemble import select_ensemble
from kne_easyedit.models.state import preserve_state
from kne_easyedit.models.targets import resolve_target


@pytest.mark.parametrize(
    ("make", "template"),
    [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)],
    ids=["llama", "gptj", "gpt2"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_counted_as_an_edit_takes_it(make, template, dtype, tokenizer, monkeypatch):
    model = make(dtype)
    hparams = tiny_hparams(template, bf16=dtype == torch.bfloat16, num_steps=1, stop_loss=0.0)
    needed = memory_needed(model.config, hparams)
    assert needed == memory_needed(model, hparams)
    assert needed.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    training, writing = needed.phases["training"], needed.phases["writing"]
    target = resolve_target(model, template)
    scores = torch.rand(len(target.layers), target.n_neurons, generator=torch.Generator().manual_seed(0))
    ensemble = select_ensemble(scores, hparams.p, target_module=template)
    optimizers = []
    monkeypatch.setattr(torch.optim, "AdamW", _kept(torch.optim.AdamW, optimizers))
    edit = train_rows(model, [encode(tokenizer, *FACTS[0])], ensemble, hparams)
    (optimizer,) = optimizers
    rows = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert training["trained rows"] == sum(_bytes(*tensors) for tensors in (rows, [row.grad for row in rows], moments))
    assert writing["differences"] == _bytes(*(delta for _, delta in edit.deltas.values()))
    assert writing["originals"] == _bytes(*write_rows(model, edit).values())
    with row_adapter(model, ensemble, hparams) as layers:
        assert training["row selector"] == _bytes(*(layer.lora_B[ADAPTER].weight for layer in layers.values()))


def test_the_largest_phase_is_what_counts():
    needed = MemoryNeeded(
        100, {"localising": {"rows": 3}, "training": {"rows": 2, "logits": 5}, "writing": {"rows": 6}}
    )
    assert (needed.largest, needed.above, needed.total) == ("training", 7, 107)


def test_an_optimiser_without_moments_needs_half_for_the_rows(llama):
    adamw, polyak = (memory_needed(llama, tiny_hparams(optimizer=name)).phases for name in ("adamw", "polyak"))
    assert polyak["training"].pop("trained rows") * 2 == adamw["training"].pop("trained rows") and adamw == polyak


def test_neighbours_are_counted(llama, tokenizer):
    """Their distributions as the objective keeps them, and their states in a step's pass; off, they need nothing."""
    prompts = ["The capital of Spain is", "The river of Peru", "Marie was"]
    kept = Divergence.after_prompts(llama, tokenizer, prompts, tokens=4)._before
    settings = {"neighbour_relation_size": 2, "neighbour_subject_size": 1, "batch_size": 5}
    off = memory_needed(llama, tiny_hparams(**settings), TOKENS).phases
    on = memory_needed(llama, tiny_hparams(**settings, neighbour_weight=1.0), TOKENS).phases
    assert "neighbours" not in off and "neighbours" not in off["training"]
    assert on["training"]["neighbours"] == on["neighbours"]["distributions"] == 5 * _bytes(*kept)
    few = memory_needed(llama, tiny_hparams(**settings, neighbour_weight=1.0, neighbours_per_step=1), TOKENS).phases
    kl = memory_needed(llama, tiny_hparams(**settings, kl_weight=1.0, kl_data="embedded", kl_size=7), TOKENS).phases
    variants = memory_needed(llama, tiny_hparams(**settings, subject_variants=2), TOKENS).phases
    activations = [needed["training"]["activations"] for needed in (on, few, kl, variants)]
    assert activations == [texts * off["training"]["activations"] // 5 for texts in (20, 10, 12, 10)]


def test_what_follows_answers_is_counted(llama, tokenizer):
    """Its distributions, at least those that the objective keeps, and longer texts of the facts in a step's pass."""
    facts = [encode(tokenizer, "The capital of France is", "Rome")]
    with preserve_state(llama), torch.no_grad():
        kept = Divergence.in_texts(llama, texts_after_answers(llama, tokenizer, facts))._before
    off = memory_needed(llama, tiny_hparams(batch_size=5), TOKENS).phases["training"]
    on = memory_needed(llama, tiny_hparams(batch_size=5, continuation_weight=1.0), TOKENS).phases["training"]
    assert 0 < _bytes(*kept) <= on.pop("continuations") // 5 and "continuations" not in off
    assert on["activations"] == off["activations"] // TOKENS * (TOKENS + COMPARED + 1)


def test_a_projection_is_counted(llama, tokenizer):
    """At least as much as its bases take, and no more than half of a module's inputs allow."""
    names = [LLAMA_DOWN.format(layer) for layer in range(4)]
    with preserve_state(llama):
        found = input_projections(llama, tokenizer, ["The capital of Spain is", "Marie was"], names, 1e-5)
    settings = {"neighbour_relation_size": 1, "neighbour_subject_size": 1}
    with_it = memory_needed(llama, tiny_hparams(**settings, input_projection=True)).phases
    assert _bytes(*(one.basis for one in found.values())) < with_it["training"]["projections"] == 4 * 4 * 20 * 40
    without = memory_needed(llama, tiny_hparams(**settings)).phases
    assert "projections" not in without["training"]
    # AdamW's four copies, and what the projection leaves of the gradient.
    assert 4 * with_it["training"]["trained rows"] == 5 * without["training"]["trained rows"]


def test_earlier_edits_are_counted_where_they_are_spared(llama):
    """Up to four tenths of a module's inputs, of 40 here; what a first edit needs is the same."""
    settings = {"neighbour_relation_size": 1, "neighbour_subject_size": 1, "input_projection": True}

    def projections(earlier, **changes):
        needed = memory_needed(llama, tiny_hparams(**settings, **changes), 5, earlier=[5] * earlier)
        return needed.phases["training"]["projections"]

    first = projections(0, spare_edited=True)
    assert projections(7) == projections(0) == first
    found = [projections(earlier, spare_edited=True) - first for earlier in (1, 2, 100)]
    assert found == [4 * 4 * closed * 40 for closed in (5, 10, 16)]


def test_earlier_facts_are_neighbours_too(llama):
    """As many as neighbours at most; padded to the longest; with some neighbours a step, only kept."""
    settings = {"neighbour_relation_size": 2, "neighbour_subject_size": 2, "neighbour_weight": 1.0}

    def needed(earlier, **changes):
        hparams = tiny_hparams(**settings, spare_edited=True, **changes)
        return memory_needed(llama, hparams, 5, earlier=earlier).phases

    first, two, all_four = (needed([5] * n) for n in (0, 2, 9))
    assert [its["training"]["neighbours"] * 4 // first["training"]["neighbours"] for its in (two, all_four)] == [6, 8]
    activations = [its["training"]["activations"] for its in (first, two, all_four)]
    assert [activation * 5 // activations[0] for activation in activations] == [5, 7, 9]
    assert needed([26])["training"]["activations"] == 2 * 6 * activations[0] // 5
    few = [needed([5] * n, neighbours_per_step=2)["training"] for n in (0, 9)]
    assert few[0]["activations"] == few[1]["activations"] and 2 * few[0]["neighbours"] == few[1]["neighbours"]


def test_prompts_in_a_template_are_counted_as_they_are_read(llama, tokenizer):
    """Of the facts and of their neighbours."""
    tokenizer.chat_template = (
        "{% for m in messages %}The name of {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} is{% endif %}"
    )
    settings = {"input_projection": True, "neighbour_relation_size": 1, "neighbour_subject_size": 0}
    plain, chat = (
        of_memory._texts(tiny_hparams(**settings, use_chat_template=on), llama, tokenizer, REQUESTS)
        for on in (False, True)
    )
    assert plain["template"] == 0 and chat["template"] == 4
    assert chat["tokens"] == plain["tokens"] + 4 and chat["earlier"] == [n + 4 for n in plain["earlier"]]
    bases = [
        memory_needed(llama, tiny_hparams(**settings), 9, template=its["template"]).phases["training"]["projections"]
        for its in (plain, chat)
    ]
    assert bases == [4 * 4 * tokens * 40 for tokens in (10, 14)]


def test_an_ensemble_file_says_how_many_rows(tmp_path, llama):
    scores = torch.zeros(4, 24)
    scores[2, :3] = 1
    select_ensemble(scores, 3 / 96, target_module=LLAMA_DOWN).save(tmp_path / "three.json")
    needed = memory_needed(llama, tiny_hparams(ensemble=str(tmp_path / "three.json"))).phases
    assert needed["training"]["trained rows"] == 3 * 40 * 4 * 4
    assert needed["writing"]["originals"] == 24 * 40 * 4  # of the one layer that has rows
    assert "localising" not in needed


def test_localising_takes_its_share_of_what_is_free(llama):
    """Never less than one point of every path, nor more than the points of the facts; a CPU's limit is not a GPU's."""

    def in_flight(free, facts=20, device="cpu"):
        hparams = tiny_hparams(localization_data="embedded", localization_size=facts)
        needed = memory_needed(llama, hparams, free=free, device=device)
        return needed.phases["localising"]["rows in flight"]

    assert in_flight(None) == in_flight(0) < in_flight(2**22) < in_flight(2**40)
    assert in_flight(2**40, facts=1) < in_flight(2**40)
    assert in_flight(2**40, facts=10_000) == in_flight(2**50, facts=10_000) < in_flight(2**50, 10_000, "cuda")


def test_memory_of_llama_2_7b_by_calculation():
    """Known figures: 6,738,415,616 parameters; down_proj is 4096 x 11008 in 32 layers; p = 4 % are 5242 rows."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    for bf16, item in ((False, 4), (True, 2)):
        needed = memory_needed(config, tiny_hparams(p=0.04, bf16=bf16))
        assert needed.weights == item * 6_738_415_616
        assert needed.phases["writing"]["originals"] == item * 32 * 4096 * 11008
        assert needed.phases["training"]["trained rows"] == 4 * 4 * 5242 * 11008
        assert needed.phases["training"]["row selector"] == 4 * 5242 * 4096


def test_memory_of_easyedits_methods_follows_their_layers():
    config, square = make_llama().config, 40 * 40
    shipped = {
        label: yaml.safe_load((HPARAMS / label / "smollm2-135m.yaml").read_text())
        for label in ("FT-L", "AdaLoRA", "ROME", "MEMIT")
    }
    hparams = {label: type("Settings", (), {**settings, **TINY[label]}) for label, settings in shipped.items()}
    matrix = 4 * 24 * 40
    ft = memory_needed(config, hparams["FT-L"]).phases["editing"]
    assert Counter(ft) >= Counter(
        {"originals": matrix, "gradients": matrix, "Adam's moments": 2 * matrix, "differences": matrix}
    )
    heads = 24 + 24 + 24 + 12  # q_proj and v_proj, in and out, with half as many key-value heads
    assert memory_needed(config, hparams["AdaLoRA"]).phases["editing"]["adapter"] == 16 * 12 * 4 * heads
    assert (
        memory_needed(config, hparams["ROME"]).phases["editing"]["second moments"] == 0
    )  # no adjustment in the shipped settings
    hparams["ROME"].mom2_adjustment = True
    assert memory_needed(config, hparams["ROME"]).phases["editing"]["second moments"] == 4 * 3 * square
    memit = memory_needed(config, hparams["MEMIT"]).phases["editing"]
    assert (memit["second moments"], memit["solver"]) == (4 * 2 * square, 24 * square)
    hparams["MEMIT"].rewrite_module_tmp = "model.layers.{}.mlp.no"
    with pytest.raises(ValueError, match="rewrite_module_tmp"):
        memory_needed(config, hparams["MEMIT"])


def _bytes(*tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kept(kind, made: list):
    def make(*args, **kwargs):
        made.append(kind(*args, **kwargs))
        return made[-1]

    return make


def test_what_4_bit_weights_are_multiplied_in_counts():
    """One matrix in the compute type beside each phase, not with 8 bits or none."""
    llama = make_llama()
    plain, eight, four = (memory_needed(llama, tiny_hparams(load_in=bits)) for bits in (None, "8bit", "4bit"))
    largest = max(
        module.weight.nbytes for module in llama.model.layers.modules() if isinstance(module, torch.nn.Linear)
    )
    assert four.above == plain.above + largest and eight.above == plain.above
    assert four.weights < eight.weights < plain.weights
