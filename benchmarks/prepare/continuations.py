"""Make CounterFact's training requests watch what follows an edited statement: several tokens, not one.

    python benchmarks/prepare/continuations.py --data-dir DIR --out FILE [--model starter]

An edited model tends to say its target again and again. Each request gets one more unrelated text: its own statement (or its
rephrasing, in turns) with the target, whose answer is what the base model says next, greedily. Writes JSON Lines of the
task `records`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lines import write_requests

import mendlm
from mendlm.tasks import TASKS

TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Make CounterFact's requests watch what follows an edited statement.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--device", default=None)
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    examples = TASKS["counterfact"].load(arguments.data_dir / "counterfact-train.json").examples
    said = [f"{(e.prompt, *e.rephrasings)[i % (1 + len(e.rephrasings))]} {e.target}" for i, e in enumerate(examples)]
    session = mendlm.Session(*mendlm.load(arguments.model, device=arguments.device))
    follows: dict[int, str] = {}
    order = sorted(range(len(said)), key=lambda i: len(said[i]))  # texts of a length together
    for start in range(0, len(order), arguments.batch):
        some = order[start : start + arguments.batch]
        follows.update(zip(some, session.answers([said[i] for i in some], max_new_tokens=TOKENS), strict=True))
        print(f"\r{len(follows)}/{len(said)}", end="", flush=True)
    made = []
    for i, e in enumerate(examples):
        unrelated = [{"prompt": probe.prompt, "answer": probe.answer} for probe in e.unrelated]
        if follows[i].strip():
            unrelated.append({"prompt": said[i], "answer": follows[i].strip()})
        record = {"prompt": e.prompt, "target": e.target, "rephrasings": list(e.rephrasings), "unrelated": unrelated}
        made.append(record)
    print()
    write_requests(arguments.out, made)


if __name__ == "__main__":
    main()
