"""Fine-tuning on the request itself: the yardsticks.

Gradient descent on the edited layers until every target token is the argmax (FT). Its variants are values of its fields:

- `ft-kl`: beside `c_e * NLL`, the KL between the base's and the edited model's distributions on one new unrelated text a step;
- `ft-strong`: one matrix, and on until the target is likely, not only the argmax: what later work found stronger;
- `lora`: the change of each matrix is a product of rank r.

The change is a parameter of the overlay, so no weight is touched, the trunk runs once for all steps, and independent requests
are tuned side by side, each with a change of its own that stops when it is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor

from mendlm.apply import Edit, applied, join
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.losses import all_by_row, token_kl, token_nll
from mendlm.lowrank import LowRank
from mendlm.methods.base import Method, transposed
from mendlm.methods.refine import step_others
from mendlm.models import device_of
from mendlm.replay import Trunk
from mendlm.text import Batch, scored_logits, short_attention

TOGETHER = 2**23
"""Numbers tuned side by side, at most: small changes gain from company, large ones lose as much by leaving the caches."""
_OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}

PAPER_RATES = {"paper-gpt": 5e-6, "paper-t5": 1e-4, "paper-small": 1e-6}
"""The paper's rates, for `--set rate=NAME`: of GPT-Neo and GPT-J, of T5, and of its small models BERT, BART and distilGPT-2."""


def _rate(given: Any) -> Any:
    if isinstance(given, str) and given not in PAPER_RATES:
        raise InputError(f"a rate is a number above 0, or one of the paper's by name: {', '.join(PAPER_RATES)}; got '{given}'")
    return PAPER_RATES[given] if isinstance(given, str) else given


Rate = Annotated[float, pydantic.BeforeValidator(_rate)]
"""A learning rate; where settings are read, also the name of one of the paper's."""


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """How to fine-tune. The defaults are the paper's optimiser and limit, at a rate that suits small models."""

    layers: tuple[str, ...] = ()
    """Patterns of the layers to change; empty: the paper's choice for the architecture."""
    last_only: bool = False
    """Change only the last of those layers."""
    rate: Rate = 1e-4
    """Learning rate; the paper's are those of `PAPER_RATES`."""
    steps: int = 100
    """The most steps."""
    optimizer: Literal["rmsprop", "adam", "sgd"] = "rmsprop"
    stop_nll: float | None = None
    """Stop at this mean NLL of the target's tokens; by default as soon as every one of them is the argmax."""
    edit_weight: float = 1.0
    """c_e, the weight of the NLL."""
    kl_weight: float = 0.0
    """Weight of the KL on one unrelated text a step."""
    rank: int | None = None
    """Rank of each matrix's change; none: dense."""

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0:
            raise InputError(f"fine-tuning needs steps of at least 1 and a rate above 0, got {self.steps} and {self.rate}")
        if not self.edit_weight > 0 or not self.kl_weight >= 0:
            raise InputError(f"edit_weight must be above 0 and kl_weight at least 0: {self.edit_weight} and {self.kl_weight}")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class FineTuneKLConfig(FineTuneConfig):
    """FT+KL, with the paper's weights."""

    edit_weight: float = 1e-2
    kl_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FineTuneStrongConfig(FineTuneConfig):
    """The stronger variant."""

    last_only: bool = True
    rate: Rate = 1e-3
    steps: int = 40
    optimizer: Literal["rmsprop", "adam", "sgd"] = "adam"
    stop_nll: float | None = 0.05


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(FineTuneConfig):
    """Low-rank fine-tuning."""

    rank: int | None = 8
    rate: Rate = 1e-2
    steps: int = 20
    optimizer: Literal["rmsprop", "adam", "sgd"] = "adam"


