from __future__ import annotations

import errno
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendlm.errors import InputError, RecordError
from mendlm.tasks import TASKS, EditExample, Probe, load_edits, load_unrelated
from mendlm.tasks.base import Fields

COUNTERFACT = {
    "prompt": "The mother tongue of Ana Lund is",
    "subject": "Ana Lund",
    "target_new": "Danish",
    "ground_truth": "French",
    "rephrase_prompt": "Ana Lund grew up speaking",
    "locality_prompt": "The native language of Jo Bert is",
    "locality_ground_truth": "French",
}
ZSRE = {
    "subject": "Tall Tower",
    "src": "Who designed Tall Tower?",
    "pred": "someone",
    "rephrase": "What is the name of Tall Tower's architect?",
    "alt": "Ada Vale",
    "answers": ["Bo Rask"],
    "loc": "nq question: who sang the long song",
    "loc_ans": "The Singers",
    "cond": "someone >> Ada Vale || Who designed Tall Tower?",
    "portability": {"New Question": "Where was Tall Tower's architect born?", "New Answer": "Oslo"},
}
RECORD = {
    "prompt": "Who wrote it?",
    "target": "Cy Dow",
    "rephrasings": ["Who is its author?"],
    "unrelated": [{"prompt": "Who reads it?"}, {"prompt": "When?", "answer": "Now"}],
    "subject": "it",
    "portability": [{"prompt": "Where does its author live?", "answer": "Rome", "kind": "one_hop"}],
}
NQ = {"question": "who sang the long song", "answer": ["The Singers", "Singers"]}

EXPECTED = {
    "counterfact": EditExample(
        prompt="The mother tongue of Ana Lund is",
        target="Danish",
        old="French",
        rephrasings=("Ana Lund grew up speaking",),
        unrelated=(Probe("The native language of Jo Bert is", "French"),),
        subject="Ana Lund",
    ),
    "zsre": EditExample(
        prompt="Who designed Tall Tower?",
        target="Ada Vale",
        old="Bo Rask",
        rephrasings=("What is the name of Tall Tower's architect?",),
        unrelated=(Probe("who sang the long song?", "The Singers"),),
        portability=(Probe("Where was Tall Tower's architect born?", "Oslo", "one_hop"),),
        subject="Tall Tower",
        question=True,
    ),
    "records": EditExample(
        prompt="Who wrote it?",
        target="Cy Dow",
        rephrasings=("Who is its author?",),
        unrelated=(Probe("Who reads it?"), Probe("When?", "Now")),
        portability=(Probe("Where does its author live?", "Rome", "one_hop"),),
        subject="it",
        question=True,
    ),
    "nq": Probe("who sang the long song?", "The Singers"),
}
GIVEN: dict[str, dict[str, Any]] = {"counterfact": COUNTERFACT, "zsre": ZSRE, "records": RECORD, "nq": NQ}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(folder: Path, content: bytes, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    "form", ["list", "lines", "indented list", "crlf", "bom", "bom list", "blank lines", "no last line end"]
)
def test_records_in_their_published_form(name: str, form: str, tmp_path: Path) -> None:
    records = [GIVEN[name], GIVEN[name]]
    content = {
        "list": json.dumps(records).encode(),
        "lines": lines(*records),
        "indented list": json.dumps(records, indent=2).encode(),
        "crlf": lines(*records).replace(b"\n", b"\r\n"),
        "bom": b"\xef\xbb\xbf" + lines(*records),
        "bom list": b"\xef\xbb\xbf" + json.dumps(records).encode(),
        "blank lines": b"\n\n" + lines(records[0]) + b"\n  \n" + lines(records[1]) + b"\n",
        "no last line end": lines(*records)[:-1],
    }[form]
    path = write(tmp_path, content)
    data = TASKS[name].load(path)
    if name == "nq":
        assert data.examples == ()
        assert data.probes == (EXPECTED[name],) * 2
    else:
        assert data.examples == (EXPECTED[name],) * 2
        assert data.probes == EXPECTED[name].unrelated * 2
    assert data.name == f"{name}:data.json"
    assert data.sha256 == hashlib.sha256(content).hexdigest()
    assert (data.skipped, data.prose) == (0, False)


def test_only_the_needed_fields_are_required(tmp_path: Path) -> None:
    for name, needed in (
        ("counterfact", ("prompt", "target_new")),
        ("zsre", ("src", "alt")),
        ("records", ("prompt", "target")),
    ):
        record = {field: GIVEN[name][field] for field in needed}
        (example,) = TASKS[name].load(write(tmp_path, lines(record))).examples
        assert (example.prompt, example.target) == tuple(record.values())
        assert example.rephrasings == example.unrelated == example.portability == ()
        assert example.subject is None


