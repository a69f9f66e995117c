"""Ctrl-C at any moment, also twice: either the edit is made and its originals are returned, or nothing changed."""

import os
import random
import signal
import threading
import time
import uuid

import pytest
import torch
from conftest import LLAMA_DOWN, ONE_TOKEN, fingerprint, make_llama, tiny_hparams

from kne_easyedit._util.interrupts import defer_interrupts, safe_point
from kne_easyedit.attribution import attention, replay
from kne_easyedit.attribution.engine import attribute
from kne_easyedit.editing import adapter, row_edit
from kne_easyedit.editing import row_training as training
from kne_easyedit.editing.edit import apply_kne_to_model
from kne_easyedit.editing.row_edit import restore, write_rows
from kne_easyedit.editing.row_training import train_rows
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.state import preserve_state

SIGNALS = int(os.environ.get("KNE_TEST_SIGNALS", "60"))
"""How many timers go off in each of the two stress tests, single and double; 1000 makes 2,000 (some minutes)."""
ENSEMBLE = NeuronEnsemble({LLAMA_DOWN: {0: (1, 5), 1: (2, 3)}}, {LLAMA_DOWN: 24})
REQUEST = {"prompt": ONE_TOKEN[0], "target_new": ONE_TOKEN[1]}


def kill(*_):
    os.kill(os.getpid(), signal.SIGINT)


class Raised(Exception):
    """By a handler of the user's own."""


@pytest.fixture
def model():
    return make_llama(num_hidden_layers=2)


def everything(model):
    """All that must be as it was after an interrupt."""
    return {
        "model": fingerprint(model),
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "generator": torch.get_rng_state().tolist(),
        "prefix": attention.PREFIX.get(None),
        "handler": signal.getsignal(signal.SIGINT),
    }


