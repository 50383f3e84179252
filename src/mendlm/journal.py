"""The journal of a store as plain values: entries that name their parent by its hash, and what they amount to.

    hash_n = sha256(hash_{n-1} + body_n),   hash_0 = 64 zeros

A body is canonical JSON: it adds an edit, undoes one, or redoes one. The edits of one prompt, in one form (chat or not), lie on
a pile. Adding or redoing puts an edit on top, undoing takes it out from wherever it lies. The top one is active; each one below
is superseded by the next above; those taken out are undone. Knows no database, no files and no tensors.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mendlm.errors import FormatError, InputError

ROOT = "0" * 64
"""The hash before the first entry."""
LONGEST = 4 * 2**20
"""Characters that one entry may have."""
STATES = ("active", "undone", "superseded")
_TEXT: dict[str, type] = {"kind": str, "time": str, "author": str, "reason": str}
_FIELDS: dict[str, dict[str, type]] = {
    "add": _TEXT | {"request": dict, "base": dict, "editor": dict, "file": str, "size": int, "stack": list, "checks": dict},
    "undo": _TEXT | {"edit": str},
    "redo": _TEXT | {"edit": str},
}


class Entry(NamedTuple):
    """A line of the journal: its number from 1, its parent's hash, its own, and its body as canonical JSON."""

    number: int
    parent: str
    hash: str
    body: str

    @property
    def id(self) -> str:
        """The first 12 digits of the hash, which name the edit that the entry adds."""
        return self.hash[:12]


@dataclass(frozen=True)
class Record:
    """One edit in the journal."""

    id: str
    """The first 12 hexadecimal digits of its entry's hash."""
    number: int
    """The place of its entry in the journal, from 1."""
    time: str
    """When it was added: ISO 8601, UTC."""
    author: str
    reason: str
    request: Mapping[str, Any]
    """`prompt`, `target`, `chat`, `scale`, `rephrasings`, `unrelated`, ...; empty for an edit that was not made from words."""
    base: Mapping[str, Any]
    """The model that it is for: `name`, `sha256`, ..."""
    editor: Mapping[str, Any]
    """What made it: `source`, `step`, `sha256`."""
    file: str
    """The sha256 of its safetensors file."""
    size: int
    """The bytes of that file."""
    stack: tuple[str, ...]
    """The edits that it was made under: none for one made on the base."""
    checks: Mapping[str, Any]
    """What the gate saw (`mendlm.gate.Checks`): `passed`, and `asked` with `kind`, `prompt`, `before`, `after`, `ok`, ..."""
    state: Literal["active", "undone", "superseded"]
    superseded_by: str | None
    """The edit of the same prompt and form that took its place, while it is superseded."""
    supersedes: tuple[str, ...]
    """The active edits of its prompt and form that it replaced when it was added, or redone the last time."""
    imported: Mapping[str, Any] | None = None
    """For an edit of another journal: that one's `head`, and the `id` and `time` that the edit had where it was made."""

    @property
    def origin(self) -> str:
        """The id that the edit had where it was made."""
        return self.id if self.imported is None else str(self.imported["id"])

    def to_json(self) -> dict[str, Any]:
        """As a service sends it."""
        return {**vars(self), "stack": list(self.stack), "supersedes": list(self.supersedes)}


