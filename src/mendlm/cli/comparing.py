"""`mendlm compare` and `report`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mendlm import processes
from mendlm.cli import common
from mendlm.errors import InputError


@common.loads_model
def compare(
    data: Annotated[str, typer.Option("--data", help="TASK:PATH of requests.")],
    methods: Annotated[str, typer.Option("--methods", help="Methods, with commas: mend,ft,ft-kl,ke,enn,...")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the table, the pictures and each cell's results.")],
    model: common.Model = "starter",
    editors: Annotated[
        list[str] | None,
        typer.Option("--editor", help="METHOD=RUN of a trained method, or METHOD@N=RUN for N edits at once; may repeat."),
    ] = None,
    num_edits: Annotated[str, typer.Option("--num-edits", help="Requests edited together, with commas: 1,5,25.")] = "1",
    sequential: Annotated[bool, typer.Option("--sequential", help="Edit them one after another; else at once.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N requests.")] = None,
    locality: Annotated[list[str] | None, typer.Option("--locality", help="TASK:PATH of unrelated texts; may repeat.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Pose prompts as chat turns.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the evaluation, or METHOD.key=value; may repeat.")
    ] = None,
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Score several methods on the same requests under one protocol. Interrupted, it goes on where it stopped."""
    from mendlm.checkpoint import parse_config, with_defaults
    from mendlm.editor import which_editor
    from mendlm.errors import NumericalError
    from mendlm.evaluation import EvaluationConfig, Evaluator, chunks, evaluate, require_work
    from mendlm.files import folder, plain, require_folder
    from mendlm.methods import LEARNED
    from mendlm.models import base_of, is_sharded
    from mendlm.report import read
    from mendlm.tasks import load_edits, load_unrelated

    require_folder(out)
    names, counts = _names(methods), _counts(num_edits)
    for name in names:
        common.known(name)
    values = _settings(settings or [], names)
    for name in names:
        common.known(name, values.get(name))
    runs = _editors(editors or [], names, counts)
    for name in names:
        if name in LEARNED and not all((name, count) in runs for count in counts):
            if name != "mend" or any(method == name for method, _ in runs):
                raise InputError(f"the method '{name}' has to be trained: give --editor {name}=RUN, for every number of edits")
            runs |= {(name, count): common.editor_of(None, model) for count in counts}
    of_evaluation = values.pop("", {})
    if "num_edits" in of_evaluation:
        raise InputError("give the numbers of edits at once by --num-edits 1,5,25")
    config = parse_config(EvaluationConfig, {"chat": chat, "sequential": sequential, "seed": seed, **of_evaluation})
    requests = load_edits(data, skip_bad=skip_bad).limited(limit)
    if max(counts) > len(requests.examples):
        raise InputError(f"{requests.name} has {len(requests.examples)} requests, fewer than {max(counts)} edits at once")
    unrelated = [load_unrelated(source, skip_bad=skip_bad) for source in locality or ()]
    loaded, tokenizer = common.open_model(model, origin, seed=seed)
    base = base_of(loaded)

    def open_cell(name: str, count: int) -> tuple[Any, EvaluationConfig, dict[str, Any], dict[str, Any]]:
        """A method, how it is scored, all that its results depend on, and what is said about it."""
        run, own, scored = runs.get((name, count)), values.get(name, {}), len(requests.examples)
        chosen, trained = common.open_method(name, own, run, model, loaded, tokenizer, unrelated, scored=scored)
        # A single edit, or what a method keeps of each request by itself, is the same in turn as at once.
        own_config = replace(config, num_edits=count)
        if count == 1 or not chosen.edits_weights:
            own_config = replace(own_config, sequential=False, on_base=False, rehearse=0)
        cell = {
            "model_sha256": base["sha256"],
            "dtype": base["dtype"],
            **({"quantization": base["quantization"]} if "quantization" in base else {}),
            "data_sha256": requests.sha256,
            "requests": len(requests.examples),
            "locality": [source.sha256 for source in unrelated],
            "evaluation": asdict(own_config),
            "method": asdict(chosen.config),
            "editor": trained.get("sha256"),
        }
        return chosen, own_config, plain(cell), trained

    cells = {(name, count): out / "cells" / f"{name}-{count}" for name in names for count in counts}
    left = []
    for (name, count), place in cells.items():  # all are opened once first, so that what is wrong is said before the work
        chosen, own_config, cell, _ = open_cell(name, count)
        Evaluator(chosen, chosen.specs, loaded, tokenizer, own_config)
        if (place / "summary.json").exists():
            found = read(place / "summary.json").get("cell") or {}
            defaults: dict[str, type[Any]] = {"evaluation": EvaluationConfig, "method": type(chosen.config)}
            if {**found, **{part: with_defaults(kind, found.get(part, {})) for part, kind in defaults.items()}} != cell:
                raise InputError(f"{place} holds results of other settings, data or editor; choose another --out")
            common.note(f"{name}, {count} together: done before")
        else:
            left.append((name, count))
            if not is_sharded(loaded):
                require_work(len(requests.examples), len(chunks(len(requests.examples), own_config)))
    processes.agree({"cells left to score": [list(cell) for cell in left]})
    refused: dict[str, list[tuple[str, int]]] = {}
    with folder(out / "cells") if processes.is_main() else contextlib.nullcontext():
        for name, count in left:
            chosen, own_config, cell, trained = open_cell(name, count)
            try:
                with common.progress(f"{name}, {count} together") as show:
                    results = evaluate(
                        chosen,
                        chosen.specs,
                        loaded,
                        tokenizer,
                        requests,
                        own_config,
                        locality=unrelated,
                        about={"command": common.command_line(sys.argv), "editor": which_editor(trained), "cell": cell},
                        callback=show,
                    )
            except (InputError, NumericalError) as error:  # of its own texts: the other cells are scored all the same
                if processes.count() > 1:  # the others would wait for this one
                    raise
                refused.setdefault(str(error), []).append((name, count))
                continue
            if processes.is_main():
                results.save(cells[name, count], force=True)  # there are no results there, at most what is left of some
    if not processes.is_main():
        return
    lost = [cell for same in refused.values() for cell in same]
    done = [place for cell, place in cells.items() if cell not in lost]
    if not lost:
        _publish(done, out, json_output)
        return
    if done:
        _write(done, out)
        common.note(f"what could be scored is in {out}")
    said = {why: "; ".join(f"{name}, {count} together" for name, count in same) for why, same in refused.items()}
    raise InputError("\n".join(f"{which} cannot be scored: {why}" for why, which in said.items()))


