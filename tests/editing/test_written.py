"""The written edit is the trained one; one that failed or was lost is reported; `restore` checks its model."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from conftest import (
    GPT2_DOWN,
    GPTJ_DOWN,
    LLAMA_DOWN,
    ONE_TOKEN,
    fingerprint,
    make_gpt2,
    make_gptj,
    make_llama,
    tiny_hparams,
    weights,
)
from edits import MANY, REQUEST, REQUESTS, edit_of, ensemble_of, request
from torch import nn

from kne_easyedit.editing import row_training as training
from kne_easyedit.editing.edit import EditFailed, apply_kne_to_model, require_reached
from kne_easyedit.editing.losses import answer_loss
from kne_easyedit.editing.row_edit import EditLost, RowEdit, restore, write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.facts.encoding import collate
from kne_easyedit.hparams import KNEHyperParams

CONTRADICTION = [request(ONE_TOKEN), request((ONE_TOKEN[0], "Lima"))]


class Shadow(nn.Linear):
    """Computes with a copy of its weight, as quantised layers do: what is written is kept, and has no effect."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.kept = linear.weight.detach().clone()

    def forward(self, x):
        return nn.functional.linear(x, self.kept)


class Computed(nn.Linear):
    """Its weight is computed anew at every look (as by a parametrization): what is written is lost at once."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        del self.weight
        self.stored = linear.weight

    @property
    def weight(self):
        return self.stored * 1.0

    @weight.setter
    def weight(self, value):
        pass


class Rounded(nn.Linear):
    """Keeps whole steps of a coarse grid, as int8 storage does: most of a small change is lost."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight / 2).round() * 2)

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight


class TestTheWrittenModelIsTheTrainedOne:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("make", "template"), [(make_llama, LLAMA_DOWN), (make_gptj, GPTJ_DOWN), (make_gpt2, GPT2_DOWN)]
    )
    def test_good_edits_pass(self, facts, make, template, dtype):
        """Also where much is rounded: small steps, stopped where the loss is steep."""
        model = make(dtype)
        for stop_loss, lr in ((0.5, 5e-2), (2.0, 2e-2)):
            edit = train_rows(
                model, facts[1:2], ensemble_of(template, rows=MANY), tiny_hparams(template, stop_loss=stop_loss, lr=lr)
            )
            before = weights(model)
            originals = write_rows(model, edit)
            assert weights(model) != before
            restore(model, originals)
            assert weights(model) == before

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", [Shadow, Computed, Rounded], ids=lambda kind: kind.__name__)
    def test_a_lost_write_raises_and_leaves_nothing(self, facts, dtype, kind, monkeypatch):
        # The loss is the last defence: what is known not to keep a row is refused before it is trained.
        monkeypatch.setattr("kne_easyedit.editing.adapter.require_editable", lambda *_, **__: None)
        model = make_llama(dtype)
        for layer in model.model.layers:
            layer.mlp.down_proj = kind(layer.mlp.down_proj).to(dtype).eval()
        settings = dict(lr=3e-3, stop_loss=2.0) if kind is Rounded else {}
        edit = train_rows(model, facts, ensemble_of(LLAMA_DOWN, rows=MANY), tiny_hparams(**settings))
        assert edit.losses[-1] < edit.losses[0] / 2, "learnt too little to tell"
        before = fingerprint(model)
        with pytest.raises(
            EditLost,
            match=rf"trained to .*, but the written model has .*model.layers.0.mlp.down_proj .*{kind.__name__} in",
        ):
            write_rows(model, edit)
        assert fingerprint(model) == before

    def test_weights_that_come_back_before_every_pass(self, llama, tokenizer):
        """As an offloading hook brings them: seen by the loss alone."""
        kept = {n: p.detach().clone() for n, p in llama.named_parameters()}

        def bring(*_):
            with torch.no_grad():
                for name, parameter in llama.named_parameters():
                    if name in kept:
                        parameter.data.copy_(kept[name])

        handle = llama.register_forward_pre_hook(bring)
        before = fingerprint(llama)
        with pytest.raises(EditLost, match=r"its weights were put back.*load it unquantised, in float32 or bfloat16"):
            apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams())
        assert fingerprint(llama) == before
        handle.remove()
        apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams())

    def test_an_edit_of_a_model_that_has_changed_since(self, llama, facts):
        edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN, rows=MANY), tiny_hparams())
        write_rows(llama, edit)
        before = weights(llama)
        with pytest.raises(EditLost, match="the model has changed since the training"):
            write_rows(llama, edit)
        assert weights(llama) == before
        write_rows(llama, edit, check=False)
        assert weights(llama) != before

    @pytest.mark.parametrize(("share", "lost"), [(0.0005, False), (0.005, True)])
    def test_of_what_the_training_changed_a_thousandth_may_be_rounding(self, llama, facts, share, lost):
        """Rows that a projection has made large against each other round by more than the logits' units tell."""
        edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN, rows=MANY), tiny_hparams(lr=0.3, num_steps=10))
        changed = edit.losses[0] - edit.losses[-1]
        assert changed > 1, "learnt too little to tell"
        edit = replace(edit, losses=(edit.losses[0], edit.losses[-1] + share * changed))
        before = fingerprint(llama)
        if lost:
            with pytest.raises(EditLost, match="its weights were put back"):
                write_rows(llama, edit)
            assert fingerprint(llama) == before
        else:
            write_rows(llama, edit)

    def test_costs_one_forward_pass(self, llama, facts):
        edit = train_rows(llama, facts, ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=1))
        passes = []
        llama.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        write_rows(llama, edit)
        assert passes == [False]


