"""The fact in the context: what every edit of weights must beat or match.

The request's own prompt and target stand before whatever the model is asked, as tokens that it sees and that are never
scored. No weight changes; every pass grows by the fact's length, and below the edited blocks nothing can be shared.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mendlm.apply import require_indices
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.methods.base import Method
from mendlm.text import NO_LABEL, Batch


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a fact is put into the context."""

    separator: str = "\n"
    """What stands between a fact and what comes after it."""


class Prompt(Method):
    """Puts each request, as it was made, before what is asked. `separator`: that of the configuration, as token ids."""

    name = "prompt"
    edits_weights = False
    runs_model = False

    def __init__(self, config: PromptConfig | None = None, separator: Sequence[int] = ()) -> None:
        self.specs: tuple[LayerSpec, ...] = ()
        self.config, self.separator = config or PromptConfig(), tuple(separator)

    def require_fit(self, model: Any) -> None:
        """Raise `InputError` for a classifier, which has nothing to read an answer from."""
        if model.get_output_embeddings() is None:
            raise InputError("a classifier cannot be told a fact in its context; choose a method that edits weights")

    def edit(self, model: Any, batch: Batch) -> Context:
        """The facts of a batch. Raises `InputError` for a classifier."""
        self.require_fit(model)
        facts = []
        split = model.config.is_encoder_decoder
        for index in range(batch.size):
            mine = (batch.row == index) & (batch.label != NO_LABEL)
            length = int(batch.inputs["attention_mask"][index].sum())
            prompt = batch.inputs["input_ids"][index, : length if split else int(batch.column[mine][0]) + 1].tolist()
            answer, ends = batch.label[mine].tolist(), batch.label[mine & batch.is_end].tolist()
            if split and prompt[-1:] == ends:
                prompt = prompt[:-1]
            if ends and (split or ends[0] not in prompt):  # in a chat it stands between turns, and stays
                answer = answer[:-1]
            facts.append((*prompt, *answer, *self.separator))
        return Context(tuple(facts))


@dataclass(frozen=True)
class Context:
    """Facts as token ids, one text each."""

    facts: tuple[tuple[int, ...], ...]

    def grouped(self, size: int) -> Context:
        """Each `size` consecutive facts as one text."""
        groups = (self.facts[start : start + size] for start in range(0, len(self.facts), size))
        return Context(tuple(sum(group, start=()) for group in groups))

    @contextlib.contextmanager
    def on(self, model: nn.Module, routing: Tensor | None = None) -> Iterator[None]:
        """Run the model with a fact before the text of each row: `routing` names it, -1 for none; by default row i has fact i.

        Logits keep their places. Generation keeps no keys and values inside the block.
        """
        if routing is not None:
            require_indices(routing, len(self.facts))
        places = range(len(self.facts)) if routing is None else routing.tolist()
        inserted = _Inserted(model, [self.facts[place] if place >= 0 else () for place in places])
        config: Any = model.generation_config
        cached, config.use_cache = config.use_cache, False
        try:
            with inserted.hooks():
                yield
        finally:
            config.use_cache = cached


class _Inserted:
    """The hooks that put facts before texts, and give the head the texts' own places.

    Fact and text stand together, with padding on the side where it was: windows and positions count places.
    """

    def __init__(self, model: Any, facts: Sequence[tuple[int, ...]]) -> None:
        self.model, self.facts, self.split = model, facts, model.config.is_encoder_decoder
        self.window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.places = torch.zeros(0, 0, dtype=torch.long)
        """Where the running pass has each place of the texts that were asked, (rows, tokens)."""
        self.length = 0
        """How long its texts are with their facts."""
        self.mask = self.places
        """The mask of its encoder's texts with their facts."""
        self.done = False
        """Whether those have their facts already."""

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Install the hooks for the block."""
        with contextlib.ExitStack() as stack:

            def pre(module: nn.Module, hook: Any) -> None:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

            pre(self.model, self.enter_split if self.split else self.enter)
            if self.split:
                pre(self.model.get_encoder(), self.encode)
                stack.callback(self.model.register_forward_hook(self.leave).remove)
            else:
                pre(self.model.get_output_embeddings(), self.cut)
            yield

    def _joined(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Facts and texts as ids with their mask; with beams each fact serves a run of rows."""
        mask = torch.ones_like(ids) if mask is None else mask
        each = len(ids) // len(self.facts)
        # Where the texts are of one length, a decoder's are set against their end, where it may be asked to go on.
        right = self.split or not bool(mask[:, -1].all())
        facts = [torch.tensor(self.facts[row // each], dtype=ids.dtype, device=ids.device) for row in range(len(ids))]
        texts = [torch.cat([fact, row[kept.bool()]]) for fact, row, kept in zip(facts, ids, mask, strict=True)]
        self.length = max(map(len, texts))
        if self.window is not None and self.length > self.window:
            raise InputError(
                f"a text with its facts has {self.length} tokens, the model's window {self.window}; tell fewer at once"
            )
        joined, shown = ids.new_zeros(len(ids), self.length), mask.new_zeros(len(ids), self.length)
        for row, text in enumerate(texts):
            where = slice(0, len(text)) if right else slice(self.length - len(text), self.length)
            joined[row, where], shown[row, where] = text, 1
        own = torch.arange(ids.shape[1], device=ids.device)
        starts = [len(fact) if right else self.length - ids.shape[1] for fact in facts]
        self.places = (torch.tensor(starts, device=ids.device).unsqueeze(1) + own).clamp(0, self.length - 1)
        return joined, shown

    def enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A decoder's pass begins: the facts stand before the texts."""
        ids, mask = self._joined(kwargs["input_ids"], kwargs.get("attention_mask"))
        kwargs = {name: value for name, value in kwargs.items() if name != "cache_position"}
        kwargs |= {"input_ids": ids, "attention_mask": mask, "use_cache": False, "past_key_values": None}
        if self.takes_positions:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return args, kwargs

    def cut(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The head sees the texts' own places, unless it was to see the last one only."""
        hidden = args[0]
        if hidden.dim() == 3 and hidden.shape[1] == self.length:
            places = self.places.to(hidden.device)  # a device map may have the head on another card
            hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return (hidden, *args[1:]), kwargs

    def enter_split(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A pass of encoder and decoder begins; while generating, the encoder has run already."""
        if kwargs.get("encoder_outputs") is not None:
            return args, {**kwargs, "attention_mask": self.mask}
        args, kwargs = self.encode(module, args, kwargs)
        self.done = True
        return args, kwargs

    def encode(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The encoder runs, by itself or inside a pass that has put the facts in already."""
        if self.done:
            return args, kwargs
        ids, self.mask = self._joined(kwargs["input_ids"], kwargs.get("attention_mask"))
        return args, {**kwargs, "input_ids": ids, "attention_mask": self.mask}

    def leave(self, module: Any, args: Any, output: Any) -> None:
        """The pass is over."""
        self.done = False
