"""`mendlm train` and `mendlm eval`."""

from __future__ import annotations

import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mendlm.cli import common
from mendlm.errors import InputError

Data = Annotated[list[str], typer.Option("--data", help=f"TASK:PATH of requests ({common.REQUESTS}); may repeat.")]
Locality = Annotated[
    list[str] | None, typer.Option("--locality", help="TASK:PATH of unrelated texts (also nq, text); may repeat.")
]
Trained = Annotated[str, typer.Option("--method", help="mend, malmen, ke or enn.")]
Valid = Annotated[str | None, typer.Option("--valid", help="TASK:PATH of requests to validate on.")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML with settings, in its tables editor and training.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value over the file; may repeat.")]
OwnSeed = Annotated[int | None, typer.Option("--seed", help="Over the configuration's seed.")]
TrunkCache = Annotated[
    Path | None, typer.Option("--trunk-cache", help="Folder that keeps hidden states below the edits across epochs and runs.")
]

EditorDevice = Annotated[
    str | None,
    typer.Option("--editor-device", help="Device of the editor and its optimiser (mend, malmen), if not the model's."),
]

BYTES_A_PARAMETER = {"adam": 16.0, "adam8bit": 8 + 2 * (1 + 4 / 256)}
"""A parameter and its gradient in float32, and Adam's two moments: in float32 too, or in 8 bits with a scale for each 256."""


@common.loads_model
def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The run folder.")],
    model: common.Model = "starter",
    method: Trained = "mend",
    valid: Valid = None,
    locality: Locality = None,
    config: Config = None,
    settings: Settings = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps; over file and --set.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's checkpoint.")] = False,
    start: Annotated[str | None, typer.Option("--from", help="A run or editor file whose editor is trained further.")] = None,
    editor_memory: Annotated[
        float | None, typer.Option("--editor-memory", metavar="GB", help="Largest editor.rank that trains in so much memory.")
    ] = None,
    trunk_cache: TrunkCache = None,
    editor_device: EditorDevice = None,
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
    seed: OwnSeed = None,
    *,
    origin: common.Origin,
) -> None:
    """Meta-train an editor for a model. Ctrl-C saves a checkpoint; --resume goes on."""
    editor_values, values = common.read_settings(config, settings or [])
    values |= {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}

    from mendlm.checkpoint import Run, parse_config
    from mendlm.editor import load_method
    from mendlm.layers import choose
    from mendlm.training import TrainConfig

    kind, config_type = trainable(method)
    if start is not None and editor_values:
        raise InputError(f"--from {start} has its own editor settings; leave editor.{next(iter(editor_values))} out")
    if editor_memory is not None:
        require_choice_of_rank(method, config_type, editor_values, start)
    editor_config, train_config = parse_config(config_type, editor_values), parse_config(TrainConfig, values)
    if not resume:
        Run(out).require_new()
    requests, unrelated, held_out = texts(data, locality, valid, skip_bad=skip_bad)
    loaded, tokenizer = common.open_model(model, origin, seed=train_config.seed)
    if start is not None:
        learned, source = load_method(start, loaded)
        if learned.name != method:
            raise InputError(f"--from {start} is an editor of the method '{learned.name}'; give --method {learned.name}")
    else:
        specs = choose(loaded, editor_config.layers)
        if editor_memory is not None:
            editor_config = replace(
                editor_config, rank=rank_for(editor_memory, train_config.optimizer, kind, specs, editor_config)
            )
            common.note(f"an editor of rank {editor_config.rank} trains in {editor_memory:g} GB")
        learned, source = kind.for_model(loaded, specs, editor_config), {}
    count = sum(parameter.numel() for parameter in learned.parameters())
    common.note(
        f"{len(requests.examples)} requests; editing {len(learned.specs)} layers with an editor of {count:,} parameters"
    )

    about = {"from": {"source": source["source"], "sha256": source["sha256"]}} if source else None
    run, stopped = train_with_progress(
        learned,
        loaded,
        tokenizer,
        requests,
        train_config,
        out,
        held_out,
        unrelated,
        resume=resume,
        prepared=start is not None,
        trunk_cache=trunk_cache,
        editor_device=editor_device,
        about=about,
    )
    last = run.last_metrics()
    content = {"run": str(out), "interrupted": stopped, "layers": [asdict(spec) for spec in learned.specs], "metrics": last}
    text = f"stopped and saved; go on with --resume --out {out}" if stopped else f"the editor is in {out}"
    common.emit(json_output, content, f"{text} (step {last['step']}, loss {last['loss']:.3f})")
    if stopped:
        raise typer.Exit(130)


