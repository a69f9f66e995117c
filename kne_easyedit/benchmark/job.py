"""The settings of a run, and the fingerprints by which its lines are distinguished from those of other runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from kne_easyedit import bridge
from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import expand_path
from kne_easyedit._util.settings import path_settings, public_settings, replace_settings
from kne_easyedit.benchmark.checks import require_name
from kne_easyedit.benchmark.general import Examination
from kne_easyedit.bridge import patches
from kne_easyedit.bridge.evaluation_patches import PADDING
from kne_easyedit.bridge.methods import NAME as KNE
from kne_easyedit.bridge.methods import traits_of
from kne_easyedit.bridge.second_moments import needs_second_moments, own_files
from kne_easyedit.bridge.text_source import TextSource
from kne_easyedit.bridge.together import require_together, separator_of
from kne_easyedit.bridge.unrelated import unrelated_prompts
from kne_easyedit.editing.neighbours import ASKED, CHOICE, neighbour_digest, uses_neighbours
from kne_easyedit.facts.encoding import SEPARATOR, Tokenizer
from kne_easyedit.facts.neighbours import own_neighbourhood
from kne_easyedit.facts.readers import data_digest
from kne_easyedit.hparams import KNEHyperParams
from kne_easyedit.localization.ensemble import NeuronEnsemble
from kne_easyedit.models.devices import environment
from kne_easyedit.models.fingerprint import tokenizer_digest
from kne_easyedit.models.generation import own_generation

MODES = ("single", "sequential", "batch")
_WITHOUT_EFFECT = {"stats_dir", "cache_dir", "chunk_rows", "localization_data", "ensemble", "offload_folder"}
"""Settings that name places or work alike whatever their value; what the places hold is in the fingerprint."""
_ADDED: Mapping[str, object] = {
    "optimizer": "adamw",
    "polyak_fraction": 0.3,
    "append_eos": False,
    "append_break": False,
    "until_given": False,
    "edit_gain": 1.0,
    "subject_variants": 0,
    "neighbour_weight": 0.0,
    "neighbour_data": None,
    "neighbour_relation_size": 6,
    "neighbour_subject_size": 6,
    "neighbour_tokens": 4,
    "neighbours_per_step": 0,
    "neighbour_stop": None,
    "input_projection": False,
    "projection_ridge": 1e-5,
    "spare_edited": False,
    "spare_continuation": 0,
    "continuation_weight": 0.0,
    "max_memory": None,
    "offload_folder": None,
    "load_in": None,
}
"""Settings that KNE did not have from the beginning -> the value under which it does what it did without them. With
that value they are left out: earlier fingerprints hold. It stays here even if the default changes."""
_SEED = KNEHyperParams.seed
"""KNE's where nobody has set it: of lines of any seed it is in `settings_digest`."""


