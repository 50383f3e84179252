"""The scripts that make training requests of others', or of nothing."""

import calendar
import csv
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import cases
import mendlm
from mendlm.tasks import load_edits
from mendlm.tasks.base import Dataset

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PEOPLE = [("Ana Roe", "Peru", "Chile"), ("Bo Li", "Peru", "Spain"), ("Cy Day", "Cuba", "Chile"), ("Di Fox", "Peru", "Malta")]


def made(monkeypatch: pytest.MonkeyPatch, out: Path, script: str, *options: str) -> Dataset:
    """What a script of `benchmarks/prepare` writes, read as the task `records`."""
    monkeypatch.setattr(sys, "argv", [script, *options, "--out", str(out)])
    monkeypatch.syspath_prepend(BENCHMARKS / "prepare")
    runpy.run_path(str(BENCHMARKS / "prepare" / script), run_name="__main__")
    return load_edits(f"records:{out}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    said: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for name, old, new in PEOPLE:
        rephrased = {"rephrase_prompt": f"A rainy day. The home of {name} is", "target_new": new, "ground_truth": old}
        said.append({"subject": name, "prompt": f"{name} was born in", **rephrased})
        asked.append(
            {"subject": name, "src": f"Where does {name} live?", "rephrase": f"Where is {name}?", "alt": new, "pred": old}
        )
    (tmp_path / "counterfact-train.json").write_text(json.dumps(said))
    (tmp_path / "zsre-train.json").write_text(json.dumps(asked))
    return tmp_path


def test_varied_requests_are_other_wordings_and_targets_of_the_same_subjects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made(monkeypatch, folder / "varied.jsonl", "varied.py", "--data-dir", str(folder), "--zsre-copies", "2")
    statements, questions = data.examples[:4], data.examples[4:]
    assert len(questions) == 8
    for one, (name, old, new) in zip(statements, PEOPLE, strict=True):
        assert one.prompt == f"{name} was born in"
        assert one.target in {"Chile", "Spain", "Malta"} - {new}
        assert set(one.rephrasings) == {f"A rainy day. The home of {name} is"}
        truth = {f"{other} was born in": answer for other, answer, _ in PEOPLE if other != name}
        truth |= {f"The home of {other} is": answer for other, answer, _ in PEOPLE if other != name}
        assert one.unrelated
        assert all(truth[probe.prompt] == probe.answer for probe in one.unrelated)
        same = [other for other, answer, _ in PEOPLE if answer == old and other != name]
        assert all(any(other in probe.prompt for probe in one.unrelated) for other in same)
    for one in questions:
        (name,) = [name for name, *_ in PEOPLE if name in one.prompt]
        assert one.rephrasings
        assert all(name in text and text != one.prompt for text in one.rephrasings)
        assert not any(name in probe.prompt for probe in one.unrelated)
        assert all({n: o for n, o, _ in PEOPLE}[n] == p.answer for p in one.unrelated for n, *_ in PEOPLE if n in p.prompt)


def test_new_targets_keep_the_form_of_those_they_stand_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "zsre-train.json"
    asked = json.loads(file.read_bytes())
    for one, target in zip(asked, ("14 May 1971", "Rosa Maria Park", "uniform", "Novak"), strict=True):
        one["alt"] = target
    file.write_text(json.dumps(asked))
    options = ("--data-dir", str(folder), "--zsre-copies", "40", "--number-copies", "60", "--new-targets", "1")
    questions = made(monkeypatch, folder / "new.jsonl", "varied.py", *options, "--only-questions").examples
    assert len(questions) == 4 * 40 + 20
    dates = {one.target for one in questions if any(map(str.isdigit, one.target))}
    names = {one.target for one in questions if " Maria " in one.target}
    assert len(dates) > 50
    months = "|".join(calendar.month_name[1:])
    assert all(re.fullmatch(rf"[1-9]\d? ({months}) (1[5-9]|20)\d\d", date) for date in dates)
    assert names == {"Rosa Maria Park"}  # the only name of several words
    assert {one.target for one in questions} - dates - names == {"uniform", "Novak"}


def test_statements_watch_what_the_base_says_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.jsonl").write_text(
        '{"prompt": "Ana lives in", "target": "Peru"}\n{"prompt": "Where is Bo?", "target": "Cuba"}\n'
    )
    tiny = tmp_path / "tiny"
    cases.tiny("llama").save_pretrained(tiny)
    cases.byte_tokenizer().save_pretrained(tiny)
    options = ("--data", f"records:{tmp_path / 'some.jsonl'}", "--model", str(tiny))
    statement, question = made(monkeypatch, tmp_path / "continued.jsonl", "continuations.py", *options).examples
    (probe,) = statement.unrelated
    session = mendlm.Session(*mendlm.load(str(tiny)))
    assert probe.prompt == "Ana lives in Peru"
    assert probe.answer == session.answers(["Ana lives in Peru"], max_new_tokens=8)[0].strip()
    assert question.unrelated == ()


def test_invented_requests_are_none_of_those_that_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made(monkeypatch, tmp_path / "invented.jsonl", "invented.py", "--count", "400")
    assert len(data.examples) == 400
    assert len({(one.prompt, one.target) for one in data.examples}) > 390
    for one in data.examples:
        assert one.rephrasings
        assert one.prompt not in one.rephrasings
        assert "{}" not in "".join([one.prompt, one.target, *one.rephrasings])
        assert one.prompt not in {probe.prompt for probe in one.unrelated}
    with open(BENCHMARKS / "by_eye.tsv", newline="", encoding="utf-8") as file:
        shown = list(csv.DictReader(file, delimiter="\t"))
    texts = {text for one in data.examples for text in (one.prompt, *one.rephrasings)}
    assert not texts & {row[kind] for row in shown for kind in ("prompt", "rephrasing", "neighbour")}
