"""The page, in Gradio: what is shown where. All data are shown in components that show text as text."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from kne_easyedit._util.interrupts import Stopped
from kne_easyedit._util.messages import percent, printable
from kne_easyedit.benchmark.answers import one_line
from kne_easyedit.edits.sizes import ensemble_of
from kne_easyedit.edits.store import Entry
from kne_easyedit.lab.session import LONGEST, Finished, LabSession, Step
from kne_easyedit.localization.figures import ensemble_figure

logger = logging.getLogger(__name__)

TITLE = "kne lab"
NEW, OLD = "new", "old"
AT_LEAST = 0.3
"""Seconds between two pictures of a training: a browser does not draw faster steps one by one."""
LABEL = 300
"""Characters of an edit's line in the list at most."""


def require_gradio() -> Any:
    """The package. Raises ImportError if it is missing; the message says how to install it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # what is no part of `Blocks` reads this
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the page needs gradio: pip install "kne_easyedit[lab]"') from error
    return gradio


def build(session: LabSession, about: str) -> Any:
    """The page. Raises ImportError if Gradio is missing.

    Args:
        session: The model and the store.
        about: One line on both, shown on top.
    """
    gr = require_gradio()
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.HTML(
            "<h1>kne lab</h1><p>Type a fact, watch the model learn it, ask before and after, take it back. "
            "The model's files are never changed.</p>"
        )
        gr.Textbox(about, label="Model and store", interactive=False, lines=1, max_lines=4)
        store = _Store(gr, session)
        with gr.Tabs():
            with gr.Tab("Edit"):
                _edit_part(gr, session, store)
            with gr.Tab("Ask"):
                _ask_part(gr, session)
            with gr.Tab("Store"):
                store.render()
        blocks.load(store.shown, None, store.outputs, **_quiet(), concurrency_id="list")
    return blocks


def _quiet(**more: Any) -> dict[str, Any]:
    """What all events share: no entry in an API, no overlay; those of the model wait for each other."""
    return {"api_visibility": "private", "show_progress": "hidden", **more}


def _of_model() -> dict[str, Any]:
    return _quiet(concurrency_limit=1, concurrency_id="model")


def _said(error: BaseException) -> str:
    """An error as a line of text."""
    if isinstance(error, Stopped):
        return "Stopped. The model and the store are as they were."
    known = isinstance(error, ValueError | OSError | ImportError | FloatingPointError | NotImplementedError)
    if not known:
        logger.error("kne lab: an error that was not expected", exc_info=error)
    return f"Not done: {'' if known else type(error).__name__ + ': '}{printable(error)}"


class _Store:
    """The part that lists the edits with their switches."""

    def __init__(self, gr: Any, session: LabSession) -> None:
        self._gr, self._session = gr, session
        self._switches = gr.CheckboxGroup(
            [],
            label="Edits of the store, in their order; ticked: on",
            interactive=True,
            elem_id="switches",
            render=False,
        )
        self._note = gr.Textbox(
            label="State", interactive=False, lines=1, max_lines=8, elem_id="store-note", render=False
        )
        self.outputs = [self._switches, self._note]

    def render(self) -> None:
        """Puts it where this is called."""
        self._switches.render()
        self._note.render()
        self._switches.select(self._select(), None, self.outputs, **_of_model(), trigger_mode="multiple")

    def shown(self, first: str = "") -> list[Any]:
        """The list as it is on disk, and a note."""
        try:
            entries = self._session.entries()
        except (ValueError, OSError) as error:
            return [self._gr.skip(), _said(error)]
        on = [entry.id for entry in entries if entry.on]
        count = (
            f"{len(entries)} {'edit' if len(entries) == 1 else 'edits'}, {len(on)} on." if entries else "No edit yet."
        )
        return [
            self._gr.CheckboxGroup(choices=[(_line(entry), entry.id) for entry in entries], value=on),
            f"{first} {count}".strip(),
        ]

    def _select(self) -> Any:
        gr, session = self._gr, self._session

        def switch(event: Any) -> list[Any]:
            try:
                worse = session.switch(str(event.value), bool(event.selected))
            except Exception as error:  # noqa: BLE001  (shown; the server lives on)
                return self.shown(_said(error))
            said = f"{event.value} is {'on' if event.selected else 'off'}."
            if worse:
                names = ", ".join(entry.id for entry in worse)
                said += f" {names}: trained on top of an edit that is not on before it; its answers may be lost."
            return self.shown(said)

        switch.__annotations__["event"] = gr.SelectData  # by this Gradio knows what to pass
        return switch


def _line(entry: Entry) -> str:
    """An edit as one line."""
    facts = "; ".join(entry.facts[:2]) + (f"; and {len(entry.facts) - 2} more" if len(entry.facts) > 2 else "")
    facts = printable(facts)
    facts = facts if len(facts) <= LABEL else f"{facts[:LABEL]}..."
    if entry.missing:
        return f"{entry.id}: {facts} (trained on top of {', '.join(entry.missing)}, not on before it)"
    below = f" (trained on top of {', '.join(entry.trained_on)})" if entry.trained_on else ""
    return f"{entry.id}: {facts}{below}"


def _field(gr: Any, name: str, example: str, optional: bool = False) -> Any:
    label = name.capitalize() + (" (optional)" if optional else "")
    return gr.Textbox(
        label=label,
        placeholder=example,
        max_length=LONGEST[name],
        lines=1,
        max_lines=6,
        min_width=220,
        elem_id=_id(name),
    )


def _id(name: str) -> str:
    return name.replace(" ", "-")


def _table(gr: Any, label: str, headers: list[str], **more: Any) -> Any:
    return gr.Dataframe(
        headers=headers,
        datatype="str",
        type="array",
        column_count=len(headers),
        column_widths=["24%", "38%", "38%"],  # on a narrow page, too, all three are seen
        interactive=False,
        wrap=True,
        latex_delimiters=[],
        buttons=[],
        label=label,
        **more,
    )


def _edit_part(gr: Any, session: LabSession, store: _Store) -> None:
    with gr.Row():
        prompt = _field(gr, "prompt", "The capital of France is")
        target = _field(gr, "new answer", "Rome")
    with gr.Row():
        subject = _field(gr, "subject", "France", optional=True)
        old = _field(gr, "old answer", "what the model says", optional=True)
    with gr.Row():
        start = gr.Button("Edit", variant="primary", elem_id="edit")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    status = gr.Textbox(label="Status", interactive=False, lines=1, max_lines=8, elem_id="status")
    with gr.Row(visible=False) as live:
        loss = gr.LinePlot(
            x="step",
            y="loss",
            x_title="step",
            y_title="loss of the new answer (nats)",
            y_lim=[0, None],
            height=260,
            min_width=300,
            elem_id="loss",
        )
        probability = gr.LinePlot(
            x="step",
            y="probability",
            color="answer",
            color_map={NEW: "#2a9d8f", OLD: "#e76f51"},
            x_title="step",
            y_title="probability (%)",
            y_lim=[0, 100],
            height=260,
            min_width=300,
            elem_id="probability",
        )
    with gr.Column(visible=False) as result:
        answers = _table(gr, "Before and after the edit", ["", "before", "after"], elem_id="answers")
        neighbours = _table(
            gr,
            "Neighbours, which one fact's edit should leave alone",
            ["prompt", "before", "after"],
            elem_id="neighbours",
        )
        same = gr.Textbox(show_label=False, container=False, interactive=False, lines=1, elem_id="as-before")
        picture = gr.Plot(show_label=False, format="png", elem_id="picture")

    def plots(steps: tuple[Step, ...]) -> dict[Any, Any]:
        import pandas

        curve = pandas.DataFrame({"step": [s.number for s in steps], "loss": [s.loss for s in steps]})
        both = [(s.number, 100 * s.new, NEW) for s in steps]
        both += [(s.number, 100 * s.old, OLD) for s in steps if s.old is not None]
        shares = pandas.DataFrame(both, columns=["step", "probability", "answer"])
        return {live: gr.Row(visible=True), loss: curve, probability: shares}

    def edit(*texts: str) -> Iterator[dict[Any, Any]]:
        yield {status: "Waiting for the model.", result: gr.Column(visible=False)}
        training, drawn = session.train(*texts), 0.0
        try:
            for news in training:
                if isinstance(news, Finished):
                    found = _tables(news)
                    switches, note = store.shown()
                    yield {
                        status: _summary(news),
                        **plots(news.steps),
                        result: gr.Column(visible=True),
                        answers: found[0],
                        neighbours: gr.Dataframe(found[1], visible=bool(found[1])),
                        same: _neighbours_said(news),
                        picture: _picture(news),
                        store.outputs[0]: switches,
                        store.outputs[1]: note,
                    }
                elif not news.steps:
                    yield {status: news.doing}
                elif time.monotonic() - drawn > AT_LEAST:
                    drawn = time.monotonic()
                    yield {status: news.doing, **plots(news.steps)}
        except (Exception, Stopped) as error:  # noqa: BLE001  (shown; the server lives on)
            yield {status: _said(error)}
        finally:
            training.close()

    fields = [prompt, target, subject, old]
    shown = [status, live, loss, probability, result, answers, neighbours, same, picture, *store.outputs]
    gr.on([start.click, *(one.submit for one in fields)], edit, fields, shown, **_of_model())
    stop.click(
        lambda: gr.skip() if session.stop() else "Nothing is training.", None, status, **_quiet(concurrency_id="stop")
    )


def _summary(found: Finished) -> str:
    edit = found.edit
    text = (
        f"Done in {found.seconds:.1f} s: {edit.steps} steps, loss {edit.losses[0]:.3f} -> {edit.losses[-1]:.3f} nats, "
        f"{edit.size} rows of {len(edit.deltas)} modules. It is in the store as {found.id}."
    )
    return text if found.reached else f"{text} The new answer was not reached: see the loss, or try other settings."


def _tables(found: Finished) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of the fact's table and of its neighbours'."""
    was, now, fact = found.before, found.after, found.fact
    assert fact.new is not None  # noqa: S101  (for the type checker: facts have one)
    rows = [["answer", one_line(was.answer), one_line(now.answer)]]
    rows.append([f"P({printable(fact.new.target)})", percent(was.new), percent(now.new)])
    if fact.old is not None:
        rows.append([f"P({printable(fact.old.target)})", percent(was.old), percent(now.old)])
    return rows, [[printable(text) for text in neighbour] for neighbour in found.neighbours]


