"""Reports on results from somebody else: no markup, script, link, picture, formula or path of theirs works."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from made_results import LINES, MANIFEST, line, write

from kne_easyedit import cli
from kne_easyedit._util.markdown import literal
from kne_easyedit.benchmark.checks import require_name
from kne_easyedit.benchmark.collect import collect
from kne_easyedit.benchmark.markdown_report import report_text
from kne_easyedit.benchmark.publish import page, publish
from kne_easyedit.benchmark.sources import _without_folders

CASES = Path(os.environ.get("KNE_CASES", Path(__file__).parents[3] / "shared/cases"))
EVIL = [
    "![x](../secret.txt)",
    "![x](intervals.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><img src="../secret.txt">',
    "[x](javascript:alert(3))",
    "<javascript:alert(4)>",
    "[x]: javascript:alert(5)",
    "$\\frac{1$",
    "$x$ costs $5",
    "a|b",
    "\\<b>",
    "&lt;script&gt;",
    "<u>",
    "</u></td></table>",
    "`<b>`",
    "\u202eevil",
    "\x1b[31mred",
    "# head",
    "&#60;script>",
    "_it_",
    "x\ny",
]


@pytest.fixture
def secret(tmp_path) -> str:
    (tmp_path / "secret.txt").write_text("TOP SECRET")
    return "VE9QIFNFQ1JFV"  # how base64 begins it


def check(html: str, secret: str) -> None:
    """Only our own tags, our own pictures, nothing to click and nothing to run."""
    body = html.partition("<body>")[2]
    tags = set(re.findall(r"</?([a-zA-Z][^\s/>]*)", body))
    assert tags <= {
        "h1",
        "h2",
        "p",
        "em",
        "strong",
        "u",
        "ul",
        "li",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "img",
        "body",
        "html",
    }, tags
    assert secret not in html and "href" not in body and not re.search(r"<[^>]* on\w+=", body)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in re.findall(r'src="([^"]*)"', body))


def test_text_of_others_stays_text(tmp_path, secret):
    """In every place of the lines and of the manifest that a report quotes."""
    for number, text in enumerate(EVIL):
        name = "".join(c for c in text if c.isprintable())[:100]
        shared = {"data": "<b>data | $x$</b>", "prompt": text, "target_new": text, "before": text, "after": text}
        shared["fingerprint"] = _without_folders(text)
        entries = [line(name, i, s, record=f"r{i}", **shared) for i, s in enumerate([0.0, 1.0], 2 * number)]
        for entry in entries:
            for when in ("pre", "post"):
                entry["metrics"] = {
                    **entry["metrics"],
                    when: {**entry["metrics"][when], "portability": {f"{text}_acc": [0.5]}},
                }
        write(tmp_path / f"run/{number}/results.jsonl", entries)
        manifest = {
            **MANIFEST,
            "kne_easyedit": text,
            "model": {"name": text, "sha256": EVIL[0]},
            "mode": text,
            "fluency_variant": text,
            "data": {"name": text},
            "easyedit": {"kind": text, "version": text, "patches": [text]},
            "methods": {name: {text: text}},
            "fingerprints": {name: text},
            "localization": {},
            "second_moments": {name: {"source": text, "seconds": 1.0}},
            "environment": dict.fromkeys(MANIFEST["environment"], text),
            "machine": {**MANIFEST["machine"], "processor": text, "gpus": [text]},
        }
        (tmp_path / f"run/{number}/manifest.json").write_text(json.dumps(manifest))
    for title in ("KnowEdit", *EVIL[:4]):
        found = collect([tmp_path / "run"])
        html = page(
            report_text(found, title, {"intervals.png": "A picture."}), title, _pictures(tmp_path), ["intervals.png"]
        )
        check(html, secret)
    check(publish(found, tmp_path / "run/report", title=EVIL[2]).read_text(), secret)


def _pictures(folder: Path) -> Path:
    (folder / "intervals.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.mark.parametrize("text", EVIL)
def test_what_is_quoted_is_shown_as_it_stands(text):
    """One cell, and in it the very characters; what is not printed is a blank."""
    import html as entities

    rendered = page(f"| a | b |\n|---|---|\n| {literal(text)} | end |", "", Path())
    (cell, end) = re.findall(r"<td>(.*?)</td>", rendered)
    shown = "".join(c if c.isprintable() else " " for c in " ".join(text.split())).strip()
    assert (entities.unescape(cell), end) == (shown, "end")


@pytest.mark.parametrize("text", ["see https://evil.example/x", "www.evil.example", "ftp://a.b/?c=d&e"])
def test_addresses_stay_text_where_a_reader_would_link_them(text):
    """GitHub Flavored Markdown finds bare ones by ``://`` and ``www.`` in the source (6.9)."""
    import html as entities

    assert not re.search(r"://|www\.", literal(text)) and entities.unescape(literal(text)) == text


