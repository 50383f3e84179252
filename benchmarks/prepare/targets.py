"""Give zsRE's training questions other targets: more requests than its 997, so that none is learned by heart.

    python benchmarks/prepare/targets.py --data-dir DIR --out FILE [--copies 3] [--seed 0]

Each copy of a question keeps its rephrasing and its unrelated question, and takes the target of another question that begins
with the same two words, or of any other where none does. For training only. Writes JSON Lines of the task `records`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from lines import write_requests

from mendlm.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description="Give zsRE's training questions other targets.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    examples = TASKS["zsre"].load(arguments.data_dir / "zsre-train.json").examples
    every = sorted({e.target for e in examples})
    alike: dict[str, set[str]] = {}
    for e in examples:
        alike.setdefault(beginning(e.prompt), set()).add(e.target)
    rng, made = random.Random(arguments.seed), []
    for e in examples:
        own = {e.target, e.old}
        others = sorted(alike[beginning(e.prompt)] - own) or [target for target in every if target not in own]
        unrelated = [{"prompt": probe.prompt, "answer": probe.answer} for probe in e.unrelated]
        for target in rng.sample(others, min(arguments.copies, len(others))):
            record = {"prompt": e.prompt, "target": target, "rephrasings": list(e.rephrasings), "unrelated": unrelated}
            made.append(record)
    write_requests(arguments.out, made)


def beginning(question: str) -> str:
    """The first two words, by which questions of a kind are told."""
    return " ".join(question.lower().split()[:2])


if __name__ == "__main__":
    main()