def _neighbours_said(found: Finished) -> str:
    if not found.neighbours:
        return "No neighbours are known: neither the packaged facts nor the model name other subjects."
    return f"{found.as_before} of {len(found.neighbours)} neighbours' answers begin as before."


def _picture(found: Finished) -> Any:
    try:
        return ensemble_figure(ensemble_of(found.edit), "\n".join(map(printable, found.edit.facts)))
    except (ImportError, ValueError) as error:  # without matplotlib there is no picture
        logger.warning("kne lab: no picture: %s", error)
        return None


def _ask_part(gr: Any, session: LabSession) -> None:
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="The capital of France is",
        max_length=LONGEST["prompt"],
        lines=1,
        max_lines=6,
        elem_id="asked",
    )
    chat = gr.Checkbox(label="In the model's chat template", elem_id="chat")
    button = gr.Button("Ask", variant="primary", elem_id="ask")
    with gr.Row():
        before = gr.Textbox(
            label="Before: without edits", interactive=False, lines=3, max_lines=12, min_width=240, elem_id="before"
        )
        after = gr.Textbox(
            label="After: with the edits that are on",
            interactive=False,
            lines=3,
            max_lines=12,
            min_width=240,
            elem_id="after",
        )
    said = gr.Textbox(label="Message", interactive=False, visible=False, lines=1, max_lines=8, elem_id="said")

    def ask(text: str, template: bool) -> Iterator[list[Any]]:
        yield ["", "", gr.Textbox(visible=False)]  # no earlier answer is taken for this one's
        try:
            yield [*session.ask(text, chat=bool(template)), gr.skip()]
        except Exception as error:  # noqa: BLE001  (shown; the server lives on)
            yield ["", "", gr.Textbox(_said(error), visible=True)]

    gr.on([button.click, prompt.submit], ask, [prompt, chat], [before, after, said], **_of_model())
