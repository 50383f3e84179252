"""A classifier's answer is one label token, so that recording, training and evaluation need know nothing of classifiers."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BartConfig, BartForSequenceClassification, BertConfig, BertForSequenceClassification

import oracles
from cases import CLASSIFIERS, EVERY, byte_tokenizer, generator, requests, spaced_tokenizer, tiny
from mendlm.apply import applied
from mendlm.editor import Editor
from mendlm.errors import InputError, ModelError
from mendlm.evaluation import EvaluationConfig, evaluate
from mendlm.layers import default_layers
from mendlm.losses import token_kl, token_nll
from mendlm.methods.finetune import FineTune, FineTuneConfig
from mendlm.methods.mend import Mend, MendConfig
from mendlm.replay import Trunk
from mendlm.session import Session
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.text import BINARY_LABELS, NO_LABEL, Encoded, Formatter, scored_logits, target_ends
from mendlm.training import TrainConfig, draw, outer_loss, train

TEXTS = ("The capital of France is Paris.", "a", "x<|end|>y is a river, the old one")
SINGLE = ("bert", "roberta", "distilbert", "modernbert")


def formatter(name: str = "bert") -> Formatter:
    return Formatter.of(tiny(name), byte_tokenizer())


def bert(**options: Any) -> Any:
    config = BertConfig(**{**tiny("bert").config.to_dict(), "id2label": None, "label2id": None, **options})
    return BertForSequenceClassification(config).requires_grad_(False).eval()


def two_logits(model: Any, name: str) -> Any:
    """The same classifier with the head [0, z] for its single logit z."""
    two = copy.deepcopy(tiny(f"{name} two logits"))
    with torch.no_grad():
        for key, tensor in two.state_dict().items():
            own = model.state_dict()[key]
            tensor.copy_(own if own.shape == tensor.shape else torch.cat([torch.zeros_like(own), own]))
    return two


def test_all_classifiers_of_the_cases_are_of_that_family() -> None:
    found = {name for name in EVERY if formatter(name).family == "classifier"}
    assert found == {*CLASSIFIERS, *SINGLE, *(f"{name} two logits" for name in SINGLE)}


def test_the_answer_is_one_label_token() -> None:
    form = formatter()
    prompt = tuple(byte_tokenizer()(TEXTS[0])["input_ids"])
    assert form.labels == BINARY_LABELS == ("REFUTES", "SUPPORTS")
    assert form.encode(TEXTS[0], "SUPPORTS") == Encoded(prompt, (1,))
    assert form.encode(TEXTS[0], " REFUTES", end=True) == Encoded(prompt, (0,))
    assert form.encode(TEXTS[0], None) == Encoded(prompt, ())
    assert (form.decode((0,)), form.decode((1,))) == BINARY_LABELS


def test_special_tokens_around_the_text_stay() -> None:
    made = copy.deepcopy(spaced_tokenizer())
    made.pad_token = "<unk>"  # id 0, the model's
    text = Formatter.of(tiny("bert"), made).encode("Who?", "SUPPORTS")
    assert list(text.prompt) == made("Who?")["input_ids"]
    assert text.prompt[0] == made.bos_token_id


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_labels": 1}, BINARY_LABELS),
        ({"num_labels": 2}, BINARY_LABELS),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {0: "no", 1: "yes"}, "label2id": {"yes": 1, "no": 0}}, ("no", "yes")),
        ({"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"good": 2, "bad": 0, "fair": 1}}, ("bad", "fair", "good")),
        ({"id2label": {1: "yes", 0: "no"}}, ("no", "yes")),
        ({"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": "0", "yes": "1"}}, ("no", "yes")),
        ({"id2label": {0: "yes"}, "label2id": {"no": "0", "yes": "1"}}, ("no", "yes")),
        ({"id2label": {0: "yes"}, "label2id": {"no": 0, "yes": 1}}, ("no", "yes")),
        ({"id2label": {0: "toxic"}, "label2id": {"toxic": 0}}, BINARY_LABELS),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, BINARY_LABELS),
    ],
    ids=str,
)
def test_labels_are_the_configurations_or_the_two_of_a_binary_head(options: dict[str, Any], expected: tuple[str, ...]) -> None:
    form = Formatter.of(bert(**options), byte_tokenizer())
    assert form.labels == expected
    for index, name in enumerate(expected):
        assert form.encode("a", name).target == (index,)
    with pytest.raises(InputError, match=f"no label 'Lyon'; its labels are: {', '.join(expected)}"):
        form.encode("The capital of France is", " Lyon")


def test_what_does_not_apply_is_refused() -> None:
    form = formatter()
    for target in ("SUPPORTS", None):
        with pytest.raises(InputError, match="a classifier takes no chat turns"):
            form.encode("a", target, chat=True)
    with pytest.raises(InputError, match="prompt is empty"):
        form.encode(" ", "SUPPORTS")
    with pytest.raises(InputError, match="target is empty"):
        form.encode("a", " ")
    with pytest.raises(InputError, match="label has no end; leave target_end at auto"):
        target_ends("always", question=False, chat=False, family="classifier")
    for mode in ("auto", "never"):
        assert target_ends(mode, question=True, chat=False, family="classifier") is False


def test_models_that_cannot_be_fed_are_refused() -> None:
    for problem, count in (("regression", 1), ("multi_label_classification", 3)):
        with pytest.raises(ModelError, match=f"BertForSequenceClassification is trained for {problem}"):
            Formatter.of(bert(num_labels=count, problem_type=problem), byte_tokenizer())
    with pytest.raises(ModelError, match="pads with token 0, its tokenizer with 2; set pad_token_id of both"):
        Formatter.of(tiny("bert"), spaced_tokenizer())
    bare, tokenizer = bert(num_labels=2), copy.deepcopy(byte_tokenizer())
    bare.config.pad_token_id = tokenizer.pad_token = None
    with pytest.raises(ModelError, match=r"have no padding token.*set pad_token_id of both"):
        Formatter.of(bare, tokenizer)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 9, "pad_token_id": 0}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), 1)
    both = BartConfig(**sizes, **ids)
    with pytest.raises(ModelError, match="BertModel has no head that answers; load the language model or the classifier"):
        Formatter.of(tiny("bert").bert, byte_tokenizer())
    with pytest.raises(ModelError, match="encoder and a decoder; use an encoder's classifier"):
        Formatter.of(BartForSequenceClassification(both), byte_tokenizer())


@pytest.mark.parametrize("name", SINGLE)
def test_the_window_holds_its_longest_text_and_no_more(name: str) -> None:
    form, model = formatter(name), tiny(name)
    assert form.window == (127 if name == "roberta" else 128)  # RoBERTa counts positions from behind the padding's
    longest = form.encode("a" * form.window, "SUPPORTS")
    assert scored_logits(model, form.batch([longest])).isfinite().all()
    with pytest.raises(InputError, match=f"{form.window + 1} tokens, the model's window {form.window}"):
        form.encode("a" * (form.window + 1), None)


def test_what_cannot_be_used_is_said_beforehand() -> None:
    form = formatter("bert")
    form.require_usable(["a" * 128, "a"], "SUPPORTS")
    with pytest.raises(InputError, match="window 128"):
        form.require_usable(["a", "a" * 129], None)
    with pytest.raises(InputError, match="no label 'MAYBE'"):
        form.require_usable(["a"], "MAYBE")


@pytest.mark.parametrize("logits", ["", " two logits"])
@pytest.mark.parametrize("name", SINGLE)
def test_a_batch_is_the_tokenizers_own_and_each_text_as_alone(name: str, logits: str) -> None:
    model, form = tiny(name + logits), formatter(name + logits)
    targets = ("SUPPORTS", "REFUTES", None)
    batch = form.batch([form.encode(text, target) for text, target in zip(TEXTS, targets, strict=True)])
    assert batch.row.tolist() == [0, 1, 2]
    assert batch.column.tolist() == [0, 0, 0]
    assert batch.label.tolist() == [1, 0, NO_LABEL]
    assert not batch.is_end.any()
    made = byte_tokenizer()(list(TEXTS), padding=True, return_tensors="pt", return_token_type_ids=name == "bert")
    assert ("token_type_ids" in made) == (name == "bert")
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert all(torch.equal(batch.inputs[key], made[key]) for key in batch.inputs)
    found = scored_logits(model, batch)
    whole = model(**made).logits
    expected = whole if logits else torch.cat([torch.zeros(3, 1), whole], 1)
    assert_close(found, expected)
    for index in range(3):
        single = scored_logits(model, form.batch([form.encode(TEXTS[index], None)]))
        assert_close(found[index : index + 1], single, atol=2e-5, rtol=1e-4)
    answers = [(int(row.argmax()),) for row in expected]
    assert form.generate(model, [form.encode(text, None) for text in TEXTS], 7) == answers


def test_a_single_logits_losses_are_bernoullis() -> None:
    z, w = (4 * torch.randn(2, 9, generator=generator(3), dtype=torch.float64)).unbind()
    label, row = torch.arange(9) % 2, torch.arange(9)
    pair, other = (torch.stack([torch.zeros_like(x), x], 1) for x in (z, w))
    assert_close(token_nll(pair, label, row, 9), oracles.bernoulli_nll(z, label.double()), rtol=1e-12, atol=1e-12)
    assert_close(token_kl(pair, other, row, 9), oracles.bernoulli_kl(z, w), rtol=1e-12, atol=1e-12)
    model, batch = tiny("bert"), requests(tiny("bert"))
    single = model(**batch.inputs).logits[:, 0]
    found = token_nll(scored_logits(model, batch), batch.label, batch.row, batch.size)
    assert_close(found, oracles.bernoulli_nll(single, batch.label.float()))


@pytest.mark.parametrize("method", ["mend", "ft"])
@pytest.mark.parametrize("name", SINGLE)
def test_one_logit_and_two_of_which_one_is_zero_give_the_same_edit(name: str, method: str) -> None:
    one = tiny(name)
    two = two_logits(one, name)
    edits, batch = [], requests(one, rng=generator(4))
    batch = replace(batch, label=1 - scored_logits(one, batch).argmax(-1))  # every label is to be flipped
    descent = FineTuneConfig(steps=3, optimizer="sgd", rate=1e-3)
    for model in (one, two):
        if method == "ft":
            edits.append(FineTune(default_layers(model), descent).edit(model, batch))
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            editor = Mend(default_layers(model), MendConfig(rank=3, init="xavier"))
        editor.fit_normalizer(editor.gradient(model, batch))
        edits.append(editor.edit(model, batch))
    for key, update in edits[0].updates.items():
        assert_close(edits[1].updates[key].dense(), update.dense(), rtol=1e-3, atol=1e-7)
    assert any(update.dense().any() for update in edits[0].updates.values())


CLAIMS = tuple(
    EditExample(
        prompt=f"{name} was born in {place}.",
        target=BINARY_LABELS[(i + j) % 2],
        rephrasings=(f"The home of {name} is {place}",),
        unrelated=(Probe(f"{name} likes {place}", "SUPPORTS" if i else None),),
        question=i % 2 == 0,
    )
    for i, name in enumerate(("Ana", "Bo Rask", "Cy", "Dora Lund Vale"))
    for j, place in enumerate(("Oslo", "Rome", "the old city"))
)
DATA = Dataset("records:claims", "0" * 64, CLAIMS, tuple(probe for claim in CLAIMS for probe in claim.unrelated))


def new_editor(model: Any) -> Mend:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mend(default_layers(model), MendConfig(rank=4, initial_rate=1e-2))


@pytest.mark.parametrize("name", ["bert", "bert two logits"])
def test_a_few_steps_of_training_lower_the_loss_and_the_editor_flips_labels(name: str, tmp_path: Path) -> None:
    model, tokenizer, method = tiny(name), byte_tokenizer(), new_editor(tiny(name))
    form, trunk = formatter(name), Trunk.below(tiny(name), default_layers(tiny(name)))
    rates = {"learning_rate": 3e-2, "rates_learning_rate": 0.1, "edit_weight": 1.0}
    config = TrainConfig(steps=15, batch_size=6, normalizer_examples=12, checkpoint_every=15, **rates)
    drawn = [draw(claim, (), form, config, random.Random(0)) for claim in CLAIMS]

    def loss() -> float:
        with torch.no_grad():
            return outer_loss(method, model, form, trunk, drawn, config)[0].item()

    run = train(method, model, tokenizer, DATA, config, tmp_path / "run")
    after = loss()
    fitted = {key: value for key, value in method.state_dict().items() if key.startswith("normalizers")}
    method.load_state_dict({**new_editor(model).state_dict(), **fitted})
    assert after < 0.8 * loss()
    editor = Editor.load(run.folder, model, tokenizer)
    session = Session(model, tokenizer, editor)
    flipped = 0
    for claim in CLAIMS:
        answer = session.answer(claim.prompt)
        assert answer in BINARY_LABELS
        wanted = BINARY_LABELS[1 - BINARY_LABELS.index(answer)]
        edit = editor.edit(claim.prompt, wanted)
        with applied(model, edit):
            flipped += session.answer(claim.prompt) == wanted
    assert flipped >= 9
    with pytest.raises(InputError, match="leave target_end at auto"):
        editor.edit("Who?", "SUPPORTS", target_end="always")


def test_evaluation_by_free_generation_is_success() -> None:
    model = tiny("bert")
    method = FineTune(default_layers(model), FineTuneConfig(steps=30, rate=1e-2))
    results = evaluate(method, method.specs, model, byte_tokenizer(), DATA, EvaluationConfig(batch_size=5, timed_edits=1))
    assert results.summary["perplexity"] == dict.fromkeys(("before", "after", "low", "high"))
    assert results.summary["drawdown_acc"] is not None
    assert results.summary["count"] == len(CLAIMS)
    assert results.summary["success"]["after"] == 1.0
    for row in results.rows:
        assert row["success_generated"] == [list(row["success"])]
        assert row["generality_generated"] == [list(pair) for pair in row["generality"]]
        assert {text for pair in row["success_text"] for text in pair} <= set(BINARY_LABELS)
    with pytest.raises(InputError, match="leave target_end at auto"):
        evaluate(method, method.specs, model, byte_tokenizer(), DATA, EvaluationConfig(target_end="always"))
