"""Batched decoding that streams: each row under its own set of edits, with its own limits, sampling and stop strings.

One prompt is one *row*. All rows of a batch take a step together; a row that has ended leaves, and takes its padding along.
Between two steps the model is as it was: the hooks of the edits are there only while it runs.

Knows a decoder, its formatter and edits; knows no threads, no queue, no session and no HTTP.

Legend: `rows` are those still decoded, `columns` the tokens so far (prompt, padding on its left, answer).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mendlm.apply import Edit, applied, side_by_side
from mendlm.errors import InputError, ModelError
from mendlm.text import Formatter, tensor_on

Reason = Literal["stop", "length"]
MOST_STOPS = 4
"""So many stop strings a row may have."""
BASE = -1
"""The edit of a row that runs under none."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt to be continued, and how. Raises `InputError` for values that cannot be used."""

    prompt: tuple[int, ...]
    """The prompt's token ids, at least one."""
    max_tokens: int
    """The longest answer, in tokens; the model's window may end it earlier."""
    temperature: float = 0.0
    """0: the likeliest token; else the logits are divided by it."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose probabilities sum to at least this (nucleus sampling)."""
    seed: int | None = None
    """With a seed the same answer comes again, whatever else is in the batch. None: another each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these; at most `MOST_STOPS`."""
    edit: int = BASE
    """The index of the row's edit, or `BASE`."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the prompt has no tokens; give the text that the model is to continue")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature must be between 0 (greedy) and 100, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise InputError(f"stop takes at most {MOST_STOPS} strings, none of them empty; got {list(self.stop)}")


@dataclass(frozen=True)
class Progress:
    """What a row has to say after a step: new text, and at its end the reason."""

    row: int
    """The index of the row, as given to `decode`."""
    text: str
    """Text that follows what was said before; never taken back."""
    reason: Reason | None
    """`stop`: the model or a stop string ended the answer; `length`: a limit did; None: it goes on."""
    tokens: int
    """Tokens of the answer so far, without an end-of-sequence token."""


def require_decoder(formatter: Formatter) -> None:
    """Raise `InputError` for a model that does not continue a text."""
    if formatter.family != "causal":
        instead = "its labels" if formatter.family == "classifier" else "its answers"
        raise InputError(
            f"only decoders are served, and this model is a {formatter.family}; ask for {instead} with Session.answer, "
            "or serve a decoder such as Llama's or GPT-2's"
        )


def decode(
    model: Any, formatter: Formatter, rows: Sequence[Row], edits: Sequence[Edit] = (), *, gone: Collection[int] = ()
) -> Iterator[list[Progress]]:
    """Continue all rows together, each under its own edit of `edits` (single ones): after each step, what rows have to say.

    Row indices that the consumer puts into `gone` between steps leave the batch unfinished. A consumer may stop at any time.
    The texts of a row join to the decoded answer, cut before its first stop string. (Where a tokenizer writes bytes as tokens
    of their own, as Llama 2's, and the answer ends within a character, the text keeps the characters before it.)
    Raises `InputError` for a model that is no decoder, a prompt beyond its window, and an edit that is not in `edits`;
    `LayerError` for an edit of another model.
    """
    require_decoder(formatter)
    for row in rows:
        if formatter.window is not None and len(row.prompt) > formatter.window:
            raise InputError(f"a prompt has {len(row.prompt)} tokens, the model's window {formatter.window}; shorten it")
        if not BASE <= row.edit < len(edits):
            raise InputError(f"a row names edit {row.edit}, but they are numbered 0 to {len(edits) - 1}; give {BASE} for none")
    ends = _ends(model, formatter)
    answers = [_Answer(formatter, row, ends) for row in rows]
    batch = _Batch(model, formatter, [row.prompt for row in rows])
    together = side_by_side(edits) if len({row.edit for row in rows}) > 1 else None
    alive = list(range(len(rows)))
    while alive:
        with _under(model, edits, together, [rows[i].edit for i in alive], tokens=batch.ids.shape[1]):
            logits = batch.step()
        tokens = _choose(logits, [answers[i] for i in alive])
        said = [answers[i].add(i, token) for i, token in zip(alive, tokens, strict=True)]
        yield [one for one in said if one.text or one.reason]
        stay = [place for place, one in enumerate(said) if one.reason is None and one.row not in gone]
        alive = [alive[place] for place in stay]
        if alive:
            batch.keep(stay, [tokens[place] for place in stay])


class _Batch:
    """The running batch: what the model is fed next, and its key-value cache."""

    def __init__(self, model: Any, formatter: Formatter, prompts: Sequence[tuple[int, ...]]) -> None:
        self.model, self.device = model, formatter.device
        self.ids, self.mask = formatter.pad([list(prompt) for prompt in prompts], left=True)
        self.positions: Tensor | None = None
        if "position_ids" in inspect.signature(model.forward).parameters:  # else it counts by the mask, as ALiBi does
            self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.blank = [self.ids.shape[1] - len(prompt) for prompt in prompts]
        self.cache: Any = None

    @torch.no_grad()
    def step(self) -> Float[Tensor, "rows vocab"]:
        """Run the model on what is new, and return the logits of each row's next token."""

        # The head sees the last position alone, side by side in memory: see `Formatter.generate`.
        def last(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args[0][:, -1:].contiguous(), *args[1:]

        places = {} if self.positions is None else {"position_ids": self.positions}
        handle = self.model.get_output_embeddings().register_forward_pre_hook(last)
        try:
            out = self.model(input_ids=self.ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **places)
        finally:
            handle.remove()
        self.cache = getattr(out, "past_key_values", None)
        if not isinstance(self.cache, DynamicCache):
            found = type(self.cache).__name__
            raise ModelError(f"{type(self.model).__name__} keeps {found} and no DynamicCache; models like that are not served")
        logits: Tensor = out.logits[:, -1]
        return logits.float()

    def keep(self, stay: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with these of the rows, and feed them these tokens next. Columns that are padding in all of them are cut."""
        if len(stay) < len(self.blank):
            index = tensor_on(self.device, stay).long()
            self.cache.reorder_cache(index)
            self.mask, self.blank = self.mask[index], [self.blank[place] for place in stay]
            self.positions = None if self.positions is None else self.positions[index]
            self._cut(min(self.blank))
        self.ids = tensor_on(self.device, tokens).long().unsqueeze(1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(stay), 1)], 1)
        self.positions = None if self.positions is None else self.positions[:, -1:] + 1

    def _cut(self, columns: int) -> None:
        """Forget the first columns. A cache with layers of another kind (sliding windows bound their own) keeps them."""
        if columns and all(type(layer) is DynamicLayer for layer in self.cache.layers):
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., columns:, :], layer.values[..., columns:, :]
            self.mask, self.blank = self.mask[:, columns:], [blank - columns for blank in self.blank]


class _Answer:
    """One row's answer as it grows: its tokens, its text, its random numbers."""

    def __init__(self, formatter: Formatter, row: Row, ends: Collection[int]) -> None:
        self.row, self.formatter, self.ends = row, formatter, ends
        room = row.max_tokens if formatter.window is None else formatter.window - len(row.prompt) + 1  # the last is not fed
        self.limit = min(row.max_tokens, room)
        self.tokens: list[int] = []
        self.sent = 0
        self.random = torch.Generator()
        if row.temperature:
            _ = self.random.seed() if row.seed is None else self.random.manual_seed(row.seed)

    def add(self, index: int, token: int) -> Progress:
        """One more token: what can be said of it now."""
        ended = token in self.ends
        if not ended:
            self.tokens.append(token)
        full = len(self.tokens) == self.limit
        text, stopped = self._text(last=ended or full)
        reason: Reason | None = "stop" if ended or stopped else "length" if full else None
        return Progress(index, text, reason, len(self.tokens))

    def _text(self, *, last: bool) -> tuple[str, bool]:
        """The text not yet sent, and whether a stop string has ended it.

        Held back until the last: an incomplete character at the end, and what may be the beginning of a stop string.
        """
        text = self.formatter.decode(self.tokens)
        if not last:
            text = text.rstrip(_UNKNOWN)
        found = [place for stop in self.row.stop if (place := text.find(stop, self.sent)) >= 0]
        if found:
            end = min(found)
        elif last:
            end = len(text)
        else:
            end = len(text) - max((_beginning(text, stop) for stop in self.row.stop), default=0)
        piece = text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece, bool(found)


def _beginning(text: str, stop: str) -> int:
    """How many characters at the end of a text begin the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _choose(logits: Float[Tensor, "rows vocab"], answers: Sequence[_Answer]) -> list[int]:
    """The next token of each row."""
    chosen: list[int] = logits.argmax(-1).tolist()
    free = [place for place, answer in enumerate(answers) if answer.row.temperature]
    if free:
        rows = [answers[place].row for place in free]
        numbers = [torch.rand((), generator=answers[place].random).item() for place in free]
        columns = ([row.temperature for row in rows], [row.top_p for row in rows], numbers)
        drawn = sample(logits[free], *(tensor_on(logits.device, column).to(logits) for column in columns))
        for place, token in zip(free, drawn.tolist(), strict=True):
            chosen[place] = token
    return chosen


def sample(
    logits: Float[Tensor, "rows vocab"],
    temperature: Float[Tensor, "rows"],
    top_p: Float[Tensor, "rows"],
    uniform: Float[Tensor, "rows"],
) -> Int[Tensor, "rows"]:
    """Nucleus sampling (Holtzman et al., 2020) as a function of one uniform number (0 to 1) a row.

    `p = softmax(logits / temperature)`, in falling order; the nucleus is the shortest beginning whose sum is at least `top_p`,
    and the token is where the sum of `p` first exceeds `uniform` times the nucleus's. A temperature or `top_p` that rounds to 0
    leaves the likeliest token.
    """
    coldest = torch.finfo(logits.dtype).tiny
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp_min(coldest)[:, None]
    p, token = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass = p.cumsum(-1)
    last = (((mass - p < top_p[:, None]) & (p > 0)).sum(-1, keepdim=True) - 1).clamp_min(0)
    place: Tensor = torch.searchsorted(mass, uniform[:, None] * mass.gather(-1, last), right=True)
    return token.gather(-1, place.minimum(last)).squeeze(-1)


def _under(
    model: Any, edits: Sequence[Edit], together: Edit | None, wanted: list[int], *, tokens: int
) -> contextlib.AbstractContextManager[None]:
    """Run the model over so many tokens a row with the wanted edit of each."""
    if len(set(wanted)) == 1:
        return contextlib.nullcontext() if wanted[0] == BASE else applied(model, edits[wanted[0]])
    assert together is not None
    routing = torch.tensor(wanted)
    if tokens == 1:
        # As a matrix, each row meets the rows of all edits and keeps its own. That takes no copy of an edit for each row, which
        # a step of one token would be waiting for: with 8 edits of 200 rows for 16 rows, it took 0.22 s so and 0.15 s as here
        # (135 M parameters, one core).
        routing = routing[:, None] == torch.arange(len(edits))
    return applied(model, together, routing)


def _ends(model: Any, formatter: Formatter) -> frozenset[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = formatter.tokenizer.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
