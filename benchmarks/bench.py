"""What the benchmark scripts share: interleaved timing, synthetic requests, and a JSON file that says where it was measured.

A claim is a ratio of two things timed in the same process, in turns, so that a slow moment of the machine hits both.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import mendlm
from mendlm.checkpoint import load_editor
from mendlm.cli.edits import CHUNK
from mendlm.editor import editor_file
from mendlm.files import write_json
from mendlm.layers import LayerSpec, select
from mendlm.methods.mend import Mend, MendConfig
from mendlm.tasks import EditExample, Probe, load_edits

SHIPPED = "shipped"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every script has."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--model", default="starter", help="'starter' or a Hugging Face folder")
    made.add_argument("--device", default=None)
    made.add_argument("--dtype", default="auto")
    made.add_argument("--data-dir", type=Path, help="folder with counterfact-train.json; without it, made-up requests")
    made.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON result")
    return made


TIMED: list[dict[str, list[float]]] = []
"""Of every `interleaved` run of this process the shortest, median and longest seconds of each side, which `save` writes."""


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each side: after one untimed call of each, they take turns, every other round backwards."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for action in sides.values():
        action()
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            synchronise()
            begun = time.perf_counter()
            sides[name]()
            synchronise()
            times[name].append(time.perf_counter() - begun)
    TIMED.append({name: [min(values), statistics.median(values), max(values)] for name, values in times.items()})
    return {name: statistics.median(values) for name, values in times.items()}


def synchronise() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def requests(data_dir: Path | None, count: int) -> list[EditExample]:
    """CounterFact training requests, or made-up ones of the same form."""
    if data_dir is not None:
        return list(load_edits(f"counterfact:{data_dir / 'counterfact-train.json'}").examples[:count])
    rng = random.Random(0)
    names, places = (
        ("Ana Lund", "Bo Rask", "Cyril Adeyemi", "Dora Vale", "Eli Park"),
        ("Lyon", "Oslo", "Quito", "Accra", "Turin"),
    )

    def one() -> EditExample:
        who, other, place = rng.choice(names), rng.choice(names), rng.choice(places)
        return EditExample(
            prompt=f"The city in which {who} was born is",
            target=place,
            rephrasings=(f"{who} comes from a family of bakers. {who} was born in",),
            unrelated=(Probe(f"The birthplace of {other} is the city of", rng.choice(places)),),
        )

    return [one() for _ in range(count)]


def numbers(words: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(word) for word in words.split(",")]


def edit_all(editor: mendlm.Editor, some: Sequence[EditExample]) -> None:
    """Make so many edits in chunks, as `mendlm edit --data` does, and keep none."""
    for start in range(0, len(some), CHUNK):
        editor.edit_many(some[start : start + CHUNK])


def editor_of(name: str, model: Any, tokenizer: Any) -> mendlm.Editor:
    """A trained editor, as `Editor.load` finds it; for `none` an untrained one of the default layers."""
    if name == "none":
        return mendlm.Editor(editor_for(model, None)[0], model, tokenizer)
    return mendlm.Editor.load(name, model, tokenizer)


def editor_for(model: Any, blocks: Sequence[int] | str | None, rank: int = 256) -> tuple[Mend, list[LayerSpec]]:
    """An untrained editor for the MLP matrices of the given decoder blocks; the shipped editor's layers for `SHIPPED`."""
    if blocks == SHIPPED:
        specs = list(load_editor(editor_file("starter"))[0].specs)
    elif blocks is None:
        specs = list(mendlm.default_layers(model))
    else:
        specs = list(select(model, [f"model.layers.{block}.mlp.*" for block in blocks]))
    return Mend(specs, MendConfig(rank=rank)).to(model.device), specs


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on what."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit that runs, with `-dirty` where files differ from it, those that benchmarks write apart."""
    code = [":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs/images"]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return _git("describe", "--always") + "-dirty" * bool(changed)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def save(arguments: argparse.Namespace, name: str, device: torch.device, result: Mapping[str, Any]) -> None:
    """Print the result, and write it with the machine's description."""
    content = {"benchmark": name, "machine": machine(device), **result, "timed": TIMED}
    print(json.dumps(content, indent=1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    kind = "cuda" if device.type == "cuda" else "cpu"
    write_json(arguments.out / f"{name}-{kind}.json", content)
