"""The methods beside MEND: each against its formula with dense matrices, and the outer loss through it against autograd."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.testing import assert_close

import oracles
from cases import byte_tokenizer, requests, tiny
from mendlm import training
from mendlm.apply import stacked
from mendlm.editor import Editor
from mendlm.errors import InputError
from mendlm.layers import default_layers
from mendlm.lowrank import LowRank
from mendlm.methods import LEARNED, METHODS, method_types
from mendlm.methods.base import Learned
from mendlm.methods.finetune import FineTune, FineTuneConfig, FineTuneKLConfig, FineTuneStrongConfig, LoRAConfig
from mendlm.models import fake_model
from mendlm.plan import Lengths, fake_mode, formatter_of, step, texts
from mendlm.replay import Trunk
from mendlm.tasks import EditExample, Probe
from mendlm.text import Encoded, Formatter, scored_logits
from mendlm.training import Drawn, TrainConfig, draw, outer_loss

SETTINGS: dict[str, dict[str, Any]] = {
    "mend": {"rank": 4, "initial_rate": 0.1},
    "malmen": {"rank": 4, "initial_rate": 0.1, "initial_damping": 0.7},
    "malmen by sums": {"rank": 4, "initial_rate": 0.1, "initial_damping": 0.7, "decoupled_from": 1},
    "ke": {"hidden": 6},
    "enn": {"initial_rate": 0.2},
}


def learned(name: str, model: Any) -> Learned:
    """A method of that name in float64, its parameters away from their start, its statistics fitted."""
    kind, config = method_types(name.partition(" ")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        method: Learned = kind.for_model(model, default_layers(model), config(**SETTINGS[name])).double()
        method.prepare(model, requests(model, batch=4))
        with torch.no_grad():
            for parameter in method.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def model_of(name: str) -> Any:
    return copy.deepcopy(tiny(name)).double()


def draws(form: Formatter, config: TrainConfig, count: int = 4) -> list[Drawn]:
    rng, names = random.Random(5), itertools.cycle(("Ada", "Bo Lind", "the city of Ulm", "Cy"))
    examples = [
        EditExample(prompt=f"The home of {name} is", target="a boat" * (i % 2 + 1), rephrasings=(f"{name} lives in",))
        for i, name in zip(range(count), names, strict=False)
    ]
    return [
        draw(example, [Probe("The river runs", "to the sea"), Probe("Why?", "So")], form, config, rng) for example in examples
    ]


def gradients(model: Any, specs: Any, form: Formatter, text: Encoded) -> tuple[dict[str, Tensor], Tensor]:
    """Dense gradients of one request by autograd, and the base's own answer."""
    inputs, places = oracles.one_text(model, form, text)
    weights = {f"{s.name}.weight": model.get_parameter(f"{s.name}.weight").clone().requires_grad_() for s in specs}
    logits = functional_call(model, weights, kwargs={**inputs, "use_cache": False}).logits[0, places]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(text.target))
    found = torch.autograd.grad(nll, list(weights.values()))
    return {s.name: g.T if s.transposed else g for s, g in zip(specs, found, strict=True)}, logits.argmax(-1)


def weights_by(method: Any, model: Any, form: Formatter, texts: list[Encoded]) -> dict[str, Tensor]:
    """The weights under the edits of some requests at once, by the method's formula."""
    specs = method.specs
    if method.name in ("mend", "malmen"):
        fitted = [method.gradient(model, requests(model, batch=4))]
        rows = [method.gradient(model, form.batch([text])) for text in texts]
        if method.name == "malmen":
            return oracles.as_stored(model, specs, oracles.malmen(method, fitted, rows))
        each = [oracles.mend(method, fitted, one) for one in rows]
    elif method.name == "ke":
        each = []
        for text in texts:
            gradient, old = gradients(model, specs, form, text)
            each.append(oracles.knowledge_editor(method, model, text, old, gradient))
    else:
        return oracles.enn(method, model, form, texts)
    return oracles.as_stored(model, specs, {name: sum(one[name] for one in each) for name in each[0]})


