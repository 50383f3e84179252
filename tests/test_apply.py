import copy

import pytest
import torch
from torch.testing import assert_close

import cases
import oracles
from mendlm.apply import Edit, _require_routing, _route, applied, join, merge, require_indices
from mendlm.errors import InputError, LayerError, NumericalError
from mendlm.layers import default_layers, editable, select
from mendlm.lowrank import LowRank

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def setting(case, *batch, rows=2):
    model = cases.tiny(case)
    specs = default_layers(model)
    return model, specs, oracles.random_edit(specs, cases.generator(5), *batch, rows=rows)


@pytest.mark.parametrize("case", cases.ALL)
def test_overlay_equals_dense_weights_in_every_layer_and_leaves_nothing(case):
    model = cases.tiny(case)
    specs, inputs = list(editable(model).values()), cases.inputs(model)
    edit = oracles.random_edit(specs, cases.generator(1), size=0.1)
    before = logits(model, inputs)
    with edit.on(model):
        edited = logits(model, inputs)
    assert_close(edited, oracles.run_dense(model, specs, oracles.dense(edit), inputs), rtol=1e-3, atol=1e-4)
    assert (edited - before).abs().max() > 0.01
    assert torch.equal(logits(model, inputs), before)


def test_an_error_inside_takes_the_overlay_off():
    model, _, edit = setting("llama")
    before = logits(model, inputs := cases.inputs(model))
    with pytest.raises(ZeroDivisionError), applied(model, edit):
        raise ZeroDivisionError
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("case", cases.ALL)
def test_each_row_of_a_batch_runs_under_its_own_edit(case):
    model, _, edits = setting(case, 3)
    inputs = cases.inputs(model, batch=3)
    with applied(model, edits):
        together = logits(model, inputs)
    assert len(edits) == 3
    for i in range(3):
        with applied(model, edits[i]):
            single = logits(model, {name: tensor[i : i + 1] for name, tensor in inputs.items()})
        assert_close(together[i : i + 1], single, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", cases.GENERATORS)
def test_generation_with_a_cache_follows_each_rows_edit(case, beams):
    model, _, edits = setting(case, 3)
    prompts = torch.randint(3, cases.VOCAB, (3, 5), generator=cases.generator(2))
    bad = [[cases.END]]  # no early end: every answer has the full length

    def answer(ids, edit):
        options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "bad_words_ids": bad, "use_cache": True}
        with applied(model, edit):
            return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    together = answer(prompts, edits)
    assert not torch.equal(together, answer(prompts, edits * 0.0))
    assert torch.equal(together, torch.cat([answer(prompts[i : i + 1], edits[i]) for i in range(3)]))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("case", ["gpt2", "opt", "t5"])
def test_routing_by_index_and_by_matrix(case, few, beams, monkeypatch):
    monkeypatch.setattr("mendlm.apply.FEW", few)
    model, specs, edits = setting(case, 2)
    inputs = cases.inputs(model, batch=4)
    several = {"neither": [], "first": [0], "second": [1], "both": [0, 1]}
    matrix = torch.tensor([[i in mine for i in range(2)] for mine in several.values()])
    index = torch.tensor([-1, 0, 1, 0])
    expanded = {name: tensor.repeat_interleave(beams, 0) for name, tensor in inputs.items()}
    with applied(model, edits, matrix):
        by_matrix = logits(model, expanded)[::beams]
    with applied(model, edits, index):
        by_index = logits(model, expanded)[::beams]
    none = {spec.name: torch.zeros(spec.shape) for spec in specs}
    for row, mine in enumerate(several.values()):
        single = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        changes = {name: sum((edits[i].updates[name].dense() for i in mine), start=none[name]) for name in none}
        assert_close(by_matrix[row : row + 1], oracles.run_dense(model, specs, changes, single), **CLOSE)
        own = oracles.dense(edits[int(index[row])]) if index[row] >= 0 else none
        assert_close(by_index[row : row + 1], oracles.run_dense(model, specs, own, single), **CLOSE)


