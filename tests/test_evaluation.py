from __future__ import annotations

import json
import math
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from cases import byte_tokenizer, tiny
from mendlm import metrics
from mendlm.apply import Edit, applied
from mendlm.errors import InputError, NumericalError
from mendlm.evaluation import EvaluationConfig, Evaluator, Results, evaluate
from mendlm.layers import default_layers
from mendlm.methods.finetune import FineTune, FineTuneConfig
from mendlm.methods.mend import Mend, MendConfig
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.tensors import read_tensors
from mendlm.text import Encoded, Formatter

NAMES = ("Ana", "Bo Rask", "Cy", "Dora Lund", "Eli", "Fay Ott")
CONFIG = EvaluationConfig(batch_size=4, timed_edits=2, context="The capital of France is Paris.")


def example(index: int) -> EditExample:
    name = NAMES[index]
    asked = index % 2 == 0
    return EditExample(
        prompt=f"Who is {name}?" if asked else f"The home of {name} is",
        target="x" if asked else " of",
        rephrasings=(f"{name} lives in", f"Where {name} lives:")[: index % 3],
        unrelated=(Probe(f"The river of {name}", "an", "Logic" if index == 5 else None), Probe(f"{name} likes"))[: 2 * index],
        old=("an", "an", None, " of", "an", "an")[index],  # 3: what is asked for is the old answer
        portability=(Probe(f"{name} is the", "old", "Reasoning"), Probe(f"{name} has", "a"))[: index % 3],
        subject=name,
        question=asked,
    )


EXAMPLES = tuple(example(i) for i in range(6))
DATA = Dataset(
    "records:x", "abc", EXAMPLES, tuple(p for e in EXAMPLES for p in e.unrelated), skipped=3, left_out=2, notes=("made up",)
)
ASKING = Dataset("nq:y", "def", (), (Probe("What is it?", "is"), Probe("Why?", "the")))
READING = Dataset("text:z", "ghi", (), (Probe("The river runs through", "the city of"), Probe("An old", "capital")), prose=True)