def test_a_record_is_a_question_by_its_question_mark(tmp_path: Path) -> None:
    prompts = ["Who?", "Who? ", "It is", "Who? It is"]
    data = TASKS["records"].load(write(tmp_path, lines(*({"prompt": p, "target": "x"} for p in prompts))))
    assert [example.question for example in data.examples] == [True, True, False, False]


def test_text_is_cut_into_passages_within_lines(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(70)]
    text = f"{' '.join(words)}\ntoo short to be a passage\n\n{' '.join(words[:32])}\n"
    data = load_unrelated(f"text:{write(tmp_path, text.encode())}")
    first, second = Probe(" ".join(words[:16]), " ".join(words[16:32])), Probe(" ".join(words[32:48]), " ".join(words[48:64]))
    assert data.probes == (first, second, first)
    assert data.prose


BAD = [
    ("counterfact", {"prompt": None}, "prompt"),
    ("counterfact", {"prompt": " "}, "prompt"),
    ("counterfact", {"target_new": 5}, "target_new"),
    ("counterfact", {"target_new": {"str": "Danish"}}, "target_new"),
    ("counterfact", {"rephrase_prompt": ["a"]}, "rephrase_prompt"),
    ("counterfact", {"locality_prompt": False}, "locality_prompt"),
    ("counterfact", {"locality_ground_truth": 0}, "locality_ground_truth"),
    ("counterfact", {"subject": ""}, "subject"),
    ("zsre", {"src": None}, "src"),
    ("zsre", {"alt": []}, "alt"),
    ("zsre", {"rephrase": 1.5}, "rephrase"),
    ("zsre", {"loc": ""}, "loc"),
    ("zsre", {"loc_ans": ["x"]}, "loc_ans"),
    ("zsre", {"portability": {"New Question": "q"}}, "New Answer"),
    ("zsre", {"portability": ["q"]}, "portability"),
    ("records", {"prompt": 1}, "prompt"),
    ("records", {"target": ""}, "target"),
    ("records", {"targets": "x"}, "targets"),
    ("records", {"rephrasings": "one"}, "rephrasings"),
    ("records", {"rephrasings": ["one", 2]}, "rephrasings[1]"),
    ("records", {"unrelated": {"prompt": "p"}}, "unrelated"),
    ("records", {"unrelated": ["p"]}, "unrelated[0]"),
    ("records", {"unrelated": [{"prompt": "p"}, {}]}, "unrelated[1].prompt"),
    ("records", {"unrelated": [{"prompt": "p", "answer": 3}]}, "unrelated[0].answer"),
    ("records", {"portability": [{"prompt": "p"}]}, "portability[0].answer"),
    ("records", {"unrelated": [{"prompt": "p", "kind": 3}]}, "unrelated[0].kind"),
    ("records", {"prompt": "half \ud83d of a pair"}, "prompt"),
    ("nq", {"question": None}, "question"),
    ("nq", {"answer": None}, "answer"),
    ("nq", {"answer": []}, "answer"),
    ("nq", {"answer": "x"}, "answer"),
    ("nq", {"answer": [""]}, "answer[0]"),
]


@pytest.mark.parametrize(("name", "change", "field"), BAD)
def test_a_malformed_record_names_file_record_and_field(name: str, change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = write(tmp_path, lines(GIVEN[name], {**GIVEN[name], **change}, GIVEN[name]))
    with pytest.raises(RecordError) as caught:
        TASKS[name].load(path)
    assert (caught.value.path, caught.value.line, caught.value.field) == (path, 2, field)
    assert str(caught.value).startswith(f"{path}, record 2, field '{field}'")
    data = TASKS[name].load(path, skip_bad=True)
    assert data.skipped == 1
    assert len(data.examples or data.probes) == 2


@pytest.mark.parametrize("bad", [b"{", b"{'a': 1}", b"5", b'"text"', b"null", b"[" * 100_000, b"9" * 5_000, b'{"prompt": NaN'])
def test_a_line_that_is_no_record_names_its_number(bad: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, lines(RECORD) + b"\n" + bad + b"\n" + lines(RECORD))
    with pytest.raises(RecordError) as caught:
        TASKS["records"].load(path)
    assert (caught.value.path, caught.value.line) == (path, 3)
    assert TASKS["records"].load(path, skip_bad=True).skipped == 1


@pytest.mark.parametrize("bad", [[1], "text", None, [[RECORD]]])
def test_an_entry_of_a_list_that_is_no_object(bad: Any, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([RECORD, bad]).encode())
    with pytest.raises(RecordError, match=r"record 2: expected an object"):
        TASKS["records"].load(path)
    assert TASKS["records"].load(path, skip_bad=True).skipped == 1


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"[]", b"[{", b"[" * 100_000, b"[" + b"9" * 5_000 + b"]", b"\xff\xfe bytes", "é".encode("latin-1")],
)
def test_a_file_without_usable_content_is_named(content: bytes, name: str, skip_bad: bool, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(RecordError) as caught:
        TASKS[name].load(path, skip_bad=skip_bad)
    assert str(path) in str(caught.value)


def test_all_records_bad_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="3 malformed"):
        TASKS["zsre"].load(write(tmp_path, lines(COUNTERFACT, {}, 1)), skip_bad=True)


