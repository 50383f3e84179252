"""Slow, obviously right versions of what mendlm computes cleverly: dense matrices, one token at a time, real weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mendlm.apply import Edit
from mendlm.layers import LayerSpec
from mendlm.losses import bernoulli_nll
from mendlm.lowrank import LowRank
from mendlm.methods.mend import Mend
from mendlm.text import Batch


def stored(model: Any, spec: LayerSpec, change: Tensor) -> Tensor:
    """The layer's parameter, as it is stored, after adding a (d_out, d_in) change."""
    weight = model.get_submodule(spec.name).weight
    return weight + (change.mT if spec.transposed else change).to(weight.dtype)


def run_dense(model: Any, specs: Iterable[LayerSpec], changes: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits with dense weight changes, by `torch.func.functional_call`."""
    weights = {f"{spec.name}.weight": stored(model, spec, changes[spec.name]) for spec in specs}
    return torch.func.functional_call(model, weights, kwargs={**inputs, "use_cache": False}).logits


def changed(model: Any, specs: Iterable[LayerSpec], changes: Mapping[str, Tensor]) -> Any:
    """A copy of the model whose weights really are changed."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for spec in specs:
            model.get_submodule(spec.name).weight.copy_(stored(model, spec, changes[spec.name]))
    return model


def weight_gradients(model: Any, specs: Iterable[LayerSpec], loss_of: Any, *args: Any) -> dict[str, Tensor]:
    """Autograd's weight gradients of `loss_of(model, *args)`, on a copy, as (d_out, d_in)."""
    model = copy.deepcopy(model)
    weights = {spec: model.get_submodule(spec.name).weight.requires_grad_(True) for spec in specs}
    loss_of(model, *args).backward()
    return {spec.name: weight.grad.mT if spec.transposed else weight.grad for spec, weight in weights.items()}


def alone(batch: Batch, index: int) -> Batch:
    """One example of a batch, without its padding."""
    inputs = {}
    for prefix in ("", "decoder_"):
        if f"{prefix}input_ids" in batch.inputs:
            length = int(batch.inputs[f"{prefix}attention_mask"][index].sum())
            for name in (f"{prefix}input_ids", f"{prefix}attention_mask"):
                inputs[name] = batch.inputs[name][index : index + 1, :length]
    mine = (batch.row == index).nonzero().flatten()
    return Batch(inputs, torch.zeros_like(mine), batch.column[mine], batch.label[mine], batch.is_end[mine], 1)


def nll(model: Any, batch: Batch) -> Tensor:
    """The sum over examples of the mean NLL of their targets, from the full logits; a single logit's is Bernoulli's."""
    logits = model(**batch.inputs, use_cache=False).logits
    if logits.shape[-1] == 1:
        return bernoulli_nll(logits[:, 0], batch.label.to(logits.dtype)).sum()
    if logits.dim() == 2:
        return F.cross_entropy(logits, batch.label, reduction="sum")
    logits = logits[batch.row, batch.column]
    return sum(F.cross_entropy(logits[batch.row == i], batch.label[batch.row == i]) for i in range(batch.size))


def welford(rows: Iterable[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Mean, standard deviation (n - 1) and count, one row at a time."""
    count, mean, squares = 0, 0.0, 0.0
    for row in rows:
        count += 1
        shift = row - mean
        mean = mean + shift / count
        squares = squares + shift * (row - mean)
    return mean, (squares / max(count - 1, 1)) ** 0.5, count


def token_pairs(update: LowRank) -> list[tuple[Tensor, Tensor]]:
    """The pairs (u, delta) of a matrix or a batch of them, without those where a factor is all zero."""
    pairs = zip(update.u.flatten(0, -2), update.delta.flatten(0, -2), strict=True)
    return [(u, delta) for u, delta in pairs if u.any() and delta.any()]


def mend(editor: Mend, fitted: Sequence[dict[str, LowRank]], gradient: dict[str, LowRank]) -> dict[str, Tensor]:
    """MEND's weight changes for one example's gradient, token by token and layer by layer; `fitted`: for the statistics."""
    config, specs = editor.config, editor.specs
    groups = {spec: spec.shape if config.shared else spec.name for spec in specs}
    changes = {}
    for number, spec in enumerate(specs):
        mates = [mate for mate in specs if groups[mate] == groups[spec]]
        net = list(editor.nets.values())[list(dict.fromkeys(groups.values())).index(groups[spec])]
        mean, std = 0.0, 1.0
        if config.normalize:
            rows = [torch.cat(pair) for given in fitted for mate in mates for pair in token_pairs(given[mate.name])]
            mean, std, _ = welford(rows)
        which = config.inputs
        if which == "smaller":
            which = "u" if spec.d_in <= spec.d_out else "delta"
        place = mates.index(spec)
        total = torch.zeros(spec.d_out, spec.d_in, dtype=editor.log_rates.dtype)
        for u, delta in token_pairs(gradient[spec.name]):
            z = (torch.cat([u, delta]) - mean) / std
            u, delta = z[: spec.d_in], z[spec.d_in :]
            z = {"both": z, "u": u, "delta": delta}[which]
            s, o = net.scale[:, place], net.shift[:, place]
            h = z + F.relu(s[0] * (net.U[0] @ net.V[0] @ z + net.b) + o[0])
            g = h + F.relu(s[1] * (net.U[1] @ net.V[1] @ h) + o[1])
            if which == "both":
                u, delta = g[: spec.d_in], g[spec.d_in :]
            else:
                u, delta = (g, delta) if which == "u" else (u, g)
            total = total + torch.outer(delta, u)
        changes[spec.name] = -editor.log_rates[number].exp() * total
    return changes


def fine_tune(
    model: Any, specs: Sequence[LayerSpec], batch: Batch, optimizer: Any, steps: int
) -> tuple[dict[str, Tensor], int]:
    """Fine-tuning of real weights on one example; the weight changes and the number of steps taken."""
    tuned = copy.deepcopy(model)
    weights = [tuned.get_submodule(spec.name).weight.requires_grad_(True) for spec in specs]
    stepper = optimizer(weights)
    for done in range(steps + 1):
        logits = tuned(**batch.inputs, use_cache=False).logits[batch.row, batch.column]
        if done == steps or (logits.argmax(-1) == batch.label).all():
            break
        stepper.zero_grad()
        F.cross_entropy(logits, batch.label).backward()
        stepper.step()
    changes = {}
    for spec, weight in zip(specs, weights, strict=True):
        change = (weight - model.get_submodule(spec.name).weight).detach()
        changes[spec.name] = change.mT if spec.transposed else change
    return changes, done


def kl(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """KL(p || q), term by term."""
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def random_edit(specs: Iterable[LayerSpec], rng: torch.Generator, *batch: int, rows: int = 2, size: float = 0.5) -> Edit:
    """Random updates of the given layers, strong enough to change what a tiny model says."""
    updates = {}
    for spec in specs:
        u = torch.randn(*batch, rows, spec.d_in, generator=rng)
        updates[spec.name] = LowRank(u, size * torch.randn(*batch, rows, spec.d_out, generator=rng))
    return Edit(updates, frozenset(spec.name for spec in specs if spec.transposed))


def dense(edit: Edit) -> dict[str, Tensor]:
    """An edit as weight changes."""
    return {name: update.dense() for name, update in edit.updates.items()}
