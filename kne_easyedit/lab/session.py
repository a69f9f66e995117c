"""What the page does with its one model and its store; nothing here knows how it is shown."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from kne_easyedit._util.interrupts import Stopped, stoppable
from kne_easyedit.benchmark.answers import in_full, one_line
from kne_easyedit.benchmark.asking import probabilities
from kne_easyedit.benchmark.before_after import Question, Questions, Said, kept, without_and_with_edits
from kne_easyedit.editing.edit import compute_edit, require_reached
from kne_easyedit.editing.kne_edit import KNEEdit
from kne_easyedit.edits.beside import kept_beside
from kne_easyedit.edits.on_top import localized_and_applied
from kne_easyedit.edits.stack import EditStack
from kne_easyedit.edits.store import EditStore, Entry
from kne_easyedit.facts.encoding import Tokenizer
from kne_easyedit.facts.records import to_request
from kne_easyedit.hparams import KNEHyperParams

logger = logging.getLogger(__name__)

LONGEST = {"prompt": 2000, "new answer": 200, "subject": 200, "old answer": 200}
"""Characters of a text at most."""
NEIGHBOURS = 4
"""Neighbours that are asked before and after an edit."""
ANSWER = 32
"""Tokens of an answer at most."""


@dataclass(frozen=True)
class Step:
    """Training before one of its steps."""

    number: int
    """From 1."""
    loss: float
    """The mean cross-entropy of the answer's tokens, in nats."""
    new: float
    """Probability of the whole new answer, in [0, 1]."""
    old: float | None
    """The same of the old answer; None if there is none."""


@dataclass(frozen=True)
class Training:
    """How far an edit is."""

    doing: str
    steps: tuple[Step, ...] = ()
    """All steps so far."""


@dataclass(frozen=True)
class Finished:
    """An edit that was trained and is in the store."""

    id: str
    edit: KNEEdit
    steps: tuple[Step, ...]
    """All steps, and as the last one the result."""
    seconds: float
    fact: Question
    before: Said
    after: Said
    neighbours: tuple[tuple[str, str, str], ...]
    """Prompt, answer before and after of each."""
    reached: bool
    """Whether training reached the answer (`RowEdit.failed`)."""

    @property
    def as_before(self) -> int:
        """How many neighbours' answers begin as before."""
        return sum(kept(before, after) for _, before, after in self.neighbours)


