"""`mendlm store`, run in this process on a tiny model."""

# ruff: noqa: F811  (fixtures of another test file, imported by name)

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mendlm.cli import main
from mendlm.store import Store
from test_cli import ON, Command, edit, place, run  # noqa: F401

ANA = ("--prompt", "Who is Ana?", "--target", "a baker")


def add(run: Command, store: Path, *more: object, **how: Any) -> Any:
    return run("store", store, "add", *ON, *more, **how)


def test_edits_are_made_listed_undone_and_redone(run: Command, tmp_path: Path) -> None:
    store = tmp_path / "s"
    told = ["--rephrasing", "Ana is", "--unrelated", "Who is Bo?", "--author", "Eva", "--reason", "she is"]
    (first,) = add(run, store, *ANA, *told)["added"]
    assert [asked["kind"] for asked in first["checks"]["asked"]] == ["prompt", "rephrasing", "unrelated"]
    assert (first["author"], first["reason"], first["state"]) == ("Eva", "she is", "active")
    (second,) = add(run, store, "--prompt", "Who is Ana?", "--target", "a smith")["added"]
    assert second["supersedes"] == [first["id"]]
    assert second["author"]
    listed = run("store", store, "list")
    assert [record["id"] for record in listed["edits"]] == [second["id"]]
    assert [record["state"] for record in run("store", store, "list", "--all")["edits"]] == ["superseded", "active"]
    with_second = run("generate", "--model", "model", "--store", store, "--prompt", "Who is Ana?")
    assert with_second["edits"] == [second["id"]]
    assert run("store", store, "undo", "--reason", "no")["undone"]["id"] == second["id"]
    assert run("store", store, "undo", first["id"][:6])["undone"]["id"] == first["id"]
    base = run("generate", "--model", "model", "--store", store, "--prompt", "Who is Ana?")
    assert base["edits"] == []
    assert base["answer"] == run("generate", "--model", "model", "--prompt", "Who is Ana?")["answer"] != with_second["answer"]
    assert run("store", store, "redo")["redone"]["id"] == first["id"]
    assert run("store", store, "show", first["id"])["request"]["rephrasings"] == ["Ana is"]
    changed = {asked["prompt"] for asked in first["checks"]["asked"] if asked["before"] != asked["after"]}
    assert {asked["prompt"] for asked in run("store", store, "diff", first["id"])["changed"]} == changed
    assert [entry["kind"] for entry in run("store", store, "log")["entries"]] == ["add", "add", "undo", "undo", "redo"]
    assert run("store", store, "log")["entries"][2]["reason"] == "no"


def test_edit_folders_and_data_are_taken_in(run: Command, place: Path, tmp_path: Path) -> None:
    edit(run, tmp_path / "ana")
    (record,) = run("store", tmp_path / "s", "add", tmp_path / "ana")["added"]
    assert (record["checks"], record["request"]["target"]) == ({}, "a baker")
    under = run("generate", "--model", "model", "--store", tmp_path / "s", "--prompt", "Who is Ana?")
    assert (
        under["answer"] == run("generate", "--model", "model", "--edit", tmp_path / "ana", "--prompt", "Who is Ana?")["answer"]
    )
    added = add(run, tmp_path / "s", "--data", "records:facts.jsonl")["added"]
    assert [record["state"] for record in added] == ["active"] * 3
    assert added[1]["supersedes"] == [record["id"]]
    assert "another base model" in run("store", tmp_path / "s", "add", other_edit(tmp_path), fails=True)


def other_edit(folder: Path) -> Path:
    import torch

    from mendlm.apply import Edit
    from mendlm.lowrank import LowRank

    made = Edit({"x": LowRank(torch.ones(1, 2), torch.ones(1, 2))}, about={"base": {"name": "b", "sha256": "cd"}})
    made.save(folder / "other")
    return folder / "other"


def test_a_store_is_exported_imported_verified_and_cleaned(run: Command, tmp_path: Path) -> None:
    store, copy = tmp_path / "s", tmp_path / "copy"
    head = add(run, store, *ANA)["head"]
    run("store", store, "undo")
    exported = run("store", store, "export", tmp_path / "x.zip")
    imported = run("store", copy, "import", tmp_path / "x.zip")
    assert imported["head"] == exported["head"] == run("store", copy, "verify", "--head", head)["head"]
    (copy / "edits" / "left").write_text("")
    assert run("store", copy, "verify")["orphans"] == ["left"]
    assert run("store", copy, "gc")["removed"] == ["left"]


