"""The cache of hidden states: against a loop over one unpadded text at a time, with the states that the head reads there."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import oracles
from cases import byte_tokenizer, tiny
from mendlm.errors import InputError
from mendlm.evaluation import EvaluationConfig, evaluate
from mendlm.methods import cache
from mendlm.methods.cache import Cache, CacheConfig, Memory, _marked, _marks
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.text import Formatter, scored_logits

GENERATORS = ("gpt2", "llama", "opt", "gemma3", "t5", "bart")
REQUESTS = (("Who is Ana?", "a baker", True), ("The home of Bo Rask is", " by the sea", False), ("Cy likes", " an", False))
ASKED = (("Who is Ana", "a baker"), ("Cy likes", " an ox"), ("The river runs through the old", " an old capital"))


@pytest.mark.parametrize("name", GENERATORS)
def test_it_answers_where_a_state_is_near_a_key_and_only_there(name: str) -> None:
    model = tiny(name)
    form = Formatter.of(model, byte_tokenizer())
    known = [form.encode(prompt, target, end=end) for prompt, target, end in REQUESTS]
    asked = [form.encode(prompt, target) for prompt, target in ASKED]
    radius = {"t5": 0.02, "bart": 0.02, "opt": 0.02}.get(name, 0.3)
    routing = torch.tensor([0, 2, -1])
    memory = Cache(CacheConfig(radius=radius)).edit(model, form.batch(known))
    batch = form.batch(asked)
    with torch.no_grad():
        base = scored_logits(model, batch)
        with memory.on(model, routing):
            found = scored_logits(model, batch)
        assert torch.equal(scored_logits(model, batch), base)
    answered = []
    for row, text in enumerate(asked[:2]):
        logits, said = oracles.cache(model, form, known[routing[row]], text, radius)
        answered += said
        mine = found[batch.row == row]
        assert_close(mine.log_softmax(-1).exp(), logits.log_softmax(-1).exp(), rtol=1e-3, atol=1e-4)
        assert all(mine[place].argmax() == token for place, token in enumerate(said) if token >= 0)
    assert any(token >= 0 for token in answered)
    assert any(token < 0 for token in answered)
    assert torch.equal(found[batch.row == 2], base[batch.row == 2])


@pytest.mark.parametrize("name", GENERATORS)
def test_the_request_itself_is_answered_with_the_target_freely_and_in_a_batch(name: str) -> None:
    model = tiny(name)
    form = Formatter.of(model, byte_tokenizer())
    known = [form.encode(prompt, target, end=True) for prompt, target, _ in REQUESTS]
    memory = Cache(CacheConfig(radius=1e-3)).edit(model, form.batch(known))
    with memory.on(model):
        answers = form.generate(model, known, 12)
    assert answers == [text.target[:-1] for text in known]


@pytest.mark.parametrize("name", ["bert", "bert two logits", "modernbert"])
def test_a_classifier_answers_with_the_label_of_the_text_it_knows(name: str) -> None:
    model = tiny(name)
    form = Formatter.of(model, byte_tokenizer())
    texts = [form.encode("Oslo is in Norway.", form.labels[i]) for i in (0, 1)]
    batch = form.batch(texts)
    memory = Cache(CacheConfig(radius=0.01)).edit(model, batch)
    other = form.batch([form.encode("Something else altogether!", form.labels[0])] * 2)
    with torch.no_grad():
        base = scored_logits(model, other)
        with memory.on(model):
            assert scored_logits(model, batch).argmax(-1).tolist() == [0, 1]
            assert torch.equal(scored_logits(model, other), base)


def test_many_are_searched_at_once_and_the_nearest_answers() -> None:
    keys = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[0.0, 2.5]], [[9.0, 9.0]]])
    memory = Memory(keys, torch.tensor([[7], [8], [9], [5]]), 0.3).grouped(2)
    assert memory.keys.shape == (2, 2, 2)
    states = torch.tensor([[[1.1, 0.0], [0.0, 2.4], [5.0, 5.0]], [[0.0, 2.4], [8.0, 9.0], [1.0, 0.0]]])
    assert memory.answers(states, None).tolist() == [[7, 8, -1], [9, 5, -1]]
    assert memory.answers(states, torch.tensor([-1, 0])).tolist() == [[-1, -1, -1], [8, -1, 7]]
    with pytest.raises(InputError, match="2 rows of input do not divide among 3"):
        memory.answers(states, torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="give one integer a row"):
        memory.answers(states, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="names edit 2, but they are numbered 0 to 1"):
        memory.answers(states, torch.tensor([0, 2]))


def test_many_requests_are_looked_up_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    batch = form.batch([form.encode(prompt, target, end=end) for prompt, target, end in REQUESTS])
    whole = Cache().edit(model, batch)
    monkeypatch.setattr(cache, "TOGETHER", 2)
    in_turns = Cache().edit(model, batch)
    assert torch.equal(in_turns.values, whole.values)
    assert_close(in_turns.keys, whole.keys)


def test_a_memory_made_under_another_is_refused_and_an_overflow_is_no_answer() -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    batch = form.batch([form.encode(*ASKED[1])])
    memory = Cache().edit(model, batch)
    with memory.on(model), pytest.raises(InputError, match="outside of another's"):
        Cache().edit(model, batch)
    overflown = torch.full((1, 1, 8), float("inf"))
    assert _marks(_marked(overflown, torch.tensor([[-1]]))).tolist() == [[-1]]


def test_tokens_of_large_vocabularies_survive_small_types() -> None:
    answers = torch.tensor([[0, 127, -1, 128, 49_151, 262_143, 1_999_999]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        states = torch.randn(1, 7, 8).to(dtype)
        assert torch.equal(_marks(_marked(states, answers)), answers)
        assert torch.equal(_marked(states, answers)[0, 2], states[0, 2])


def test_it_is_evaluated_like_any_method() -> None:
    model = tiny("llama")
    examples = tuple(EditExample(prompt=p, target=t, unrelated=(Probe("Why?", "so"),), question=end) for p, t, end in REQUESTS)
    data = Dataset("records:x", "x", examples, ())
    rows = evaluate(Cache(CacheConfig(radius=0.01)), (), model, byte_tokenizer(), data, EvaluationConfig()).rows
    assert all(row["success"] == (False, True) for row in rows)


@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_cannot_be_is_refused(radius: float) -> None:
    with pytest.raises(InputError, match="radius must be 0 or a positive finite number"):
        CacheConfig(radius=radius)
