"""The folders of a store's edits: whether they hold what they should, written anew, and removed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from kne_easyedit._util.files import beside
from kne_easyedit._util.interrupts import defer_interrupts
from kne_easyedit.editing.kne_edit import KNEEdit


def lies_at(place: Path, edit: KNEEdit) -> bool:
    """Whether an edit's folder, which is not in the list, holds it: of a killed process, or of a list that was lost.

    Raises:
        ValueError: It holds something else, which may be the only copy.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    try:
        found = KNEEdit.load(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"store: {place} is not in the list, and cannot be read ({error}); move it away, or choose another name"
        ) from error
    if found.digest != edit.digest:
        raise ValueError(f"store: {place} holds another edit, which is not in the list; {way_out_of_unlisted(place)}")
    return True


def way_out_of_unlisted(place: Path) -> str:
    """What to do about an edit's folder that is not in the list, for messages."""
    store = place.parent.parent
    return f"add it (kne edits add {store} {place} --name {place.name}), move it away, or choose another name"


def discard(place: Path) -> None:
    """Removes an edit's folder, which is not in the list any more. What a kill leaves of it is under no edit's name."""
    with suppress(OSError):
        place = place.rename(beside(place))
    shutil.rmtree(place, ignore_errors=True)


def keep_whole(place: Path, edit: KNEEdit) -> None:
    """Writes the folder of an edit that is in the list anew, if it is missing or does not hold the edit any more.

    Raises:
        OSError: It cannot be written, or the edit, which is read from there, cannot be read. Nothing was changed.
        ValueError: The edit is read from there, and is damaged. Nothing was changed.
    """
    with suppress(OSError, ValueError):
        if KNEEdit.load(place).digest == edit.digest:
            return
    new, before = beside(place), beside(place)
    try:
        edit.save(new)
        with defer_interrupts():  # between the two renames the edit is under no name of the list
            with suppress(FileNotFoundError):
                place.rename(before)
            try:
                new.rename(place)
            except BaseException:
                with suppress(FileNotFoundError):
                    before.rename(place)
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
