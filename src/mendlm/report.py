"""Result files become tables and pictures. Reads `summary.json` files only: no model, no method, no data.

A *cell* is one summary: one method on one data set at one number of edits at once. Writes `table.md`, `table.json`, PNG
pictures, and `report.html`, one page that holds all of it and needs nothing else.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic

from mendlm.errors import FormatError, InputError, require
from mendlm.files import read_json, storing, write_bytes
from mendlm.metrics import FORMAT


@dataclass(frozen=True)
class Value:
    """A mean over edits with its interval, and what it was before; None of nothing."""

    after: float | None
    low: float | None
    high: float | None
    before: float | None = None


@dataclass(frozen=True)
class Sides:
    """A number before and after."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class Time:
    """Milliseconds of one edit."""

    p50: float | None


@dataclass(frozen=True)
class Cell:
    """What a report needs of a summary."""

    data: str
    method: str
    chat: bool
    sequential: bool
    scale: float
    num_edits: Annotated[int, pydantic.Field(ge=1)]
    count: int
    already_given: int
    success: Value
    success_of_new: Value
    generality: Value
    edit_success: Value
    success_generated: Value
    locality: Value
    drawdown_acc: float | None
    perplexity: Sides
    edit_ms: Time
    peak_memory_mb: float
    drawdown_acc_interval: tuple[float | None, float | None] = (None, None)
    drawdown_ppl_interval: tuple[float | None, float | None] = (None, None)
    edit_memory_mb: float | None = None
    data_notes: tuple[str, ...] = ()
    success_when_made: Value | None = None
    success_of_earlier: Value | None = None


FAR = 10.0
"""A rise of the perplexity, as a factor, beyond which a method stands at a picture's edge: it would hide all others."""
COLUMNS = {
    "success": "success",
    "success_of_new": "success of new",
    "generality": "generality",
    "edit_success": "ES",
    "success_generated": "success, generated",
    "locality": "locality",
}
"""Keys of a summary that hold a value with an interval -> what a table calls them."""
IN_TURN = {"success_when_made": "success when made", "success_of_earlier": "of the earlier half"}
"""The same of edits made one after another: right after each, and of those made first, after all."""


def find(places: Sequence[Path]) -> list[dict[str, Any]]:
    """Every summary under some folders, or in files of many, by data, method and number of edits.

    Such a file is a list of them, as `write` makes one, or an object that holds one as `cells`. What is found twice counts
    once. Raises `InputError` for a place that has none, and as `read`.
    """
    cells: list[dict[str, Any]] = []
    for place in places:
        if place.is_file():
            content = read_json(place)
            found = content.get("cells", [content]) if isinstance(content, dict) else content
            listed = [_checked(one, str(place)) for one in (found if isinstance(found, list) else [])]
        else:
            paths = sorted(place.rglob("summary.json"))
            listed = [read(path) for path in paths if not _hidden(path.relative_to(place))]
        if not listed:
            raise InputError(
                f"{place} holds no summary; give folders that `mendlm eval` or `compare` has written, or a table.json"
            )
        cells += [cell for cell in listed if cell not in cells]
    data = _data(cells)
    return sorted(cells, key=lambda cell: (data(cell), cell["chat"], cell["method"], cell["num_edits"], cell["sequential"]))


