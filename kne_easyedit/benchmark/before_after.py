"""What a model says of edited facts and of their neighbours: asked before an edit and after it, shown side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kne_easyedit.benchmark.answers import SHOWN, first_word
from kne_easyedit.benchmark.asking import askable, continuations, probabilities
from kne_easyedit.editing.applying import with_edits
from kne_easyedit.editing.own_neighbours import own_pool
from kne_easyedit.edits.kept_answers import rows_added
from kne_easyedit.edits.low_rank import Rows
from kne_easyedit.facts.encoding import SEPARATOR, Fact, Tokenizer, chat_prompt, encode, natural
from kne_easyedit.facts.neighbours import FactPool, packaged_pool, run_exclusions


@dataclass(frozen=True)
class Said:
    """What a model says of one prompt."""

    answer: str
    """The beginning of its greedy answer."""
    new: float | None = None
    """Probability of the whole new answer, in [0, 1]; None for a neighbour."""
    old: float | None = None
    """Probability of the whole old answer, in [0, 1]; None for a neighbour."""


@dataclass(frozen=True)
class Question:
    """A fact, or a neighbour of one."""

    prompt: str
    """As it was given; without a chat template."""
    asked: str
    """As the model gets it."""
    new: Fact | None = None
    """With the new answer; None for a neighbour."""
    old: Fact | None = None
    """With the old answer."""


class Questions:
    """The facts of an edit and some of their neighbours, to be asked of the model before and after.

    The old answer is ``ground_truth`` of the request. Where it has none, it is what the unedited model says, as many
    tokens as the new answer has. Neighbours ask the same of other subjects, of which none trains: they are made of the
    requests, else of the packaged facts; for the first fact, where these know none, the model itself names subjects.

    Args:
        model: The unedited model.
        tokenizer: Its tokenizer.
        requests: Mappings with ``prompt``, ``target_new`` and maybe ``subject`` and ``ground_truth``.
        neighbours: Number of neighbours of each fact.
        of_facts: Facts that are asked about; all count as edited.
        separator: Joins prompt and answer.
        chat: Put prompts into the tokenizer's chat template.

    Raises:
        ValueError: A request cannot be asked; the message names the field.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        requests: Sequence[Mapping],
        *,
        neighbours: int = 4,
        of_facts: int = 3,
        separator: str = SEPARATOR,
        chat: bool = False,
    ):
        self._tokenizer, self._separator, self._chat = tokenizer, separator, chat
        shown = requests[:of_facts]
        facts = [encode(tokenizer, self._asked(one["prompt"]), one["target_new"], separator) for one in shown]
        self.facts: tuple[Question, ...] = tuple(
            Question(one["prompt"], fact.prompt, fact, self._old(model, one, fact)) for one, fact in zip(shown, facts)
        )
        self.neighbours: tuple[tuple[Question, ...], ...] = tuple(
            self._neighbours(model, requests, len(shown), neighbours) if neighbours > 0 else [()] * len(shown)
        )
        self._length = max(SHOWN, *(len(fact.answer) + 2 for fact in facts))

    def ask(self, model: Any) -> dict[Question, Said]:
        """What a model says of all of them."""
        questions = [*self.facts, *(one for some in self.neighbours for one in some)]
        asked = list(dict.fromkeys(questions))
        answers = answers_to(model, self._tokenizer, [one.asked for one in asked], self._length)
        pairs = [(one, fact) for one in asked for fact in (one.new, one.old) if fact is not None]
        found = dict(zip(pairs, probabilities(model, [fact for _, fact in pairs])))
        return {
            one: Said(
                answer,
                found[one, one.new] if one.new is not None else None,
                found[one, one.old] if one.old is not None else None,
            )
            for one, answer in zip(asked, answers)
        }

    def _asked(self, prompt: str) -> str:
        return chat_prompt(self._tokenizer, prompt) if self._chat else natural(prompt)

    def _old(self, model: Any, request: Mapping, fact: Fact) -> Fact | None:
        if truth := request.get("ground_truth"):
            return askable(model, self._tokenizer, fact.prompt, truth, self._separator)
        (ids,) = continuations(model, self._tokenizer, [fact.prompt], len(fact.answer))
        special = set(self._tokenizer.all_special_ids)
        ids = [token for token in ids if token not in special]
        if not ids or tuple(ids) == fact.answer:
            return None
        prompt = fact.ids[: fact.prompt_length]
        return Fact(fact.prompt, self._tokenizer.decode(ids).strip(), (*prompt, *ids), len(prompt))

    def _neighbours(
        self, model: Any, requests: Sequence[Mapping], shown: int, n: int
    ) -> Iterator[tuple[Question, ...]]:
        """Of each of the first requests its neighbours."""
        exclude, own = run_exclusions(requests), FactPool.of_requests(requests)
        for number, request in enumerate(requests[:shown]):
            found = own.relation_prompts(request, n, held_out=True, exclude=exclude)
            found = found or packaged_pool().relation_prompts(request, n, held_out=True, exclude=exclude)
            if not found and number == 0:  # the model is asked to name subjects, which takes some seconds
                pool = own_pool(model, self._tokenizer, request)
                found = pool.relation_prompts(request, n, held_out=True, exclude=exclude)
            yield tuple(Question(one.prompt, self._asked(one.prompt)) for one in found)


def answers_to(model: Any, tokenizer: Tokenizer, prompts: Sequence[str], length: int = SHOWN) -> list[str]:
    """The beginnings of a model's greedy answers.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: What is asked.
        length: Tokens of an answer at most.

    Raises:
        ValueError: A prompt has no tokens, or leaves no room for an answer.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        tokens = len(tokenizer(prompt)["input_ids"])
        if not tokens or (limit and tokens >= limit):
            room = f"the model takes {limit} with its answer" if tokens else "nothing is asked"
            raise ValueError(f"prompt: {prompt[:60]!r} has {tokens} tokens; {room}")
    found = continuations(model, tokenizer, prompts, length)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def without_and_with_edits(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int,
    *,
    chat: bool = False,
    beside: Mapping[str, Rows] | None = None,
) -> list[tuple[str, str]]:
    """The beginnings of a model's greedy answers, without any edit and with those that it has.

    Args:
        model: The model; it is left as it is.
        tokenizer: Its tokenizer.
        prompts: What is asked.
        length: Tokens of an answer at most.
        chat: Put prompts into the tokenizer's chat template.
        beside: What edits add that the model does not have in its weights (`rows_beside`).

    Returns:
        Both answers to each prompt.

    Raises:
        ValueError: A prompt has no tokens, or leaves no room for an answer; there is no template.
    """
    asked = [chat_prompt(tokenizer, one) if chat else natural(one) for one in prompts]
    with with_edits(model, ()):
        before = answers_to(model, tokenizer, asked, length)
    with rows_added(model, beside or {}):
        return list(zip(before, answers_to(model, tokenizer, asked, length)))


def kept(before: str, after: str) -> bool:
    """Whether an answer begins with the word with which it began before."""
    return first_word(before) == first_word(after)
