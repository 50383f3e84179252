"""Edits that join others are rehearsed with them: what was promised holds with all of them together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, tiny
from mendlm.apply import CHANGED_BASE, Edit, applied, stacked
from mendlm.editor import Editor
from mendlm.errors import InputError, NumericalError
from mendlm.evaluation import EvaluationConfig, Evaluator, evaluate
from mendlm.gate import Asked, Gate, Guard
from mendlm.losses import token_kl, token_nll
from mendlm.lowrank import LowRank
from mendlm.methods import rehearse
from mendlm.methods.refine import RATE
from mendlm.methods.rehearse import LENGTH, SAMPLES, SCORED, STAYS, TURNS, WEIGHT, Rehearsal
from mendlm.session import Session
from mendlm.tasks import Dataset, EditExample
from mendlm.text import Encoded, Formatter, scored_logits
from test_checkpoint import perturbed
from test_refine import FACTS, SCALE, STEPS, state, sure


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model of random weights says freely does not survive edits of this strength."""
    monkeypatch.setattr(Rehearsal, "samples", [])


def singles(model: Any, name: str = "llama") -> tuple[Formatter, list[Encoded], list[Edit]]:
    """Edits of the facts, each made to take by itself."""
    form = Formatter.of(model, byte_tokenizer())
    return form, [form.encode(prompt, target) for prompt, target in FACTS], copy.deepcopy(made(name))


@functools.cache
def made(name: str) -> list[Edit]:
    return Editor(perturbed(name, refine=STEPS), sure(name), byte_tokenizer()).edit_many(FACTS, scale=SCALE)


def logits_of(model: Any, form: Formatter, edit: Edit | None, texts: Sequence[Encoded]) -> torch.Tensor:
    batch = form.batch(texts)
    if edit is None:
        return scored_logits(model, batch)
    with applied(model, edit):
        return scored_logits(model, batch)


def kl_of(model: Any, form: Formatter, before: Edit | None, after: Edit, texts: Sequence[Encoded]) -> torch.Tensor:
    """The KL of each text."""
    batch = form.batch(texts)
    with torch.no_grad():
        base = logits_of(model, form, before, texts)
    return token_kl(base, logits_of(model, form, after, texts), batch.row, batch.size)


def given(model: Any, form: Formatter, edit: Edit, texts: Sequence[Encoded]) -> list[bool]:
    return [state(model, form, edit, text)[0] for text in texts]


