"""The page docs/compatibility.md, from the cells that `compatibility.py` has found."""

from __future__ import annotations

from pathlib import Path

from compatibility_cells import METHODS, MODES

HEAD = """# Which EasyEdit, which mode, which method

Written by `scripts/compatibility.py` (see its head for the command). "works": nothing fails and the model is bit by
bit what it was afterwards (sequential_edit: the edits have stayed), on a tiny random model on a CPU; "with [n]": only
thanks to the patches that the note names, each of which alone makes the cell fail when it is missing; "cannot": EasyEdit
has no such thing, for the reason of the note. `kne doctor` lists the patches of the EasyEdit that you use;
`KNE_PATCHES_OFF=name,name` switches some off."""  # noqa: E501  (lines of the page)
OTHERS = """
## Other methods

Methods of the July 2026 tree beside those above, with EasyEdit's own settings (fewer steps, other layers) on a tiny random
model called "tiny-llama", by `MethodEditor`: edit, evaluate, undo, alone and two in a row (`tests/bridge/test_easyedit_methods.py`).

| method | |
|---|---|
| MEMIT-FE, R-ROME, EAMET, QLoRA | edited and undone bit for bit |
| SPHERE | the same, for models with `llama` or `gpt2-xl` in their name; refused for others |
| DPO | the same, for requests with `target_neg`; refused for others |
| MEND | refused without the file of its trained editor (`archive`); not run with one |
| IKE | refused: edits prompts, not weights |
| FT-Api, DeepEdit-Api | refused: edit a model behind an API |
| MELO, SERAC | refused: put the model into a wrapper, or beside a memory, and give nothing by which that could be undone |
| ULTRAEDIT | refused: gives no original weights |
| SimIE | refused: starts every edit from the first weights that it has seen |
| DINM | refused: wants safety records |
| DEFER | refused: its edited model cannot answer several prompts at once |
| PMET | fails in its own code on the tiny model (probabilities that are no numbers); not run elsewhere |
| CORE | not run: EasyEdit has no settings of it |

"""  # noqa: E501  (lines of the page)
SMOLLM2 = """
## On a real model

SmolLM2-135M-Instruct, the first 3 records of {data}, the settings shipped at the time, edit by edit, KNE and FT also in a row and 3
facts at once (`kne run`'s modes), on 2 CPU cores that had other work. Three records say that a method runs, not how good
it is (MEMIT's weight of the second moments, 15000 as EasyEdit has it for Llama-2-7B, was too large for this model, and
the shipped file has had 1000 since). Methods of which a version has no row were not run there, or it does not have them.
Portability and locality of ROME and MEMIT under the release of 2023 are of before `prediction-padding`, at wrong tokens, and MEMIT's moments
were of text after the edited prompts.
"""  # noqa: E501  (lines of the page)

_RELEASE, _CHECKOUT = "PyPI release", "checkout of"
"""What headings of versions begin with."""


def text_of(found: dict[str, dict], smollm2: dict[str, dict], data: str | None) -> str:
    """The page.

    Args:
        found: What `compatibility.version` returns, for each EasyEdit.
        smollm2: Figures of the real model for each EasyEdit; empty: they are left out.
        data: The file of these figures' records.

    Returns:
        Markdown.
    """
    marks: dict[str, str] = {}

    def note(reason: str) -> str:
        return marks.setdefault(reason, f"[{len(marks) + 1}]")

    parts = [HEAD]
    for home, of_version in found.items():
        easyedit = of_version["easyedit"]
        name = (
            f"{_RELEASE} 0.0.1.dev0 (October 2023)"
            if home == "pypi"
            else f"{_CHECKOUT} {easyedit['version'][:10]} ({of_version.get('date', '')})"
        )
        parts.append(f"\n## {name}\n")
        table = {(c["method"], c["mode"]): c for c in of_version["cells"]}
        methods = [method for method in METHODS if any(method == measured for measured, _ in table)]  # of `--methods`
        parts.append("| mode | " + " | ".join(methods) + " |\n|---|" + "---|" * len(methods))
        for mode in MODES:
            row = []
            for method in methods:
                cell = table.get((method, mode))
                if cell is None:
                    row.append("-")
                elif cell["cannot"]:
                    row.append(f"cannot {note(cell['cannot'])}")
                elif cell["error"]:
                    row.append(f"**fails** {note(cell['error'])}")
                else:
                    row.append(
                        "works" + (f" with {note('patches ' + ', '.join(cell['needs']))}" if cell["needs"] else "")
                    )
            parts.append(f"| {mode} | " + " | ".join(row) + " |")
        applied = [name for name, state in of_version["patches"].items() if state == "applied"]
        parts.append(f"\nPatches applied to this version: {', '.join(applied)}.")
    parts.append("\n## Notes\n")
    parts += [f"- {mark} {reason}" for reason, mark in marks.items()]
    parts.append(OTHERS)
    parts.append("## What the patches mend\n\n| patch | fault |\n|---|---|")
    parts += [f"| {name} | {fault} |" for name, fault in next(iter(found.values()))["faults"].items()]
    if smollm2:
        parts.append(SMOLLM2.format(data=Path(data or "").name))
        columns = "EasyEdit", "mode", "method", "edit success", "portability", "locality", "fluency", "seconds an edit"
        parts.append(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for home, rows in smollm2.items():
            for row in rows.get("cells", ()):
                figures = [row[name] for name in ("edit_success", "portability", "locality", "fluency")]
                shown = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
                line = [_short(home, found), row["mode"], row["method"], *shown, f"{row['seconds_per_edit']:.1f}"]
                parts.append(f"| {' | '.join(line)} |")
            if "failed" in rows:
                parts.append(f"| {_short(home, found)} | | | failed: {rows['failed']} | | | | |")
    return "\n".join(parts) + "\n"


def versions_of(page: str) -> list[str]:
    """The versions of EasyEdit that a page has, by their headings."""
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    return [heading for heading in headings if heading.startswith((_RELEASE, _CHECKOUT))]


def _short(home: str, found: dict) -> str:
    return "PyPI 2023" if home == "pypi" else found[home]["easyedit"]["version"][:7]
