"""`Edit`, and the two ways to run a model with one: as an overlay, or merged into the weights.

The overlay is a forward hook that adds `(x @ u.mT) @ delta` to the layer's output. No weight changes, so leaving it is
bit-exact; each row of a batch may carry its own edit; gradients flow back to whatever made the rows.
Hooks belong to the process: one thread owns a model.

Legend: `u` (*batch, rows, d_in), `delta` (*batch, rows, d_out); `routing` says which row of a batch runs under which edit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mendlm import adapter
from mendlm.errors import FormatError, InputError, LayerError, NumericalError
from mendlm.layers import LayerSpec, dequantized, make_differentiable, quantized, spec_of
from mendlm.lowrank import LowRank, concatenate, stack, total
from mendlm.models import device_of, identity

CHANGED_BASE = "changed_base"
"""What an edit's `about` has if its rows hold its method's change of the base, too: the `Edit.id` of that change."""
FEW = 4
"""Up to so many edits, each row of a batch meets the rows of all and keeps its own: cheaper than a copy of them for each."""


class Intervention(Protocol):
    """A change of how a model answers. `with intervention.on(model):` is the one way to run a changed model."""

    def on(self, model: nn.Module, routing: Tensor | None = None) -> contextlib.AbstractContextManager[None]:
        """Run the model changed inside the block; `routing` as in `applied`."""
        ...


@dataclass(frozen=True, eq=False)
class Edit:
    """What is *added* to a few layers: `W + delta.mT @ u`, minus sign and learned rate already inside `delta`.

    `updates` maps layer name -> `LowRank`; with a batch axis, there is one edit per example. `transposed` names the
    layers whose weights are stored (d_in, d_out), which an adapter file must say. `about` is JSON: request, editor, base.
    """

    updates: Mapping[str, LowRank]
    transposed: frozenset[str] = frozenset()
    about: Mapping[str, Any] = field(default_factory=dict)

    def on(self, model: nn.Module, routing: Tensor | None = None) -> contextlib.AbstractContextManager[None]:
        """Run the model with this edit inside the block, as `applied`."""
        return applied(model, self, routing)

    def _map(self, function: Callable[[LowRank], LowRank]) -> Edit:
        return replace(self, updates={name: function(update) for name, update in self.updates.items()})

    def __add__(self, other: Edit) -> Edit:
        """Both edits together, as `stacked`."""
        return stacked([self, other])

    def __mul__(self, factor: float) -> Edit:
        """The edit at another strength."""
        return self._map(lambda update: update * factor)

    __rmul__ = __mul__

    def fewest(self) -> Edit:
        """The same edit, each layer's rows as `LowRank.fewest`."""
        return self._map(LowRank.fewest)

    def __getitem__(self, index: int | slice | Tensor) -> Edit:
        """Select from a batch of edits."""
        return self._map(lambda update: update[index])

    def __len__(self) -> int:
        """How many edits the batch holds; a single edit has no length and raises `TypeError`."""
        batch = next(iter(self.updates.values())).batch
        if not batch:
            raise TypeError("this is a single edit, not a batch of edits")
        return batch[0]

    def to(self, target: torch.device | torch.dtype | str) -> Edit:
        """All rows on another device or in another dtype."""
        return self._map(lambda update: update.to(target))

    def detach(self) -> Edit:
        """The same edit outside any graph."""
        return self._map(LowRank.detach)

    def leaves(self) -> Edit:
        """The same edit outside any graph, as the start of a new one: what required a gradient does so again."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        return self._map(lambda update: LowRank(leaf(update.u), leaf(update.delta)))

    def tensors(self) -> list[Tensor]:
        """The rows of all layers, `u` and `delta` in turn."""
        return [tensor for update in self.updates.values() for tensor in (update.u, update.delta)]

    def grouped(self, size: int) -> Edit:
        """Sum each `size` consecutive edits of a batch: several requests edited at once."""
        return self._map(lambda update: update.grouped(size))

    def unbind(self) -> list[Edit]:
        """A batch's edits one by one, each without its zero rows. The host waits for the device once."""
        kept = {name: update.nonzero() for name, update in self.updates.items()}
        counts = torch.stack([rows.sum(-1) for rows in kept.values()]).tolist()
        order = {name: (~rows).byte().argsort(stable=True) for name, rows in kept.items()}

        def only(index: int) -> Edit:
            updates = {}
            for (name, update), rows in zip(self.updates.items(), counts, strict=True):
                places = order[name][index, : rows[index]]
                updates[name] = LowRank(update.u[index, places], update.delta[index, places])
            return replace(self, updates=updates)

        return [only(index) for index in range(len(self))]

    @property
    def rows(self) -> int:
        """The largest number of rows of any layer."""
        return max(update.rows for update in self.updates.values())

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take."""
        return sum(update.nbytes for update in self.updates.values())

    def require_finite(self) -> Edit:
        """This edit, or `NumericalError` naming the layers with NaN or infinity."""
        finite = torch.stack([update.isfinite() for update in self.updates.values()]).tolist()
        bad = [name for name, good in zip(self.updates, finite, strict=True) if not good]
        if bad:
            raise NumericalError(f"the update of {', '.join(bad)} has NaN or infinite numbers; nothing was edited")
        return self

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the edit as a PEFT LoRA adapter folder plus `edit.json` (see `mendlm.adapter`)."""
        adapter.write(Path(folder), self.updates, self.transposed, self.about, force=force)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None, *, force: bool = False) -> Edit:
        """Read a folder written by `save`, exactly as it was; with a model, onto its device.

        Raises `FormatError` for a corrupt one, and for one made for another base than `model` unless `force`.
        """
        edit = cls(*adapter.read(Path(folder)))
        if model is None:
            return edit
        if not force:
            edit.require_base(model)
        return edit.to(device_of(model))

    @property
    def id(self) -> str:
        """A short name of the edit's content, as its folder has it: the same rows have the same."""
        return adapter.fingerprint(self.updates)

    def to_bytes(self) -> bytes:
        """The exact rows and `about` as the content of one safetensors file, as a store keeps them."""
        return adapter.to_bytes(self.updates, self.transposed, self.about)

    @classmethod
    def from_bytes(cls, content: bytes, name: str = "the edit") -> Edit:
        """Read what `to_bytes` made. Raises `FormatError`, naming it by `name`, for anything else."""
        return cls(*adapter.from_bytes(content, name))

    def require_base(self, model: nn.Module) -> None:
        """Raise `FormatError` if the edit says that it was made for another base model."""
        base = self.about.get("base") or {}
        if base.get("sha256") and base["sha256"] != identity(model):
            raise FormatError(
                f"the edit was made for another base model ({base.get('name')}, sha256 {base['sha256'][:12]}...), "
                f"not for this one ({identity(model)[:12]}...); load that model, or force it"
            )


