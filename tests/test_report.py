from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot

from mendlm.errors import FormatError, InputError, MendError
from mendlm.report import FAR, draw, find, table, write

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
    "already_given": 3,
    "command": "mendlm compare <b>",
    **dict.fromkeys(("success", "success_of_new", "generality", "edit_success", "success_generated", "locality"), INTERVAL),
    "perplexity": {"before": 20.0, "after": 21.0},
    "drawdown_acc": 0.01,
    "edit_ms": {"p50": 12.0, "p95": 20.0},
    "peak_memory_mb": 900.0,
}


def cell(**other: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CELL), **other}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are drawn, instead of their files."""
    figures: list[Any] = []
    monkeypatch.setattr("mendlm.report._png", lambda figure: figures.append(figure) or b"")
    yield figures
    pyplot.close("all")


def put(folder: Path, *cells: dict[str, Any]) -> Path:
    for number, one in enumerate(cells):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "summary.json").write_text(json.dumps(one))
    return folder


def test_a_report_holds_every_cell_in_order_and_needs_nothing_else(tmp_path: Path) -> None:
    nothing = {"before": None, "after": None, "low": None, "high": None}
    cells = [
        cell(method="mend", num_edits=25, success={**INTERVAL, "before": 0.05}),
        cell(method="ft", drawdown_acc=None, perplexity={"before": None, "after": None}),
        cell(locality=nothing, edit_ms={"p50": None, "p95": None}),
        cell(data="counterfact:b.json", chat=True, edit_ms={"p50": 0.11, "p95": 0.2}),
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
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 4
    assert "| counterfact:b.json, chat | mend | 1 | 1,200 | 3 | 0.000 → 0.800 (0.700 to 0.900) |" in lines[2]
    assert lines[2].endswith("| < 1 |")
    assert lines[3].endswith("| - | - | 12 |")
    assert "| mend | 25 | 1,200 | 3 | 0.050 → 0.800 (0.700 to 0.900) | 0.000 → 0.800" in lines[5]
    assert lines[4].endswith("| - | +0.0100 | 20.00 → 21.00 | - |")
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
    with pytest.raises(InputError, match="holds no summary; give folders that `mendlm eval` or `compare` has written"):
        find([tmp_path])
    with pytest.raises(FormatError, match="not a summary of the format mendlm-summary-1"):
        find([put(tmp_path / "a", {"format": "other"})])
    with pytest.raises(FormatError, match="but 'mendlm-summary-9'"):
        find([put(tmp_path / "b", cell(format="mendlm-summary-9"))])


@pytest.mark.parametrize("name", [name for name in CELL if name not in ("format", "command")])
@pytest.mark.parametrize("value", ["lost", None, {}, "kept"])
def test_a_damaged_summary_is_named_with_what_is_wrong(tmp_path: Path, name: str, value: object) -> None:
    damaged = {key: one for key, one in cell().items() if key != name} if value == "lost" else cell(**{name: value})
    if value == "kept":
        damaged = cell()
    folder = put(tmp_path / "a", damaged)
    if value == "kept" or (name, value) == ("drawdown_acc", None):
        write(find([folder]), tmp_path / "out")
        return
    with pytest.raises(FormatError, match=rf"summary.json is damaged, at '{name}"):
        find([folder])


def test_a_folder_in_place_of_a_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "a" / "summary.json").mkdir(parents=True)
    with pytest.raises(FormatError, match="cannot be read"):
        find([tmp_path / "a"])


def test_a_cell_counts_once_and_one_that_is_being_written_not_at_all(tmp_path: Path) -> None:
    put(tmp_path / "a", cell(), cell(method="ft"))
    put(tmp_path / "a" / ".b.x1", cell(method="half"))
    assert [c["method"] for c in find([tmp_path, tmp_path / "a", tmp_path / "a" / "0"])] == ["ft", "mend"]


def test_notes_on_the_data_stand_below_the_table_once(tmp_path: Path) -> None:
    cells = [
        cell(data_notes=["rephrasings are made by <rule>"]),
        cell(method="ft", data_notes=["rephrasings are made by <rule>"]),
    ]
    written = {path.name: path for path in write(cells, tmp_path)}
    assert written["table.md"].read_text().endswith("|\n\n- zsre:a.json: rephrasings are made by <rule>\n")
    assert "<li>zsre:a.json: rephrasings are made by &lt;rule&gt;</li>" in written["report.html"].read_text()


def test_a_huge_perplexity_is_short_and_stands_at_the_pictures_edge(drawn: list[Any]) -> None:
    cells = [cell(), cell(method="cache", perplexity={"before": 20.0, "after": 1e304}),
             cell(method="lora", perplexity={"before": 20.0, "after": 60.0})]  # fmt: skip
    assert "| 20.00 → 1.0e+304 |" in table(cells)
    (picture,) = (figure for name, figure in zip(dict(draw(cells)), drawn, strict=True) if "perplexity" in name)
    (axis,) = picture.axes
    assert axis.get_xlim()[1] == pytest.approx(2.5)
    assert [text.get_text() for text in axis.texts] == ["5.0e+302 times →"]
    list(draw([cell(perplexity={"before": 20.0, "after": 1e304})]))
    assert drawn[-2].axes[0].get_xlim()[1] == FAR


def test_methods_can_be_told_apart_by_their_es(drawn: list[Any]) -> None:
    cells = [cell(method=f"method {i}", edit_success={**INTERVAL, "after": i / 30}) for i in range(25)]
    list(draw(cells))
    (axis,) = drawn[0].axes
    points = [container.lines[0] for container in axis.containers]
    assert [float(point.get_ydata()[0]) for point in points] == pytest.approx([i / 30 for i in range(25)])
    assert len({(point.get_marker(), point.get_color()) for point in points}) == 25


def test_a_file_of_many_summaries_is_read(tmp_path: Path) -> None:
    cells = [cell(method="ft"), cell()]
    write(cells, tmp_path / "a")
    (tmp_path / "part.json").write_text(json.dumps({"part": "many", "cells": cells}))
    (tmp_path / "one.json").write_text(json.dumps(cells[1]))
    for places in (["a/table.json"], ["part.json"], ["part.json", "a/table.json", "one.json"]):
        assert find([tmp_path / place for place in places]) == cells
    assert find([tmp_path / "one.json"]) == cells[1:]
    for content, problem in (
        ("[]", "holds no summary"),
        ('{"cells": 3}', "holds no summary"),
        ("[1]", "is not a summary"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(MendError, match=problem):
            find([tmp_path / "bad.json"])


def test_memory_is_that_of_an_edit_where_all_cells_have_it(drawn: list[Any]) -> None:
    for cells, title, shown in (
        ([cell(edit_memory_mb=3.0), cell(edit_memory_mb=5.0)], "memory of one edit, at its peak", [3, 5]),
        ([cell(edit_memory_mb=3.0), cell()], "memory of scoring all, at its peak", [900, 900]),
    ):
        list(draw(cells))
        axis = drawn[-1].axes[1]
        assert (axis.get_title(), [bar.get_width() for bar in axis.patches]) == (title, shown)


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    line = table([cell(data="zsre:a|b.json")]).splitlines()[2]
    assert line.startswith("| zsre:a\\|b.json | mend |")
    assert "| 1,200 | 3 | 0.000 → 0.800" in line


def test_edits_made_in_turn_show_what_became_of_the_first(drawn: list[Any]) -> None:
    made, left = {**INTERVAL, "after": 0.95}, {**INTERVAL, "after": 0.4}
    turns = [
        cell(num_edits=count, sequential=True, success_when_made=made, success_of_earlier=left, success_of_later=INTERVAL)
        for count in (5, 25)
    ]
    head, _, *lines = table([cell(), *turns]).splitlines()
    assert "| locality | success when made | of the earlier half |" in head
    assert "| - | - | +0.0100 |" in lines[0]
    assert all("| 0.000 → 0.950 (0.700 to 0.900) | 0.000 → 0.400 (0.700 to 0.900) |" in line for line in lines[1:])
    assert "when made" not in table([cell()])
    pictures = dict(zip(dict(draw(turns)), drawn, strict=True))
    lines = {line.get_label(): list(line.get_ydata()) for line in pictures["over-edits-1"].axes[0].lines}
    assert lines["mend, when made"] == [0.95, 0.95]


def test_what_was_rehearsed_or_made_on_the_base_is_told_apart() -> None:
    settings: tuple[dict[str, Any], ...] = ({}, {"on_base": True}, {"on_base": True, "rehearse": 40})
    turns = [cell(num_edits=5, sequential=True, **more) for more in settings]
    names = [line.split(" | ")[1] for line in table(turns).splitlines()[2:]]
    assert sorted(names) == ["mend", "mend, on the base", "mend, on the base, rehearsed"]


def test_models_and_edits_in_turn_are_told_apart(drawn: list[Any]) -> None:
    models = [cell(model=name, model_sha256=name * 64) for name in ("a", "b")]
    assert [line.split(" | ")[0] for line in table(models).splitlines()[2:]] == ["| a: zsre:a.json", "| b: zsre:a.json"]
    assert {"success-over-accuracy-1", "success-over-accuracy-2"} <= dict(draw(models)).keys()
    drawn.clear()
    turns = [cell(num_edits=count, sequential=turn and count > 1) for turn in (False, True) for count in (1, 5)]
    pictures = dict(zip(dict(draw(turns)), drawn, strict=True))
    axes = pictures["over-edits-1"].axes
    drawdowns = ["drawdown: accuracy lost", "drawdown: rise of the perplexity"]
    assert [axis.get_title() for axis in axes] == ["success", "generality", "locality", *drawdowns]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["mend", "mend, in turn"]
    assert {axis.get_xlabel() for axis in axes} == {"edits"}