@dataclass
class Run:
    """The settings of a run: a model, records, methods, and how they are edited and evaluated."""

    model: nn.Module
    tokenizer: Tokenizer
    requests: Sequence[dict]
    hparams: dict[str, Any]
    """Label -> hyperparameters of the method, KNE's or EasyEdit's."""
    data: str
    """The file of the records, for fingerprints and reports."""
    folder: Path
    """Where results are written."""
    seed: int = 42
    mode: str = "single"
    """``single``: every edit is undone before the next. ``sequential``: edits stay, and facts edited earlier are
    evaluated again every ``retention_every`` edits and at the end. ``batch``: ``batch_size`` facts an edit, undone
    before the next."""
    batch_size: int = 1
    retention_every: int = 10
    chat_template: bool = False
    """Every prompt, at edit and evaluation, in the tokenizer's chat template."""
    neighbours: int = 8
    """Prompts about other subjects that are asked of each record, to see what else an edit changes; 0: none."""
    contradiction: bool = False
    """Whether the model is asked if the new fact is not true (`probes.DENIALS`)."""
    perplexity: str | Path | None = None
    """A text file whose perplexity is taken: of the unedited model and after each edit, in a sequence where facts
    edited earlier are evaluated again."""
    ability: Sequence[str] = ()
    """Tasks of lm-evaluation-harness (`ability.require_tasks`), at the same times."""
    ability_limit: int | None = None
    """Documents of a task at most; None: all."""
    fluency: bool = True
    """Whether text is sampled for the fluency metric; without it an evaluation takes about half the time."""
    skip_bad: bool = False
    """Whether records that cannot be edited are left out; otherwise one ends the run."""
    before_folder: Path | None = None
    """Where evaluations of the unedited model are kept; None: in ``folder``. Several runs may share it."""
    text_source: TextSource = field(default_factory=TextSource)
    """Text for second moments (MEMIT)."""
    jobs: int = 1
    """Runs that localise on the same facts at the same time, through one score cache: the shards of one run."""
    workers: int = 1
    """Processes that edit and evaluate side by side (modes single and batch), each on its share of the processors."""
    show: int = 0
    """Answers of so many records are printed as soon as an edit is made."""
    complaints: list[str] = field(default_factory=list)
    """Records left out so far, and why."""
    apart: Sequence[Mapping] = ()
    """Facts that other jobs of the comparison are localised on: they are not asked."""
    others: Sequence[Path] = ()
    """Folders of other jobs: lines there of the same settings are not computed again."""

    @property
    def separator(self) -> str:
        """Joins prompt and answer: KNE's setting, a blank without KNE."""
        return separator_of(self.hparams)

    @property
    def examination(self) -> Examination:
        """What is measured of the model beside its facts."""
        return Examination(self.perplexity, tuple(self.ability), self.ability_limit)

    @property
    def moments_text(self) -> TextSource:
        """`text_source`; if it has no prompts, with such as have nothing to do with the records."""
        own = self.text_source
        return own if own.file or own.prompts else replace(own, prompts=unrelated_prompts(self.requests))

    def validate(self) -> None:
        """Checks the settings, and changes nothing.

        Raises:
            ValueError: Names the field, for settings that are out of range or do not go together.
            FileNotFoundError, ImportError: As `general.Examination.require`.
        """
        if self.mode not in MODES:
            raise ValueError(f"mode: {self.mode!r} must be one of {', '.join(MODES)}")
        if self.batch_size < 1 or (self.batch_size > 1 and self.mode != "batch"):
            raise ValueError(
                f"batch_size: {self.batch_size} with mode {self.mode}; "
                f"several facts an edit need mode batch, and at least 1"
            )
        if self.retention_every < 1:
            raise ValueError(f"retention_every: {self.retention_every} must be at least 1")
        if self.neighbours < 0:
            raise ValueError(f"neighbours: {self.neighbours} must be at least 0, which asks none")
        self.examination.require()
        if self.workers < 1 or (self.workers > 1 and self.mode == "sequential"):
            raise ValueError(
                f"workers: {self.workers} with mode {self.mode}; "
                f"a sequence is one process's work, and at least 1 is needed"
            )
        if not self.requests:
            raise ValueError(
                "records: there are none"
                + (f" that can be edited; the first complaint: {self.complaints[0]}" if self.complaints else "")
            )
        if not self.hparams:
            raise ValueError("methods: there are none")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: {self.seed} must be in [0, 2**32)")
        for method in self.hparams:
            require_name("method.label", method)
        for method, hparams in self.hparams.items():
            if hparams.alg_name == KNE and hparams.seed not in (self.seed, _SEED):
                raise ValueError(
                    f"{method}: its setting seed is {hparams.seed}, the run's {self.seed}; a run has one seed for all "
                    f"methods: give it to the run, and leave it out of the settings"
                )
        require_together(self.hparams, self.mode, self.chat_template)


def record_digest(request: Mapping) -> str:
    """Digest of a record's content; its number in the file does not count."""
    return digest({k: v for k, v in request.items() if k != "index"})


def base_fingerprint(job: Run, weights: str, variant: str) -> list:
    """What evaluations of the unedited model depend on, the record and the tokenizer's padding side apart.

    Args:
        job: The run.
        weights: Digest of the model's parameters.
        variant: Of EasyEdit's fluency metric.
    """
    versions = {k: v for k, v in environment(job.model).items() if k not in ("platform", "cpus")}
    base: list = [
        weights,
        variant,
        versions,
        bridge.describe(),
        sorted(patches.switched_off()),
        job.seed,
        job.chat_template,
        ["tokenizer", tokenizer_digest(job.tokenizer)],
    ]
    if own := own_generation(job.model):  # versions that obeyed them got other answers
        base.append(["generation", *own])
    if job.separator != SEPARATOR:
        base.append(["separator", job.separator])
    return base if job.fluency else [*base, "no fluency"]


