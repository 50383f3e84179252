"""The one meta-training loop.

A step edits a whole batch of independent requests at once. For each request: its gradient is recorded on the base model,
the editor makes an edit of it, and the outer loss

    L = c_e * mean(-log p_edited(y_e | x) for x in the exact prompt and a rephrasing) + c_loc * KL(p_base || p_edited)

is taken under that example's own edit. The trunk below the edited blocks runs once a text; the passes under the edit
replay it. Each kind of text goes in batches of similar length, with logits only where a loss needs them.

What a step draws depends on the seed and the step's number alone, so a resumed run equals an uninterrupted one.

Several processes share a step's requests; gradients and metrics are sums over all, divided by the whole step's count, so that
their number changes nothing but rounding. Where the base is split over the processes (`mendlm.models.shard`), its blocks run in
all of them at once: there every process takes all requests, and counts them by its share.

Knows methods, tasks and text; prints nothing. accelerate brings trackers, and is imported only here.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mendlm import processes
from mendlm.apply import Edit, join
from mendlm.checkpoint import Run, editor_path
from mendlm.errors import InputError, NumericalError, StorageError, require
from mendlm.files import locked, plain, storing, sweep
from mendlm.losses import all_by_row, token_kl, token_nll
from mendlm.methods.base import Learned
from mendlm.models import base_of, device_of, is_sharded, quantizer
from mendlm.replay import Trunk
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.text import Batch, Encoded, Formatter, TargetEnd, by_length, scored_logits, short_attention, target_ends, tensor_on
from mendlm.trunk_cache import TrunkCache

RECORDED = 32
"""Texts a pass at most, where more requests than that are edited at once."""
LOGITS = 1 << 24
"""Numbers that the logits of a pass hold at most: a large vocabulary makes passes of fewer texts, not more memory."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Every number that shapes the result is here, and is saved in the run folder."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 64
    """Requests a step, each with its own edit."""
    micro_batch_size: int | None = None
    """Requests of a step that memory holds at a time, in each process, whose gradients are summed; by default all of them.
    Those that are edited at once stay together."""
    num_edits: int = 1
    """Requests edited at once: their updates are summed, and each is judged under the sum."""
    single_share: float = 0.0
    """Share of steps whose requests are edited one by one all the same, for an editor that is to make single edits, too."""
    learning_rate: float | None = None
    """Adam's rate; by default what suits the method, 1.5e-3 for MEND. The paper has 1e-6."""
    rates_learning_rate: float = 5e-2
    """Adam's rate for what the method learns by its logarithm: the per-layer rates."""
    final_learning_rate: float = 0.05
    """Both rates fall along a half cosine to this share of themselves at the last step."""
    optimizer: Literal["adam", "adam8bit"] = "adam"
    """`adam8bit` keeps Adam's two moments in 8 bits, by bitsandbytes: a quarter of their memory. Parameters of fewer than 4096
    numbers keep 32 bits."""
    clip: float = 1.0
    """Largest norm of the outer gradient; a longer one is scaled down to it. The paper has 100."""
    edit_weight: float = 0.1
    """c_e, the weight of the edit loss."""
    locality_weight: float = 1.0
    """c_loc, the weight of the locality loss."""
    locality_scale: float = 0.0
    """Above 0, a token's KL counts as `scale * log(1 + KL / scale)` in the locality loss: texts that are lost weigh less, so
    that those near their tipping point weigh more. 0: KL itself, as in the paper."""
    whole_target: bool = False
    """The edit loss of a target is the sum over its tokens, so that all of a long one must be right; not the paper's mean."""
    own_locality: float = 0.5
    """Share of locality texts taken from the record's own neighbours, where it has any and other sources are given."""
    locality_tokens: int = 8
    """At most so many tokens of an unrelated answer are scored: of a longer one a run, from a random place (encoder-decoders:
    its beginning)."""
    continuation_share: float = 0.1
    """Share of requests whose unrelated text is their own prompt and target, where that has no end: what follows an edited
    answer stays as the base model would have it."""
    chat_share: float = 0.0
    """Share of requests, with their rephrasings, posed as chat turns, for instruct models. Half of the unrelated texts take
    their request's form, the others are chat turns by this share."""
    target_end: TargetEnd = "auto"
    """Whether targets end with the end-of-answer token: `auto` does so for question tasks and in chat turns."""
    normalizer_examples: int = 512
    """Training requests that the normaliser's statistics are fitted on before the first step."""
    valid_examples: int = 256
    """Validation requests at most."""
    valid_every: int = 50
    """Steps between validations; the best editor by validation loss is the one that is kept."""
    patience: int = 20_000
    """Stop after this many steps without a lower validation loss."""
    checkpoint_every: int = 25
    """Steps between checkpoints."""
    replay: bool = True
    """Run the trunk once and replay it; false runs every pass in full."""
    seed: int = 0
    """Decides everything that is drawn, and on the command line the editor's start."""
    tracker: str | None = None
    """An experiment tracker that accelerate knows (tensorboard, wandb, ...); metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "num_edits", "normalizer_examples", "valid_examples", "valid_every")
        for name in (*counts, "micro_batch_size", "locality_tokens", "checkpoint_every", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "rates_learning_rate", "clip", "edit_weight", "locality_weight", "locality_scale"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise InputError(f"{name} must be 0 or a positive finite number, got {getattr(self, name)}")
        for name in ("single_share", "own_locality", "continuation_share", "chat_share", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.optimizer not in ("adam", "adam8bit"):
            raise InputError(f"optimizer must be adam or adam8bit, got {self.optimizer}")
        if self.patience < self.valid_every:
            raise InputError(f"patience {self.patience} must be at least valid_every {self.valid_every}")
        if self.batch_size % self.num_edits:
            raise InputError(f"batch_size {self.batch_size} must be a multiple of num_edits {self.num_edits}")

    def at_a_time(self, most: int) -> int:
        """Requests in memory at a time, of so many at most."""
        return min(most, self.micro_batch_size or most)


@dataclass(frozen=True)
class Drawn:
    """The texts of one request in one step."""

    edit: Encoded
    rephrasing: Encoded
    unrelated: Encoded | None


@dataclass(frozen=True)
class Progress:
    """What the callback is told after every step."""

    step: int
    steps: int
    seconds: float
    """Time that this step took."""
    metrics: Mapping[str, float]


def draw(
    example: EditExample, sources: Sequence[Probe], formatter: Formatter, config: TrainConfig, rng: random.Random
) -> Drawn:
    """Choose a request's form, rephrasing and unrelated text, and encode them."""
    chat = rng.random() < config.chat_share
    end = target_ends(config.target_end, question=example.question, chat=chat, family=formatter.family)
    edit = formatter.encode(example.prompt, example.target, chat=chat, end=end)
    again = rng.choice(example.rephrasings or (example.prompt,))
    rephrasing = formatter.encode(again, example.target, chat=chat, end=end)
    if formatter.family == "causal" and not end and rng.random() < config.continuation_share:
        said = rng.choice((edit, rephrasing))
        return Drawn(edit, rephrasing, Encoded(said.prompt + said.target, ()))
    own = example.unrelated
    probes = own if own and (not sources or rng.random() < config.own_locality) else sources
    if not probes:
        return Drawn(edit, rephrasing, None)
    probe = rng.choice(probes)
    same_form, other_form = rng.random() < 0.5, rng.random() < config.chat_share
    unrelated = formatter.encode(probe.prompt, probe.answer, chat=chat if same_form else other_form)
    extra = len(unrelated.target) - config.locality_tokens
    if extra > 0:  # a run of the answer, from a random place; a decoder that starts from nothing keeps its beginning
        start = rng.randint(0, extra) if formatter.family == "causal" else 0
        unrelated = _cut(unrelated, start, config.locality_tokens)
    return Drawn(edit, rephrasing, unrelated)