def test_html_and_pictures_of_the_text_itself_are_shut_out(tmp_path, secret):
    """Should anything slip through `literal`: the renderer passes no HTML and no link, embeds only named pictures."""
    (tmp_path / "own.png").write_bytes(b"\x89PNG")
    text = (
        '![a](own.png) ![b](../secret.txt) ![c](secret.txt) <b onclick="x">d</b> [e](javascript:f) <https://g.h> '
        "<u>i</u>\n\n<script>j</script>"
    )
    html = page(text, "t", tmp_path, ["own.png"])
    assert html.count("<img") == 1 and 'alt="a"' in html and "<u>i</u>" in html
    assert (
        "<b" not in html.partition("<body>")[2] and "<script" not in html and "href" not in html and secret not in html
    )


def test_the_case_of_the_issue(tmp_path, capsys):
    file = CASES / "foreign-results.jsonl"
    content = file.read_text() if file.is_file() else json.dumps({"method": "![x](../secret.txt)", "index": 0})
    (tmp_path / "results.jsonl").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"kne: \S*results.jsonl: line 1: has no 'metrics'; expected a results.jsonl of .*\n", error)
    assert not (tmp_path / "report").exists()


POST = {"rewrite_acc": [1.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": []}, "metrics that are a list"),
        ({"metrics": {"post": []}}, "metrics that are a mapping of 'post'"),
        ({"metrics": {"post": POST, "pre": 7}}, "metrics.pre that is a int"),
        ({"metrics": {"post": {"rewrite_acc": "all"}}}, "metrics.post.rewrite_acc that is a str"),
        (
            {"metrics": {"post": {"rewrite_acc": [float("nan")]}}},
            "metrics.post.rewrite_acc that is a float and not finite",
        ),
        ({"metrics": {"post": {"rewrite_acc": [10**400]}}}, "metrics.post.rewrite_acc that is a int and not finite"),
        ({"metrics": {"post": {**POST, "portability": [1]}}}, "metrics.post.portability that is a list"),
        (
            {"metrics": {"post": {**POST, "locality": {"L_acc": {"a": 1}}}}},
            "metrics.post.locality.L_acc that is a mapping",
        ),
        (
            {"metrics": {"post": {**POST, "locality": {"L_acc": [[[[[[1]]]]]]}}}},
            "metrics.post.locality.L_acc that is a list",
        ),
        (
            {"metrics": {"post": {**POST, "fluency": {"ngram_entropy": "x"}}}},
            "metrics.post.fluency.ngram_entropy that is a str",
        ),
        ({"fingerprint": ["x"]}, "fingerprint: a list is not a text"),
        ({"fingerprint": ""}, "fingerprint: '' is not a text that is not empty"),
        ({"method": None}, "method: a NoneType"),
        ({"method": "x" * 101}, "method: 'xxx.* is not one line of at most 100"),
        ({"method": "a\nb"}, "method: 'a.*b' is not one line"),
        ({"index": "0"}, "index: '0' is not a number of a record"),
        ({"index": 1.5}, "index: 1.5"),
        ({"index": True}, "index: True"),
        ({"index": 10**30}, "index: 10+ is not"),
        ({"record": 3}, "record: 3 is not a text"),
        ({"seed": "x"}, "seed: 'x'"),
        ({"exact_match": "yes"}, "exact_match: 'yes'"),
        ({"seconds": float("inf")}, "seconds: a float"),
        ({"losses": "many"}, "losses: 'many'"),
        ({"losses": [10**400]}, "losses: a list"),
        ({"before": 7}, "before: 7 is not a text"),
        ({"data": {}}, "data: a dict"),
        ({"method": ["a"]}, "method: a list is not a text"),
        ({"index": [1]}, "index: a list is not a number"),
        ({"batch_size": "10"}, "batch_size: '10' is not a whole number"),
        ({"chat_template": [1]}, "chat_template: a list is not true or false"),
    ],
)
def test_types_are_checked_with_file_and_line(tmp_path, changes, message):
    write(tmp_path / "results.jsonl", [LINES[0], {**LINES[1], **changes}])
    with pytest.raises(ValueError, match=rf"results.jsonl: line 2: .*{message}"):
        collect([tmp_path])


