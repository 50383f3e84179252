"""`mendlm push` and `pull`: edits and editors in a hub repository."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mendlm.cli import common

Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help="The hub's address (default: HF_ENDPOINT, or huggingface.co).")
]


def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An edit's folder, a run folder, or an editor file.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    results: Annotated[
        Path | None, typer.Option("--results", help="An evaluation's folder, whose summary.json fills the card.")
    ] = None,
    endpoint: Endpoint = None,
    json_output: common.Json = False,
) -> None:
    """Push an edit or an editor to a Hugging Face hub repository, with a card of what was measured."""
    from mendlm.hub import push

    url = push(path, repo, private=private, results=results, endpoint=endpoint)
    common.emit(json_output, {"repo": repo, "url": url}, f"{path} is in {repo}: {url}")


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder.")],
    revision: common.Revision = None,
    endpoint: Endpoint = None,
    force: common.Force = False,
    json_output: common.Json = False,
) -> None:
    """Bring an edit or an editor from a Hugging Face hub repository, and check it."""
    from mendlm.hub import pull

    found = pull(repo, out, revision=revision, endpoint=endpoint, force=force)
    left = f"; left there: {', '.join(found.left_out)}" if found.left_out else ""
    text = f"an {found.kind} of {repo} (commit {found.commit[:12]}) is in {out}{left}"
    common.emit(json_output, {"repo": repo, "out": str(out), **asdict(found)}, text)