class History:
    """What a journal of edits for `base` amounts to, entry by entry."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self.base, self.number, self.head = base, 0, ROOT
        self._added: dict[str, tuple[int, dict[str, Any]]] = {}
        self._piles: dict[tuple[str, bool, str], list[str]] = {}
        self._replaced: dict[str, tuple[str, ...]] = {}
        self._turned: dict[str, int] = {}

    def append(self, entry: Entry) -> None:
        """Take the next entry in. Raises `FormatError`, and stays as it is, for one that does not follow, has changed, or
        does what cannot be done."""
        try:
            if (entry.number, entry.parent) != (self.number + 1, self.head):
                raise InputError(f"it does not follow entry {self.number} ({self.head[:12]}...)")
            if entry.hash != digest(entry.parent, entry.body):
                raise InputError("it has changed since it was written: its hash is another")
            body = parse(entry.body)
            if body["kind"] == "add":
                self.require_base(body["base"])
                if entry.id in self._added:
                    raise InputError(f"its id {entry.id} is taken")
            else:
                self.require(body["kind"], body["edit"])
        except (InputError, FormatError) as error:
            raise FormatError(f"entry {entry.number} of the journal is wrong: {error}") from None
        self.number, self.head = entry.number, entry.hash
        edit = body.get("edit", entry.id)
        if body["kind"] == "add":
            self._added[edit] = entry.number, body
        pile, self._turned[edit] = self._pile(edit), entry.number
        if body["kind"] == "undo":
            pile.remove(edit)
        else:
            self._replaced[edit] = tuple(pile[-1:])
            pile.append(edit)

    def require(self, kind: str, edit: str) -> None:
        """Raise `InputError` if an edit cannot be undone, or redone, now."""
        if edit not in self._added:
            raise InputError(f"there is no edit {edit}")
        record = self.record(edit)
        if kind == "undo" and record.state == "undone":
            raise InputError(f"the edit {edit} is undone already; redo it to have it back")
        if kind == "redo" and record.state == "active":
            raise InputError(f"the edit {edit} is active already")
        if kind == "redo" and record.state == "superseded":
            by = record.superseded_by
            raise InputError(
                f"the edit {edit} is superseded by {by}, a later one of the same prompt; undo {by} to have it back"
            )

    def require_base(self, base: Mapping[str, Any]) -> None:
        """Raise `FormatError` for another base model."""
        if base.get("sha256") != self.base["sha256"]:
            raise FormatError(
                f"the store holds the edits of {_named(self.base)}, and was given another base model, {_named(base)}, or an "
                "edit of it; name another store, or that model"
            )

    def _pile(self, edit: str) -> list[str]:
        return self._piles.setdefault(_place(self._added[edit][1]["request"], edit), [])

    def on_top(self, request: Mapping[str, Any]) -> str | None:
        """The active edit that an edit with such a request would replace."""
        return next(iter(self._piles.get(_place(request, ""), [])[-1:]), None)

    def active(self) -> list[Record]:
        """The active edits, in the order in which they were added."""
        tops = [pile[-1] for pile in self._piles.values() if pile]
        return [self.record(edit) for edit in sorted(tops, key=lambda edit: self._added[edit][0])]

    def undone(self) -> list[str]:
        """The ids of the edits that are undone, the one that was undone last at the end."""
        out = [edit for edit in self._added if edit not in self._pile(edit)]
        return sorted(out, key=self._turned.__getitem__)

    def ids(self) -> list[str]:
        """The ids of all edits, in the order in which they were added."""
        return list(self._added)

    def record(self, edit: str) -> Record:
        """The record of an edit, by its whole id."""
        number, body = self._added[edit]
        fields = {name: value for name, value in body.items() if name not in ("kind", "stack")}
        pile, above = self._pile(edit), None
        state: Literal["active", "undone", "superseded"] = "undone"
        if edit in pile:
            above = next(iter(pile[pile.index(edit) + 1 :]), None)
            state = "active" if above is None else "superseded"
        return Record(
            id=edit,
            number=number,
            stack=tuple(body["stack"]),
            state=state,
            superseded_by=above,
            supersedes=self._replaced[edit],
            **fields,
        )

    def records(self) -> list[Record]:
        """All edits, in the order in which they were added."""
        return [self.record(edit) for edit in self._added]

    def files(self) -> dict[str, int]:
        """The files that the journal names, with their sizes."""
        return {body["file"]: body["size"] for _, body in self._added.values()}


def _place(request: Mapping[str, Any], edit: str) -> tuple[str, bool, str]:
    """Which pile an edit lies on: its prompt's, in its form; one without a prompt lies alone."""
    prompt = request.get("prompt")
    return ("", False, edit) if prompt is None else (prompt.strip(), bool(request.get("chat")), "")


def following(number: int, parent: str, body: Mapping[str, Any]) -> Entry:
    """The entry behind entry `number` of hash `parent`. Raises `InputError` for a body that is no JSON or lacks something."""
    text = canonical(body)
    parse(text)
    return Entry(number + 1, parent, digest(parent, text), text)


def digest(parent: str, body: str) -> str:
    """The hash of an entry."""
    return hashlib.sha256((parent + body).encode()).hexdigest()


def canonical(content: Mapping[str, Any]) -> str:
    """The one way to write JSON: sorted keys, no spaces, ASCII. NaN, infinity and what is no JSON are an `InputError`."""
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a record of the journal must be JSON with finite numbers: {error}") from None


def parse(text: str) -> dict[str, Any]:
    """The content of a body. Raises `InputError` if it is not one: not canonical, or with fields missing or wrong."""
    if len(text) > LONGEST:
        raise InputError(f"a record has {len(text):,} characters; at most {LONGEST:,} are kept")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"a record is not JSON: {error}") from None
    if not isinstance(body, dict) or canonical(body) != text:
        raise InputError("a record is not written in the canonical way")
    fields = _FIELDS.get(str(body.get("kind")))
    if fields is None:
        raise InputError(f"a record of the kind {body.get('kind')!r} is not known; there are: {', '.join(_FIELDS)}")
    optional = {"imported": dict} if body["kind"] == "add" else {}
    bad = set(body) - set(fields) - set(optional)
    bad |= {n for n, kind in (fields | optional).items() if type(body.get(n)) is not kind and (n in body or n in fields)}
    if not bad and body["kind"] == "add":
        bad = {name for name, right in _details(body).items() if not right}
    if bad:
        raise InputError(f"a record lacks a field, or has a wrong one: {', '.join(sorted(bad))}")
    return body


def _details(body: Mapping[str, Any]) -> dict[str, bool]:
    request, asked, imported = body["request"], body["checks"].get("asked", []), body.get("imported")
    return {
        "request.prompt": isinstance(request.get("prompt", ""), str),
        "request.chat": isinstance(request.get("chat", False), bool),
        "base.sha256": isinstance(body["base"].get("sha256"), str),
        "file": re.fullmatch("[0-9a-f]{64}", body["file"]) is not None,
        "size": body["size"] > 0,
        "stack": all(isinstance(edit, str) for edit in body["stack"]),
        "checks.asked": isinstance(asked, list) and all(isinstance(one, dict) for one in asked),
        "imported.id": imported is None or isinstance(imported.get("id"), str),
    }


def now() -> str:
    """The time, as the journal writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _named(base: Mapping[str, Any]) -> str:
    return f"{base.get('name')}, sha256 {str(base.get('sha256'))[:12]}..."
