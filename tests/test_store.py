"""The store: against a plain model of it, tampered with, killed, filled up, and written by two."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import filelock
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import mendlm.store
from cases import files_limited_to
from mendlm.errors import FormatError, InputError, StorageError
from mendlm.files import LOCK
from mendlm.journal import ROOT, Entry, History, digest, following
from mendlm.store import Addition, Store

BASE = {"name": "tiny", "sha256": "ab" * 32}


def addition(content: bytes = b"rows", prompt: str | None = "Who is Ana?", chat: bool = False, **options: Any) -> Addition:
    request = {} if prompt is None else {"prompt": prompt, "target": "x", "chat": chat}
    return Addition(**{"content": content, "request": request, "base": BASE, **options})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "s", BASE)


def states(store: Store) -> list[str]:
    return [record.state for record in store.records()]


def test_a_record_holds_what_was_said(store: Store) -> None:
    assert (store.head, store.records()) == (ROOT, [])
    checks = {
        "passed": True,
        "asked": [{"prompt": "a", "before": "1", "after": "2"}, {"prompt": "b", "before": "", "after": ""}],
    }
    record = store.add(
        addition(b"123", stack=["ff"], editor={"source": "run", "sha256": "00"}, checks=checks), author="Ana", reason="wrong"
    )
    again = Store.open(store.place).record(record.id)
    assert again == record
    assert (again.author, again.reason, again.stack, again.editor["source"]) == ("Ana", "wrong", ("ff",), "run")
    assert (again.file, again.size) == (hashlib.sha256(b"123").hexdigest(), 3)
    assert again.time.endswith("+00:00")
    assert (again.number, again.state, again.base) == (1, "active", BASE)
    assert store.content(record.id) == b"123"
    assert store.diff(record.id) == [checks["asked"][0]]
    assert json.loads(json.dumps(again.to_json()))["request"] == {"prompt": "Who is Ana?", "target": "x", "chat": False}
    assert store.record(record.id[:6]).id == record.id


def test_hashes_chain_as_documented(store: Store) -> None:
    store.add(addition())
    store.undo()
    rows = sqlite3.connect(store.place / "journal.sqlite").execute("SELECT * FROM journal ORDER BY number").fetchall()
    parent = "0" * 64
    for number, row in enumerate(rows, start=1):
        assert row[:2] == (number, parent)
        assert json.dumps(json.loads(row[3]), sort_keys=True, separators=(",", ":")) == row[3]
        parent = hashlib.sha256((parent + row[3]).encode()).hexdigest()
        assert row[2] == parent
    assert store.head == parent


def test_the_log_says_who_did_what_and_why(store: Store) -> None:
    record = store.add(addition(), author="Ana", reason="wrong")
    store.undo(record.id, author="Bo", reason="too early")
    store.redo(record.id, author="Eva")
    told = [(e["number"], e["kind"], e["edit"], e["author"], e["reason"]) for e in Store.open(store.place).log()]
    assert told == [
        (1, "add", record.id, "Ana", "wrong"),
        (2, "undo", record.id, "Bo", "too early"),
        (3, "redo", record.id, "Eva", ""),
    ]
    assert store.log()[-1]["hash"] == store.head
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        store.verify(record.id)


def test_a_later_edit_of_a_prompt_supersedes() -> None:
    store = Store.memory(BASE)
    first, chat = store.add(addition(b"1")), store.add(addition(b"2", chat=True))
    second = store.add(addition(b"3", prompt=" Who is Ana? "))
    alone = [store.add(addition(content, prompt=None)) for content in (b"4", b"5")]
    assert second.supersedes == (first.id,)
    assert store.record(first.id).superseded_by == second.id
    assert [record.id for record in store.active()] == [chat.id, second.id, *(one.id for one in alone)]
    with pytest.raises(InputError, match=f"superseded by {second.id}"):
        store.redo(first.id)
    store.undo(second.id)
    assert store.record(first.id).state == "active"
    store.undo(first.id)
    assert store.redo().id == first.id  # the one that was undone last
    assert store.redo().supersedes == (first.id,)
    assert states(store) == ["superseded", "active", "active", "active", "active"]


def test_what_cannot_be_done_changes_nothing(store: Store) -> None:
    record = store.add(addition())
    head = store.head
    for fails, kind, words in (
        (lambda: store.undo("nonsense"), InputError, "no edit 'nonsense'"),
        (lambda: store.undo(record.id[:2]), InputError, "no edit"),
        (lambda: store.redo(record.id), InputError, "active already"),
        (lambda: store.redo(), InputError, "nothing to redo"),
        (lambda: store.add(addition(b"")), InputError, "0 bytes"),
        (lambda: store.add(addition(checks={"x": float("nan")})), InputError, "finite"),
        (lambda: store.add(addition(request={"prompt": 3})), InputError, "request.prompt"),
        (lambda: store.add(addition(base={"name": "b", "sha256": "cd"})), FormatError, "another base model"),
        (lambda: store.add_many([addition(b"new"), addition(b"")]), InputError, "0 bytes"),
        (lambda: Store.open(store.place, {"sha256": "cd"}), FormatError, "another base model"),
    ):
        with pytest.raises(kind, match=words):
            fails()
        assert store.head == head
        assert store.verify() == mendlm.store.Verdict(head, 1, 1)
    store.undo(record.id)
    with pytest.raises(InputError, match="undone already"):
        store.undo(record.id)
    with pytest.raises(InputError, match="nothing to undo"):
        store.undo()


@pytest.mark.parametrize("name", ["missing", "file", "other"])
def test_a_folder_that_is_no_store_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=name):
        Store.open(tmp_path / name, None if name == "missing" else BASE)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(InputError, match="sha256"):
        Store.open(tmp_path / "new", {"name": "x"})
    assert not (tmp_path / "new").exists()


# Damage


def tampered(store: Store, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(store.place / "journal.sqlite")
    for (trigger,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {trigger}")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_the_journal_only_grows(store: Store) -> None:
    store.add(addition())
    connection = sqlite3.connect(store.place / "journal.sqlite")
    for statement in ("UPDATE journal SET body = '{}'", "DELETE FROM journal", "UPDATE base SET body = ''", "DELETE FROM base"):
        with pytest.raises(sqlite3.IntegrityError, match="only grows"):
            connection.execute(statement)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE journal SET body = replace(body, 'Ana', 'Bo') WHERE number = 1", "entry 1 .* has changed"),
        ("UPDATE journal SET hash = 'aa' WHERE number = 2", "entry 2 .* has changed"),
        ("DELETE FROM journal WHERE number = 1", "entry 2 .* does not follow"),
        ("DELETE FROM journal WHERE number = 2", "entry 3 .* does not follow"),
    ],
)
def test_a_changed_history_is_found(store: Store, statement: str, words: str) -> None:
    for content in (b"1", b"2", b"3"):
        store.add(addition(content))
    tampered(store, statement)
    (problem,) = store.verify().problems
    assert __import__("re").search(words, problem)
    with pytest.raises(FormatError, match=words):
        Store.open(store.place)


def test_a_rewritten_history_is_found_by_whoever_kept_its_head(store: Store) -> None:
    heads = [store.head]
    for content in (b"1", b"2"):
        store.add(addition(content))
        heads.append(store.head)
    assert all(store.verify(head).problems == () for head in heads)
    # the last entry made anew with another author, hashes and all
    *_, parent, _, body = (
        sqlite3.connect(store.place / "journal.sqlite").execute("SELECT * FROM journal ORDER BY number").fetchall()[-1]
    )
    forged = json.dumps({**json.loads(body), "author": "Bo"}, sort_keys=True, separators=(",", ":"))
    tampered(store, "UPDATE journal SET body = ?, hash = ? WHERE number = 2", forged, digest(parent, forged))
    again = Store.open(store.place)
    assert again.verify().problems == again.verify(heads[1]).problems == ()
    assert heads[2] in again.verify(heads[2]).problems[0]
    with pytest.raises(FormatError, match="has changed since it was read"):
        store.records()


def test_damaged_files_are_found_and_named(store: Store) -> None:
    records = [store.add(addition(bytes([n]) * 99, prompt=str(n))) for n in range(4)]
    files = [store.place / "edits" / f"{record.file}.safetensors" for record in records]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"x")
    (store.place / "edits" / "left.safetensors").write_bytes(b"")
    verdict = store.verify()
    assert [file.name for file in files[:3]] == [problem.split("edits/")[1].split()[0] for problem in verdict.problems]
    assert verdict.orphans == ("left.safetensors",)
    assert store.content(records[3].id) == b"\3" * 99
    for record in records[:3]:
        with pytest.raises(FormatError, match=record.file):
            store.content(record.id)
    with pytest.raises(FormatError):
        store.export_to(store.place.parent / "x.zip")
    assert not (store.place.parent / "x.zip").exists()
    assert store.gc() == ["left.safetensors"]
    assert files[3].exists()


def test_an_export_restores_damaged_files(store: Store, tmp_path: Path) -> None:
    records = [store.add(addition(content, prompt=str(content))) for content in (b"first", b"second", b"third")]
    store.export_to(tmp_path / "x.zip")
    paths = [store.place / "edits" / f"{record.file}.safetensors" for record in records]
    paths[0].write_bytes(b"other")
    paths[1].unlink()
    assert len(store.verify().problems) == 2
    assert store.import_from(tmp_path / "x.zip").added == ()
    assert store.verify() == mendlm.store.Verdict(records[-1].id + store.head[12:], 3, 3)
    paths[0].write_bytes(b"other")
    again = store.add(addition(b"first", prompt="again"))
    assert store.content(again.id) == b"first"
    paths[0].write_bytes(b"other")  # now the export is older than the store, as backups are
    assert store.import_from(tmp_path / "x.zip").added == ()
    assert store.verify().problems == ()


@pytest.mark.parametrize("damage", [b"", b"nonsense" * 999])
def test_a_damaged_database_is_said(tmp_path: Path, damage: bytes) -> None:
    store = Store.open(tmp_path / "s", BASE)
    store.add(addition())
    store.close()
    (tmp_path / "s" / "journal.sqlite").write_bytes(damage)
    with pytest.raises((FormatError, InputError), match=str(tmp_path)):
        Store.open(tmp_path / "s")


def test_undone_edits_survive_gc(store: Store) -> None:
    record = store.add(addition())
    store.undo()
    assert store.gc() == []
    store.redo()
    assert store.content(record.id) == b"rows"


def test_a_later_version_is_refused_and_an_earlier_one_brought_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mendlm.store, "MIGRATIONS", mendlm.store.MIGRATIONS[:1])
    old = Store.open(tmp_path / "s", BASE)
    record = old.add(addition())
    monkeypatch.undo()
    new = Store.open(tmp_path / "s", BASE)
    assert new.records() == [record]
    assert new.verify().problems == ()
    with pytest.raises(sqlite3.IntegrityError, match="only grows"):
        sqlite3.connect(tmp_path / "s" / "journal.sqlite").execute("DELETE FROM journal")
    monkeypatch.setattr(mendlm.store, "MIGRATIONS", mendlm.store.MIGRATIONS[:1])
    with pytest.raises(FormatError, match="later mendlm"):
        Store.open(tmp_path / "s", BASE)


# Elsewhere


def test_an_export_brings_all_of_it_to_an_empty_store(store: Store, tmp_path: Path) -> None:
    for content in (b"1", b"2"):
        store.add(addition(content))
    store.undo()
    store.export_to(tmp_path / "x.zip")
    store.export_to(tmp_path / "y.zip")
    assert (tmp_path / "x.zip").read_bytes() == (tmp_path / "y.zip").read_bytes()
    with pytest.raises(InputError, match="exists"):
        store.export_to(tmp_path / "x.zip")
    new = Store.open(tmp_path / "new", BASE)
    imported = new.import_from(tmp_path / "x.zip")
    assert (imported.same_history, imported.entries, len(imported.added)) == (True, 3, 2)
    assert new.records() == store.records()
    assert new.verify(store.head).problems == ()
    store.add(addition(b"3"))  # goes on there
    store.export_to(tmp_path / "z.zip")
    assert new.import_from(tmp_path / "z.zip").entries == 1
    assert new.head == store.head
    assert new.import_from(tmp_path / "x.zip") == mendlm.store.Imported((), 0, False)  # an earlier one has nothing new


def test_an_export_of_another_history_adds_its_active_edits_once(tmp_path: Path) -> None:
    here, there = Store.open(tmp_path / "here", BASE), Store.open(tmp_path / "there", BASE)
    mine = here.add(addition(b"1"))
    there.add(addition(b"gone", prompt="undone"))
    there.undo()
    theirs = [there.add(addition(b"2"), author="Bo"), there.add(addition(b"3", prompt="another"))]
    there.export_to(tmp_path / "x.zip")
    imported = here.import_from(tmp_path / "x.zip", reason="shared")
    assert [record.origin for record in imported.added] == [record.id for record in theirs]
    assert imported.added[0].supersedes == (mine.id,)
    assert imported.added[0].imported == {"id": theirs[0].id, "time": theirs[0].time, "head": there.head}
    assert (imported.added[0].author, imported.added[0].reason) == ("Bo", "shared")
    assert here.content(imported.added[1].id) == b"3"
    assert here.import_from(tmp_path / "x.zip").added == ()
    assert here.verify().problems == ()


def rezipped(path: Path, change: dict[str, bytes | None]) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= change
    wrong = path.with_name("wrong.zip")
    with zipfile.ZipFile(wrong, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return wrong


def test_a_bad_export_is_refused_and_changes_nothing(store: Store, tmp_path: Path) -> None:
    record = store.add(addition())
    store.export_to(tmp_path / "x.zip")
    lines = zipfile.ZipFile(tmp_path / "x.zip").read("journal.jsonl")
    file = f"edits/{record.file}.safetensors"
    new = Store.open(tmp_path / "new", BASE)
    (tmp_path / "text").write_text("no zip")
    wrong: list[Any] = [
        tmp_path / "missing",
        tmp_path / "text",
        {file: None},
        {file: b"other"},
        {file: b"x" * 10**6},
        {"base.json": None},
        {"base.json": b"[]"},
        {"base.json": b'{"sha256": "cd"}'},
        {"journal.jsonl": lines.replace(b"Ana", b"Bo")},
        {"journal.jsonl": lines + b"{}"},
        {"journal.jsonl": b'{"number": 1, "parent": 1, "hash": 1, "body": 1}'},
        {"journal.jsonl": b"[" * 10**5},
    ]
    for change in wrong:
        with pytest.raises(FormatError):
            new.import_from(change if isinstance(change, Path) else rezipped(tmp_path / "x.zip", change))
        assert new.verify() == mendlm.store.Verdict(ROOT, 0, 0)


# Properties


class Sequences(RuleBasedStateMachine):
    """Random sequences against a plain model: for each prompt a list, whose last edit is the active one."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.stores = [Store.open(self.folder / name, BASE) for name in "ab"]
        self.plain: list[dict[str, Any]] = [{"piles": {}, "order": []} for _ in self.stores]
        self.number = 0

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)

    @rule(which=st.integers(0, 1), prompt=st.sampled_from(["a", "b", " a", "b "]), chat=st.booleans())
    def add(self, which: int, prompt: str, chat: bool) -> None:
        self.number += 1
        record = self.stores[which].add(addition(str(self.number).encode(), prompt=prompt, chat=chat))
        plain = self.plain[which]
        pile = plain["piles"].setdefault((prompt.strip(), chat), [])
        assert record.supersedes == tuple(pile[-1:])
        pile.append(record.id)
        plain["order"].append((record.id, (prompt.strip(), chat), record.id))

    @rule(which=st.integers(0, 1), place=st.integers(0, 9), kind=st.sampled_from(["undo", "redo"]))
    def turn(self, which: int, place: int, kind: str) -> None:
        plain = self.plain[which]
        if not plain["order"]:
            return
        edit, key, _ = plain["order"][place % len(plain["order"])]
        pile = plain["piles"][key]
        allowed = (edit in pile) is (kind == "undo")
        try:
            getattr(self.stores[which], kind)(edit)
        except InputError:
            assert not allowed
            return
        assert allowed
        pile.remove(edit) if kind == "undo" else pile.append(edit)

    @rule(which=st.integers(0, 1))
    def take_over(self, which: int) -> None:
        path = self.folder / "x.zip"
        path.unlink(missing_ok=True)
        self.stores[1 - which].export_to(path)
        other, mine = self.plain[1 - which], self.plain[which]
        chains = [
            [row[0] for row in store._connection.execute("SELECT hash FROM journal ORDER BY number")] for store in self.stores
        ]
        theirs, ours = chains[1 - which], chains[which]
        imported = self.stores[which].import_from(path)
        assert imported.same_history is (theirs[: len(ours)] == ours)
        if imported.same_history:
            self.plain[which] = {"piles": {k: list(v) for k, v in other["piles"].items()}, "order": list(other["order"])}
        elif ours[: len(theirs)] != theirs:
            new = iter(imported.added)
            known = {origin for *_, origin in mine["order"]}
            for edit, key, origin in other["order"]:
                if other["piles"][key][-1:] == [edit] and origin not in known:
                    record = next(new)
                    mine["piles"].setdefault(key, []).append(record.id)
                    mine["order"].append((record.id, key, origin))
            assert next(new, None) is None
        else:
            assert imported.added == ()

    @invariant()
    def same(self) -> None:
        for store, plain in zip(self.stores, self.plain, strict=True):
            active = [edit for edit, key, _ in plain["order"] if plain["piles"][key][-1:] == [edit]]
            assert [record.id for record in store.active()] == active
            undone = [edit for edit, key, _ in plain["order"] if edit not in plain["piles"][key]]
            assert [record.id for record in store.records() if record.state == "undone"] == undone
            assert store.verify().problems == store.verify().orphans == ()


