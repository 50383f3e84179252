"""What an editing method is, and what one is that learns."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mendlm.apply import Edit, Intervention, join
from mendlm.errors import InputError, LayerError
from mendlm.layers import LayerSpec, editable
from mendlm.losses import token_nll
from mendlm.methods.refine import Pass, refined
from mendlm.models import as_device, device_of, is_sharded
from mendlm.recording import Gradient, record
from mendlm.replay import Trunk
from mendlm.text import Batch, Encoded, Formatter, by_length, scored_logits, short_attention, tensor_on

Group = tuple[Sequence[int], Callable[[], Edit]]
"""Requests by number, and the function that makes their parts."""


class Method(ABC):
    """An algorithm that turns requests into a change of the model."""

    name: ClassVar[str]
    """What the command line and result files call the method."""
    edits_weights: ClassVar[bool] = True
    """Whether `edit` gives an `Edit`, which has rows; else it gives another intervention, with `grouped` as an `Edit` has."""

    runs_model: ClassVar[bool] = True
    """Whether an edit takes a pass of the model; else it takes no time of its own, and costs where something is asked."""

    @property
    def follows_along(self) -> bool:
        """Whether its statistics keep updating while editing, so that an edit depends on those made before it."""
        return False

    @property
    def refine(self) -> int:
        """The most steps by which an edit that has not taken is refined (`mendlm.methods.refine`); by most methods, none."""
        return 0

    @abstractmethod
    def edit(self, model: Any, batch: Batch) -> Intervention:
        """One independent edit for each example of the batch (a batched `Edit`, for methods that edit weights).

        Recorded on the model as it runs now: under the edits that are active around the call. Weights and `.grad` of the
        model are left alone.
        """

    def edits(self, model: Any, batch: Batch) -> Edit:
        """As `edit`, for those that need rows. Raises `InputError` for a method that does not edit weights."""
        found = self.edit(model, batch)
        if not isinstance(found, Edit):
            raise InputError(f"the method '{self.name}' does not edit weights, so that its edits cannot be kept or summed")
        return found

    def parts(self, model: Any, batch: Batch) -> Edit:
        """What `combine` makes edits of, one part for each example: for most methods, finished edits."""
        return self.edits(model, batch)

    def combine(self, parts: Edit, size: int) -> Edit:
        """One edit for each `size` consecutive parts, for requests that are edited at once: here their sum."""
        return parts.grouped(size)

    def together(self, groups: Sequence[Group], size: int) -> list[tuple[list[int], Edit]]:
        """One edit for each `size` consecutive requests: batches of edits, each with the numbers of those it holds, in order.

        Each group names its requests, and makes their parts when called. Single requests stay in their groups, and so without
        padding to the longest of all.
        """
        if size == 1:
            return [(list(requests), self.combine(make(), 1)) for requests, make in groups]
        edits = self.combine(in_order([(requests, make()) for requests, make in groups]), size)
        return [(list(range(len(edits))), edits)]

    def require_fit(self, model: nn.Module) -> None:  # noqa: B027
        """Raise `InputError` where the method cannot work on the model; most work on any."""

    def changed_base(self) -> Edit | None:
        """What the method has changed of the model itself. Its edits are made and used on top of that; most have none."""
        return None


class Learned(nn.Module, Method):
    """A method with parameters of its own, which `mendlm.train` trains. Untrained until then."""

    learning_rate: ClassVar[float]
    """A rate of Adam that suits the parameters."""
    works_apart: ClassVar[bool] = False
    """Whether its parameters may be on another device than the model."""
    needs_whole_base: ClassVar[bool] = False
    """Whether it uses weights outside the model's own passes, and so cannot do with a base that is split over processes."""

    def __init__(self, specs: Sequence[LayerSpec], config: Any) -> None:
        super().__init__()
        self.specs, self.config = tuple(specs), config
        if not self.specs:
            raise LayerError("an editor needs at least one layer to edit")

    @classmethod
    def for_model(cls, model: Any, specs: Sequence[LayerSpec], config: Any) -> Learned:
        """An untrained method for a model, from which it may read a size that its configuration must hold."""
        return cls(specs, config)

    def beside(self, model: Any, device: str | torch.device | None = None) -> Self:
        """Move to where the model takes its inputs, or to another device: rows then travel there, and edits come back.

        Raises `InputError` for a device that is not there, and for a method that does not work apart from its model.
        """
        home = device_of(model)
        where = home if device is None else as_device(device)
        if where != home and not self.works_apart:
            raise InputError(
                f"the method '{self.name}' works on its model's device, {home}, not on '{where}'; leave the editor's "
                "device out, or use mend or malmen"
            )
        return self.to(where)

    @abstractmethod
    def parts(self, model: Any, batch: Batch) -> Edit:
        """What `combine` makes edits of, one part for each example; both are differentiable in the method's parameters."""

    @torch.no_grad()
    def edit(self, model: Any, batch: Batch) -> Edit:
        """One edit for each example: one forward pass and one backward pass down to the lowest edited layer."""
        return self.combine(self.parts(model, batch), 1)

    def prepare(self, model: Any, batch: Batch) -> None:
        """See some training requests before the first step."""

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Bring together what several processes have seen by `prepare`; `total` sums a tensor over all of them."""

    def rates(self) -> list[nn.Parameter]:
        """The parameters that are logarithms of step sizes and the like: they learn at a rate of their own."""
        return []

    def record(
        self, model: Any, batch: Batch, *, differentiable: bool = False
    ) -> tuple[Gradient, Float[Tensor, "scored vocab"]]:
        """The gradient of each example's NLL for the method's layers, one matrix an example; and the scored logits."""
        with record(model, self.specs, differentiable=differentiable) as recording:
            with short_attention(model, batch):
                logits = scored_logits(model, batch)
            loss = token_nll(logits, batch.label, batch.row, batch.size).sum()
        return recording.gradient(loss, batch.size), logits.detach()

    def gradient(self, model: Any, batch: Batch) -> Gradient:
        """The gradient of each example's NLL for the method's layers, one matrix an example."""
        return self.record(model, batch)[0]

    def require_fit(self, model: nn.Module) -> None:
        """Raise `LayerError` unless the model has all of the editor's layers in their shapes, and its weights at hand."""
        if self.needs_whole_base and is_sharded(model):
            raise LayerError(
                f"the method '{self.name}' needs the whole base in each process, but its weights are split; "
                "use mend or malmen, or spread the model by the device map 'auto'"
            )
        available = editable(model)
        for spec in self.specs:
            found = available.get(spec.name)
            if found is None or found.shape != spec.shape:
                has = "has no such layer" if found is None else f"has it in shape {found.shape}"
                raise LayerError(
                    f"the editor was trained for '{spec.name}' of shape {spec.shape}, but this model {has}; "
                    "use the model it was trained for, or train an editor for this one"
                )