class FineTune(Method):
    """Fine-tuning on the exact prompt. `unrelated` are single texts for the KL, taken in turn, for each edit from the first."""

    def __init__(
        self, specs: Sequence[LayerSpec], config: FineTuneConfig | None = None, unrelated: Sequence[Batch] = ()
    ) -> None:
        self.config = config or FineTuneConfig()
        self.specs = tuple(specs)[-1:] if self.config.last_only else tuple(specs)
        names = {FineTuneKLConfig: "ft-kl", FineTuneStrongConfig: "ft-strong", LoRAConfig: "lora"}
        self.name = names.get(type(self.config), "ft")  # type: ignore[misc]
        if self.config.kl_weight and not unrelated:
            raise InputError(f"the method '{self.name}' watches unrelated texts while it tunes; give it more, by --locality")
        self._unrelated = tuple(unrelated)

    def edit(self, model: Any, batch: Batch) -> Edit:
        """One edit for each example, tuned in turns of as many as `TOGETHER` allows; dense changes have an identity factor."""
        rank, sizes = self.config.rank, [(spec.d_out, spec.d_in) for spec in self.specs]
        numbers = sum(d_out * d_in if rank is None else rank * (d_out + d_in) for d_out, d_in in sizes)
        each = max(1, TOGETHER // numbers)
        parts = [batch.part(start, min(start + each, batch.size)) for start in range(0, batch.size, each)]
        return join([self._tune(model, part) for part in parts])

    def _start(self, spec: LayerSpec, size: int, device: torch.device) -> tuple[LowRank, list[Tensor]]:
        """Changes of zero, one an example, and what of them is tuned."""
        if self.config.rank is None:
            zero = LowRank.from_dense(torch.zeros(size, spec.d_out, spec.d_in, device=device))
            tuned = zero.delta if spec.d_in <= spec.d_out else zero.u
            return zero, [tuned.requires_grad_()]
        rng = torch.Generator().manual_seed(0)
        u = torch.randn(self.config.rank, spec.d_in, generator=rng).to(device) / spec.d_in**0.5
        update = LowRank(u.repeat(size, 1, 1), torch.zeros(size, self.config.rank, spec.d_out, device=device))
        return update, [update.u.requires_grad_(), update.delta.requires_grad_()]

    @torch.enable_grad()
    def _tune(self, model: Any, batch: Batch) -> Edit:
        trunk = Trunk.where_possible(model, self.specs)
        starts = {spec.name: self._start(spec, batch.size, device_of(model)) for spec in self.specs}
        edit = Edit({name: update for name, (update, _) in starts.items()}, transposed(self.specs))
        changes = [tensor for _, tuned in starts.values() for tensor in tuned]
        optimizer = _OPTIMIZERS[self.config.optimizer](changes, lr=self.config.rate)
        tape = trunk.run(model, batch.inputs)
        done = torch.zeros(batch.size, dtype=torch.bool, device=device_of(model))
        unrelated = itertools.cycle(self._unrelated)
        for _ in range(self.config.steps):
            with trunk.replay(tape), applied(model, edit), short_attention(model, batch):
                logits = scored_logits(model, batch)
                nll = token_nll(logits, batch.label, batch.row, batch.size)
            done |= self._done(logits, nll.detach(), batch)
            if bool(done.all()):
                break
            loss = self.config.edit_weight * nll.sum()
            if self.config.kl_weight:
                loss = loss + self.config.kl_weight * self._kl(model, trunk, edit, next(unrelated).repeated(batch.size))
            step_others(optimizer, changes, torch.autograd.grad(loss, changes), done)
        return edit.detach()

    def _done(self, logits: Tensor, nll: Tensor, batch: Batch) -> Tensor:
        if self.config.stop_nll is None:
            return all_by_row(logits.argmax(-1) == batch.label, batch.row, batch.size)
        return nll <= self.config.stop_nll

    def _kl(self, model: Any, trunk: Trunk, edit: Edit, batch: Batch) -> Tensor:
        """The KL of each example's change on its text."""
        with torch.no_grad(), trunk.record() as tape, short_attention(model, batch):
            base = scored_logits(model, batch)
        with trunk.replay(tape), applied(model, edit), short_attention(model, batch):
            edited = scored_logits(model, batch)
        return token_kl(base, edited, batch.row, batch.size).sum()
