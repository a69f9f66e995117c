"""What the page does with its model and its store, without the page: edited, asked, switched, stopped, refused."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import fingerprint, make_llama, make_tokenizer, weights
from conftest import tiny_hparams as conftest_hparams

from kne_easyedit._util.interrupts import Stopped, safe_point, stoppable
from kne_easyedit.editing.edit import EditFailed, compute_edit
from kne_easyedit.edits.store import EditStore
from kne_easyedit.lab.session import LONGEST, Finished, LabSession, Training

FRANCE = ("The capital of France is", "Rome", "France", "Paris")
PERU = ("The language of Peru is", "Latin")
ENDLESS = {"num_steps": 100_000, "stop_loss": 1e-9}
"""Settings of a training that ends only when it is stopped."""


def tiny_hparams(**changes):
    return conftest_hparams(**{"lr": 0.3, **changes})


@pytest.fixture
def model():
    return make_llama()


@pytest.fixture
def session(model, tmp_path):
    return LabSession(model, make_tokenizer(), tiny_hparams(), EditStore(tmp_path / "store"))


def trained(session, fact) -> Finished:
    *_, found = session.train(*fact)
    assert isinstance(found, Finished)
    return found


def greedy(model, prompt: str) -> str:
    tokenizer = make_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model(ids).logits[0, -1].argmax())


def test_a_fact_is_trained_before_ones_eyes_and_stays_in_the_store(session, model):
    before = weights(model)
    *news, found = session.train(*FRANCE)
    live = [one for one in news if one.steps]
    assert live and all(isinstance(one, Training) for one in news)
    assert [one.steps for one in live] == [found.steps[: len(one.steps)] for one in live]  # the plot only grows
    assert [one.number for one in found.steps] == list(range(1, found.edit.steps + 2))
    first, last = found.steps[0], found.steps[-1]
    assert last.loss < first.loss and last.new > 0.9 > 0.5 > first.new
    # The page's figures are the edit's own: the loss of one token is minus the logarithm of its probability.
    assert tuple(one.loss for one in found.steps) == found.edit.losses
    for one in found.steps:
        assert one.new == pytest.approx(torch.tensor(-one.loss).exp().item(), rel=1e-4)
    assert (found.before.new, found.before.old) == pytest.approx((first.new, first.old), rel=1e-4)
    assert (found.after.new, found.after.old) == (last.new, last.old) and found.reached
    assert found.before.answer != found.after.answer and "Rome" in found.after.answer
    assert found.neighbours and found.as_before <= len(found.neighbours)
    (entry,) = session.entries()
    assert (entry.id, entry.on, entry.facts) == (found.id, True, ("The capital of France is -> Rome",))
    assert weights(model) != before and greedy(model, FRANCE[0]) == "Rome"


def test_watching_does_not_change_what_is_trained(session):
    other = make_llama()
    found = trained(session, FRANCE).edit
    request = dict(found.requests[0])
    alone = compute_edit(other, make_tokenizer(), [request], tiny_hparams())
    assert found.digest == alone.digest  # rows, values and losses, bit for bit
    assert compute_edit(other, make_tokenizer(), [request], tiny_hparams(lr=0.2)).digest != alone.digest


def test_off_gives_the_bases_bits_and_on_the_edits(session, model):
    base = weights(model)
    one = trained(session, FRANCE).id
    first = weights(model)
    other = trained(session, PERU).id
    both = weights(model)
    assert len({str(state) for state in (base, first, both)}) == 3
    assert session.switch(other, False) == () and weights(model) == first
    session.switch(one, False)
    assert weights(model) == base
    assert session.ask(FRANCE[0])[0] == session.ask(FRANCE[0])[1]  # no edit is on
    session.switch(one, True)
    assert weights(model) == first and session.ask(FRANCE[0])[0] != session.ask(FRANCE[0])[1]
    session.switch(other, True)
    assert weights(model) == both


def test_an_edit_that_counts_on_another_is_named(session):
    one, other = trained(session, FRANCE).id, trained(session, PERU).id
    (worse,) = session.switch(one, False)
    assert (worse.id, worse.missing) == (other, (one,))
    assert session.switch(other, False) == ()
    assert session.switch(one, True) == ()


def test_answers_are_the_bases_and_those_of_the_active_edits(session, model):
    found = trained(session, FRANCE)
    was, now = session.ask(FRANCE[0] + "  ")
    assert now.startswith("Rome") and not was.startswith("Rome")
    before = weights(model)
    session.ask(FRANCE[0])
    assert weights(model) == before
    session.switch(found.id, False)
    assert session.ask(FRANCE[0]) == (was, was)


def test_what_another_process_changed_is_seen(session, model, tmp_path):
    base = weights(model)
    found = trained(session, FRANCE)
    EditStore(tmp_path / "store").off(found.id)
    assert [entry.on for entry in session.entries()] == [False]
    assert len(set(session.ask(FRANCE[0]))) == 1 and weights(model) == base


def test_a_store_is_opened_as_it_is(session, model, tmp_path):
    trained(session, FRANCE)
    other = make_llama()
    assert weights(other) != weights(model)
    LabSession(other, make_tokenizer(), tiny_hparams(), EditStore(tmp_path / "store"))
    assert weights(other) == weights(model)
    session.close()
    assert weights(model) == weights(make_llama())


# Stopped


@pytest.mark.parametrize("edits", [0, 1], ids=["on the base", "on an edit"])
def test_stopped_in_the_middle_the_model_is_bit_for_bit_what_it_was(model, tmp_path, edits):
    store = EditStore(tmp_path / "store")
    if edits:
        trained(LabSession(model, make_tokenizer(), tiny_hparams(), store), PERU)
    session = LabSession(model, make_tokenizer(), tiny_hparams(**ENDLESS), store)
    before, listed = fingerprint(model), session.entries()
    steps = []
    with pytest.raises(Stopped):
        for news in session.train(*FRANCE):
            steps = news.steps
            if len(steps) > 2:
                assert session.stop()
    assert len(steps) > 2
    assert fingerprint(model) == before and session.entries() == listed
    assert not session.stop()  # nothing runs any more
    assert session.ask(FRANCE[0])  # and the model is free


def test_a_page_that_is_closed_stops_its_training(model, tmp_path):
    session = LabSession(model, make_tokenizer(), tiny_hparams(**ENDLESS), EditStore(tmp_path / "store"))
    before = fingerprint(model)
    training = session.train(*FRANCE)
    next(news for news in training if news.steps)
    training.close()
    assert fingerprint(model) == before and session.entries() == ()


def test_stopped_while_it_localises(model, tmp_path):
    """Many facts to localise on: the first of them is the last."""
    rows = [f"The capital of {''.join(name)} is,Rome" for name in zip("abcdefghijkl", "lkjihgfedcba")]
    (tmp_path / "facts.csv").write_text("\n".join(["prompt,target_new", *rows]))
    hparams = tiny_hparams(localization_data=str(tmp_path / "facts.csv"), localization_size=len(rows))
    session = LabSession(model, make_tokenizer(), hparams, EditStore(tmp_path / "store"))
    before = fingerprint(model)
    training = session.train(*FRANCE)
    assert "Localising" in next(training).doing
    session.stop()
    with pytest.raises(Stopped):
        list(training)
    assert fingerprint(model) == before and session.entries() == ()


def test_only_the_thread_that_is_to_stop_stops():
    safe_point()
    with stoppable(lambda: True):
        with pytest.raises(Stopped):
            safe_point()
        with stoppable(lambda: False):
            safe_point()
        other = threading.Thread(target=safe_point)
        other.start()
        other.join()
        with pytest.raises(KeyboardInterrupt):  # cleaned up after as after Ctrl-C
            safe_point()
    safe_point()


# Refused


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (("", "Rome"), "prompt: is empty"),
        (("The capital of France is", " "), "new answer: is empty"),
        (("The capital of France is", "Rome", "Spain"), "'Spain' does not stand in the prompt"),
        (("x" * (LONGEST["prompt"] + 1), "Rome"), "prompt: has 2001 characters, at most 2000"),
        (("The capital of France is", "R" * 201), "new answer: has 201 characters"),
        (("The capital of France is", "Rome", "", "P" * 201), "old answer: has 201 characters"),
        (("The capital of France is", ["Rome"]), "new answer: is a list"),
        (("The capital of " + "x" * 100, "Rome"), "tokens"),
    ],
)
def test_what_cannot_be_edited_is_named_and_nothing_is_changed(session, model, fact, message):
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        [*session.train(*fact)]
    assert fingerprint(model) == before and session.entries() == ()
    assert session.ask(FRANCE[0])  # the session lives on


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        (" ", False, "prompt: is empty"),
        ("x" * 2001, False, "prompt: has 2001 characters"),
        ("The capital of " * 30, False, "tokens"),
        ("The capital of France is", True, "no chat template"),
    ],
)
def test_what_cannot_be_asked_is_named(session, prompt, chat, message):
    with pytest.raises(ValueError, match=message):
        session.ask(prompt, chat=chat)
    assert session.ask("The capital of France is")


def test_a_training_that_fails_leaves_all_as_it_was(session, model, monkeypatch):
    before = fingerprint(model)

    def fail(*_, **__):
        raise FloatingPointError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr("kne_easyedit.lab.session.compute_edit", fail)
        with pytest.raises(FloatingPointError, match="nan"):
            [*session.train(*FRANCE)]
    assert fingerprint(model) == before and session.entries() == ()
    assert trained(session, FRANCE).reached


def test_switches_of_edits_that_are_not_there_or_damaged_change_nothing(session, model, tmp_path):
    found = trained(session, FRANCE)
    with pytest.raises(ValueError, match="must be one of"):
        session.switch("../rome", False)
    session.switch(found.id, False)
    before = weights(model)
    other = LabSession(model, make_tokenizer(), tiny_hparams(), EditStore(tmp_path / "store"))
    rows = tmp_path / "store" / "edits" / found.id / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-100])
    with pytest.raises(ValueError, match="switch it off, or remove it"):
        other.switch(found.id, True)
    assert weights(model) == before and [entry.on for entry in other.entries()] == [False]


def test_a_switch_that_fails_leaves_what_others_switched_meanwhile(session, model, tmp_path, monkeypatch):
    first = trained(session, FRANCE)
    session.switch(first.id, False)
    second = trained(session, PERU)
    session.switch(second.id, False)

    def another_process(model):
        EditStore(tmp_path / "store").on(second.id)
        raise ValueError("an active edit is damaged")

    monkeypatch.setattr(session.store, "apply", another_process)
    with pytest.raises(ValueError, match="damaged"):
        session.switch(first.id, True)
    assert {entry.id: entry.on for entry in session.entries()} == {first.id: False, second.id: True}


def test_two_who_train_at_once_wait_for_each_other(session, model):
    found = []
    threads = [threading.Thread(target=lambda f=fact: found.append(trained(session, f))) for fact in (FRANCE, PERU)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = session.entries()
    assert second.trained_on == (first.id,) and first.trained_on == ()
    other = make_llama()
    session.store.apply(other)
    assert weights(other) == weights(model)


def test_what_is_not_reached_is_not_kept_where_the_settings_say_so(model, tmp_path):
    hparams = tiny_hparams(num_steps=1, lr=1e-5, on_failure="raise")
    session = LabSession(model, make_tokenizer(), hparams, EditStore(tmp_path / "store"))
    before = fingerprint(model)
    with pytest.raises(EditFailed, match="Nothing was written"):
        trained(session, FRANCE)
    assert session.entries() == () and fingerprint(model) == before


def test_a_quantised_base_is_refused_before_an_edit_is_trained(model, tmp_path, monkeypatch):
    monkeypatch.setattr("kne_easyedit.lab.session.kept_beside", lambda model, hparams: True)
    with pytest.raises(ValueError, match="load_in: nothing can be added to a quantised base"):
        LabSession(model, make_tokenizer(), tiny_hparams(), EditStore(tmp_path / "store"))
