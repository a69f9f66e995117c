"""What a run asks of each record beside EasyEdit's probes: neighbours of the edit, aliases, whether it is denied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from kne_easyedit._util.digest import digest
from kne_easyedit._util.files import expand_path
from kne_easyedit.benchmark.asking import askable
from kne_easyedit.benchmark.job import Run
from kne_easyedit.bridge.methods import NAME as KNE
from kne_easyedit.facts.encoding import chat_prompt
from kne_easyedit.facts.neighbours import FactPool, Neighbour, own_neighbourhood, packaged_pool
from kne_easyedit.facts.readers import EMBEDDED
from kne_easyedit.facts.records import load_requests
from kne_easyedit.facts.templates import normalised, stands_in
from kne_easyedit.localization.data import localization_requests

OWN = "own"
"""Kind of a neighbour that the record itself brings."""
_ALIASES = ("subject aliasing", "aliasing", "alias", "aliases", "subject alias", "subject aliases")
"""Names of a portability category of the subject's other names (KnowEdit), without capitals and underscores."""


@dataclass(frozen=True)
class Denial:
    """A question to which one answer denies the new fact, and another one affirms it."""

    prompt: str
    denies: str
    affirms: str


DENIALS = (
    Denial('Is it true that "{}"? Answer yes or no. Answer:', "No", "Yes"),
    Denial('It is not true that "{}". True or false? Answer:', "True", "False"),
)
"""Templates; the new fact is put into each. One affirms and one negates, so that a habit of saying yes cancels out."""


@dataclass(frozen=True)
class Asked:
    """What is asked of one record. Prompts are in the chat template if the run asks for it."""

    neighbours: tuple[Neighbour, ...] = ()
    aliases: tuple[str, ...] = ()
    denials: tuple[Denial, ...] = ()

    @property
    def prompts(self) -> list[str]:
        """The prompts that are answered freely: neighbours first, then aliases."""
        return [*(neighbour.prompt for neighbour in self.neighbours), *self.aliases]

    @property
    def key(self) -> str:
        """Digest of all that is asked."""
        return digest([self.prompts, len(self.neighbours), [vars(denial) for denial in self.denials]])[:32]


def choose(job: Run) -> dict[int, Asked]:
    """What is asked of each record of a run.

    Neighbours are those that the record brings; else prompts of its relation about other subjects, from the records of
    the data file; else from the packaged facts, if those know the relation. Made ones are about held-out subjects only
    (`facts.neighbours.is_held_out`), and never facts that a method of the run is localised on. Where edits are made
    together or stay, nothing is asked about a subject that is edited in the run, in whatever words.

    Args:
        job: The run.

    Returns:
        Number of a record -> what is asked.
    """
    if not job.neighbours and not job.contradiction:
        return {request["index"]: Asked() for request in job.requests}
    pools = _Pools(job)
    return {request["index"]: _asked(job, request, pools) for request in job.requests}


class _Pools:
    """The facts that neighbours are made of, read when the first record needs them."""

    def __init__(self, job: Run):
        self.job = job
        self.edited = [] if job.mode == "single" else list(job.requests)
        together = {its[name] for its in self.edited for name in ("prompt", "subject") if its.get(name)}
        self.exclude = together | {request["prompt"] for request in _localised(job)}
        self._pools: dict[str, FactPool] = {}

    def own(self, request: Mapping) -> list[Neighbour]:
        """The neighbours that a record brings, in an order that the seed gives; none about what is edited beside it."""
        subjects = [normalised(its["subject"]) for its in self.edited if its.get("subject")]
        left = [
            prompt
            for prompt in {*own_neighbourhood(request)} - self.exclude
            if not any(stands_in(subject, normalised(prompt)) for subject in subjects)
        ]
        ordered = sorted(left, key=lambda prompt: digest([self.job.seed, prompt]))
        return [Neighbour(prompt, "", OWN, "") for prompt in ordered]

    def made(self, request: Mapping) -> Iterator[Neighbour]:
        """Neighbours of a request, the best first: of the data file, then of the packaged facts.

        The packaged records are few, and their relations are written out with many subjects: there these come first.
        """
        pools: list[tuple[str, Callable[[], FactPool]]] = [("data", self._of_data), ("packaged", packaged_pool)]
        for name, make in reversed(pools) if self.job.data == EMBEDDED else pools:
            if name not in self._pools:
                self._pools[name] = make()
            number = 2 * self.job.neighbours  # the model may not take all of them
            yield from self._pools[name].relation_prompts(
                request, number, held_out=True, seed=self.job.seed, exclude=self.exclude
            )

    def _of_data(self) -> FactPool:
        data = self.job.data
        in_file = data == EMBEDDED or expand_path(data).is_file()
        return FactPool.of_requests(load_requests(data) if in_file else self.job.requests)


def _localised(job: Run) -> list[Mapping]:
    """The facts that methods of the run, or of the comparison that it is a part of, are localised on."""
    found = [
        request
        for hparams in job.hparams.values()
        if hparams.alg_name == KNE and hparams.ensemble is None and hparams.localization_data is not None
        for request in localization_requests(hparams)
    ]
    return [*found, *job.apart]


def _asked(job: Run, request: Mapping, pools: _Pools) -> Asked:
    neighbours: list[Neighbour] = []
    if job.neighbours:
        neighbours = _askable(job, request, pools.own(request) or pools.made(request))
    denials = [
        replace(denial, prompt=denial.prompt.format(f"{request['prompt']}{job.separator}{request['target_new']}"))
        for denial in (DENIALS if job.contradiction else ())
    ]
    return Asked(
        tuple(neighbours),
        tuple(_in_template(job, prompt) for prompt in _aliases(request)) if neighbours else (),
        tuple(replace(denial, prompt=_in_template(job, denial.prompt)) for denial in denials),
    )


def is_alias_category(name: str) -> bool:
    """Whether a category of portability asks by other names of the subject."""
    return name.casefold().replace("_", " ") in _ALIASES


def _aliases(request: Mapping) -> list[str]:
    found = [
        prompt
        for name, probes in request.get("portability", {}).items()
        if is_alias_category(name)
        for prompt in probes["prompt"]
    ]
    return list(dict.fromkeys(found))


def _askable(job: Run, request: Mapping, found: Iterable[Neighbour]) -> list[Neighbour]:
    """The first ``job.neighbours`` that tokenizer and model can take with the new answer, none twice."""
    chosen: dict[str, Neighbour] = {}
    for neighbour in found:
        if len(chosen) == job.neighbours:
            break
        prompt = _in_template(job, neighbour.prompt)
        if askable(job.model, job.tokenizer, prompt, request["target_new"], job.separator):
            chosen.setdefault(prompt, replace(neighbour, prompt=prompt))
    return list(chosen.values())


def _in_template(job: Run, prompt: str) -> str:
    return chat_prompt(job.tokenizer, prompt) if job.chat_template else prompt
