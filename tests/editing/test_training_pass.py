"""Layers below the first edited one run once for each batch, and no bit of an edit tells that they did."""

from functools import partial

import pytest
import torch
from accelerate import disk_offload
from conftest import LLAMA_DOWN, SIZE, failing, fingerprint, make_llama, tiny_hparams
from edits import ensemble_of
from families import FAMILIES, OTHERS, made

from kne_easyedit.editing import row_training, training_pass
from kne_easyedit.editing.divergence import Divergence
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.editing.training_pass import TrainingPass, layers_below
from kne_easyedit.facts.encoding import collate
from kne_easyedit.models.targets import resolve_target

STEPS = 5
LAST = {2: (1, 7), 3: (0, 5)}
"""Rows of the last layers only."""


class Whole:
    """The pass of training as it was before: the whole model, every time."""

    def __init__(self, model, ensemble):
        self.model = model

    def answer_logits(self, batch):
        return row_training.answer_logits(self.model, batch)


def count(calls, layer, *_):
    calls[layer] += 1


@pytest.fixture
def trained(facts, monkeypatch):
    """Trains the same rows twice: as it is, and with whole passes; returns both edits and the calls of each layer."""

    def run(model, template, rows, objectives=(), width=None, **changes):
        found = []
        layers = model.get_submodule(template.split(".{}")[0])
        hparams = tiny_hparams(template, **{"stop_loss": 1e-9, "num_steps": STEPS, "edit_gain": 2.0, **changes})
        for whole in (False, True):
            calls = [0] * len(layers)
            inner = [next(m for m in layer.modules() if m is not layer) for layer in layers]  # not called if skipped
            hooks = [module.register_forward_hook(partial(count, calls, i)) for i, module in enumerate(inner)]
            with monkeypatch.context() as patch:
                if whole:
                    patch.setattr(row_training, "TrainingPass", Whole)
                edit = train_rows(model, facts, ensemble_of(template, rows=rows, width=width), hparams, objectives)
            for hook in hooks:
                hook.remove()
            found.append((edit, calls))
        return found

    return run


def assert_same_bits(one, other):
    assert one.losses == other.losses
    assert one.deltas.keys() == other.deltas.keys()
    for name, (rows, delta) in one.deltas.items():
        assert rows == other.deltas[name][0] and torch.equal(delta, other.deltas[name][1])
        assert delta.any(), "trained nothing"
    assert [(a.loss, a.probability) for a in one.answers] == [(a.loss, a.probability) for a in other.answers]


class TestSkipped:
    @pytest.mark.parametrize(
        "name", ["llama", "olmo-clip", "gemma3", "gpt2", "gptj", "bloom", "falcon", "mamba", "lfm2"]
    )
    def test_the_same_bits_and_fewer_layers(self, name, trained):
        kind = {**FAMILIES, **OTHERS}[name]
        template = f"{kind.path}.{{}}.{kind.linear.split()[0]}"
        model = made(name, torch.float32)
        before = fingerprint(model)
        (edit, calls), (expected, whole) = trained(
            model, template, {2: (0, 3)}, width=resolve_target(model, template).n_neurons
        )
        assert_same_bits(edit, expected)
        assert calls[0] == calls[1] == 1, "once, for one batch"
        assert whole[0] == calls[2] - 1, "the whole model each time; one pass is the check's"
        assert fingerprint(model) == before

    def test_every_batch_of_a_cycle_runs_them_once(self, llama, tokenizer, trained):
        texts = Divergence.after_prompts(
            llama, tokenizer, ["The river of Rome", "The capital of Peru", "Marie spoken in"], tokens=2, per_step=1
        )
        (edit, calls), (expected, whole) = trained(llama, LLAMA_DOWN, LAST, [texts], edit_gain=1.0, num_steps=8)
        assert_same_bits(edit, expected)
        assert (calls[0], whole[0]) == (3, 9)

    def test_a_layer_that_changes_its_input_in_place(self, llama, trained):
        own = llama.model.layers[2].forward
        llama.model.layers[2].forward = lambda hidden, *args, **others: own(hidden.add_(0.1), *args, **others)
        (edit, calls), (expected, whole) = trained(llama, LLAMA_DOWN, LAST)
        assert_same_bits(edit, expected)
        assert calls[0] == 1 and whole[0] > 1

    def test_nothing_is_skipped_if_the_first_layer_is_edited(self, llama, trained):
        (edit, calls), (expected, whole) = trained(llama, LLAMA_DOWN, {0: (1,), 3: (2,)})
        assert_same_bits(edit, expected)
        assert calls == whole

    def test_only_some_batches_are_kept(self, llama, facts, monkeypatch):
        monkeypatch.setattr("kne_easyedit.editing.training_pass.KEPT", 1)
        training = TrainingPass(llama, ensemble_of(LLAMA_DOWN, rows=LAST))
        with torch.no_grad():
            for batch in [collate([fact]) for fact in facts] * 2:
                assert torch.equal(training.answer_logits(batch)[0], row_training.answer_logits(llama, batch)[0])
        assert len(training._kept) == 1


