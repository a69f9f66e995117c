"""EasyEdit prints, logs and writes into the working directory; here all of it goes into one folder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def easyedit_output(folder: Path) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Redirects EasyEdit's output to ``folder``.

    Yields:
        A function that makes a context: inside it prints, progress bars and files go to ``folder``, the working
        directory there.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("a", encoding="utf-8", buffering=1) as log:

        @contextlib.contextmanager
        def quiet() -> Iterator[None]:
            here = Path.cwd()
            os.chdir(folder)  # EasyEdit writes ./logs
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    yield
            finally:
                os.chdir(here)

        known = {logger: list(logger.handlers) for logger in _loggers()}
        try:
            yield quiet
        finally:
            for own in _loggers():  # handlers of this run's editors would write to a closed file
                for handler in own.handlers[:]:
                    if handler not in known.get(own, []):
                        own.removeHandler(handler)
                        if isinstance(handler, logging.FileHandler):
                            handler.close()


def _loggers() -> list[logging.Logger]:
    names = [name for name in list(logging.root.manager.loggerDict) if name.startswith("easyeditor.")]
    return [logging.getLogger("easyeditor"), *map(logging.getLogger, names)]
