"""`mendlm store DIR ...`: the journal of a store. Only `add` loads torch, and a model only to make edits."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mendlm.cli import common
from mendlm.errors import InputError

if TYPE_CHECKING:
    from mendlm.journal import Record
    from mendlm.store import Store

app = typer.Typer(help="The journal of one model's edits: who changed what, when and why, and how to take it back.")


def author() -> str:
    """Who is at work, as the system names them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


Id = Annotated[str | None, typer.Argument(metavar="[ID]", help="An edit's id, or the beginning of it (default: the last one).")]
Author = Annotated[str | None, typer.Option("--author", help="Who does it (default: the user's name).")]
Reason = Annotated[str, typer.Option("--reason", help="Why.")]


@app.callback(no_args_is_help=True)
def folder(
    context: typer.Context,
    place: Annotated[Path, typer.Argument(metavar="DIR", help="The store's folder.")],
) -> None:
    """The journal of one model's edits: who changed what, when and why, and how to take it back."""
    context.obj = place


def _open(context: typer.Context) -> Store:
    from mendlm.store import Store

    return Store.open(context.obj)


def _line(record: Record) -> str:
    parts = record.request.get("parts")
    one = parts[0] if parts else record.request
    if one.get("prompt") is None:
        return f"rows of the edit {record.file[:12]}"
    return f"{one['prompt']!r} -> {one.get('target')!r}" + (f" and {len(parts) - 1} more in one" if parts else "")


