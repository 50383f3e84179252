"""`mendlm data describe` and `mendlm data wikitext`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mendlm.cli import common
from mendlm.errors import InputError

app = typer.Typer(help="Look into data files, and make them.", no_args_is_help=True)


@app.command()
def describe(
    source: Annotated[str, typer.Argument(metavar="TASK:PATH", help="A task and a file of its form.")],
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
) -> None:
    """What a file holds: counts, lengths, notes, and three examples."""
    from mendlm.tasks import load
    from mendlm.tasks.describe import describe as describe_data

    found = describe_data(load(source, skip_bad=skip_bad))
    if json_output:
        common.emit(True, found, "")
        return
    counts = ("requests", "rephrasings", "unrelated", "portability", "left_out", "skipped")
    names = [*(name.replace("_", " ") for name in counts), *(f"  {group}" for group in found["groups"])]
    numbers = [*(found[name] for name in counts), *found["groups"].values()]
    common.emit(False, {}, f"{found['name']}\nsha256 {found['sha256']}")
    common.table("counts", ("", "count"), zip(names, numbers, strict=True))
    lengths = [
        (name, unit, f"{found[name][unit]['median']:g}", found[name][unit]["longest"])
        for name in ("prompts", "targets")
        for unit in found[name] or ()
    ]
    common.table("lengths", ("", "in", "median", "longest"), lengths)
    lines = [f"note: {note}" for note in found["notes"]]
    for number, example in enumerate(found["examples"], start=1):
        lines += [f"example {number}", *(f"  {line}" for line in _shown(example))]
    common.emit(False, {}, "\n".join(lines))


def _shown(example: dict[str, Any]) -> list[str]:
    """The fields of an example that say something, a line each, with a line for every text of a list."""
    lines = []
    for name, value in example.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, dict):
                item = " -> ".join(repr(part) for part in (item["prompt"], item["answer"]) if part is not None)
            elif isinstance(item, str):
                item = repr(item)
            if item is not None:
                lines.append(f"{name}: {item}")
    return lines


@app.command()
@common.loads_model
def wikitext(
    text: Annotated[Path, typer.Option("--text", help="A file of raw text, from which passages are taken.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, for the task 'wikitext'.")],
    model: common.Model = "starter",
    count: Annotated[int, typer.Option("--count", min=1, help="How many passages with a continuation.")] = 1000,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of a continuation.")] = 10,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Passages at a time.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Make an edit set for the task 'wikitext': continuations sampled from a model, without those it gives anyway."""
    if out.is_dir() or (out.exists() and not force):
        raise InputError(f"{out} already exists; name another file, or replace a file with --force")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; make it, or name another place")

    from mendlm.data import passages, sample
    from mendlm.files import write_json

    texts = passages(text)
    loaded, tokenizer = common.open_model(model, origin, seed=seed)
    with common.progress("sampling") as show:
        made = sample(loaded, tokenizer, texts, count=count, tokens=tokens, seed=seed, batch_size=batch_size, callback=show)
    write_json(out, made.released())
    kept = len(made.original)
    content = {"out": str(out), "count": kept, "passages": len(texts), "predicted": made.predicted, "unfit": made.unfit}
    short = "" if kept == count else f"; the text has no more than {len(texts)} passages"
    common.emit(
        json_output,
        content,
        f"{kept} passages with continuations of {tokens} tokens in {out} ({made.predicted} dropped that the model "
        f"gives anyway, {made.unfit} that end early or read back as other tokens{short})",
    )
