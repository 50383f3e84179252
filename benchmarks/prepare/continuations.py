"""Make training requests watch what follows an edited statement: several tokens, not one.

    python benchmarks/prepare/continuations.py --data TASK:PATH --out FILE [--model starter]

An edited model tends to say its target again and again. Each statement gets one more unrelated text: itself (or its rephrasing,
in turns) with the target, whose answer is what the base model says next, greedily. A question's target ends the answer, so that
questions stay as they are. Writes JSON Lines of the task `records`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lines import write_requests

import mendlm
from mendlm.tasks import load_edits

TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Make requests watch what follows an edited statement.")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--device", default=None)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    examples = load_edits(arguments.data).examples
    said = [f"{(e.prompt, *e.rephrasings)[i % (1 + len(e.rephrasings))]} {e.target}" for i, e in enumerate(examples)]
    session = mendlm.Session(*mendlm.load(arguments.model, device=arguments.device))
    follows: dict[int, str] = {}
    statements = [i for i, e in enumerate(examples) if not e.question]
    order = sorted(statements, key=lambda i: len(said[i]))  # texts of a length together
    for start in range(0, len(order), arguments.batch):
        some = order[start : start + arguments.batch]
        follows.update(zip(some, session.answers([said[i] for i in some], max_new_tokens=TOKENS), strict=True))
        print(f"\r{len(follows)}/{len(order)}", end="", flush=True)
    made = []
    for i, e in enumerate(examples):
        unrelated = [{"prompt": probe.prompt, "answer": probe.answer} for probe in e.unrelated]
        if i in follows and follows[i].strip():
            unrelated.append({"prompt": said[i], "answer": follows[i].strip()})
        record = {"prompt": e.prompt, "target": e.target, "rephrasings": list(e.rephrasings), "unrelated": unrelated}
        made.append(record)
    print()
    write_requests(arguments.out, made)


if __name__ == "__main__":
    main()