@app.command()
@common.loads_model
def add(
    context: typer.Context,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[EDIT_DIR]...", help="Edit folders, as `mendlm edit` writes them; unchecked."),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Instead of folders: the prompt to correct.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The answer that it should get.")] = None,
    rephrasings: common.Rephrasings = None,
    unrelated: common.Unrelated = None,
    data: Annotated[str | None, typer.Option("--data", help="Instead of one request: TASK:PATH of many.")] = None,
    guard: Annotated[
        Path | None, typer.Option("--guard", help="JSON Lines of prompts, and answers, that no edit may break.")
    ] = None,
    on_fail: Annotated[
        Literal["report", "refuse", "retry"], typer.Option("--on-fail", help="What happens to an edit that fails its checks.")
    ] = "report",
    scale: Annotated[float, typer.Option("--scale", help="Strength of the edit.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Pose the prompts as chat turns.")] = False,
    on_base: Annotated[
        bool,
        typer.Option("--on-base/--under-active", help="Make it on the base model, or under the active edits; it joins them."),
    ] = True,
    author_name: Author = None,
    reason: Reason = "",
    rehearse: common.Rehearse = None,
    model: common.Model = "starter",
    editor: common.EditorOption = None,
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Make edits, check them, and keep them; or take edit folders in. All or none.

    A new folder becomes a store.
    """
    if [bool(folders), prompt is not None and target is not None, data is not None].count(True) != 1 or (
        (prompt is None) != (target is None)
    ):
        raise InputError("say what to add: either edit folders, or --prompt and --target, or --data TASK:PATH")
    if folders and (rephrasings or unrelated or guard):
        raise InputError(
            "edit folders are taken in as they are, without checks; leave --rephrasing, --unrelated and --guard out"
        )
    if data and (rephrasings or unrelated):
        raise InputError("with --data, rephrasings and unrelated prompts come from the file; leave the options out")
    by: dict[str, Any] = {"author": author() if author_name is None else author_name, "reason": reason}
    if folders:
        store, records = _taken(context.obj, folders, by)
    else:
        from mendlm.session import Session, request
        from mendlm.tasks import load_edits

        examples = list(load_edits(data, skip_bad=skip_bad).examples) if data else []
        if prompt is not None and target is not None:
            examples = [request(prompt, target, rephrasings or (), unrelated or ())]
        common.seeded(seed)
        opened: dict[str, Any] = {"guards": guard, "report": common.note, **common.rehearsing(rehearse), **asdict(origin)}
        session = Session.open(model, editor=editor, store=context.obj, **opened)
        how: dict[str, Any] = {"scale": scale, "chat": chat, "on_base": on_base, "on_fail": on_fail}
        with common.progress("editing") as show:
            made = session.edit_many(examples, callback=show, **how, **by)
        store, records = session.store, [session.store.record(one.id) for one in made]
        for one in made:
            if not one.checks.passed:
                common.note(
                    f"{one.id} did not pass its checks, and is active all the same; `mendlm store {context.obj} undo {one.id}` "
                    f"takes it back, and --on-fail refuse keeps such edits out:\n{one.checks.failures()}"
                )
    lines = [f"{record.id} is {record.state}: {_line(record)}{_replaced(record)}" for record in records]
    common.emit(json_output, {"added": [record.to_json() for record in records], "head": store.head}, "\n".join(lines))


def _taken(place: Path, folders: list[Path], by: dict[str, Any]) -> tuple[Store, list[Record]]:
    """Edit folders as active edits of a store."""
    from mendlm.apply import Edit
    from mendlm.session import addition
    from mendlm.store import Store

    edits = [Edit.load(folder) for folder in folders]
    for one, where in zip(edits, folders, strict=True):
        if not (one.about.get("base") or {}).get("sha256"):
            raise InputError(f"{where} does not say which base model it is for; make it again with `mendlm edit`")
    store = Store.open(place, edits[0].about["base"])
    return store, store.add_many([addition(one, one.about["base"]) for one in edits], **by)


def _replaced(record: Record) -> str:
    return f"\n  it supersedes {', '.join(record.supersedes)}, an edit of the same prompt" if record.supersedes else ""


@app.command()
def undo(
    context: typer.Context, edit: Id = None, author_name: Author = None, reason: Reason = "", json_output: common.Json = False
) -> None:
    """Take an edit out, by default the last active one; what it had superseded is active again."""
    store = _open(context)
    record = store.undo(edit, author=author() if author_name is None else author_name, reason=reason)
    back = [one for one in store.active() if one.id in record.supersedes]
    lines = [f"{record.id} is undone: {_line(record)}", *(f"  {one.id} is active again: {_line(one)}" for one in back)]
    common.emit(json_output, {"undone": record.to_json(), "head": store.head}, "\n".join(lines))


@app.command()
def redo(
    context: typer.Context, edit: Id = None, author_name: Author = None, reason: Reason = "", json_output: common.Json = False
) -> None:
    """Put an undone edit back, by default the one that was undone last."""
    store = _open(context)
    record = store.redo(edit, author=author() if author_name is None else author_name, reason=reason)
    text = f"{record.id} is active again: {_line(record)}{_replaced(record)}"
    common.emit(json_output, {"redone": record.to_json(), "head": store.head}, text)


@app.command("list")
def list_(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Undone and superseded ones, too.")] = False,
    json_output: common.Json = False,
) -> None:
    """The active edits, oldest first."""
    store = _open(context)
    records = store.records() if everything else store.active()
    if json_output:
        content = {"base": dict(store.base), "head": store.head, "edits": [record.to_json() for record in records]}
        common.emit(True, content, "")
        return
    rows = [(r.id, r.state, r.time[:19].replace("T", " "), r.author, _line(r), r.reason) for r in records]
    common.table(f"edits of {store.base.get('name')}", ("id", "state", "time (UTC)", "author", "edit", "reason"), rows)
    common.emit(False, {}, f"head {store.head}")


@app.command()
def show(context: typer.Context, edit: Id = None, json_output: common.Json = False) -> None:
    """All that is known of an edit, by default of the last one, and what its checks saw."""
    record = _record(_open(context), edit)
    if json_output:
        common.emit(True, record.to_json(), "")
        return
    told = {name: value for name, value in record.to_json().items() if name != "checks"}
    common.emit(False, {}, "\n".join(_told(told)))
    passed = record.checks.get("passed")
    if passed is None:
        common.emit(False, {}, "checks: none were made")
        return
    rows = [
        (
            *_answers(a),
            "{:.2f} -> {:.2f}".format(*a["probability"]),
            _holds(a),
        )
        for a in record.checks["asked"]
    ]
    title = f"checks: {'passed' if passed else 'NOT passed'}"
    common.table(title, ("", "prompt", "before", "after", "probability", "holds"), rows)


def _told(content: dict[str, Any], indent: str = "") -> list[str]:
    """A line for everything that says something, those of an object under its name."""
    lines = []
    for name, value in content.items():
        if isinstance(value, dict):
            inside = _told(value, indent + "  ")
            lines += [f"{indent}{name}:", *inside] if inside else []
        elif isinstance(value, list):
            shown = (common.one_line(one["prompt"]) if isinstance(one, dict) else common.one_line(str(one)) for one in value)
            lines += [f"{indent}{name}: {' | '.join(shown)}"] if value else []
        elif value not in (None, ""):
            lines.append(f"{indent}{name}: {common.one_line(str(value))}")
    return lines


def _answers(asked: dict[str, Any]) -> tuple[str, str, str, str]:
    return asked["kind"], common.one_line(asked["prompt"]), common.one_line(asked["before"]), common.one_line(asked["after"])


def _holds(asked: dict[str, Any]) -> str:
    if not asked["ok"]:
        return "NO"
    watched = asked["kind"] in ("unrelated", "guard")
    return "was wrong already" if watched and not asked.get("was_ok", True) else "yes"


def _record(store: Store, edit: str | None) -> Record:
    if edit is not None:
        return store.record(edit)
    if not (records := store.records()):
        raise InputError("the store holds no edit yet")
    return records[-1]


@app.command()
def diff(context: typer.Context, edit: Id = None, json_output: common.Json = False) -> None:
    """The answers that an edit's checks saw change: before and after it."""
    store = _open(context)
    record = _record(store, edit)
    changed = store.diff(record.id)
    if json_output:
        common.emit(True, {"id": record.id, "changed": changed}, "")
        return
    if not record.checks.get("asked"):
        common.emit(False, {}, f"{record.id} was added without checks: no answers were seen")
        return
    rows = [_answers(one) for one in changed]
    common.table(f"{record.id}: {_line(record)}", ("", "prompt", "before", "after"), rows)


