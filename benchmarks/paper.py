"""The paper's tables, run for real: bases, editors, and every method under one protocol.

    python benchmarks/paper.py --data-dir DIR --work DIR                    # everything, in order
    python benchmarks/paper.py --data-dir DIR --work DIR fever-bert many    # some of it

Each part is a few `mendlm` commands in processes of their own; what is done is kept in --work, so that an interrupted run
goes on where it stopped. Results go to benchmarks/results/paper-PART.json (all cells, the machine, every command with its
seconds and commits, and each training's log) and pictures to docs/images/. `--share 0.05` shortens every training to that
share of its steps, in a folder of its own, to see whether it all runs; nothing is published then, nor with --limit. The T5's
base needs `pip install onnx`.

Drivers of parts without a base or editors in common may share a folder.
FEVER's claims and Natural Questions are divided once: bases and editors see the larger part, and scores come from the other.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import bench
from mendlm.files import read_json, write_bytes, write_json
from mendlm.report import draw, find, table, write
from mendlm.tasks.base import chance

HERE = Path(__file__).parent
UNTRAINED = ("ft", "ft-kl", "ft-strong", "lora", "cache", "prompt")
EDITOR = {"mend": ["editor.rank=128"], "malmen": ["editor.rank=128"], "ke": [], "enn": []}
"""Learned methods, and the settings of their editors."""
LOGGED = ("step", "loss", "success", "generality", "locality", "seconds")
"""What is kept of a training's log."""


@dataclass(frozen=True)
class Part:
    """One table: a base, data, and the methods scored on it."""

    base: str
    """`starter`, or a base of `prepare/bases.py`."""
    train: tuple[str, ...]
    dev: str
    locality: tuple[str, ...] = ()
    """Unrelated texts while training."""
    watched: tuple[str, ...] = ()
    """Unrelated texts while scoring."""
    learned: tuple[str, ...] = ("mend", "ke", "enn", "malmen")
    untrained: tuple[str, ...] = UNTRAINED
    counts: tuple[int, ...] = (1,)
    """Requests edited at once; trained at each."""
    steps: int | Mapping[int, int] = 200
    """Steps of a training, or of that at each count."""
    batch: int = 32
    """Requests a step; of more at once than that, one group."""
    limit: int = 200
    settings: tuple[str, ...] = ()
    """Settings of every training."""
    layers: tuple[str, ...] = ()
    """Patterns of the layers that all methods change; by default the paper's choice."""
    editors: str = ""
    """Another part, whose editors this one scores, those of its own methods and counts."""
    sequential: bool = False
    """Make the edits that are scored together one after another, not at once."""
    chained: bool = False
    """Train each count's editor further from that of the count before."""
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})
    """Name -> settings: the ablations, of the first learned method."""
    refine: int = 0
    """Steps by which the learned methods' edits are refined, where they are scored so, too."""
    rate: str = ""
    """The paper's rate for FT and FT+KL, by its name, at which they are scored too; empty where it is their default."""