@pytest.mark.usefixtures("no_samples")
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_was_promised_holds_with_all_edits_together(name: str) -> None:
    model = sure(name)
    form, texts, edits = singles(model, name)
    assert not all(given(model, form, stacked(edits[:2]), texts[:2]))
    moved, steps = Rehearsal(model, form).joined(edits[1], edits[0], texts[1:2], texts[:1], steps=STEPS)
    assert 0 < steps < STEPS
    assert all(given(model, form, stacked([edits[0], moved]), texts[:2]))
    assert given(model, form, moved, texts[1:2]) == [True]  # it holds by itself, too, as when the other is undone
    assert moved.about == edits[1].about
    for layer, update in moved.updates.items():
        assert torch.equal(update.u, edits[1].updates[layer].u)
        assert not torch.equal(update.delta, edits[1].updates[layer].delta)
        assert not update.delta.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_is_that_of_all_that_lacks() -> None:
    """Adam's first step is the sign of the gradient: that of the promises that lack, the texts that went, and the samples."""
    model = sure("llama")
    form, texts, edits = singles(model)
    below, kept = edits[0], [form.encode("Whose is it?", "xy"), form.encode("It", "was")]
    rehearsal = Rehearsal(model, form)
    moved, steps = rehearsal.joined(edits[1], below, texts[1:2], [texts[0], texts[2]], kept, before=below, steps=1)
    assert steps == 1
    leaves = {name: update.delta.clone().requires_grad_() for name, update in edits[1].updates.items()}
    stack = stacked([below, replace(edits[1], updates={n: replace(u, delta=leaves[n]) for n, u in edits[1].updates.items()})])
    batch = form.batch(texts[:3])
    nll = token_nll(logits_of(model, form, stack, texts[:3]), batch.label, batch.row, 3)
    lacking = torch.tensor([not state(model, form, stack, text)[0] for text in texts[:3]]) | (nll > 0.1)
    went = kl_of(model, form, below, stack, kept)
    own = kl_of(model, form, None, stack, rehearsal.samples[::TURNS])
    assert bool(lacking.any())
    assert bool((went > STAYS).any())
    assert own.mean() > STAYS
    (nll[lacking].sum() + went[went > STAYS].sum() + WEIGHT * own.mean()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        rows = edits[1].updates[name]
        size = rows.delta[rows.nonzero()].square().mean().sqrt()
        clear = leaf.grad.abs() > 1e-3 * leaf.grad.abs().max()
        step = (moved.updates[name].delta - rows.delta)[clear]
        torch.testing.assert_close(step, -RATE * size * leaf.grad.sign()[clear], rtol=1e-2, atol=0)


def answered(model: Any, form: Formatter, prompt: str, edit: Edit, tokens: int) -> Encoded:
    """A prompt with its answer under an edit."""
    text = form.encode(prompt, None)
    with torch.no_grad(), applied(model, edit):
        return replace(text, target=form.generate(model, [text], tokens)[0])


@pytest.mark.usefixtures("no_samples")
def test_named_texts_stay_as_they_were_under_the_edits_below() -> None:
    model = sure("llama")
    form, texts, edits = singles(model)
    kept = [answered(model, form, "Whose is it?", edits[0], 2)]
    rehearsal, lost = Rehearsal(model, form), []
    assert not all(given(model, form, stacked(edits[:2]), kept))
    for watched in ([], kept):
        moved, _ = rehearsal.joined(edits[1], edits[0], texts[1:2], (), watched, before=edits[0], steps=STEPS)
        stack = stacked([edits[0], moved])
        lost.append(kl_of(model, form, edits[0], stack, kept).item())
    assert all(given(model, form, stack, [*kept, texts[1]]))
    assert lost[1] <= STAYS + 1e-4 < lost[0]


@pytest.mark.usefixtures("no_samples")
def test_every_token_of_a_kept_answer_stays_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "STAYS", 1e9)
    model = sure("llama")
    form, _, edits = singles(model)
    kept = [answered(model, form, "Whose is it?", edits[0], 2)]
    moved, steps = Rehearsal(model, form).joined(edits[1], edits[0], [], (), kept, before=edits[0], steps=STEPS)
    assert 0 < steps < STEPS
    assert given(model, form, stacked([edits[0], moved]), kept) == [True]


def test_the_models_own_samples_stay() -> None:
    model = sure("llama")
    form, texts, edits = singles(model)
    samples = Rehearsal(model, form).samples
    assert len(samples) == SAMPLES
    assert all(len(text.prompt) == LENGTH + 1 - SCORED and len(text.target) == SCORED for text in samples)
    assert len({text.prompt for text in samples}) > SAMPLES / 2
    assert Rehearsal(model, form).samples == samples
    lost = []
    for own in ([], samples):
        rehearsal = Rehearsal(model, form)
        rehearsal.samples = own
        moved, _ = rehearsal.joined(edits[1], edits[0], texts[1:2], texts[:1], steps=40)
        lost.append(kl_of(model, form, None, stacked([edits[0], moved]), samples).mean().item())
    assert lost[1] < 0.7 * lost[0]


def test_samples_are_drawn_from_the_models_distribution() -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    torch.manual_seed(5)  # of no matter: samples have a seed of their own
    first = Rehearsal(model, form).samples
    greedy = form.generate(model, [Encoded(first[0].prompt[:1], ())], LENGTH)[0]
    assert [*first[0].prompt[1:], *first[0].target] != [*greedy]
    assert not Rehearsal(tiny("t5"), Formatter.of(tiny("t5"), byte_tokenizer())).samples