def trainable(method: str) -> tuple[Any, Any]:
    """A method that can be trained, and its configuration's type. Raises `InputError` for any other."""
    from mendlm.methods import LEARNED, method_types

    if method not in LEARNED:
        raise InputError(f"the method '{method}' cannot be trained; those that can are {', '.join(LEARNED)}")
    return method_types(method)


def require_choice_of_rank(method: str, config_type: Any, editor_values: dict[str, Any], start: str | None) -> None:
    """Raise `InputError` where --editor-memory has no rank to choose."""
    from mendlm.methods.network import NetworkConfig

    if not issubclass(config_type, NetworkConfig):
        raise InputError(f"--editor-memory chooses the rank of mend and malmen; the method '{method}' has none, leave it out")
    if "rank" in editor_values:
        raise InputError(f"--editor-memory chooses the rank, but editor.rank is {editor_values['rank']}; give one of them")
    if start is not None:
        raise InputError(f"--from {start} has a rank already; leave --editor-memory out")


def rank_for(gigabytes: float, optimizer: str, kind: Any, specs: list[Any], config: Any) -> int:
    """The largest rank whose training takes at most so many GB of 10^9 bytes: parameters, gradients and Adam's moments."""
    if not 0 < gigabytes < float("inf"):
        raise InputError(f"--editor-memory is a positive number of GB, got {gigabytes}")
    bytes_each = BYTES_A_PARAMETER[optimizer]
    rank: int = kind.rank_within(specs, config, int(gigabytes * 1e9 / bytes_each))
    if rank < 1:
        with_one = sum(p.numel() for p in kind(specs, replace(config, rank=1)).parameters()) * bytes_each
        raise InputError(
            f"--editor-memory {gigabytes:g} GB holds no editor of these {len(specs)} layers: rank 1 takes "
            f"{with_one / 1e9:.2g} GB; give more, or edit fewer layers"
        )
    return rank


def texts(data: list[str], locality: list[str] | None, valid: str | None, *, skip_bad: bool) -> tuple[Any, list[Any], Any]:
    """The requests to train on, the sources of unrelated texts, and the requests held out, if any."""
    from mendlm.tasks import combine, load_edits, load_unrelated

    requests = combine([load_edits(source, skip_bad=skip_bad) for source in data])
    unrelated = [load_unrelated(source, skip_bad=skip_bad) for source in locality or ()]
    return requests, unrelated, load_edits(valid, skip_bad=skip_bad) if valid else None


def train_with_progress(
    learned: Any,
    model: Any,
    tokenizer: Any,
    requests: Any,
    config: Any,
    out: Path,
    valid: Any,
    locality: list[Any],
    *,
    resume: bool,
    prepared: bool = False,
    trunk_cache: Path | None,
    editor_device: str | None = None,
    about: dict[str, Any] | None = None,
) -> tuple[Any, bool]:
    """Train into a run folder, with progress; Ctrl-C stops it at a checkpoint. The run, and whether it was stopped."""
    from mendlm.training import Progress
    from mendlm.training import train as run_training

    stopping: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda *_: stopping.append(1))
    try:
        with common.progress("training") as show:

            def tell(now: Progress) -> None:
                m, n = now.metrics, config.batch_size
                detail = (
                    f"{n / now.seconds:.1f} edits/s  loss {m['loss']:.3f}  success {m['success']:.2f}  "
                    f"generality {m['generality']:.2f}  locality {m['locality']:.2f}"
                )
                show(now.step, now.steps, detail)

            run = run_training(
                learned,
                model,
                tokenizer,
                requests,
                config,
                out,
                valid=valid,
                locality=locality,
                resume=resume,
                prepared=prepared,
                trunk_cache=trunk_cache,
                editor_device=editor_device,
                about={"command": common.command_line(sys.argv), **(about or {})},
                callback=tell,
                should_stop=lambda: bool(stopping),
            )
    finally:
        signal.signal(signal.SIGINT, previous)
    return run, bool(stopping)