def stacked(edits: Sequence[Edit]) -> Edit:
    """Edits as one: the rows of all, layer by layer, in their order. Of their provenance it keeps only `CHANGED_BASE`.

    Raises `InputError` if more than one holds its method's change of the base.
    """
    changes = [edit.about[CHANGED_BASE] for edit in edits if edit.about.get(CHANGED_BASE)]
    if len(changes) > 1:
        raise InputError(
            f"{len(changes)} edits hold their method's change of the base, which must not be made twice; use one of them"
        )
    names = dict.fromkeys(name for edit in edits for name in edit.updates)
    updates = {name: total([edit.updates[name] for edit in edits if name in edit.updates]) for name in names}
    transposed = frozenset[str]().union(*(edit.transposed for edit in edits))
    return Edit(updates, transposed, {CHANGED_BASE: changes[0]} if changes else {})


def side_by_side(edits: Sequence[Edit]) -> Edit:
    """Single edits as one batch of them; a layer that one of them lacks is zero there."""
    some = {name: update for edit in edits for name, update in edit.updates.items()}
    none = {name: LowRank(update.u[:0], update.delta[:0]) for name, update in some.items()}
    updates = {name: stack([edit.updates.get(name, none[name]) for edit in edits]) for name in some}
    return Edit(updates, frozenset[str]().union(*(edit.transposed for edit in edits)))


