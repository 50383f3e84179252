"""`mendlm serve` and `mendlm token`."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mendlm.cli import common
from mendlm.errors import FormatError, InputError, require

if TYPE_CHECKING:
    from mendlm.gate import Gate

token = typer.Typer(help="Who may use a service: the tokens of a file, of which it holds only hashes.", no_args_is_help=True)
TokenFile = Annotated[Path, typer.Argument(metavar="FILE", help="The file of tokens.")]


@common.loads_model
def serve(
    store: Annotated[Path, typer.Option("--store", help="The store that keeps the edits; made if there is none.")],
    model: common.Model = "starter",
    editor: common.EditorOption = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on; one that others reach needs tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0: any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Who may use it, as `mendlm token` writes it.")
    ] = None,
    guard: Annotated[
        Path | None, typer.Option("--guard", help="JSON Lines of prompts, and answers, that no edit may break.")
    ] = None,
    on_fail: Annotated[
        Literal["report", "refuse", "retry"],
        typer.Option("--on-fail", help="What happens to an edit that fails its checks, unless it says itself."),
    ] = "report",
    rehearse: common.Rehearse = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name for clients (default: its own).")] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Compress the active edits to so many rows a layer (default: not at all)."),
    ] = None,
    waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests that may wait; more are refused.")] = 64,
    batch: Annotated[int, typer.Option("--max-batch", min=1, help="Completions that are decoded together.")] = 16,
    gather: Annotated[float, typer.Option("--gather-ms", min=0, help="How long a completion waits for company.")] = 5,
    tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer, in tokens.")] = 512,
    prompt_tokens: Annotated[int, typer.Option("--max-prompt-tokens", min=1, help="The longest prompt, in tokens.")] = 2048,
    edit_tokens: Annotated[
        int, typer.Option("--max-edit-tokens", min=1, help="The prompts of an edit or a preview together, in tokens.")
    ] = 8192,
    seconds: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Seconds that a completion may take in all, and an edit may wait.")
    ] = 60,
    body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request's body.")] = 2**20,
    requests: Annotated[int, typer.Option("--max-requests", min=1, help="Requests that are answered at a time.")] = 256,
    grace: Annotated[int, typer.Option("--grace", min=0, help="Seconds to finish what was accepted, when it is ended.")] = 30,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line a request on standard error.")
    ] = True,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Serve a model that can be corrected while it runs, to OpenAI's clients and to a page in the browser.

    SIGTERM or Ctrl-C ends it: it takes nothing new, finishes what it has accepted, and exits with code 0.
    """
    for package in ("fastapi", "uvicorn"):
        require(package, "serve")
    if origin.device_map == "shards":
        raise InputError("one process serves a model; leave --device-map shards out, or take auto")
    wanted = common.editor_of(editor, model)

    from mendlm.serve import server
    from mendlm.serve.tokens import Tokens

    known = None if token_file is None else Tokens(token_file)
    with contextlib.closing(server.bound(host, port, guarded=known is not None)) as listening:
        gate = _gate(guard, on_fail)
        _require_one_base(store, wanted)

        from mendlm.models import base_of
        from mendlm.serve.app import create_app
        from mendlm.serve.door import Rules
        from mendlm.serve.worker import Limits, Worker
        from mendlm.session import Session

        limits = Limits(
            waiting=waiting,
            batch=batch,
            gather_ms=gather,
            max_tokens=tokens,
            prompt_tokens=prompt_tokens,
            edit_tokens=edit_tokens,
            seconds=seconds,
        )
        common.seeded(seed)
        opened: dict[str, Any] = {"report": common.note, **common.rehearsing(rehearse), **asdict(origin)}
        session = Session.open(model, editor=wanted, store=store, gate=gate, rank=rank, **opened)
        worker = Worker(session, limits)
        served = name or str(base_of(session.model)["name"])
        app = create_app(worker, tokens=known, name=served, rules=Rules(body=body, requests=requests))
        worker.start()
        try:
            server.run(
                app,
                listening,
                grace=grace,
                access_log=access_log,
                ready=lambda: common.note(f"serving {served} on {server.place(listening)}"),
            )
        finally:
            worker.close(grace)
            session.store.close()
    common.note("closed")


def _gate(guard: Path | None, on_fail: Literal["report", "refuse", "retry"]) -> Gate:
    from mendlm.gate import Gate, load_guards

    return Gate(guards=load_guards(guard) if guard is not None else (), on_fail=on_fail)


def _require_one_base(store: Path, editor: str) -> None:
    """Raise `FormatError`, before the model is loaded, for an editor or a store that is none, or of two different models."""
    from mendlm.checkpoint import load_editor
    from mendlm.editor import editor_file
    from mendlm.store import DATABASE, Store

    _, about = load_editor(editor_file(editor))
    if not (store / DATABASE).exists():
        return
    with contextlib.closing(Store.open(store)) as opened:
        theirs = about.get("base", {})
        if theirs.get("sha256") not in (None, opened.base["sha256"]):
            raise FormatError(
                f"the store {store} keeps edits of another base model ({opened.base.get('name')}) than the one that the editor "
                f"'{editor}' was trained for ({theirs.get('name')}); name another --store, or that model and its editor"
            )


@token.command()
def add(
    file: TokenFile,
    name: Annotated[str, typer.Option("--name", help="Whose it is; the journal names its edits so.")],
    role: Annotated[
        Literal["read", "edit"], typer.Option("--role", help="read: ask, list, try on. edit: also make, undo and redo edits.")
    ] = "read",
    json_output: common.Json = False,
) -> None:
    """Make a token and print it, once: the file keeps a hash of it."""
    from mendlm.serve import tokens

    secret = tokens.add(file, name, role)
    common.note(f"a token of the role '{role}' for '{name}'; it is not shown again:")
    common.emit(json_output, {"name": name, "role": role, "token": secret}, secret)


@token.command(name="list")
def list_tokens(file: TokenFile, json_output: common.Json = False) -> None:
    """Who has a token."""
    from mendlm.serve import tokens

    found = [{"name": one.name, "role": one.role, "created": one.created} for one in tokens.load(file)]
    lines = [f"{one['created']}  {one['role']}  {one['name']}" for one in found]
    common.emit(json_output, {"tokens": found}, "\n".join(lines) or "no tokens")


@token.command()
def remove(
    file: TokenFile,
    name: Annotated[str, typer.Option("--name", help="Whose token.")],
    json_output: common.Json = False,
) -> None:
    """Take a token out of the file; a service that uses the file refuses it from then on."""
    from mendlm.serve import tokens

    tokens.remove(file, name)
    common.emit(json_output, {"removed": name}, f"removed {name}")
