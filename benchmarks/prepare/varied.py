"""Say the training requests in other words: new requests from the parts of CounterFact's and zsRE's own.

    python benchmarks/prepare/varied.py --data-dir DIR --out FILE [--zsre-copies 8] [--number-copies 0]
        [--new-targets 0] [--only-questions] [--seed 0]

An editor that sees the same 10,388 requests again and again learns them by heart. A request is a subject in a template, so that
there are more to be had: CounterFact's subjects with another target of their relation, rephrasings in the relation's other
templates behind other requests' lead-ins, and as unrelated texts other subjects of the relation, half of them with the same
old answer; zsRE's questions about another question's subject, with another target, beside questions about other subjects. A
target with digits can be asked for more often, and a share of zsRE's targets be new ones: other numbers and months, names put
together of others' parts. For training only: a subject may not fit its question. Writes JSON Lines of the task `records`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invented import MONTH
from lines import write_requests
from targets import beginning

TEXTS = 4
"""Rephrasings of a request, and unrelated texts, at most."""
OFTEN = 3
"""A relation says a thing by a template that its records use so many times."""


@dataclass(frozen=True)
class Fact:
    """One record's parts. Templates hold {} where the subject stands."""

    subject: str
    prompt: str
    rephrasing: str
    lead_in: str
    """What stands before the rephrasing."""
    target: str
    old: str

    def said(self, template: str, subject: str | None = None) -> str:
        """A template about this subject or another one."""
        return template.replace("{}", subject or self.subject)


def parted(text: str, subject: str) -> tuple[str, str] | None:
    """The sentences before the one that names the subject, and that one as a template; None if none names it."""
    place = text.find(subject)
    if place < 0:
        return None
    ends = [match.end() for match in re.finditer(r"[.!?\n][\"')]?\s+", text[:place])]
    start = ends[-1] if ends else 0
    return text[:start], text[start:].replace(subject, "{}")


def facts(records: Iterable[dict[str, Any]], prompt: str, rephrasing: str, target: str, old: str) -> list[Fact]:
    """The parts of all records whose prompt and rephrasing name the subject."""
    found = []
    for record in records:
        asked, again = (parted(record[name], record["subject"]) for name in (prompt, rephrasing))
        if asked and again:
            found.append(Fact(record["subject"], asked[1], again[1], again[0], record[target], record[old]))
    return found


def choose(rng: random.Random, some: Sequence[str], without: set[str]) -> str | None:
    """One of them that is none of these."""
    left = [one for one in some if one not in without]
    return rng.choice(left) if left else None


def of_counterfact(every: Sequence[Fact], rng: random.Random) -> list[dict[str, Any]]:
    """One new request of each statement."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    alike: dict[str, list[Fact]] = defaultdict(list)
    for fact in every:
        said[fact.prompt][fact.rephrasing] += 1
        alike[fact.prompt].append(fact)
    lead_ins, made = [fact.lead_in for fact in every], []
    for fact in every:
        targets = [other.target for other in alike[fact.prompt]]
        target = choose(rng, targets, {fact.target, fact.old}) or fact.target
        ways = [template for template, count in said[fact.prompt].items() if count >= OFTEN] or [fact.rephrasing]
        rephrasings = [rng.choice(lead_ins) + fact.said(rng.choice(ways)) for _ in range(TEXTS)]
        others = [other for other in alike[fact.prompt] if other.subject != fact.subject]
        same = [other for other in others if other.old == fact.old]
        near = rng.sample(same, min(TEXTS // 2, len(same)))
        near += rng.sample(others, min(TEXTS - len(near), len(others)))
        unrelated = [{"prompt": other.said(rng.choice((fact.prompt, *ways))), "answer": other.old} for other in near]
        made.append({"prompt": fact.said(fact.prompt), "target": target, "rephrasings": rephrasings, "unrelated": unrelated})
    return made


def renewed(target: str, others: Sequence[str], rng: random.Random) -> str:
    """A target of the same form: other numbers and another month, or a name of other names' words."""
    if re.search(r"\d", target):
        target = re.sub("|".join(MONTH), lambda _: rng.choice(MONTH), target)
        return re.sub(r"\d+", lambda found: str(number(len(found[0]), rng)), target)
    words = target.split()
    if len(words) < 2 or not all(word[0].isupper() for word in words):
        return target
    names = [other.split() for other in others if len(other.split()) > 1]
    firsts, lasts = ([name[place] for name in names if name[place][0].isupper()] for place in (0, -1))
    return " ".join([rng.choice(firsts), *words[1:-1], rng.choice(lasts)])


def number(digits: int, rng: random.Random) -> int:
    """A number as they are in dates: a day, a year, or any other."""
    return rng.randint(1500, 2030) if digits == 4 else rng.randint(1, 28) if digits == 2 else rng.randrange(10**digits)


def of_zsre(
    every: Sequence[Fact], copies: int, numbers: int, new: float, strangers: Sequence[str], rng: random.Random
) -> list[dict[str, Any]]:
    """So many new requests of each question, and of one whose target has digits; a share `new` has renewed targets.

    Half of these are about strangers.
    """
    targets: dict[str, list[str]] = defaultdict(list)
    subjects: dict[str, list[str]] = defaultdict(list)
    said: dict[str, set[str]] = defaultdict(set)
    for fact in every:
        targets[beginning(fact.prompt)] += [fact.target, fact.old]
        subjects[beginning(fact.prompt)].append(fact.subject)
        said[fact.prompt].add(fact.rephrasing)
        said[fact.rephrasing].add(fact.prompt)
    made = []
    numbered = [fact for fact in every if re.search(r"\d", fact.target)]
    for fact in [*every * copies, *numbered * (numbers - copies)]:
        asked, again = rng.sample((fact.prompt, fact.rephrasing), 2)
        kind = beginning(fact.prompt)
        subject = choose(rng, subjects[kind], {fact.subject}) or fact.subject
        target = choose(rng, targets[kind], {fact.target, fact.old}) or fact.target
        if new and rng.random() < new:
            target = renewed(fact.target, targets[kind], rng)
            subject = rng.choice((subject, rng.choice(strangers)))
        ways = rng.sample(sorted(said[asked] | {again}), min(TEXTS, len(said[asked] | {again})))
        others = rng.sample(every, TEXTS - 1)
        unrelated = [{"prompt": other.said(other.prompt), "answer": other.old} for other in others if other.subject != subject]
        unrelated.append({"prompt": fact.said(asked), "answer": fact.old})
        made.append(
            {
                "prompt": fact.said(asked, subject),
                "target": target,
                "rephrasings": [fact.said(way, subject) for way in ways],
                "unrelated": unrelated,
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Make new training requests from the parts of CounterFact's and zsRE's.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--zsre-copies", type=int, default=8)
    parser.add_argument("--number-copies", type=int, default=0)
    parser.add_argument("--new-targets", type=float, default=0.0)
    parser.add_argument("--only-questions", action="store_true", help="leave out CounterFact's statements")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counterfact, zsre = (
        json.loads((arguments.data_dir / f"{name}-train.json").read_bytes()) for name in ("counterfact", "zsre")
    )
    rng = random.Random(arguments.seed)
    statements = facts(counterfact, "prompt", "rephrase_prompt", "target_new", "ground_truth")
    questions = facts(zsre, "src", "rephrase", "alt", "pred")
    options = arguments.zsre_copies, arguments.number_copies, arguments.new_targets
    made = [] if arguments.only_questions else of_counterfact(statements, rng)
    write_requests(arguments.out, made + of_zsre(questions, *options, [fact.subject for fact in statements], rng))


if __name__ == "__main__":
    main()