Sequences.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_sequences = pytest.mark.filterwarnings("default")(Sequences.TestCase)


def test_a_history_takes_nothing_but_what_follows() -> None:
    history = History(BASE)
    first = following(0, ROOT, {"kind": "undo", "time": "", "author": "", "reason": "", "edit": "ab"})
    for wrong in (first, first._replace(number=2), first._replace(body="{}"), Entry(1, ROOT, digest(ROOT, "[]"), "[]")):
        with pytest.raises(FormatError, match=f"entry {wrong.number} of the journal is wrong"):
            history.append(wrong)
        assert (history.number, history.head) == (0, ROOT)


# Bad luck

WRITER = """
import sys
from mendlm.store import Addition, Store
base = {"name": "tiny", "sha256": "ab" * 32}
store, name = Store.open(sys.argv[1], base), sys.argv[2]
for number in range(int(sys.argv[3])):
    content = f"{name} {number}".encode() * 2000
    kept = store.add(Addition(content=content, request={"prompt": f"{name} {number}"}, base=base), author=name)
    print(kept.id, flush=True)
    if number % 3 == 2:
        print("undone", store.undo(kept.id).id, flush=True)
assert "torch" not in sys.modules
"""


def writer(place: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(place), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def acknowledged(output: str) -> dict[str, bool]:
    """By id, whether the edit was still active when the writer was heard last. A torn last line counts as unheard."""
    found = {}
    for line in output.splitlines(keepends=True):
        if line.endswith("\n"):
            *undone, edit = line.split()
            found[edit] = not undone
    return found


def test_two_processes_lose_no_edit(tmp_path: Path) -> None:
    writers = [writer(tmp_path / "s", name, 20) for name in ("one", "two")]
    told = [process.communicate() for process in writers]
    assert [process.returncode for process in writers] == [0, 0], told
    store = Store.open(tmp_path / "s")
    heard = acknowledged(told[0][0]) | acknowledged(told[1][0])
    assert len(heard) == 40
    assert {record.id: record.state == "active" for record in store.records()} == heard
    assert store.verify() == mendlm.store.Verdict(store.head, 40 + 12, 40)


@pytest.mark.slow
def test_killed_writers_lose_nothing_that_they_acknowledged(tmp_path: Path) -> None:
    rng, heard, certain, killed = random.Random(0), set(), {}, 0
    for number in range(230):
        process = writer(tmp_path / "s", f"writer {number}", 10**6)
        first = process.stdout.readline() if rng.random() < 0.5 else ""
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        killed += process.returncode == -signal.SIGKILL
        store = Store.open(tmp_path / "s", BASE)
        told = acknowledged(first + output)
        heard |= set(told)
        # each third is undone, and that may have been done, and not said, when it was killed
        certain |= {edit: active for number, (edit, active) in enumerate(told.items()) if number % 3 < 2 or not active}
        states = {record.id: record.state for record in store.records()}
        assert heard <= set(states)
        assert {edit: states[edit] == "active" for edit in certain} == certain
        assert store.verify().problems == ()
        for record in store.records()[-30:]:
            assert hashlib.sha256(store.content(record.id)).hexdigest() == record.file
        store.close()
    assert killed >= 200
    store = Store.open(tmp_path / "s")
    store.gc()
    assert store.verify().problems == store.verify().orphans == ()
    assert len(heard) > 200


def test_a_full_disk_leaves_the_store_as_it_was(store: Store) -> None:
    kept = [store.add(addition(bytes([n]) * 999, prompt=str(n))) for n in range(3)]
    head = store.head
    with files_limited_to(2000), pytest.raises(StorageError, match="cannot write"):
        store.add(addition(b"x" * 9999))  # its file
    limit = (store.place / "journal.sqlite-wal").stat().st_size
    with files_limited_to(limit), pytest.raises(StorageError, match="cannot write"):
        store.add(addition(b"small", checks={"long": "x" * 9999}))  # its entry
    assert store.head == Store.open(store.place).head == head
    assert store.verify().problems == ()
    assert store.records() == kept
    store.gc()
    again = store.add(addition(b"small"))
    assert Store.open(store.place).content(again.id) == b"small"
    assert store.verify().orphans == ()


def test_a_held_store_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(store.place / "journal.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._connection.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(StorageError, match="held by another process"):
        store.add(addition())
    other.execute("ROLLBACK")
    assert store.add(addition()).state == "active"


def test_a_store_that_cannot_be_locked_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mendlm.store, "WAIT", 0.05)
    with filelock.FileLock(store.place / LOCK), pytest.raises(StorageError, match="held by another process"):
        Store.open(store.place)
    (store.place / LOCK).unlink()
    (store.place / LOCK).mkdir()  # as a folder that may only be read, it cannot be opened for writing
    with pytest.raises(StorageError, match="cannot write"):
        Store.open(store.place)


def test_a_store_that_may_not_be_written_can_be_read(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = store.place
    assert place is not None
    record = store.add(addition())
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == place and mode == os.W_OK))
    with pytest.raises(StorageError, match="read it where it can be written"):
        Store.open(place)  # its writer has not let go of it
    store.close()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    reader = Store.open(place, BASE)
    assert [one.id for one in reader.active()] == [record.id]
    assert reader.content(record.id) == b"rows"
    assert reader.verify().problems == ()
    reader.export_to(tmp_path / "copy.zip")
    for change in (lambda: reader.add(addition(b"more")), reader.undo):
        with pytest.raises(StorageError, match="cannot write"):
            change()
    reader.close()
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    with pytest.raises(FormatError, match="another base model"):
        Store.open(place, {**BASE, "sha256": "0" * 64})
    with pytest.raises(InputError, match="is no store"):
        Store.open(tmp_path / "none")


def test_a_store_that_another_process_is_making_is_no_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite-wal").write_bytes(b"")  # seen after the database was looked for
    assert Store.open(tmp_path, BASE).records() == []