def trained(name: str, strength: float = 0.5) -> Mend:
    """An editor with statistics and large rates: its edits change answers, good or bad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        method = Mend(default_layers(tiny(name)), MendConfig(rank=4, initial_rate=strength))
    form = Formatter.of(tiny(name), byte_tokenizer())
    for one in EXAMPLES:
        method.fit_normalizer(method.gradient(tiny(name), form.batch([form.encode(one.prompt, one.target)])))
    return method.eval()


def run(method: Any, name: str = "llama", config: EvaluationConfig = CONFIG, **more: Any) -> Results:
    specs = method.specs
    return evaluate(method, specs, tiny(name), byte_tokenizer(), more.pop("data", DATA), config, **more)


class Oracle:
    """One text at a time, full forward passes with dense weights."""

    def __init__(self, name: str, method: Any, num_edits: int = 1, sequential: bool = False) -> None:
        self.model, self.form = tiny(name), Formatter.of(tiny(name), byte_tokenizer())
        self.method, self.weights, self.held = method, [], []
        for start in range(0, len(EXAMPLES), num_edits):
            single: list[Edit] = []
            for one in EXAMPLES[start : start + num_edits]:
                batch = self.form.batch([self.form.encode(one.prompt, one.target, end=one.question)])
                if sequential and single:
                    with applied(self.model, sum(single[1:], start=single[0])):
                        single.append(method.edit(self.model, batch)[0])
                else:
                    single.append(method.edit(self.model, batch)[0])
                self.held.append((len(single) - 1, self.changed(single)))
            self.weights += [self.changed(single)] * num_edits

    def changed(self, edits: list[Edit]) -> dict[str, Tensor]:
        """The dense weights under the sum of some edits."""
        weights = {}
        for spec in self.method.specs:
            change = sum(edit.updates[spec.name].dense() for edit in edits)
            weights[f"{spec.name}.weight"] = self.model.get_parameter(f"{spec.name}.weight") + (
                change.T if spec.transposed else change
            )
        return weights

    def when_made(self, index: int, one: EditExample) -> tuple[int, list[bool]]:
        """A request's turn in its group, and its success under the edits up to its own."""
        turn, weights = self.held[index]
        whole, self.weights = self.weights, [*self.weights]
        self.weights[index] = weights
        right = self.right(index, self.form.encode(one.prompt, one.target, end=one.question))
        self.weights = whole
        return turn, right

    def forward(self, weights: dict[str, Tensor], prompt: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
        if self.model.config.is_encoder_decoder:
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[*self.form.start, *target[:-1]]]),
            }
            first = len(self.form.start) - 1
        else:
            inputs, first = {"input_ids": torch.tensor([[*prompt, *target[:-1]]])}, len(prompt) - 1
        return functional_call(self.model, weights, kwargs={**inputs, "use_cache": False}).logits[0, first:]

    def greedy(self, weights: dict[str, Tensor], prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        found: list[int] = []
        for _ in range(count):
            token = self.forward(weights, prompt, (*found, 0))[-1].argmax().item()
            if token == byte_tokenizer().eos_token_id:
                break
            found.append(token)
        return tuple(found)

    def right(self, index: int, text: Encoded) -> list[bool]:
        target = list(text.target)[: len(text.target) - text.ended]
        both = [self.forward(weights, text.prompt, text.target).argmax(-1) for weights in ({}, self.weights[index])]
        return [found[: len(target)].tolist() == target for found in both]

    def nll(self, index: int, text: Encoded) -> list[float]:
        both = [self.forward(weights, text.prompt, text.target).log_softmax(-1) for weights in ({}, self.weights[index])]
        return [-found[range(len(text.target)), list(text.target)].mean().item() for found in both]

    def kept(self, index: int, text: Encoded) -> bool:
        before, after = (self.forward(weights, text.prompt, text.target).argmax(-1) for weights in ({}, self.weights[index]))
        counted = len(text.target) - text.ended
        return bool(before[:counted].equal(after[:counted]))

    def kl(self, index: int, text: Encoded) -> float:
        p, q = (self.forward(weights, text.prompt, text.target).log_softmax(-1) for weights in ({}, self.weights[index]))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    def new_over_old(self, index: int, one: EditExample, probes: list[Probe]) -> dict[str, Any] | None:
        def better(prompt: str, likely: str, other: str, end: bool) -> list[bool]:
            pair = [self.nll(index, self.form.encode(prompt, answer, end=end)) for answer in (likely, other)]
            return [a < b for a, b in zip(*pair, strict=True)]

        if one.old in (None, one.target):
            return None
        places = {"prompt": [better(one.prompt, one.target, one.old, one.question)]}
        if one.rephrasings:
            places["rephrasing"] = [better(prompt, one.target, one.old, one.question) for prompt in one.rephrasings]
        shared = [probe for probe in probes if probe.answer == one.old and probe.kind is None]
        if shared and not one.question:
            places["neighbour"] = [better(probe.prompt, one.old, one.target, False) for probe in shared]
        return places

    def probe(self, probe: Probe) -> Encoded:
        text = self.form.encode(probe.prompt, probe.answer)
        if probe.answer is not None:
            return text
        return Encoded(text.prompt, self.greedy({}, text.prompt, 5) or (byte_tokenizer().eos_token_id,))


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("llama", "mend", {}),
        ("gpt2", "mend", {"num_edits": 2}),
        ("gpt2", "mend", {"sequential": True}),
        ("t5", "mend", {}),
        ("bart", "mend", {"num_edits": 2}),
        ("llama", "ft", {}),
        ("gpt2", "ft", {"num_edits": 2, "sequential": True}),
    ],
)
def test_numbers_equal_those_of_one_text_at_a_time(name: str, method: str, settings: dict[str, Any]) -> None:
    editor: Any = (
        trained(name)
        if method == "mend"
        else FineTune(default_layers(tiny(name)), FineTuneConfig(rate=0.5, steps=6, optimizer="sgd"))
    )
    results = run(editor, name, replace(CONFIG, **settings), locality=[ASKING, READING])
    k = 6 if settings == {"sequential": True} else settings.get("num_edits", 1)
    oracle = Oracle(name, editor, k, settings.get("sequential", False))
    form = oracle.form
    longest = max(len(form.encode(one.prompt, one.target, end=one.question).target) for one in EXAMPLES)
    probes: list[tuple[int, Probe]] = []
    for index, (row, one) in enumerate(zip(results.rows, EXAMPLES, strict=True)):
        assert (row["index"], row["prompt"], row["target"], row["subject"]) == (index, one.prompt, one.target, one.subject)
        exact = form.encode(one.prompt, one.target, end=one.question)
        assert list(row["success"]) == oracle.right(index, exact)
        assert row["nll"] == pytest.approx(oracle.nll(index, exact), rel=1e-3, abs=1e-4)
        rephrased = [form.encode(prompt, one.target, end=one.question) for prompt in one.rephrasings]
        assert [list(pair) for pair in row["generality"]] == [oracle.right(index, text) for text in rephrased]
        watched = [*one.unrelated, ASKING.probes[index % 2]]
        probes += [(index, probe) for probe in watched]
        assert [p["kept"] for p in row["locality"]] == [oracle.kept(index, oracle.probe(probe)) for probe in watched]
        found = [oracle.forward(w, exact.prompt, exact.target).argmax(-1) for w in ({}, oracle.weights[index])]
        counted = len(exact.target) - exact.ended
        shares = [mean([float(a == b) for a, b in zip(f.tolist(), exact.target[:counted], strict=False)]) for f in found]
        assert row["token_accuracy"] == pytest.approx(shares)
        kls = [oracle.kl(index, oracle.probe(probe)) for probe in watched]
        assert [p["kl"] for p in row["locality"]] == pytest.approx(kls, rel=1e-3, abs=1e-5)
        following = [oracle.right(index, form.encode(p.prompt, p.answer)) for p in one.portability]
        assert [(p["kind"], list(p["right"])) for p in row["portability"]] == [
            (p.kind, right) for p, right in zip(one.portability, following, strict=True)
        ]
        assert row.get("new_over_old") == oracle.new_over_old(index, one, [p for p in watched if p.answer])
        for spec in editor.specs:
            change = oracle.weights[index][f"{spec.name}.weight"] - oracle.model.get_parameter(f"{spec.name}.weight")
            assert row["norm"][spec.name] == pytest.approx(change.norm().item(), rel=1e-3, abs=1e-5)
        match = metrics.answers if one.question else metrics.continues
        company = form.encode(f"{CONFIG.context} {one.prompt}", one.target, end=one.question)
        for key, texts in (("success", [exact]), ("generality", rephrased), ("context", [company])):
            contained = [[metrics.contains(said, one.target) for said in pair] for pair in row[f"{key}_text"]]
            assert row[f"{key}_contained"] == contained
            for text, found, flags in zip(texts, row[f"{key}_text"], row[f"{key}_generated"], strict=True):
                for weights, said, flag in zip(({}, oracle.weights[index]), found, flags, strict=True):
                    tokens = oracle.greedy(weights, text.prompt, longest + 4)
                    # A batch runs to its longest target.
                    assert said in [form.decode(tokens[: count + 4]) for count in range(len(text.target), longest + 1)]
                    assert flag == match(said, one.target)
    summary = results.summary
    assert summary["success"]["before"] == pytest.approx(mean([row["success"][0] for row in results.rows]))
    assert summary["success"]["after"] == pytest.approx(mean([row["success"][1] for row in results.rows]))
    several = [row["generality"] for row in results.rows if row["generality"]]
    assert summary["generality"]["after"] == pytest.approx(mean([mean([after for _, after in pairs]) for pairs in several]))
    whole = [mean([after for _, after in [row["success"], *row["generality"]]]) for row in results.rows]
    assert summary["edit_success"]["after"] == pytest.approx(mean(whole))
    one_each = [(row["generality"][:1] or [row["success"]])[0][1] for row in results.rows]
    assert summary["edit_success_release"]["after"] == pytest.approx(mean(one_each))
    for name, where in (("efficacy", "prompt"), ("paraphrase", "rephrasing"), ("neighbourhood", "neighbour")):
        pairs = [row["new_over_old"][where] for row in results.rows if where in row.get("new_over_old", {})]
        for side, key in enumerate(("before", "after")):
            assert summary["new_over_old"][name][key] == pytest.approx(mean([mean([p[side] for p in own]) for own in pairs]))
    scored = summary["new_over_old"]["score"]
    assert scored["low"] <= scored["after"] <= scored["high"]
    assert set(summary["portability"]) == {"Reasoning", ""}
    for kind, value in summary["portability"].items():
        own = [[p["right"][1] for p in row["portability"] if (p["kind"] or "") == kind] for row in results.rows]
        assert value["after"] == pytest.approx(mean([mean(rights) for rights in own if rights]))
    for name, value in summary["weight_change"].items():
        assert value == pytest.approx(mean([row["norm"][name] for row in results.rows]))
    kept = [mean([p["kept"] for p in row["locality"]]) for row in results.rows]
    assert summary["locality"]["after"] == pytest.approx(mean(kept))
    pairs = [oracle.right(i, form.encode(p.prompt, p.answer)) for i, p in probes if p.answer is not None]
    assert summary["drawdown_acc"] == pytest.approx(mean([b for b, _ in pairs]) - mean([a for _, a in pairs]))
    passages = [(i, form.encode(p.prompt, p.answer)) for i in range(6) for p in [READING.probes[i % 2]]]
    kls = [p["kl"] for row in results.rows for p in row["locality"]] + [oracle.kl(i, text) for i, text in passages]
    assert summary["unrelated_kl"] == pytest.approx(mean(kls), rel=1e-3)
    tokens = sum(len(text.target) for _, text in passages)
    total = [sum(oracle.nll(i, text)[side] * len(text.target) for i, text in passages) for side in (0, 1)]
    ppl = [math.exp(part / tokens) for part in total]
    assert [summary["perplexity"][side] for side in ("before", "after")] == pytest.approx(ppl, rel=1e-3)
    assert summary["drawdown_ppl"] == pytest.approx(ppl[1] - ppl[0], rel=1e-2, abs=1e-2)
    for name in ("unrelated_kl", "drawdown_acc", "drawdown_ppl"):
        low, high = summary[f"{name}_interval"]
        assert low <= summary[name] <= high
    if settings.get("sequential"):
        turns = [oracle.when_made(index, one) for index, one in enumerate(EXAMPLES)]
        assert [(row["turn"], list(row["success_when_made"])) for row in results.rows] == turns
    changed = [row["success"] for row in results.rows] + [pair for row in results.rows for pair in row["generality"]]
    assert any(before != after for before, after in changed) or not all(p["kept"] for r in results.rows for p in r["locality"])


