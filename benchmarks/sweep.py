"""Small sweeps behind the starter editor's recipe: one setting varied, everything else as in recipes/starter.toml.

    python benchmarks/sweep.py depth    --data-dir DIR --work DIR [--steps 30] [--jobs 2]
    python benchmarks/sweep.py locality --data-dir DIR --work DIR

Each value is trained for a few steps of CounterFact edits in a process of its own. Since every request is seen for the
first time, the metrics of the last third of the steps are those of unseen requests, under an editor that is still learning.
A finished run in --work is reused, so that a sweep can be interrupted and extended. Writes benchmarks/results/sweep-NAME.json
and docs/images/sweep-NAME.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import bench
from mendlm.files import write_json

HERE = Path(__file__).parent
METRICS = ("success", "generality", "locality")


def mlps(first: int, count: int = 3) -> str:
    """The setting that edits the MLP matrices of `count` blocks from `first`."""
    return "editor.layers=" + json.dumps([f"model.layers.{block}.mlp.*" for block in range(first, first + count)])


SWEEPS: dict[str, dict[str, list[str]]] = {
    "depth": {f"{first}-{first + 2}": [mlps(first)] for first in (13, 16, 19, 22, 25, 27)},
    "locality": {str(weight): [f"locality_weight={weight}"] for weight in (0.3, 1.0, 3.0, 10.0)},
    "rank": {str(rank): [f"editor.rank={rank}"] for rank in (32, 128, 512)},
    "rate": {str(rate): [f"learning_rate={rate}"] for rate in (3e-4, 1.5e-3, 3e-3)},
}
COMMON = ["edit_weight=1.0", "own_locality=1.0", "chat_share=0.0", "batch_size=32", "normalizer_examples=256"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Small sweeps behind the starter editor's recipe.")
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once, of one thread each")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    values = SWEEPS[arguments.sweep]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda value: run(arguments, value, values[value]), values))
    result = {
        "sweep": arguments.sweep,
        "machine": bench.machine(torch.device(arguments.device)),
        "steps": arguments.steps,
        "common": COMMON,
        "jobs": arguments.jobs,
        "values": dict(zip(values, rows, strict=True)),
    }
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results" / f"sweep-{arguments.sweep}.json", result)
    print(json.dumps(result, indent=1))
    draw(result, HERE.parent / "docs" / "images" / f"sweep-{arguments.sweep}.svg")


def run(arguments: Any, value: str, settings: list[str]) -> dict[str, float]:
    """Train one value, or read its finished run; the means of the last third of its steps."""
    recipe = HERE.parent / "recipes" / "starter.toml"
    command = [sys.executable, "-m", "mendlm", "train", "--config", str(recipe), "--device", arguments.device]
    command += ["--data", f"counterfact:{arguments.data_dir / 'counterfact-train.json'}", "--steps", str(arguments.steps)]
    for setting in [*COMMON, *settings]:
        command += ["--set", setting]
    settled = hashlib.sha256(f"{command}{recipe.read_text()}".encode()).hexdigest()[:8]
    out = arguments.work / f"{arguments.sweep}-{value}-{settled}"
    metrics = out / "metrics.jsonl"
    done = metrics.read_text().splitlines() if metrics.exists() else []
    if len(done) < arguments.steps:
        command += ["--out", str(out), *(["--resume"] if (out / "checkpoint.safetensors").exists() else [])]
        threads = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=subprocess.DEVNULL)
        done = metrics.read_text().splitlines()
    last = [json.loads(line) for line in done[-max(1, len(done) // 3) :]]
    named = (*METRICS, "edit_loss", "locality_loss")
    return {name: statistics.mean(row[name] for row in last) for name in named} | {
        "seconds_per_edit": statistics.median(row["seconds"] for row in last) / 32
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The sweep as a picture: for the locality weight the trade-off curve, else the metrics and the cost of each value."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mendlm"
    import matplotlib.pyplot as plt

    values: dict[str, dict[str, float]] = result["values"]
    labels = list(values)
    figure, axis = plt.subplots(figsize=(7, 4))
    if result["sweep"] == "locality":
        for name in ("success", "generality"):
            axis.plot([v["locality"] for v in values.values()], [v[name] for v in values.values()], marker="o", label=name)
        for label, value in values.items():
            axis.annotate(
                f"weight {label}", (value["locality"], value["generality"]), textcoords="offset points", xytext=(6, -12)
            )
        axis.set_xlabel("locality")
    else:
        for name in METRICS:
            axis.plot(labels, [v[name] for v in values.values()], marker="o", label=name)
        cost = axis.twinx()
        cost.bar(labels, [1000 * v["seconds_per_edit"] for v in values.values()], alpha=0.2, color="gray")
        cost.set_ylabel("ms a training edit (bars)")
        axis.set_xlabel({"depth": "edited blocks, of 30", "rank": "rank", "rate": "learning rate"}[result["sweep"]])
    axis.set_ylim(0, 1)
    axis.set_title(f"after {result['steps']} steps of 32 CounterFact edits")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