@pytest.mark.parametrize("damage", ["file", "journal", "head"])
def test_damage_is_exit_code_1_or_2(
    run: Command, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    store = tmp_path / "s"
    add(run, store, *ANA)
    if damage == "file":
        next((store / "edits").iterdir()).write_bytes(b"x")
    if damage == "journal":
        connection = sqlite3.connect(store / "journal.sqlite")
        connection.execute("DROP TRIGGER journal_update")
        connection.execute("UPDATE journal SET body = replace(body, 'Ana', 'Bo')")
        connection.commit()
    with pytest.raises(SystemExit) as stop:
        main(["store", str(store), "verify", *(["--head", "ab" * 32] if damage == "head" else [])])
    assert stop.value.code == (2 if damage == "journal" else 1)
    out, err = capsys.readouterr()
    said = {"file": "has changed since it was written", "journal": "entry 1", "head": "no entry abab"}[damage]
    assert said in out + err
    assert ("DAMAGED" in out) is (damage != "journal")


def test_an_edit_that_fails_its_checks_is_refused_when_asked(run: Command, tmp_path: Path) -> None:
    guards = tmp_path / "guards.jsonl"
    guards.write_text(json.dumps({"prompt": "Water is"}) + "\n")
    strong = [*ANA, "--guard", guards, "--scale", "200", "--on-fail"]
    assert "nothing was changed" in add(run, tmp_path / "s", *strong, "refuse", fails=True)
    assert run("store", tmp_path / "s", "list")["edits"] == []
    assert "did not pass its checks" in shown(["store", str(tmp_path / "s"), "add", *ON, *map(str, strong), "report"])
    assert run("store", tmp_path / "s", "list")["edits"][0]["checks"]["passed"] is False


def test_promises_are_checked_again(run: Command, tmp_path: Path) -> None:
    store, guards = tmp_path / "s", tmp_path / "guards.jsonl"
    guards.write_text(json.dumps({"prompt": "Water is"}) + "\n")
    target = run("generate", "--model", "model", "--prompt", "Who is Ana?", "--max-new-tokens", "1")["answer"]
    add(run, store, "--prompt", "Who is Ana?", "--target", target, "--scale", "1e-6")
    assert run("store", store, "check", "--model", "model", "--guard", guards)["passed"] is True
    run("store", store, "undo")
    add(run, store, *ANA, "--scale", "200")
    text = shown(["store", str(store), "check", "--model", "model", "--guard", str(guards)], code=1)
    assert "NO" in text
    assert "Water is" in text


def shown(arguments: list[str], code: int = 0) -> str:
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    return text.getvalue()


def test_what_people_read(run: Command, tmp_path: Path) -> None:
    store = str(tmp_path / "s")
    add(run, tmp_path / "s", *ANA, "--reason", "she is")
    assert "'Who is Ana?' -> 'a baker'" in shown(["store", store, "list"])
    assert "she is" in shown(["store", store, "show"])
    assert "  target: a baker" in shown(["store", store, "show"])
    assert "she is" in shown(["store", store, "log"])
    assert "Who is Ana?" in shown(["store", store, "diff"])
    assert "whole: 1 edits, 1 entries" in shown(["store", store, "verify"])
    assert "is undone" in shown(["store", store, "undo"])
    assert "is active again" in shown(["store", store, "redo"])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["list"], "is no store"),
        (["undo"], "is no store"),
        (["add"], "say what to add"),
        (["add", "--prompt", "a"], "say what to add"),
        (["add", "x", *ANA], "say what to add"),
        (["add", "x"], "x does not exist"),
        (["add", "x", "--guard", "g"], "without checks"),
        (["add", "--data", "records:facts.jsonl", "--rephrasing", "x"], "come from the file"),
        (["add", *ANA, *ON, "--guard", "missing"], "missing"),
        (["add", *ANA, "--model", "model", "--editor", "missing"], "missing does not exist"),
        (["import", "missing"], "does not exist"),
        (["import", "facts.jsonl"], "no export of a store"),
    ],
)
def test_bad_input_makes_no_store(run: Command, tmp_path: Path, command: list[str], said: str) -> None:
    assert said in run("store", tmp_path / "s", *command, fails=True)
    assert not (tmp_path / "s").exists()


def test_bad_input_to_a_store(run: Command, tmp_path: Path) -> None:
    add(run, tmp_path / "s", *ANA)
    assert "no edit 'nonsense'" in run("store", tmp_path / "s", "undo", "nonsense", fails=True)
    assert "nothing to redo" in run("store", tmp_path / "s", "redo", fails=True)
    assert "not both" in run("generate", "--store", tmp_path / "s", "--edit", "x", "--prompt", "a", fails=True)
    assert "window 128" in add(run, tmp_path / "s", "--prompt", "long " * 999, "--target", "x", fails=True)
    assert len(Store.open(tmp_path / "s").records()) == 1


def test_the_journal_is_read_without_torch(run: Command, tmp_path: Path) -> None:
    add(run, tmp_path / "s", *ANA)
    code = (
        "import sys\nfrom mendlm.cli import main\n"
        "try: main(['store', sys.argv[1], 'list'])\n"
        "except SystemExit: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True, capture_output=True)


def test_the_active_edits_of_a_store_are_exported_as_one(run: Command, tmp_path: Path) -> None:
    from mendlm.apply import Edit

    store = tmp_path / "s"
    first = add(run, store, *ANA)["added"][0]["id"]
    add(run, store, "--prompt", "The river runs through", "--target", "town")
    exported = run("export", store, "--out", tmp_path / "both")
    assert exported["edits"] == 2
    whole = Edit.load(tmp_path / "both")
    assert [part["request"]["target"] for part in whole.about["parts"]] == ["a baker", "town"]
    assert whole.about["parts"][0]["id"] == first
    kept = Edit.from_bytes(Store.open(store).content(first))
    assert run("export", store, "--edit", first, "--edit", first[:6], "--out", tmp_path / "named")["edits"] == 1
    run("store", store, "undo")
    run("export", store, "--out", tmp_path / "one")
    for name in ("named", "one"):
        one = Edit.load(tmp_path / name)
        assert all((a == b).all() for a, b in zip(one.tensors(), kept.tensors(), strict=True))
    assert "there is no edit" in run("export", store, "--edit", "nothing", "--out", tmp_path / "none", fails=True)
    assert "is none" in run("export", tmp_path / "one", "--edit", first, "--out", tmp_path / "none", fails=True)
    run("store", store, "undo")
    assert "no active edit" in run("export", store, "--out", tmp_path / "none", fails=True)
