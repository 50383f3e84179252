"""The store: a folder with the journal of one model's edits, and their files.

    STORE/journal.sqlite                 the base model, and one line an entry; nothing is ever changed or deleted there
    STORE/edits/SHA256.safetensors       one file an edit, named by its content

An edit's file is on the disk before the entry that names it is committed (WAL, `synchronous=FULL`), so that an edit which
was acknowledged is there whatever happens next, and one that was not has left at most a file that nothing names, for `gc`.
Several processes may write: each holds SQLite's lock from looking to writing. What entries mean is in `mendlm.journal`.
Imports no torch: edits are bytes here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock

from mendlm.errors import FormatError, InputError, StorageError
from mendlm.files import LOCK, folder, sha256, storing, sync, write_bytes, writing
from mendlm.journal import ROOT, Entry, History, Record, canonical, following, now

DATABASE, FILES, ENDING = "journal.sqlite", "edits", ".safetensors"
WAIT = 30.0
"""Seconds that a writer waits for another one."""
LARGEST = 2**30
"""Bytes that one edit may have."""
_BASE, _ENTRIES = "base.json", "journal.jsonl"
_RESTORE = "restore it from a copy (importing an export of this store does), or undo the edit"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """An edit to be added."""

    content: bytes
    """The safetensors file of its rows (`Edit.to_bytes`)."""
    request: Mapping[str, Any]
    """What was asked for; empty for an edit that was not made from words."""
    base: Mapping[str, Any]
    """The model that it is for: `name`, `sha256`, ..."""
    editor: Mapping[str, Any] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    stack: Sequence[str] = ()
    """The edits that it was made under: none for one made on the base."""


@dataclass(frozen=True)
class Verdict:
    """What `Store.verify` found."""

    head: str
    """The hash of the last entry: who keeps it notices any later change of the history up to it."""
    entries: int
    edits: int
    problems: tuple[str, ...] = ()
    """What is damaged; empty for a whole store."""
    orphans: tuple[str, ...] = ()
    """Files that no entry names, left by writers that were interrupted: harmless, and removed by `gc`."""


@dataclass(frozen=True)
class Imported:
    """What `Store.import_from` took in."""

    added: tuple[Record, ...]
    """Edits that are new here."""
    entries: int
    """Entries that were written."""
    same_history: bool
    """Whether the other journal begins with this one, so that both are the same now."""


def _tables(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE base (body TEXT NOT NULL)")
    connection.execute(
        "CREATE TABLE journal (number INTEGER PRIMARY KEY, parent TEXT NOT NULL UNIQUE, hash TEXT NOT NULL UNIQUE, "
        "body TEXT NOT NULL)"
    )


def _append_only(connection: sqlite3.Connection) -> None:
    for table in ("base", "journal"):
        for change in ("UPDATE", "DELETE"):
            connection.execute(
                f"CREATE TRIGGER {table}_{change.lower()} BEFORE {change} ON {table} "
                "BEGIN SELECT RAISE(ABORT, 'the journal only grows'); END"
            )


MIGRATIONS = (_tables, _append_only)
"""Number n brings a database from version n - 1 to n; a new one goes through all of them."""


class Store:
    """The edits of one base model, in a folder or in memory. One thread uses it at a time; several processes may."""

    def __init__(self, connection: sqlite3.Connection, place: Path | None) -> None:
        self._connection, self.place = connection, place
        self._held: dict[str, bytes] = {}
        with _naming(place):
            (body,) = connection.execute("SELECT body FROM base").fetchone()
            self._history = History(json.loads(body))
        self._refresh()

    @classmethod
    def open(cls, place: str | Path, base: Mapping[str, Any] | None = None) -> Store:
        """The store of a folder, which is made if there is none and a base is given.

        Args:
            base: the model that it is for: `name`, `sha256`, ...

        Raises `FormatError` for a store of another base, a damaged one, and one of a later version of mendlm; `InputError`
        for a folder that is none, without a base; `StorageError` where it cannot be written. A store in a folder that this
        process may not write can be read; what would change it is a `StorageError`.
        """
        place = Path(place)
        _require_place(place, base)
        if (place / DATABASE).exists() and not os.access(place, os.W_OK):
            return cls._opened(_readable(place), place, base)
        with folder(place), _naming(place):
            with storing(place), filelock.FileLock(place / LOCK, timeout=WAIT):  # two may make it at once
                connection = _connected(place / DATABASE)
                try:
                    _migrate(connection, base, place)
                    (place / FILES).mkdir(exist_ok=True)
                    sync(place)
                except BaseException:
                    connection.close()
                    raise
            return cls._opened(connection, place, base)

    @classmethod
    def _opened(cls, connection: sqlite3.Connection, place: Path, base: Mapping[str, Any] | None) -> Store:
        try:
            store = cls(connection, place)
            if base is not None:
                store.require_base(base)
        except BaseException:
            connection.close()
            raise
        return store

    @classmethod
    def memory(cls, base: Mapping[str, Any]) -> Store:
        """A store that is gone when it is let go of."""
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        _require_base(base)
        _migrate(connection, base, None)
        return cls(connection, None)

    def close(self) -> None:
        """Let go of the files. Nothing is lost without it."""
        self._connection.close()

    def require_base(self, base: Mapping[str, Any]) -> None:
        """Raise `FormatError` unless the store is for this base model."""
        self._history.require_base(base)

    # Reading

    @property
    def base(self) -> Mapping[str, Any]:
        """The model that the edits are for."""
        return self._history.base

    @property
    def head(self) -> str:
        """The hash of the last entry; 64 zeros while there is none."""
        self._refresh()
        return self._history.head

    def records(self) -> list[Record]:
        """All edits, in the order in which they were added."""
        self._refresh()
        return self._history.records()

    def active(self) -> list[Record]:
        """The active edits, in the order in which they were added."""
        self._refresh()
        return self._history.active()

    def record(self, edit: str) -> Record:
        """An edit by its id, or by the beginning of it that no other has. Raises `InputError` if there is none."""
        self._refresh()
        return self._history.record(self._id(edit))

    def replaced_by(self, request: Mapping[str, Any]) -> str | None:
        """The active edit that one with such a request would replace: of the same prompt and form."""
        self._refresh()
        return self._history.on_top(request)

    def content(self, edit: str) -> bytes:
        """An edit's file. Raises `FormatError` if it is missing or has changed."""
        record = self.record(edit)
        return self._file(record.file, record.size)

    def log(self) -> list[dict[str, Any]]:
        """Every entry, oldest first: `number`, `hash`, `kind` (add, undo, redo), `edit`, `time`, `author`, `reason`."""
        self._refresh()
        told = []
        for entry in self._rows():
            body = json.loads(entry.body)
            kept = {name: body[name] for name in ("kind", "time", "author", "reason")}
            told.append({"number": entry.number, "hash": entry.hash, "edit": body.get("edit", entry.id), **kept})
        return told

    def diff(self, edit: str) -> list[dict[str, Any]]:
        """What an edit's gate saw change: its prompts whose answers before and after it differ."""
        return [asked for asked in self.record(edit).checks.get("asked", ()) if asked.get("before") != asked.get("after")]

    def _id(self, edit: str) -> str:
        ids = self._history.ids()
        found = [edit] if edit in ids else [one for one in ids if len(edit) >= 4 and one.startswith(edit)]
        if len(found) != 1:
            few = f"{len(found)} edits begin with" if found else "there is no edit"
            raise InputError(f"{few} {edit!r} in the store, which holds {len(ids)}; `list` shows their ids")
        return found[0]

    def _refresh(self) -> None:
        """Take in what other processes have written."""
        history = self._history
        with _naming(self.place):
            rows = self._connection.execute(
                "SELECT number, parent, hash, body FROM journal WHERE number >= ? ORDER BY number", (max(1, history.number),)
            ).fetchall()
        if history.number and (not rows or rows[0][2] != history.head):
            raise FormatError(f"entry {history.number} of {self} has changed since it was read; run `verify`, restore a copy")
        for row in rows[1 if history.number else 0 :]:
            history.append(Entry(*row))

    def _file(self, name: str, size: int) -> bytes:
        if self.place is None:
            return self._held[name]
        path = self._path(name)
        try:
            with path.open("rb") as file:
                content = file.read(size + 1)
        except OSError as error:
            raise FormatError(f"the edit's file {path} cannot be read: {error.strerror}; {_RESTORE}") from None
        if hashlib.sha256(content).hexdigest() != name:
            raise FormatError(f"the edit's file {path} has changed since it was written; {_RESTORE}")
        return content

    def _path(self, name: str) -> Path:
        assert self.place is not None
        return self.place / FILES / (name + ENDING)

    # Writing

    def add(self, addition: Addition, *, author: str = "", reason: str = "") -> Record:
        """Write an edit: `add_many` of one."""
        return self.add_many([addition], author=author, reason=reason)[0]

    def add_many(self, additions: Sequence[Addition], *, author: str = "", reason: str = "") -> list[Record]:
        """Write edits, all or none; when this returns, they are on the disk for good, and active.

        An active edit of the same prompt and form is superseded (`Record.supersedes`). Raises `FormatError` for another
        base, `InputError` for what is no JSON, and `StorageError` for a full disk: then nothing has changed.
        """
        with self._writing() as new:
            ids = [self._add(one, {"author": author, "reason": reason}, new) for one in additions]
        return [self._history.record(edit) for edit in ids]

    def undo(self, edit: str | None = None, *, author: str = "", reason: str = "") -> Record:
        """Take an edit out, by default the last active one; what it had superseded is active again."""
        return self._turn("undo", edit, author, reason)

    def redo(self, edit: str | None = None, *, author: str = "", reason: str = "") -> Record:
        """Put an undone edit back in its place, by default the one that was undone last; it supersedes as when it was added."""
        return self._turn("redo", edit, author, reason)

    def _turn(self, kind: Literal["undo", "redo"], edit: str | None, author: str, reason: str) -> Record:
        with self._writing():
            edit = self.latest(kind) if edit is None else self._id(edit)
            self._history.require(kind, edit)
            self._append({"kind": kind, "time": now(), "author": author, "reason": reason, "edit": edit})
        return self._history.record(edit)

    def latest(self, kind: Literal["undo", "redo"]) -> str:
        """The id that `undo` or `redo` takes if none is given. Raises `InputError` if there is none."""
        self._refresh()
        history = self._history
        found = [record.id for record in history.active()] if kind == "undo" else history.undone()
        if not found:
            raise InputError(f"there is nothing to {kind}: the store has no {'active' if kind == 'undo' else 'undone'} edit")
        return found[-1]

    def _add(self, addition: Addition, more: Mapping[str, Any], new: list[str]) -> str:
        content, size = addition.content, len(addition.content)
        if not 0 < size <= LARGEST:
            raise InputError(f"an edit's file has {size:,} bytes; a store takes 1 to {LARGEST:,}")
        self._history.require_base(addition.base)
        fields = {name: dict(getattr(addition, name)) for name in ("request", "base", "editor", "checks")}
        file = hashlib.sha256(content).hexdigest()
        described = {**fields, **more, "stack": list(addition.stack), "file": file, "size": size}
        entry = self._append({"kind": "add", "time": now(), **described})
        self._keep(file, content, new)
        return entry.id

    def _keep(self, file: str, content: bytes, new: list[str]) -> None:
        if self.place is None:
            self._held[file] = content
            return
        path = self._path(file)
        if not path.exists():
            new.append(file)
        elif sha256(path) == file:
            return
        write_bytes(path, content)  # in place of a damaged one, too

    def _append(self, body: Mapping[str, Any]) -> Entry:
        history = self._history
        entry = following(history.number, history.head, body)
        self._connection.execute("INSERT INTO journal (number, parent, hash, body) VALUES (?, ?, ?, ?)", entry)
        history.append(entry)
        return entry

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the store against other writers; what was written is kept if the block ends well."""
        with _naming(self.place):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[list[str]]:
        """Add to the journal, whole or not at all. The block notes the files that it writes, to be removed if it fails."""
        new: list[str] = []
        try:
            with self._alone():
                self._refresh()
                try:
                    yield new
                except BaseException:
                    for file in new:  # not if committing fails, since the entries may be on the disk by then
                        self._path(file).unlink(missing_ok=True)
                    raise
        except BaseException:
            self._history = History(self.base)  # to be read again
            raise

    def _rows(self) -> list[Entry]:
        rows = self._connection.execute("SELECT number, parent, hash, body FROM journal ORDER BY number")
        return [Entry(*row) for row in rows]

    # Care

    def verify(self, head: str | None = None) -> Verdict:
        """Read everything again: the database, the chain, and every file against its hash.

        Args:
            head: the hash of an entry that was kept elsewhere: the history up to it must be what it was.
        """
        if head is not None and re.fullmatch("[0-9a-f]{64}", head) is None:
            raise InputError(f"the head {head!r} is no hash of an entry: give all of its 64 hexadecimal digits")
        history, seen, problems = History(self.base), {ROOT}, []
        with self._alone():
            found = [line for (line,) in self._connection.execute("PRAGMA integrity_check")]
            problems += [f"the database: {line}" for line in found if line != "ok"]
            for entry in self._rows():
                try:
                    history.append(entry)
                except FormatError as error:
                    problems.append(str(error))
                    break
                seen.add(history.head)
            orphans = self._orphans(history)
        for file, size in history.files().items():
            try:
                self._file(file, size)
            except FormatError as error:
                problems.append(str(error))
        if head is not None and head not in seen:
            problems.append(f"the history has no entry {head}: it is not the one whose head was kept")
        return Verdict(history.head, history.number, len(history.ids()), tuple(problems), tuple(orphans))

    def gc(self) -> list[str]:
        """Remove the files that no entry names; returns their names. Edits that are undone stay: they can be redone."""
        with self._writing():
            orphans = self._orphans(self._history)
            for name in orphans:
                path = self._path("").with_name(name)
                with storing(path):
                    path.unlink()
        with _naming(self.place):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return orphans

    def _orphans(self, history: History) -> list[str]:
        named = {file + ENDING for file in history.files()}
        if self.place is None:
            return []
        return sorted(path.name for path in (self.place / FILES).iterdir() if path.name not in named)

    # Elsewhere

    def export_to(self, path: str | Path) -> None:
        """Write all of it, history and files, as one zip file; whole or not at all. Raises `InputError` if it exists."""
        path = Path(path)
        if path.exists():
            raise InputError(f"{path} exists; name another file")
        with self._writing(), folder(path.parent):
            lines = [json.dumps(entry._asdict(), sort_keys=True) + "\n" for entry in self._rows()]
            with writing(path) as file, zipfile.ZipFile(file, "w") as archive:
                archive.writestr(_named(_BASE), canonical(self.base))
                archive.writestr(_named(_ENTRIES), "".join(lines))
                for name, size in sorted(self._history.files().items()):
                    archive.writestr(_named(f"{FILES}/{name}{ENDING}"), self._file(name, size))

    def import_from(self, path: str | Path, *, author: str = "", reason: str = "") -> Imported:
        """Take in what `export_to` wrote.

        If the other journal goes on where this one ends, its entries follow here as they are, and both have one history. Else
        the edits that are active there, and unknown here, are added as new ones, superseding those of the same prompts here;
        they say where they come from (`Record.imported`). Either way files that both have, and that are missing or damaged
        here, are written again. All or nothing.

        Raises `FormatError` for a file that is none, a damaged one, and one for another base.
        """
        with _Export(Path(path)) as other:
            self._history.require_base(other.history.base)
            with self._writing() as new:
                begun, known = self._history.number, set(self._history.ids())
                ours, theirs = ([ROOT, *(entry.hash for entry in entries)] for entries in (self._rows(), other.entries))
                if goes_on := ours == theirs[: len(ours)]:
                    for entry in other.entries[begun:]:
                        self._append(json.loads(entry.body))
                elif theirs != ours[: len(theirs)]:
                    origins = {record.origin for record in self._history.records()}
                    for record in other.history.active():
                        if record.origin not in origins:
                            self._add(other.addition(record), other.told(record, author, reason), new)
                named = self._history.files()
                for file, size in other.history.files().items():
                    if file in named:
                        self._keep(file, other.file(file, size), new)
        added = [record for record in self._history.records() if record.id not in known]
        return Imported(tuple(added), self._history.number - begun, goes_on)

    def __str__(self) -> str:
        return "a store in memory" if self.place is None else f"the store {self.place}"


def base_in(path: str | Path) -> Mapping[str, Any]:
    """The model that the edits of an exported store are for. Raises `FormatError` for a file that is none."""
    with _Export(Path(path)) as export:
        return export.history.base


class _Export:
    """A file that `Store.export_to` wrote, checked."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Export:
        try:
            self._archive = zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise FormatError(f"{self.path} does not exist") from None
        except (OSError, zipfile.BadZipFile) as error:
            raise FormatError(f"{self.path} is no export of a store: {error}") from None
        try:
            self._read()
        except BaseException:
            self._archive.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def _read(self) -> None:
        try:
            self.history = History(json.loads(self._member(_BASE, LARGEST)))
            lines = self._member(_ENTRIES, LARGEST).decode().splitlines()
            self.entries = [_entry(json.loads(line)) for line in lines]
            self.history.base["sha256"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(f"{self.path} is damaged: its journal cannot be read ({error})") from None
        for entry in self.entries:
            self.history.append(entry)

    def file(self, name: str, size: int) -> bytes:
        """An edit's file."""
        content = self._member(f"{FILES}/{name}{ENDING}", size)
        if hashlib.sha256(content).hexdigest() != name:
            raise FormatError(f"{self.path} is damaged: the file of the edit {name[:12]}... has changed")
        return content

    def _member(self, name: str, most: int) -> bytes:
        try:
            with self._archive.open(name) as file:
                content = file.read(most + 1)
        except (KeyError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OSError) as error:
            raise FormatError(f"{self.path} is no whole export of a store: {error}") from None
        if len(content) > most:
            raise FormatError(f"{self.path} is damaged: {name} has more than {most:,} bytes")
        return content

    def addition(self, record: Record) -> Addition:
        """An edit of this journal, for another one."""
        kept = {name: getattr(record, name) for name in ("request", "base", "editor", "checks", "stack")}
        return Addition(content=self.file(record.file, record.size), **kept)

    def told(self, record: Record, author: str, reason: str) -> dict[str, Any]:
        """Who adds it, why, and where it comes from."""
        origin = {"id": record.id, "time": record.time} if record.imported is None else record.imported
        return {
            "author": author or record.author,
            "reason": reason or record.reason,
            "imported": {**origin, "head": self.history.head},
        }


def _entry(content: Any) -> Entry:
    entry = Entry(**content)
    if [type(value) for value in entry] != [int, str, str, str]:
        raise TypeError("a line is no entry")
    return entry


def _named(name: str) -> zipfile.ZipInfo:
    """A member of an archive whose bytes do not depend on the day."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _require_base(base: Mapping[str, Any]) -> None:
    if not isinstance(base.get("sha256"), str):
        raise InputError("a new store needs its base model, with its sha256")
    canonical(base)


def _require_place(place: Path, base: Mapping[str, Any] | None) -> None:
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file; a store is a folder")
    if (place / DATABASE).exists():
        return
    if base is None:
        raise InputError(f"{place} is no store: it has no {DATABASE}; add an edit to it, and it is made")
    other = {path.name for path in place.iterdir()} - {FILES, LOCK} if place.exists() else set()
    if other := {name for name in other if not name.startswith(DATABASE)}:  # which another process may be making now
        raise InputError(
            f"{place} is no store, and it holds other files ({min(other)}, ...); name an empty folder, or a new one"
        )
    _require_base(base)


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _readable(place: Path) -> sqlite3.Connection:
    """A connection to a store that may not be written. SQLite would need to write for a journal that is not yet taken in."""
    unfinished = place / f"{DATABASE}-wal"
    if unfinished.exists() and unfinished.stat().st_size:
        raise StorageError(
            f"the store {place} is in use, or a writer of it was interrupted, and this process may not write there; "
            f"read it where it can be written once, as `mendlm store {place} list` does, or give permission to write"
        )
    with _naming(place):
        connection = sqlite3.connect(
            f"{(place / DATABASE).absolute().as_uri()}?mode=ro&immutable=1",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != len(MIGRATIONS):
                raise FormatError(
                    f"the store {place} is of version {version}, this mendlm reads {len(MIGRATIONS)}, and nothing may be "
                    "written there; copy it to where it can be, or use that version of mendlm"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _migrate(connection: sqlite3.Connection, base: Mapping[str, Any] | None, place: Path | None) -> None:
    """Bring a database to this version, all steps or none."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(MIGRATIONS):
        return
    if version > len(MIGRATIONS):
        raise FormatError(
            f"the store {place} is of version {version}, and this mendlm knows up to {len(MIGRATIONS)}; use a later mendlm"
        )
    connection.execute("BEGIN IMMEDIATE")
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()  # another process may have come first
        for migration in MIGRATIONS[version:]:
            migration(connection)
        if version == 0:
            if base is None:
                raise InputError(f"{place} is no store: its making was interrupted; add an edit to it, and it is made")
            connection.execute("INSERT INTO base (body) VALUES (?)", (canonical(base),))
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextlib.contextmanager
def _naming(place: Path | None) -> Iterator[None]:
    """Say what SQLite's errors mean."""
    where = "the store in memory" if place is None else f"the store {place}"
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _FULL:
            raise StorageError(f"cannot write {where}: {error}; free the disk, or see to its permissions") from error
        if code in _BUSY:
            raise StorageError(f"{where} is held by another process for more than {WAIT:g} seconds; try again") from error
        raise FormatError(f"{where} is damaged: {error}; restore it from a copy") from error
