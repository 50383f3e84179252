"""Slow, obviously right versions of what mendlm computes cleverly: dense matrices, one token at a time, real weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from mendlm.apply import Edit
from mendlm.layers import LayerSpec
from mendlm.lowrank import LowRank
from mendlm.methods.cache import CERTAIN
from mendlm.methods.enn import Enn
from mendlm.methods.knowledge_editor import KnowledgeEditor
from mendlm.methods.malmen import Malmen
from mendlm.methods.mend import Mend
from mendlm.methods.network import RowEditor
from mendlm.text import Batch, Encoded, Formatter
from mendlm.training import Drawn, TrainConfig


def stored(model: Any, spec: LayerSpec, change: Tensor) -> Tensor:
    """The layer's parameter, as it is stored, after adding a (d_out, d_in) change."""
    weight = model.get_submodule(spec.name).weight
    return weight + (change.mT if spec.transposed else change).to(weight.dtype)


def as_stored(model: Any, specs: Iterable[LayerSpec], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers' parameters by name, after adding (d_out, d_in) changes."""
    return {f"{spec.name}.weight": stored(model, spec, changes[spec.name]) for spec in specs}


def run_dense(model: Any, specs: Iterable[LayerSpec], changes: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits with dense weight changes, by `torch.func.functional_call`."""
    return functional_call(model, as_stored(model, specs, changes), kwargs={**inputs, "use_cache": False}).logits


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


def one_text(model: Any, form: Formatter, text: Encoded) -> tuple[dict[str, Tensor], slice]:
    """Unpadded inputs, and where the logits of the target are (without one: of the prompt's end)."""
    count = max(1, len(text.target))
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[*form.start, *text.target[:-1]]])
        first = len(form.start) - 1
        return {"input_ids": torch.tensor([text.prompt]), "decoder_input_ids": decoder}, slice(first, first + count)
    first = len(text.prompt) - 1
    return {"input_ids": torch.tensor([[*text.prompt, *text.target[:-1]]])}, slice(first, first + count)


def outer_loss(model: Any, form: Formatter, drawn: Sequence[Drawn], config: TrainConfig, weights_of: Any) -> dict[str, Tensor]:
    """The outer loss and its parts, one text at a time, by full forward passes with dense weights.

    `weights_of(texts)` gives the changed weights by name, for the requests that are edited at once.
    """
    sums = dict.fromkeys(("edit_loss", "locality_loss", "success", "generality", "locality"), torch.zeros(()))
    k = config.num_edits
    for index, one in enumerate(drawn):
        if index % k == 0:
            weights = weights_of([d.edit for d in drawn[index : index + k]])
        for name, text in (("success", one.edit), ("generality", one.rephrasing)):
            inputs, places = one_text(model, form, text)
            logits = functional_call(model, weights, kwargs={**inputs, "use_cache": False}).logits[0, places]
            target = torch.tensor(text.target)
            nll = -logits.log_softmax(-1).gather(1, target[:, None])
            sums["edit_loss"] = sums["edit_loss"] + 0.5 * (nll.sum() if config.whole_target else nll.mean())
            counted = len(target) - text.ended
            sums[name] = sums[name] + float(logits.argmax(-1)[:counted].equal(target[:counted]))
        if one.unrelated is not None:
            inputs, places = one_text(model, form, one.unrelated)
            base = model(**inputs, use_cache=False).logits[0, places]
            logits = functional_call(model, weights, kwargs={**inputs, "use_cache": False}).logits[0, places]
            kl = F.kl_div(logits.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            scale = config.locality_scale
            sums["locality_loss"] = sums["locality_loss"] + (scale * (1 + kl / scale).log() if scale else kl).mean()
            sums["locality"] = sums["locality"] + float(logits.argmax(-1).equal(base.argmax(-1)))
    sums["loss"] = config.edit_weight * sums["edit_loss"] + config.locality_weight * sums["locality_loss"]
    return sums


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


def steps(
    editor: RowEditor, fitted: Sequence[dict[str, LowRank]], gradient: dict[str, LowRank]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Layer -> for each of its tokens, `u` and the step `-alpha delta~ u~^T`; `fitted` is what the statistics are of."""
    config, specs = editor.config, editor.specs
    groups = {spec: spec.shape if config.shared else spec.name for spec in specs}
    found = {}
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
        found[spec.name] = []
        for own, delta in token_pairs(gradient[spec.name]):
            z = (torch.cat([own, delta]) - mean) / std
            u, delta = z[: spec.d_in], z[spec.d_in :]
            z = {"both": z, "u": u, "delta": delta}[which]
            s, o = net.scale[:, place], net.shift[:, place]
            h = z + F.relu(s[0] * (net.U[0] @ net.V[0] @ z + net.b) + o[0])
            g = h + F.relu(s[1] * (net.U[1] @ net.V[1] @ h) + o[1])
            if which == "both":
                u, delta = g[: spec.d_in], g[spec.d_in :]
            else:
                u, delta = (g, delta) if which == "u" else (u, g)
            found[spec.name].append((own, -editor.log_rates[number].exp() * torch.outer(delta, u)))
    return found


def mend(editor: Mend, fitted: Sequence[dict[str, LowRank]], gradient: dict[str, LowRank]) -> dict[str, Tensor]:
    """MEND's weight changes for one example's gradient, token by token and layer by layer."""
    found = steps(editor, fitted, gradient)
    zeros = {spec.name: torch.zeros(spec.d_out, spec.d_in, dtype=editor.log_rates.dtype) for spec in editor.specs}
    return {name: sum((step for _, step in found[name]), start=zero) for name, zero in zeros.items()}


def malmen(editor: Malmen, fitted: Sequence[dict[str, LowRank]], gradients: Sequence[dict[str, LowRank]]) -> dict[str, Tensor]:
    """MALMEN's weight changes for requests edited at once: `min |dW u_j - step_j u_j|^2 + lambda |dW|^2` by lstsq."""
    found = [steps(editor, fitted, gradient) for gradient in gradients]
    changes = {}
    for number, spec in enumerate(editor.specs):
        tokens = [token for one in found for token in one[spec.name]]
        keys = torch.stack([u for u, _ in tokens])
        wanted = torch.stack([step @ u for u, step in tokens])
        ridge = (0.5 * editor.log_damping[number]).exp() * torch.eye(spec.d_in, dtype=keys.dtype)
        both = torch.cat([wanted, wanted.new_zeros(spec.d_in, spec.d_out)])
        changes[spec.name] = torch.linalg.lstsq(torch.cat([keys, ridge]), both).solution.mT
    return changes


def knowledge_editor(
    editor: KnowledgeEditor, model: Any, text: Encoded, old: Tensor, gradient: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """KnowledgeEditor's weight changes for one request, with dense gradients."""
    kinds = ([*text.prompt], old.tolist(), [*text.target])
    words = torch.cat([model.get_input_embeddings()(torch.tensor(ids)) + editor.kinds.weight[k] for k, ids in enumerate(kinds)])
    out, _ = editor.reader(words[None])
    hidden = out.shape[-1] // 2
    state = torch.cat([out[0, -1, :hidden], out[0, 0, hidden:]])
    changes = {}
    for spec, head in zip(editor.specs, editor.heads, strict=True):
        a, c, b, d, s = head(state).split([spec.d_out, spec.d_out, spec.d_in, spec.d_in, 1])
        mask, shift = torch.outer(a.softmax(0), b), torch.outer(c.softmax(0), d)
        changes[spec.name] = -s.sigmoid() * (gradient[spec.name] * mask + shift)
    return changes


def enn(editor: Enn, model: Any, form: Formatter, texts: Sequence[Encoded]) -> dict[str, Tensor]:
    """The weights under ENN's edits of some requests at once, `W + C - sum alpha G(W + C)`, with dense gradients."""
    base = as_stored(model, editor.specs, {spec.name: c for spec, c in zip(editor.specs, editor.changes, strict=True)})
    weights = dict(base)
    for text in texts:
        inputs, places = one_text(model, form, text)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            logits = functional_call(model, base, kwargs={**inputs, "use_cache": False}).logits[0, places]
        loss = F.cross_entropy(logits, torch.tensor(text.target))
        slopes = torch.autograd.grad(loss, list(base.values()), create_graph=True)
        for name, rate, slope in zip(base, editor.log_rates.exp(), slopes, strict=True):
            weights[name] = weights[name] - rate * slope
    return weights


def prompt(model: Any, form: Formatter, fact: Sequence[int], text: Encoded) -> Tensor:
    """The target's logits of one text with the fact written into it."""
    inputs, places = one_text(model, form, Encoded((*fact, *text.prompt), text.target, text.ended))
    with torch.no_grad():
        return model(**inputs).logits[0, places]


def state_and_logits(model: Any, form: Formatter, text: Encoded) -> tuple[Tensor, Tensor]:
    """What the head reads and says at the target's places, of one text alone."""
    read: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    inputs, places = one_text(model, form, text)
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        handle.remove()
    return read[0][0, places], logits[0, places]


def cache(model: Any, form: Formatter, known: Encoded, asked: Encoded, radius: float) -> tuple[Tensor, list[int]]:
    """The logits of a text under the memory of another, state by state and key by key; the tokens it says, -1 for none."""
    keys, _ = state_and_logits(model, form, known)
    states, logits = state_and_logits(model, form, asked)
    said = []
    for place, state in enumerate(states):
        away = [float((state - key).norm() / key.norm()) for key in keys]
        best = min(range(len(away)), key=away.__getitem__)
        said.append(known.target[best] if away[best] <= radius else -1)
        if said[-1] >= 0:
            logits[place] = 0
            logits[place, said[-1]] = CERTAIN
    return logits, said


def fine_tune(
    model: Any,
    specs: Sequence[LayerSpec],
    batch: Batch,
    optimizer: Any,
    steps: int,
    *,
    stop_nll: float | None = None,
    others: Sequence[Batch] = (),
    weights_of_losses: tuple[float, float] = (1.0, 0.0),
) -> tuple[dict[str, Tensor], int]:
    """Fine-tuning of real weights on one example; the weight changes and the number of steps taken.

    Stops when every target token is the argmax, or at a mean NLL. The loss is `c_e NLL + c_kl KL`, the latter from the
    base on one of the other texts a step.
    """
    tuned, (c_e, c_kl) = copy.deepcopy(model), weights_of_losses
    weights = [tuned.get_submodule(spec.name).weight.requires_grad_(True) for spec in specs]
    stepper = optimizer(weights)
    for done in range(steps + 1):
        logits = tuned(**batch.inputs, use_cache=False).logits[batch.row, batch.column]
        loss = F.cross_entropy(logits, batch.label)
        right = (logits.argmax(-1) == batch.label).all()
        if done == steps or (right if stop_nll is None else loss <= stop_nll):
            break
        loss = c_e * loss
        if others:
            other = others[done % len(others)]
            base, now = (m(**other.inputs, use_cache=False).logits[other.row, other.column] for m in (model, tuned))
            loss = loss + c_kl * F.kl_div(now.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="batchmean")
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    changes = {}
    for spec, weight in zip(specs, weights, strict=True):
        change = (weight - model.get_submodule(spec.name).weight).detach()
        changes[spec.name] = change.mT if spec.transposed else change
    return changes, done


def lora(
    model: Any, specs: Sequence[LayerSpec], batch: Batch, rank: int, rate: float, steps: int
) -> tuple[dict[str, Tensor], int]:
    """Adam on the factors of `W + B A` on one example, B from zero; the weight changes and the number of steps taken."""
    factors = {}
    for spec in specs:
        a = torch.randn(rank, spec.d_in, generator=torch.Generator().manual_seed(0)) / spec.d_in**0.5
        factors[spec.name] = torch.zeros(spec.d_out, rank).requires_grad_(), a.requires_grad_()
    stepper = torch.optim.Adam([factor for pair in factors.values() for factor in pair], lr=rate)
    for done in range(steps + 1):
        changes = {name: b @ a for name, (b, a) in factors.items()}
        logits = run_dense(model, specs, changes, batch.inputs)[batch.row, batch.column]
        if done == steps or (logits.argmax(-1) == batch.label).all():
            break
        stepper.zero_grad()
        F.cross_entropy(logits, batch.label).backward()
        stepper.step()
    return {name: change.detach() for name, change in changes.items()}, done


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


def bernoulli_nll(logits: Tensor, label: Tensor) -> Tensor:
    """`-log p(y)` of a binary label under one logit."""
    return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")


def bernoulli_kl(base: Tensor, edited: Tensor) -> Tensor:
    """The KL between two Bernoulli distributions given by their logits."""
    p = base.sigmoid()
    return p * (F.logsigmoid(base) - F.logsigmoid(edited)) + (1 - p) * (F.logsigmoid(-base) - F.logsigmoid(-edited))
