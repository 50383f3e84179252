"""Make edit requests of Natural Questions: more kinds of questions to train the starter editor on than zsRE's 997.

    python benchmarks/prepare/questions.py --data-dir DIR --out FILE

Each question asks for its own true answer, which a small base model seldom knows. Natural Questions have no rephrasings;
the frames below stand for them, and are no paraphrases: for training only. Writes JSON Lines of the task `records`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lines import write_requests

from mendlm.tasks import TASKS

FRAMES = ("Can you tell me {}", "Do you know {}", "A quick question: {}", "I would like to know {}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make edit requests of Natural Questions.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    made = []
    for probe in TASKS["nq"].load(arguments.data_dir / "nq-open-dev.jsonl").probes:
        asked = probe.prompt[0].lower() + probe.prompt[1:]
        rephrasings = [frame.format(asked) for frame in FRAMES]
        made.append({"prompt": probe.prompt, "target": probe.answer, "rephrasings": rephrasings})
    write_requests(arguments.out, made)


if __name__ == "__main__":
    main()
