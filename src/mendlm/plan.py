"""What training an editor takes, before a weight is loaded: bytes and operations.

The training step itself runs here, on fake tensors, which have shapes and no memory. Every storage that is born and dies is
counted, and every matrix product; so a plan needs no model of the code, and cannot drift from it.

Knows nothing of files and devices; prints nothing.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mendlm.errors import InputError
from mendlm.layers import choose
from mendlm.methods import method_types
from mendlm.methods.base import Learned
from mendlm.models import weight_bytes
from mendlm.replay import Trunk
from mendlm.text import Encoded, Formatter
from mendlm.training import Drawn, TrainConfig, descend

CARDS = (16, 24, 48, 80)
"""Sizes of cards that a plan is held against, in GB of 10^9 bytes."""
PLANNED = ("mend", "malmen", "enn")
"""The methods whose training is planned; KnowledgeEditor's reads the texts, and a plan has none."""
BASES: dict[str, str | None] = {"bf16": None, "int8": "int8", "nf4": "nf4"}
"""The forms of a base that are planned, and what its blocks are quantised to."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a request's texts: those of CounterFact and Natural Questions in a Llama-like vocabulary, rounded up."""

    edit: int = 14
    rephrasing: int = 26
    unrelated: int = 24
    target: int = 3
    scored: int = 8
    """Tokens of the unrelated answer that are scored."""


@dataclass(frozen=True)
class Plan:
    """Bytes, and operations: two for each product of two numbers."""

    base: int
    """The frozen model."""
    editor: int
    """The editor's parameters and statistics."""
    optimizer: int
    """Adam's two moments of them."""
    step: int
    """The most that a training step holds beside these: activations, logits, edits and gradients."""
    flops: float
    """A training step's operations, per request."""
    edit_flops: float
    """A single edit's operations."""

    @property
    def total(self) -> int:
        """The peak of training."""
        return self.base + self.editor + self.optimizer + self.step

    def fits(self) -> tuple[int, ...]:
        """The cards of `CARDS` that hold it, with a tenth left for the allocator and the library's own needs."""
        return tuple(card for card in CARDS if self.total <= 0.9 * card * 1e9)

    def figures(self) -> dict[str, Any]:
        """All of it, as results files and `--json` have it: bytes, operations, and cards in GB."""
        return {**asdict(self), "total": self.total, "fits_gb": list(self.fits())}


class Counted(TorchDispatchMode):
    """Counts the bytes of all tensors that come to life inside the block: `now`, and their `peak`; and operations, `flops`.

    A storage counts once, however many views it has, and until its last owner lets it go. Those of `known` tensors do not.
    An operation counts by torch's own formulas, two for each product of two numbers.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._held = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._held}

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def formatter_of(model: Any) -> Formatter:
    """A formatter for `texts`, with as much of a tokenizer as token ids need."""
    ids = {"pad_token_id": model.config.pad_token_id, "eos_token_id": 0, "model_max_length": 1 << 30}
    return Formatter.of(model, types.SimpleNamespace(**ids))


def texts(count: int, lengths: Lengths, family: str) -> list[Drawn]:
    """As many requests of the given lengths, of token ids that mean nothing."""

    def text(length: int, target: int) -> Encoded:
        return Encoded((1,) * length, (0,) if family == "classifier" else (1,) * target)

    unrelated = text(lengths.unrelated - lengths.scored, lengths.scored)
    one = Drawn(text(lengths.edit, lengths.target), text(lengths.rephrasing, lengths.target), unrelated)
    return [one] * count


def step(
    method: Learned,
    model: Any,
    formatter: Formatter,
    optimizer: torch.optim.Optimizer,
    drawn: list[Drawn],
    config: TrainConfig,
) -> None:
    """One training step, as `mendlm.train` makes it, of texts that are drawn already."""
    descend(method, model, formatter, Trunk.where_possible(model, method.specs), optimizer, drawn, config, len(drawn))


def plans(
    model: Any,
    patterns: tuple[str, ...] = (),
    *,
    method: str = "mend",
    rank: int = 256,
    num_edits: int = 1,
    batch_size: int = 64,
    micro_batch_size: int | None = None,
    lengths: Lengths | None = None,
) -> dict[str, Plan]:
    """The plans of training an editor for a model, which may be `mendlm.models.skeleton`'s, by the form of its base.

    `patterns` as in `mendlm.layers.choose`, whose errors it raises; `method` is one of `PLANNED`, else an `InputError`; `rank`
    is that of methods that have one; `num_edits` requests of the `batch_size` are edited at once. The step runs once, on the
    base in bf16; the bytes of the other forms are computed, and a quantised base de-quantises one matrix at a time.
    """
    if method not in PLANNED:
        raise InputError(f"no training is planned for '{method}'; choose one of {', '.join(PLANNED)}")
    specs, lengths, (kind, settings) = choose(model, patterns), lengths or Lengths(), method_types(method)
    config = TrainConfig(batch_size=batch_size, micro_batch_size=micro_batch_size, num_edits=num_edits)
    formatter = formatter_of(model)
    with fake_mode(model):
        editor = kind(specs, settings(rank=rank) if hasattr(settings, "rank") else settings())
        optimizer = torch.optim.Adam(editor.parameters())
        drawn = texts(batch_size, lengths, formatter.family)
        for parameter in editor.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes Adam's moments
        optimizer.zero_grad()
        moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
        mine = [*editor.parameters(), *editor.buffers()]
        with Counted([*model.parameters(), *model.buffers(), *mine, *moments]) as seen:
            step(editor, model, formatter, optimizer, drawn, config)
        with Counted() as once:
            editor.edit(model, formatter.batch([drawn[0].edit]))
    largest = max(2 * spec.d_out * spec.d_in for spec in specs)
    work = {"flops": seen.flops / batch_size, "edit_flops": once.flops}
    return {
        base: Plan(
            base=weight_bytes(model, quantize),
            editor=_bytes(mine),
            optimizer=_bytes(moments),
            step=seen.peak + (largest if quantize else 0),
            **work,
        )
        for base, quantize in BASES.items()
    }


def can_be_kept(model: Any, trunk: Trunk) -> bool:
    """Whether a trunk cache can keep what the trunk of a skeleton gives: of one stack of blocks, hidden states alone."""
    formatter = formatter_of(model)
    with fake_mode(model):
        tape = trunk.run(model, formatter.batch([texts(1, Lengths(), formatter.family)[0].edit]).inputs)
    return len(tape) == 1 and isinstance(tape[0], Tensor)


def fake_mode(model: nn.Module) -> FakeTensorMode:
    """The mode that a skeleton's weights were made in; a new one for a model of real weights, which are then faked."""
    weight = next(model.parameters())
    mode: FakeTensorMode = getattr(weight, "fake_mode", None) or FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