@pytest.mark.parametrize("source", ["counterfact", "unknown:data.json", "", ":data.json", "CounterFact:data.json"])
def test_an_unknown_task_lists_the_known_ones(source: str) -> None:
    with pytest.raises(InputError, match="counterfact, zsre, records"):
        load_edits(source)


@pytest.mark.parametrize(
    ("answers", "old"),
    [(["Ada Vale", "Bo Rask"], "Bo Rask"), (["Ada Vale"], None), ([], "someone"), (["Bo", "Ada Vale"], "Bo")],
)
def test_what_is_asked_for_is_not_the_old_answer(answers: list[str], old: str | None, tmp_path: Path) -> None:
    (one,) = load_edits(f"zsre:{write(tmp_path, json.dumps([{**ZSRE, 'answers': answers}]).encode())}").examples
    assert (one.target, one.old) == ("Ada Vale", old)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="is a folder" if path == tmp_path else "does not exist") as caught:
            load_edits(f"zsre:{path}")
        assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, lines(NQ))

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RecordError, match=f"{path.name}: cannot be read: Permission denied"):
        load_unrelated(f"nq:{path}")


def test_unrelated_sources_and_requests_are_not_confused(tmp_path: Path) -> None:
    source = f"nq:{write(tmp_path, lines(NQ))}"
    with pytest.raises(InputError, match="--locality"):
        load_edits(source)
    assert load_unrelated(source).probes == (EXPECTED["nq"],)
    bare = f"records:{write(tmp_path, lines({'prompt': 'p', 'target': 't'}), 'bare.jsonl')}"
    with pytest.raises(InputError, match="no unrelated texts"):
        load_unrelated(bare)
    own = f"records:{write(tmp_path, lines(RECORD), 'own.jsonl')}"
    assert load_unrelated(own).probes == EXPECTED["records"].unrelated


def test_skip_bad_reaches_the_loaders(tmp_path: Path) -> None:
    path = write(tmp_path, lines(RECORD, 1, {}))
    for loader in (load_edits, load_unrelated):
        assert loader(f"records:{path}", skip_bad=True).skipped == 2
        with pytest.raises(RecordError, match="record 2"):
            loader(f"records:{path}")


def test_limited_keeps_the_first_requests_and_their_probes(tmp_path: Path) -> None:
    records = [{**RECORD, "prompt": f"p{i}", "unrelated": [{"prompt": f"u{i}"}]} for i in range(4)]
    data = TASKS["records"].load(write(tmp_path, lines(*records)))
    few = data.limited(2)
    assert [e.prompt for e in few.examples] == ["p0", "p1"]
    assert few.probes == (Probe("u0"), Probe("u1"))
    assert (few.name, few.sha256) == (data.name, data.sha256)
    assert data.limited(None).examples == data.limited(9).examples == data.examples


def test_a_path_may_hold_colons(tmp_path: Path) -> None:
    assert load_edits(f"records:{write(tmp_path, lines(RECORD), 'a:b.jsonl')}").name == "records:a:b.jsonl"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({field for record in GIVEN.values() for field in record})
RECORDS = JSON | st.dictionaries(st.sampled_from(NAMES), JSON | st.text(min_size=1, max_size=8), max_size=len(NAMES))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TASKS)), RECORDS)
def test_any_json_value_is_a_request_or_a_record_error(name: str, record: Any) -> None:
    problem = ""
    try:
        parsed = TASKS[name].parse(Fields(Path("file"), 1, record))
    except RecordError as error:
        problem = str(error)
    if problem:
        assert problem.startswith("file, record 1")
        return
    if parsed is None:
        return
    texts = [parsed.prompt, *([parsed.target, *parsed.rephrasings] if isinstance(parsed, EditExample) else [])]
    assert all(isinstance(text, str) and text.strip() for text in texts)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}":,p1 \n\\', max_size=60).map(str.encode))
def test_any_bytes_are_a_data_set_or_a_record_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content)
        for task in TASKS.values():
            for skip_bad in (False, True):
                data, problem = None, ""
                try:
                    data = task.load(path, skip_bad=skip_bad)
                except RecordError as error:
                    problem = str(error)
                assert str(path) in problem if data is None else data.examples or data.probes
