"""A cache of hidden states: where the model's state is near one that it had before an edited answer, it says that answer.

For each token of a request's target, the hidden state that predicts it is a key and the token its value. Wherever a later state
is within a radius of a key, the logits are the value's. No weight changes; what is near is what the model finds near,
whether or not the fact is the same: the paper's warning about such memories.

The state is what the output embedding reads, and for a classifier the mean of its encoder's last states over a text.

Legend: `keys` (edits, tokens, d); `values` (edits, tokens), -1 where there is none; `routing` says which row of a batch runs
under which edit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mendlm.apply import require_indices
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.methods.base import Method
from mendlm.text import NO_LABEL, Batch, scored_logits

CERTAIN = 1e4
"""The logit of an answer from the cache, all others being 0: certain even where a model scales its logits down."""
TOGETHER = 32
"""Texts a pass, at most, when states are looked up."""
DIGIT, DIGITS = 128, 3
"""Token ids travel in digits that every floating-point type holds exactly, for up to two million tokens."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """When a state counts as known."""

    radius: float = 0.4
    """The largest distance from a key, as a share of the key's norm."""

    def __post_init__(self) -> None:
        if not 0 <= self.radius < float("inf"):
            raise InputError(f"radius must be 0 or a positive finite number, got {self.radius}")


class Cache(Method):
    """Remembers each request's states and answers."""

    name = "cache"
    edits_weights = False

    def __init__(self, config: CacheConfig | None = None) -> None:
        self.specs: tuple[LayerSpec, ...] = ()
        self.config = config or CacheConfig()

    @torch.no_grad()
    def edit(self, model: Any, batch: Batch) -> Memory:
        """One memory for each example of the batch. Raises `InputError` where the states are not finite."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for start in range(0, batch.size, TOGETHER):
            part = batch.part(start, min(start + TOGETHER, batch.size))
            kept = part.label != NO_LABEL
            states, label = self._states(model, part), part.label[kept]
            state = states[kept.to(states.device)]  # a device map may have the head on another card than the texts
            if not bool(state.isfinite().all()):
                raise InputError("the model's states are not finite; make a cache's edits outside of another's, in float32")
            counts = torch.bincount(part.row[kept], minlength=part.size).tolist()
            keys += torch.split(state, counts)
            values += torch.split(label, counts)
        pad = nn.utils.rnn.pad_sequence
        return Memory(pad(keys, batch_first=True), pad(values, batch_first=True, padding_value=-1), self.config.radius)

    def _states(self, model: Any, batch: Batch) -> Float[Tensor, "scored d"]:
        """The state behind each scored position."""
        head = model.get_output_embeddings()
        states: list[Tensor] = []
        if head is not None:
            handle = head.register_forward_hook(lambda module, args, output: states.append(args[0]))
        else:
            handle = _on_means(model, lambda means: states.append(means[batch.row.to(means.device)]))
        try:
            scored_logits(model, batch)
        finally:
            handle.remove()
        return states[-1]


@dataclass(frozen=True, eq=False)
class Memory:
    """States and the tokens that answer there, those of one edit a row."""

    keys: Float[Tensor, "edits tokens d"]
    values: Int[Tensor, "edits tokens"]
    radius: float

    def grouped(self, size: int) -> Memory:
        """Each `size` consecutive memories as one."""
        groups = len(self.keys) // size
        return Memory(self.keys.reshape(groups, -1, self.keys.shape[-1]), self.values.reshape(groups, -1), self.radius)

    def answers(self, states: Float[Tensor, "rows tokens d"], routing: Tensor | None) -> Int[Tensor, "rows tokens"]:
        """The token of the nearest key within the radius, for each state; -1 where there is none.

        With beams, each row of the routing serves a run of rows.
        """
        kept, labels = self.keys.to(states.device), self.values.to(states.device)
        routing = torch.arange(len(kept), device=states.device) if routing is None else routing
        require_indices(routing, len(kept))
        routing = routing.to(states.device, non_blocking=True)
        if len(states) % len(routing):
            raise InputError(f"{len(states)} rows of input do not divide among {len(routing)} rows of routing")
        routing = routing.repeat_interleave(len(states) // len(routing))
        keys, values = kept[routing.clamp(min=0)].float(), labels[routing.clamp(min=0)]
        away = torch.cdist(states.float(), keys, compute_mode="donot_use_mm_for_euclid_dist") / keys.norm(dim=-1).unsqueeze(1)
        away = away.masked_fill((values < 0).unsqueeze(1), float("inf"))
        nearest, place = away.min(-1)
        known = (nearest <= self.radius) & (routing >= 0).unsqueeze(1)
        return values.gather(1, place).where(known, -1)

    @contextlib.contextmanager
    def on(self, model: Any, routing: Tensor | None = None) -> Iterator[None]:
        """Run the model with the memory that `routing` names for each row, -1 for none; by default row i has memory i."""
        head = model.get_output_embeddings()
        found: list[Tensor] = []

        def mark(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_marked(args[0], self.answers(args[0], routing)), *args[1:])

        def say(module: Any, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return _saying(logits, _marks(args[0]).to(logits.device))

        def label(module: Any, args: Any, output: Any) -> Any:
            said = self.answers(found.pop().unsqueeze(1), routing)[:, 0]
            output.logits = _saying(output.logits, said.to(output.logits.device))
            return output

        with contextlib.ExitStack() as stack:
            if head is not None:
                stack.callback(head.register_forward_pre_hook(mark).remove)
                stack.callback(head.register_forward_hook(say).remove)
            else:
                stack.callback(_on_means(model, found.append).remove)
                stack.callback(model.register_forward_hook(label).remove)
            yield


def _on_means(model: Any, look: Callable[[Tensor], object]) -> Any:
    """Call `look` with the mean of a classifier's last states over each text, (rows, d), in every pass."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        weight = kwargs["attention_mask"].to(output[0].device).unsqueeze(-1).float()
        look((output[0].float() * weight).sum(1) / weight.sum(1))

    return model.base_model.register_forward_hook(hook, with_kwargs=True)


def _marked(states: Tensor, answers: Tensor) -> Tensor:
    """States that carry their answer, infinity before its digits: whoever gathers positions for the head takes it along."""
    digits = torch.stack([answers // DIGIT**place % DIGIT for place in range(DIGITS)], -1).to(states.dtype)
    infinity = torch.full_like(states[..., :1], float("inf"))
    carried = torch.cat([infinity, digits, states[..., 1 + DIGITS :]], -1)
    return carried.where((answers >= 0).unsqueeze(-1), states.masked_fill(states == float("inf"), float("nan")))


def _marks(states: Tensor) -> Tensor:
    """The answers that states carry; -1 where there is none."""
    token = sum(states[..., 1 + place].nan_to_num().long() * DIGIT**place for place in range(DIGITS))
    return torch.as_tensor(token).where(states[..., 0] == float("inf"), -1)


def _saying(logits: Tensor, answers: Tensor) -> Tensor:
    """Logits that are certain of the answers where there are any."""
    token = answers.clamp(min=0).unsqueeze(-1)
    single = logits.shape[-1] == 1  # a logit z that stands for [0, z]
    certain = (2.0 * token - 1) * CERTAIN if single else torch.zeros_like(logits).scatter(-1, token, CERTAIN)
    return certain.to(logits.dtype).where((answers >= 0).unsqueeze(-1), logits)
