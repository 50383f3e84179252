"""Edits that have not taken are refined on their own rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, tiny
from mendlm.apply import Edit, applied
from mendlm.checkpoint import load_editor
from mendlm.editor import Editor, editor_file
from mendlm.errors import InputError, NumericalError
from mendlm.evaluation import EvaluationConfig, Evaluator, evaluate
from mendlm.layers import default_layers
from mendlm.losses import token_nll
from mendlm.methods import base, refine
from mendlm.methods.base import edits_of
from mendlm.methods.malmen import Malmen, MalmenConfig
from mendlm.methods.mend import MendConfig
from mendlm.methods.refine import RATE, passed, refined
from mendlm.replay import Trunk
from mendlm.tasks import Dataset, EditExample
from mendlm.text import Encoded, Formatter, by_length, scored_logits
from test_checkpoint import perturbed

STEPS, SCALE = 300, 100.0
FACTS = [("The capital of France is", "L"), ("Who runs it?", "A"), ("a", "b"), ("The river", "s")]


def sure(name: str) -> Any:
    """A tiny model whose head tells tokens far enough apart that a target can be all but certain."""
    model = copy.deepcopy(tiny(name))
    model.get_output_embeddings().weight.data.mul_(20)
    return model


def encoded(form: Formatter) -> list[Encoded]:
    return [form.encode(prompt, target) for prompt, target in FACTS]


def again(model: Any, form: Formatter, edits: Edit, texts: list[Encoded], steps: int, limit: int = 8) -> Edit:
    """Edits as they were made, refined."""
    trunk = Trunk.below(model, default_layers(model))
    groups = by_length([len(text) for text in texts], limit=limit)
    return refined(model, form, edits, texts, steps, trunk, [passed(model, form, texts, group, trunk) for group in groups])


def state(model: Any, form: Formatter, edit: Edit, text: Encoded) -> tuple[bool, float]:
    """Whether the target is given token by token, and its mean NLL, under a single edit."""
    batch = form.batch([text])
    with torch.no_grad(), applied(model, edit):
        logits = scored_logits(model, batch)
    return bool((logits.argmax(-1) == batch.label).all()), token_nll(logits, batch.label, batch.row, 1).item()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_edits_that_have_not_taken_do(name: str) -> None:
    model, method = sure(name), perturbed(name)
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)
    plain = edits_of(method, model, form, texts, 1, 2, SCALE)
    assert not any(state(model, form, edit, text)[0] for edit, text in zip(plain.unbind(), texts, strict=True))
    method.config = replace(method.config, refine=STEPS)
    made = edits_of(method, model, form, texts, 1, 2, SCALE)
    for before, after, text in zip(plain.unbind(), made.unbind(), texts, strict=True):
        right, nll = state(model, form, after, text)
        assert right
        assert nll <= refine.ENOUGH + 1e-4
        for layer, update in after.updates.items():
            assert torch.equal(update.u, before.updates[layer].u)
            assert not torch.equal(update.delta, before.updates[layer].delta)
    assert not any(tensor.requires_grad for tensor in made.tensors())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *method.parameters()))


def test_steps_are_adams_on_delta_in_units_of_its_own_size() -> None:
    model, method = sure("llama"), perturbed()
    form = Formatter.of(model, byte_tokenizer())
    (text,) = encoded(form)[:1]
    batch = form.batch([text])
    edit = method.edits(model, batch) * SCALE
    moments = {name: (torch.zeros_like(u.delta), torch.zeros_like(u.delta)) for name, u in edit.updates.items()}
    size = {name: u.delta[u.nonzero()].square().mean().sqrt() for name, u in edit.updates.items()}
    deltas = {name: u.delta.clone() for name, u in edit.updates.items()}
    for step in (1, 2, 3):
        leaves = {name: delta.clone().requires_grad_() for name, delta in deltas.items()}
        changed = {name: replace(update, delta=leaves[name]) for name, update in edit.updates.items()}
        with applied(model, Edit(changed)):
            logits = scored_logits(model, batch)
        token_nll(logits, batch.label, batch.row, 1).sum().backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * leaf.grad)
            second.mul_(0.99).add_(0.01 * leaf.grad**2)
            root = (second / (1 - 0.99**step)).sqrt() + 1e-8
            deltas[name] = deltas[name] - RATE * size[name] * first / (1 - 0.9**step) / root
    found = again(model, form, edit, [text], 3)
    for name, update in found.updates.items():
        torch.testing.assert_close(update.delta, deltas[name], rtol=1e-4, atol=1e-5 * size[name].item())


def test_a_batch_is_refined_as_each_alone_and_what_has_taken_is_left_alone() -> None:
    model, method = sure("llama"), perturbed()
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)
    plain = edits_of(method, model, form, texts, 1, 8, SCALE)
    good = again(model, form, plain[1:2], texts[1:2], STEPS)  # one that has taken, between those that have not
    mixed = {name: u.delta.clone() for name, u in plain.updates.items()}
    for name, delta in mixed.items():
        delta[1] = good.updates[name].delta[0]
    start = replace(plain, updates={name: replace(u, delta=mixed[name]) for name, u in plain.updates.items()})
    found = again(model, form, start, texts, 7, 2)
    for name, update in found.updates.items():
        assert torch.equal(update.delta[1], mixed[name][1])
    for place in (0, 2, 3):
        (alone,) = again(model, form, plain[place : place + 1], [texts[place]], 7).unbind()
        own = found[place : place + 1].unbind()[0]
        for name, update in alone.updates.items():
            scale = update.delta.square().mean().sqrt().item()
            torch.testing.assert_close(own.updates[name].delta, update.delta, rtol=1e-3, atol=0.02 * scale)
    assert again(model, form, plain, texts, 0) is plain


def test_edits_made_at_once_are_refined_on_all_their_requests() -> None:
    model, method = sure("llama"), perturbed(refine=STEPS)
    editor = Editor(method, model, byte_tokenizer())
    edit = editor.edit_together(FACTS[:2], scale=SCALE)
    texts = encoded(editor.formatter)
    assert all(state(model, editor.formatter, edit, text)[0] for text in texts[:2])
    pairs = edits_of(method, model, editor.formatter, texts[:4], 2, 8, SCALE)
    for place, text in enumerate(texts[:4]):
        assert state(model, editor.formatter, pairs[place // 2], text)[0]


def test_an_editor_refines_its_edits_at_the_strength_asked_for() -> None:
    model = sure("llama")
    editor = Editor(perturbed(refine=STEPS), model, byte_tokenizer())
    for edit, fact in zip(editor.edit_many(FACTS, scale=SCALE, batch_size=2), FACTS, strict=True):
        assert editor.already_given([fact]) == [False]
        with applied(model, edit):
            assert editor.already_given([fact]) == [True]


def test_refining_is_a_number_of_steps() -> None:
    with pytest.raises(InputError, match="refine is a number of steps, 0 for none, got -1"):
        MendConfig(refine=-1)


def test_every_token_must_be_the_likeliest_and_the_target_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = sure("llama"), perturbed(refine=STEPS)
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)
    monkeypatch.setattr(refine, "ENOUGH", 100.0)
    states = [
        state(model, form, edit, text)
        for edit, text in zip(edits_of(method, model, form, texts, 1, 8, SCALE).unbind(), texts, strict=True)
    ]
    assert all(right for right, _ in states)
    assert max(nll for _, nll in states) > 0.1


def test_a_step_is_taken_for_the_requests_that_lack() -> None:
    model, method = sure("llama"), perturbed()
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)[:2]
    start = again(model, form, edits_of(method, model, form, texts[:1], 1, 8, SCALE), texts[:1], STEPS)
    found = again(model, form, start, texts, 1)
    leaves = {name: update.delta.clone().requires_grad_() for name, update in start.updates.items()}
    batch = form.batch(texts[1:])
    with applied(model, Edit({name: replace(update, delta=leaves[name]) for name, update in start.updates.items()})):
        logits = scored_logits(model, batch)
    token_nll(logits, batch.label, batch.row, 1).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        rows = start.updates[name]
        size = rows.delta[rows.nonzero()].square().mean().sqrt()
        clear = leaf.grad.abs() > 1e-3 * leaf.grad.abs().max()  # Adam's first step is the gradient's sign
        moved = found.updates[name].delta - start.updates[name].delta
        torch.testing.assert_close(moved[clear], -RATE * size * leaf.grad.sign()[clear], rtol=1e-2, atol=0)


@pytest.mark.parametrize("decoupled_from", [100, 2])
def test_a_merge_by_least_squares_is_refined(decoupled_from: int) -> None:
    model = sure("llama")
    config = MalmenConfig(rank=4, refine=STEPS, decoupled_from=decoupled_from)
    method = Malmen(default_layers(model), config)
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)[:2]
    method.prepare(model, form.batch(texts))
    (edit,) = edits_of(method, model, form, texts, 2, 8, SCALE).unbind()
    assert all(state(model, form, edit, text)[0] for text in texts)


def test_the_trunk_runs_again_only_where_fewer_edits_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = sure("llama"), perturbed(refine=5)
    form = Formatter.of(model, byte_tokenizer())
    text = form.encode("Who runs it?", "a name that five steps do not reach")
    runs: list[int] = []
    run = Trunk.run

    def counted(trunk: Trunk, *given: Any) -> Any:
        runs.append(1)
        return run(trunk, *given)

    monkeypatch.setattr(Trunk, "run", counted)
    edits_of(method, model, form, [text], 1, 8, SCALE)
    assert not runs


def test_edits_that_are_not_finite_are_named_before_they_are_refined() -> None:
    model = sure("llama")
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)
    edits = edits_of(perturbed(), model, form, texts, 1, 8)
    name = next(iter(edits.updates))
    edits.updates[name].delta[1, 0, 0] = torch.nan
    with pytest.raises(NumericalError) as raised:
        again(model, form, edits, texts, 5)
    assert [layer for layer in edits.updates if layer in str(raised.value)] == [name]


def test_an_edit_of_a_negative_strength_is_left_alone() -> None:
    model = sure("llama")
    form = Formatter.of(model, byte_tokenizer())
    texts = encoded(form)
    method = perturbed()
    plain = edits_of(method, model, form, texts, 1, 8, -SCALE)
    method.config = replace(method.config, refine=STEPS)
    refining = edits_of(method, model, form, texts, 1, 8, -SCALE)
    for one, other in zip(plain.tensors(), refining.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sequential", [False, True])
def test_an_evaluation_scores_and_times_what_is_refined(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sure("llama")
    facts = FACTS[:1] if sequential else FACTS  # those after it would disturb it
    data = Dataset("records:x", "abc", tuple(EditExample(prompt=prompt, target=target) for prompt, target in facts), ())
    config = EvaluationConfig(scale=SCALE, generate=False, sequential=sequential, timed_edits=1)
    asked: list[int] = []

    def watched(*given: Any) -> Edit:
        asked.append(given[4])
        return refined(*given)

    monkeypatch.setattr(base, "refined", watched)
    for steps, share in ((0, 0.0), (STEPS, 1.0)):
        method = perturbed(refine=steps)
        asked.clear()
        evaluator = Evaluator(method, method.specs, model, byte_tokenizer(), config)
        evaluator.time_edits(data.examples)
        assert asked == [steps, steps]
        summary = evaluate(method, method.specs, model, byte_tokenizer(), data, config).summary
        assert summary["success"]["after"] == share


def test_the_shipped_editors_refine_and_their_edits_say_so() -> None:
    for name in ("starter", "starter-many"):
        assert load_editor(editor_file(name))[0].refine == 20
    model = tiny("llama")
    for steps, said in ((0, {}), (3, {"refine": 3})):
        assert Editor(perturbed(refine=steps), model, byte_tokenizer()).edit(*FACTS[0]).about["editor"] == said