@pytest.mark.parametrize("num_edits", [1, 2])
@pytest.mark.parametrize("case", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_outer_loss_and_its_gradient_equal_the_dense_formula(name: str, case: str, num_edits: int) -> None:
    model = model_of(case)
    form, config = Formatter.of(model, byte_tokenizer()), TrainConfig(batch_size=4, num_edits=num_edits)
    method, drawn = learned(name, model), draws(form, config)
    expected = oracles.outer_loss(model, form, drawn, config, lambda texts: weights_by(method, model, form, texts))
    parameters = list(method.parameters())
    slopes = torch.autograd.grad(expected["loss"], parameters, allow_unused=True)
    for trunk in (Trunk.below(model, method.specs), Trunk(())):
        loss, sums = outer_loss(method, model, form, trunk, drawn, config)
        for key, value in expected.items():
            assert_close(sums[key].double(), value.detach().double(), rtol=1e-7, atol=1e-9)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for a, b in zip(found, slopes, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, rtol=1e-5, atol=1e-8 * max(1.0, b.abs().max().item()))
    assert sum(float(slope.norm()) for slope in slopes if slope is not None) > 0


@pytest.mark.parametrize("name", LEARNED)
def test_an_edit_alone_equals_the_same_edit_in_a_batch(name: str) -> None:
    model = model_of("llama")
    method, batch = learned(name, model), requests(model, batch=3)
    together = method.edit(model, batch)
    for index in range(3):
        alone = method.edit(model, oracles.alone(batch, index))
        for layer, update in alone.updates.items():
            assert_close(together.updates[layer][index].dense(), update[0].dense(), rtol=1e-9, atol=1e-12)


def test_malmen_has_no_more_rows_than_the_layer_has_inputs() -> None:
    model = model_of("gpt2")
    method, batch = learned("malmen", model), requests(model, batch=12)
    parts = method.parts(model, batch)
    edit = method.combine(parts, 12)
    for spec in method.specs:
        u, wanted = parts.updates[spec.name].u.flatten(0, 1), parts.updates[spec.name].delta.flatten(0, 1)
        assert len(u) > spec.d_in
        assert edit.updates[spec.name].rows == min(spec.shape)
        damping = method.log_damping[method.specs.index(spec)].exp()
        dense = torch.linalg.solve(u.mT @ u + damping * torch.eye(spec.d_in), u.mT @ wanted).mT
        assert_close(edit.updates[spec.name][0].dense(), dense, rtol=1e-6, atol=1e-7)


class Kept:
    """A tensor that a graph holds for its gradient."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(("name", "grows"), [("malmen", True), ("malmen by sums", False)])
def test_what_a_step_holds_for_its_gradient_grows_with_the_requests_unless_malmen_keeps_sums(
    name: str, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "RECORDED", 4)
    model, held, most = model_of("llama"), 0, 0
    form, method = Formatter.of(model, byte_tokenizer()), learned(name, model)

    class Kept:
        """A tensor that a graph holds."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            self.tensor = tensor
            held += tensor.nbytes
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.tensor.nbytes

    def peak(count: int) -> int:
        nonlocal most
        config = TrainConfig(batch_size=count, num_edits=count)
        drawn = draws(form, config, count)
        gc.collect()
        most = held
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda box: box.tensor):
            loss, _ = outer_loss(method, model, form, Trunk.below(model, method.specs), drawn, config)
            loss.backward()
        return most

    few, many = peak(16), peak(64)
    assert (many > 2 * few) == grows, (few, many)


@pytest.mark.parametrize("name", ["malmen", "malmen by sums"])
def test_malmen_refuses_requests_that_make_no_whole_group(name: str) -> None:
    model = model_of("llama")
    method = learned(name, model)
    with pytest.raises(InputError, match="groups of 2"):
        method.together([((0, 1, 2), lambda: method.parts(model, requests(model, batch=3)))], 2)


def test_malmen_gives_each_token_what_it_asks_for_where_nothing_is_damped() -> None:
    model = model_of("llama")
    method, batch = learned("malmen", model), oracles.alone(requests(model, batch=1, tokens=5), 0)
    with torch.no_grad():
        method.log_damping.fill_(-30)
    parts = method.parts(model, batch)
    edit = method.combine(parts, 1)
    for name, part in parts.updates.items():
        assert_close(part.u[0] @ edit.updates[name][0].dense().mT, part.delta[0], rtol=1e-5, atol=1e-7)


def same(updates: Mapping[str, LowRank], index: int, expected: Mapping[str, Tensor]) -> None:
    """Whether the edit of one example is what the loop has changed."""
    assert updates.keys() == expected.keys()
    for name, change in expected.items():
        assert change.any()
        assert_close(updates[name][index].dense(), change, rtol=1e-2, atol=1e-2 * change.abs().max().item())