def join(edits: Sequence[Edit]) -> Edit:
    """Batches of edits of the same layers as one longer batch."""
    first = edits[0]
    return replace(first, updates={name: concatenate([edit.updates[name] for edit in edits]) for name in first.updates})


def require_indices(routing: Tensor, edits: int) -> None:
    """Raise `InputError` unless a routing names one of so many edits a row, or -1 for none.

    Indices on another device than the CPU are not read here, since the host would have to wait for them; nor are those of a
    tensor of another kind, which may have no numbers.
    """
    if routing.dim() != 1 or routing.dtype == torch.bool or routing.is_floating_point():
        given = f"a tensor {tuple(routing.shape)} of {routing.dtype}"
        raise InputError(f"routing is {given}; give one integer a row, the index of its edit, or -1 for none")
    readable = routing.device.type == "cpu" and type(routing) is Tensor
    beyond = [i for i in routing.tolist() if not -1 <= i < edits] if readable else []
    if beyond:
        raise InputError(f"routing names edit {beyond[0]}, but they are numbered 0 to {edits - 1}; give -1 for none")


def _require_routing(routing: Tensor, update: LowRank) -> None:
    if not update.batch:
        raise InputError("routing needs a batch of edits; this edit is a single one")
    if routing.dim() == 1 and routing.dtype == torch.bool:
        raise InputError("a boolean routing must be a matrix (rows, edits); for one edit a row give integer indices")
    if routing.dim() != 2:
        return require_indices(routing, update.batch[0])
    if routing.dtype != torch.bool or routing.shape[1] != update.batch[0]:
        given, wanted = f"{tuple(routing.shape)} of {routing.dtype}", f"(rows, {update.batch[0]}) of torch.bool"
        raise InputError(f"routing is a matrix {given}; for these edits give one {wanted}, or one index a row")
    return None