def fingerprint(
    job: Run,
    method: str,
    base: list,
    ensemble: NeuronEnsemble | None,
    asked: Mapping[int, str] | None = None,
    left_out: Sequence[int] = (),
) -> str:
    """Digest of what a method's results depend on, the single record apart. Files count by their content.

    Args:
        job: The run.
        method: Its label.
        base: `base_fingerprint`.
        ensemble: Of KNE, if it localises before the first edit.
        asked: Number of a record -> digest of what is asked of it beside EasyEdit's probes.
        left_out: Numbers of records that cannot be edited, ascending. Another method may leave out others.
    """
    hparams = job.hparams[method]
    settings = {
        name: str(value)
        for name, value in public_settings(hparams).items()
        if name not in _WITHOUT_EFFECT and not (hparams.alg_name == KNE and _as_before(name, value, job.mode))
    }
    settings |= {name: _content(value) for name, value in path_settings(hparams).items() if name in settings}
    parts: list = [base, method, settings, job.mode]
    if hparams.alg_name == KNE:
        parts.append(None if ensemble is None else digest(ensemble.members()))
        if uses_neighbours(hparams):
            parts.append(["neighbours", CHOICE, neighbour_digest(hparams), *(["said"] if job.chat_template else [])])
        if hparams.kl_weight:
            parts.append("of other subjects")  # versions before trained on the edited fact in other words, too
    if traits_of(hparams.alg_name).padding_side == "right" and PADDING in patches.applied():
        parts.append(PADDING)
    if traits_of(hparams.alg_name).replaces_layer:
        parts.append("whole texts")  # versions before asked it token by token
    if needs_second_moments(hparams):
        parts.append(job.moments_text.digest(job.tokenizer))
        if own := own_files(job.model, hparams, expand_path(hparams.stats_dir)):
            parts.append([data_digest(file) for file in own])
    if job.mode != "single":  # there a result depends on the other records, too
        parts += [job.batch_size, job.retention_every, [record_digest(request) for request in job.requests]]
        if asked_later(job, hparams):
            parts.append("asked later")  # versions before trained on it
        if left_out:  # its batches, or what came before in its sequence, are others
            parts.append(["left out", *left_out])
    if job.neighbours or job.contradiction:  # added only then: lines of earlier versions keep their fingerprints
        of_others = None if job.mode == "single" else sorted((asked or {}).items())
        parts.append(["asked", job.neighbours, job.contradiction, of_others])
    if job.examination:
        parts.append(["general", *job.examination.identity()])
    return digest(parts)[:16]


def settings_digest(
    job: Run,
    method: str,
    base: list,
    ensemble: NeuronEnsemble | None,
    left_out: Sequence[int] = (),
) -> str:
    """The fingerprint without the seed: lines of several seeds may be averaged if they agree in it.

    Args:
        job: The run.
        method: Its label.
        base: `base_fingerprint` of the `seedless` run.
        ensemble: As for `fingerprint`.
        left_out: As for `fingerprint`.
    """
    return fingerprint(seedless(job), method, base, ensemble, left_out=left_out)


def asked_later(job: Run, hparams: Any) -> dict[str, list[str]]:
    """What requests of a sequence get beside their fields: what other records bring to be asked must not train."""
    trains = hparams.alg_name == KNE and uses_neighbours(hparams)
    found = [prompt for request in job.requests for prompt in own_neighbourhood(request)]
    return {ASKED: found} if trains and job.mode == "sequential" and found else {}


def seedless(job: Run) -> Run:
    """The run under the one seed that stands for any."""
    return replace(with_own_seed(job, _SEED), seed=0)


def with_own_seed(job: Run, seed: int) -> Run:
    """The run with KNE, whose seed is a setting of its own, under this seed; the caller's settings stay as they are."""
    seeded = {
        method: replace_settings(its, seed=seed) if its.alg_name == KNE else its for method, its in job.hparams.items()
    }
    return replace(job, hparams=seeded)


def _as_before(name: str, value: object, mode: str) -> bool:
    if name == "spare_edited" and mode != "sequential":
        return True  # every edit is undone before the next: there is no earlier one
    return name in _ADDED and _ADDED[name] == value


def _content(path: str) -> str:
    """Digest of a file's content; for a folder, or a file that does not exist yet, its name."""
    return data_digest(expand_path(path)) or expand_path(path).name