def _cut(text: Encoded, start: int, tokens: int) -> Encoded:
    """A text whose target is a run of the whole one's."""
    return Encoded(text.prompt + text.target[:start], text.target[start : start + tokens])


def outer_loss(
    method: Learned,
    model: Any,
    formatter: Formatter,
    trunk: Trunk | TrunkCache,
    drawn: Sequence[Drawn],
    config: TrainConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The outer loss summed over the requests, and sums of what is worth watching; nothing is synchronised.

    Differentiable in the method's parameters. Each pass is differentiated as soon as it has run, down to the edit alone,
    so that one group of texts holds its activations at a time; the result carries these gradients on to the method.
    """

    def parts(batch: Batch, tape: Any) -> Edit:
        with trunk.replay(tape):
            return method.parts(model, batch)

    # Where many requests are edited at once, memory is to hold few texts at a time.
    limit, k = RECORDED if config.num_edits > RECORDED else None, config.num_edits
    most = LOGITS // getattr(model.config.get_text_config(), "vocab_size", 1)

    def grouped(texts: Sequence[Encoded]) -> list[list[int]]:
        scored = [max(1, len(text.target)) for text in texts]
        return by_length([len(text) for text in texts], limit=limit, scored=scored, most=most)

    passes: list[tuple[str, list[int], Batch, Any]] = []
    for group in grouped([d.edit for d in drawn]):
        batch = formatter.batch([drawn[i].edit for i in group])
        passes.append(("success", group, batch, trunk.run(model, batch.inputs)))
    groups = [(group, functools.partial(parts, batch, tape)) for _, group, batch, tape in passes]
    made, change = method.together(groups, k), method.changed_base()
    home = {number: (b, place) for b, (numbers, _) in enumerate(made) for place, number in enumerate(numbers)}
    for name, texts in (("generality", [d.rephrasing for d in drawn]), ("locality", [d.unrelated for d in drawn])):
        watched = [(i, text) for i, text in enumerate(texts) if text is not None]
        for positions in grouped([text for _, text in watched]):
            some = sorted((watched[p] for p in positions), key=lambda one: home[one[0] // k])
            batch = formatter.batch([text for _, text in some])
            passes.append((name, [i for i, _ in some], batch, trunk.run(model, batch.inputs)))

    leaves, changed = [edit.leaves() for _, edit in made], change.leaves() if change is not None else None
    pairs = list(zip(_tensors(*(edit for _, edit in made), change), _tensors(*leaves, changed), strict=True))
    pairs = [(tensor, leaf) for tensor, leaf in pairs if leaf.requires_grad]
    zero = torch.zeros((), device=formatter.device)
    sums = dict.fromkeys(("edit_loss", "locality_loss", "success", "generality", "locality"), zero)
    for name, group, batch, tape in passes:
        # Under the edits that its texts need and no others: a pass pays for their rows alone.
        needed = sorted({i // k for i in group}, key=home.__getitem__)
        edit = join([leaves[b][index] for b, index in _places([home[number] for number in needed], formatter.device)])
        order = [needed.index(i // k) for i in group]
        routing = None if order == list(range(len(needed))) else tensor_on(formatter.device, order)
        with trunk.replay(tape), short_attention(model, batch):
            if name == "locality":
                with torch.no_grad():
                    base = scored_logits(model, batch)
            with changed.on(model) if changed is not None else contextlib.nullcontext(), edit.on(model, routing):
                logits = scored_logits(model, batch)
        found = logits.detach().argmax(-1)
        if name == "locality":
            kind, weight = "locality_loss", config.locality_weight
            loss = token_kl(base, logits, batch.row, batch.size, scale=config.locality_scale).sum()
            right = found == base.argmax(-1)
        else:
            kind, weight = "edit_loss", config.edit_weight
            loss = token_nll(logits, batch.label, batch.row, batch.size, whole=config.whole_target).sum() / 2
            right = (found == batch.label) | batch.is_end
        if loss.requires_grad:
            torch.autograd.backward(weight * loss, inputs=[leaf for _, leaf in pairs])
        sums[kind] = sums[kind] + loss.detach()
        sums[name] = sums[name] + all_by_row(right, batch.row, batch.size).sum()
    total = config.edit_weight * sums["edit_loss"] + config.locality_weight * sums["locality_loss"]
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    carried = _Carried.apply(total, [grad for _, grad in reached], *(tensor for tensor, _ in reached))
    return carried, {"loss": total, **sums}


class _Carried(torch.autograd.Function):
    """A number that was differentiated before: it has these gradients in the tensors."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(slope.to(gradient.device) * gradient for gradient in ctx.gradients)


def descend(
    method: Learned,
    model: Any,
    formatter: Formatter,
    trunk: Trunk | TrunkCache,
    optimizer: torch.optim.Optimizer,
    drawn: Sequence[Drawn],
    config: TrainConfig,
    count: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step on the outer loss of `count` requests, `drawn` being this process's share of them.

    Gives the sums of what is worth watching, and the gradient's norm before it was clipped.
    """
    optimizer.zero_grad()  # before the passes: the last step's gradients need not live beside them
    sums: dict[str, Tensor] = {}
    for some in portions(drawn, config.at_a_time(len(drawn)), config.num_edits):
        loss, found = outer_loss(method, model, formatter, trunk, some, config)
        (loss / count).backward()
        del loss  # and with it the gradients that it carries, before the next pass
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
    for parameter in method.parameters() if processes.count() > 1 else ():
        parameter.grad = processes.total(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(method.parameters(), config.clip)
    optimizer.step()
    return sums, norm


def portions(drawn: Sequence[Drawn], most: int, k: int) -> Iterator[Sequence[Drawn]]:
    """So many requests at a time, at most; `k` that are edited at once stay together, be they more."""
    size = max(1, most // k) * k
    for start in range(0, max(1, len(drawn)), size):
        yield drawn[start : start + size]


def _tensors(*edits: Edit | None) -> list[Tensor]:
    return [tensor for edit in edits if edit is not None for tensor in edit.tensors()]


def _places(homes: Sequence[tuple[int, int]], device: torch.device) -> list[tuple[int, Tensor]]:
    """Of sorted (batch, place) pairs, each batch with its places."""
    runs = itertools.groupby(homes, key=lambda home: home[0])
    return [(b, tensor_on(device, [place for _, place in run])) for b, run in runs]


class Trainer:
    """One training run: what `train` sets up, and the loop over steps."""

    def __init__(
        self,
        method: Learned,
        model: Any,
        tokenizer: Any,
        data: Dataset,
        valid: Dataset | None,
        locality: Sequence[Dataset],
        config: TrainConfig,
        run: Run,
        trunk_cache: str | Path | None = None,
    ) -> None:
        if config.tracker is not None:
            require_tracker(config.tracker)
        self.accelerator = require("accelerate", "train").Accelerator(
            cpu=device_of(model).type == "cpu", log_with=config.tracker, project_dir=str(run.folder)
        )
        if self.accelerator.distributed_type.name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            raise InputError(
                f"accelerate is configured for {self.accelerator.distributed_type.name}, which splits the trained model; here "
                "the base is frozen: launch without, and split the base by device_map 'shards'"
            )
        if config.learning_rate is None:
            config = replace(config, learning_rate=method.learning_rate)
        self.method, self.model, self.config, self.run = method, model, config, run
        self.data, self.valid = data.examples, valid.examples[: config.valid_examples] if valid else ()
        self.sources = [probe for source in locality for probe in source.probes]
        self.formatter = Formatter.of(model, tokenizer)
        self._require_usable()
        model.requires_grad_(False)
        model.eval()
        self.trunk: Trunk | TrunkCache = Trunk.below(model, method.specs) if config.replay else Trunk(())
        method.require_fit(model)
        self.sharded = is_sharded(model)
        if trunk_cache is not None:
            if self.sharded:
                raise InputError("a trunk cache needs the whole base in each process, but its weights are split; leave it out")
            self.trunk = TrunkCache(self.trunk, model, trunk_cache)
            held_out = [replace(valid, examples=self.valid, probes=())] if valid else []
            watched = [replace(source, examples=()) for source in locality]
            most = 3 * (config.steps * config.batch_size + len(self.valid))  # a request's own text and two more
            require_disk(
                self.trunk,
                states_bytes(model, self.formatter, [data, *held_out, *watched], most, locality_tokens=config.locality_tokens),
            )
            first = self.formatter.encode(self.data[0].prompt, self.data[0].target)
            self.trunk.run(model, self.formatter.batch([first]).inputs)  # raises now for blocks whose output cannot be kept
        rates = {id(parameter) for parameter in method.rates()}
        networks = [parameter for parameter in method.parameters() if id(parameter) not in rates]
        adam = quantizer("bitsandbytes").optim.Adam8bit if config.optimizer == "adam8bit" else torch.optim.Adam
        self.optimizer: torch.optim.Optimizer = adam([{"params": networks}, {"params": method.rates()}])
        self.step, self.best, self.best_step = 0, float("inf"), 0
        processes.follow_main(method.state_dict().values())

    def batch(self, step: int) -> list[EditExample]:
        """The requests of a step: consecutive ones of the epoch's shuffled order."""
        size = min(self.config.batch_size, len(self.data) - len(self.data) % self.config.num_edits)
        per_epoch = len(self.data) // size
        epoch, place = divmod(step, per_epoch)
        order = list(range(len(self.data)))
        random.Random(f"{self.config.seed}/epoch/{epoch}").shuffle(order)
        return [self.data[i] for i in order[place * size : (place + 1) * size]]

    def _require_usable(self) -> None:
        """Raise now for a text that would end the training at whatever step it is drawn."""
        form, share = self.formatter, self.config.chat_share
        own = not self.sources or self.config.own_locality > 0
        for chat in (some for some in (False, True) if (share > 0 if some else share < 1)):
            for one in (*self.data, *self.valid):
                end = target_ends(self.config.target_end, question=one.question, chat=chat, family=form.family)
                form.require_usable((one.prompt, *one.rephrasings), one.target, chat=chat, end=end)
                for probe in one.unrelated if own else ():
                    form.require_usable([probe.prompt], probe.answer, chat=chat)
            for probe in self.sources:
                form.require_usable([probe.prompt], probe.answer, chat=chat)

    def _drawn(self, examples: Sequence[EditExample], stream: str) -> list[Drawn]:
        rngs = (random.Random(f"{self.config.seed}/{stream}/{i}") for i in range(len(examples)))
        return [draw(e, self.sources, self.formatter, self.config, rng) for e, rng in zip(examples, rngs, strict=True)]

    def _mine(self, drawn: Sequence[Drawn], k: int) -> list[Drawn]:
        """This process's share of a step's requests; those that are edited at once, k together, stay together."""
        return [d for i, d in enumerate(drawn) if self.sharded or processes.mine(i // k)]

    def _mean(self, sums: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The mean over so many requests of all processes."""
        values = torch.stack([value.detach().double() for value in sums.values()]) / (count * self.copies)
        return dict(zip(sums, processes.total(values), strict=True))

    @property
    def copies(self) -> int:
        """How many processes take the same request."""
        return processes.count() if self.sharded else 1

    def prepare(self) -> None:
        """The first pass over training requests, which fixes the editor's statistics."""
        examples = [e for s in range(-(-self.config.normalizer_examples // self.config.batch_size)) for e in self.batch(s)]
        drawn = self._drawn(examples[: self.config.normalizer_examples], "normalizer")
        most = self.config.at_a_time(self.config.batch_size)
        if not processes.is_main() and not self.sharded:  # what was seen before is counted once
            for statistics in self.method.buffers():
                statistics.zero_()
        for number, group in enumerate(by_length([len(d.edit) for d in drawn], limit=most)):
            if self.sharded or processes.mine(number):
                self.method.prepare(self.model, self.formatter.batch([drawn[i].edit for i in group]))
        if processes.count() > 1 and not self.sharded:
            self.method.merge(processes.total)

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; the mean over the step's requests of everything watched."""
        progress = self.step / max(1, self.config.steps - 1)
        low = self.config.final_learning_rate
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        rates = (self.config.learning_rate, self.config.rates_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            assert rate is not None
            group["lr"] = rate * factor
        drawn, config = self._drawn(self.batch(self.step), f"step/{self.step}"), self.config
        if random.Random(f"{config.seed}/single/{self.step}").random() < config.single_share:
            config = replace(config, num_edits=1)
        sums, norm = descend(
            self.method,
            self.model,
            self.formatter,
            self.trunk,
            self.optimizer,
            self._mine(drawn, config.num_edits),
            config,
            len(drawn) * self.copies,
        )
        self.step += 1
        return {**self._mean(sums, len(drawn)), "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The validation requests' mean outer loss and metrics. The same texts are drawn every time."""
        total: dict[str, Tensor] = {}
        drawn = self._drawn(self.valid, "valid")
        whole, k = len(drawn) - len(drawn) % self.config.num_edits, self.config.num_edits
        mine = self._mine(drawn[:whole], k)
        whole_step = self.config.batch_size * self.copies // processes.count()
        for some in portions(mine, self.config.at_a_time(whole_step), k):
            _, sums = outer_loss(self.method, self.model, self.formatter, self.trunk, some, self.config)
            total = {name: total.get(name, 0.0) + value.double() for name, value in sums.items()}
        return {f"valid_{name}": value.item() for name, value in self._mean(total, whole).items()}

    def steps(self) -> Iterator[Progress]:
        """Train to the last step, yielding after each; validations, logs and checkpoints happen on the way."""
        config = self.config
        while self.step < config.steps and self.step - self.best_step < config.patience:
            begun = time.perf_counter()
            metrics = {name: value.item() for name, value in self.train_step().items()}
            if not all(map(math.isfinite, metrics.values())):
                raise NumericalError(
                    f"step {self.step} gave NaN or infinite numbers ({metrics}); the last checkpoint is whole: "
                    "resume it with a lower learning_rate"
                )
            seconds = time.perf_counter() - begun
            last = self.step == config.steps
            if self.valid and (self.step % config.valid_every == 0 or last):
                metrics |= self.validate()
                if metrics["valid_loss"] < self.best:
                    self.best, self.best_step = metrics["valid_loss"], self.step
                    self._save_editor()
            elif not self.valid:
                self.best_step = self.step
            if processes.is_main():
                self.run.log({"step": self.step, "seconds": round(seconds, 4), **metrics})
                self.accelerator.log(metrics, step=self.step)
            if self.step % config.checkpoint_every == 0 or last:
                self.save()
            yield Progress(self.step, config.steps, seconds, metrics)

    def save(self) -> None:
        """Write a checkpoint, and the editor too where no validation chooses it."""
        if processes.is_main():
            state = {"step": self.step, "best": self.best, "best_step": self.best_step}
            self.run.save_checkpoint(self.method, self.optimizer, state)
            if not self.valid and self.step:
                self._save_editor()
        if isinstance(self.trunk, TrunkCache):
            self.trunk.flush()

    def _save_editor(self) -> None:
        if processes.is_main():
            self.run.save_editor(self.method, {"step": self.step})

    def resume(self) -> None:
        """Continue from the run folder's checkpoint, exactly where it was written."""
        state = self.run.load_checkpoint(self.method, self.optimizer)
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        processes.agree({"step": self.step})
        if processes.is_main():
            self.run.cut_log(self.step)


def require_tracker(name: str) -> None:
    """Raise `InputError` unless accelerate knows the tracker and its package is here, which it would not say."""
    trackers = require("accelerate", "train").tracking
    if name not in trackers.LOGGER_TYPE_TO_CLASS:
        raise InputError(f"unknown tracker '{name}'; accelerate knows {', '.join(trackers.LOGGER_TYPE_TO_CLASS)}")
    if name not in map(str, trackers.get_available_trackers()):
        raise InputError(f"the package of the tracker '{name}' is not installed; install it, or leave the tracker out")


def states_bytes(
    model: Any,
    formatter: Formatter,
    sources: Iterable[Dataset],
    most: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    locality_tokens: int = TrainConfig.locality_tokens,
) -> int:
    """Bytes that a trunk cache of all texts of these data sets takes, each text once, as a raw prompt with its answer; an
    unrelated text of more than `locality_tokens` each time that it can be cut.

    Where no more than `most` of them are ever read, that share of it. `dtype` is that of the states, by default the model's.
    """
    every = (text for source in sources for text in _every(formatter, source, locality_tokens))
    lengths = {hash((text.prompt, text.target)): len(text) for text in every}
    width: int = model.get_input_embeddings().embedding_dim
    size: int = (dtype or next(model.parameters()).dtype).itemsize
    share = 1.0 if most is None else min(1.0, most / max(1, len(lengths)))
    return math.ceil(share * sum(lengths.values()) * width * size)


def _every(formatter: Formatter, source: Dataset, locality_tokens: int) -> Iterator[Encoded]:
    for example in source.examples:
        for prompt in (example.prompt, *example.rephrasings):
            yield formatter.encode(prompt, example.target)
    unrelated = (example.unrelated for example in source.examples)
    for probe in dict.fromkeys(itertools.chain(source.probes, *unrelated)):  # a whole file's probes are those of its examples
        text = formatter.encode(probe.prompt, probe.answer)
        extra = max(0, len(text.target) - locality_tokens)
        for start in range(extra + 1 if formatter.family == "causal" else 1):
            yield _cut(text, start, locality_tokens)


def require_disk(cache: TrunkCache, needed: int) -> None:
    """Raise `StorageError` unless a cache can be written, and the disk holds what it still lacks of so many bytes.

    Makes no folder.
    """
    lacking = needed - cache.stored_bytes()
    place = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise StorageError(f"the trunk cache cannot be written into {place}, which is no folder of yours; name another folder")
    with storing(cache.folder):
        free = shutil.disk_usage(place).free
    if lacking > free:
        raise StorageError(
            f"the trunk cache of these texts takes {lacking / 1e9:.2f} GB more, and {place} has {free / 1e9:.2f} GB free; "
            "free the disk, put the cache on another one, give fewer texts, or leave the trunk cache out"
        )


def train(
    method: Learned,
    model: Any,
    tokenizer: Any,
    data: Dataset,
    config: TrainConfig,
    folder: str | Path,
    *,
    valid: Dataset | None = None,
    locality: Sequence[Dataset] = (),
    resume: bool = False,
    prepared: bool = False,
    about: Mapping[str, Any] | None = None,
    trunk_cache: str | Path | None = None,
    editor_device: str | torch.device | None = None,
    callback: Callable[[Progress], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Meta-train an editor into a run folder.

    `callback` is called after every step; when `should_stop` says so, a checkpoint is written and the run can be resumed.
    `prepared` says that the method was trained before, and keeps its statistics. `about` goes into the run's description;
    `trunk_cache` is a folder that keeps the trunk's outputs across runs; a `StorageError` before any work if its disk cannot
    hold those of all texts, or of as many as the steps can draw. `editor_device` is where the editor, its gradients and its
    optimiser's state are, by default where the model is: rows travel there, and edits come back.
    Freezes the model's parameters and puts it in evaluation mode. Raises `InputError` for data that holds too few
    requests and for a folder that another training holds, and `NumericalError` if the loss stops being finite.

    Under several processes all call it alike; the main one alone writes. A run may be resumed by another number of them.
    """
    if len(data.examples) < config.num_edits:
        raise InputError(f"{data.name} has {len(data.examples)} requests, fewer than num_edits {config.num_edits}")
    if valid and min(len(valid.examples), config.valid_examples) < config.num_edits:
        raise InputError(
            f"{valid.name} gives {min(len(valid.examples), config.valid_examples)} validation requests, "
            f"fewer than num_edits {config.num_edits}"
        )
    each = {f"a step of {config.batch_size} requests": min(config.batch_size, len(data.examples))}
    each |= {"validation": min(len(valid.examples), config.valid_examples)} if valid else {}
    for what, size in each.items():
        if size // config.num_edits < processes.count() and not is_sharded(model):
            raise InputError(
                f"{what}, of {size} edited {config.num_edits} at once, leaves some of the {processes.count()} processes "
                "without work; start fewer, or give it more requests"
            )
    sources = {"data": [data], "valid": [valid] if valid else [], "locality": list(locality)}
    described = {kind: [{"name": d.name, "sha256": d.sha256} for d in sets] for kind, sets in sources.items()}
    run = Run(Path(folder))
    trainer = Trainer(method.beside(model, editor_device), model, tokenizer, data, valid, locality, config, run, trunk_cache)
    how = {"training": asdict(trainer.config), "editor": asdict(method.config)}
    base = base_of(model)  # in every process: weights that are split are hashed by all of them
    processes.agree(plain({"resume": resume, "base": base, **how, **described}))
    main = processes.is_main()
    with locked(run.folder) if main else contextlib.nullcontext():
        if main:
            sweep(run.folder)
        if resume:
            if main:
                run.continue_with({"base": base, **how, **described})
            processes.wait()
            trainer.resume()
        else:
            if main:
                run.require_new()
            if not prepared:
                trainer.prepare()
            if main:  # only now: a folder that a kill leaves behind can be resumed, or begun again
                made = {"method": method.name, "layers": [asdict(spec) for spec in method.specs], "base": base}
                run.create({**made, **how, **described, **(about or {})})
            trainer.save()
        if config.tracker:
            trainer.accelerator.init_trackers("mendlm", config=plain(asdict(config)))
        for progress in trainer.steps():
            if callback is not None:
                callback(progress)
            if processes.some(should_stop()):
                trainer.save()
                break
        if main and method.changed_base() is not None and editor_path(run.folder).is_file():
            run.save_changed_base()
    for tracker in trainer.accelerator.trackers:  # not `end_training`, which also parts the processes
        tracker.finish()
    processes.wait()
    return run
