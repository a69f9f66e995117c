"""Whose fault an error is: the record's, which may be left out, or the machine's or the method's, which ends the run."""

from __future__ import annotations

import torch

NO_RECORDS_FAULT = (MemoryError, OSError, ImportError, NameError, NotImplementedError, torch.cuda.OutOfMemoryError)
"""What the machine or a method fails with, whatever the record. All else that is raised while a record is edited or asked
(EasyEdit's code knows no exceptions of its own: IndexError, KeyError, TypeError, RuntimeError, ...) is the record's."""


def is_records_fault(error: Exception) -> bool:
    """Whether another record might do better. torch tells of full memory on a CPU by a RuntimeError."""
    out_of_memory = isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "not enough memory"))
    return not isinstance(error, NO_RECORDS_FAULT) and not out_of_memory


def told(method: str, error: Exception) -> str:
    """Who failed and how; KNE's own messages say which field, those of EasyEdit's code say nothing without their kind."""
    return f"{method}: {error}" if type(error) is ValueError and str(error) else f"{method}: {type(error).__name__}: {error}"
