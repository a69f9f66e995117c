"""Bad records of a run, found before the first edit or by an exception of an edit: left out, or the run ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kne_easyedit._util.errors import lacks_memory
from kne_easyedit.benchmark.job import Run
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.facts.encoding import SEPARATOR
from kne_easyedit.facts.records import BadRecord, require_evaluable
from kne_easyedit.facts.words import is_unspaced_script

logger = logging.getLogger(__name__)

NO_RECORDS_FAULT = (OSError, ImportError, NameError, NotImplementedError)
"""Failures of the machine or of a method, whatever the record, as is a lack of memory. All else that is raised while a
record is edited or evaluated is the record's (EasyEdit has no exceptions of its own: IndexError, KeyError, ...)."""
NO_DISTRIBUTION = "probability tensor contains"
"""How torch begins to refuse to sample where probabilities are not finite."""


def is_record_error(error: Exception) -> bool:
    """Whether the record is at fault, not machine or method."""
    return not isinstance(error, NO_RECORDS_FAULT) and not lacks_memory(error)


def describe_error(method: str, error: Exception) -> str:
    """Method and message; with the exception's type unless it is KNE's own ValueError, which names the field."""
    return (
        f"{method}: {error}"
        if type(error) is ValueError and str(error)
        else f"{method}: {type(error).__name__}: {error}"
    )


def report_bad_record(job: Run, chunk: Sequence[dict], why: str, error: Exception) -> None:
    """Adds to the job's complaints that these records are left out.

    Args:
        job: The run.
        chunk: The records that failed together.
        why: The message.
        error: The cause.

    Raises:
        BadRecord: If bad records are not to be skipped.
    """
    numbers = ", ".join(str(request["index"]) for request in chunk)
    complaint = f"{job.data}: record {numbers}: {why}"
    if not job.skip_bad:
        raise BadRecord(f"{complaint} (--on-bad-record skip leaves such records out)") from error
    if complaint not in job.complaints:  # one Run may be run again
        job.complaints.append(complaint)


def usable_records(job: Run, requests: Sequence[dict]) -> list[dict]:
    """The requests that every method can edit and every evaluator can ask. The others are complaints of the job.

    Args:
        job: The run.
        requests: Its records, in the chat template if there is one.

    Raises:
        BadRecord: If one is bad and bad ones are not to be skipped.
        ValueError: If all are bad.
    """
    if job.separator == SEPARATOR and 2 * sum(
        is_unspaced_script(request["prompt"][-1:] or " ") for request in job.requests
    ) > len(requests):
        logger.warning(
            "%s: its script sets no blanks between words; KNE's setting separator: '' joins prompt and answer by none",
            job.data,
        )
    by_subject = [method for method, hparams in job.hparams.items() if traits_of(hparams.alg_name).needs_subject]
    found = []
    for request in requests:
        try:
            require_evaluable(request, job.tokenizer, job.model, job.separator, by_subject)
            found.append(request)
        except ValueError as error:  # noqa: PERF203  (a bad record must not end the loop)
            report_bad_record(job, [request], str(error), error)
    if not found:
        raise ValueError(f"records: none of {job.data} can be edited; the first complaint: {job.complaints[0]}")
    return found
