"""Run every benchmark, gather what they found in one file, and put it into the pages of docs/ as tables and pictures.

    python benchmarks/run_all.py [--data-dir DIR] [--only floor training ...] [--tables | --toy]

Each script runs in a process of its own and writes its own JSON; `benchmarks/results/all-KIND.json` holds them together. With
`--tables` nothing runs: tables and pictures are made again from the files. With `--toy` all run in the smallest sizes, in one
process, which says nothing but that they run; give it a tiny model, and a copy of docs/ by `--docs`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEASURED = ("20m", "60m", "100m", "270m")
"""Shapes that any device measures, for what grows with the model's size."""
KINDS = ("cpu", "cuda")
"""What results are named by."""
SHAPES = ("1b", "7b", "t5-11b", "13b", "20b")
TOY_SHAPES = ("toy", "toy-t5")
SMALL_EDITOR = ("--rank", "256", "--batch", "16")
"""The editor and the batch of the measured shapes; the large ones have the paper's rank."""
TOY: dict[str, tuple[str, ...]] = {
    "floor": ("--batch", "4"),
    "training": ("--batch", "8", "--oracle-edits", "2"),
    "editing": ("--editor", "none", "--requests", "8"),
    "batches": ("--sizes", "1,4", "--counts", "2,4"),
    "replay": ("--texts", "4"),
    "memory": ("--batch", "4"),
    "startup": ("--no-demo",),
    "applying": ("--tokens", "4"),
    "quantised": ("--editor", "none", "--limit", "2"),
    "scale": ("--rank", "8", "--batch", "4", "--steps", "1", "--edits", "2"),
}
"""Every script, and its options for `--toy`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=TOY, default=list(TOY))
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--tables", action="store_true", help="run nothing")
    how.add_argument("--toy", action="store_true", help="the smallest sizes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    kind = "cuda" if (arguments.device or default_device()).startswith("cuda") else "cpu"
    for name, options in () if arguments.tables else commands(arguments, kind):
        run(name, *options, toy=arguments.toy)
    found = {each: results(arguments.out, each) for each in KINDS}
    if not found[kind]:
        raise SystemExit(f"{arguments.out} holds no results of the kind '{kind}'; run the benchmarks first, or name --device")
    (arguments.out / f"all-{kind}.json").write_text(json.dumps(found[kind], indent=1) + "\n")
    publish(found, kind, arguments.docs)


def commands(arguments: argparse.Namespace, kind: str) -> Iterator[tuple[str, list[str]]]:
    """Scripts with their options, in the order in which they run."""
    shape = ["--shape", "toy" if arguments.toy else "1b"]
    for name in arguments.only:
        toy = TOY[name] if arguments.toy else ()
        common = ["--out", str(arguments.out), *(["--device", arguments.device] if arguments.device else []), *toy]
        if name == "scale":
            yield from ((name, [*one, *common]) for one in shapes(toy=arguments.toy))
            continue
        data = ["--data-dir", str(arguments.data_dir)] if arguments.data_dir and name not in ("startup", "replay") else []
        model, rounds = ["--model", arguments.model], ["--rounds", "1" if arguments.toy else str(arguments.rounds)]
        yield name, [*model, *rounds, *common, *data]
        if name == "floor":
            yield name, [*shape, *rounds, *common, "--batch", "4"]
        if name == "memory":
            yield name, [*model, "--micro-batch", "8", *common, *data]
            for size in (["64"], ["10"]) if arguments.toy else (["64"], ["64", "--micro-batch", "8"], ["10"]):
                yield name, [*shape, *common, "--batch", *size]  # the paper's steps have 10 requests
        if name == "training" and (arguments.toy or kind == "cuda"):  # on a CPU the oracle would take hours
            yield name, [*shape, *rounds, *common]


def shapes(*, toy: bool) -> Iterator[list[str]]:
    """All shapes, in bf16, the large ones in NF4 too, there also with 8 requests of a step in memory at a time."""
    for shape in () if toy else MEASURED:
        yield ["--shape", shape, *SMALL_EDITOR]
    for more in ([], ["--quantize", "nf4"], *([] if toy else [["--quantize", "nf4", "--micro-batch", "8"]])):
        for shape in TOY_SHAPES if toy else SHAPES:
            yield ["--shape", shape, *more]


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(name: str, *options: str, toy: bool) -> None:
    """One script, in a process of its own; a toy in this one, since imports take longer than it does."""
    print(f"== {name} {' '.join(options)}", flush=True)
    script = str(HERE / f"{name}.py")
    if toy:
        sys.argv = [script, *options]
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
        return
    check = name != "scale"  # a large one may not fit
    subprocess.run([sys.executable, script, *options], check=check, stdout=subprocess.DEVNULL)


def results(folder: Path, kind: str) -> dict[str, Any]:
    """What the scripts found on one kind of device, by name."""
    shapes = (f"scale-{shape}{form}" for shape in (*TOY_SHAPES, *MEASURED, *SHAPES) for form in ("", "-nf4", "-nf4-by-8"))
    of_shapes = (f"{name}-{shape}" for name in ("floor", "training", "memory") for shape in ("toy", "1b"))
    of_batches = ("memory-by-8", *(f"memory-{shape}-{of}" for shape in ("toy", "1b") for of in ("by-8", "of-10")))
    names = [*(name for name in TOY if name != "scale"), *of_shapes, *of_batches, *shapes]
    paths = {name: folder / f"{name}-{kind}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def publish(kinds: dict[str, dict[str, Any]], shown: str, docs: Path) -> None:
    """Replace what stands between the pages' marks `<!-- name -->` and `<!-- end -->` by tables of the results, and draw.

    What one kind of device found is shown; its ratios stand beside the other's, and large shapes are as a card measured them.
    """
    large = {name: result for name, result in kinds["cuda"].items() if name.startswith("scale-") and "peak_gb" in result}
    found = kinds[shown] | {name: result for name, result in large.items() if result["shape"] in SHAPES}
    tables = {name: table(found) for name, table in TABLES.items()} | {"claims": claims_table(kinds)}
    for page in (docs / "performance.md", docs / "results.md"):
        text = page.read_text(encoding="utf-8")
        for name, rows in tables.items():
            before, mark, rest = text.partition(f"<!-- {name} -->\n")
            if mark and rows:
                text = before + mark + rows + "<!-- end -->" + rest.partition("<!-- end -->")[2]
        page.write_text(text, encoding="utf-8")
    for name, picture in PICTURES.items():
        figure = picture(found)
        if figure is not None:
            path = docs / "images" / f"performance-{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, metadata={"Software": None})


def scale_table(found: dict[str, Any]) -> str:
    """Shapes by the forms of their base: memory, and what was measured where there was a device for it."""
    lines = [
        "| shape | base | memory of training, GB | fits | tera operations a request | measured |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        if name.startswith("scale-") and result["shape"] not in MEASURED:
            base = result["base"] + (f", {some} requests at a time" if (some := result.get("micro_batch")) else "")
            plan, cards = result["plan"], ", ".join(f"{card}" for card in result["plan"]["fits_gb"]) or "none of 16 to 80"
            measured = "computed only"
            if "peak_gb" in result:
                measured = (
                    f"{result['peak_gb']:.1f} GB, {result['seconds_per_step']['median']:.2f} s a step, "
                    f"{result['hours_for_100000_edits']:.2f} h for 100,000 edits, edit {result['edit_ms']['p50']:.0f} ms "
                    f"({result['machine']['device']})"
                )
            lines.append(
                f"| {result['shape']} | {base} | {plan['total'] / 1e9:.1f} | {cards} | {plan['flops'] / 1e12:.2f} "
                f"| {measured} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def sizes_table(found: dict[str, Any]) -> str:
    """The shapes that were measured here."""
    lines = [
        "| shape | base weights, MB | seconds a step | edits per second | peak memory, MB | the plan's | one edit, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in measured(found):
        plan, step = result["plan"], result["seconds_per_step"]["median"]
        lines.append(
            f"| {result['shape']} | {plan['base'] / 1e6:,.0f} | {step:.2f} | {result['edits_per_second']:.2f} "
            f"| {1000 * result['peak_gb']:,.0f} | {plan['total'] / 1e6:,.0f} | {result['edit_ms']['p50']:.0f} |"
        )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def measured(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of `MEASURED` shapes, and of toys."""
    return [found[f"scale-{shape}"] for shape in ("toy", *MEASURED) if f"scale-{shape}" in found]