@pytest.mark.parametrize("case", ["gpt2", "t5"])
def test_ft_kl_is_the_loop_on_real_weights_with_one_unrelated_text_a_step(case: str) -> None:
    model, specs = tiny(case), default_layers(tiny(case))
    others = [oracles.alone(requests(model, batch=2, rng=torch.Generator().manual_seed(9)), i) for i in range(2)]
    batch, by_sgd = requests(model, batch=2), functools.partial(torch.optim.SGD, lr=1e-2)
    config = FineTuneKLConfig(rate=1e-2, steps=3, optimizer="sgd", edit_weight=0.5, kl_weight=2.0)
    method = FineTune(specs, config, others)
    method.edit(model, batch)  # what was edited before does not matter
    edit = method.edit(model, batch)
    for i in range(2):
        one = oracles.alone(batch, i)
        expected, done = oracles.fine_tune(model, specs, one, by_sgd, 3, others=others, weights_of_losses=(0.5, 2.0))
        assert done == 3
        same(edit.updates, i, expected)


@pytest.mark.parametrize("case", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("steps", [3, 60])
def test_lora_is_adam_on_the_factors_until_every_token_is_the_argmax(case: str, steps: int) -> None:
    model, specs = tiny(case), default_layers(tiny(case))
    batch = requests(model, batch=3)
    edit = FineTune(specs, LoRAConfig(rank=3, steps=steps)).edit(model, batch)
    assert {update.rows for update in edit.updates.values()} == {3}
    taken = []
    for i in range(3):
        expected, done = oracles.lora(model, specs, oracles.alone(batch, i), 3, LoRAConfig().rate, steps)
        same(edit.updates, i, expected)
        taken.append(done)
    assert taken == [3, 3, 3] if steps == 3 else min(taken) < 60


@pytest.mark.parametrize("case", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("steps", [3, 200])
def test_the_stronger_variant_tunes_one_matrix_until_the_target_is_likely(case: str, steps: int) -> None:
    model, specs = tiny(case), default_layers(tiny(case))
    batch, by_adam = requests(model, batch=3), functools.partial(torch.optim.Adam, lr=0.05)
    method = FineTune(specs, FineTuneStrongConfig(rate=0.05, steps=steps, stop_nll=2.5))
    assert method.specs == (specs[-1],)
    edit, taken = method.edit(model, batch), []
    for i in range(3):
        expected, done = oracles.fine_tune(model, specs[-1:], oracles.alone(batch, i), by_adam, steps, stop_nll=2.5)
        same(edit.updates, i, expected)
        taken.append(done)
    assert taken == [3, 3, 3] if steps == 3 else min(taken) < 200


def test_an_enn_edit_of_an_editor_works_on_the_base_as_it_was() -> None:
    model = model_of("llama")
    method, form = learned("enn", model), Formatter.of(model, byte_tokenizer())
    edit = Editor(method, model, byte_tokenizer()).edit("Who is Ana?", "a baker")
    batch = form.batch([form.encode("Who is Ana?", "a baker", end=True)])
    step = method.edit(model, batch)
    with torch.no_grad():
        with method.changed_base().on(model), step.on(model):
            expected = scored_logits(model, batch)
        with edit.on(model):
            assert_close(scored_logits(model, batch), expected)
        with method.changed_base().on(model):
            assert not torch.allclose(scored_logits(model, batch), expected)
    with pytest.raises(InputError, match="must not be made twice"):
        stacked([edit, edit])


@pytest.mark.parametrize("name", ["mend", "malmen", "enn"])
def test_requests_edited_together_are_one_edit_as_the_method_merges_them(name: str) -> None:
    model = model_of("llama")
    method, form = learned(name, model), Formatter.of(model, byte_tokenizer())
    asked = [("Who is Ana?", "a baker"), ("Bo lives in", "Ulm"), ("Who is Cy of the old town?", "a cook")]
    editor = Editor(method, model, byte_tokenizer(), {"sha256": "abc"})
    texts = [form.encode(prompt, target, end=prompt.endswith("?")) for prompt, target in asked]
    parts = method.parts(model, form.batch(texts))
    (expected,) = method.combine(parts, 3).detach().unbind()
    for batch_size in (1, 32):
        made = editor.edit_together(asked, scale=0.5, batch_size=batch_size)
        for layer, update in made.updates.items():
            change = 0 if (base := method.changed_base()) is None else base.updates[layer].dense()
            assert_close(update.dense(), change + 0.5 * expected.updates[layer].dense(), rtol=1e-4, atol=1e-7)
    assert [part["request"]["target"] for part in made.about["parts"]] == ["a baker", "Ulm", "a cook"]
    assert "request" not in made.about
    assert made.about["editor"] == {"sha256": "abc"}


def test_statistics_that_follow_along_are_for_edits_made_one_by_one() -> None:
    model = model_of("llama")
    method = learned("mend", model)
    method.config = replace(method.config, normalizer_follows=True)
    editor = Editor(method, model, byte_tokenizer())
    editor.edit("Who is Ana?", "a baker")
    with pytest.raises(InputError, match="one after another, and 2 were asked for together"):
        editor.edit_many([("Who is Ana?", "a baker"), ("Who is Bo?", "a cook")])


def test_the_methods_names_are_those_of_the_registry() -> None:
    model = tiny("llama")
    others = [oracles.alone(requests(model), 0)]
    for name in METHODS:
        kind, config = method_types(name)
        untrained = (
            () if name in LEARNED else (config(),) if name in ("prompt", "cache") else (default_layers(model), config(), others)
        )
        assert (kind(*untrained) if untrained else kind).name == name
    with pytest.raises(InputError, match="unknown method 'rome'; choose one of mend"):
        method_types("rome")
    with pytest.raises(InputError, match="'ft-kl' watches unrelated texts"):
        FineTune(default_layers(model), FineTuneKLConfig())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"edit_weight": 0.0}, {"kl_weight": -1.0}, {"kl_weight": float("nan")}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        FineTuneConfig(**wrong)


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_rows_travel_to_the_editors_device_and_edits_come_back(name: str) -> None:
    """By fake tensors, which have devices that are named and not there, and refuse to mix them as real ones do."""
    kind, config = method_types(name)
    model = fake_model(tiny("llama").config)
    with fake_mode(model):
        with torch.device("meta"):
            method: Any = kind(default_layers(model), config(**SETTINGS[name]))
        optimizer, form = torch.optim.Adam(method.parameters()), formatter_of(model)
        drawn = texts(4, Lengths(), "causal")
        batch = form.batch([one.edit for one in drawn])
        method.prepare(model, batch)
        step(method, model, form, optimizer, drawn, TrainConfig())
        edit = method.edit(model, batch)
        with torch.no_grad(), edit.on(model):
            scored_logits(model, batch)
    moments = [tensor for state in optimizer.state.values() for tensor in (state["exp_avg"], state["exp_avg_sq"])]
    there = [*method.state_dict().values(), *(parameter.grad for parameter in method.parameters()), *moments]
    assert {tensor.device.type for tensor in there} == {"meta"}
    assert {tensor.device.type for tensor in edit.tensors()} == {"cpu"}


def test_only_a_method_that_works_on_rows_alone_leaves_its_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    with pytest.raises(InputError, match="cannot use the device 'meta'"):
        learned("mend", model).beside(model, "meta")
    monkeypatch.setattr("mendlm.methods.base.as_device", torch.device)
    for name in ("ke", "enn"):
        assert learned(name, model).beside(model, "cpu").beside(model)
        with pytest.raises(InputError, match=f"the method '{name}' works on its model's device, cpu, not on 'meta'"):
            learned(name, model).beside(model, "meta")
    assert learned("mend", model).beside(model, "meta").log_rates.is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mend", "malmen", "malmen by sums"])
def test_an_editor_on_another_device_learns_and_edits_the_same(name: str) -> None:
    model, config = model_of("llama"), TrainConfig(num_edits=2, own_locality=1.0, continuation_share=0)
    form, rng = Formatter.of(model, byte_tokenizer()), random.Random(0)
    one = EditExample(prompt="Ana is a", target="baker", rephrasings=("Ana, the",), unrelated=(Probe("Bo is a", "cook"),))
    drawn = [draw(one, (), form, config, rng) for _ in range(4)]
    found = {}
    for device in ("cpu", "cuda"):
        method = learned(name, model).beside(model, device)
        loss, _ = outer_loss(method, model, form, Trunk.below(model, method.specs), drawn, config)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten().cpu() for parameter in method.parameters()])
        edit = Editor(method, model, byte_tokenizer(), device=device).edit("Ana is a", "baker")
        found[device] = [loss.detach().cpu(), gradient, *edit.tensors()]
        assert {tensor.device.type for tensor in edit.tensors()} == {"cpu"}
    for here, there in zip(found["cpu"], found["cuda"], strict=True):
        assert_close(here, there, rtol=1e-8, atol=1e-10)
