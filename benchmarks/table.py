"""The results that benchmarks/quality.sh left in a folder, as the Markdown table of docs/results.md.

python benchmarks/table.py OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

from mendlm.files import read_json
from mendlm.report import value

COLUMNS = ("success", "generality", "success_generated", "generality_generated", "locality")


def main(folder: str) -> None:
    print("| | edits | success | generality | success, generated | generality, generated | locality | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for path in sorted(Path(folder).glob("*/summary.json")):
        summary = read_json(path)
        ppl = summary["perplexity"]
        change = (
            "-"
            if ppl["after"] is None
            else f"{ppl['before']:.2f} → {ppl['after']:.2f} ({ppl['after'] / ppl['before'] - 1:+.1%})"
        )
        cells = [path.parent.name, f"{summary['count']:,}", *(value(summary[name]) for name in COLUMNS), change]
        print("|", " | ".join(cells), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