def _route(update: LowRank, routing: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function that a layer's output gains, of its input."""
    if not update.batch:
        return update.apply
    if routing is not None:
        routing = routing.to(update.u.device, non_blocking=True)
    if routing is not None and routing.dim() == 1 and update.batch[0] <= FEW:
        # The first column is none; an index beyond the edits fails on every device, as it does below.
        routing = torch.eye(update.batch[0] + 1, dtype=torch.bool, device=routing.device)[routing.clamp(min=-1) + 1][:, 1:]
    if routing is None or routing.dim() == 1:
        if routing is not None:
            under = routing >= 0
            update = update[routing.clamp(min=0)] * under[:, None, None]
        size = update.batch[0]

        def own(x: Tensor) -> Tensor:
            return update.apply(_shared_out(x, size)).reshape(*x.shape[:-1], update.shape[0])

        return own
    weights = routing.to(update.u.dtype).repeat_interleave(update.rows, dim=1).unsqueeze(1)
    u, delta = update.u.flatten(0, 1), update.delta.flatten(0, 1)

    def several(x: Tensor) -> Tensor:
        rows = _shared_out(x, len(weights)) @ u.mT
        return ((rows * weights) @ delta).reshape(*x.shape[:-1], delta.shape[-1])

    return several


def _shared_out(x: Tensor, size: int) -> Tensor:
    """A layer's input as (size, tokens, d_in); also with beams (k rows a request), and where its tokens come flattened."""
    if len(x) % size:
        raise InputError(
            f"{len(x)} rows of input do not divide among {size} edits or rows of routing; give one edit a row, or a "
            "routing with one entry a row"
        )
    return x.reshape(size, -1, x.shape[-1])


@contextlib.contextmanager
def applied(model: nn.Module, edit: Edit, routing: Tensor | None = None) -> Iterator[None]:
    """Run the model with an edit as an overlay inside the block; afterwards it is as before, to the bit.

    A single edit holds for every row. For a batch of E edits, `routing` says which row of the input runs under which:
    None (row i under edit i; with beams, each run of equal length), an integer tensor (rows,) of edit indices
    with -1 for none, or a boolean matrix (rows, E) for none, one or several.
    Raises `LayerError` if the model lacks a layer of the edit or has it in another shape, and `InputError` for a routing that
    does not fit; indices are checked if they are on the CPU, from where they may serve a model on any device.
    """
    modules = {name: _layer(model, name, update) for name, update in edit.updates.items()}
    if routing is not None:
        for update in edit.updates.values():
            _require_routing(routing, update)
    make_differentiable(model)

    def hook_for(gain: Callable[[Tensor], Tensor], rows: Tensor) -> Any:
        return lambda module, args, output: output + gain(args[0].to(rows)).to(output)

    with contextlib.ExitStack() as stack:
        for name, update in edit.updates.items():
            hook = hook_for(_route(update, routing), update.u)
            stack.callback(modules[name][0].register_forward_hook(hook).remove)
        yield


def _layer(model: nn.Module, name: str, update: LowRank) -> tuple[nn.Module, LayerSpec]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise LayerError(f"the model has no layer '{name}': the edit was made for another model") from None
    spec = spec_of(name, module)
    if spec is None or spec.shape != update.shape:
        found = type(module).__name__ if spec is None else spec.shape
        raise LayerError(f"layer '{name}' is {found} here, but {update.shape} in the edit: it was made for another model")
    return module, spec


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Weights as they were before a merge, and the quantised layers that dense ones replaced."""

    weights: Mapping[str, Tensor]
    layers: Mapping[str, nn.Module] = field(default_factory=dict)

    def restore(self, model: nn.Module) -> None:
        """Put the saved weights and layers back, bit for bit."""
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        with torch.no_grad():
            for name, saved in self.weights.items():
                model.get_submodule(name).get_parameter("weight").copy_(saved)


@dataclass(frozen=True, eq=False)
class MergeReport:
    """What a merge did: `lost` is, per layer, the share of the edit's norm that rounding took; `snapshot` undoes it."""

    lost: Mapping[str, float]
    snapshot: Snapshot


def merge(model: nn.Module, edit: Edit, *, dequantize: bool = False) -> MergeReport:
    """Add a single edit to the weights themselves, in their dtype, and report how much of it survived.

    A bf16 weight has 8 bits: small edits are mostly rounded away. Undo with `report.snapshot.restore(model)`.
    A quantised weight is refused with `LayerError`; with `dequantize` its layer is first replaced by a dense one in the model's
    dtype, which takes the memory of a dense one.
    """
    layers = {name: (*_layer(model, name, update), update) for name, update in edit.updates.items()}
    if any(update.batch for *_, update in layers.values()):
        raise InputError("only a single edit can be merged; select one from the batch")
    packed = {name: module for name, (module, _, _) in layers.items() if quantized(module)}
    if packed and not dequantize:
        name, module = next(iter(packed.items()))
        raise LayerError(
            f"layer '{name}' is quantised ({quantized(module)}): the steps of such a weight are far larger than an edit, which "
            "would be rounded away. Keep the edit beside the weights, as an overlay or as an adapter (edit.save(folder)), or "
            "call merge(..., dequantize=True), which makes the edited layers dense"
        )
    for name, (module, _, _) in layers.items():
        kept = module.get_parameter("weight")
        if kept.is_meta or isinstance(kept, DTensor):
            where = "is not in memory (a device map keeps it elsewhere)" if kept.is_meta else "is split over processes"
            raise LayerError(f"the weight of '{name}' {where}, so nothing can be merged into it; use the edit as an overlay")
    make_differentiable(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    weights = {n: m.get_parameter("weight").detach().clone() for n, (m, _, _) in layers.items() if n not in packed}
    snapshot = Snapshot(weights, packed)
    lost = {}
    try:
        for name, module in packed.items():
            dense = dequantized(module, dtype)
            model.set_submodule(name, dense)
            layers[name] = (dense, *layers[name][1:])
        with torch.no_grad():
            for name, (module, spec, update) in layers.items():
                weight = spec.weight(module)
                precise = torch.promote_types(weight.dtype, torch.float32)
                wanted = update.to(weight.device).to(precise).dense()
                before = weight.to(precise, copy=True)
                weight.copy_(before + wanted)
                norm = wanted.norm().item()
                lost[name] = ((weight - before) - wanted).norm().item() / norm if norm else 0.0
    except BaseException:  # out of memory, Ctrl-C: all layers or none
        snapshot.restore(model)
        raise
    return MergeReport(lost, snapshot)
