from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cases import byte_tokenizer, tiny
from mendlm.editor import Editor
from mendlm.evaluation import EvaluationConfig, evaluate
from mendlm.layers import select
from mendlm.methods.mend import Mend, MendConfig
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.text import Formatter, scored_logits
from mendlm.training import TrainConfig, train

CITIES = ("A", "B", "C", "D", "E", "F", "G", "H")
NAMES = [f"{first}{second}" for first in "klmnpqrs" for second in "aeiouxyz"]  # 64 people
HOMES = {name: CITIES[i * 5 % 8] for i, name in enumerate(NAMES)}


def ask(name: str) -> tuple[str, str]:
    return f"{name} home", f"home of {name} is"


def fact(index: int) -> EditExample:
    """Someone moves; two others stay where they are."""
    rng, name = random.Random(index), NAMES[index % 64]
    target = rng.choice([city for city in CITIES if city != HOMES[name]])
    others = rng.sample([other for other in NAMES if other != name], 2)
    return EditExample(
        prompt=ask(name)[0],
        target=target,
        rephrasings=(ask(name)[1],),
        unrelated=tuple(Probe(rng.choice(ask(other)), HOMES[other]) for other in others),
    )


def facts(indices: range) -> Dataset:
    examples = tuple(fact(i) for i in indices)
    return Dataset("records:homes", "0", examples, tuple(p for e in examples for p in e.unrelated))


def base_model() -> Any:
    """A tiny model that has learnt where everyone lives."""
    config = {**tiny("llama").config.to_dict(), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config))
        form = Formatter.of(model, byte_tokenizer())
        batch = form.batch([form.encode(prompt, HOMES[name]) for name in NAMES for prompt in ask(name)])
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(scored_logits(model, batch), batch.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.requires_grad_(False).eval()


def test_a_trained_editor_edits_facts_it_has_never_seen(tmp_path: Path) -> None:
    model, tokenizer = base_model(), byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = Mend(select(model, ["model.layers.[12].mlp.*"]), MendConfig(rank=32, initial_rate=1e-2))
    training, held_out = facts(range(48)), facts(range(48, 64))
    config = TrainConfig(
        steps=30, batch_size=48, learning_rate=3e-3, rates_learning_rate=1e-2, normalizer_examples=48, edit_weight=1.0,
        checkpoint_every=1000, valid_every=1000,
    )  # fmt: skip
    scoring = EvaluationConfig(generate=False, timed_edits=1)

    def score(editor: Mend) -> dict[str, Any]:
        return evaluate(editor, editor.specs, model, tokenizer, held_out, scoring).summary

    run = train(method, model, tokenizer, training, config, tmp_path / "run")
    editor = Editor.load(run.folder, model, tokenizer)
    after = score(editor.method)
    assert after["success"]["before"] == 0
    assert after["success"]["after"] > 0.8
    assert after["generality"]["after"] > 0.8
    assert after["locality"]["after"] > 0.6

    one = held_out.examples[0]
    prompt = editor.formatter.encode(one.prompt, None)
    (before,) = editor.formatter.generate(model, [prompt], 2)
    with editor.edit(one.prompt, one.target).on(model):
        (answer,) = editor.formatter.generate(model, [prompt], 2)
    assert editor.formatter.decode(answer).strip().startswith(one.target)
    assert editor.formatter.generate(model, [prompt], 2) == [before]
