"""Fifty edits to look at (by_eye.tsv), of kinds that are in no data set; prints the transcript that docs/results.md keeps.

    python benchmarks/by_eye.py [--editor starter] > transcript.md

For each request: what the edited model says to the prompt, to a rephrasing and to a neighbour, and what it said to the
neighbour before. Greedy, at most 12 new tokens. A tick means that the answer begins with the target, or is unchanged.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import mendlm
from mendlm.metrics import continues


def main() -> None:
    parser = argparse.ArgumentParser(description="Fifty edits to look at.")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--editor", default="starter")
    parser.add_argument("--chat", action="store_true")
    arguments = parser.parse_args()
    model, tokenizer = mendlm.load(arguments.model)
    session = mendlm.Session(model, tokenizer, mendlm.Editor.load(arguments.editor, model, tokenizer))

    def say(prompt: str) -> str:
        return " ".join(session.answer(prompt, chat=arguments.chat, max_new_tokens=12).split())

    def mark(good: bool) -> str:
        return "✓" if good else "✗"

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("`", "'") or "(nothing)"

    print("| prompt → target | | the edited model | | to a rephrasing | | to a neighbour, before → under the edit |")
    print("|---|---|---|---|---|---|---|")
    counts, kind = [0, 0, 0, 0], ""
    with Path(__file__).with_suffix(".tsv").open(encoding="utf-8") as file:
        for request in csv.DictReader(file, delimiter="\t"):
            if request["kind"] != kind:
                kind = request["kind"]
                print(f"| **{kind}** | | | | | | |")
            prompt, target, rephrasing, neighbour = list(request.values())[1:]
            before = say(neighbour)
            made = session.edit(prompt, target, chat=arguments.chat)
            said, again, after = say(prompt), say(rephrasing), say(neighbour)
            session.undo(made.id)
            good = [continues(said, target), continues(again, target), after == before]
            counts = [n + g for n, g in zip(counts, [*good, 1], strict=True)]
            change = cell(before) if after == before else f"{cell(before)} → {cell(after)}"
            shown = [f"{cell(prompt)} → {cell(target)}", mark(good[0]), cell(said), mark(good[1])]
            shown += [f"{cell(rephrasing)} {cell(again)}", mark(good[2]), f"{cell(neighbour)} {change}"]
            print("|", " | ".join(shown), "|", flush=True)
    took, spread, stayed, all_of_them = counts
    print(f"\n{took} of {all_of_them} edits took, {spread} rephrasings followed, {stayed} neighbours kept all 12 tokens.")


if __name__ == "__main__":
    main()