class TestModelsThatNeedAllLayers:
    """Where skipping layers would change a result, or fail, all run at every step."""

    def test_a_layer_that_uses_what_a_lower_one_left(self, llama, trained):
        left, layers = [], llama.model.layers
        own = layers[3].forward
        layers[0].register_forward_hook(lambda layer, args, out: left.append(out))
        layers[0].mlp.register_forward_hook(lambda layer, args, out: left.append(out))
        layers[3].forward = lambda hidden, **others: own(hidden + 0.1 * (left.pop(), left.pop())[1], **others)
        (edit, calls), (expected, whole) = trained(llama, LLAMA_DOWN, LAST)
        assert_same_bits(edit, expected)
        assert calls[1] >= whole[1]

    def test_a_hook_that_changes_the_output_of_a_lower_layer(self, llama, trained):
        """It would be applied to the kept output once more."""
        llama.model.layers[1].register_forward_hook(lambda layer, args, out: out + 0.5)
        (edit, calls), (expected, whole) = trained(llama, LLAMA_DOWN, LAST)
        assert_same_bits(edit, expected)
        assert calls[1] == whole[1] + 1, "the check's pass"

    def test_a_layer_that_is_called_twice(self, llama, trained):
        llama.model.layers[1] = llama.model.layers[0]
        llama.model.layers[1].register_forward_hook(lambda *_: None)
        (edit, _), (expected, _) = trained(llama, LLAMA_DOWN, LAST)
        assert_same_bits(edit, expected)


@pytest.mark.parametrize("call", [1, 2, 3], ids=["first pass", "check", "later pass"])
def test_the_model_is_as_it_was_after_ctrl_c(call, llama, facts, monkeypatch):
    before = fingerprint(llama)
    monkeypatch.setattr(training_pass, "answer_logits", failing(training_pass.answer_logits, call, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        train_rows(llama, facts, ensemble_of(LLAMA_DOWN, rows=LAST), tiny_hparams(stop_loss=0))
    assert fingerprint(llama) == before


def test_an_offloaded_model(llama, facts, tmp_path):
    """Layers that are not run are not read from disk either."""
    ensemble, hparams = ensemble_of(LLAMA_DOWN, rows=LAST), tiny_hparams(stop_loss=0, num_steps=STEPS)
    expected = train_rows(llama, facts, ensemble, hparams)
    placed = disk_offload(make_llama(), tmp_path)
    read = []
    placed.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: read.append(0))
    assert_same_bits(train_rows(placed, facts, ensemble, hparams), expected)
    assert len(read) == 1


def test_layers_below(llama):
    assert layers_below(llama, ensemble_of(LLAMA_DOWN, rows=LAST)) == list(llama.model.layers[:2])
    two = ensemble_of(LLAMA_DOWN, "model.layers.{}.mlp.up_proj", rows={1: (0,), 3: (SIZE["hidden"] - 1,)})
    assert layers_below(llama, two) == [llama.model.layers[0]]
    assert layers_below(llama, ensemble_of(LLAMA_DOWN)) == []
