"""Record what a layer's weight gradient is made of, without touching any weight or `.grad`.

A forward hook keeps the layer's input `u` and the gradient edge of its output; `torch.autograd.grad` then gives every
`delta` at once. On a frozen model the graph starts at the lowest recorded layer, so backward stops there. The clone
keeps an in-place activation right after the layer from destroying the edge.

Knows layers and rows; knows no text, no loss and no method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mendlm.errors import LayerError
from mendlm.layers import LayerSpec, make_differentiable
from mendlm.lowrank import LowRank

Gradient = dict[str, LowRank]
"""Layer name -> rows of that layer's weight gradient."""


class Recording:
    """The layers' inputs and gradient edges of the passes run inside `record`."""

    def __init__(self, specs: Sequence[LayerSpec], *, differentiable: bool = False) -> None:
        self.specs, self.differentiable = tuple(specs), differentiable
        self._calls: dict[str, list[tuple[Tensor, GradientEdge]]] = {spec.name: [] for spec in specs}

    def _keep(self, name: str, u: Tensor, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_()
        self._calls[name].append((u if self.differentiable else u.detach(), get_gradient_edge(output)))
        return output.clone()

    def gradient(self, loss: Float[Tensor, ""], size: int | None = None) -> Gradient:
        """The gradient of a scalar loss for every recorded layer, as rows; frees the graph.

        By default all tokens are rows of one matrix, `LowRank` (tokens, d), which equals autograd's weight gradient.
        With `size`, the number of examples in the batch, there is one matrix an example: (size, tokens, d).
        The rows are on the loss's device, wherever the layers are.
        Raises `LayerError` if a recorded layer did not run.
        """
        silent = [name for name, calls in self._calls.items() if not calls]
        if silent:
            raise LayerError(f"the forward pass never reached {', '.join(silent)}; choose layers that it uses")
        edges = [edge for calls in self._calls.values() for _, edge in calls]
        deltas = iter(torch.autograd.grad(loss, edges, allow_unused=True, create_graph=self.differentiable))
        gradient: Gradient = {}
        for spec in self.specs:
            parts = []
            for u, _ in self._calls[spec.name]:
                delta = next(deltas)
                delta = u.new_zeros(*u.shape[:-1], spec.d_out) if delta is None else delta
                lead = (size, -1) if size is not None else (-1,)
                rows = LowRank(u.reshape(*lead, spec.d_in), delta.reshape(*lead, spec.d_out))
                parts.append(rows.to(loss.device))
            gradient[spec.name] = sum(parts[1:], start=parts[0])
        return gradient


@contextlib.contextmanager
def record(model: nn.Module, layers: Sequence[LayerSpec], *, differentiable: bool = False) -> Iterator[Recording]:
    """Record the given layers during the forward passes inside the block.

        with record(model, select(model, ["*.mlp.down_proj"])) as recording:
            loss = model(**inputs, labels=labels).loss
        gradient = recording.gradient(loss)

    With `differentiable`, the rows are functions of what the pass depended on, for gradients of gradients; else constants.
    Works on frozen models and on models that are being trained. Gradient checkpointing, which would run layers twice,
    is off inside the block.
    """
    recording = Recording(layers, differentiable=differentiable)
    make_differentiable(model)
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]

    def hook_for(name: str) -> Any:
        return lambda module, args, output: recording._keep(name, args[0], output)

    with contextlib.ExitStack() as stack:
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", False)  # noqa: B010
            stack.callback(setattr, module, "gradient_checkpointing", True)
        for spec in layers:
            stack.callback(model.get_submodule(spec.name).register_forward_hook(hook_for(spec.name)).remove)
        stack.enter_context(torch.enable_grad())
        yield recording