class TestAnswers:
    def test_are_those_of_the_written_model(self, double_precision, facts):
        model = make_llama(torch.float64)
        edit = train_rows(model, facts, ensemble_of(LLAMA_DOWN, rows=MANY), tiny_hparams(num_steps=12, stop_loss=0))
        write_rows(model, edit)
        for fact, answer in zip(facts, edit.answers, strict=True):
            logs = model(input_ids=torch.tensor([fact.ids])).logits[0].log_softmax(-1)
            own = logs[list(fact.positions), list(fact.answer)]
            assert answer.fact is fact
            assert (
                answer.loss == pytest.approx(-own.mean().item(), abs=1e-9) == answer_loss(model, collate([fact])).item()
            )
            assert answer.probability == pytest.approx(math.exp(own.sum().item()), rel=1e-9)
            assert answer.greedy == (logs[list(fact.positions)].argmax(-1).tolist() == list(fact.answer))
        assert len({answer.greedy for answer in edit.answers}) == 2, "one of each kind, or the test says little"


class TestNotReached:
    def test_contradicting_facts_are_named(self, llama, tokenizer, caplog):
        requests = [*CONTRADICTION, REQUESTS[2]]
        with caplog.at_level(logging.WARNING):
            apply_kne_to_model(llama, tokenizer, requests, tiny_hparams(p=0.5))
        (record,) = caplog.records
        message = record.getMessage()
        assert message.startswith("2 of 3 facts not reached after 100 steps (loss 0."), message
        assert "'The capital of France is' -> 'Rome' (loss 0.7" in message and "-> 'Lima' (loss 0.7" in message
        assert "probability 5" in message or "probability 4" in message
        assert REQUESTS[2]["prompt"] not in message, "this one was reached"

    def test_raises_before_anything_is_written(self, llama, tokenizer, caplog):
        before = fingerprint(llama)
        with pytest.raises(EditFailed, match=r"2 of 2 facts not reached .*Nothing was written \(on_failure: raise\)"):
            apply_kne_to_model(llama, tokenizer, CONTRADICTION, tiny_hparams(on_failure="raise"))
        assert fingerprint(llama) == before and not caplog.records

    def test_the_same_weights_with_every_setting(self, tokenizer):
        one, other = make_llama(), make_llama()
        apply_kne_to_model(one, tokenizer, [REQUEST], tiny_hparams())
        apply_kne_to_model(other, tokenizer, [REQUEST], tiny_hparams(on_failure="raise"))
        assert weights(one) == weights(other)

    def test_an_edit_that_succeeded_says_nothing(self, llama, tokenizer, caplog):
        with caplog.at_level(logging.WARNING):
            apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams())
        assert not caplog.records

    def test_never_to_stop_is_no_failure(self, llama, tokenizer, caplog):
        with caplog.at_level(logging.WARNING):
            apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(stop_loss=0, num_steps=30, on_failure="raise"))
        assert not caplog.records

    def test_but_an_answer_that_is_not_given_is(self, llama, tokenizer):
        with pytest.raises(EditFailed, match=r"1 of 1 facts not reached after 1 steps .*stop_loss 0"):
            apply_kne_to_model(llama, tokenizer, [REQUEST], tiny_hparams(stop_loss=0, num_steps=1, on_failure="raise"))

    @pytest.mark.parametrize(
        ("last", "settings", "state", "remedy"),
        [
            (
                0.3,
                {},
                r"loss 0\.300, stop_loss 0\.4, but another token is more probable",
                "set until_given: true, or lower",
            ),
            (0.3, {"until_given": True}, "another token is more probable", "Else raise num_steps or lr, or take"),
            (0.5, {}, r"loss 0\.500, stop_loss 0\.4", "Else raise num_steps or lr, or take a larger p"),
            (0.5, {"stop_loss": 0}, "stop_loss 0", "Else raise num_steps"),
        ],
    )
    def test_the_remedy_is_that_of_the_reason(self, facts, last, settings, state, remedy):
        """Below stop_loss neither more steps nor a larger rate do anything: training stops by itself."""
        answers = (training.Answer(facts[0], last, 0.7, False),)
        hparams = tiny_hparams(**{"stop_loss": 0.4, "on_failure": "raise", **settings})
        with pytest.raises(EditFailed, match=rf"after 1 steps \(.*{state}\): .*; .*{remedy}"):
            require_reached(RowEdit({}, (5.0, last), answers), hparams)

    def test_a_fact_that_the_mean_hides(self, facts):
        """Nine good facts and a contradiction have a small mean loss."""
        answers = (training.Answer(facts[0], 0.01, 0.99, True), training.Answer(facts[1], 3.0, 0.05, False))
        assert RowEdit({}, (5.0, 0.3), answers).failed(stop_loss=0.4) == answers[1:]
        assert RowEdit({}, (5.0, 0.5), answers).failed(stop_loss=0.4) == answers[1:]
        assert RowEdit({}, (5.0, 0.5), answers[:1]).failed(stop_loss=0.4) == answers[:1]
        assert RowEdit({}, (5.0, 0.3), answers[:1]).failed(stop_loss=0.4) == ()

    def test_many_are_counted(self, llama, tokenizer, caplog):
        requests = [
            request((ONE_TOKEN[0], word)) for word in ["Rome", "Paris", "Madrid", "Lima", "Latin", "Tiber", "Oslo"]
        ]
        with caplog.at_level(logging.WARNING):
            apply_kne_to_model(llama, tokenizer, requests, tiny_hparams(num_steps=2))
        assert (
            "7 of 7 facts" in caplog.text
            and "'Latin'" in caplog.text
            and "'Tiber'" not in caplog.text
            and "and 2 more" in caplog.text
        )

    @pytest.mark.parametrize("value", ["ignore", ""])
    def test_unknown_ways_are_refused(self, value):
        with pytest.raises(ValueError, match=f"on_failure: {value!r} must be one of"):
            tiny_hparams(on_failure=value)


