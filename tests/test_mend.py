import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import cases
import oracles
from mendlm.apply import applied
from mendlm.errors import InputError, LayerError
from mendlm.layers import default_layers, select
from mendlm.methods.mend import Mend, MendConfig
from mendlm.methods.network import EditorNet, Normalizer

CHOICES = [
    {},
    {"shared": False},
    {"normalize": False},
    {"inputs": "u"},
    {"inputs": "delta"},
    {"inputs": "smaller"},
    {"inputs": "smaller", "shared": False, "normalize": False},
    {"init": "xavier"},
]


@functools.cache
def double(case):
    return copy.deepcopy(cases.tiny(case)).double()


def make(model, specs=None, *, perturbed=False, fit=2, **options):
    """A float64 editor, and the gradients that its statistics have seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        editor = Mend(specs or default_layers(model), MendConfig(rank=3, **options)).double()
        if perturbed:
            for parameter in editor.parameters():
                nn.init.normal_(parameter, 0, 0.3)
    seen = [editor.gradient(model, cases.requests(model, rng=cases.generator(10 + i))) for i in range(fit)]
    for gradient in seen:
        editor.fit_normalizer(gradient)
    return editor, seen


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize("case", ["gpt2", "llama", "t5"])
def test_edits_are_the_papers_formula_token_by_token(case, options):
    model = double(case)
    editor, seen = make(model, perturbed=True, **options)
    gradient = editor.gradient(model, cases.requests(model))
    edits = editor.transform(gradient)
    for i in range(3):
        expected = oracles.mend(editor, seen, {name: rows[i] for name, rows in gradient.items()})
        for name, change in expected.items():
            assert_close(edits.updates[name][i].dense(), change, rtol=1e-7, atol=1e-9)
    assert edits.transposed == (frozenset(edits.updates) if case == "gpt2" else frozenset())


@pytest.mark.parametrize("case", cases.GENERATORS)
def test_an_untrained_editor_is_normalised_gradient_descent(case):
    model = double(case)
    editor, seen = make(model)
    gradient = editor.gradient(model, cases.requests(model))
    edits = editor.transform(gradient).detach()
    spec = editor.specs[0]
    mates = [mate for mate in editor.specs if mate.shape == spec.shape]
    rows = [torch.cat(pair) for g in seen for mate in mates for pair in oracles.token_pairs(g[mate.name])]
    mean, std, _ = oracles.welford(rows)
    for i in range(3):
        normed = [(torch.cat(pair) - mean) / std for pair in oracles.token_pairs(gradient[spec.name][i])]
        total = sum(torch.outer(z[spec.d_in :], z[: spec.d_in]) for z in normed)
        assert_close(edits.updates[spec.name][i].dense(), -5e-4 * total, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("case", cases.GENERATORS)
def test_without_normalisation_it_is_exact_descent_and_lowers_the_loss(case):
    model, batch = double(case), cases.requests(double(case))
    editor, _ = make(model, normalize=False, initial_rate=1e-3)
    edits = editor.edit(model, batch)
    for i in range(batch.size):
        single = oracles.alone(batch, i)
        exact = oracles.weight_gradients(model, editor.specs, oracles.nll, single)
        for name, gradient in exact.items():
            assert_close(edits.updates[name][i].dense(), -1e-3 * gradient, rtol=1e-6, atol=1e-10)
        with applied(model, edits[i]):
            edited = oracles.nll(model, single)
        assert edited < oracles.nll(model, single)


@pytest.mark.parametrize("case", cases.GENERATORS)
def test_a_normalised_step_points_down_and_lowers_the_loss(case):
    model, batch = double(case), cases.requests(double(case), batch=6)
    editor, _ = make(model, initial_rate=1e-4)
    gradient = editor.gradient(model, batch)
    edits = editor.transform(gradient).detach()
    slope = sum(update.dot(gradient[name]) for name, update in edits.updates.items())
    assert slope.sum() < 0
    before = oracles.nll(model, batch)
    with applied(model, edits):
        assert oracles.nll(model, batch) < before


class Outer(nn.Module):
    """The outer loss of an editor's parameters, for edits made from fixed gradients."""

    def __init__(self, editor, model, gradient, batch):
        super().__init__()
        self.editor, self.rest = editor, (model, gradient, batch)

    def forward(self):
        model, gradient, batch = self.rest
        with applied(model, self.editor.transform(gradient)):
            return oracles.nll(model, batch)