@pytest.mark.parametrize("case", ["gpt2", "llama", "bart"])
def test_gradients_flow_to_the_rows(case):
    model, specs, edit = setting(case)
    leaves = {name: LowRank(rows.u.requires_grad_(), rows.delta.requires_grad_()) for name, rows in edit.updates.items()}
    rows = [factor for update in leaves.values() for factor in (update.u, update.delta)]
    inputs = cases.inputs(model)
    with applied(model, Edit(leaves)):
        found = torch.autograd.grad(model(**inputs, use_cache=False).logits.square().mean(), rows)
    dense = {name: update.dense() for name, update in leaves.items()}
    expected = torch.autograd.grad(oracles.run_dense(model, specs, dense, inputs).square().mean(), rows)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_algebra_of_edits_is_that_of_their_matrices():
    model, _, edits = setting("llama", 4)
    other = oracles.random_edit(select(model, ["*.3.mlp.*", "0.self_attn.q_proj"]), cases.generator(9))
    whole = edits[0] + other * 0.5
    for name, matrix in oracles.dense(whole).items():
        parts = [edit.updates[name].dense() * f for edit, f in ((edits[0], 1), (other, 0.5)) if name in edit.updates]
        assert_close(matrix, sum(parts))
    pairs = edits.grouped(2)
    for name, matrix in oracles.dense(join([edits, pairs])).items():
        own = edits.updates[name].dense()
        assert_close(matrix, torch.cat([own, own[::2] + own[1::2]]))
    with pytest.raises(TypeError, match="single edit"):
        len(edits[0])


def test_unbind_drops_exactly_the_rows_that_add_nothing():
    u, delta = torch.tensor([[1.0, 2], [0, 0], [3, 4], [5, 6]]), torch.tensor([[1.0], [1], [0], [2]])
    other = torch.arange(6.0).reshape(2, 1, 3)
    batch = Edit({"a": LowRank(torch.stack([u, 0 * u]), torch.stack([delta, delta])), "b": LowRank(other, other)})
    first, second = batch.unbind()
    assert torch.equal(first.updates["a"].u, u[[0, 3]])
    assert torch.equal(first.updates["a"].delta, delta[[0, 3]])
    assert second.updates["a"].rows == 0
    assert [torch.equal(edit.updates["b"].u, mine) for edit, mine in zip((first, second), other, strict=True)] == [True, True]


@pytest.mark.parametrize(("case", "dtype"), [("gpt2", torch.float32), ("llama", torch.float32), ("llama", torch.float64)])
def test_a_precise_merge_loses_nothing_and_is_undone_to_the_bit(case, dtype):
    model, specs, edit = setting(case)
    tiny = copy.deepcopy(model).to(dtype)
    model = copy.deepcopy(tiny)
    report = merge(model, edit)
    assert max(report.lost.values()) < 10 * torch.finfo(dtype).eps
    inputs = cases.inputs(model)
    assert_close(logits(model, inputs), oracles.run_dense(tiny, specs, oracles.dense(edit), inputs), **CLOSE)
    report.snapshot.restore(model)
    for one, other in zip(model.parameters(), tiny.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_merge_that_fails_half_way_changes_nothing(monkeypatch):
    model, _, edit = setting("llama")
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    dense, calls = LowRank.dense, []

    def fail_at_the_third(update):
        calls.append(update)
        if len(calls) == 3:
            raise MemoryError
        return dense(update)

    monkeypatch.setattr(LowRank, "dense", fail_at_the_third)
    with pytest.raises(MemoryError):
        merge(model, edit)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("share", "low", "high"), [(0.1, 0.0, 0.05), (1e-2, 0.1, 0.3), (1e-4, 0.9, 1.1)])
def test_a_bf16_merge_reports_what_rounding_took(share, low, high):
    model = copy.deepcopy(cases.tiny("gpt2")).to(torch.bfloat16)
    specs = default_layers(model)
    raw = oracles.random_edit(specs, cases.generator(4), rows=16)
    before = {spec.name: spec.weight(model.get_submodule(spec.name)).float() for spec in specs}
    updates = {n: update * (share * before[n].norm() / update.norm()) for n, update in raw.updates.items()}
    report = merge(model, Edit(updates))
    for name, update in updates.items():
        kept = (before[name] + update.dense()).bfloat16().float() - before[name]
        assert report.lost[name] == pytest.approx(((kept - update.dense()).norm() / update.norm()).item(), rel=1e-4)
        assert low < report.lost[name] < high
    report.snapshot.restore(model)
    assert all(torch.equal(spec.weight(model.get_submodule(spec.name)).float(), before[spec.name]) for spec in specs)


