"""Fine-tuning on the request itself: the yardstick.

A few steps of RMSprop, Adam or SGD on the edited layers until every target token is the argmax, as the paper's FT. The
dense change is a parameter of the overlay, so no weight is touched, and the trunk runs once for all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mendlm.apply import Edit, applied, join
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.losses import token_nll
from mendlm.lowrank import LowRank
from mendlm.methods.base import Method
from mendlm.replay import Trunk
from mendlm.text import Batch, scored_logits

_OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """How to fine-tune. The defaults are the paper's optimiser and limit, at a rate that suits small models."""

    layers: tuple[str, ...] = ()
    """Patterns of the layers to change; empty: the paper's choice for the architecture."""
    rate: float = 1e-4
    """Learning rate; the paper has 5e-6 for GPT, 1e-4 for T5, 1e-6 for its small models."""
    steps: int = 100
    """The most steps; it stops as soon as every target token is the argmax."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0:
            raise InputError(f"fine-tuning needs steps of at least 1 and a rate above 0, got {self.steps} and {self.rate}")


class FineTune(Method):
    """Fine-tuning on the exact prompt, one request at a time."""

    name = "ft"

    def __init__(self, specs: Sequence[LayerSpec], config: FineTuneConfig | None = None) -> None:
        self.specs = tuple(specs)
        self.config = config or FineTuneConfig()

    def edit(self, model: Any, batch: Batch) -> Edit:
        """One edit for each example, as dense updates (`u = I`)."""
        return join([self._edit_one(model, _example(batch, index)) for index in range(batch.size)])

    def _edit_one(self, model: Any, batch: Batch) -> Edit:
        trunk = Trunk.below(model, self.specs)
        zeros = {spec.name: torch.zeros(spec.d_out, spec.d_in, device=model.device) for spec in self.specs}
        updates = {name: LowRank.from_dense(zero) for name, zero in zeros.items()}
        changes = [update.delta.requires_grad_() for update in updates.values()]
        edit = Edit(updates, frozenset(spec.name for spec in self.specs if spec.transposed))
        optimizer = _OPTIMIZERS[self.config.optimizer](changes, lr=self.config.rate)
        tape = trunk.run(model, batch.inputs)
        for _ in range(self.config.steps):
            with torch.enable_grad(), trunk.replay(tape), applied(model, edit):
                logits = scored_logits(model, batch)
                loss = token_nll(logits, batch.label, batch.row, batch.size).sum()
            if bool((logits.argmax(-1) == batch.label).all()):
                break
            for change, slope in zip(changes, torch.autograd.grad(loss, changes), strict=True):
                change.grad = slope
            optimizer.step()
        return edit.detach()._map(lambda update: LowRank(update.u[None], update.delta[None]))


def _example(batch: Batch, index: int) -> Batch:
    """One example of a batch, as a batch of one, without its padding."""
    inputs: dict[str, Tensor] = {name: tensor[index : index + 1] for name, tensor in batch.inputs.items()}
    for prefix in ("", "decoder_"):
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is not None:
            length = int(mask.sum())
            for name in (f"{prefix}input_ids", f"{prefix}attention_mask"):
                inputs[name] = inputs[name][:, :length]
    mine = batch.row == index
    return Batch(inputs, batch.row[mine] * 0, batch.column[mine], batch.label[mine], batch.is_end[mine], 1)
