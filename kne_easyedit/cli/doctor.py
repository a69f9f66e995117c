"""``kne doctor``: can the planned run succeed, and how long will it take?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kne_easyedit._util.messages import without_effects
from kne_easyedit.cli.common import SHIPPED, method_of, positive, shipped

if TYPE_CHECKING:
    from kne_easyedit.doctor import Finding

MARKS = {"ok": "ok", "warning": "warning", "failure": "FAILURE"}


def add_commands(commands: Any) -> None:
    """Adds the command to the parser of ``kne``."""
    parser = commands.add_parser(
        "doctor", help="check a planned run before it starts: software, model, data, memory, time"
    )
    parser.add_argument(
        "--hparams",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="YAML files of the run's methods, identified as in `kne run` (default: KNE's shipped one for SmolLM2)",
    )
    parser.add_argument("--data", default="embedded", help="data file, or 'embedded' (default %(default)s)")
    parser.add_argument("--records", type=positive, help="number of records (default: all)")
    parser.add_argument("--offset", type=int, default=0, help="first record (default %(default)s)")
    parser.add_argument(
        "--no-trial", action="store_true", help="do not load the model: no edit is tried, no time is estimated"
    )
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from kne_easyedit.doctor import examine

    failed: list[str] = []
    plan: dict[str, Any] = {}
    for finding in _load(arguments.hparams or [shipped() / "KNE" / f"{SHIPPED}.yaml"], plan):
        _print(finding, failed)
    trial = not arguments.no_trial and not failed
    for finding in examine(plan, arguments.data, arguments.records, arguments.offset, trial):
        _print(finding, failed)
    print(
        f"\n{len(failed)} {'failure' if len(failed) == 1 else 'failures'}: {', '.join(failed)}"
        if failed
        else "\nThe run can succeed."
    )
    return 1 if failed else 0


def _load(paths: list[Path], plan: dict[str, Any]) -> Iterator[Finding]:
    """Fills the plan; yields the faults of the files."""
    import yaml

    from kne_easyedit import bridge
    from kne_easyedit.doctor.findings import failure
    from kne_easyedit.hparams import KNEHyperParams

    for path in paths:
        name = f"hyperparameters {path}"
        try:
            label = str(method_of(path))
            if label in plan:
                raise ValueError(f"hparams: {path} is the second file of {label}; one run has one of each method")
            # KNE's own class needs no EasyEdit, so that the rest can be checked without one.
            plan[label] = KNEHyperParams.from_hparams(path) if label == "KNE" else bridge.load_method(label, path)
        except (ValueError, TypeError, OSError, ImportError, yaml.YAMLError) as error:
            yield failure(name, error)


def _print(finding: Finding, failed: list[str]) -> None:
    first, *others = finding.text.splitlines() or [""]
    lines = [f"{MARKS[finding.status]:<8} {finding.name}: {first}", *(f"{'':<11}{line}" for line in others)]
    lines += [f"{'':<9}-> {finding.way_out}"] * bool(finding.way_out)
    print(without_effects("\n".join(lines)), flush=True)
    if finding.status == "failure":
        failed.append(finding.name)