NQ, NQ_DEV, TEXT, PPL = (
    "nq:{work}/nq-train.jsonl",
    "nq:{work}/nq-dev.jsonl",
    "text:{data}/wikitext-2-a.txt",
    "text:{data}/wikitext-2-b.txt",
)
VARIED = "records:{work}/zsre-varied.jsonl"
ZSRE, FEVER, FEVER_DEV = ("zsre:{data}/zsre-train.json",), ("fever:{work}/fever-train.jsonl",), "fever:{work}/fever-dev.jsonl"
BOTH = ("counterfact:{data}/counterfact-train.json", *ZSRE * 3)
WEIGHTS = ("edit_weight=1.0", "locality_weight=1.0")
RATE, TUNED = "paper rate", ("ft", "ft-kl")
"""Fine-tuning at the paper's rate: what its cells are called, and whose they are."""
REFINED = "refined"
"""What cells of refined edits are called."""
MIDDLE = tuple(f"model.layers.{block}.mlp.*" for block in (22, 23, 24))
ATTENTION = 'editor.layers=["*.layers.[23].self_attn.q_proj", "*.layers.[23].self_attn.v_proj"]'
VARIANTS = {
    "": (),
    "no sharing": ("editor.shared=false",),
    "no normalisation": ("editor.normalize=false",),
    "no identity": ("editor.init=xavier",),
    "only u": ("editor.inputs=u",),
    "only delta": ("editor.inputs=delta",),
    "only the smaller": ("editor.inputs=smaller",),
    "attention": (ATTENTION,),
    "small rate": ("learning_rate=1e-4",),
    "small rate no identity": ("learning_rate=1e-4", "editor.init=xavier"),
}
HARDER = {name: VARIANTS[name] for name in ("", "no normalisation", "no identity")}
"""What is repeated on bases that are edited less easily."""
MANY = Part(
    "t5-questions",
    (*ZSRE, VARIED),
    "zsre:{data}/zsre-dev.json",
    (NQ,),
    (NQ_DEV,),
    learned=("mend", "enn", "malmen"),
    untrained=(),
    counts=(1, 5, 25, 75, 125),
    steps={1: 100, 5: 60, 25: 100, 75: 30, 125: 30},
    batch=50,
    settings=WEIGHTS,
    chained=True,
)
MANY_REFINED = replace(MANY, learned=("mend", "malmen"), editors="many", refine=20)
GPT = Part(
    "starter",
    BOTH,
    "counterfact:{data}/counterfact-dev.json",
    (NQ, TEXT),
    (PPL,),
    steps=300,
    batch=16,
    settings=WEIGHTS,
    layers=MIDDLE,
)
GPT_ZSRE = replace(GPT, dev="zsre:{data}/zsre-dev.json", watched=(NQ_DEV, PPL), editors="gpt-counterfact")
SLOW: dict[str, Any] = {"learned": (), "untrained": ("ft-kl",), "editors": "", "rate": "paper-gpt"}
"""What fine-tuning the starter model takes long for, in parts of its own."""
PARTS: dict[str, Part] = {
    "gpt-counterfact": GPT,
    "gpt-counterfact-tuned": replace(GPT, **SLOW),
    "gpt-zsre": GPT_ZSRE,
    "gpt-zsre-tuned": replace(GPT_ZSRE, **SLOW),
    "t5-zsre": Part(
        "t5-questions",
        ZSRE,
        "zsre:{data}/zsre-dev.json",
        (NQ,),
        (NQ_DEV,),
        steps=150,
        batch=16,
        settings=WEIGHTS,
        variants=HARDER,
    ),
    "fever-bert": Part(
        "bert-fever",
        FEVER,
        FEVER_DEV,
        watched=(FEVER_DEV,),
        untrained=UNTRAINED[:-1],
        steps=400,
        settings=("edit_weight=0.3", "locality_weight=1.0"),
        rate="paper-small",
    ),
    "gpt2-wikitext": Part(
        "gpt2-small",
        ("wikitext:{work}/wikitext-train.json",),
        "wikitext:{work}/wikitext-dev.json",
        (TEXT,),
        (PPL,),
        steps=1200,
        batch=16,
        settings=WEIGHTS,
        variants=HARDER,
        rate="paper-small",
    ),
    "bart-zsre": Part(
        "bart-small", ZSRE, "zsre:{data}/zsre-dev.json", (NQ,), (NQ_DEV,), steps=600, settings=WEIGHTS, rate="paper-small"
    ),
    "many": MANY,
    "many-in-turn": replace(MANY, learned=("mend", "malmen"), counts=(5, 25), editors="many", sequential=True),
    "many-refined": MANY_REFINED,
    "many-refined-in-turn": replace(MANY_REFINED, learned=("mend",), counts=(5, 25), sequential=True),
    "ablations": Part(
        "bart-small",
        ZSRE,
        "zsre:{data}/zsre-dev.json",
        (NQ,),
        (NQ_DEV,),
        learned=("mend",),
        untrained=(),
        steps=100,
        settings=WEIGHTS,
        variants=VARIANTS,
    ),
}