@pytest.mark.parametrize(
    ("change", "more", "watched"),
    [
        ({"prompt": "a" * 200}, {}, []),
        ({"portability": (Probe("Who?", "a" * 200),)}, {}, []),
        ({"old": "a" * 200}, {}, []),
        ({}, {"context": "a" * 120}, []),
        ({}, {}, [replace(ASKING, probes=(*ASKING.probes, Probe("a" * 200, "b")))]),
        ({}, {}, [replace(READING, probes=(*READING.probes, Probe("a" * 200, "b")))]),
    ],
)
def test_a_text_that_does_not_fit_is_said_before_the_first_edit(
    change: Any, more: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "rows", lambda *_: pytest.fail("something ran"))
    data, method = replace(DATA, examples=(*EXAMPLES[:-1], replace(EXAMPLES[-1], **change))), trained("llama")
    with pytest.raises(InputError, match="the model's window 128"):
        evaluate(method, method.specs, tiny("llama"), byte_tokenizer(), data, replace(CONFIG, **more), locality=watched)


def test_the_summary_has_every_key() -> None:
    summary = run(trained("llama"), locality=[ASKING, READING], about={"model": "tiny"}).summary
    assert json.loads(json.dumps(summary)) == summary
    keys = ("model", "method", "data", "data_sha256", "data_notes", "count", "skipped", "left_out", "num_edits", "seed")
    named = {key: summary[key] for key in keys}
    assert named == {
        "model": "tiny", "method": "mend", "data": "records:x", "data_sha256": "abc", "data_notes": ["made up"],
        "count": 6, "skipped": 3, "left_out": 2, "num_edits": 1, "seed": 0,
    }  # fmt: skip
    assert summary["format"] == "mendlm-summary-1"
    for key in ("success", "generality", "success_generated", "generality_generated"):
        assert set(summary[key]) == {"before", "after", "low", "high"}
        assert summary[key]["low"] <= summary[key]["after"] <= summary[key]["high"]
    assert set(summary["locality"]) == {"after", "low", "high"}
    assert set(summary["edit_ms"]) == {"p50", "p95"}
    assert 0 < summary["edit_ms"]["p50"] <= summary["edit_ms"]["p95"]
    assert summary["peak_memory_mb"] > 50
    assert isinstance(summary["drawdown_acc"], float)
    assert isinstance(summary["drawdown_ppl"], float)
    assert summary["drawdown_text"] == "text:z"
    assert summary["locality_sources"] == [{"name": "nq:y", "sha256": "def"}, {"name": "text:z", "sha256": "ghi"}]


