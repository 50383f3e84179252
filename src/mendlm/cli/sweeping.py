"""`mendlm sweep`."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mendlm.cli import common, learning
from mendlm.errors import InputError


@common.loads_model
def sweep(
    key: Annotated[str, typer.Argument(metavar="KEY", help="'blocks', or a setting: locality_weight, editor.rank, ...")],
    points: Annotated[list[str], typer.Argument(metavar="VALUE...", help="Its values; for blocks ranges, as 13-15.")],
    data: learning.Data,
    out: Annotated[Path, typer.Option("--out", help="Folder for numbers, table, picture and the runs.")],
    model: common.Model = "starter",
    method: learning.Trained = "mend",
    valid: learning.Valid = None,
    locality: learning.Locality = None,
    config: learning.Config = None,
    settings: learning.Settings = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps of each run (default: 30).")] = None,
    count: Annotated[
        int | None, typer.Option("--requests", min=1, help="Requests that each run draws, instead of steps: for batch_size.")
    ] = None,
    trunk_cache: learning.TrunkCache = None,
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
    seed: learning.OwnSeed = None,
    *,
    origin: common.Origin,
) -> None:
    """Train short runs that differ in one setting, and draw what it does. Interrupted, it goes on where it stopped.

    Scored are the last third of the steps, on requests as they are met, or the requests of --valid under the last editor.
    """
    import torch

    from mendlm.checkpoint import Run, parse_config
    from mendlm.files import plain
    from mendlm.layers import choose, default_layers
    from mendlm.models import base_of
    from mendlm.processes import is_main
    from mendlm.report import write_sweep
    from mendlm.training import TrainConfig

    if count is not None and (steps is not None or key == "steps"):
        raise InputError("--requests says how long a run is, and so do steps; give one of them")
    kind, config_type = learning.trainable(method)
    blocks = {point: _blocks(point) for point in points} if key == "blocks" else {}
    plans = {}
    for point in points:
        given = [*(settings or []), f"steps={steps or 30}", *([] if seed is None else [f"seed={seed}"])]
        editor_values, values = common.read_settings(config, [*given, *([] if blocks else [f"{key}={point}"])])
        training = parse_config(TrainConfig, values)
        if count is not None:
            training = replace(training, steps=-(-count // training.batch_size))
        plans[point] = parse_config(config_type, editor_values), training
    requests, unrelated, held_out = learning.texts(data, locality, valid, skip_bad=skip_bad)
    loaded, tokenizer = common.open_model(model, origin, seed=seed or 0)
    if blocks:
        layers = {point: tuple(spec.name for spec in default_layers(loaded, wanted)) for point, wanted in blocks.items()}
        plans = {point: (replace(editor, layers=layers[point]), training) for point, (editor, training) in plans.items()}

    sources = [requests, *([held_out] if held_out else []), *unrelated]
    same = {"method": method, "base": base_of(loaded), "data": [source.sha256 for source in sources]}
    found: dict[str, dict[str, float]] = {}
    for point, (editor, training) in plans.items():
        run = Run(out / "runs" / re.sub(r"[^\w.,-]", "_", point))
        wanted = plain({**same, "editor": asdict(editor), "training": asdict(training)})
        started = (run.folder / "run.json").is_file()
        if started and run.description.get("sweep") != wanted:
            raise InputError(f"{run.folder} holds a run of other settings, data or model; choose another --out")
        if run.last_metrics()["step"] < training.steps:
            common.note(f"{key} {point}")
            torch.manual_seed(training.seed)
            learned = kind.for_model(loaded, choose(loaded, editor.layers), editor)
            run, stopped = learning.train_with_progress(
                learned,
                loaded,
                tokenizer,
                requests,
                training,
                run.folder,
                held_out,
                unrelated,
                resume=started,
                trunk_cache=trunk_cache,
                about={"sweep": wanted},
            )
            if stopped:
                common.note("stopped and saved; the same command goes on")
                raise typer.Exit(130)
        scored = min(len(held_out.examples), training.valid_examples) if held_out else 0
        found[point] = _scores(run.folder / "metrics.jsonl", min(training.batch_size, len(requests.examples)), scored)
    length = f"{count} requests" if count is not None else f"{steps or 30} steps"
    result = {"sweep": key, "length": length, "requests": requests.name, "valid": valid and held_out and held_out.name, **same}
    if not is_main():
        return
    written = write_sweep({**result, "values": found}, out)
    common.emit(json_output, {"out": str(out), "files": [str(path) for path in written]}, written[0].read_text().rstrip())


def _blocks(text: str) -> range:
    """The blocks of a range as `13-15`, or of one number."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise InputError(f"'{text}' is no range of blocks; expected its first and last, as 13-15")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _scores(log: Path, batch_size: int, scored: int) -> dict[str, float]:
    """Means over the last third of a run's steps, or its last scores on `scored` held-out requests; and what an edit took."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = rows[-1:] if scored else rows[-max(1, len(rows) // 3) :]
    prefix = "valid_" if scored else ""
    names = ("success", "generality", "locality", "edit_loss", "locality_loss")
    means = {name: statistics.mean(row[f"{prefix}{name}"] for row in last) for name in names}
    seconds = statistics.median(row["seconds"] for row in rows)
    return {**means, "count": scored or len(last) * batch_size, "seconds_per_edit": seconds / batch_size}
