"""Progress bars of other libraries are suppressed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tqdm

DOWNLOADS = "huggingface_hub"
"""The library whose bars stay: a download may take an hour."""


@contextlib.contextmanager
def suppress_progress_bars() -> Iterator[None]:
    """Inside, no library draws a progress bar, except for downloads.

    Libraries draw their bars with subclasses of tqdm, and not all have a switch: so tqdm's own constructor is replaced.
    """
    bar: Any = tqdm.tqdm
    original = bar.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        if not type(self).__module__.startswith(DOWNLOADS):
            kwargs["disable"] = True
        original(self, *args, **kwargs)

    bar.__init__ = silent
    try:
        yield
    finally:
        bar.__init__ = original