class TestRestore:
    NAME = LLAMA_DOWN.format(0) + ".weight"

    @pytest.fixture
    def originals(self, llama):
        return write_rows(llama, edit_of(llama))

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            (
                "model.layers.9.mlp.down_proj.weight",
                lambda t: t,
                "LlamaForCausalLM has no parameter 'model.layers.9.mlp.down_proj.weight'",
            ),
            (NAME, lambda t: t[:1], r"is \(1, 40\) in torch.float32, in LlamaForCausalLM it is \(24, 40\)"),
            (NAME, lambda t: t[0], r"is \(40,\)"),
            (NAME, lambda t: torch.tensor(1.0), r"is \(\) in"),
            (NAME, lambda t: t.bfloat16(), r"in torch.bfloat16, in LlamaForCausalLM it is \(24, 40\) in torch.float32"),
            (NAME, lambda t: t.tolist(), "is a list"),
        ],
        ids=["name", "one row", "a vector", "a number", "type", "no tensor"],
    )
    def test_refuses_what_is_not_of_this_model(self, llama, originals, name, change, message):
        """Before it changes anything: the wrong one comes last."""
        before = fingerprint(llama)
        value = change(originals.pop(self.NAME))
        with pytest.raises(ValueError, match=f"originals: .*{message}"):
            restore(llama, {**originals, name: value})
        assert fingerprint(llama) == before

    def test_several_edits_are_undone_last_first(self, llama):
        """As documented: an earlier edit's originals undo later edits of the same matrices as well, and only those."""
        before = weights(llama)
        first = write_rows(llama, edit_of(llama, rows={0: (1, 2), 1: (3,)}))
        after_first = weights(llama)
        second = write_rows(llama, edit_of(llama, rows={0: (7,), 2: (5,)}))
        after_second = weights(llama)
        restore(llama, second)
        assert weights(llama) == after_first
        restore(llama, first)
        assert weights(llama) == before
        write_rows(llama, edit_of(llama, rows={0: (1, 2), 1: (3,)}))
        write_rows(llama, edit_of(llama, rows={0: (7,), 2: (5,)}))
        restore(llama, first)
        kept = LLAMA_DOWN.format(2) + ".weight"
        assert weights(llama) == {**before, kept: after_second[kept]} != before

    def test_tied_weights_by_either_name(self, llama):
        value = llama.lm_head.weight.detach().clone()
        before = weights(llama)
        with torch.no_grad():
            llama.lm_head.weight.zero_()
        restore(llama, {"lm_head.weight": value})
        assert weights(llama) == before