def quantised_table(found: dict[str, Any]) -> str:
    """One editor's quality by the form of its base."""
    if "quantised" not in found:
        return ""
    names = ("success", "generality", "locality", "success_generated", "generality_generated")
    lines = [
        f"| weights | MB | edits of | {' | '.join(name.replace('_', ', ') for name in names)} | edit, ms (p50) |",
        "|---" * (len(names) + 4) + "|",
    ]
    tasks = found["quantised"]["data"]
    for kind, row in found["quantised"]["kinds"].items():
        for task in tasks:
            scores = [f"{row[task][n]['after']:.3f} ({row[task][n]['low']:.3f} to {row[task][n]['high']:.3f})" for n in names]
            cells = [kind, f"{row['bytes'] / 2**20:.0f}", task, *scores, f"{row[task]['edit_ms']['p50']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def floor_table(found: dict[str, Any]) -> str:
    """The floor by part."""
    if "floor" not in found:
        return ""
    floor = found["floor"]
    lines = ["| part | giga operations | at a rate of, GFLOP/s | ms |", "|---|---|---|---|"]
    for part, ms in floor["floor_ms_by_part"].items():
        rate = floor["giga_operations_per_second"]["editor" if part == "overlay" else part]
        lines.append(f"| {part} | {floor['giga_operations_per_edit'][part]:.2f} | {rate:.0f} | {ms:.1f} |")
    both = floor["ms_per_edit"]
    lines.append(f"| **floor**, **measured** | | | **{both['floor']:.1f}**, **{both['measured']:.1f}** |")
    return "\n".join(lines) + "\n"


CLAIMS: tuple[tuple[str, str, str, str], ...] = (
    ("floor", "share_of_floor", "the floor over a training edit as measured", "0.8"),
    ("floor", "cache_share_of_derived", "speed-up by the trunk cache, over the one that the floor derives", "0.8"),
    ("floor-1b", "cache_speed_up", "speed-up by the trunk cache in the 1B shape, its last 3 blocks edited", ""),
    ("floor-1b", "cache_share_of_derived", "the same over the one that the floor derives", "0.8"),
    ("training", "last 3 of 30 blocks.ratio", "training step over the oracle, last 3 blocks", "15"),
    ("training", "last 3 of 30 blocks.ratio_at_equal_dtype", "the same at equal dtype", ""),
    ("training", "last 3 of 30 blocks.ratio_with_trunk_cache", "the same with every text in the trunk cache", ""),
    ("training", "shipped blocks.ratio", "training step over the oracle, shipped blocks", ""),
    ("training-1b", "last 3 of 16 blocks.ratio", "training step over the oracle in the 1B shape, last 3 blocks", "100"),
    ("editing", "edit_over_floor", "one edit over one forward and one backward pass", "at most 1.5"),
    ("editing", "finished_over_floor", "the same, seen to have taken", ""),
    ("editing", "one_by_one_over_edit_many.256", "256 edits one by one over `edit_many`", "2"),
    ("editing", "one_by_one_over_edit_many.1000", "the same of 1,000", "2.5"),
    ("batches", "tenfold", "seconds for 1,000 edits over those for 100", "about 10"),
    (
        "batches",
        "peak_of_most_over_a_chunk",
        "peak memory of 1,000 edits over that of 256, a chunk, beyond the process",
        "about 1",
    ),
    ("batches", "saving_over_making", "saving edits over making them", ""),
    ("replay", "ratio", "a replayed pass over a full one, last 3 of 30 blocks", "at most 0.2"),
    ("memory", "peak_over_floor", "peak memory of training over process, base, editor state and one batch's activations", ""),
    ("memory", "peak_over_inference", "the same over inference of the same texts and the editor's state", "at most 1.3"),
    ("memory-by-8", "peak_over_inference", "the same, 8 requests of the step at a time", "at most 1.3"),
    ("memory-1b", "peak_over_inference", "the same in the 1B shape, all at a time", "at most 1.3"),
    ("memory-1b-by-8", "peak_over_inference", "the same in the 1B shape, 8 at a time", "at most 1.3"),
    ("memory-1b-of-10", "peak_over_inference", "the same in the 1B shape, 10 requests a step, as in the paper", "at most 1.3"),
    ("memory", "oracle_over_floor", "the oracle's peak over process, base, editor state and one batch's activations", ""),
    ("applying", "one_edit_overhead.1", "generation under one edit: time lost, batch 1", "at most 0.05"),
    ("applying", "one_edit_overhead.8", "the same, batch 8", "at most 0.05"),
    ("applying", "own_edits_overhead", "32 texts, each under its own edit: time lost", "at most 0.25"),
)


def claims_table(kinds: dict[str, dict[str, Any]]) -> str:
    """Each ratio on each kind of device that has results, beside its bar."""
    kinds = {kind: found for kind, found in kinds.items() if found}
    lines = [f"| ratio | {' | '.join(f'measured ({kind})' for kind in kinds)} | wanted |", "|---" * (len(kinds) + 2) + "|"]
    for script, key, what, bar in CLAIMS:
        values = [number(found.get(script), key) for found in kinds.values()]
        if any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.3g}" for value in values]
            lines.append(f"| {what} | {' | '.join(cells)} | {bar} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def number(result: Any, key: str) -> float | None:
    """What stands in a result under a path of names with dots between them; None where there is nothing."""
    for part in key.split("."):
        result = result.get(part) if isinstance(result, dict) else None
    return result


def drawing(panels: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(5.5 * panels, 4), layout="constrained")


def scale_picture(found: dict[str, Any]) -> Any:
    """Memory and operations over the size of the model, computed."""
    large = [result for name, result in found.items() if name.startswith("scale-") and result["shape"] not in MEASURED]
    large = [result for result in large if not result.get("micro_batch")]
    if not large:
        return None
    figure, (left, right) = drawing(2)
    for base, mark in (("bf16", "o"), ("nf4", "s")):
        plans = sorted(
            (r["plan"]["flops"], r["plan"]["total"], r["plan"]["base"], r["shape"]) for r in large if r["base"] == base
        )
        shapes = [row[3] for row in plans]
        (line,) = left.plot(shapes, [row[1] / 1e9 for row in plans], mark + "-", label=f"training, base in {base}")
        left.plot(shapes, [row[2] / 1e9 for row in plans], mark + ":", color=line.get_color(), label=f"its base alone, {base}")
        if base == "bf16":
            right.plot(shapes, [row[0] / 1e12 for row in plans], mark + "-")
    for card in (16, 24, 48, 80):
        left.axhline(card, color="0.85", linewidth=1, zorder=0)
        left.text(0, card, f"{card} GB", fontsize=8, color="0.5", va="bottom")
    left.set(title="memory of training, computed", ylabel="GB")
    left.legend(fontsize=8)
    right.set(title="operations of one training request", ylabel="tera operations", yscale="log")
    return figure


def sizes_picture(found: dict[str, Any]) -> Any:
    """Time and memory over the size of the model, measured."""
    rows = measured(found)
    if not rows:
        return None
    figure, (left, right) = drawing(2)
    size = [row["plan"]["base"] / 1e6 for row in rows]
    left.plot(size, [1000 / row["edits_per_second"] for row in rows], "o-", label="a training request")
    left.plot(size, [row["edit_ms"]["p50"] for row in rows], "s-", label="one edit")
    left.set(title="time, measured", ylabel="ms")
    right.plot(size, [1000 * row["peak_gb"] for row in rows], "o-", label="peak of training, measured")
    right.plot(size, [row["plan"]["total"] / 1e6 for row in rows], "s:", label="as the plan computes it")
    right.plot(size, size, ":", color="0.6", label="the base alone")
    right.set(title="memory", ylabel="MB")
    for side in (left, right):
        side.set(xlabel="weights of the base in bf16, MB", xscale="log", yscale="log")
        in_round_numbers(side)
        side.legend(fontsize=8)
    return figure


def in_round_numbers(side: Any) -> None:
    """Label logarithmic axes at 1, 2 and 5 of every power of ten, written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    for axis in (side.xaxis, side.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_locator(NullLocator())


def batches_picture(found: dict[str, Any]) -> Any:
    """Edits per second over the size of a batch, and seconds over the number of edits."""
    if "batches" not in found:
        return None
    figure, (left, right) = drawing(2)
    for key, label in (("edits_per_second", "edits made"), ("training_edits_per_second", "requests trained on")):
        rates = found["batches"][key]
        left.plot([int(size) for size in rates], list(rates.values()), "o-", label=label)
    left.set(title="edits per second", xlabel="requests a batch", xscale="log", yscale="log")
    in_round_numbers(left)
    left.legend(fontsize=8)
    seconds = {int(count): value for count, value in found["batches"]["seconds_for_edits"].items()}
    least, most = min(seconds), max(seconds)
    right.plot(list(seconds), list(seconds.values()), "o-", label="measured")
    right.plot([least, most], [seconds[least], seconds[least] * most / least], ":", color="0.6", label="in proportion")
    right.set(title="seconds as edits grow tenfold", xlabel="edits", xscale="log", yscale="log")
    in_round_numbers(right)
    right.legend(fontsize=8)
    return figure


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "scale": scale_table,
    "sizes": sizes_table,
    "floor": floor_table,
    "quantised": quantised_table,
}
PICTURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "scale": scale_picture,
    "sizes": sizes_picture,
    "batches": batches_picture,
}


if __name__ == "__main__":
    main()