def _data(cells: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """What tells a cell's data from other cells': its name, behind the base model's where there are several."""
    several = len({cell.get("model_sha256") for cell in cells}) > 1
    return lambda cell: f"{cell.get('model')}: {cell['data']}" if several else str(cell["data"])


def _hidden(path: Path) -> bool:
    """Whether a path leads through a folder whose name begins with a dot, as one that is still being written has."""
    return any(part.startswith(".") for part in path.parts)


def read(path: Path) -> dict[str, Any]:
    """One summary. Raises `FormatError` if the file is damaged, or not a summary of this version's."""
    return _checked(read_json(path), str(path))


def _checked(content: Any, where: str) -> dict[str, Any]:
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise FormatError(f"{where} is not a summary of the format {FORMAT}" + (f", but {found!r}" if found else ""))
    try:
        pydantic.TypeAdapter(Cell).validate_python(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise FormatError(f"{where} is damaged, at '{field}': {first['msg']}; make it again") from None
    cell: dict[str, Any] = content
    return cell


def write(cells: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Write table, pictures and page into a folder; returns what was written."""
    written: dict[str, bytes] = {
        "table.md": table(cells).encode(),
        "table.json": (json.dumps(cells, indent=1, ensure_ascii=False) + "\n").encode(),
    }
    pictures = dict(draw(cells))
    written |= {f"{name}.png": content for name, content in pictures.items()}
    written["report.html"] = page(cells, pictures).encode()
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
    for name, content in written.items():
        write_bytes(out / name, content)
    return [out / name for name in written]


def rows(cells: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The table's rows, the head first: the same cells whether they go into Markdown or a page."""
    last = ("drawdown, acc", "perplexity", "ms an edit")
    columns = COLUMNS | (IN_TURN if any(name in cell for cell in cells for name in IN_TURN) else {})
    yield ["data", "method", "edits at once", "edits", "given already", *columns.values(), *last]
    data = _data(cells)
    for cell in cells:
        chat = ", chat" if cell["chat"] else ""
        ppl, acc, time = cell["perplexity"], cell["drawdown_acc"], cell["edit_ms"]["p50"]
        change = f"{short(ppl['before'])} → {short(ppl['after'])}" if ppl["before"] is not None else "-"
        yield [
            f"{data(cell)}{chat}",
            _name(cell, chat=False),
            f"{cell['num_edits']}{', in turn' if cell['sequential'] else ''}",
            f"{cell['count']:,}",
            f"{cell['already_given']:,}",
            *(value(cell[name]) if name in cell else "-" for name in columns),
            f"{acc:+.4f}" if acc is not None else "-",
            change,
            "-" if time is None else f"{time:.0f}" if time >= 0.5 else "< 1",
        ]


def short(value: float, digits: int = 2, sign: str = "") -> str:
    """A number as a table shows it: one beyond a million by its power of ten."""
    return f"{value:{sign}.{digits}f}" if abs(value) < 1e6 else f"{value:{sign}.1e}"


def notes(cells: Sequence[dict[str, Any]]) -> list[str]:
    """What must be said about the data: what is not published but made here, and how."""
    return list(dict.fromkeys(f"{cell['data']}: {note}" for cell in cells for note in cell.get("data_notes", ())))


def value(metric: dict[str, Any]) -> str:
    """A mean with its 95 % interval, behind that of the base model where there is one, as a table shows it."""
    if None in (metric["after"], metric["low"], metric["high"]):
        return "-"
    before = f"{metric['before']:.3f} → " if metric.get("before") is not None else ""
    return f"{before}{metric['after']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


def table(cells: Sequence[dict[str, Any]], *, without: Sequence[str] = ()) -> str:
    """All cells as a Markdown table, with 95 % intervals, and the data's notes; `without` some of its columns."""
    head, *body = rows(cells)
    shown = [place for place, column in enumerate(head) if column not in without]
    lines = [[line[place].replace("|", "\\|") for place in shown] for line in (head, ["---"] * len(head), *body)]
    below = [f"- {note}\n" for note in notes(cells)]
    return "".join([*(f"| {' | '.join(line)} |\n" for line in lines), *(["\n"] if below else []), *below])


def draw(cells: Sequence[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """The pictures, as names and PNG files."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    for number, (data, mine) in enumerate(_by(cells, _data(cells)).items(), start=1):
        least = min(cell["num_edits"] for cell in mine)
        for name, x, label in (
            ("accuracy", _loss, "drawdown: accuracy lost on unrelated answers"),
            ("perplexity", _rise, "drawdown: rise of the perplexity, as a share of the base's"),
        ):
            drawdowns = [(cell, x(cell)) for cell in mine if cell["num_edits"] == least]
            points = [(cell, value) for cell, value in drawdowns if value is not None]
            if points:
                figure, axis = plt.subplots(figsize=(7.5, 4))
                near = [value for _, value in points if value <= FAR]
                edge = 1.25 * max([*near, 0.0]) or FAR
                # Nine markers for ten colours: ninety points that look different.
                for (cell, value), marker in zip(points, itertools.cycle("osD^v<>PX"), strict=False):
                    reached = cell["edit_success"]
                    look: dict[str, Any] = {"marker": marker, "ls": "", "capsize": 3, "label": _name(cell)}
                    if value > FAR:
                        said, place = f"{short(1 + value, 0)} times →", (edge, reached["after"])
                        axis.annotate(said, place, ha="right", va="center", textcoords="offset points", xytext=(-8, 0))
                        value, across, look["clip_on"] = edge, None, False
                    else:
                        across = _across(cell, name, value)
                    axis.errorbar(value, reached["after"], _bars(reached), across, **look)
                axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
                axis.set(title=data, xlabel=label, ylabel="ES: success on prompt and rephrasings", ylim=(-0.03, 1.05))
                if len(near) < len(points):
                    axis.set_xlim(right=edge)
                yield f"success-over-{name}-{number}", _png(figure)
        if len({cell["num_edits"] for cell in mine}) > 1:
            yield f"over-edits-{number}", _png(_over_edits(data, mine))
        figure, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(mine) + 1.5), sharey=True)
        labels = [f"{_name(cell)}, {cell['num_edits']} {'in turn' if cell['sequential'] else 'at once'}" for cell in mine]
        axes[0].barh(range(len(mine)), [cell["edit_ms"]["p50"] or 0 for cell in mine], tick_label=labels)
        axes[0].set(title="one edit", xlabel="ms")
        measured = all(cell.get("edit_memory_mb") is not None for cell in mine)  # an older summary has the whole peak alone
        axes[1].barh(range(len(mine)), [cell["edit_memory_mb" if measured else "peak_memory_mb"] for cell in mine])
        axes[1].set(title=f"memory of {'one edit' if measured else 'scoring all'}, at its peak", xlabel="MiB")
        yield f"cost-{number}", _png(figure)


def _over_edits(data: str, mine: Sequence[dict[str, Any]]) -> Any:
    """The figure of one data set's cells over the number of edits, a line a method."""
    import matplotlib.pyplot as plt

    losses = {"accuracy lost": ("accuracy", _loss), "rise of the perplexity": ("perplexity", _rise)}
    losses = {title: loss for title, loss in losses.items() if any(loss[1](cell) is not None for cell in mine)}
    figure, axes = plt.subplots(1, 3 + len(losses), figsize=(11.25 + 3.75 * len(losses), 4), sharex=True)
    ways = {cell["sequential"] for cell in mine if cell["num_edits"] > 1}  # a single edit is neither in turn nor at once
    both = len(ways) > 1
    for method, line in _by(mine, lambda cell: _name(cell) + ", in turn" * (both and cell["sequential"])).items():
        for axis, key in zip(axes, ("success", "generality", "locality"), strict=False):
            shown = [cell for cell in line if cell[key]["after"] is not None]
            counts, values = [c["num_edits"] for c in shown], [c[key]["after"] for c in shown]
            bars = [[_bars(c[key])[side][0] for c in shown] for side in (0, 1)]
            axis.errorbar(counts, values, yerr=bars, marker="o", capsize=3, label=method)
            axis.set(title=key, ylim=(-0.03, 1.05))
        made = [(c["num_edits"], c["success_when_made"]["after"]) for c in line if "success_when_made" in c]
        if made:
            color = axes[0].lines[-1].get_color()
            axes[0].plot(*zip(*made, strict=True), ls=":", color=color, label=f"{method}, when made")
        for axis, (title, (name, loss)) in zip(axes[3:], losses.items(), strict=True):
            found = [(c, lost) for c in line if (lost := loss(c)) is not None]
            spread = [_across(c, name, lost) for c, lost in found]
            bars = [[one[side][0] for one in spread] for side in (0, 1)]
            axis.errorbar([c["num_edits"] for c, _ in found], [lost for _, lost in found], bars, marker="o", capsize=3)
            axis.set(title=f"drawdown: {title}")
    for axis in axes:
        axis.set(xlabel="edits" if both else "edits in turn" if True in ways else "edits at once", xscale="log")
        axis.set_xticks(sorted({cell["num_edits"] for cell in mine}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:.0f}")
    axes[0].legend()
    figure.suptitle(data)
    return figure


def write_sweep(result: dict[str, Any], out: Path) -> list[Path]:
    """Write a sweep's table, numbers and picture into a folder; returns what was written."""
    head = [result["sweep"], "success", "generality", "locality", "ms a training edit"]
    lines = [head, ["---"] * len(head)]
    for point, scores in result["values"].items():
        lines.append([point, *(f"{scores[name]:.3f}" for name in head[1:4]), f"{1000 * scores['seconds_per_edit']:.0f}"])
    written = {
        "sweep.md": "".join(f"| {' | '.join(line)} |\n" for line in lines).encode(),
        "sweep.json": (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode(),
        "sweep.png": draw_sweep(result),
    }
    for name, content in written.items():
        write_bytes(out / name, content)
    return [out / name for name in written]


def draw_sweep(result: dict[str, Any]) -> bytes:
    """A sweep as a PNG: scores and cost of each value, and what each trades of success for locality."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    points, values = list(result["values"]), list(result["values"].values())
    figure, (scores, trade) = plt.subplots(1, 2, figsize=(12, 4.2))
    for name in ("success", "generality", "locality"):
        bars = [1.96 * (value[name] * (1 - value[name]) / value["count"]) ** 0.5 for value in values]
        scores.errorbar(points, [value[name] for value in values], bars, marker="o", capsize=3, label=name)
    cost = scores.twinx()
    cost.bar(points, [1000 * value["seconds_per_edit"] for value in values], alpha=0.2, color="gray")
    cost.set_ylabel("ms a training edit (bars)")
    scores.set(xlabel=result["sweep"], ylim=(0, 1), title=f"after {result['length']}, {values[0]['count']} requests scored")
    scores.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=3)
    for name in ("success", "generality"):
        trade.plot([value["locality"] for value in values], [value[name] for value in values], marker="o", label=name)
    for point, value in zip(points, values, strict=True):
        where = value["locality"], value["generality"]
        trade.annotate(point, where, textcoords="offset points", xytext=(5, -11))
    trade.set(xlabel="locality", ylim=(0, 1), title=f"what each of {result['sweep']} trades")
    trade.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2)
    return _png(figure)


def _by(cells: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _name(cell: dict[str, Any], *, chat: bool = True) -> str:
    """A method, with what is not as usual about how it was used."""
    parts = [
        cell["method"],
        "chat" if chat and cell["chat"] else "",
        f"strength {cell['scale']:g}" if cell["scale"] != 1 else "",
        "on the base" if cell.get("on_base") else "",
        "rehearsed" if cell.get("rehearse") else "",
    ]
    return ", ".join(filter(None, parts))


def _loss(cell: dict[str, Any]) -> float | None:
    lost: float | None = cell["drawdown_acc"]
    return lost


def _rise(cell: dict[str, Any]) -> float | None:
    before, after = cell["perplexity"]["before"], cell["perplexity"]["after"]
    return None if None in (before, after) else after / before - 1


def _across(cell: dict[str, Any], name: str, value: float) -> list[list[float]]:
    """Error bars of a drawdown; none where the summary, an older one, has no interval."""
    acc, ppl = cell.get("drawdown_acc_interval"), cell.get("drawdown_ppl_interval")
    low, high = (acc if name == "accuracy" else ppl) or (None, None)
    if low is None or high is None:
        return [[0.0], [0.0]]
    if name == "perplexity":
        low, high = low / cell["perplexity"]["before"], high / cell["perplexity"]["before"]
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _bars(value: dict[str, Any]) -> list[list[float]]:
    return [[max(0.0, value["after"] - value["low"])], [max(0.0, value["high"] - value["after"])]]


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def page(cells: Sequence[dict[str, Any]], pictures: dict[str, bytes]) -> str:
    """One HTML page with the table, the pictures and where each row came from; it loads nothing."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows(cells))
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in body]
    images = [
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in pictures.items()
    ]
    sources = [f"<li><code>{html.escape(str(cell.get('command', '-')))}</code></li>" for cell in cells]
    below = "".join(f"<li>{html.escape(note)}</li>" for note in notes(cells))
    style = (
        "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #bbb;padding:.2em .5em;text-align:left}img{max-width:100%;display:block;margin:1em 0}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>mendlm: results</title><style>{style}</style>'
        f"<h1>Results</h1><p>In brackets 95 % bootstrap intervals over edits.</p><table>{''.join(lines)}</table>"
        f"<ul>{below}</ul>{''.join(images)}<h2>Commands</h2><ol>{''.join(sources)}</ol></html>\n"
    )