class TestProgress:
    class Terminal:
        """What tqdm writes to."""

        def __init__(self, terminal):
            self.terminal, self.text = terminal, ""

        def isatty(self):
            return self.terminal

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    def shown(self, monkeypatch, terminal=True, patience=0.0):
        stream = self.Terminal(terminal)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr(training, "PATIENCE", patience)
        fact = training.Fact("x", "y", (5, 6, 7), 2)
        train_rows(make_llama(), [fact], ensemble_of(LLAMA_DOWN), tiny_hparams(num_steps=3, stop_loss=0))
        return stream.text

    def test_the_steps_of_a_long_training_are_shown_with_the_loss(self, monkeypatch):
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
        monkeypatch.setenv("TQDM_DISABLE", "")
        real = training.tqdm
        monkeypatch.setattr(training, "tqdm", lambda **settings: real(**settings, mininterval=0, miniters=1))
        text = self.shown(monkeypatch)
        assert "train" in text and "3/3" in text and "loss=" in text
        assert text.endswith("\r"), "and taken away at the end"

    @pytest.mark.parametrize("settings", [dict(terminal=False), dict(patience=3600.0)], ids=["no terminal", "quick"])
    def test_else_nothing_is(self, monkeypatch, settings):
        assert self.shown(monkeypatch, **settings) == ""

    def test_nor_where_tqdm_is_switched_off(self, monkeypatch):
        monkeypatch.setenv("TQDM_DISABLE", "1")
        assert self.shown(monkeypatch) == ""


@pytest.mark.parametrize("device", ["0,1", "0, 1", "cuda:0,cuda:1", [0, 1], (2, 3)])
def test_several_devices_are_told_the_way(device):
    with pytest.raises(
        ValueError,
        match=r"device: .* names several GPUs.*CUDA_VISIBLE_DEVICES=0,1 .*device: 0 and model_parallel: true",
    ):
        KNEHyperParams.from_dict({"model_name": "tiny", "target_modules": [LLAMA_DOWN], "device": device})