def report(
    places: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that hold results, or files of many, as table.json.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the table, the pictures and the page (default: the first DIR).")
    ] = None,
    json_output: common.Json = False,
) -> None:
    """Make table, pictures and page of result files again, without any model."""
    from mendlm.files import require_folder

    out = out or places[0]
    require_folder(out)
    _publish(places, out, json_output)


def _publish(places: list[Path], out: Path, json_output: bool) -> None:
    from mendlm.report import table

    cells, written = _write(places, out)
    common.emit(json_output, {"out": str(out), "files": [str(path) for path in written]}, table(cells).rstrip())


def _write(places: list[Path], out: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    from mendlm.report import find, write

    cells = find(places)
    return cells, write(cells, out)


def _names(methods: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise InputError("--methods names no method; give some with commas between, as mend,ft,ft-kl")
    return names


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise InputError(f"--num-edits {text}: expected whole numbers of at least 1, with commas between, as 1,5,25")
    return list(dict.fromkeys(counts))


def _editors(given: list[str], names: list[str], counts: list[int]) -> dict[tuple[str, int], str]:
    """(method, edits at once) -> its run; one for a number of edits goes before one for all."""
    from mendlm.methods import LEARNED

    learned = [name for name in names if name in LEARNED]
    editors: dict[tuple[str, int], str] = {}
    for one in sorted(given, key=lambda one: "@" in one.partition("=")[0]):
        key, equals, path = one.partition("=")
        name, at, count = key.partition("@")
        if not equals or name not in learned or (at and count not in map(str, counts)):
            raise InputError(
                f"--editor {one}: expected METHOD=RUN, or METHOD@N=RUN, with a method of {', '.join(learned) or 'none here'} "
                f"and N of {', '.join(map(str, counts))}"
            )
        editors |= {(name, int(n)): path for n in ([count] if at else counts)}
    return editors


def _settings(given: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """Method -> its settings, and "" -> those of the evaluation."""
    values: dict[str, dict[str, Any]] = {}
    for one in given:
        key, equals, raw = one.partition("=")
        method, _, name = key.strip().rpartition(".")
        if not equals or method not in ("", *names):
            raise InputError(f"--set {one}: expected NAME=VALUE, or METHOD.NAME=VALUE with a method of {', '.join(names)}")
        values.setdefault(method, {})[name] = common.parse_value(raw)
    return values
