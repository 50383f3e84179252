import contextlib
import copy

import pytest
import torch

import cases
import oracles
from mendlm.apply import applied
from mendlm.errors import ModelError
from mendlm.layers import block_of, block_stacks, default_layers, editable, select
from mendlm.replay import Trunk


def last_block(model):
    stacks = block_stacks(model)
    name, blocks = list(stacks.items())[-1]
    return [spec for spec in editable(model).values() if block_of(spec.name, list(stacks)) == (name, len(blocks) - 1)]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def flat(tape):
    for item in tape:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from flat(item)


def runs(model, action):
    """How often each block's first layer ran during the action, per stack."""
    counts = {name: [0] * len(blocks) for name, blocks in block_stacks(model).items()}
    handles = []
    for name, blocks in block_stacks(model).items():
        for index, block in enumerate(blocks):
            layer = next(m for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D"))

            def count(*_, name=name, index=index):
                counts[name][index] += 1

            handles.append(layer.register_forward_pre_hook(count))
    try:
        action()
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("choose", [default_layers, last_block], ids=["defaults", "last block"])
@pytest.mark.parametrize("case", cases.ALL)
def test_replay_is_the_full_pass_to_the_bit(case, choose):
    model = cases.tiny(case)
    specs, inputs = choose(model), cases.inputs(model)
    trunk = Trunk.below(model, specs)
    assert trunk.groups
    with trunk.record() as tape:
        base = logits(model, inputs)
    with trunk.replay(tape):
        assert torch.equal(logits(model, inputs), base)
    edit = oracles.random_edit(specs, cases.generator(1))
    with applied(model, edit):
        full = logits(model, inputs)
        with trunk.replay(tape):
            assert torch.equal(logits(model, inputs), full)
    assert not torch.equal(full, base)
    assert torch.equal(logits(model, inputs), base)


@pytest.mark.parametrize("case", cases.ALL)
def test_run_stops_at_the_trunk_with_the_same_tape(case):
    model = cases.tiny(case)
    specs, inputs = last_block(model), cases.inputs(model)
    trunk = Trunk.below(model, specs)
    with torch.no_grad(), trunk.record() as tape:
        logits(model, inputs)
    early = {}
    counts = runs(model, lambda: early.update(tape=trunk.run(model, inputs)))
    assert list(counts.values())[-1][-1] == 0
    assert len(list(flat(tape))) >= len(trunk.groups)
    for one, other in zip(flat(early["tape"]), flat(tape), strict=True):
        assert torch.equal(one, other)
    edit = oracles.random_edit(specs, cases.generator(1))
    with applied(model, edit):
        full = logits(model, inputs)
        with trunk.replay(early["tape"]):
            assert torch.equal(logits(model, inputs), full)


@pytest.mark.parametrize(
    ("case", "patterns", "expected"),
    [
        ("llama", ["2.mlp.up_proj", "3.mlp.up_proj"], [[0, 0, 1, 1]]),
        ("llama", ["1.mlp.up_proj"], [[0, 1, 1, 1]]),
        ("gpt2", ["0.mlp.c_fc", "3.mlp.c_fc"], [[1, 1, 1, 1]]),
        ("bert", ["3.output.dense"], [[0, 0, 0, 1]]),
        ("t5", ["encoder.block.2.*", "decoder.block.2.*"], [[0, 0, 1], [1, 1, 1]]),
        ("t5", ["encoder.block.0.*"], [[1, 1, 1], [1, 1, 1]]),
        ("t5", ["decoder.block.1.*"], [[0, 0, 0], [0, 1, 1]]),
        ("t5", ["decoder.block.0.*"], [[0, 0, 0], [1, 1, 1]]),
        ("bart", ["encoder.layers.1.fc1", "decoder.layers.2.fc1"], [[0, 1, 1], [1, 1, 1]]),
        ("bart", ["model.decoder.layers.2.*"], [[0, 0, 0], [0, 0, 1]]),
    ],
)
def test_exactly_the_blocks_that_no_edit_reaches_are_skipped(case, patterns, expected):
    model = cases.tiny(case)
    inputs, specs = cases.inputs(model), select(model, [p if "." in p and p[0] in "0123" else f"*{p}" for p in patterns])
    trunk = Trunk.below(model, specs)
    with trunk.replay(trunk.run(model, inputs)), applied(model, oracles.random_edit(specs, cases.generator())):
        assert list(runs(model, lambda: logits(model, inputs)).values()) == expected


def test_without_a_trunk_nothing_runs_and_nothing_is_replayed():
    model = cases.tiny("llama")
    trunk = Trunk.below(model, select(model, ["model.layers.0.mlp.up_proj"]))
    tapes = []
    assert list(runs(model, lambda: tapes.append(trunk.run(model, cases.inputs(model)))).values()) == [[0, 0, 0, 0]]
    assert trunk.groups == ()
    assert tapes == [[]]


def test_gradients_of_a_replayed_pass_are_those_of_the_full_pass():
    model = cases.tiny("qwen3")
    specs, inputs = default_layers(model), cases.inputs(model)
    edit = oracles.random_edit(specs, cases.generator(2))
    rows = [update.delta.requires_grad_() for update in edit.updates.values()]
    trunk = Trunk.below(model, specs)
    tape = trunk.run(model, inputs)
    with applied(model, edit):
        full = torch.autograd.grad(model(**inputs, use_cache=False).logits.square().mean(), rows)
        with trunk.replay(tape):
            replayed = torch.autograd.grad(model(**inputs, use_cache=False).logits.square().mean(), rows)
    assert all(torch.equal(one, other) for one, other in zip(replayed, full, strict=True))


def test_forward_comes_back_also_one_that_was_shadowed_before():
    model = copy.deepcopy(cases.tiny("llama"))
    blocks, calls = model.model.layers, []
    original = blocks[0].forward

    def shadow(*args, **kwargs):
        calls.append(0)
        return original(*args, **kwargs)

    blocks[0].forward = shadow
    trunk = Trunk.below(model, default_layers(model)[-1:])
    inputs = cases.inputs(model)
    tape = trunk.run(model, inputs)
    assert len(calls) == 1
    with contextlib.suppress(ZeroDivisionError), trunk.replay(tape):
        logits(model, inputs)
        raise ZeroDivisionError
    assert len(calls) == 1
    assert blocks[0].forward is shadow
    assert all("forward" not in block.__dict__ for block in blocks[1:])


def test_run_leaves_no_hook_after_an_error():
    model = cases.tiny("llama")
    trunk = Trunk.below(model, default_layers(model))
    with pytest.raises(IndexError):
        trunk.run(model, {"input_ids": torch.full((1, 3), cases.VOCAB)})
    trunk.run(model, cases.inputs(model))
    assert all(not block._forward_hooks for block in model.model.layers)


def test_models_that_share_keys_and_values_between_blocks_are_refused():
    model = copy.deepcopy(cases.tiny("gemma3"))
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ModelError, match="Gemma3ForCausalLM shares keys and values"):
        Trunk.below(model, default_layers(model))
    assert Trunk.where_possible(model, default_layers(model)) == Trunk(())
