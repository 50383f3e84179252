"""Sessions on a tiny model: the stack, undo, and what an edit remembers."""

from __future__ import annotations

import pytest
import torch

from cases import byte_tokenizer, tiny
from mendlm.apply import applied
from mendlm.editor import Editor
from mendlm.errors import FormatError, InputError, LayerError
from mendlm.layers import default_layers, select
from mendlm.methods.mend import Mend, MendConfig
from mendlm.session import Session

PROMPTS = ["Who is Ana?", "The capital of France is"]


def new_session(name: str = "llama") -> Session:
    torch.manual_seed(0)
    method = Mend(default_layers(tiny(name)), MendConfig(rank=4, initial_rate=0.2))
    editor = Editor(method, tiny(name), byte_tokenizer())
    texts = [editor.formatter.encode(prompt, "Bo") for prompt in PROMPTS]
    method.fit_normalizer(method.gradient(tiny(name), editor.formatter.batch(texts)))
    return Session(tiny(name), byte_tokenizer(), editor)


def logits(session: Session) -> torch.Tensor:
    batch = session.editor.formatter.batch([session.editor.formatter.encode(p, None) for p in PROMPTS])
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


def test_undo_of_an_earlier_edit_leaves_the_later_one() -> None:
    session = new_session()
    first, second = session.edit(PROMPTS[0], "a baker"), session.edit(PROMPTS[1], "Lyon")
    kept = session.edits[second]
    assert kept.about["stack"] == [first]
    undone = session.undo(first)
    with applied(session.model, kept):
        alone = session.model(torch.tensor([[5, 6, 7]])).logits
    with applied(session.model, session.active):
        assert torch.equal(session.model(torch.tensor([[5, 6, 7]])).logits, alone)
    assert session.add(undone) == first


def test_a_second_edit_is_recorded_under_the_first() -> None:
    session = new_session()
    session.edit(PROMPTS[0], "a baker")
    name = session.edit(PROMPTS[1], "Lyon")
    second = session.edits[name]
    on_the_base = session.editor.edit(PROMPTS[1], "Lyon")
    name = next(iter(second.updates))
    assert not torch.allclose(second.updates[name].dense(), on_the_base.updates[name].dense())
    session.undo()
    same = session.edit(PROMPTS[1], "Lyon", on_base=True)
    third = session.edits[same]
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
    name = session.edit(PROMPTS[0], "a baker")
    for fails, kind in (
        (lambda: session.edit(PROMPTS[1], " "), InputError),
        (lambda: session.undo("nonsense"), InputError),
        (lambda: session.add(session.edits[name]), InputError),
        (lambda: session.add(new_session("qwen3").editor.edit(PROMPTS[0], "Bo")), FormatError),
        (lambda: session.add(new_session("gpt2").editor.edit(PROMPTS[0], "Bo"), force=True), LayerError),
        (lambda: Session(session.model, byte_tokenizer()).edit("a", "b"), InputError),
    ):
        with pytest.raises(kind):
            fails()
        assert list(session.edits) == [name]
    session.undo()
    with pytest.raises(InputError, match="none"):
        session.undo()


def test_an_editor_for_other_layers_is_refused() -> None:
    method = Mend(select(tiny("gpt2"), ["*.0.mlp.c_fc"]), MendConfig(rank=2))
    with pytest.raises(LayerError, match="no such layer"):
        Editor(method, tiny("llama"), byte_tokenizer())