class Driver:
    """Runs parts in a work folder, and remembers how long each command took."""

    def __init__(self, data: Path, work: Path, share: float, limit: int | None, device: str) -> None:
        self.data, self.work, self.share, self.limit, self.device = data.resolve(), work.resolve(), share, limit, device
        self.kept = work / "commands.json"

    @property
    def commands(self) -> dict[str, dict[str, Any]]:
        """What ran, of every driver that works in the folder: name -> the command as it was last given, with WORK and DATA for
        the folders, its seconds and the commits that it ran on, those of interrupted tries, too.
        """
        return read_json(self.kept) if self.kept.is_file() else {}

    def run(self, name: str, command: Sequence[str]) -> None:
        """Run a command, and keep what `commands` says of it."""
        print(f"== {name}: {shlex.join(command[1:])}", flush=True)
        words = shlex.join(["python", *command[1:]])
        for folder, short in ((self.work, "WORK"), (self.data, "DATA"), (HERE, "benchmarks")):
            words = words.replace(str(folder), short)
        begun, commit = time.perf_counter(), bench.commit()
        try:
            subprocess.run(command, check=True)
        finally:
            before = self.commands.get(name, {"seconds": 0, "commits": []})
            seconds = round(before["seconds"] + time.perf_counter() - begun, 1)
            commits = list(dict.fromkeys([*before["commits"], commit]))
            write_json(self.kept, self.commands | {name: {"command": words, "seconds": seconds, "commits": commits}})

    def mendlm(self, name: str, *arguments: str) -> None:
        """Run a `mendlm` command."""
        self.run(name, [sys.executable, "-m", "mendlm", *arguments])

    def place(self, source: str) -> str:
        """A data source with its folders filled in."""
        return source.format(data=self.data, work=self.work)

    def base(self, name: str) -> str:
        """A base model: its folder, fitted now if it is not there."""
        folder = self.work / "bases" / name
        if name != "starter" and not folder.exists():
            steps = ["--steps", str(max(2, int(800 * self.share)))] if self.share < 1 else []
            script = str(HERE / "prepare" / "bases.py")
            data = ["--data-dir", str(self.data), "--divided", str(self.work), "--out", str(folder)]
            self.run(f"base {name}", [sys.executable, script, name, *data, *steps])
        return "starter" if name == "starter" else str(folder)

    def divide(self) -> None:
        """FEVER's claims and Natural Questions in a training and a held-out part, by a hash of each."""
        for name, file, text in (("fever", "fever-claims-dev.jsonl", "claim"), ("nq", "nq-open-dev.jsonl", "question")):
            parts: dict[str, list[str]] = {"train": [], "dev": []}
            for line in (self.data / file).read_text(encoding="utf-8").splitlines():
                parts["dev" if chance(name, 0, json.loads(line)[text]) < 0.2 else "train"].append(line)
            for side, kept in parts.items():
                write_bytes(self.work / f"{name}-{side}.jsonl", "".join(f"{line}\n" for line in kept).encode())

    def prepare(self, part: Part) -> None:
        """Wikitext's samples of the base, in a training and a held-out part; zsRE's varied questions."""
        varied = self.work / "zsre-varied.jsonl"
        if VARIED in part.train and not varied.is_file():
            copies = ["--only-questions", "--zsre-copies", "16", "--number-copies", "16", "--new-targets", "0.3"]
            script = str(HERE / "prepare" / "varied.py")
            self.run("varying zsre", [sys.executable, script, "--data-dir", str(self.data), "--out", str(varied), *copies])
        if "wikitext" in part.dev and not (self.work / "wikitext-dev.json").is_file():
            whole, count = self.work / "wikitext.json", str(max(64, int(3800 * self.share)))
            sampled = ["--text", str(self.data / "wikitext-2-a.txt"), "--count", count, "--force", "--out", str(whole)]
            self.mendlm("sampling wikitext", "data", "wikitext", "--model", self.base(part.base), *sampled)
            made = read_json(whole)
            for side in ("train", "dev"):
                kept = [i for i, text in enumerate(made["original"]) if (chance("wikitext", 0, text) < 0.2) == (side == "dev")]
                fields = {name: [made[name][i] for i in kept] for name in ("original", "completions")}
                write_json(self.work / f"wikitext-{side}.json", {"n_tokens": made["n_tokens"], **fields})

    def editors(self, name: str, part: Part, base: str) -> Iterator[tuple[str, str, int, Path]]:
        """Train every editor of a part: variant, method, requests at once, run folder."""
        name, wanted, part = part.editors or name, part, PARTS.get(part.editors, part)
        trunk = ["--trunk-cache", str(self.work / "trunk")] if base == "starter" else []
        for variant, more in part.variants.items():
            for method in wanted.learned[:1] if variant else wanted.learned:
                begun: Path | None = None
                for count in (count for count in part.counts if count <= max(wanted.counts)):
                    run = self.work / name / "runs" / f"{method}@{count}{variant and '-' + variant.replace(' ', '-')}"
                    whole = part.steps if isinstance(part.steps, int) else part.steps[count]
                    steps = max(2, int(whole * self.share))
                    batch = max(1, part.batch // count) * count
                    layers = (f"editor.layers={json.dumps(part.layers)}",) if part.layers else ()
                    shape = () if begun else (*layers, *EDITOR[method])
                    given = (*part.settings, f"batch_size={batch}", f"num_edits={count}", *shape, *more)
                    options = [word for setting in given for word in ("--set", setting)]
                    options += [word for source in part.train for word in ("--data", self.place(source))]
                    options += [word for source in part.locality for word in ("--locality", self.place(source))]
                    log = run / "metrics.jsonl"
                    if not log.is_file() or len(log.read_text().splitlines()) < steps:
                        resume = ["--resume"] if (run / "checkpoint.safetensors").is_file() else []
                        common = ["--model", base, "--method", method, "--steps", str(steps), "--device", self.device]
                        start = ["--from", str(begun)] if begun else []
                        command = [*common, *start, *options, *trunk, "--out", str(run), *resume]
                        self.mendlm(f"train {name} {run.name}", "train", *command)
                    begun = run if part.chained else None
                    if count in wanted.counts:
                        yield variant, method, count, run

    def compared(self, name: str, variant: str) -> Path:
        """Where a part's methods are scored."""
        return self.work / name / f"compared{variant and '-' + variant.replace(' ', '-')}"

    def part(self, name: str) -> None:
        """One table, from its base to its pictures."""
        part = PARTS[name]
        self.divide()
        base = self.base(part.base)
        self.prepare(part)
        limit = min(part.limit, self.limit or part.limit)
        groups: dict[str, list[str]] = {variant: [] for variant in part.variants}
        for variant, method, count, run in self.editors(name, part, base):
            groups[variant].extend(["--editor", f"{method}@{count}={run}"])
        common = ["--model", base, "--data", self.place(part.dev), "--num-edits", ",".join(map(str, part.counts))]
        common += ["--limit", str(limit), "--device", self.device, "--set", "timed_edits=5"]
        common += ["--sequential"] * part.sequential
        common += [word for source in part.watched for word in ("--locality", self.place(source))]

        def compare(variant: str, methods: Sequence[str], settings: Sequence[str], *more: str) -> None:
            out = str(self.compared(name, variant))
            given = [word for setting in settings for word in ("--set", setting)]
            words = ["--methods", ",".join(methods), *common, *given, *more, "--out", out]
            self.mendlm(f"compare {name} {variant}".strip(), "compare", *words)

        def placed(methods: Sequence[str]) -> list[str]:
            tuned = [method for method in methods if part.layers and method not in ("cache", "prompt")]
            return [f"{method}.layers={json.dumps(part.layers)}" for method in tuned]

        for variant, editors in groups.items():
            methods = part.learned[:1] if variant else (*part.learned, *part.untrained)
            compare(variant, methods, () if variant else placed(part.untrained), *editors)
        self.publish(name, list(groups))
        if part.rate:
            compare(RATE, TUNED, [*placed(TUNED), *(f"{method}.rate={part.rate}" for method in TUNED)])
            groups[RATE] = []
            self.publish(name, list(groups))
        if part.refine:
            compare(REFINED, part.learned, [f"{method}.refine={part.refine}" for method in part.learned], *groups[""])
            groups[REFINED] = []
            self.publish(name, list(groups))

    def logs(self, name: str) -> dict[str, dict[str, list[float]]]:
        """Run -> what its training logged, step by step."""
        found = {}
        for log in sorted((self.work / (PARTS[name].editors or name) / "runs").glob("*/metrics.jsonl")):
            rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            found[log.parent.name] = {key: [round(row[key], 4) for row in rows] for key in LOGGED}
        return found

    def publish(self, name: str, variants: list[str]) -> None:
        """Cells, seconds and pictures of a part, where the guides find them."""
        cells = []
        for variant in variants:
            for cell in find([self.compared(name, variant) / "cells"]):
                cells.append({**cell, "method": f"{cell['method']}, {variant}" if variant else cell["method"]})
        write(cells, self.work / name / "report")
        part = PARTS[name]
        mine = (
            f"train {part.editors or name} ",
            f"compare {name} ",
            f"base {part.base} ",
            "sampling wikitext " if "wikitext" in name else "-",
            "varying zsre " if VARIED in part.train else "-",
        )
        commands = {key: value for key, value in self.commands.items() if f"{key} ".startswith(mine)}
        machine = bench.machine(torch.device(self.device))
        about = {"part": name, "machine": machine, "share": self.share, "commands": commands}
        result = {**about, "logs": self.logs(name), "cells": cells}
        published = self.share == 1 and self.limit is None
        target = HERE if published else self.work
        (target / "results").mkdir(exist_ok=True)
        write_json(target / "results" / f"paper-{name}.json", result)
        images = HERE.parent / "docs" / "images" if published else self.work / "images"
        images.mkdir(exist_ok=True)
        for picture, content in draw(cells):
            write_bytes(images / f"paper-{name}-{picture}.png", content)
        write_bytes(target / "results" / f"paper-{name}.md", table(cells, without=("data",)).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables, run for real.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which tables; by default all, in order")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of bases, runs and results; reused")
    parser.add_argument("--share", type=float, default=1.0, help="share of every training's steps")
    parser.add_argument("--limit", type=int, help="requests scored at most")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    work = arguments.work if arguments.share == 1 else arguments.work / f"share-{arguments.share:g}"
    work.mkdir(parents=True, exist_ok=True)
    driver = Driver(arguments.data_dir, work, arguments.share, arguments.limit, arguments.device)
    for name in arguments.parts or PARTS:
        driver.part(name)


if __name__ == "__main__":
    main()
