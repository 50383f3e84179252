"""Edits that have not taken are refined on their own rows."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from cases import byte_tokenizer, tiny
from mendlm.apply import Edit, applied
from mendlm.editor import Editor
from mendlm.errors import InputError
from mendlm.layers import default_layers
from mendlm.losses import token_nll
from mendlm.methods import refine
from mendlm.methods.base import edits_of
from mendlm.methods.mend import MendConfig
from mendlm.methods.refine import RATE, passed, refined
from mendlm.replay import Trunk
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
