"""The screen is the user's: progress bars of other libraries stay off it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import tqdm

DOWNLOADS = "huggingface_hub"
"""Whose bars stay: a download may take an hour, and nobody else says how far it is."""


@contextlib.contextmanager
def suppress_progress_bars() -> Iterator[None]:
    """Inside, no bar is drawn but those of downloads, whichever library asks for one; afterwards all is as it was.

    Libraries draw their bars by subclasses of tqdm, some by a switch of their own and some without: this is the one
    place that all of them come through.
    """
    original = tqdm.tqdm.__init__

    def silent(self, *args, **kwargs):
        if not type(self).__module__.startswith(DOWNLOADS):
            kwargs["disable"] = True
        original(self, *args, **kwargs)

    tqdm.tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = original
