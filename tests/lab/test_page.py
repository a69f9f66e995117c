"""The page in a real browser: edited, stopped, asked, switched; hostile texts; nothing from or for another host."""

from __future__ import annotations

import http.client
import json
import re
import shutil
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import pytest
from conftest import make_llama, make_tokenizer, tiny_hparams, weights

from kne_easyedit.cli.common import shipped
from kne_easyedit.edits.store import EditStore
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.lab import session
from kne_easyedit.lab.server import serve
from kne_easyedit.lab.session import LabSession
from kne_easyedit.models.loading import load_model

pytest.importorskip("gradio", reason="THE PAGE WAS NOT TESTED: gradio (extra lab) is not installed")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="THE PAGE WAS NOT TESTED: playwright (extra test) is not installed"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="THE PAGE WAS NOT TESTED: there is no Chromium on the PATH")

FACT = {"prompt": "The capital of France is", "new-answer": "Rome", "subject": "France"}
HOSTILE = "<img src=x onerror=alert(1)> **bold** $x$"
PATIENCE = 120_000
"""Milliseconds after which a condition counts as never met; nothing waits that long where all is well."""
SEVERAL = re.compile(r"^Training, step ([2-9]|\d\d)")
NOTHING = re.compile("^$")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # Without --no-sandbox Chromium does not run as root, which CI often is; only our own page is opened.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        found = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens pages; afterwards none has asked another host, opened a dialog or failed."""
    contexts, odd = [], []

    def open_page(url: str, **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        own = urlsplit(url).netloc
        context.on(
            "request", lambda one: urlsplit(one.url).netloc in (own, "") or odd.append(f"{one.method} {one.url}")
        )
        page.on("response", lambda one: one.status < 400 or odd.append(f"{one.status} {one.url}"))
        page.on("pageerror", lambda error: odd.append(f"script: {error}"))

        def dialog(shown):
            odd.append(f"dialog: {shown.message}")
            shown.dismiss()

        page.on("dialog", dialog)
        page.goto(url)
        page.locator("#edit").wait_for()
        return page

    playwright.expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    assert odd == []


@pytest.fixture
def served(tmp_path):
    """Serves a session of the tiny model, or of another one; afterwards nothing is served."""
    stack = []

    def start(model=None, tokenizer=None, hparams=None, **changes) -> SimpleNamespace:
        model = make_llama() if model is None else model
        tokenizer = make_tokenizer() if tokenizer is None else tokenizer
        hparams = tiny_hparams(**{"lr": 0.3, "stop_loss": 0.3, **changes}) if hparams is None else hparams
        lab = LabSession(model, tokenizer, hparams, EditStore(tmp_path / "store"))
        server = serve(lab, f"tiny; {HOSTILE}")
        stack.extend([lab.close, server.close])
        return SimpleNamespace(model=model, session=lab, url=server.url, store=tmp_path / "store")

    yield start
    while stack:
        stack.pop()()


def field(page, name: str):
    return page.locator(f"#{name} textarea, #{name} input[type=text]").first


def fill(page, **texts: str) -> None:
    for name, text in texts.items():
        field(page, name).fill(text)


def edit(page, fact: dict[str, str] = FACT, said: str = "Done in") -> str:
    """Edits a fact; returns the status at the end."""
    tab(page, "Edit")
    fill(page, **fact)
    before = field(page, "status").input_value()
    page.locator("#edit").click()
    playwright.expect(field(page, "status")).not_to_have_value(before)
    playwright.expect(field(page, "status")).to_have_value(re.compile(said))
    return field(page, "status").input_value()


def ask(page, prompt: str) -> tuple[str, str]:
    """Asks; what the browser shows of an earlier answer is wiped out, so that it is not taken for this one's."""
    tab(page, "Ask")
    fill(page, asked=prompt)
    field(page, "after").evaluate("one => { one.value = '' }")
    page.locator("#ask").click()
    playwright.expect(field(page, "after")).not_to_have_value(NOTHING)
    return field(page, "before").input_value(), field(page, "after").input_value()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def switch(page, number: int, on: bool) -> None:
    tab(page, "Store")
    box = page.locator("#switches input[type=checkbox]").nth(number)
    before = field(page, "store-note").input_value()
    box.set_checked(on)
    playwright.expect(field(page, "store-note")).not_to_have_value(before)
    playwright.expect(box).to_be_checked(checked=on)


def rows(page, name: str) -> list[list[str]]:
    """The cells of a table."""
    found = page.locator(f"#{name} .virtual-row, #{name} [role=row]:has([role=gridcell])")
    found.first.wait_for()
    return [[cell.inner_text().strip() for cell in row.locator("[role=gridcell]").all()] for row in found.all()]


def request(url: str, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, bytes]:
    """Asks the server as any program could."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_edited_asked_switched_off_and_on(opened, served):
    lab = served()
    base = weights(lab.model)
    page = opened(lab.url)
    assert page.title() == "kne lab"
    status = edit(page)
    assert re.search(r"\d+ steps, loss \d\.\d{3} -> 0\.[012]\d\d nats, \d+ rows of \d modules", status)
    (entry,) = lab.session.entries()
    assert entry.id in status and weights(lab.model) != base
    answer, new, old = rows(page, "answers")
    assert answer[0] == "answer" and answer[2].startswith("Rome") and not answer[1].startswith("Rome")
    assert new[0] == "P(Rome)" and re.fullmatch(r"\d\.\d\d%", new[1]) and re.fullmatch(r"[789]\d\.\d\d%", new[2])
    assert old[0].startswith("P(") and float(old[2][:-1]) < float(old[1][:-1])
    assert len(rows(page, "neighbours")) == 4
    playwright.expect(field(page, "as-before")).to_have_value(re.compile(r"^\d of 4 neighbours' answers begin as"))
    for name in ("loss", "probability"):
        playwright.expect(page.locator(f"#{name} canvas, #{name} svg.marks").first).to_be_visible()
    picture = page.locator("#picture img")
    assert picture.get_attribute("src").startswith("data:image/png;base64,")  # no file is written for it
    assert picture.evaluate("one => one.naturalWidth") > 500

    was, now = ask(page, FACT["prompt"])
    assert now.startswith("Rome") and not was.startswith("Rome")
    switch(page, 0, False)
    assert weights(lab.model) == base
    assert ask(page, FACT["prompt"]) == (was, was)
    switch(page, 0, True)
    assert ask(page, FACT["prompt"]) == (was, now)


def test_training_is_seen_while_it_runs_and_stopped(opened, served):
    lab = served(num_steps=100_000, stop_loss=1e-9)
    base = weights(lab.model)
    page = opened(lab.url)
    fill(page, **FACT)
    page.locator("#stop").click()
    playwright.expect(field(page, "status")).to_have_value("Nothing is training.")
    page.locator("#edit").click()
    playwright.expect(field(page, "status")).to_have_value(SEVERAL)
    playwright.expect(page.locator("#loss canvas, #loss svg.marks").first).to_be_visible()
    page.locator("#stop").click()
    playwright.expect(field(page, "status")).to_have_value(re.compile("^Stopped. The model and the store are as they"))
    assert weights(lab.model) == base and lab.session.entries() == ()
    assert len(set(ask(page, FACT["prompt"]))) == 1  # the model is free, and nothing was edited


def test_a_tab_that_is_closed_stops_its_training(opened, served):
    lab = served(num_steps=100_000, stop_loss=1e-9)
    base = weights(lab.model)
    page = opened(lab.url)
    fill(page, **FACT)
    page.locator("#edit").click()
    playwright.expect(field(page, "status")).to_have_value(SEVERAL)
    page.close()
    assert len(set(lab.session.ask(FACT["prompt"]))) == 1  # waits for the model
    assert weights(lab.model) == base and lab.session.entries() == ()


def test_texts_are_shown_as_texts(opened, served):
    """Prompt, answers, facts, errors, names: whatever shows them."""
    lab = served(num_steps=5)
    page = opened(lab.url)
    hostile = {"prompt": f"{HOSTILE} is", "new-answer": "Rome", "old-answer": "Paris"}
    edit(page, hostile)
    tab(page, "Store")
    label = page.locator("#switches label").first
    assert f"{HOSTILE} is -> Rome" in label.inner_text()
    tab(page, "Edit")
    fill(page, subject=f"{HOSTILE} else")
    page.locator("#edit").click()
    playwright.expect(field(page, "status")).to_have_value(re.compile("^Not done: request.subject"))
    assert HOSTILE in field(page, "status").input_value()
    ask(page, HOSTILE)
    fill(page, asked=" ")
    page.locator("#ask").click()
    playwright.expect(field(page, "said")).to_have_value("Not done: prompt: is empty; type what the model is asked")
    assert page.locator("img[src=x]").count() == 0 and page.get_by_text("bold", exact=True).count() == 0
    assert page.locator(".katex, strong:has-text('bold')").count() == 0
    assert page.locator("input, textarea").evaluate_all(
        "(all, text) => all.some(one => one.value.includes(text))", HOSTILE
    )


def test_hostile_answers_of_a_model_are_texts_in_tables(opened, served, monkeypatch):
    lab = served()
    monkeypatch.setattr(
        "kne_easyedit.benchmark.before_after.answers_to", lambda _m, _t, asked, *_: [HOSTILE] * len(asked)
    )
    page = opened(lab.url)
    edit(page)
    assert rows(page, "answers")[0] == ["answer", HOSTILE, HOSTILE]
    assert {tuple(row[1:]) for row in rows(page, "neighbours")} == {(HOSTILE, HOSTILE)}
    assert ask(page, FACT["prompt"]) == (HOSTILE, HOSTILE)
    assert page.locator("img[src=x], .katex").count() == 0


def test_an_error_is_shown_and_the_server_lives_on(opened, served):
    lab = served()
    page = opened(lab.url)
    assert "prompt: is empty" in edit(page, {"prompt": " ", "new-answer": "Rome"}, "Not done")
    assert "does not stand in the prompt" in edit(page, {**FACT, "subject": "Spain"}, "Spain.*does not stand")
    assert edit(page)
    rows_file = next(lab.store.rglob("rows.safetensors"))
    switch(page, 0, False)
    (entry,) = lab.session.entries()
    lab.session.store._loaded.clear()
    rows_file.write_bytes(b"")
    page.locator("#switches input[type=checkbox]").first.click()
    playwright.expect(field(page, "store-note")).to_have_value(re.compile(f"^Not done: store: {entry.id} of"))
    playwright.expect(page.locator("#switches input[type=checkbox]").first).not_to_be_checked()
    assert len(set(ask(page, FACT["prompt"]))) == 1


def test_another_tab_sees_the_same_store(opened, served):
    lab = served()
    first, second = opened(lab.url), opened(lab.url)
    tab(second, "Store")
    playwright.expect(field(second, "store-note")).to_have_value("No edit yet.")
    edit(first)
    edit(first, {"prompt": "The language of Peru is", "new-answer": "Latin", "subject": ""})
    second.reload()
    tab(second, "Store")
    playwright.expect(field(second, "store-note")).to_have_value("2 edits, 2 on.")
    switch(second, 0, False)
    lines = second.locator("#switches label")
    playwright.expect(lines.nth(1)).to_contain_text("not on before it")
    first.reload()
    tab(first, "Store")
    playwright.expect(first.locator("#switches input[type=checkbox]").nth(0)).not_to_be_checked()
    playwright.expect(first.locator("#switches input[type=checkbox]").nth(1)).to_be_checked()
    # A tab that shows an old state changes the one switch alone that is clicked there.
    switch(second, 1, False)
    switch(first, 0, True)
    playwright.expect(first.locator("#switches input[type=checkbox]").nth(1)).not_to_be_checked()
    assert [entry.on for entry in lab.session.entries()] == [True, False]


def test_it_fits_a_narrow_window_and_is_readable_in_both_looks(opened, served):
    page = opened(served().url, viewport={"width": 400, "height": 800})

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    assert fits()
    edit(page)
    page.locator("#picture img").wait_for()
    assert fits()
    for name in ("Ask", "Store"):
        tab(page, name)
        assert fits()
    colors = (
        "() => [getComputedStyle(document.querySelector('h1')).color, getComputedStyle(document.body).backgroundColor]"
    )
    for look in ("light", "dark"):
        page.emulate_media(color_scheme=look)
        page.reload()
        page.locator("#edit").wait_for()
        ink, paper = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in page.evaluate(colors))
        assert abs(ink - paper) > 150 and (paper > 128) == (look == "light")


# What the server answers


def test_no_files_are_served_and_no_other_site_is_answered(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    lab = served()
    list(lab.session.train("The capital of France is", "Rome"))
    files = [tmp_path / "secret.txt", lab.store / "store.json", next(lab.store.rglob("edit.json"))]
    assert request(lab.url, "/")[0] == 200
    for file in [*files, "secret.txt", "store/store.json"]:
        for start in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/../", "/assets/../../", "/assets/"):
            status, body = request(lab.url, start + quote(str(file)))
            assert status in (403, 404) and b"secret" not in body and b"kne-edit" not in body, (start, file)
    for path in ("/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/call/edit", "/gradio_api/vibe-edit"):
        assert request(lab.url, path, "POST", "{}", Content_Type="application/json")[0] == 404
    assert request(lab.url, "/gradio_api/proxy=http://127.0.0.1/")[0] == 404
    port = urlsplit(lab.url).port
    for name, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), (f"evil.example:{port}", 403)):
        assert request(lab.url, "/config", Host=name)[0] == status
    call = json.dumps({"data": [], "fn_index": 0, "session_hash": "x"})
    for origin, status in ((f"http://127.0.0.1:{port}", 200), ("http://evil.example", 403), ("null", 403)):
        headers = {"Origin": origin, "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(urlsplit(lab.url).netloc, timeout=60)
        connection.request("POST", "/gradio_api/queue/join", call, headers)
        assert connection.getresponse().status == status


# The real model


@pytest.mark.model
def test_smollm2_is_edited_asked_and_taken_back(opened, served, real_folder, monkeypatch):
    monkeypatch.setattr(session, "ANSWER", 4)
    monkeypatch.setattr(session, "NEIGHBOURS", 1)
    quick = {"localization_data": None, "attribution_steps": 2, "stop_loss": 0.5}
    hparams = KNEHyperParams.from_hparams(shipped() / "KNE" / "smollm2-135m.yaml")
    hparams = KNEHyperParams.from_dict({**hparams.to_dict(), **quick})
    model, tokenizer = load_model(hparams)
    base = weights(model)
    lab = served(model, tokenizer, hparams)
    page = opened(lab.url)
    edit(page)
    new = rows(page, "answers")[1]
    assert new[0] == "P(Rome)" and float(new[1][:-1]) < 1 and float(new[2][:-1]) > 50
    was, now = ask(page, FACT["prompt"])
    assert was.startswith("Paris") and now.startswith("Rome")
    switch(page, 0, False)
    assert weights(model) == base
    assert ask(page, FACT["prompt"]) == (was, was)
