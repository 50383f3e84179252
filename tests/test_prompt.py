"""The fact in the context: against the same tokens written into one unpadded text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import oracles
from cases import byte_tokenizer, tiny
from mendlm.errors import InputError
from mendlm.evaluation import EvaluationConfig, evaluate
from mendlm.methods.prompt import Context, Prompt, PromptConfig
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.text import Encoded, Formatter, scored_logits

FAMILIES = ("gpt2", "gpt_neo", "gptj", "opt", "llama", "qwen3", "gemma3", "t5", "bart")
REQUESTS = (("Who is Ana?", "a baker", True), ("The home of Bo Rask is", " by the sea", False), ("Cy likes", " an", False))
ASKED = (("Where does she live", " in the city"), ("Ana", " is"), ("The river runs through the old", " an old capital"))


def setting(name: str) -> tuple[Any, Formatter, Context]:
    model = tiny(name)
    form = Formatter.of(model, byte_tokenizer())
    batch = form.batch([form.encode(prompt, target, end=end) for prompt, target, end in REQUESTS])
    separator = byte_tokenizer()("; ", add_special_tokens=False)["input_ids"]
    return model, form, Prompt(PromptConfig(), separator).edit(model, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_facts_are_prompt_target_and_separator_without_the_end(name: str) -> None:
    _, form, context = setting(name)
    for fact, (prompt, target, _) in zip(context.facts, REQUESTS, strict=True):
        text = form.encode(prompt, target)
        answer = text.target[:-1] if text.ended else text.target
        assert fact == (*text.prompt, *answer, *byte_tokenizer()("; ", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_one_text_with_the_fact_in_it(name: str) -> None:
    model, form, context = setting(name)
    texts = [form.encode(prompt, target) for prompt, target in ASKED]
    routing = torch.tensor([2, -1, 0])
    batch = form.batch(texts)
    with torch.no_grad(), context.on(model, routing):
        found = scored_logits(model, batch)
    for index, text in enumerate(texts):
        fact = context.facts[routing[index]] if routing[index] >= 0 else ()
        assert_close(found[batch.row == index], oracles.prompt(model, form, fact, text), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(found, scored_logits(model, batch), atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_free_answers_are_those_of_one_text_with_the_fact_in_it(name: str) -> None:
    model, form, context = setting(name)
    asked = [form.encode(prompt, None) for prompt, _ in ASKED]
    before = form.generate(model, asked, 6)
    with context.on(model):
        found = form.generate(model, asked, 6)
    expected = [
        form.generate(model, [Encoded((*fact, *text.prompt), ())], 6)[0]
        for fact, text in zip(context.facts, asked, strict=True)
    ]
    assert found == expected
    assert found != before
    assert form.generate(model, asked, 6) == before
    assert model.generation_config.use_cache


def test_it_is_evaluated_like_any_method_one_by_one_and_together() -> None:
    model = tiny("llama")
    examples = tuple(
        EditExample(prompt=prompt, target=target, unrelated=(Probe("Why?", "so"),), question=end)
        for prompt, target, end in (*REQUESTS, ("Di has", " a boat", False))
    )
    data = Dataset("records:x", "x", examples, tuple(p for e in examples for p in e.unrelated))
    for count in (1, 2):
        results = evaluate(Prompt(), (), model, byte_tokenizer(), data, EvaluationConfig(num_edits=count, batch_size=2))
        assert results.summary["method"] == "prompt"
        assert results.summary["weight_change"] == {}
        assert results.summary["adapter_bytes"] == 0
        assert results.summary["edit_ms"] == {"p50": None, "p95": None}, "nothing is computed, which is not 0 ms"
        assert any(row["nll"][0] != row["nll"][1] for row in results.rows)
    with pytest.raises(InputError, match="has no strength to change"):
        evaluate(Prompt(), (), model, byte_tokenizer(), data, EvaluationConfig(scale=2.0))


def test_facts_told_at_once_follow_one_another() -> None:
    assert Context(((1, 2), (3,), (4,), (5, 6))).grouped(2) == Context(((1, 2, 3), (4, 5, 6)))


@pytest.mark.parametrize("routing", [[3, 0, 0], [-2, 0, 0], [[True] * 3] * 3])
def test_routing_that_names_no_fact_is_refused(routing: list[Any]) -> None:
    context = Context(((5,), (6,), (7,)))
    with pytest.raises(InputError, match="routing"), context.on(tiny("llama"), torch.tensor(routing)):
        pass


def test_a_classifier_is_refused() -> None:
    model = tiny("bert")
    form = Formatter.of(model, byte_tokenizer())
    with pytest.raises(InputError, match="a classifier cannot be told a fact"):
        Prompt().edit(model, form.batch([form.encode("It is so.", "SUPPORTS")]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5", "bart"])
def test_free_answers_to_texts_of_one_length_behind_facts_of_several(name: str) -> None:
    model, form, context = setting(name)
    asked = [form.encode("Ana likes", None), form.encode("Bob likes", None), form.encode("Eva likes", None)]
    assert len({len(text) for text in asked}) == 1
    assert len({len(fact) for fact in context.facts}) > 1
    with context.on(model):
        found = form.generate(model, asked, 5)
    alone = [Encoded((*fact, *text.prompt), ()) for fact, text in zip(context.facts, asked, strict=True)]
    assert found == [form.generate(model, [text], 5)[0] for text in alone]


def test_the_end_of_a_turn_stays_in_a_chat() -> None:
    model = tiny("llama")
    form = Formatter.of(model, byte_tokenizer())
    end = byte_tokenizer().eos_token_id
    turn = form.encode("Who is Ana?", "a baker", end=True)
    between = Encoded((end, *turn.prompt), turn.target, ended=True)
    facts = Prompt().edit(model, form.batch([turn, between])).facts
    assert [fact[-1] == end for fact in facts] == [False, True]


def test_more_facts_than_the_window_holds_are_refused() -> None:
    model, form, _ = setting("gpt2")
    text = form.batch([form.encode("Ana likes", " an")])
    with Context(((5,) * 130,)).on(model), pytest.raises(InputError, match="the model's window 128"):
        scored_logits(model, text)
