"""Prompts and targets become token batches, for causal, encoder-decoder and classifier models.

The rules, in one place:
- A causal text is `prompt + target` in one sequence; the target follows after one space unless the prompt ends, or the
  target begins, with white space. BOS is the tokenizer's affair; an EOS that it appends to a prompt is taken off.
- An encoder-decoder has the prompt in the encoder and the target alone in the decoder, behind the start token and a
  forced BOS, where the model has one (BART). Its targets always end with EOS.
- A classifier reads the prompt alone, and its answer is one *label token*: the label's index. Its logits are the labels', one
  scored position a text; a single logit z counts as the two logits [0, z] of a negative and a positive label, so that
  softmax cross-entropy and KL are exactly those of the Bernoulli distribution.
- A chat turn is rendered by the tokenizer's own template, with the target as the assistant's answer.
- The end-of-answer token follows the target where `end` is asked for. Padding is by length, never by token id.
- Scored positions are those that predict a target token; logits are computed there and nowhere else.

Knows tokenizers and models' inputs; knows no task and no method.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mendlm.errors import InputError, ModelError
from mendlm.models import device_of

Family = Literal["causal", "encoder-decoder", "classifier"]
TargetEnd = Literal["auto", "always", "never"]
BINARY_LABELS = ("REFUTES", "SUPPORTS")
"""What the labels of a binary classifier are called if its configuration does not name them: the second is positive."""
GREEDY = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "use_cache")
"""What greedy answers take from a model's settings of generation."""
SHORT = 64
"""Tokens of the longest text that `short_attention` is for."""
NO_LABEL = -100
"""The label of a position that has logits but no wanted token: the end of a prompt without an answer."""


@dataclass(frozen=True)
class Encoded:
    """One text as token ids: prompt, target, and whether the target's last token is the end-of-answer token.

    A classifier's target is one label token: the label's index.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    ended: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded model inputs, and the scored positions: example `row`, sequence `column`, wanted token `label`.

    `is_end` marks positions whose label is the end-of-answer token; success does not count them.
    """

    inputs: dict[str, Tensor]
    row: Int[Tensor, "scored"]
    column: Int[Tensor, "scored"]
    label: Int[Tensor, "scored"]
    is_end: Bool[Tensor, "scored"]
    size: int

    def part(self, start: int, stop: int) -> Batch:
        """The examples from `start` to before `stop`, padded to their own longest."""
        inputs = {name: tensor[start:stop] for name, tensor in self.inputs.items()}
        for prefix in ("", "decoder_"):
            ids, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
            if mask in inputs:
                length = int(inputs[mask].sum(-1).max())
                inputs |= {name: inputs[name][:, :length] for name in (ids, mask)}
        mine = (self.row >= start) & (self.row < stop)
        scored = (self.row[mine] - start, self.column[mine], self.label[mine], self.is_end[mine])
        return Batch(inputs, *scored, stop - start)

    def repeated(self, times: int) -> Batch:
        """A batch of one text as so many rows of it."""
        assert self.size == 1
        inputs = {name: tensor.repeat(times, 1) for name, tensor in self.inputs.items()}
        row = torch.arange(times, device=self.row.device).repeat_interleave(len(self.row))
        return Batch(inputs, row, self.column.repeat(times), self.label.repeat(times), self.is_end.repeat(times), times)


