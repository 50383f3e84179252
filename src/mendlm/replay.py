"""The trunk: the blocks below the first edited one, which compute the same under any edit. Run once, then replayed.

Recording keeps the output object of the last unedited block. While replaying, every trunk block is a pass-through that
returns the recorded object (in T5 a tuple that also holds position biases). This needs nothing of a model but its
stacks of blocks, and is bit-exact for `use_cache=False`.

In an encoder-decoder the decoder's trunk may be replayed only when the encoder is not edited.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mendlm.errors import ModelError
from mendlm.layers import LayerSpec, block_of, block_stacks, make_differentiable

Tape = list[Any]
"""The recorded output object of each trunk group's last block."""


class _Stop(Exception):
    """Raised by a hook to end a forward pass once the trunk is recorded."""


@dataclass(frozen=True)
class Trunk:
    """Groups of consecutive blocks that no edit reaches; the last block of a group gives the group's output."""

    groups: tuple[tuple[nn.Module, ...], ...]

    @classmethod
    def below(cls, model: nn.Module, layers: Sequence[LayerSpec]) -> Trunk:
        """The trunk below the given layers. Raises `ModelError` for a model whose later blocks read earlier state."""
        config: Any = getattr(model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(text_config, "num_kv_shared_layers", 0):
            raise ModelError(
                f"{type(model).__name__} shares keys and values between blocks, so its trunk cannot be replayed; "
                "set replay=false"
            )
        make_differentiable(model)
        stacks = block_stacks(model)
        first: dict[str, int] = {}
        for spec in layers:
            stack, index = block_of(spec.name, list(stacks))
            first[stack] = min(index, first.get(stack, index))
        groups: list[tuple[nn.Module, ...]] = []
        for name, blocks in stacks.items():  # in the order of execution: an encoder comes before its decoder
            if name in first:
                groups.append(tuple(blocks)[: first[name]])
                break
            if getattr(config, "is_encoder_decoder", False):
                groups.append(tuple(blocks))
        return cls(tuple(group for group in groups if group))

    @classmethod
    def where_possible(cls, model: nn.Module, layers: Sequence[LayerSpec]) -> Trunk:
        """The trunk below the given layers; an empty one, which replays nothing, for a model whose trunk cannot be replayed."""
        try:
            return cls.below(model, layers)
        except ModelError:
            return cls(())

    @contextlib.contextmanager
    def record(self) -> Iterator[Tape]:
        """Keep the trunk's outputs of the one forward pass inside the block."""
        tape: Tape = [None] * len(self.groups)

        def keep(place: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tape[place] = output

            return hook

        with contextlib.ExitStack() as stack:
            for place, group in enumerate(self.groups):
                stack.callback(group[-1].register_forward_hook(keep(place)).remove)
            yield tape

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tape:
        """Run a forward pass only as far as the trunk reaches, without a graph."""
        if not self.groups:
            return []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Stop

        with torch.no_grad(), self.record() as tape:
            handle = self.groups[-1][-1].register_forward_hook(stop)
            try:
                model(**inputs, use_cache=False)
            except _Stop:
                pass
            finally:
                handle.remove()
        return tape

    @contextlib.contextmanager
    def replay(self, tape: Tape) -> Iterator[None]:
        """Inside the block, the trunk's blocks return what was recorded instead of computing.

        The forward pass must have the inputs of the recorded one, and `use_cache=False`.
        """
        with contextlib.ExitStack() as stack:
            for group, recorded in zip(self.groups, tape, strict=True):
                for block in group:
                    stack.enter_context(_returning(block, recorded))
            yield


@contextlib.contextmanager
def _returning(block: nn.Module, recorded: Any) -> Iterator[None]:
    """Shadow a block's `forward`; one that was shadowed before (accelerate does so for device maps) comes back.

    A sharded block is also without its hooks, which would gather its weights for nothing.
    """
    before = block.__dict__.get("forward")
    hooks = block._forward_pre_hooks, block._forward_hooks
    block.forward = lambda *args, **kwargs: recorded
    if isinstance(block, FSDPModule):
        block._forward_pre_hooks, block._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        block._forward_pre_hooks, block._forward_hooks = hooks
        if before is None:
            del block.forward
        else:
            block.forward = before
