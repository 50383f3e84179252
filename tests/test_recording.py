import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import cases
import oracles
from mendlm.apply import applied
from mendlm.errors import LayerError
from mendlm.layers import default_layers, editable, select
from mendlm.recording import record

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def loss_on(inputs):
    """A loss that depends on every real position of a model's output."""

    def loss_of(model):
        logits = model(**inputs, use_cache=False).logits
        if logits.dim() == 2:
            return logits.square().sum()
        mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
        return logits[mask].log_softmax(-1).square().mean()

    return loss_of


def recorded(model, specs, loss_of, size=None):
    with record(model, specs) as recording:
        loss = loss_of(model)
    return recording.gradient(loss, size)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("case", cases.ALL)
def test_recorded_gradient_is_autograds_for_every_layer(case, trained):
    model = copy.deepcopy(cases.tiny(case)).requires_grad_(trained)
    specs, loss_of = list(editable(model).values()), loss_on(cases.inputs(model))
    gradient = recorded(model, specs, loss_of)
    expected = oracles.weight_gradients(cases.tiny(case), specs, loss_of)
    assert list(gradient) == [spec.name for spec in specs]
    for name, exact in expected.items():
        assert exact.any()
        assert_close(gradient[name].dense(), exact, **CLOSE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not rows.u.requires_grad and not rows.delta.requires_grad for rows in gradient.values())


@pytest.mark.parametrize("case", cases.GENERATORS)
def test_with_a_size_each_matrix_is_that_example_alone(case):
    model, specs = cases.tiny(case), default_layers(cases.tiny(case))
    batch = cases.requests(model)
    gradient = recorded(model, specs, lambda model: oracles.nll(model, batch), size=batch.size)
    for index in range(batch.size):
        single = oracles.alone(batch, index)
        for name, exact in oracles.weight_gradients(model, specs, oracles.nll, single).items():
            assert_close(gradient[name][index].dense(), exact, **CLOSE)


def test_the_head_is_tied_and_its_weight_is_not_recorded():
    model = copy.deepcopy(cases.tiny("qwen3")).requires_grad_(True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loss_of = loss_on(cases.inputs(model))
    gradient = recorded(model, default_layers(model), loss_of)
    for name, exact in oracles.weight_gradients(cases.tiny("qwen3"), default_layers(model), loss_of).items():
        assert_close(gradient[name].dense(), exact, **CLOSE)
    assert model.lm_head.weight.grad is None


class InPlace(nn.Module):
    """An in-place activation right after each layer; each layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for block in [self.blocks[0], self.blocks[1], self.blocks[0], self.blocks[1]]:
            x = F.silu(block(x), inplace=True)
        return x


def in_place(trained: bool):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return InPlace().requires_grad_(trained), torch.randn(5, 3, 4)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize("size", [None, 5])
def test_in_place_activations_and_layers_that_run_twice(trained, size):
    model, x = in_place(trained)
    specs = select(model, ["blocks.0", "blocks.1"])
    gradient = recorded(model, specs, lambda model: model(x).sin().sum(), size)
    expected = oracles.weight_gradients(model, specs, lambda model: model(x).sin().sum())
    for name, exact in expected.items():
        found = gradient[name].dense()
        assert_close(found if size is None else found.sum(0), exact)


def test_a_layer_that_never_runs_is_named():
    model, x = in_place(False)
    with pytest.raises(LayerError, match=r"never reached blocks\.2;"):
        recorded(model, select(model, ["blocks.1", "blocks.2"]), lambda model: model(x).sum())


def test_a_layer_that_the_loss_does_not_see_has_a_zero_gradient():
    model, x = in_place(False)
    specs = select(model, ["blocks.2", "blocks.1"])
    gradient = recorded(model, specs, lambda model: (model.blocks[2](x), model(x))[1].sum())
    assert gradient["blocks.2"].rows == 15
    assert not gradient["blocks.2"].delta.any()
    assert gradient["blocks.1"].delta.any()


def test_recording_leaves_no_hook_and_works_without_gradients_around_it():
    model, x = in_place(False)
    with torch.no_grad(), contextlib.suppress(ZeroDivisionError), record(model, select(model, ["blocks.1"])):
        assert model(x).requires_grad
        raise ZeroDivisionError
    assert not model(x).requires_grad


@pytest.mark.parametrize("case", ["gpt2", "llama", "t5"])
def test_gradient_checkpointing_is_off_inside_and_restored(case):
    model = copy.deepcopy(cases.tiny(case))
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    flagged = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert flagged
    specs, loss_of = default_layers(model), loss_on(cases.inputs(model))
    with contextlib.suppress(ZeroDivisionError), record(model, specs):
        assert not any(module.gradient_checkpointing for module in flagged)
        raise ZeroDivisionError
    gradient, plain = recorded(model, specs, loss_of), recorded(cases.tiny(case), specs, loss_of)
    assert all(module.gradient_checkpointing for module in flagged)
    for name, exact in plain.items():
        assert_close(gradient[name].dense(), exact.dense(), **CLOSE)


@pytest.mark.parametrize("overlay_first", [True, False])
@pytest.mark.parametrize("case", ["gpt2", "llama", "t5"])
def test_recording_under_an_overlay_is_the_gradient_at_the_edited_weights(case, overlay_first):
    model, specs = cases.tiny(case), default_layers(cases.tiny(case))
    edit = oracles.random_edit(specs, cases.generator(3))
    loss_of = loss_on(cases.inputs(model))
    contexts = [lambda: applied(model, edit), lambda: record(model, specs)]
    with contexts[not overlay_first]() as first, contexts[overlay_first]() as second:
        loss = loss_of(model)
    gradient = (second if overlay_first else first).gradient(loss)
    edited = oracles.changed(model, specs, oracles.dense(edit))
    for name, exact in oracles.weight_gradients(edited, specs, loss_of).items():
        assert_close(gradient[name].dense(), exact, rtol=1e-3, atol=1e-5)