def test_the_memory_of_an_edit_is_what_making_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    method, quick = trained("llama"), replace(CONFIG, generate=False, timed_edits=2)
    usual = run(method, config=quick).summary["edit_memory_mb"]
    edit = method.edit

    def wasteful(*arguments: Any) -> Any:
        torch.ones(2**25)  # 128 MiB
        return edit(*arguments)

    monkeypatch.setattr(method, "edit", wasteful)
    assert 0 <= usual < 60 < 120 < run(method, config=quick).summary["edit_memory_mb"] < 200


def test_adapter_bytes_are_those_of_a_saved_edit(tmp_path: Path) -> None:
    method = trained("llama")
    form = Formatter.of(tiny("llama"), byte_tokenizer())
    sizes = []
    for one in EXAMPLES[:2]:
        batch = form.batch([form.encode(one.prompt, one.target, end=one.question)])
        method.edit(tiny("llama"), batch).unbind()[0].save(tmp_path / one.prompt)
        tensors, _ = read_tensors(tmp_path / one.prompt / "adapter_model.safetensors")
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert run(method, config=replace(CONFIG, generate=False)).summary["adapter_bytes"] == max(sizes)


def test_what_is_missing_is_none_not_zero() -> None:
    bare = replace(DATA, examples=tuple(replace(e, rephrasings=(), unrelated=()) for e in EXAMPLES), probes=())
    summary = run(trained("llama"), data=bare, config=replace(CONFIG, generate=False)).summary
    nothing = {"before": None, "after": None, "low": None, "high": None}
    assert summary["generality"] == summary["success_generated"] == summary["generality_generated"] == nothing
    assert summary["locality"] == {"after": None, "low": None, "high": None}
    assert (summary["drawdown_acc"], summary["drawdown_ppl"]) == (None, None)