@torch.no_grad()
def edits_of(
    method: Method, model: Any, formatter: Formatter, texts: Sequence[Encoded], size: int, limit: int, scale: float = 1.0
) -> Edit:
    """One edit for each `size` consecutive texts, in their order and at this strength, refined where the method says so.

    Refining comes after the strength, and leaves edits of a negative one alone, which are to take something away.
    Made in batches of at most `limit` texts of like length.
    """
    steps = method.refine if scale > 0 else 0
    trunk = Trunk.where_possible(model, method.specs) if steps and isinstance(method, Learned) else Trunk(())
    seen: dict[int, Pass] = {}

    def made(make: Callable[[Any, Batch], Edit], group: list[int]) -> Edit:
        batch = formatter.batch([texts[i] for i in group])
        with trunk.record() as tape:
            edits = make(model, batch)
        seen[group[0]] = group, batch, tape  # a method may make a group twice
        return edits

    groups = by_length([len(text) for text in texts], limit=limit)
    if size == 1:
        edits = in_order([(group, made(method.edits, group)) for group in groups])
    else:
        edits = in_order(method.together([(group, functools.partial(made, method.parts, group)) for group in groups], size))
    return refined(model, formatter, edits * scale, texts, steps, trunk, list(seen.values()))


def in_order(batches: Sequence[tuple[Sequence[int], Edit]]) -> Edit:
    """Batches of edits, each with its edits' numbers, as one batch in the order of the numbers."""
    edits = join([batch for _, batch in batches])
    order = tensor_on(edits.tensors()[0].device, [number for numbers, _ in batches for number in numbers])
    return edits[order.argsort()]


def transposed(specs: Sequence[LayerSpec]) -> frozenset[str]:
    """The names of the layers whose weights are stored (d_in, d_out), as an `Edit` wants them."""
    return frozenset(spec.name for spec in specs if spec.transposed)