@common.loads_model
def evaluate(
    data: Annotated[str, typer.Option("--data", help=f"TASK:PATH of requests ({common.REQUESTS}).")],
    out: Annotated[Path, typer.Option("--out", help="Folder for results.jsonl and summary.json.")],
    model: common.Model = "starter",
    editor: common.EditorOption = None,
    method: common.MethodOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N requests.")] = None,
    num_edits: Annotated[int, typer.Option("--num-edits", min=1, help="Requests edited together.")] = 1,
    sequential: Annotated[bool, typer.Option("--sequential", help="Edits of a group one after another.")] = False,
    locality: Locality = None,
    chat: Annotated[bool, typer.Option("--chat", help="Pose prompts as chat turns.")] = False,
    scale: Annotated[float, typer.Option("--scale", help="Strength of the edits.")] = 1.0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of evaluation or method.")] = None,
    force: common.Force = False,
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Edit and score every request; writes results.jsonl (a row an edit) and summary.json."""
    values = common.plain_settings(settings)
    common.known(method)  # before its settings are named

    from mendlm.checkpoint import parse_config
    from mendlm.editor import which_editor
    from mendlm.evaluation import EvaluationConfig
    from mendlm.evaluation import evaluate as run_evaluation
    from mendlm.files import refuse_existing
    from mendlm.processes import is_main
    from mendlm.report import notes, short
    from mendlm.tasks import load_edits, load_unrelated

    given = {"num_edits": num_edits, "sequential": sequential, "chat": chat, "scale": scale, "seed": seed}
    own = {name: value for name, value in values.items() if name in EvaluationConfig.__dataclass_fields__}
    evaluation_config = parse_config(EvaluationConfig, {**given, **own})
    others, known = {name: value for name, value in values.items() if name not in own}, common.settings_of(method)
    for name in others:
        if name not in known:
            what = f"an evaluation has {', '.join(EvaluationConfig.__dataclass_fields__)}; the method {', '.join(known)}"
            raise InputError(f"'{name}' is no setting here: {what}")
    common.known(method, others)
    refuse_existing(out, force=force)
    requests = load_edits(data, skip_bad=skip_bad).limited(limit)
    unrelated = [load_unrelated(source, skip_bad=skip_bad) for source in locality or ()]
    loaded, tokenizer = common.open_model(model, origin, seed=seed)
    chosen, trained = common.open_method(
        method, others, editor, model, loaded, tokenizer, unrelated, scored=len(requests.examples), force=force
    )
    with common.progress("evaluating") as show:
        results = run_evaluation(
            chosen,
            chosen.specs,
            loaded,
            tokenizer,
            requests,
            evaluation_config,
            locality=unrelated,
            about={"command": common.command_line(sys.argv), "editor": which_editor(trained)},
            callback=show,
        )
    if is_main():
        results.save(out, force=force)
    if json_output:
        common.emit(True, results.summary, "")
        return
    rows = []
    names = ("success", "success_of_new", "generality", "edit_success", "success_generated", "generality_generated", "locality")
    for name in (*names, "unrelated_accuracy", "perplexity"):
        value = results.summary[name]
        interval = f"{short(value['low'], 3)} to {short(value['high'], 3)}" if value["low"] is not None else "-"
        shown = [short(value[side], 3) if value.get(side) is not None else "-" for side in ("before", "after")]
        rows.append([name, *shown, interval])
    for name in ("drawdown_acc", "drawdown_ppl", "unrelated_kl"):
        if results.summary[name] is not None:
            low, high = results.summary[f"{name}_interval"]
            change = [short(one, 4, "+") for one in (results.summary[name], low, high)]
            rows.append([name, "-", change[0], f"{change[1]} to {change[2]}"])
    given = results.summary["already_given"]
    told = f", {given} of whose targets the model gives already" if given else ""
    common.table(f"{results.summary['count']} edits of {requests.name}{told}", ("", "before", "after", "95 % interval"), rows)
    for one in notes([results.summary]):
        common.emit(False, {}, one)
    common.note(f"written to {out}")
