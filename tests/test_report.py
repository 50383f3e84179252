from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mendlm.errors import FormatError, InputError
from mendlm.report import find, write

INTERVAL = {"before": 0.0, "after": 0.8, "low": 0.7, "high": 0.9}
CELL: dict[str, Any] = {
    "format": "mendlm-summary-1",
    "data": "zsre:a.json",
    "method": "mend",
    "chat": False,
    "sequential": False,
    "scale": 1.0,
    "num_edits": 1,
    "count": 1200,
    "command": "mendlm compare <b>",
    **dict.fromkeys(("success", "generality", "edit_success", "success_generated", "locality"), INTERVAL),
    "perplexity": {"before": 20.0, "after": 21.0},
    "drawdown_acc": 0.01,
    "edit_ms": {"p50": 12.0, "p95": 20.0},
    "peak_memory_mb": 900.0,
}


def cell(**other: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CELL), **other}


def put(folder: Path, *cells: dict[str, Any]) -> Path:
    for number, one in enumerate(cells):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "summary.json").write_text(json.dumps(one))
    return folder


def test_a_report_holds_every_cell_in_order_and_needs_nothing_else(tmp_path: Path) -> None:
    nothing = {"before": None, "after": None, "low": None, "high": None}
    cells = [
        cell(method="mend", num_edits=25),
        cell(method="ft", drawdown_acc=None, perplexity={"before": None, "after": None}),
        cell(locality=nothing, edit_ms={"p50": None, "p95": None}),
        cell(data="counterfact:b.json", chat=True),
    ]
    found = find([put(tmp_path / "a", *cells[:2]), put(tmp_path / "b", *cells[2:])])
    keys = [(c["data"], c["method"], c["num_edits"]) for c in found]
    assert keys == [
        ("counterfact:b.json", "mend", 1),
        ("zsre:a.json", "ft", 1),
        ("zsre:a.json", "mend", 1),
        ("zsre:a.json", "mend", 25),
    ]
    written = write(found, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(table) == 2 + 4
    assert "| counterfact:b.json, chat | mend | 1 | 1,200 | 0.800 (0.700 to 0.900) |" in table[2]
    assert table[3].endswith("| - | - | 12 |")
    assert table[4].endswith("| - | +0.0100 | 20.00 → 21.00 | - |")
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == found
    pictures = sorted(path.name for path in written if path.suffix == ".png")
    assert pictures == [
        "cost-1.png", "cost-2.png", "over-edits-2.png", "success-over-accuracy-1.png", "success-over-accuracy-2.png",
        "success-over-perplexity-1.png", "success-over-perplexity-2.png",
    ]  # fmt: skip
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == len(pictures)
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|<link", page)
    assert "compare &lt;b&gt;" in page
    assert "<b>" not in page


def test_a_folder_without_results_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no summary\.json"):
        find([tmp_path])
    with pytest.raises(FormatError, match="is no summary of mendlm's"):
        find([put(tmp_path / "a", {"format": "other"})])