def test_an_edit_under_which_all_holds_comes_back_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sure("llama")
    form, texts, edits = singles(model)
    rehearsal = Rehearsal(model, form)
    found, steps = rehearsal.joined(edits[0], None, texts[:1])
    assert steps == 0
    assert found.id == edits[0].id
    assert rehearsal.joined(edits[1], edits[0], texts, steps=0) == (edits[1], 0)
    none = edits[0] * 1e-9
    assert rehearsal.joined(edits[0], none, texts[:1], steps=2)[1] == 2
    monkeypatch.setattr(rehearse, "STAYS", 1e9)
    assert rehearsal.joined(edits[0], none, texts[:1])[1] == 0  # the samples are looked at, and count as kept


def test_an_edit_that_changes_the_base_is_left_alone() -> None:
    model = sure("llama")
    form, texts, edits = singles(model)
    marked = replace(edits[1], about={CHANGED_BASE: "abc"})
    assert Rehearsal(model, form).joined(marked, edits[0], texts[:2]) == (marked, 0)


def test_an_edit_that_is_not_finite_is_refused() -> None:
    model = sure("llama")
    form, texts, edits = singles(model)
    next(iter(edits[1].updates.values())).delta[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinite"):
        Rehearsal(model, form).joined(edits[1], edits[0], texts[:2])


def test_half_precision_does_not_make_a_text_go() -> None:
    """Kept texts are looked at as they were before: other kernels would turn near ties."""
    form, _, edits = singles(sure("llama"))
    kept = [form.encode(f"It is {number} of", "abcd") for number in range(60)]
    assert Rehearsal(copy.deepcopy(tiny("llama")).bfloat16(), form).joined(edits[0] * 0.0, None, [], (), kept)[1] == 0


@pytest.mark.usefixtures("no_samples")
def test_edits_of_different_layers_are_rehearsed_above_the_lowest() -> None:
    model = sure("llama")
    form, texts, edits = singles(model)
    low = next(iter(edits[0].updates))
    one = replace(edits[0], updates={low: edits[0].updates[low]})
    two = replace(edits[1], updates={name: update for name, update in edits[1].updates.items() if name != low})
    assert given(model, form, stacked([one, two]), texts[1:2]) == [False]
    moved, _ = Rehearsal(model, form).joined(two, one, [], texts[1:2], steps=STEPS)
    assert set(moved.updates) == set(two.updates)
    assert given(model, form, stacked([one, moved]), texts[1:2]) == [True]
    kept = [answered(model, form, "Whose is it?", one, 2)]
    assert given(model, form, two * 0.0, kept) == [False]
    assert Rehearsal(model, form).joined(two * 0.0, None, [], (), kept, before=one, steps=2)[1] == 2


# Sessions

ASKED = [("Who runs it?", "A"), ("Who made it?", "B"), ("Where is it?", "C")]
"""Questions, whose answers end."""


def new_session(model: Any, **options: Any) -> Session:
    editor = Editor(perturbed("llama", refine=STEPS), model, byte_tokenizer())
    return Session(model, byte_tokenizer(), editor, gate=options.pop("gate", Gate(tokens=1)), **options)


@pytest.mark.usefixtures("no_samples")
def test_an_edit_of_a_session_keeps_what_the_earlier_ones_promised() -> None:
    model = sure("llama")
    held = {}
    for steps in (0, STEPS):
        session = new_session(model, rehearse=steps)
        edits = [session.edit(prompt, target, scale=SCALE, on_base=True) for prompt, target in ASKED[:2]]
        held[steps] = [one.ok for one in session.check().asked]
        assert ("rehearsed" in edits[-1].edit.about) == (steps > 0)
        assert "rehearsed" not in edits[0].edit.about
    assert not all(held[0])
    assert all(held[STEPS])


@pytest.mark.usefixtures("no_samples")
def test_the_edits_that_were_there_stay_to_the_bit() -> None:
    session = new_session(sure("llama"), rehearse=3)
    first = session.edit(*ASKED[0], scale=SCALE)
    rows = [tensor.clone() for tensor in first.edit.tensors()]
    session.edit(*ASKED[1], scale=SCALE, on_base=True)
    session.undo()
    assert all(map(torch.equal, rows, session.active.tensors()))
    assert not any(tensor.requires_grad for tensor in session.active.tensors())


@pytest.mark.usefixtures("no_samples")
def test_a_guard_keeps_the_answer_that_it_has_now() -> None:
    """Also where the edit that gave it is replaced; an answer is whole, up to its end."""
    model = sure("llama")
    session = new_session(model, rehearse=0)
    session.edit(*ASKED[0], scale=SCALE)
    guard = Guard(ASKED[1][0])
    answer = session.answer(guard.prompt, max_new_tokens=2)
    assert answer != Session(model, byte_tokenizer()).answer(guard.prompt, max_new_tokens=2)
    session.gate, session.rehearse = Gate(guards=(guard,), tokens=1), STEPS
    tried = session.preview(ASKED[0][0], "C", scale=SCALE, on_base=True)
    assert tried.replaces
    assert tried.checks.passed, tried.checks.failures()


def test_answers_that_end_are_kept_with_their_end() -> None:
    session = new_session(sure("llama"))
    session.edit(*ASKED[0], scale=SCALE)
    end = session.formatter.tokenizer.eos_token_id
    asked = [Asked("guard", ASKED[0][0], False, None)]
    (text,) = session._answers(asked, session.active, 5)
    assert text.target == (*session.formatter.encode(*ASKED[0]).target, end)
    assert session._answers(asked, session.active, 1)[0].target == text.target[:1]


@pytest.mark.usefixtures("no_samples")
def test_edits_that_cannot_be_asked_or_are_elsewhere_block_no_other() -> None:
    session = new_session(sure("llama"), rehearse=2)
    rows = {name: update * 1e-9 for name, update in session.editor.edit("It", "was").updates.items()}
    for number, request in enumerate(({"prompt": " ", "target": "x"}, {"prompt": "ab" * 400, "target": "x"})):
        session.add(Edit({name: row * (1.0 + number) for name, row in rows.items()}, about={"request": request}), force=True)
    head = session.model.get_output_embeddings()
    zero = torch.zeros(1, head.in_features), torch.zeros(1, head.out_features)
    session.add(Edit({"lm_head": LowRank(*zero)}, about={"request": {"prompt": "a", "target": "b", "scale": None}}), force=True)
    assert session.edit(*ASKED[0], scale=SCALE, on_base=True).edit.about["rehearsed"] == 2


@pytest.mark.usefixtures("no_samples")
def test_edits_made_together_hold_together() -> None:
    session = new_session(sure("llama"), rehearse=STEPS)
    made = session.edit_many([ASKED[0], ASKED[1], ASKED[0]], scale=SCALE, on_base=True)
    assert all(one.ok for one in session.check().asked)
    assert [("rehearsed" in one.edit.about) for one in made] == [False, False, True]  # the first gives way to the last


@pytest.mark.usefixtures("no_samples")
def test_rephrasings_unrelated_prompts_and_guards_are_rehearsed() -> None:
    model = sure("llama")
    gate = Gate(guards=(Guard("Some text"),), tokens=1)
    named: dict[str, Any] = {"rephrasings": ["Who is it run by?"], "unrelated": ["It was"], "scale": SCALE}
    plain = new_session(model, gate=gate, rehearse=0).preview(*ASKED[0], **named)
    assert not plain.checks.passed
    session = new_session(model, gate=gate, rehearse=3 * STEPS)
    taken = session.edit(*ASKED[0], **named)
    assert taken.checks.passed, taken.checks.failures()
    assert 0 < taken.edit.about["rehearsed"] < 3 * STEPS
    assert {one.kind for one in taken.checks.asked} == {"prompt", "rephrasing", "unrelated", "guard"}


@pytest.mark.usefixtures("no_samples")
def test_an_unrelated_prompt_that_an_edit_corrects_no_longer_stays() -> None:
    session = new_session(sure("llama"), rehearse=STEPS)
    session.edit(*ASKED[0], scale=SCALE, unrelated=[ASKED[1][0]])
    session.edit(*ASKED[1], scale=SCALE, on_base=True)
    asked = {(one.kind, one.prompt): one.ok for one in session.check().asked}
    assert asked["prompt", ASKED[0][0]]
    assert asked["prompt", ASKED[1][0]]


@pytest.mark.usefixtures("no_samples")
def test_edits_of_a_negative_strength_are_neither_rehearsed_nor_promise_anything() -> None:
    session = new_session(sure("llama"), rehearse=STEPS)
    taken = session.edit(*ASKED[0], scale=-SCALE)
    assert session.edit(*ASKED[1], scale=-SCALE, on_base=True).edit.about["stack"] == []
    assert not session.check().asked
    made = session.edit(*ASKED[2], scale=SCALE, on_base=True)
    assert made.checks.passed
    assert taken.id in session.edits


def test_a_session_refuses_a_negative_number_of_steps() -> None:
    with pytest.raises(InputError, match="rehearse is a number of steps, 0 for none, got -1"):
        new_session(tiny("llama"), rehearse=-1)
    with pytest.raises(InputError, match="rehearse is a number of steps, 0 for none, got -2"):
        EvaluationConfig(rehearse=-2)


def facts(count: int) -> Dataset:
    return Dataset("records:x", "abc", tuple(EditExample(prompt=p, target=t) for p, t in FACTS[:count]), ())


@pytest.mark.usefixtures("no_samples")
def test_an_evaluation_scores_edits_rehearsed() -> None:
    model, method, found = sure("llama"), perturbed(refine=STEPS), {}
    how: dict[str, Any] = {"scale": SCALE, "generate": False, "num_edits": 2, "timed_edits": 1, "sequential": True}
    for steps in (0, STEPS):
        config = EvaluationConfig(rehearse=steps, on_base=True, **how)
        found[steps] = evaluate(method, method.specs, model, byte_tokenizer(), facts(2), config).summary
    assert found[0]["success"]["after"] < 1
    assert found[STEPS]["success"]["after"] == 1
    assert found[STEPS]["rehearse"] == STEPS


def test_edits_in_turn_may_be_made_on_the_base() -> None:
    model, method = sure("llama"), perturbed()
    config = EvaluationConfig(num_edits=2, sequential=True, on_base=True)
    evaluator = Evaluator(method, method.specs, model, byte_tokenizer(), config)
    texts = [evaluator.formatter.encode(*fact) for fact in ASKED[:2]]
    at_once, in_turn = evaluator.edit(texts), evaluator._edit_in_turn(texts)[0]
    under = Evaluator(method, method.specs, model, byte_tokenizer(), replace(config, on_base=False))._edit_in_turn(texts)[0]
    for name, update in in_turn.updates.items():
        torch.testing.assert_close(update.dense(), at_once.updates[name].dense())  # type: ignore[attr-defined]
        assert not torch.allclose(under.updates[name].dense(), update.dense())
    with pytest.raises(InputError, match="rehearse needs edits that give an answer, at a scale above 0, got -1"):
        EvaluationConfig(rehearse=4, sequential=True, scale=-1)
    for given in ({"on_base": True}, {"rehearse": 4}):
        with pytest.raises(InputError, match=f"{next(iter(given))} is for edits made one after another; give --sequential too"):
            EvaluationConfig(**given)
