"""Results and manifests from anywhere: what a report reads of them is checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from kne_easyedit.metrics import check_metrics, is_number

LONGEST = 100
"""Characters of a label or a name at most: it is a row's head, a legend's entry, the name of a folder."""
_TEXTS = (
    "fingerprint",
    "method",
    "record",
    "data",
    "mode",
    "settings",
    "prompt",
    "subject",
    "target_new",
    "before",
    "after",
)
_NUMBERS = ("exact_match", "seconds", "peak_bytes")
_MANIFEST = {
    "kne_easyedit": str,
    "started": str,
    "model": {"name": str, "sha256": str},
    "data": {"name": str},
    "mode": str,
    "chat_template": bool,
    "fluency_variant": str,
    "easyedit": {"kind": str, "version": str, "patches": list},
    "methods": dict,
    "fingerprints": dict,
    "localization": dict,
    "second_moments": dict,
    "machine": {"processor": str, "gpus": list},
    "environment": {"python": str, "torch": str, "transformers": str, "peft": str, "dtype": str},
}


def require_name(field: str, name: str) -> str:
    """``name``, if it can stand as one part of a path on any system and in a table. Raises ValueError, naming the field."""
    reason = None
    if not isinstance(name, str) or not name:
        reason = "is no text"
    elif len(name) > LONGEST or len(name.encode("utf-8", "replace")) > 2 * LONGEST:
        reason = f"has more than {LONGEST} characters"
    elif not name.isprintable() or set(name) & set('/\\<>:"|?*'):
        reason = (
            'holds a character that no file name may have everywhere: / \\ < > : " | ? *, or one that is not printed'
        )
    elif name.startswith(".") or name != name.strip() or name.endswith("."):
        reason = "begins or ends with a dot or a blank"
    elif PurePath(name).name != name:
        reason = "is more than the name of one file"
    if reason:
        raise ValueError(f"{field}: {str(name)[:LONGEST]!r} {reason}; folders and files are called by it")
    return name


def check_line(line: Mapping) -> None:
    """Raises ValueError, naming the field, for a line of results that no report can be made of."""
    for name in ("method", "metrics", "fingerprint", "index", "record"):
        if name not in line:
            raise ValueError(f"has no {name!r}; wanted is a results.jsonl of `kne run` or run_benchmark.py")
    for name in _TEXTS:
        _require(line.get(name) is None or isinstance(line[name], str), name, line.get(name), "a text")
    for name in ("method", "fingerprint", "record"):
        _require(bool(line[name]), name, line[name], "a text that is not empty")
    for name in ("method", "data", "mode"):
        text = line.get(name) or ""
        _require(len(text) <= LONGEST and text.isprintable(), name, text, f"one line of at most {LONGEST} characters")
    _require(_is_int(line["index"]), "index", line["index"], "a number of a record")
    _require(line.get("seed") is None or _is_int(line["seed"]), "seed", line.get("seed"), "a whole number")
    for name in _NUMBERS:
        _require(line.get(name) is None or is_number(line[name]), name, line.get(name), "a finite number")
    losses = line.get("losses")
    # A loss may be NaN: an edit that diverges is a finding.
    _require(
        losses is None or isinstance(losses, list) and all(isinstance(x, float) or is_number(x) for x in losses),
        "losses",
        losses,
        "a list of numbers",
    )
    try:
        check_metrics(line["metrics"])
    except ValueError as error:
        raise ValueError(f"has {error}") from error


def check_manifest(manifest) -> None:
    """Raises ValueError, naming the field, for a manifest that no report can quote."""
    _require_shape(manifest, _MANIFEST, "")
    for method, its in manifest["methods"].items():
        _require(isinstance(its, dict), f"methods.{method}", its, "a mapping of settings")
    for method, its in manifest["second_moments"].items():
        _require_shape(its, {"source": str}, f"second_moments.{method}.")
        _require(
            its.get("seconds") is None or is_number(its["seconds"]),
            f"second_moments.{method}.seconds",
            its.get("seconds"),
            "a number",
        )
    for method, its in manifest["localization"].items():
        _require(isinstance(its, dict), f"localization.{method}", its, "a mapping")
        for name in ("facts", "seconds_per_fact"):
            _require(
                its.get(name) is None or is_number(its[name]),
                f"localization.{method}.{name}",
                its.get(name),
                "a number",
            )


def _require_shape(value, shape: Mapping, where: str) -> None:
    _require(isinstance(value, dict), where.rstrip(".") or "manifest", value, "a mapping")
    for name, kind in shape.items():
        _require(name in value, f"{where}{name}", None, "there")
        if isinstance(kind, dict):
            _require_shape(value[name], kind, f"{where}{name}.")
        else:
            _require(isinstance(value[name], kind), f"{where}{name}", value[name], f"a {kind.__name__}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _require(ok: bool, name: str, value, wanted: str) -> None:
    if not ok:
        shown = repr(value) if is_number(value) or isinstance(value, str) else f"a {type(value).__name__}"
        raise ValueError(f"{name}: {shown[:80]} is not {wanted}")
