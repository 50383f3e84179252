"""The published forms of the tasks' files: fixtures of a few invented records, what is read from them, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mendlm.errors import InputError, RecordError
from mendlm.tasks import TASKS, Dataset, EditExample, Probe, combine, load, load_edits
from mendlm.tasks.describe import describe
from mendlm.tasks.fever import LABELS, TEMPLATES, WORDING, Fever, rephrasings
from mendlm.tasks.wikitext import WikiText
from mendlm.tasks.zsre import ZsRE

FIXTURES = Path(__file__).parent / "fixtures"
FILES = {
    "zsre-flat.json": "zsre",
    "zsre-kilt.jsonl": "zsre",
    "fever-claims.jsonl": "fever",
    "fever-kilt.jsonl": "fever",
    "wikitext.json": "wikitext",
    "counterfact-flat.json": "counterfact",
    "counterfact-nested.json": "counterfact",
    "knowedit.json": "knowedit",
    "nq.jsonl": "nq",
    "text.txt": "text",
}


def read(file: str) -> Dataset:
    return load(f"{FILES[file]}:{FIXTURES / file}")


def records(file: str) -> list[dict[str, Any]]:
    text = (FIXTURES / file).read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def written(folder: Path, *some: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in some))
    return path


def claims(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "label": LABELS[i % 2], "claim": f"Town {i} is a film."} for i in range(count)]


def test_zsre_in_kilt_style() -> None:
    data = read("zsre-kilt.jsonl")
    first, second, third = data.examples
    tower, river, bridge = records("zsre-kilt.jsonl")
    assert first.prompt == tower["input"]
    assert first.target in tower["alternatives"]
    assert (first.old, first.question) == ("Bo Rask", True)
    assert first.rephrasings == tuple(tower["filtered_rephrases"][1:]), "the question itself is no rephrasing"
    assert third.rephrasings == ()
    truths = {river["input"]: "the Elk", tower["input"]: "Bo Rask", bridge["input"]: "1901"}
    for example in data.examples:
        (probe,) = example.unrelated
        assert probe.prompt != example.prompt
        assert probe == Probe(probe.prompt, truths[probe.prompt])
    assert data.probes == first.unrelated + second.unrelated + third.unrelated
    assert data.notes == ("unrelated questions are those of other zsRE records",)
    targets = {ZsRE(seed).load(FIXTURES / "zsre-kilt.jsonl").examples[0].target for seed in range(30)}
    assert targets == set(tower["alternatives"])


def test_zsre_flat_takes_the_truth_or_else_the_prediction_as_old() -> None:
    data = read("zsre-flat.json")
    assert [example.old for example in data.examples] == ["Bo Rask", "1911"]
    assert [example.unrelated[0].prompt for example in data.examples] == [
        "who sang the long song?",
        "when does the short day begin?",
    ]
    assert data.notes == ()


def test_fever_claims() -> None:
    data = read("fever-claims.jsonl")
    given = {record["claim"]: record["label"] for record in records("fever-claims.jsonl") if record["label"] in LABELS}
    assert [example.prompt for example in data.examples] == list(given)
    assert data.left_out == 1
    for example in data.examples:
        label = given[example.prompt]
        assert (example.target, example.old) in ((label, None), (LABELS[1 - LABELS.index(label)], label))
        assert example.question
        assert len(example.rephrasings) == len(set(example.rephrasings)) == 3
        (probe,) = example.unrelated
        assert probe.prompt != example.prompt
        assert probe.answer == given[probe.prompt]
    assert "rephrasings of 3 of 3 FEVER claims are made by mendlm's templates" in data.notes


def test_fever_in_kilt_style_flips_what_the_base_says() -> None:
    data = read("fever-kilt.jsonl")
    assert [example.rephrasings for example in data.examples[:2]] == [
        tuple(record["filtered_rephrases"]) for record in records("fever-kilt.jsonl")[:2]
    ]
    assert "rephrasings of 1 of 3 FEVER claims are made by mendlm's templates" in data.notes
    truth = {record["input"]: record["output"][0]["answer"] for record in records("fever-kilt.jsonl")}
    for seed in range(8):
        for example, said in zip(
            Fever(seed).load(FIXTURES / "fever-kilt.jsonl").examples, ("SUPPORTS", "REFUTES", "REFUTES"), strict=True
        ):
            assert (example.target, example.old) in ((said, None), (LABELS[1 - LABELS.index(said)], said))
            assert example.unrelated[0].answer == truth[example.unrelated[0].prompt], "the truth, not what the base says"


def test_the_coin_is_fair_depends_on_claim_and_seed_alone_and_not_on_the_split(tmp_path: Path) -> None:
    path = written(tmp_path, *claims(1000))
    data = Fever().load(path)
    flipped = {example.prompt: example.old is not None for example in data.examples}
    assert abs(sum(flipped.values()) - 500) < 60
    alone = Fever().load(written(tmp_path, *claims(1000)[:7:-1], name="other.jsonl"))
    assert all(flipped[example.prompt] == (example.old is not None) for example in alone.examples)
    assert [e.target for e in Fever(1).load(path).examples] != [e.target for e in data.examples]
    held_out = data.split(0.5)[1].examples
    assert abs(sum(flipped[example.prompt] for example in held_out) - len(held_out) / 2) < 50


def test_rephrasings_of_claims_are_templates_and_exchanged_words() -> None:
    made = rephrasings("Mossby is not a film.", 0)
    assert made[0] == "Mossby isn't a movie."
    assert all(any(text == template.format("Mossby is not a film.") for template in TEMPLATES) for text in made[1:])
    assert "Filmland is a town." not in rephrasings("Filmland is a town.", 0)
    for one, other in WORDING:
        assert rephrasings(f"It {one} it.", 0)[0] == f"It {other} it."
        assert rephrasings(f"It {other} it.", 0)[0] == f"It {one} it."
    assert rephrasings("Braces {} stay {0}.", 0)[0].endswith("Braces {} stay {0}.")


def test_one_claim_alone_has_no_unrelated_text(tmp_path: Path) -> None:
    data = TASKS["fever"].load(written(tmp_path, claims(1)[0], claims(1)[0]))
    assert [example.unrelated for example in data.examples] == [(), ()]


def test_wikitext_as_released() -> None:
    data = read("wikitext.json")
    whole = json.loads((FIXTURES / "wikitext.json").read_text())
    assert [e.prompt for e in data.examples] == whole["original"]
    assert [e.prompt + e.target for e in data.examples] == whole["completions"]
    assert data.notes == ("wikitext rephrasings drop up to half of the prefix's words",)
    for example in data.examples:
        words = example.prompt.split()
        assert len(set(example.rephrasings)) == 3
        for text in example.rephrasings:
            assert example.prompt.endswith(text)
            assert len(words) / 2 <= len(text.split()) < len(words)
    assert [e.rephrasings for e in load(f"wikitext:{FIXTURES / 'wikitext.json'}", seed=1).examples] != [
        e.rephrasings for e in data.examples
    ]


@pytest.mark.parametrize(
    ("passage", "completion", "prompt", "target"),
    [
        ("The old town of", "The old town of Mossby by", "The old town of", " Mossby by"),
        ("The old town of Rome by", "The old town of Rome and", "The old town of Rome", " and"),
        ("The old town of", "Mossby by", "The old town of", "Mossby by"),
        ("The old town of Rome and", "The old town of Mossby by", "The old town of", " Mossby by"),
        ("The old town of light", "The old town of lighthouses and", "The old town of", " lighthouses and"),
        ("The old town\n", "The old town\nMossby", "The old town", "\nMossby"),
        ("The old town", "The old town, Mossby", "The old", " town, Mossby"),
    ],
)
def test_what_a_completion_adds_to_its_passage(passage: str, completion: str, prompt: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"n_tokens": 2, "original": [passage], "completions": [completion]}))
    (example,) = WikiText().load(path).examples
    assert (example.prompt, example.target) == (prompt, target)


@pytest.mark.parametrize("passage", ["The town of Rome and its long walls", "The town of Rome and its deep river"])
def test_a_sample_that_begins_as_its_passage_goes_on_keeps_its_beginning(passage: str, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    completion = "The town of Rome and its long river"
    path.write_text(json.dumps({"n_tokens": 6, "original": [passage], "completions": [completion]}))
    (example,) = WikiText().load(path).examples
    assert (example.prompt, example.target) == ("The town of Rome and", " its long river")


@pytest.mark.parametrize("field", ["locality", "portability"])
def test_counterfact_does_not_drop_what_is_knowedits(field: str, tmp_path: Path) -> None:
    record = {
        "prompt": "Ana is a",
        "target_new": "baker",
        field: {"Reasoning": [{"prompt": "Ana sells", "ground_truth": "bread"}]},
    }
    with pytest.raises(RecordError, match="KnowEdit"):
        load(f"counterfact:{written(tmp_path, record)}")


def test_counterfact_as_published() -> None:
    first, second = read("counterfact-nested.json").examples
    assert first == EditExample(
        prompt="The mother tongue of Ana Lund is",
        target="Danish",
        old="French",
        rephrasings=("A long day. Ana Lund grew up speaking", "Ana Lund, whose native language is"),
        unrelated=(Probe("The mother tongue of Jo Bert is", "French"), Probe("Jo Bert, a native speaker of", "French")),
        subject="Ana Lund",
    )
    assert second.prompt == "Long Bridge is located in"


def test_both_forms_of_counterfact_agree() -> None:
    for nested, flat in zip(read("counterfact-nested.json").examples, read("counterfact-flat.json").examples, strict=True):
        fields = ("prompt", "target", "old", "subject", "question")
        assert [getattr(nested, field) for field in fields] == [getattr(flat, field) for field in fields]
        assert flat.unrelated[0] in nested.unrelated


def test_knowedit() -> None:
    first, second, third = read("knowedit.json").examples
    assert first == EditExample(
        prompt="The name of the home town of Ana Lund is",
        target="Mossby",
        old="Rome",
        unrelated=(
            Probe("The name of the mother of Ana Lund is", "Eva Lund", "Relation_Specificity"),
            Probe("The name of the home town of Ana Lund, which is not Mossby, is", "Rome", "Forgetfulness"),
        ),
        portability=(
            Probe("The river in the home town of Ana Lund is", "the Elk", "Reasoning"),
            Probe("The name of the home town of A. Lund is", "Mossby", "Subject_Aliasing"),
        ),
        subject="Ana Lund",
    )
    assert (second.old, second.rephrasings, second.question) == ("Bo Rask", ("Who is Tall Tower's architect?",), True)
    assert second.portability == (Probe("Where does the architect of Tall Tower live?", "Oslo", "Reasoning"),)
    assert second.unrelated == (Probe("Where is Tall Tower?", "Mossby", "Relation_Specificity"),)
    assert (third.old, third.rephrasings) == (None, ("Di Fenn plays",))
    assert third.unrelated == (Probe("The country of Di Fenn is", None, "Relation_Specificity"),)


Change = Callable[[dict[str, Any]], object]
NESTED = "counterfact-nested.json"
BAD: list[tuple[str, Change, str, str]] = [
    ("zsre-kilt.jsonl", lambda r: r.update(alternatives=[]), "alternatives", "at least one answer"),
    ("zsre-kilt.jsonl", lambda r: r.pop("alternatives"), "alternatives", "at least one answer"),
    ("zsre-kilt.jsonl", lambda r: r.update(alternatives=["a", 3]), "alternatives[1]", "expected text, got int"),
    ("zsre-kilt.jsonl", lambda r: r.update(input=" "), "input", "is empty"),
    ("zsre-kilt.jsonl", lambda r: r.update(output=[{"provenance": []}]), "output", "one of them with an 'answer'"),
    ("zsre-kilt.jsonl", lambda r: r.update(output=[5]), "output[0]", "expected an object"),
    ("zsre-kilt.jsonl", lambda r: r["output"].insert(0, {"answer": 5}), "output[0].answer", "expected text, got int"),
    ("zsre-kilt.jsonl", lambda r: r.update(filtered_rephrases="one"), "filtered_rephrases", "expected a list"),
    ("zsre-kilt.jsonl", lambda r: r.update(logit=1.0), "logit", "FEVER"),
    ("fever-claims.jsonl", lambda r: r.pop("label"), "label", "is missing"),
    ("fever-claims.jsonl", lambda r: r.update(label="TRUE"), "label", "or NOT ENOUGH INFO, got 'TRUE'"),
    ("fever-claims.jsonl", lambda r: r.update(claim=[]), "claim", "expected text"),
    ("fever-kilt.jsonl", lambda r: r.pop("logit"), "logit", "got None"),
    ("fever-kilt.jsonl", lambda r: r.update(logit=True), "logit", "expected a number"),
    ("fever-kilt.jsonl", lambda r: r.update(logit=math.nan), "logit", "expected a number"),
    ("fever-kilt.jsonl", lambda r: r.update(logit="0.5"), "logit", "expected a number"),
    ("fever-kilt.jsonl", lambda r: r["output"][0].update(answer="Yes"), "output", "expected SUPPORTS"),
    (NESTED, lambda r: r.update(requested_rewrite="x"), "requested_rewrite", "expected an object"),
    (NESTED, lambda r: r["requested_rewrite"].update(prompt="No place"), "requested_rewrite.prompt", "has no {}"),
    (NESTED, lambda r: r["requested_rewrite"].pop("subject"), "requested_rewrite.subject", "is missing"),
    (NESTED, lambda r: r["requested_rewrite"].pop("target_new"), "requested_rewrite.target_new", "got NoneType"),
    (NESTED, lambda r: r["requested_rewrite"]["target_true"].pop("str"), "requested_rewrite.target_true.str", "missing"),
    (NESTED, lambda r: r.update(paraphrase_prompts="one"), "paraphrase_prompts", "expected a list"),
    (NESTED, lambda r: r.update(neighborhood_prompts=[""]), "neighborhood_prompts[0]", "is empty"),
    ("counterfact-flat.json", lambda r: r.update(locality={}), "locality", "KnowEdit"),
    ("knowedit.json", lambda r: r.update(ground_truth=[]), "ground_truth", "empty list"),
    ("knowedit.json", lambda r: r.update(ground_truth=[[3]]), "ground_truth", "expected text, got int"),
    ("knowedit.json", lambda r: r.update(portability=[]), "portability", "expected an object"),
    ("knowedit.json", lambda r: r["portability"].update(Reasoning={}), "portability.Reasoning", "expected a list"),
    ("knowedit.json", lambda r: r["portability"].update(Reasoning=["p"]), "portability.Reasoning[0]", "expected an object"),
    ("knowedit.json", lambda r: r.update(portability={"A": [{"prompt": "p"}]}), "portability.A[0].ground_truth", "is missing"),
    ("knowedit.json", lambda r: r.update(locality={"A": [{"ground_truth": "x"}]}), "locality.A[0].prompt", "is missing"),
    ("knowedit.json", lambda r: r.update(locality={"A": [{"prompt": "p", "ground_truth": [[]]}]}),
     "locality.A[0].ground_truth", "empty list"),
    ("knowedit.json", lambda r: r.update(locality={"\ud800": []}), "locality.'\\ud800'", "surrogate"),
    ("knowedit.json", lambda r: r.update(locality_prompt="x"), "locality_prompt", "CounterFact"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "field", "problem"), BAD)
def test_a_malformed_record_names_file_line_and_field(
    file: str, change: Change, field: str, problem: str, tmp_path: Path
) -> None:
    good, bad = records(file)[0], records(file)[0]
    change(bad)
    path = written(tmp_path, good, bad, good)
    with pytest.raises(RecordError) as caught:
        load(f"{FILES[file]}:{path}")
    assert (caught.value.path, caught.value.line, caught.value.field) == (path, 2, field)
    assert problem in str(caught.value)
    assert "looks like" not in str(caught.value), "the first record is one of this task"
    assert load(f"{FILES[file]}:{path}", skip_bad=True).skipped == 1


@pytest.mark.parametrize(
    ("content", "line", "field"),
    [
        ([1], None, None),
        ({"n_tokens": 4}, None, "original"),
        ({"original": ["a"]}, None, "completions"),
        ({"original": "a", "completions": "b"}, None, "original"),
        ({"original": ["a b"], "completions": []}, None, "completions"),
        ({"original": ["a b", 5], "completions": ["c", "d"]}, 2, "original"),
        ({"original": ["a b", "a b"], "completions": ["c", ""]}, 2, "completions"),
        ({"original": ["a b", "a b"], "completions": ["c", "a b"]}, 2, "completions"),
        ({"original": ["a b", "a b"], "completions": ["c", "a b "]}, 2, "completions"),
        ({"n_tokens": 2, "original": ["a b"], "completions": ["c d e"]}, 1, "completions"),
        ({"n_tokens": 0, "original": ["a b"], "completions": ["c d"]}, None, "n_tokens"),
    ],
)
def test_a_malformed_wikitext_file(content: Any, line: int | None, field: str | None, tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError) as caught:
        load(f"wikitext:{path}")
    assert (caught.value.line, caught.value.field) == (line, field)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_given_to_another_task_is_recognised(file: str, task: str, skip_bad: bool) -> None:
    right, source = FILES[file], f"{task}:{FIXTURES / file}"
    if task == right:
        assert load(source, skip_bad=skip_bad).skipped == 0
        return
    with pytest.raises(RecordError) as caught:
        load(source, skip_bad=skip_bad)
    looks = f"looks like the task '{right}': use {right}:{FIXTURES / file}"
    if right == "text":
        looks = f"does not hold JSON records; if it is plain text, use it as --locality text:{FIXTURES / file}"
    assert str(caught.value).endswith(looks)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("beginning", ["", "\n", " \n" * 80, "[1] ", "{{Infobox}} ", "1984\n", '"Well", '])
def test_plain_text_given_to_another_task_is_recognised(beginning: str, task: str, tmp_path: Path) -> None:
    path = tmp_path / "any.txt"
    path.write_text(beginning + "The river runs through the old city and on to the sea, past mills and farms. " * 4)
    if task == "text":
        assert load(f"text:{path}").prose
        return
    with pytest.raises(RecordError, match=rf"use it as --locality text:{path}$"):
        load(f"{task}:{path}")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text"])
@pytest.mark.parametrize("file", [file for file, task in FILES.items() if task not in ("text", "wikitext")])
def test_a_file_given_to_another_task_is_recognised_behind_malformed_records(file: str, task: str, tmp_path: Path) -> None:
    path, right = written(tmp_path, {}, 1, *records(file)), FILES[file]
    with pytest.raises(RecordError) as caught:
        load(f"{task}:{path}")
    assert ("looks like" in str(caught.value)) == (task != right)
    assert task == right or f"use {right}:{path}" in str(caught.value)


@pytest.mark.parametrize("task", ["fever", "zsre"])
def test_claims_without_a_logit_are_no_questions(task: str, tmp_path: Path) -> None:
    claims = records("fever-kilt.jsonl")
    for claim in claims:
        claim.pop("logit")
        claim["alternatives"] = ["SUPPORTS", "REFUTES"]
    with pytest.raises(RecordError, match="logit" if task == "fever" else "verdict") as caught:
        load(f"{task}:{written(tmp_path, *claims)}")
    assert "looks like" not in str(caught.value)


def test_only_claims_without_enough_information_are_no_data(tmp_path: Path) -> None:
    path = written(tmp_path, {"id": 1, "label": "NOT ENOUGH INFO", "claim": "It is so."})
    with pytest.raises(RecordError, match=r"holds no usable record \(0 malformed, 1 that are no request\)$"):
        load_edits(f"fever:{path}")


def test_combined_files_join_what_must_be_said(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "fever-claims.jsonl", tmp_path / "again.jsonl")
    fever, again = read("fever-claims.jsonl"), load(f"fever:{tmp_path / 'again.jsonl'}")
    both = combine([fever, again, read("wikitext.json")])
    assert both.left_out == 2
    assert both.notes == (*fever.notes, *read("wikitext.json").notes)
    assert len(both.examples) == 9
    assert not both.prose


def test_a_split_is_by_prompt_and_seed_alone(tmp_path: Path) -> None:
    data = TASKS["fever"].load(written(tmp_path, *claims(400), claims(1)[0]))
    train, valid = data.split(0.25)
    assert [sorted(e.prompt for e in part.examples) for part in (train, valid)] == [
        sorted(e.prompt for e in part.examples) for part in replace(data, examples=data.examples[::-1]).split(0.25)
    ]
    assert {e.prompt for e in train.examples}.isdisjoint(e.prompt for e in valid.examples)
    assert len(train.examples) + len(valid.examples) == 401
    assert 70 < len(valid.examples) < 130
    assert valid.probes == tuple(p for e in valid.examples for p in e.unrelated)
    some = replace(data, examples=data.examples[100:200]).split(0.25)[1]
    assert some.examples == tuple(e for e in data.examples[100:200] if e in valid.examples)
    assert data.split(0.25, seed=1)[1].examples != valid.examples
    assert any("validation part" in note and "0.25" in note and "seed 0" in note for note in valid.notes)
    assert any("training part" in note for note in train.notes)


def test_a_split_of_unrelated_texts_and_of_no_share() -> None:
    data = replace(read("nq.jsonl"), probes=tuple(Probe(f"Who is {i}?", "Ana") for i in range(100)))
    train, valid = data.split(0.5)
    assert set(train.probes) | set(valid.probes) == set(data.probes)
    assert 30 < len(valid.probes) < 70
    assert not set(train.probes) & set(valid.probes)
    for share in (0, 1, -0.5, 2):
        with pytest.raises(InputError, match="between 0 and 1"):
            data.split(share)


def test_describe_counts_and_measures() -> None:
    found = describe(read("knowedit.json"))
    assert {key: found[key] for key in ("requests", "rephrasings", "unrelated", "portability", "left_out", "skipped")} == {
        "requests": 3, "rephrasings": 2, "unrelated": 4, "portability": 3, "left_out": 0, "skipped": 0,
    }  # fmt: skip
    assert found["groups"] == {"Relation_Specificity": 3, "Forgetfulness": 1, "Reasoning": 2, "Subject_Aliasing": 1}
    assert found["prompts"] == {"characters": {"median": 24, "longest": 40}, "words": {"median": 6, "longest": 10}}
    assert found["targets"] == {"characters": {"median": 6, "longest": 8}, "words": {"median": 1, "longest": 2}}
    assert json.loads(json.dumps(found))["examples"][1]["old"] == "Bo Rask"
    texts = describe(read("text.txt"), examples=1)
    assert (texts["requests"], texts["unrelated"], len(texts["examples"])) == (0, 2, 1)
    assert texts["prompts"]["words"] == texts["targets"]["words"] == {"median": 16, "longest": 16}