@pytest.mark.usefixtures("sigint")
class TestHeld:
    def test_waits_for_a_safe_point(self):
        seen = []
        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            kill()
            seen.append("behind the signal")
            safe_point()
            seen.append("behind the safe point")
        assert seen == ["behind the signal"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_or_for_the_end_of_the_outermost_block(self):
        seen = []
        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            with defer_interrupts():
                kill()
            seen.append("behind the inner block")
        assert seen == ["behind the inner block"]

    def test_without_a_signal_nothing_happens(self):
        with defer_interrupts(undo=pytest.fail):
            safe_point()
        safe_point()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_block_whose_end_is_interrupted_is_undone(self):
        undone = []
        with (
            pytest.raises(KeyboardInterrupt),
            defer_interrupts(undo=lambda: (kill(), undone.append(1))),
        ):  # a second Ctrl-C, while the first is heeded
            kill()
        assert undone == [1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_block_that_failed_is_not_undone(self):
        with pytest.raises(KeyboardInterrupt) as caught, defer_interrupts(undo=pytest.fail):
            kill()
            raise ValueError("its own")
        assert isinstance(caught.value.__context__, ValueError)

    def test_a_handler_of_the_users_own_is_called_once_and_may_go_on(self):
        calls = []
        signal.signal(signal.SIGINT, lambda number, frame: calls.append((number, frame is not None)))
        with defer_interrupts(undo=pytest.fail):
            kill(), kill()
            assert calls == []
            safe_point()
            assert calls == [(signal.SIGINT, True)]
            kill()
        assert calls == [(signal.SIGINT, True)] * 2

    def test_a_handler_of_the_users_own_may_raise_what_it_likes(self):
        def handler(number, frame):
            raise Raised

        signal.signal(signal.SIGINT, handler)
        with pytest.raises(Raised), defer_interrupts():
            kill()
        assert signal.getsignal(signal.SIGINT) is handler

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
    def test_where_no_python_handler_is_nothing_is_exchanged(self, handler):
        signal.signal(signal.SIGINT, handler)
        with defer_interrupts():
            assert signal.getsignal(signal.SIGINT) is handler

    def test_another_thread_holds_nothing_and_is_not_interrupted(self):
        seen = []

        def work():
            with defer_interrupts():
                seen.append(signal.getsignal(signal.SIGINT))
                safe_point()
            seen.append("done")

        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            kill()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert len(seen) == 2 and seen[1] == "done"


@pytest.mark.usefixtures("sigint")
class TestPlaces:
    """One signal at a place of our own code that used to be interrupted there."""

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (replay, "prefix_attention"),
            (attention, "attend"),
            (adapter, "_prepare"),
            (training, "_answers"),
            (row_edit, "_require_trained_loss"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_while_something_is_in_place(self, model, tokenizer, monkeypatch, owner, name):
        real, calls = getattr(owner, name), []

        def interrupted(*args, **kwargs):
            result = real(*args, **kwargs)
            calls.append(1)
            kill()
            return result

        before = everything(model)
        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply_kne_to_model(model, tokenizer, REQUEST, tiny_hparams(num_steps=2), return_orig_weights=True)
        assert calls and everything(model) == before

    def test_while_the_end_puts_things_back(self, model, monkeypatch):
        """The ``finally`` of `preserve_state` runs to its end."""
        before = everything(model)
        real = torch.nn.Parameter.requires_grad_
        with pytest.raises(KeyboardInterrupt), preserve_state(model):
            monkeypatch.setattr(
                torch.nn.Parameter, "requires_grad_", lambda self, flag: (kill(), real(self, flag)), raising=False
            )
        assert everything(model) == before

    def test_training_stops_at_the_next_step(self, model, facts, monkeypatch):
        steps, real = [], torch.optim.AdamW.step

        def step(self, *args):
            steps.append(1)
            if len(steps) == 2:
                kill()
            return real(self, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        before = everything(model)
        with pytest.raises(KeyboardInterrupt):
            train_rows(model, facts, ENSEMBLE, tiny_hparams(stop_loss=0, num_steps=50))
        assert len(steps) == 2 and everything(model) == before

    @pytest.mark.parametrize("engine", ["sweep", "whole"])
    def test_attribution_stops_within_a_pass(self, model, tokenizer, engine):
        calls = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1) or kill())
        with pytest.raises(KeyboardInterrupt):
            attribute(model, tokenizer, *ONE_TOKEN, LLAMA_DOWN, 50, engine=engine, chunk_rows=4)
        handle.remove()
        assert len(calls) <= 3

    def test_restoring_is_completed(self, model, facts, monkeypatch):
        before = fingerprint(model)
        originals = write_rows(model, train_rows(model, facts, ENSEMBLE, tiny_hparams(num_steps=1)))
        real = torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a: (kill(), real(self, *a))[1])
        with pytest.raises(KeyboardInterrupt):
            restore(model, originals)
        assert fingerprint(model) == before


class Timer:
    """Sends SIGINT some times after a delay. Its handler raises, like Python's own, only while it is armed."""

    def __init__(self):
        self.armed, self.left = False, 0

    def arm(self, delay, times, interval):
        self.armed, self.left = True, times
        signal.setitimer(signal.ITIMER_REAL, delay, interval if times > 1 else 0)

    def disarm(self):
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def alarm(self, number, frame):
        self.left -= 1
        if self.left <= 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.left >= 0:
            kill()

    def interrupt(self, number, frame):
        if self.armed:
            raise KeyboardInterrupt


def attempt(timer, delay, times, interval, work):
    """``work()`` under a timer: its result (or None), and whether KeyboardInterrupt came, at most twice."""
    result, hit = None, False
    try:
        try:
            try:
                timer.arm(delay, times, interval)
                result = work()
            finally:
                timer.disarm()
        except KeyboardInterrupt:
            hit = True
            timer.disarm()
    except KeyboardInterrupt:
        timer.disarm()
    return result, hit


@pytest.fixture
def timer():
    timer = Timer()
    handlers = {signal.SIGALRM: timer.alarm, signal.SIGINT: timer.interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield timer
    timer.disarm()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("times", [1, 2], ids=["single", "double"])
def test_real_signals_at_random_moments(model, tokenizer, timer, tmp_path, capsys, times):
    """An edit with its localisation (nothing cached), from its first to its last bytecode and a little beyond."""
    settings = dict(
        num_steps=2, stop_loss=0, attribution_steps=2, chunk_rows=100, kl_weight=0.1, kl_data="embedded", kl_size=1
    )

    def edit():
        hparams = tiny_hparams(
            **settings, cache_dir=str(tmp_path / uuid.uuid4().hex)
        )  # no generator: an interrupt ends it
        return apply_kne_to_model(model, tokenizer, REQUEST, hparams, return_orig_weights=True)[1]

    before, rng = everything(model), random.Random(times)
    restore(model, edit())  # what is imported and looked up once
    start = time.perf_counter()
    originals = edit()
    seconds, edited = time.perf_counter() - start, everything(model)
    restore(model, originals)
    assert everything(model) == before
    interrupted = 0
    for number in range(SIGNALS):
        delay, interval = rng.uniform(1e-5, 1.1 * seconds), rng.choice([1e-5, 1e-4, 1e-3, 1e-2])
        originals, hit = attempt(timer, delay, times, interval, edit)
        if originals is not None:
            assert everything(model) == edited, f"signal {number} after {delay:.6f} s"
            restore(model, originals)
        else:
            assert hit, f"signal {number} after {delay:.6f} s: neither an edit nor an interrupt"
            interrupted += 1
        assert everything(model) == before, f"signal {number} after {delay:.6f} s"
    assert interrupted
    with capsys.disabled():
        if SIGNALS >= 1000:
            print(
                f" {SIGNALS} timers of {times} signal(s): {interrupted} edits interrupted, "
                f"{SIGNALS - interrupted} completed",
                end="",
            )