def test_a_diverged_edit_is_drawn(tmp_path):
    """A loss of NaN is no fault of the file."""
    write(
        tmp_path / "run/results.jsonl", [line("FT", i, 0.0, losses=[3.0, float("nan"), float("inf")]) for i in range(3)]
    )
    publish(collect([tmp_path / "run"]), tmp_path / "report")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no JSON"),
        ("[]", "manifest: a list is not a mapping"),
        ("[" * 10**5, "depth"),
        (json.dumps({**MANIFEST, "localization": {}}), "second_moments: a NoneType is not there"),
        (
            json.dumps({**MANIFEST, "localization": {}, "second_moments": {"FT": 3}}),
            "second_moments.FT: 3 is not a mapping",
        ),
        (
            json.dumps({**MANIFEST, "localization": {"KNE": {"facts": "x"}}, "second_moments": {}}),
            "localization.KNE.facts: 'x'",
        ),
        (
            json.dumps({**MANIFEST, "localization": {}, "second_moments": {}, "model": {"name": 3, "sha256": ""}}),
            "model.name: 3 is not a str",
        ),
        (
            json.dumps(
                {**MANIFEST, "localization": {}, "second_moments": {}, "machine": {"processor": "", "gpus": []}}
            ),
            "machine.cpus: a NoneType is not there",
        ),
        (json.dumps({**MANIFEST, "localization": {}, "second_moments": {}, "settings": 3}), "settings: 3"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, content, message):
    write(tmp_path / "results.jsonl", LINES[:2])
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"manifest.json: .*{message}"):
        collect([tmp_path])


def test_figures_that_a_manifest_lacks_are_no_fault(tmp_path):
    write(tmp_path / "results.jsonl", LINES)
    lacking = {"second_moments": {"FT": {"source": "text"}}, "localization": {"KNE": {"seconds_per_fact": 1.0}}}
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, **lacking}))
    assert "## Cost" in report_text(collect([tmp_path]), "title", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["x"]}, "method: a list is not a text"),
        ({"after": "3"}, "after: '3' is not a number of edits"),
        ({"metrics": {"post": "x"}}, "has metrics that are a mapping of 'post'"),
        ({"perplexity": "x"}, "perplexity: 'x'"),
    ],
)
def test_lines_asked_again_are_checked(tmp_path, changes, message):
    write(tmp_path / "results.jsonl", LINES[:1])
    again = {"method": "KNE", "index": 0, "after": 3, "metrics": {"post": {}}}
    write(tmp_path / "retention.jsonl", [again, {**again, **changes}])
    with pytest.raises(ValueError, match=rf"retention\.jsonl: line 2: {message}"):
        collect([tmp_path])


def test_half_characters_do_not_end_a_report(tmp_path):
    write(tmp_path / "run/results.jsonl", [line("FT", 0, 0.0, prompt="a\ud800b")])
    publish(collect([tmp_path / "run"]), tmp_path / "report")
    assert "a?b" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize("label", ["../up", "a/b", "x" * 101, ""])
def test_labels_of_a_run_are_names_of_files(label):
    with pytest.raises(ValueError, match=r"method\.label: "):
        require_name("method.label", label)
    assert require_name("method.label", "KNE-p=0.02, up_proj (É)") == "KNE-p=0.02, up_proj (É)"


def test_a_run_under_such_a_label_does_not_begin(tmp_path):
    from conftest import make_llama, make_tokenizer, tiny_hparams

    from kne_easyedit.benchmark import Run, run

    request = {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France", "index": 0}
    job = Run(make_llama(), make_tokenizer(), [request], {"../../up": tiny_hparams()}, "d", tmp_path / "out")
    with pytest.raises(ValueError, match=r"method\.label: '\.\./\.\./up'"):
        run(job)
    assert not (tmp_path / "out").exists()
