"""Maps the records of known data sets to one plain form, KnowEdit's: one function for each schema.

A plain record has ``prompt``, ``target_new``, and maybe ``subject``, ``ground_truth``, ``rephrase_prompt``,
``portability`` and ``locality``: mappings of categories to lists of probes (``prompt``, ``ground_truth``), and
``neighbours``: names of other subjects. To add a data set, write such a function and add it to `SCHEMAS`.
`records.to_request` checks the values afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kne_easyedit._util.messages import shorten

PARAPHRASE, NEIGHBORHOOD, ATTRIBUTE = "Paraphrase", "Neighborhood", "Attribute"
"""Categories of the probes of other data sets."""


@dataclass(frozen=True)
class Schema:
    """A form of records."""

    name: str
    matches: Callable[[Mapping], bool]
    plain: Callable[[Mapping], dict]
    """Record -> plain record; raises ValueError, saying how to convert it, if that is not possible."""
    fields: frozenset[str]
    """Fields that are used, or that hold no questions. Others are reported as left out."""


def schema_of(record: Mapping) -> Schema:
    """The first schema that matches the record; the last one matches all."""
    return next(schema for schema in SCHEMAS if schema.matches(record))


def _counterfact(record: Mapping) -> dict:
    rewrite = record["requested_rewrite"]
    new, old = _at(rewrite, "target_new", "str"), _at(rewrite, "target_true", "str")
    return {
        **_rewritten(rewrite),
        **_rephrased(record.get("paraphrase_prompts"), new),
        "locality": {
            **_category(NEIGHBORHOOD, record.get("neighborhood_prompts"), old),
            **_category(ATTRIBUTE, record.get("attribute_prompts"), new),
        },
    }


def _mquake(record: Mapping) -> dict:
    rewrites = record["requested_rewrite"]
    if len(rewrites) != 1:
        raise ValueError(
            f"requested_rewrite: {len(rewrites)} rewrites in one MQuAKE case, whose questions follow from all of them "
            f"together; write a record of each (prompt, subject, target_new) and edit them by --mode batch or "
            f"sequential"
        )
    rewrite = rewrites[0] if isinstance(rewrites[0], Mapping) else {}
    plain, hops = _rewritten(rewrite), _listed(record.get("new_single_hops"))
    if "question" in rewrite:
        plain["rephrase_prompt"] = rewrite["question"]
    single = [{"prompt": _at(hop, "cloze") or _at(hop, "question"), "ground_truth": _at(hop, "answer")} for hop in hops]
    return {
        **plain,
        "portability": {
            **_category("Multi_hop", record.get("questions"), record.get("new_answer")),
            **({"Single_hop": single} if single else {}),
        },
    }


def _zsre(record: Mapping) -> dict:
    plain = {
        "prompt": record["src"],
        "target_new": record["alt"],
        "ground_truth": record.get("answers"),
        "subject": record.get("subject"),
    }
    if "rephrase" in record:
        plain["rephrase_prompt"] = record["rephrase"]
    if "loc" in record:
        plain["locality"] = {"Unrelated": [{"prompt": record["loc"], "ground_truth": record.get("loc_ans")}]}
    return plain


def _cknowedit(record: Mapping) -> dict:
    target = record.get("target_new")
    rephrased = _rephrased(record.get("rephrase"), target)
    portability, locality = (_answered(record.get(section), section) for section in ("portability", "locality"))
    return {
        "prompt": record.get("prompt"),
        "target_new": target,
        "ground_truth": record["target_old"],
        "subject": record.get("subject"),
        **rephrased,
        "portability": {**rephrased["portability"], **({"Portability": portability} if portability else {})},
        "locality": {"Locality": locality} if locality else {},
    }


def _template(record: Mapping) -> dict:
    template, subject = record["template"], record.get("subject")
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"template: {shorten(template)} must be a text with {{}} once, in place of the subject")
    if not isinstance(subject, str):
        raise ValueError(f"subject: {shorten(subject)} must be a text, which is put into the template")
    return _knowedit({**record, "prompt": template.replace("{}", subject)})


def _knowedit(record: Mapping) -> dict:
    plain = {
        "prompt": record.get("prompt", record.get("text")),
        "target_new": record.get("target_new", record.get("labels")),
        "ground_truth": record.get("ground_truth"),
        "subject": record.get("subject", record.get("concept")),
        "portability": record.get("portability"),
        "locality": record.get("locality"),
        "neighbours": record.get("neighbours"),
    }
    rephrased = _rephrased(
        [*_listed(record.get("rephrase_prompt")), *_listed(record.get("rephrase"))], plain["target_new"]
    )
    plain["portability"] = _with(plain["portability"], rephrased.pop("portability"))
    # EasyEdit's examples have these names.
    for section, category in (("portability", "one_hop"), ("locality", "neighborhood")):
        pairs = _pairs(record.get(f"{section}_prompt"), record.get(f"{section}_ground_truth"), f"{section}_prompt")
        probes = [{"prompt": prompt, "ground_truth": answer} for prompt, answer in pairs]
        plain[section] = _with(plain[section], {category: probes} if probes else {})
    return {**plain, **rephrased}


_PLAIN_FIELDS = {
    "prompt",
    "text",
    "target_new",
    "labels",
    "ground_truth",
    "subject",
    "concept",
    "rephrase_prompt",
    "rephrase",
    "portability",
    "locality",
    "portability_prompt",
    "portability_ground_truth",
    "locality_prompt",
    "locality_ground_truth",
    "neighbours",
}
_NO_QUESTIONS = {
    "case_id",
    "pararel_idx",
    "id",
    "index",
    "cond",
    "pred",
    "relation_id",
    "relation",
    "time",
    "type",
    "source",
}

SCHEMAS = (
    Schema(
        "CounterFact",
        lambda record: isinstance(record.get("requested_rewrite"), Mapping),
        _counterfact,
        frozenset(
            {"requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", *_NO_QUESTIONS}
        ),
    ),
    Schema(
        # Answers before the edit and aliases of those after it are not used: EasyEdit's evaluator takes one answer.
        "MQuAKE",
        lambda record: isinstance(record.get("requested_rewrite"), list),
        _mquake,
        frozenset(
            {
                "requested_rewrite",
                "questions",
                "new_answer",
                "new_single_hops",
                "answer",
                "answer_alias",
                "new_answer_alias",
                "single_hops",
                "orig",
                *_NO_QUESTIONS,
            }
        ),
    ),
    Schema(
        "zsRE (MEND)",
        lambda record: "src" in record and "alt" in record,
        _zsre,
        frozenset({"src", "alt", "answers", "subject", "rephrase", "loc", "loc_ans", *_NO_QUESTIONS}),
    ),
    Schema(
        "CKnowEdit",
        lambda record: "target_old" in record,
        _cknowedit,
        frozenset({*_PLAIN_FIELDS, "target_old", *_NO_QUESTIONS}),
    ),
    Schema(
        "Template",
        lambda record: "template" in record and "prompt" not in record,
        _template,
        frozenset({*_PLAIN_FIELDS, "template", *_NO_QUESTIONS}),
    ),
    Schema("KnowEdit", lambda record: True, _knowedit, frozenset({*_PLAIN_FIELDS, *_NO_QUESTIONS})),
)
"""In the order in which they are tried."""


def _rewritten(rewrite: Mapping) -> dict:
    """A ``requested_rewrite`` of CounterFact or MQuAKE: its prompt has ``{}`` in place of the subject."""
    prompt, subject = rewrite.get("prompt"), rewrite.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str):
        prompt = prompt.replace("{}", subject)
    target, old = _at(rewrite, "target_new", "str"), _at(rewrite, "target_true", "str")
    return {"prompt": prompt, "subject": subject, "target_new": target, "ground_truth": old}


def _with(section: Any, more: Mapping) -> Any:
    """A section with more probes; one that is no mapping is returned unchanged, to be refused later."""
    if not more or not isinstance(section, Mapping | None):
        return section
    section = section or {}
    joined = {
        name: [*section.get(name, []), *probes]
        for name, probes in more.items()
        if isinstance(section.get(name, []), list)
    }
    return {**section, **joined}


def _rephrased(prompts: Any, target: Any) -> dict:
    """The first paraphrase is the rephrased prompt, the others are probes, so that none is asked twice."""
    first, *others = _listed(prompts) or [None]
    found = {} if first is None else {"rephrase_prompt": first}
    return {**found, "portability": _category(PARAPHRASE, others, target)}


def _category(name: str, prompts: Any, answer: Any) -> dict:
    """A category of prompts with the same answer; empty if there are no prompts."""
    probes = [{"prompt": prompt, "ground_truth": answer} for prompt in _listed(prompts)]
    return {name: probes} if probes else {}


def _answered(section: Any, field: str) -> list[dict]:
    """Probes of CKnowEdit: a list of ``prompt`` and ``answer``, or one mapping of two lists."""
    if isinstance(section, Mapping):
        pairs = _pairs(section.get("prompt"), section.get("answer"), field)
        return [{"prompt": prompt, "ground_truth": answer} for prompt, answer in pairs]
    return [{"prompt": _at(item, "prompt"), "ground_truth": _at(item, "answer")} for item in _listed(section)]


def _pairs(prompts: Any, answers: Any, field: str) -> list[tuple]:
    prompts = _listed(prompts)
    if not prompts and answers is None:
        return []
    # The answer of a single prompt may be a list of aliases.
    answers = answers if isinstance(answers, list) and len(prompts) != 1 else [answers]
    if len(prompts) != len(answers):
        raise ValueError(f"{field}: {len(prompts)} prompts and {len(answers)} answers; each prompt needs one")
    return list(zip(prompts, answers))


def _listed(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _at(value: Any, *names: str) -> Any:
    """The value under these names in nested mappings; None where one is missing."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