# Not T5 or Llama: their norms compute in float32, too coarse for finite differences.
@pytest.mark.parametrize("case", ["gpt2", "bart"])
def test_meta_gradient_passes_gradcheck(case):
    model = double(case)
    specs = select(model, ["2.mlp.c_fc", "3.mlp.c_fc"] if case == "gpt2" else ["encoder.layers.2.fc1", "decoder.layers.2.fc1"])
    editor, _ = make(model, specs, perturbed=True)
    batch = cases.requests(model, batch=2, tokens=4)
    outer = Outer(editor, model, editor.gradient(model, batch), batch)
    names = [name for name, _ in outer.named_parameters()]
    values = tuple(value.detach().clone().requires_grad_() for value in outer.parameters())
    assert {name.split(".")[-1] for name in names} == {"U", "V", "b", "scale", "shift", "log_rates"}

    def loss(*given):
        return torch.func.functional_call(outer, dict(zip(names, given, strict=True)), ())

    assert all(slope.any() for slope in torch.autograd.grad(loss(*values), values))
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_gradients_of_the_parameters_are_those_of_the_papers_formula(options):
    model = double("llama")
    editor, seen = make(model, perturbed=True, **options)
    gradient, rng = editor.gradient(model, cases.requests(model)), cases.generator()
    edits = editor.transform(gradient)
    wanted = {name: torch.randn(3, *update.shape, dtype=torch.float64, generator=rng) for name, update in edits.updates.items()}
    slopes = torch.autograd.grad(
        sum((edits.updates[name].dense() * w).sum() for name, w in wanted.items()), editor.parameters()
    )
    total = 0.0
    for i in range(3):
        expected = oracles.mend(editor, seen, {name: rows[i] for name, rows in gradient.items()})
        total = total + sum((expected[name] * w[i]).sum() for name, w in wanted.items())
    for slope, exact in zip(slopes, torch.autograd.grad(total, editor.parameters()), strict=True):
        assert exact.any()
        assert_close(slope, exact, rtol=1e-6, atol=1e-8 * exact.abs().max().item())


def test_u_moves_at_the_first_step_of_training():
    model = double("gpt2")
    editor, _ = make(model)
    before = {name: net.U.detach().clone() for name, net in editor.nets.items()}
    assert not any(U.any() for U in before.values())
    batch = cases.requests(model)
    optimizer = torch.optim.SGD(editor.parameters(), lr=1.0)
    Outer(editor, model, editor.gradient(model, batch), batch)().backward()
    optimizer.step()
    for name, net in editor.nets.items():
        assert all((net.U[block] != before[name][block]).any() for block in range(2))
    assert all(parameter.grad is None for parameter in model.parameters())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 10**6))
def test_statistics_of_chunks_are_those_of_one_row_at_a_time(chunks, seed):
    rng = torch.Generator().manual_seed(seed)
    given = [torch.randn(2, n, 4, generator=rng, dtype=torch.float64) * 3 + 100 for n in chunks]
    counts = [torch.rand(2, n, generator=rng) < 0.7 for n in chunks]
    parts, whole = Normalizer(4).double(), Normalizer(4).double()
    for z, mask in zip(given, counts, strict=True):
        parts.update(torch.where(mask[..., None], z, 0), mask)
    whole.update(torch.cat(given, 1), torch.cat(counts, 1))
    rows = [row for z, mask in zip(given, counts, strict=True) for row in z[mask]]
    mean, std, count = oracles.welford(rows)
    assert parts.count == whole.count == count
    for one, other in zip(parts.state_dict().values(), whole.state_dict().values(), strict=True):
        assert_close(one, other)
    if count > 1:
        assert_close(parts.mean, mean)
        assert_close(parts(given[0]), (given[0] - mean) / std)


def test_float32_statistics_stay_close_over_many_batches():
    rng = cases.generator(1)
    normalizer, rows = Normalizer(6), []
    for _ in range(50):
        rows.append(torch.randn(7, 6, generator=rng) * 10 ** torch.linspace(-2, 3, 6) + 1)
        normalizer.update(rows[-1], torch.ones(7, dtype=torch.bool))
    mean, std, _ = oracles.welford(torch.cat(rows).double())
    z = rows[0].double()
    assert_close(normalizer(rows[0]), ((z - mean) / std).float(), rtol=1e-3, atol=1e-3)


def test_statistics_go_on_after_a_round_trip_and_a_constant_dimension_is_zero():
    rng = cases.generator(2)
    first, second = torch.randn(5, 3, generator=rng), torch.randn(4, 3, generator=rng)
    first[:, 1] = second[:, 1] = 2.5
    every = torch.ones(5, dtype=torch.bool)
    one = Normalizer(3)
    one.update(first, every)
    other = Normalizer(3)
    other.load_state_dict(one.state_dict())
    for normalizer in (one, other):
        normalizer.update(second, every[:4])
    assert torch.equal(one(first), other(first))
    assert other.count == 9
    assert one(first).isfinite().all()
    assert not one(first)[:, 1].any()