@app.command()
def log(context: typer.Context, json_output: common.Json = False) -> None:
    """Every entry, oldest first: who added, undid and redid what, when and why."""
    entries = _open(context).log()
    if json_output:
        common.emit(True, {"entries": entries}, "")
        return
    rows = [(e["number"], e["time"][:19].replace("T", " "), e["kind"], e["edit"], e["author"], e["reason"]) for e in entries]
    common.table(str(context.obj), ("", "time (UTC)", "", "edit", "author", "reason"), rows)


@app.command()
@common.loads_model
def check(
    context: typer.Context,
    guard: Annotated[Path | None, typer.Option("--guard", help="JSON Lines of prompts, and answers, to be asked too.")] = None,
    model: common.Model = "starter",
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Ask again all that the active edits promised, and guards: on the base model and under them. Exit code 1 if one fails."""
    from mendlm.gate import Gate, load_guards
    from mendlm.models import base_of
    from mendlm.session import Session

    store, gate = _open(context), Gate(guards=() if guard is None else load_guards(guard))
    loaded, tokenizer = common.open_model(model, origin, seed=seed)
    store.require_base(base_of(loaded))
    checks = Session(loaded, tokenizer, store=store, gate=gate).check()
    rows = [(*_answers(a), _holds(a)) for a in checks.to_json()["asked"]]
    if json_output:
        common.emit(True, checks.to_json(), "")
    else:
        common.table("promises and guards", ("", "prompt", "the base", "today", "holds"), rows)
    if not checks.passed:
        raise typer.Exit(1)


@app.command()
def verify(
    context: typer.Context,
    head: Annotated[
        str | None, typer.Option("--head", help="A head that you kept: the history up to it must be the same.")
    ] = None,
    json_output: common.Json = False,
) -> None:
    """Read everything again: files against their hashes, and the chain of entries. Exit code 1 if something is wrong."""
    store = _open(context)
    verdict = store.verify(head)
    whole = f"whole: {verdict.edits} edits, {verdict.entries} entries"
    if verdict.problems:
        whole = "DAMAGED" if head is None else "DAMAGED, or not what it was when the head was kept"
    lines = [*verdict.problems, f"{context.obj} is {whole}", f"head {verdict.head}"]
    if verdict.orphans:
        lines.insert(-1, f"{len(verdict.orphans)} files that no entry names, which `gc` removes")
    common.emit(json_output, asdict(verdict), "\n".join(lines))
    if verdict.problems:
        raise typer.Exit(1)


@app.command()
def gc(context: typer.Context, json_output: common.Json = False) -> None:
    """Remove files that no entry names. Undone edits stay."""
    removed = _open(context).gc()
    common.emit(json_output, {"removed": removed}, f"{len(removed)} files removed")


@app.command()
def export(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The zip file to write.")],
    json_output: common.Json = False,
) -> None:
    """Write the whole store, history and edits, as one file."""
    store = _open(context)
    store.export_to(path)
    count = len(store.records())
    common.emit(
        json_output, {"out": str(path), "edits": count, "head": store.head}, f"{count} edits in {path}\nhead {store.head}"
    )


@app.command("import")
def import_(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.")],
    author_name: Author = None,
    reason: Reason = "",
    json_output: common.Json = False,
) -> None:
    """Take another store's edits in: its whole history where that goes on from this one, else its active edits."""
    from mendlm.store import Store, base_in

    store = Store.open(context.obj, base_in(path))
    imported = store.import_from(path, author=author_name or "", reason=reason)
    how = "its history goes on from this one, and was taken over" if imported.same_history else "its active edits were added"
    lines = [f"{len(imported.added)} edits are new ({how})"]
    lines += [f"{record.id} is {record.state}: {_line(record)}{_replaced(record)}" for record in imported.added]
    added = [record.to_json() for record in imported.added]
    content = {"added": added, "entries": imported.entries, "same_history": imported.same_history, "head": store.head}
    common.emit(json_output, content, "\n".join(lines))