def test_wrong_models_shapes_and_numbers_are_refused(tmp_path):
    model, _, edits = setting("llama", 2)
    for act in (merge, lambda model, edit: applied(model, edit).__enter__()):
        with pytest.raises(LayerError, match=r"no layer 'model\.layers\.1\.mlp\.gate_proj'"):
            act(cases.tiny("gpt2"), edits[0])
        wide = Edit({"model.layers.1.mlp.gate_proj": LowRank(torch.ones(1, 17), torch.ones(1, 24))})
        with pytest.raises(LayerError, match=r"is \(24, 16\) here, but \(24, 17\)"):
            act(model, wide)
        with pytest.raises(LayerError, match="is LlamaMLP here"):
            act(model, Edit({"model.layers.1.mlp": LowRank(torch.ones(1, 16), torch.ones(1, 16))}))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp\.up_proj"):
            (edits[0] * bad).require_finite()
    assert edits.require_finite() is edits
    with pytest.raises(InputError, match="only a single edit can be merged"):
        merge(model, edits)
    with pytest.raises(InputError, match="batch of edits cannot be saved"):
        edits.save(tmp_path / "edits")


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize(
    ("routing", "says"),
    [
        ([0, 2], "names edit 2.*numbered 0 to 1.*-1 for none"),
        ([-2, 0], "names edit -2"),
        ([0.0, 1.0], r"\(2,\) of torch.float32.*one integer a row"),
        (0, r"\(\) of torch.int64.*one integer a row"),
        ([True, False], "must be a matrix"),
        ([[True], [False]], r"matrix \(2, 1\).*\(rows, 2\) of torch.bool"),
        ([[0, 1], [1, 0]], r"\(2, 2\) of torch.int64.*\(rows, 2\) of torch.bool"),
    ],
)
def test_routing_that_cannot_be_meant_is_refused(routing, says, few, monkeypatch):
    monkeypatch.setattr("mendlm.apply.FEW", few)
    model, _, edits = setting("llama", 2)
    before = logits(model, inputs := cases.inputs(model, batch=2))
    with pytest.raises(InputError, match=says), applied(model, edits, torch.tensor(routing)):
        pass
    with pytest.raises(InputError, match="single one"), applied(model, edits[0], torch.tensor([0, -1])):
        pass
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("few", [0, 4])
def test_indices_on_a_device_are_not_read_and_those_beyond_the_edits_fail_there(few, monkeypatch):
    monkeypatch.setattr("mendlm.apply.FEW", few)
    _, _, edits = setting("llama", 2)
    require_indices(torch.empty(2, dtype=torch.long, device="meta"), 2)  # a number of "meta" cannot be read
    for update in edits.updates.values():
        with pytest.raises(IndexError):
            _route(update, torch.tensor([0, 2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_routing_never_waits_for_the_device(device, few, monkeypatch):
    monkeypatch.setattr("mendlm.apply.FEW", few)
    update = LowRank(torch.randn(2, 3, 4, device="cuda"), torch.randn(2, 3, 5, device="cuda"))
    x, routing = torch.randn(3, 6, 4, device="cuda"), torch.tensor([1, -1, 0], device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _require_routing(routing, update)
        found = _route(update, routing)(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    own = update.dense().mT
    assert_close(found, torch.stack([x[0] @ own[1], torch.zeros_like(found[1]), x[2] @ own[0]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", [None, torch.tensor([0, 1]), torch.eye(2).bool()])
def test_a_batch_of_edits_does_not_spread_over_a_wrong_number_of_rows(routing):
    model, _, edits = setting("llama", 2)
    with applied(model, edits, routing), pytest.raises(InputError, match=r"3 rows.*2 edits"):
        model(**cases.inputs(model, batch=3, tokens=6))