def test_a_target_that_the_model_gives_already_is_counted_apart() -> None:
    form, model = Formatter.of(tiny("llama"), byte_tokenizer()), tiny("llama")
    prompt = form.encode("The river", None)
    (token,) = form.generate(model, [prompt], 1)[0]
    given = [EditExample(prompt="The river", target=t) for t in ("x", "y")]
    method = trained("llama")
    evaluator = Evaluator(method, method.specs, model, byte_tokenizer(), CONFIG)
    edit = evaluator.edit([evaluator.encode(e, e.prompt) for e in given])
    known = Encoded(prompt.prompt, (token,))
    assert evaluator.score([(0, known)], edit)[0].right[0] is True
    quick = replace(CONFIG, generate=False)
    rows = run(method, data=replace(DATA, examples=tuple(given)), config=quick).rows
    assert [row["success"][0] for row in rows] == [False, False]
    results = run(method, config=quick)
    assert results.summary["already_given"] == sum(row["success"][0] for row in results.rows)


def test_a_normaliser_that_follows_along_starts_anew_with_every_group() -> None:
    method = trained("llama")
    method.config = replace(method.config, normalizer_follows=True)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    quick = replace(CONFIG, generate=False, num_edits=3, sequential=True)
    whole = [run(method, config=replace(quick, batch_size=size)).rows for size in (3, 32)]
    parts = [run(method, config=quick, data=replace(DATA, examples=EXAMPLES[i : i + 3])).rows for i in (0, 3)]
    for rows in (whole[1], [row for part in parts for row in part]):
        for one, other in zip(whole[0], rows, strict=True):
            assert one["norm"] == pytest.approx(other["norm"], rel=1e-5)
    method.config = replace(method.config, normalizer_follows=False)
    still = run(method, config=quick).rows
    assert all(one["norm"] != pytest.approx(other["norm"], rel=1e-5) for one, other in zip(whole[0], still, strict=True))
    for name, tensor in method.state_dict().items():
        assert tensor.equal(before[name])
    method.config = replace(method.config, normalizer_follows=True)
    with pytest.raises(InputError, match="--sequential"):
        run(method, config=replace(quick, sequential=False))


def test_the_scale_multiplies_every_edit() -> None:
    method = trained("llama")
    evaluators = [
        Evaluator(method, method.specs, tiny("llama"), byte_tokenizer(), replace(CONFIG, scale=s)) for s in (1.0, 0.5)
    ]
    whole, half = (evaluator.edit([evaluator.encode(e, e.prompt) for e in EXAMPLES]) for evaluator in evaluators)
    for name, update in whole.updates.items():
        torch.testing.assert_close(half.updates[name].dense(), 0.5 * update.dense())
    rows = run(method, config=replace(CONFIG, scale=0.0, generate=False)).rows
    assert all(row["success"][0] == row["success"][1] for row in rows)
    assert all(p["kept"] for row in rows for p in row["locality"])