@dataclass(frozen=True, eq=False)
class Formatter:
    """How one model and its tokenizer turn text into batches."""

    tokenizer: Any
    family: Family
    device: torch.device
    window: int | None
    """The longest sequence that the model takes, in tokens."""
    start: tuple[int, ...] = ()
    """What a decoder is given before its first free token: the start token, and a forced BOS."""
    labels: tuple[str, ...] = ()
    """What a classifier's labels are called, in the order of their indices."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Formatter:
        """Read a loaded Hugging Face model and tokenizer. Raises `ModelError` for one that it cannot feed."""
        config = model.config.get_text_config()
        family: Family = "causal" if model.get_output_embeddings() is not None else "classifier"
        start: list[int | None] = []
        labels: tuple[str, ...] = ()
        if family == "classifier":
            labels = _labels(model, tokenizer)
        elif config.is_encoder_decoder:
            family = "encoder-decoder"
            start = [config.decoder_start_token_id, getattr(model.generation_config, "forced_bos_token_id", None)]
            if start[0] is None:
                raise ModelError(f"{type(model).__name__} has no decoder_start_token_id in its configuration; set one")
        given = tuple(token for token in start if token is not None)
        return cls(tokenizer, family, device_of(model), _window(model, tokenizer), given, labels)

    def encode(self, prompt: str, target: str | None, *, chat: bool = False, end: bool = False) -> Encoded:
        """One prompt, and a target or None, as token ids. `chat`: the prompt is a user's turn; `end`: end the answer.

        A classifier's target is a label's name, which has no end. Raises `InputError` for an empty prompt or target, a target
        without tokens, an unknown label, a chat turn for a classifier, and a text over the model's window.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty; give the text that the model is to continue or answer")
        if target is not None and not target.strip():
            raise InputError("the target is empty; give the answer that the model should produce")
        _require_unicode(f"{prompt}{target}")
        raw = self.render(prompt) if chat else prompt
        ids = self._tokens(raw, special=not chat)
        answer: list[int] = []
        if target is not None:
            answer = [self._label(target)] if self.family == "classifier" else self._target(raw, ids, target, chat=chat)
            if not answer:
                raise InputError(f"the target {target!r} has no tokens in this model's vocabulary; write it differently")
        ended = target is not None and self.family != "classifier" and (end or self.family == "encoder-decoder")
        if ended:
            if self.tokenizer.eos_token_id is None:
                raise InputError("the tokenizer has no end-of-sequence token to end the target with; set target_end to never")
            answer.append(self.tokenizer.eos_token_id)
        parts = [ids + answer] if self.family == "causal" else [ids, answer]
        for part in parts:
            self._require_room(part, prompt)
        return Encoded(tuple(ids), tuple(answer), ended)

    def require_usable(self, prompts: Iterable[str], target: str | None, *, chat: bool = False, end: bool = False) -> None:
        """Raise now what `encode` would raise for an unknown label, or for a text over the window; quick for short texts."""
        if self.family == "classifier" and target is not None:
            self._label(target)
        for prompt in prompts:
            text = prompt + (target or "")
            size = len(text) if text.isascii() else 4 * len(text)  # a token is a byte at least; a template takes some more
            if self.window is not None and size > self.window // 4:
                self.encode(prompt, target, chat=chat, end=end)

    def encode_chat(self, turns: Sequence[Mapping[str, str]]) -> Encoded:
        """A chat of several turns, up to where the assistant's next answer begins, as token ids.

        A turn has a `role` (system, user or assistant) and its `content`. Raises `InputError` for turns that the tokenizer's
        template does not take (some know no system role), an empty last one, and a chat over the model's window.
        """
        for turn in turns:
            if set(turn) != {"role", "content"} or turn["role"] not in ("system", "user", "assistant"):
                raise InputError(f"a turn of a chat has a role (system, user or assistant) and its content, got {dict(turn)}")
            _require_unicode(turn["content"])
        if not turns or not turns[-1]["content"].strip():
            raise InputError("the last turn of the chat is empty; give the message that the model is to answer")
        ids = self._tokens(self._render(turns), special=False)
        self._require_room(ids, turns[-1]["content"])
        return Encoded(tuple(ids), ())

    def _require_room(self, ids: Sequence[int], text: str) -> None:
        if self.window is not None and len(ids) > self.window:
            raise InputError(f"the text has {len(ids)} tokens, the model's window {self.window}; shorten {text[:60]!r}")

    def render(self, prompt: str) -> str:
        """The prompt as a user's turn, up to where the assistant's answer begins, by the tokenizer's template."""
        return self._render([{"role": "user", "content": prompt}])

    def _render(self, turns: Sequence[Mapping[str, str]]) -> str:
        if self.family == "classifier":
            raise InputError("a classifier takes no chat turns; give it the prompt as it is, without chat")
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError("this model's tokenizer has no chat template; use raw prompts")
        try:
            return str(self.tokenizer.apply_chat_template([*turns], tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise InputError(f"this model's chat template refuses the chat: {error}") from None

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        if self.family == "causal" and special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            plain = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids if plain and plain[-1] == ids[-1] else ids[:-1]
        return ids

    def _target(self, raw: str, ids: list[int], target: str, *, chat: bool) -> list[int]:
        if self.family == "encoder-decoder":
            return list(self.tokenizer(target.strip(), add_special_tokens=False, verbose=False)["input_ids"])
        glue = "" if chat or raw[-1:].isspace() or target[:1].isspace() else " "
        answer = target.lstrip() if chat else target
        whole = self._tokens(raw + glue + answer, special=not chat)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # The tokenizer merges across the boundary: the prompt's own tokens stand, as they will when the model is used.
        # Behind a line break, no tokenizer adds a space of its own to the target.
        start, whole = (self._tokens(text, special=False) for text in ("\n", f"\n{glue}{answer}"))
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return list(self.tokenizer(glue + answer, add_special_tokens=False, verbose=False)["input_ids"])

    def _label(self, target: str) -> int:
        if target.strip() not in self.labels:
            raise InputError(
                f"this classifier has no label {target.strip()[:60]!r}; its labels are: {', '.join(self.labels)}. It answers "
                "with a label only: give it requests and unrelated texts whose answers are labels, as those of the task 'fever'"
            )
        return self.labels.index(target.strip())

    def batch(self, texts: Sequence[Encoded]) -> Batch:
        """Pad texts to one right-padded batch with its scored positions."""
        row, column, label, is_end = [], [], [], []
        sequences = []
        for index, text in enumerate(texts):
            if self.family == "encoder-decoder":
                sequence, first = [*self.start, *text.target[:-1]], len(self.start) - 1
            elif self.family == "classifier":
                sequence, first = list(text.prompt), 0
            else:
                sequence, first = [*text.prompt, *text.target[:-1]], len(text.prompt) - 1
            sequences.append(sequence)
            for place, token in enumerate(text.target or (NO_LABEL,)):
                row.append(index)
                column.append(first + place)
                label.append(token)
                is_end.append(text.ended and place == len(text.target) - 1)
        if self.family == "encoder-decoder":
            ids, mask = self.pad([list(text.prompt) for text in texts], left=False)
            decoder_ids, decoder_mask = self.pad(sequences, left=False)
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "decoder_input_ids": decoder_ids,
                "decoder_attention_mask": decoder_mask,
            }
        else:
            ids, mask = self.pad(sequences, left=False)
            inputs = {"input_ids": ids, "attention_mask": mask}
        long = {name: tensor_on(self.device, v) for name, v in (("row", row), ("column", column), ("label", label))}
        return Batch(inputs, **long, is_end=tensor_on(self.device, is_end), size=len(texts))

    def pad(self, sequences: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """Token ids (texts, longest) padded on one side, and the mask of what counts."""
        length = max(map(len, sequences))
        filler = self.tokenizer.pad_token_id or 0  # any id: the mask says what counts
        ids, mask = [], []
        for sequence in sequences:
            blank = length - len(sequence)
            pad, ones = [filler] * blank, [1] * len(sequence)
            ids.append(pad + sequence if left else sequence + pad)
            mask.append([0] * blank + ones if left else ones + [0] * blank)
        return tensor_on(self.device, ids), tensor_on(self.device, mask)

    @torch.no_grad()
    def generate(self, model: Any, prompts: Sequence[Encoded], max_new_tokens: int) -> list[tuple[int, ...]]:
        """Greedy answers, one a prompt, as token ids up to and without the end-of-sequence token; a classifier's is its label.

        Row i of the batch is prompt i, so a batch of edits routes as in `applied`.
        """
        if self.family == "classifier":
            batch = self.batch([Encoded(text.prompt, ()) for text in prompts])
            return [(label,) for label in scored_logits(model, batch).argmax(-1).tolist()]
        ids, mask = self.pad([list(text.prompt) for text in prompts], left=self.family == "causal")
        if self.family == "causal" and self.window is not None:
            max_new_tokens = min(max_new_tokens, self.window - ids.shape[1] + 1)  # the last token is not fed back
        # Of the model's own settings only these: penalties and the like would change the answer, and fill in what is not given.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's models hold another
        own = inner.generation_config
        config = type(own)(**{name: getattr(own, name) for name in GREEDY}, do_sample=False)
        # A forced BOS counts as new; a forced EOS would take the last place, so it is given one of its own.
        given = max(0, len(self.start) - 1) + (config.forced_eos_token_id is not None)
        config.update(max_new_tokens=max_new_tokens + given, pad_token_id=self.tokenizer.pad_token_id or 0)
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        # transformers gives the head the last position of a prompt as a slice; in bf16 on a CPU that takes 300 times longer
        # than the same numbers side by side (torch 2.13: 4.7 s instead of 15 ms for 64 prompts).
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        inner.generation_config = config
        try:
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        finally:
            inner.generation_config = own
            handle.remove()
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        answers = []
        for tokens in (out[:, ids.shape[1] :] if self.family == "causal" else out[:, len(self.start) :]).tolist():
            stop = min((tokens.index(end) for end in ends if end in tokens), default=max_new_tokens)
            answers.append(tuple(tokens[: min(stop, max_new_tokens)]))
        return answers

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text; a label token as its name."""
        if self.family == "classifier":
            return " ".join(self.labels[token] for token in tokens)
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the prompt or target is not valid Unicode text: {ascii(text)[:80]}") from None


def tensor_on(device: torch.device, values: Sequence[Any]) -> Tensor:
    """Numbers as a tensor on a device."""
    return sent(torch.tensor(values), device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. For CUDA the host does not wait: a copy from pageable memory would halt it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _labels(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """A classifier's label names, by index."""
    config, name = model.config, type(model).__name__
    if config.is_encoder_decoder:
        raise ModelError(f"{name} classifies with an encoder and a decoder; use an encoder's classifier, as BERT's")
    if not hasattr(model, "num_labels"):
        raise ModelError(f"{name} has no head that answers; load the language model or the classifier of that architecture")
    if config.problem_type == "regression" or (config.problem_type == "multi_label_classification" and config.num_labels > 1):
        raise ModelError(f"{name} is trained for {config.problem_type}; only classifiers with one right label can be edited")
    if config.pad_token_id != tokenizer.pad_token_id:  # decoders find a text's end by it, RoBERTa its positions
        own, other = config.pad_token_id, tokenizer.pad_token_id
        raise ModelError(f"{name} pads with token {own}, its tokenizer with {other}; set pad_token_id of both alike")
    if config.pad_token_id is None:
        raise ModelError(
            f"{name} and its tokenizer have no padding token, which texts in one batch need; set pad_token_id of both"
        )
    names = config.id2label
    if config.num_labels == 1:  # a single logit: only the other direction can hold both names
        names = {int(index): label for label, index in (config.label2id or {}).items()}
    labels = tuple(str(names[index]) for index in sorted(names))
    unnamed = len(labels) < 2 or all(re.fullmatch(r"LABEL_\d+", label) for label in labels)
    return BINARY_LABELS if unnamed and len(labels) <= 2 else labels


def _window(model: Any, tokenizer: Any) -> int | None:
    """The longest sequence that the model takes, by its configuration, or else by its tokenizer; None: any."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            window -= module.padding_idx + 1  # as in RoBERTa, positions are counted from behind the padding's
    return int(window)


def target_ends(mode: TargetEnd, *, question: bool, chat: bool, family: Family = "causal") -> bool:
    """Whether a target ends with the end-of-answer token: `auto` does so for questions and in chat turns.

    A classifier's label has no end: `always` is an `InputError` there.
    """
    if family == "classifier":
        if mode == "always":
            raise InputError("target_end is always, but a classifier's label has no end; leave target_end at auto")
        return False
    return mode == "always" or (mode == "auto" and (question or chat))


def scored_logits(model: Any, batch: Batch) -> Float[Tensor, "scored vocab"]:
    """The logits at the batch's scored positions, and only there: the head never sees another position.

    A forward pre-hook on the output embedding gathers the wanted hidden states into a contiguous tensor, which is right
    for untied and softcapped heads too. A classifier's are its labels' logits, those of [0, z] for a single logit z.
    """
    head = model.get_output_embeddings()
    if head is None:
        labels: Tensor = model(**batch.inputs, use_cache=False).logits
        if labels.shape[-1] == 1:
            labels = torch.cat([torch.zeros_like(labels), labels], -1)
        return labels[batch.row]

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0]  # of a model that is spread over devices, on its last one
        return (states[batch.row.to(states.device), batch.column.to(states.device)], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        logits: Tensor = model(**batch.inputs, use_cache=False).logits
    finally:
        handle.remove()
    return logits


@contextlib.contextmanager
def sampling(model: Any, generator: torch.Generator) -> Iterator[None]:
    """Inside the block, the model's greedy tokens are samples of its distribution.

    Of logits plus independent Gumbel noise, the argmax is a draw from their softmax; the noise is minus the logarithm of an
    exponential variable.
    """

    def perturb(module: Any, args: Any, output: Any) -> Any:
        logits = output.logits[:, -1:].float()
        noise = torch.empty(logits.shape).exponential_(generator=generator).log().neg()
        output.logits = logits + noise.to(logits.device)
        return output

    handle = model.register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def short_attention(model: Any, batch: Batch) -> Iterator[None]:
    """Inside the block, attention in half precision over short texts on a CPU is taken by plain products.

    For passes that are differentiated: torch's fused attention there has a backward pass of several times the products' cost.
    """
    tokens = max(tensor.shape[1] for name, tensor in batch.inputs.items() if name.endswith("input_ids"))
    plain = batch.row.device.type == "cpu" and model.dtype.itemsize < 4 and tokens <= SHORT
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        yield


def by_length(
    lengths: Sequence[int], *, spread: float = 1.4, limit: int | None = None, scored: Sequence[int] = (), most: int = 0
) -> list[list[int]]:
    """Indices in groups of similar length: within a group, the longest is at most `spread` times the shortest.

    Padding to a group's longest then wastes little. Groups hold at most `limit` texts, and texts of at most `most` scored
    positions, `scored` a text, where these are given; they come in order of length.
    """
    groups: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group, more = groups[-1] if groups else None, scored[index] if scored else 0
        full = (
            group is None
            or lengths[index] > spread * lengths[group[0]] + 2
            or len(group) == limit
            or (scored and held + more > most)
        )
        if group is None or full:
            groups.append([index])
            held = more
        else:
            group.append(index)
            held += more
    return groups
