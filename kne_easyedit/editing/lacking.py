"""Which edits others were trained on and do not have beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def lacking_note(edits: Iterable[Any]) -> str | None:
    """A sentence for people, where edits were trained on top of others that are not among them.

    Args:
        edits: Edits that are used together; those without ``digest`` and ``trained_on`` say nothing.

    Returns:
        The sentence; None if nothing is missing.
    """
    edits = [edit for edit in edits if hasattr(edit, "trained_on")]
    there = {edit.digest for edit in edits}
    missing = list(dict.fromkeys(digest for edit in edits for digest in edit.trained_on if digest not in there))
    if not missing:
        return None
    named = ", ".join(str(digest)[:12] for digest in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"Trained on top of {len(missing)} {'edit' if len(missing) == 1 else 'edits'} that "
        f"{'is' if len(missing) == 1 else 'are'} not in here ({named}): without that, its answers may be lost."
    )