def test_chunks_and_batches_do_not_matter() -> None:
    data = replace(DATA, examples=(replace(EXAMPLES[0], target="a baker of the old town"), *EXAMPLES[1:]))
    many, alone = replace(CONFIG, context="So", batch_size=32), replace(CONFIG, context="So", batch_size=1)
    one, other = (run(trained("llama"), config=config, data=data, locality=[ASKING]) for config in (many, alone))
    of_words = [f"{name}_{how}" for name in ("success", "generality", "context") for how in ("generated", "contained", "text")]
    for mine, its in zip(one.rows, other.rows, strict=True):
        for key in ("success", "generality", *of_words):
            assert mine[key] == its[key]
        assert [p["kept"] for p in mine["locality"]] == [p["kept"] for p in its["locality"]]


@pytest.mark.parametrize("sequential", [False, True])
def test_the_first_requests_fill_up_the_last_group(sequential: bool) -> None:
    config = replace(CONFIG, num_edits=4, sequential=sequential, generate=False)
    told: list[tuple[int, int]] = []
    results = run(trained("llama"), config=config, callback=lambda *numbers: told.append(numbers))
    assert (results.summary["count"], results.summary["filled"], len(results.rows)) == (6, 2, 6)
    assert told[-1] == (6, 6)
    last = run(trained("llama"), config=config, data=replace(DATA, examples=(*EXAMPLES[4:], *EXAMPLES[:2])))
    assert last.summary["filled"] == 0
    for mine, its in zip(results.rows[4:], last.rows[:2], strict=True):
        assert mine | {"index": 0} == its | {"index": 0}


def test_a_group_larger_than_the_data_is_refused() -> None:
    with pytest.raises(InputError, match="6 requests, fewer than num_edits 7"):
        run(trained("llama"), config=replace(CONFIG, num_edits=7))


def test_the_callback_is_told_of_every_chunk() -> None:
    told: list[tuple[int, int]] = []
    run(trained("llama"), config=replace(CONFIG, generate=False), callback=lambda *numbers: told.append(numbers))
    assert told == [(4, 6), (6, 6)]


def test_chat_poses_prompts_and_probes_as_turns() -> None:
    method = trained("llama")
    evaluator = Evaluator(method, method.specs, tiny("llama"), byte_tokenizer(), replace(CONFIG, chat=True))
    one = EXAMPLES[1]
    assert evaluator.encode(one, one.prompt) == evaluator.formatter.encode(one.prompt, one.target, chat=True, end=True)
    (text,) = evaluator.probe([Probe("Who?", "Ana")])
    assert text == evaluator.formatter.encode("Who?", "Ana", chat=True)


@pytest.mark.parametrize(("mode", "ends"), [("auto", [True, False]), ("always", [True, True]), ("never", [False, False])])
def test_target_end_is_as_configured(mode: Any, ends: list[bool]) -> None:
    method = trained("llama")
    evaluator = Evaluator(method, method.specs, tiny("llama"), byte_tokenizer(), replace(CONFIG, target_end=mode))
    assert [evaluator.encode(e, e.prompt).ended for e in EXAMPLES[:2]] == ends


def test_an_edit_that_is_not_finite_stops_the_evaluation() -> None:
    method = trained("llama")
    with torch.no_grad():
        method.log_rates.fill_(float("nan"))
    with pytest.raises(NumericalError):
        run(method)


@pytest.mark.parametrize("name", ["num_edits", "batch_size", "timed_edits"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        replace(CONFIG, **{name: 0})


def test_results_are_saved_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results([{"prompt": "é", "index": 0}, {"prompt": "b", "index": 1}], {"count": 2})
    results.save(tmp_path / "out")
    assert [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()] == results.rows
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == results.summary
    with pytest.raises(InputError, match="--force"):
        results.save(tmp_path / "out")
    worse = Results([], {"count": object()})
    with pytest.raises(TypeError):
        worse.save(tmp_path / "out", force=True)
    with pytest.raises(TypeError):
        worse.save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == results.summary
    Results([], {"count": 0}).save(tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {"count": 0}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_the_peak_of_memory_is_that_of_the_evaluation_not_of_what_ran_before_it() -> None:
    large = torch.ones(2**28)  # 1 GiB
    del large
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    first = run(trained("llama"), config=replace(CONFIG, generate=False)).summary["peak_memory_mb"]
    assert 50 < first < before - 500