@pytest.mark.parametrize("follows", [False, True])
def test_statistics_change_while_editing_only_if_asked(follows):
    model = double("gpt2")
    editor, _ = make(model, normalizer_follows=follows)
    before = copy.deepcopy(editor.normalizers.state_dict())
    batch = cases.requests(model)
    editor.parts(model, batch)  # as training does
    editor.edit(model, batch)
    reference = Mend(editor.specs, editor.config).double()
    reference.normalizers.load_state_dict(before)
    if follows:
        reference.fit_normalizer(editor.gradient(model, batch))
    for one, other in zip(editor.normalizers.state_dict().values(), reference.normalizers.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", cases.GENERATORS)
def test_padding_comes_out_zero_and_each_example_is_as_alone(case):
    model, batch = double(case), cases.requests(double(case))
    editor, _ = make(model, perturbed=True)
    edits = editor.edit(model, batch)
    for i in range(batch.size):
        single = editor.edit(model, oracles.alone(batch, i))
        for name, update in edits.updates.items():
            side = "decoder_" if "decoder_input_ids" in batch.inputs and "decoder" in name else ""
            length = batch.inputs[f"{side}attention_mask"][i].sum()
            assert not update.u[i, length:].any()
            assert not update.delta[i, length:].any()
            assert_close(update[i].dense(), single.updates[name][0].dense(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_takes_products_in_the_precision_of_the_base_and_edits_in_float32(dtype):
    model = copy.deepcopy(cases.tiny("llama")).to(dtype)
    editor, seen = make(model, perturbed=True)
    exact, gradient = [{name: rows.to(torch.float64) for name, rows in one.items()} for one in seen], seen[0]
    expected = oracles.mend(editor, exact, {name: rows[0] for name, rows in exact[0].items()})
    editor.float()
    with torch.no_grad():
        made = editor.transform(gradient)
    trained = editor.transform(gradient)
    (slope,) = torch.autograd.grad(sum(t.square().sum() for t in trained.tensors()), [next(editor.parameters())])
    assert slope.dtype == torch.float32
    for name, change in expected.items():
        one, other = (edits.updates[name][0].dense() for edits in (made, trained))
        assert_close(one, change.float(), rtol=1e-4, atol=1e-5 * change.abs().max().item())
        assert torch.equal(other, one) == (dtype == torch.float32)
        assert_close(other, one, rtol=0.02, atol=0.02 * one.abs().max().item())


def test_networks_are_shared_by_shape_and_rates_are_per_layer():
    model = cases.tiny("gpt2")
    shared, single = Mend(default_layers(model)), Mend(default_layers(model), MendConfig(shared=False))
    assert list(shared.nets) == ["24x16", "16x24"]
    assert [net.scale.shape for net in shared.nets.values()] == [(2, 3, 40)] * 2
    assert len(single.nets) == len(single.log_rates) == len(shared.log_rates) == 6
    seen = {which: MendConfig(inputs=which) for which in ("u", "delta", "smaller")}
    widths = {which: [net.b.numel() for net in Mend(default_layers(model), c).nets.values()] for which, c in seen.items()}
    assert widths == {"u": [16, 24], "delta": [24, 16], "smaller": [16, 16]}


def test_only_the_identity_start_leaves_its_input_alone():
    z = torch.randn(2, 5, 8, generator=cases.generator())
    rows = {1: (z.clone, torch.ones(2, 5, dtype=torch.bool))}
    assert torch.equal(EditorNet(8, 2, 3, "identity")(rows, slice(0, 8))[0], z)
    assert not torch.equal(EditorNet(8, 2, 3, "xavier")(rows, slice(0, 8))[0], z)


def test_an_editor_fits_only_its_model():
    editor = Mend(default_layers(cases.tiny("llama")))
    editor.require_fit(cases.tiny("llama"))
    with pytest.raises(LayerError, match=r"'model\.layers\.1\.mlp\.gate_proj'.*has no such layer"):
        editor.require_fit(cases.tiny("gpt2"))
    wider = copy.deepcopy(cases.tiny("llama"))
    wider.model.layers[2].mlp.up_proj = nn.Linear(16, 25, bias=False)
    with pytest.raises(LayerError, match=r"of shape \(24, 16\), but this model has it in shape \(25, 16\)"):
        editor.require_fit(wider)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        MendConfig(rank=0)
    with pytest.raises(InputError, match=r"initial_rate must be above 0, got -1"):
        MendConfig(initial_rate=-1.0)
    with pytest.raises(LayerError, match="at least one layer"):
        Mend([])
