"""Run every benchmark, gather what they found in one file, and put it into docs/performance.md as tables and pictures.

    python benchmarks/run_all.py [--data-dir DIR] [--only floor training ...] [--tables]

Each script runs in a process of its own and writes its own JSON; `benchmarks/results/all-KIND.json` holds them together. With
`--tables` nothing runs: tables and pictures are made again from the files. Takes some 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
SHAPES = ("1b", "7b", "t5-11b", "13b", "20b")
SCRIPTS = ("floor", "training", "editing", "replay", "memory", "startup", "applying")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, "scale"], default=[*SCRIPTS, "scale"])
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    common = ["--out", str(arguments.out), *(["--device", arguments.device] if arguments.device else [])]
    for name in () if arguments.tables else arguments.only:
        if name == "scale":
            for more in ([], ["--quantize", "nf4"]):
                for shape in SHAPES:
                    run("scale", "--shape", shape, *common, *more, check=False)  # one may not fit
            continue
        data = ["--data-dir", str(arguments.data_dir)] if arguments.data_dir and name not in ("startup", "replay") else []
        run(name, "--model", arguments.model, "--rounds", str(arguments.rounds), *common, *data)
    kind = "cuda" if (arguments.device or default_device()).startswith("cuda") else "cpu"
    found = {path.stem.removesuffix(f"-{kind}"): json.loads(path.read_text()) for path in _results(arguments.out, kind)}
    if not found:
        raise SystemExit(f"{arguments.out} holds no results of the kind '{kind}'; run the benchmarks first, or name --device")
    (arguments.out / f"all-{kind}.json").write_text(json.dumps(found, indent=1) + "\n")
    publish(found, arguments.page)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run(name: str, *options: str, check: bool = True) -> None:
    print(f"== {name} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], check=check, stdout=subprocess.DEVNULL)


def _results(folder: Path, kind: str) -> list[Path]:
    names = [*SCRIPTS, *(f"scale-{shape}{form}" for shape in SHAPES for form in ("", "-nf4"))]
    return [path for name in names if (path := folder / f"{name}-{kind}.json").is_file()]


def publish(found: dict[str, Any], page: Path) -> None:
    """Replace what stands between a page's marks `<!-- name -->` and `<!-- end -->` by tables of the results."""
    text = page.read_text(encoding="utf-8")
    tables: dict[str, Callable[[dict[str, Any]], str]] = {"scale": scale_table, "floor": floor_table, "claims": claims_table}
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = before + mark + table(found) + "<!-- end -->" + rest.partition("<!-- end -->")[2]
    page.write_text(text, encoding="utf-8")
    if any(name.startswith("scale-") for name in found):
        picture(found, page.parent / "images" / "performance-scale.png")


def scale_table(found: dict[str, Any]) -> str:
    """Shapes by the forms of their base: memory, and what was measured where there was a device for it."""
    lines = [
        "| shape | base | memory of training, GB | fits | tera operations a request | measured |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        if name.startswith("scale-"):
            plan, cards = result["plan"], ", ".join(f"{card}" for card in result["plan"]["fits_gb"]) or "none of 16 to 80"
            measured = "computed only"
            if "peak_gb" in result:
                measured = (
                    f"{result['peak_gb']:.1f} GB, {result['seconds_per_step']['median']:.2f} s a step, "
                    f"{result['hours_for_100000_edits']:.2f} h for 100,000 edits, edit {result['edit_ms']['p50']:.0f} ms "
                    f"({result['machine']['device']})"
                )
            lines.append(
                f"| {result['shape']} | {result['base']} | {plan['total'] / 1e9:.1f} | {cards} | {plan['flops'] / 1e12:.2f} "
                f"| {measured} |"
            )
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
    ("training", "last 3 of 30 blocks.ratio", "training step over the oracle, last 3 blocks", "15"),
    ("training", "last 3 of 30 blocks.ratio_at_equal_dtype", "the same at equal dtype", ""),
    ("training", "last 3 of 30 blocks.ratio_with_trunk_cache", "the same with every text in the trunk cache", ""),
    ("training", "shipped blocks.ratio", "training step over the oracle, shipped blocks", ""),
    ("editing", "edit_over_floor", "one edit over one forward and one backward pass", "at most 1.5"),
    ("editing", "one_by_one_over_edit_many", "edits one by one over `edit_many`, per edit", "2 (2.5 for 1,000)"),
    ("replay", "ratio", "a replayed pass over a full one, last 3 of 30 blocks", "at most 0.2"),
    ("memory", "peak_over_floor", "peak memory of training over base, editor state and one batch's activations", ""),
    ("memory", "oracle_over_floor", "the oracle's peak over the same", ""),
    ("applying", "one_edit_overhead.1", "generation under one edit: time lost, batch 1", "at most 0.05"),
    ("applying", "one_edit_overhead.8", "the same, batch 8", "at most 0.05"),
    ("applying", "own_edits_overhead", "32 texts, each under its own edit: time lost", "at most 0.25"),
)


def claims_table(found: dict[str, Any]) -> str:
    """Each ratio beside its bar."""
    lines = ["| ratio | measured | wanted |", "|---|---|---|"]
    for script, key, what, bar in CLAIMS:
        value: Any = found.get(script)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            lines.append(f"| {what} | {value:.3g} | {bar} |")
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any], path: Path) -> None:
    """Memory and operations over the size of the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for base, mark in (("bf16", "o"), ("nf4", "s")):
        rows = sorted(
            (r["plan"]["flops"] / 1e12, r["plan"]["total"] / 1e9, r["plan"]["base"] / 1e9, r["shape"])
            for name, r in found.items()
            if name.startswith("scale-") and r["base"] == base
        )
        shapes = [row[3] for row in rows]
        (line,) = left.plot(shapes, [row[1] for row in rows], mark + "-", label=f"training, base in {base}")
        left.plot(shapes, [row[2] for row in rows], mark + ":", color=line.get_color(), label=f"its base alone, {base}")
        if base == "bf16":
            right.plot(shapes, [row[0] for row in rows], mark + "-")
    for card in (16, 24, 48, 80):
        left.axhline(card, color="0.85", linewidth=1, zorder=0)
        left.text(0, card, f"{card} GB", fontsize=8, color="0.5", va="bottom")
    left.set(title="memory of training, computed", ylabel="GB")
    left.legend(fontsize=8)
    right.set(title="operations of one training request", ylabel="tera operations", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
