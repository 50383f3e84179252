"""Sessions on a tiny model: the stack, undo, the gate, and a store that gives the model back as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mendlm.gate
from cases import byte_tokenizer, other, tiny
from mendlm.apply import CHANGED_BASE, Edit, applied, stacked
from mendlm.editor import Editor
from mendlm.errors import FormatError, GateError, InputError, LayerError, NumericalError, RecordError
from mendlm.gate import Asked, Gate, Guard, ask, judge, load_guards
from mendlm.layers import default_layers, select
from mendlm.methods.mend import Mend, MendConfig
from mendlm.models import base_of
from mendlm.session import Session, request
from mendlm.store import Store
from mendlm.text import Formatter
from test_hub import SHA, TOKEN, Hub, hub  # noqa: F401

PROMPTS = ["Who is Ana?", "The capital of France is"]


def new_editor(name: str = "llama") -> Editor:
    torch.manual_seed(0)
    method = Mend(default_layers(tiny(name)), MendConfig(rank=4, initial_rate=0.2))
    editor = Editor(method, tiny(name), byte_tokenizer())
    texts = [editor.formatter.encode(prompt, "Bo") for prompt in PROMPTS]
    method.fit_normalizer(method.gradient(tiny(name), editor.formatter.batch(texts)))
    return editor


def new_session(name: str = "llama", **options: Any) -> Session:
    return Session(tiny(name), byte_tokenizer(), new_editor(name), **options)


def logits(session: Session) -> torch.Tensor:
    batch = session.formatter.batch([session.formatter.encode(p, None) for p in PROMPTS])
    if session.active is None:
        return session.model(**batch.inputs).logits
    with applied(session.model, session.active):
        return session.model(**batch.inputs).logits


def test_undo_of_the_last_edit_is_bit_exact() -> None:
    session = new_session()
    states = [logits(session)]
    for prompt, target in zip(PROMPTS, ("a baker", "Lyon"), strict=True):
        session.edit(prompt, target)
        states.append(logits(session))
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[1], states[2])
    session.undo()
    assert torch.equal(logits(session), states[1])
    session.undo()
    assert torch.equal(logits(session), states[0])
    session.redo()
    assert torch.equal(logits(session), states[1])


def test_undo_of_an_earlier_edit_leaves_the_later_one() -> None:
    session = new_session()
    first, second = session.edit(PROMPTS[0], "a baker").id, session.edit(PROMPTS[1], "Lyon").id
    kept, both = session.edits[second], logits(session)
    assert kept.about["stack"] == [first]
    undone = session.undo(first)
    with applied(session.model, kept):
        alone = session.model(torch.tensor([[5, 6, 7]])).logits
    with applied(session.model, session.active):
        assert torch.equal(session.model(torch.tensor([[5, 6, 7]])).logits, alone)
    again = session.redo(first)
    assert torch.equal(logits(session), both)  # in its old place of the stack
    assert again.about == undone.about


def test_a_second_edit_is_recorded_under_the_first() -> None:
    session = new_session(rehearse=0)
    session.edit(PROMPTS[0], "a baker")
    second = session.edit(PROMPTS[1], "Lyon").edit
    on_the_base = session.editor.edit(PROMPTS[1], "Lyon")
    name = next(iter(second.updates))
    assert not torch.allclose(second.updates[name].dense(), on_the_base.updates[name].dense())
    session.undo()
    third = session.edit(PROMPTS[1], "Lyon", on_base=True).edit
    assert third.about["stack"] == []
    assert torch.equal(third.updates[name].dense(), on_the_base.updates[name].dense())


def test_answers_are_the_edited_models() -> None:
    session = new_session()
    before = session.answers(PROMPTS, max_new_tokens=5)
    session.edit(PROMPTS[0], "a baker", scale=5.0)
    assert session.answers(PROMPTS, max_new_tokens=5) != before
    assert session.answer(PROMPTS[0], max_new_tokens=5) == session.answers(PROMPTS[:1], max_new_tokens=5)[0]
    session.undo()
    assert session.answers(PROMPTS, max_new_tokens=5) == before


def test_errors_leave_the_stack_as_it_was() -> None:
    session = new_session()
    name = session.edit(PROMPTS[0], "a baker").id
    for fails, kind in (
        (lambda: session.edit(PROMPTS[1], " "), InputError),
        (lambda: session.edit("long " * 500, "x"), InputError),
        (lambda: session.edit_many([(PROMPTS[1], "Lyon"), ("x", " ")]), InputError),
        (lambda: session.undo("nonsense"), InputError),
        (lambda: session.redo(name), InputError),
        (lambda: session.add(session.edits[name]), InputError),
        (lambda: session.add(new_session("qwen3").editor.edit(PROMPTS[0], "Bo")), FormatError),
        (lambda: session.add(new_session("gpt2").editor.edit(PROMPTS[0], "Bo"), force=True), LayerError),
        (lambda: Session(session.model, byte_tokenizer()).edit("a", "b"), InputError),
    ):
        with pytest.raises(kind):
            fails()
        assert list(session.edits) == [name]
    session.undo()
    with pytest.raises(InputError, match="nothing to undo"):
        session.undo()


def test_an_editor_for_other_layers_is_refused() -> None:
    method = Mend(select(tiny("gpt2"), ["*.0.mlp.c_fc"]), MendConfig(rank=2))
    with pytest.raises(LayerError, match="no such layer"):
        Editor(method, tiny("llama"), byte_tokenizer())


# The store


def test_a_store_opened_again_gives_the_same_logits(tmp_path: Path) -> None:
    session = new_session(store=Store.open(tmp_path / "s", base_of(tiny("llama"))))
    session.edit(PROMPTS[0], "a baker", rephrasings=["Ana is"], unrelated=["Who is Bo?"], author="me", reason="she is")
    session.edit(PROMPTS[1], "Lyon")
    session.edit("The river runs through", "town")
    session.undo(list(session.edits)[1])
    before, edits = logits(session), list(session.edits)
    again = Session(tiny("llama"), byte_tokenizer(), store=Store.open(tmp_path / "s"))
    assert list(again.edits) == edits
    assert torch.equal(logits(again), before)
    record = again.store.record(edits[0])
    assert (record.author, record.reason) == ("me", "she is")
    assert record.request["rephrasings"] == ["Ana is"]
    assert record.request["unrelated"] == [{"prompt": "Who is Bo?", "answer": None}]
    assert set(record.checks["norms"]) == set(again.edits[edits[0]].updates)
    with pytest.raises(InputError, match="no editor"):
        again.edit("a", "b")


def test_what_another_process_writes_takes_effect_with_the_next_call(tmp_path: Path) -> None:
    session, writer = (new_session(store=Store.open(tmp_path / "s", base_of(tiny("llama")))) for _ in range(2))
    base = logits(session)
    writer.edit(PROMPTS[0], "a baker")
    assert torch.equal(logits(session), logits(writer))
    assert not torch.equal(logits(session), base)


def test_the_base_is_not_changed_twice() -> None:
    session = new_session()
    edit = session.editor.edit(PROMPTS[0], "a baker")
    one, other = (replace(edit * scale, about={**edit.about, CHANGED_BASE: True, "request": {}}) for scale in (1.0, 2.0))
    first = session.add(one)
    with pytest.raises(InputError, match="must not be made twice"):
        session.add(other)
    session.undo()
    session.add(other)
    for name in (None, first):
        with pytest.raises(InputError, match="must not be made twice"):
            session.redo(name)
    assert session.store.record(first).state == "undone"


def test_a_later_edit_of_a_prompt_replaces_the_earlier_one() -> None:
    session = new_session()
    first = session.edit(PROMPTS[0], "a baker")
    with_first = logits(session)
    second = session.edit(f"{PROMPTS[0]} ", "a smith")
    assert second.replaces == (first.id,)
    assert second.edit.about["stack"] == []  # not recorded under the one that it replaces
    assert list(session.edits) == [second.id]
    session.undo()
    assert torch.equal(logits(session), with_first)
    assert session.edit(PROMPTS[0], "a smith", chat=True).replaces == ()  # another form


def test_a_store_of_another_model_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path / "s", base_of(tiny("llama"))).close()
    tiny("llama").save_pretrained(tmp_path / "one")
    other().save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(FormatError, match="another base model"):
        Session.open(tmp_path / "two", store=tmp_path / "s")
    assert Session.open(tmp_path / "one", store=tmp_path / "new").store.place == tmp_path / "new"


def test_a_tampered_edit_is_found(tmp_path: Path) -> None:
    session = new_session(store=Store.open(tmp_path / "s", base_of(tiny("llama"))))
    session.edit(PROMPTS[0], "a baker")
    (file,) = (tmp_path / "s" / "edits").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FormatError, match="has changed"):
        Session(tiny("llama"), byte_tokenizer(), store=Store.open(tmp_path / "s"))


def test_edits_survive_the_journey_through_bytes() -> None:
    edit = new_editor().edit(PROMPTS[0], "a baker")
    again = Edit.from_bytes(edit.to_bytes())
    assert all(torch.equal(a, b) for a, b in zip(edit.tensors(), again.tensors(), strict=True))
    assert (again.about, again.transposed) == (edit.about, edit.transposed)
    assert edit.to_bytes() == again.to_bytes()
    for wrong in (b"", b"nonsense", edit.to_bytes()[:-1], edit.to_bytes().replace(b"mendlm-rows-1", b"mendlm-rows-9")):
        with pytest.raises(FormatError, match="the edit 12"):
            Edit.from_bytes(wrong, "the edit 12")


# The stack


def test_the_active_edits_are_one_update_a_layer() -> None:
    session = new_session()
    made = session.edit_many([(prompt, "x") for prompt in PROMPTS] + [("The river", "y")])
    for name, update in session.active.updates.items():
        wanted = sum(one.edit.updates[name].dense() for one in made)
        assert torch.allclose(update.dense(), wanted, atol=1e-6)
    assert session.stack([made[2].id, made[0].id]).updates.keys() == session.active.updates.keys()
    two = session.stack([made[2].id, made[0].id])
    assert all(map(torch.equal, two.tensors(), stacked([made[0].edit, made[2].edit]).tensors()))
    assert session.stack([]) is None
    with pytest.raises(InputError, match="no edit"):
        session.stack(["nonsense"])


def test_a_compressed_stack_reports_the_share_that_it_lost() -> None:
    whole = new_session()
    whole.edit_many([(prompt, "x") for prompt in PROMPTS])
    assert whole.lost == {}
    small = Session(tiny("llama"), byte_tokenizer(), store=whole.store, rank=3)
    assert all(update.rows == 3 for update in small.active.updates.values())
    for name, share in small.lost.items():
        dense, kept = whole.active.updates[name].dense(), small.active.updates[name].dense()
        assert share == pytest.approx(((dense - kept).norm() / dense.norm()).item(), rel=1e-3)
        assert 0 < share < 1


def test_a_gate_asks_the_stack_that_will_run() -> None:
    session = new_session(rank=2)
    for prompt, target in zip(PROMPTS, ("a baker", "towns"), strict=False):
        made = session.edit(prompt, target, scale=5.0)
        (now,) = [one for one in session.check().asked if one.prompt == prompt]
        (then,) = made.checks.asked
        assert (then.after, then.probability[1]) == (now.after, pytest.approx(now.probability[1], rel=1e-3))


def test_a_session_keeps_few_edits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session()
    monkeypatch.setattr("mendlm.session.CACHE_BYTES", 6000)
    made = [session.edit(prompt, "x", on_base=True) for prompt in ("a", "b", "c", "d")]
    assert all(one.edit.nbytes == 2880 for one in made)
    for one in made:
        again = session.stack([one.id])
        assert all(map(torch.equal, again.tensors(), one.edit.tensors()))
        assert sum(edit.nbytes for edit in session._kept.values()) <= 6000
    assert session.stack([one.id for one in made[1:]]).nbytes == 3 * 2880
    assert len(session._kept) == 1  # it is larger than all that may be kept


# A hub


def test_edits_and_editors_travel_through_a_hub(hub: Hub) -> None:  # noqa: F811
    session, where = new_session(), {"endpoint": hub.url, "token": TOKEN}
    first, _ = session.edit(PROMPTS[0], "a baker"), session.edit(PROMPTS[1], "Lyon")
    session.push("me/both", **where)
    session.push("me/one", first.id, **where)
    session.push("me/editor", "editor", **where)
    other = Session(tiny("llama"), byte_tokenizer())
    with pytest.raises(InputError, match="no trained editor"):
        other.push("me/none", "editor", **where)
    both = other.pull("me/both", author="me", **where)
    assert torch.equal(logits(other), logits(session))
    assert other.store.record(both).reason == f"pulled from me/both, commit {SHA}"
    other.undo()
    other.pull("me/one", **where)
    assert other.pull("me/editor", **where) is other.editor
    session.undo()
    again = other.edit(PROMPTS[1], "Lyon").edit
    wanted = session.edit(PROMPTS[1], "Lyon").edit
    assert all(map(torch.equal, again.tensors(), wanted.tensors()))


# The gate


def test_questions_are_answered_before_and_under_an_edit() -> None:
    session = new_session()
    edit = session.editor.edit(PROMPTS[0], "a baker", scale=20.0)
    asked = [Asked("prompt", PROMPTS[0], False, "a baker"), Asked("guard", PROMPTS[1], False, None)]
    seen = ask(session.model, session.formatter, asked, None, edit, 6)
    formatter: Formatter = session.formatter
    for one in seen:
        text = formatter.encode(one.prompt, None)
        before = formatter.decode(formatter.generate(session.model, [text], 8)[0])
        with applied(session.model, edit):
            after = formatter.decode(formatter.generate(session.model, [text], 8)[0])
        assert before.startswith(one.before)
        assert after.startswith(one.after)
    wanted = formatter.encode(PROMPTS[0], "a baker")
    ids = torch.tensor([[*wanted.prompt, *wanted.target]])
    for place, change in enumerate((edit * 0.0, edit)):
        with applied(session.model, change), torch.no_grad():
            chances = session.model(ids).logits.softmax(-1)[0]
        start = len(wanted.prompt) - 1
        product = torch.stack([chances[start + i, token] for i, token in enumerate(wanted.target)]).prod().item()
        assert seen[0].probability[place] == pytest.approx(product ** (1 / len(wanted.target)), rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "needed", "passed"),
    [
        ([("prompt", True)], 1.0, True),
        ([("prompt", False)], 0.0, False),
        ([("prompt", True), ("rephrasing", True), ("rephrasing", False)], 0.5, True),
        ([("prompt", True), ("rephrasing", True), ("rephrasing", False)], 0.6, False),
        ([("prompt", True), ("rephrasing", True), ("guard", False)], 0.5, False),
    ],
)
def test_the_verdict(asked: list[tuple[Any, bool]], needed: float, passed: bool) -> None:
    assert judge([Asked(kind, "p", False, None, ok=ok) for kind, ok in asked], needed).passed is passed


def test_a_guard_with_an_answer_may_have_been_wrong_before() -> None:
    session = new_session()
    edit = session.editor.edit(PROMPTS[0], "a baker", scale=50.0)
    answer = session.answer(PROMPTS[1], max_new_tokens=6)
    right = answer[: answer.index("\ufffd") + 1]  # up to the end of a word
    asked = [Asked("guard", PROMPTS[1], False, wanted) for wanted in (right, "never said")]
    kept, lost = (ask(session.model, session.formatter, asked, None, change, 4) for change in (None, edit))
    assert [one.ok for one in kept] == [True, True]
    assert [one.ok for one in lost] == [False, True]
    assert [one.was_ok for one in lost] == [True, False]
    assert judge(lost, 1.0).kept == 0.0  # the one that was wrong before says nothing
    assert judge(lost[1:], 1.0).kept is None
    assert not lost[0].after.startswith(right)


def test_a_gate_reports_refuses_or_retries() -> None:
    guards = (Guard(PROMPTS[1]), Guard("Water is"))
    session = new_session(gate=Gate(guards=guards))
    made = session.edit(PROMPTS[0], "a baker", scale=30.0)
    assert not made.checks.passed
    assert [one.kind for one in made.checks.asked] == ["prompt", "guard", "guard"]
    assert session.store.record(made.id).checks["passed"] is False
    session.undo()
    base = logits(session)
    with pytest.raises(GateError, match="nothing was changed") as refused:
        session.edit(PROMPTS[0], "a baker", scale=30.0, on_fail="refuse")
    assert refused.value.checks[0]["passed"] is False
    assert torch.equal(logits(session), base)
    assert session.store.active() == []

    # Its prompt is answered so already; at full strength the guards are lost, at a millionth they are not.
    session.gate = Gate(guards=guards, on_fail="retry", scales=(1e-6, 1e-7))
    target = session.answer(PROMPTS[0], max_new_tokens=1)
    made = session.edit(PROMPTS[0], target, scale=30.0)
    assert made.checks.passed
    assert made.edit.about["request"]["scale"] == pytest.approx(30e-6)
    with pytest.raises(GateError, match="at strength 30, 3e-05, 3e-06"):
        session.edit(PROMPTS[0], "a baker", scale=30.0)


@pytest.mark.parametrize("on_fail", ["report", "refuse", "retry"])
def test_answers_that_are_no_numbers_are_said(on_fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session(gate=Gate(on_fail=on_fail))
    monkeypatch.setattr(mendlm.gate, "token_nll", lambda logits, label, row, size, whole: torch.full((size,), math.nan))
    for attempt in (session.edit, session.preview):
        with pytest.raises(NumericalError, match="with NaN or infinity; make the edit at a smaller scale"):
            attempt(PROMPTS[0], "a baker")
    assert session.store.records() == []


def test_a_strength_whose_answers_are_no_numbers_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session(gate=Gate(on_fail="retry", scales=(1e-6,)))
    target, tried, nll = session.answer(PROMPTS[0], max_new_tokens=1), [], mendlm.gate.token_nll

    def first_is_nan(*args: Any, **more: Any) -> torch.Tensor:
        tried.append(1)
        return nll(*args, **more) * (math.nan if len(tried) == 1 else 1)

    monkeypatch.setattr(mendlm.gate, "token_nll", first_is_nan)
    made = session.edit(PROMPTS[0], target, scale=30.0)
    assert made.edit.about["request"]["scale"] == pytest.approx(30e-6)
    assert len(tried) == 2


def test_a_preview_changes_nothing() -> None:
    session = new_session()
    session.edit(PROMPTS[0], "a baker")
    before, head = logits(session), session.store.head
    trial = session.preview(PROMPTS[0], "a smith", rephrasings=["Ana is"], unrelated=["Water is"])
    assert trial.replaces == tuple(session.edits)
    assert json.loads(json.dumps(trial.to_json()))["asked"][0]["wanted"] == "a smith"
    assert torch.equal(logits(session), before)
    assert session.store.head == head


def test_check_asks_all_promises_and_guards_again() -> None:
    session = new_session(gate=Gate(guards=(Guard("Water is"),)))
    assert [one.kind for one in session.check().asked] == ["guard"]
    session.edit(PROMPTS[0], "a baker", rephrasings=["Ana is"], unrelated=["Who is Bo?"])
    checks = session.check()
    assert [one.kind for one in checks.asked] == ["guard", "prompt", "rephrasing", "unrelated"]
    assert checks.asked[1].before == new_session().answer(PROMPTS[0], max_new_tokens=8)
    assert checks.asked[1].after == session.answer(PROMPTS[0], max_new_tokens=8)


def test_guards_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "guards.jsonl"
    path.write_text('{"prompt": "Water is", "answer": "wet"}\n{"prompt": "Who?", "chat": true}\n')
    assert load_guards(path) == (Guard("Water is", "wet"), Guard("Who?", None, True))
    for wrong, field in (('{"prompt": 3}', "prompt"), ('{"prompt": "a", "chat": 1}', "chat"), ('{"prompt": "a", "x": 1}', "x")):
        path.write_text(wrong)
        with pytest.raises(RecordError, match=f"{path.name}.*{field}"):
            load_guards(path)


@pytest.mark.parametrize("wrong", [{"on_fail": "x"}, {"needed": 1.5}, {"tokens": 0}])
def test_a_gate_of_wrong_settings_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Gate(**wrong)


def test_a_request_may_be_a_probe_or_text() -> None:
    example = request("a", "b", ["c"], ["d"])
    assert (example.prompt, example.target, example.rephrasings, example.unrelated[0].prompt) == ("a", "b", ("c",), "d")
