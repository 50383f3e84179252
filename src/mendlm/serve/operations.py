"""What the service does with a session: functions that run alone on the thread that owns it, and return plain JSON.

Knows no HTTP but for the `Problem` that it raises. Ids are whole here: the beginning of one, as the command line takes it,
could come to mean another edit.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mendlm.apply import Edit
from mendlm.errors import InputError
from mendlm.export import export_peft
from mendlm.files import storing
from mendlm.journal import Record
from mendlm.serve.problems import Problem
from mendlm.serve.schemas import PAGE, EditRequest, PreviewRequest, Unrelated
from mendlm.serve.worker import Limits
from mendlm.session import Session
from mendlm.tasks import Probe

Task = Callable[[Session], Any]


def list_edits(limit: int, after: str | None, state: str | None) -> Task:
    """A page of the journal: at most `limit` edits, those behind the edit `after`, those of a state."""

    def task(session: Session) -> dict[str, Any]:
        records = session.store.records()
        if after is not None:
            number = known(session, after).number
            records = [record for record in records if record.number > number]
        records = [record for record in records if state in (None, record.state)]
        page = [record.to_json() for record in records[:limit]]
        return {"object": "list", "data": page, "head": session.store.head, "has_more": len(records) > limit}

    return task


def show(edit: str) -> Task:
    """One record."""
    return lambda session: known(session, edit).to_json()


def journal(session: Session) -> dict[str, Any]:
    """The latest entries of the journal."""
    return {"object": "list", "data": session.store.log()[-PAGE:], "head": session.store.head}


def check(session: Session) -> dict[str, Any]:
    """What the active edits promised, asked again."""
    return session.check().to_json()


def make(asked: EditRequest, author: str, limits: Limits) -> Task:
    """Make an edit."""

    def task(session: Session) -> dict[str, Any]:
        _require_short(session, asked, limits)
        made = session.edit(
            asked.prompt, asked.target, on_fail=asked.on_fail, author=author, reason=asked.reason, **_wanted(asked)
        )
        told = {"replaces": list(made.replaces), "milliseconds": made.milliseconds, "passed": made.checks.passed}
        return {"record": session.store.record(made.id).to_json(), **told}

    return task


def preview(asked: PreviewRequest, limits: Limits) -> Task:
    """Try an edit on."""

    def task(session: Session) -> dict[str, Any]:
        _require_short(session, asked, limits)
        return session.preview(asked.prompt, asked.target, **_wanted(asked)).to_json()

    return task


def turn(kind: str, edit: str, author: str, reason: str) -> Task:
    """Undo an edit, or redo it."""

    def task(session: Session) -> dict[str, Any]:
        known(session, edit)
        try:
            # An undo does not read the edit's file: an edit whose file is damaged can be undone.
            (session.store.undo if kind == "undo" else session.redo)(edit, author=author, reason=reason)
        except InputError as error:
            raise Problem(409, str(error), "conflict") from None
        return session.store.record(edit).to_json()

    return task


def one_edit(edit: str) -> Task:
    """An edit's rows."""

    def task(session: Session) -> list[Edit]:
        return [session.read(known(session, edit).id)]

    return task


def active_edits(session: Session) -> list[Edit]:
    """The rows of all active edits."""
    found = list(session.edits.values())
    if not found:
        raise Problem(404, "no edit is active, so there is no adapter", "no_edit")
    return found


def adapter(edits: Sequence[Edit]) -> bytes:
    """Edits as one PEFT adapter folder, zipped. Runs on any thread: the rows of an edit never change."""
    with tempfile.TemporaryDirectory(prefix="mendlm-") as scratch, storing(Path(scratch)):
        folder, file = Path(scratch) / "adapter", Path(scratch) / "adapter.zip"
        if len(edits) == 1:
            edits[0].to("cpu").save(folder)
        else:
            export_peft([edit.to("cpu") for edit in edits], folder)
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
        return file.read_bytes()


def known(session: Session, edit: str) -> Record:
    """The record of an id. Raises `Problem` if there is none."""
    found = next((record for record in session.store.records() if record.id == edit), None)
    if found is None:
        raise Problem(404, f"there is no edit {edit[:64]!r}; GET /v1/edits lists them", "unknown_edit")
    return found


def _require_short(session: Session, asked: PreviewRequest, limits: Limits) -> None:
    """Raise `InputError` for more text than the model can look at while others wait: nobody else is answered meanwhile."""
    form, unrelated = session.formatter, [one for one in asked.unrelated if isinstance(one, Unrelated)]
    prompts = [asked.prompt, *asked.rephrasings, *(one if isinstance(one, str) else one.prompt for one in asked.unrelated)]
    if (size := sum(len(form.encode(prompt, None, chat=asked.chat)) for prompt in prompts)) > limits.edit_tokens:
        raise InputError(
            f"the prompts have {size} tokens together; this service allows at most {limits.edit_tokens}; shorten them"
        )
    for answer in (asked.target, *(one.answer for one in unrelated if one.answer)):
        if (size := len(form.encode(asked.prompt, answer, chat=asked.chat).target)) > limits.max_tokens:
            raise InputError(f"an answer has {size} tokens; this service allows at most {limits.max_tokens}")


def _wanted(asked: PreviewRequest) -> Mapping[str, Any]:
    unrelated = [Probe(one.prompt, one.answer) if isinstance(one, Unrelated) else Probe(one) for one in asked.unrelated]
    return {
        "rephrasings": asked.rephrasings,
        "unrelated": unrelated,
        "scale": asked.scale,
        "chat": asked.chat,
        "on_base": asked.on_base,
    }
