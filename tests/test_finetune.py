import pytest
import torch
from torch.testing import assert_close

import cases
import oracles
from mendlm.apply import applied
from mendlm.checkpoint import parse_config
from mendlm.errors import InputError
from mendlm.layers import default_layers, select
from mendlm.methods import finetune, method_types
from mendlm.methods.finetune import FineTune, FineTuneConfig

OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
RATES = {"rmsprop": 1e-3, "adam": 1e-3, "sgd": 0.1}


def tuner(specs, optimizer, rate, steps):
    return FineTune(specs, FineTuneConfig(optimizer=optimizer, rate=rate, steps=steps))


def oracle(model, specs, batch, optimizer, rate, steps):
    return oracles.fine_tune(model, specs, batch, lambda weights: OPTIMIZERS[optimizer](weights, lr=rate), steps)


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [(case, "rmsprop") for case in cases.GENERATORS] + [("gpt2", "adam"), ("t5", "adam"), ("llama", "sgd"), ("bart", "sgd")],
)
def test_each_edit_is_what_the_loop_does_to_real_weights(case, optimizer):
    model, specs = cases.tiny(case), default_layers(cases.tiny(case))
    batch, rate = cases.requests(model, batch=2), RATES[optimizer]
    edits = tuner(specs, optimizer, rate, 3).edit(model, batch)
    assert len(edits) == 2
    for i in range(2):
        expected, done = oracle(model, specs, oracles.alone(batch, i), optimizer, rate, 3)
        assert done == 3
        for name, change in expected.items():
            assert change.any()
            assert_close(edits.updates[name][i].dense(), change, rtol=1e-2, atol=1e-2 * change.abs().max().item())


@pytest.mark.parametrize("case", ["gpt2", "llama", "t5"])
def test_it_stops_as_soon_as_the_argmax_is_the_target(case):
    model, specs = cases.tiny(case), default_layers(cases.tiny(case))
    batch = oracles.alone(cases.requests(model), 2)
    _, done = oracle(model, specs, batch, "adam", 0.01, 100)
    assert 1 < done < 100
    passes = []
    handle = model.get_submodule(specs[-1].name).register_forward_hook(lambda *_: passes.append(1))
    try:
        edit = tuner(specs, "adam", 0.01, 100).edit(model, batch)
    finally:
        handle.remove()
    assert len(passes) == done + 1
    with applied(model, edit):
        assert torch.equal(answer(model, batch), batch.label)


@pytest.mark.parametrize(("case", "optimizer"), [("gpt2", "adam"), ("llama", "rmsprop"), ("t5", "adam")])
def test_requests_that_are_tuned_side_by_side_stop_one_by_one(case, optimizer, monkeypatch):
    model, specs = cases.tiny(case), default_layers(cases.tiny(case))
    batch, rate = cases.requests(model, batch=4), {"adam": 0.01, "rmsprop": 0.003}[optimizer]
    alone = [oracle(model, specs, oracles.alone(batch, i), optimizer, rate, 60) for i in range(4)]
    assert len({done for _, done in alone}) > 1
    together = tuner(specs, optimizer, rate, 60).edit(model, batch)
    monkeypatch.setattr(finetune, "TOGETHER", 2 * sum(spec.d_in * spec.d_out for spec in specs))
    in_turns = tuner(specs, optimizer, rate, 60).edit(model, batch)
    for name, update in together.updates.items():
        assert_close(in_turns.updates[name].dense(), update.dense(), rtol=1e-2, atol=1e-3)
        for i, (expected, _) in enumerate(alone):
            assert_close(update[i].dense(), expected[name], rtol=2e-2, atol=2e-2 * expected[name].abs().max().item())


def answer(model, batch):
    with torch.no_grad():
        return model(**batch.inputs, use_cache=False).logits[batch.row, batch.column].argmax(-1)


def test_a_target_that_is_already_the_answer_changes_nothing():
    model = cases.tiny("gpt2")
    batch = cases.requests(model)
    batch.label.copy_(answer(model, batch))
    edit = FineTune(default_layers(model)).edit(model, batch)
    assert all(not update.dense().any() for update in edit.updates.values())


@pytest.mark.parametrize("case", ["gpt2", "bart"])
def test_no_weight_is_touched(case):
    model = cases.tiny(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edit = tuner(default_layers(model), "sgd", 0.1, 2).edit(model, cases.requests(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(not update.delta.requires_grad for update in edit.updates.values())
    assert edit.transposed == (frozenset(edit.updates) if case == "gpt2" else frozenset())


def test_it_starts_from_the_edits_that_are_active():
    model, specs = cases.tiny("llama"), select(cases.tiny("llama"), ["*.2.mlp.*", "*.3.mlp.*"])
    batch = oracles.alone(cases.requests(model), 2)
    earlier = oracles.random_edit(specs, cases.generator(3), size=0.1)
    with applied(model, earlier):
        edit = tuner(specs, "sgd", 0.1, 2).edit(model, batch)
    changed = oracles.changed(model, specs, oracles.dense(earlier))
    expected, _ = oracle(changed, specs, batch, "sgd", 0.1, 2)
    for name, change in expected.items():
        assert_close(edit.updates[name][0].dense(), change, rtol=1e-2, atol=1e-2 * change.abs().max().item())


@pytest.mark.parametrize("name", ["ft", "ft-kl", "ft-strong", "lora"])
def test_the_papers_rates_have_names(name):
    _, config = method_types(name)
    for word, rate in (("paper-gpt", 5e-6), ("paper-t5", 1e-4), ("paper-small", 1e-6), (3e-5, 3e-5)):
        assert parse_config(config, {"rate": word}).rate == rate
    with pytest.raises(InputError, match="paper-gpt, paper-t5, paper-small; got 'paper'"):
        parse_config(config, {"rate": "paper"})


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"rate": float("nan")}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(InputError, match="steps of at least 1 and a rate above 0"):
        FineTuneConfig(**wrong)