class LabSession:
    """One model and one store, used by any number of threads: one does something with the model, the others wait.

    Before anything is done the weights are made those of the store's active edits, which other processes may have
    changed.

    Args:
        model: The base model, loaded.
        tokenizer: Its tokenizer.
        hparams: The settings of edits.
        store: Where edits go.

    Raises:
        ValueError: The store is of another base, or damaged; or the model is quantised.
        OSError: It cannot be read.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, hparams: KNEHyperParams, store: EditStore) -> None:
        self.store, self.hparams, self.tokenizer = store, hparams, tokenizer
        self._model = model
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None
        if kept_beside(model, hparams):
            raise ValueError(
                "load_in: nothing can be added to a quantised base, and the page adds each edit to its store; load the "
                "model without load_in, or use kne edit --out and kne ask"
            )
        store.apply(model)

    def entries(self) -> tuple[Entry, ...]:
        """The store's edits in their order. Raises ValueError and OSError as `EditStore.list`."""
        return self.store.list()

    def switch(self, id: str, on: bool) -> tuple[Entry, ...]:
        """Switches one edit on or off; the weights are then the base plus the active edits.

        Args:
            id: The edit.
            on: Whether it is to be on.

        Returns:
            The active edits that were trained on top of one that is no longer active before them.

        Raises:
            ValueError: The store has not got it, or an active edit is damaged: then the switch stays as it was.
            OSError: The store cannot be read or written.
        """
        with self._lock:
            switches = {True: self.store.on, False: self.store.off}
            was = any(entry.id == id and entry.on for entry in self.store.list())
            switches[on](id)
            try:
                self.store.apply(self._model)
            except BaseException:
                switches[was](id)  # this edit alone: other processes may have switched others since
                raise
            return tuple(entry for entry in self.store.list() if entry.on and entry.missing)

    def ask(self, prompt: str, *, chat: bool = False) -> tuple[str, str]:
        """The model's answers to a prompt: the base's, and that with the active edits.

        Args:
            prompt: What is asked.
            chat: Put it into the model's chat template.

        Raises:
            ValueError: The prompt is empty or too long; there is no template.
            OSError: The store cannot be read.
        """
        prompt = _text("prompt", prompt)
        if not prompt.strip():
            raise ValueError("prompt: is empty; type what the model is asked")
        with self._lock:
            self.store.apply(self._model)
            ((was, now),) = without_and_with_edits(self._model, self.tokenizer, [prompt], ANSWER, chat=chat)
        return in_full(was), in_full(now)

    def train(
        self, prompt: str, target: str, subject: str = "", old: str = ""
    ) -> Generator[Training | Finished, None, None]:
        """Edits a fact and adds it to the store, on top of the active edits.

        A thread of its own trains. Where this generator is closed before its end, training stops, as by `stop`.

        Args:
            prompt: The beginning of a sentence.
            target: The new answer.
            subject: What the prompt is about, as it stands there; empty: not given.
            old: The old answer; empty: what the model says.

        Yields:
            How far it is, as often as there is something new; at last what has become of it.

        Raises:
            Stopped: It was stopped. The weights are what they were, bit for bit, and so is the store.
            ValueError: A text cannot be used; the message names it. As `compute_edit`.
            FloatingPointError, NotImplementedError, OSError: As `compute_edit` and `EditStore.add`.
        """
        request = _request(prompt, target, subject, old)
        news: SimpleQueue[Training | Finished | BaseException] = SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                with self._lock:
                    self._stop = stop
                    try:
                        news.put(self._train(request, stop, news.put))
                    finally:
                        self._stop = None
            except BaseException as error:  # noqa: BLE001  (raised again where the news are read)
                news.put(error)

        thread = threading.Thread(target=work, name="kne-lab-training", daemon=True)
        thread.start()
        try:
            while True:
                found = news.get()
                while isinstance(found, Training) and not news.empty():  # only the newest of several is shown
                    found = news.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
                if isinstance(found, Finished):
                    return
        finally:
            stop.set()
            thread.join()

    def stop(self) -> bool:
        """Stops the training that runs at its next step, pass or fact.

        Returns:
            Whether one runs.
        """
        running = self._stop
        if running is not None:
            running.set()
        return running is not None

    def close(self) -> None:
        """Stops the training that runs, waits for it, and takes all edits back."""
        self.stop()
        with self._lock:
            EditStack(()).apply(self._model)

    def _train(self, request: dict, stop: threading.Event, tell: Callable[[Training], None]) -> Finished:
        model, hparams, start = self._model, self.hparams, time.monotonic()
        with stoppable(stop.is_set):
            tell(
                Training(
                    "Localising. The first edit of a model takes longest: scores of facts are kept for later ones."
                )
            )
            localized_and_applied(self.store, model, self.tokenizer, [request], hparams)
            tell(Training("Asking the model before the edit."))
            questions = Questions(
                model,
                self.tokenizer,
                [request],
                neighbours=NEIGHBOURS,
                of_facts=1,
                separator=hparams.separator,
                chat=hparams.use_chat_template,
            )
            before = questions.ask(model)
            (fact,) = questions.facts
            steps: list[Step] = []

            def on_step(number: int, loss: float) -> None:
                steps.append(Step(number, loss, *self._probabilities(fact)))
                tell(Training(f"Training, step {number} of {hparams.num_steps} at most.", tuple(steps)))

            edit = compute_edit(model, self.tokenizer, [request], hparams, on_step=on_step)
            if stop.is_set():
                raise Stopped("stopped")
        require_reached(edit, hparams)
        # From here on it is not stopped: what is in the store is in the weights.
        id = self.store.add(edit)
        self.store.apply(model)
        after = questions.ask(model)
        said = after[fact]
        assert said.new is not None  # noqa: S101  (for the type checker: facts have one)
        steps.append(Step(edit.steps + 1, edit.losses[-1], said.new, said.old))
        return Finished(
            id,
            edit,
            tuple(steps),
            time.monotonic() - start,
            fact,
            before[fact],
            said,
            tuple(
                (one.prompt, one_line(before[one].answer), one_line(after[one].answer))
                for one in questions.neighbours[0]
            ),
            not edit.failed(hparams.stop_loss),
        )

    def _probabilities(self, fact: Question) -> tuple[float, float | None]:
        """Of the new and the old answer, as the model is now: in training, with the rows as they are."""
        new, *old = probabilities(self._model, [one for one in (fact.new, fact.old) if one is not None])
        return new, (old[0] if old else None)


def _request(prompt: str, target: str, subject: str, old: str) -> dict:
    given = {
        "prompt": _text("prompt", prompt),
        "target_new": _text("new answer", target),
        "subject": _text("subject", subject).strip(),
        "ground_truth": _text("old answer", old).strip(),
    }
    for field, name in (("prompt", "prompt"), ("target_new", "new answer")):
        if not given[field].strip():
            raise ValueError(f"{name}: is empty; an edit has a prompt and a new answer")
    return to_request({name: text for name, text in given.items() if text})


def _text(name: str, text: str) -> str:
    """Raises ValueError, naming it, for what is no text of a sensible length."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: is a {type(text).__name__}, not a text")
    if len(text) > LONGEST[name]:
        raise ValueError(f"{name}: has {len(text)} characters, at most {LONGEST[name]} are taken")
    return text
