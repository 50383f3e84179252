"""Evaluate an editing method: one row an edit, and a summary.

Edits are made and scored in batches of independent requests, each row of a batch under its own edit; the trunk runs once
for the base model's pass and the edited one. The metrics are defined in `mendlm.metrics`.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mendlm import memory, metrics, processes
from mendlm.adapter import rank_of
from mendlm.apply import Edit, Intervention, applied, join, side_by_side
from mendlm.errors import InputError
from mendlm.files import new_folder, plain, write_bytes, write_json
from mendlm.layers import LayerSpec
from mendlm.losses import all_by_row, mean_by_row, token_kl, token_nll
from mendlm.methods.base import Learned, Method, edits_of
from mendlm.methods.rehearse import Rehearsal, require_steps
from mendlm.models import base_of, is_sharded
from mendlm.replay import Trunk
from mendlm.tasks import Dataset, EditExample, Probe
from mendlm.text import NO_LABEL, Encoded, Formatter, TargetEnd, by_length, scored_logits, target_ends

GREEDY_TOKENS = 5
"""How many of the base model's own greedy tokens stand for an unrelated prompt's answer that is not known."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How to evaluate."""

    num_edits: int = 1
    """Requests edited together; each is scored under all edits of its group. The first requests fill up the last group."""
    sequential: bool = False
    """Make a group's edits one after another, each on the model that the earlier ones left; else at once, summed."""
    chat: bool = False
    """Pose every prompt as a chat turn."""
    target_end: TargetEnd = "auto"
    """Whether targets end with the end-of-answer token: `auto` does so for question tasks and in chat turns."""
    scale: float = 1.0
    """Strength of the edits."""
    on_base: bool = False
    """With `sequential`: make each edit as if there were none before it, as a store does; the rows of all are summed."""
    rehearse: int = 0
    """With `sequential`: steps at most by which an edit is rehearsed with those before it (`mendlm.methods.rehearse`)."""
    generate: bool = True
    """Also score free generation, which takes most of the time."""
    context: str = ""
    """Also ask freely with this text before the prompt, to see whether the answer holds in other company."""
    batch_size: int = 32
    """Texts a forward pass, and about as many requests at a time."""
    timed_edits: int = 20
    """How many single edits are timed for `edit_ms`."""
    seed: int = 0
    """For the bootstrap."""

    def __post_init__(self) -> None:
        for name in ("num_edits", "batch_size", "timed_edits"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        require_steps(self.rehearse)
        if self.rehearse and self.scale <= 0:
            raise InputError(f"rehearse needs edits that give an answer, at a scale above 0, got {self.scale:g}")
        for name in ("on_base", "rehearse"):
            if getattr(self, name) and not self.sequential:
                raise InputError(f"{name} is for edits made one after another; give --sequential too, or leave it out")


@dataclass(frozen=True)
class Results:
    """Rows, one an edit, and their summary."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write `results.jsonl` and `summary.json` into a new folder, or nothing."""
        with new_folder(Path(folder), force=force) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
            write_bytes(temporary / "results.jsonl", "".join(lines).encode())
            write_json(temporary / "summary.json", self.summary)


@dataclass(frozen=True)
class _Score:
    """One text under the base and the edited model."""

    right: tuple[bool, bool]
    """Whether every answer token (the end token apart) is the argmax, before and after."""
    kept: bool
    """Whether every answer token's argmax is the same before and after."""
    tokens_right: tuple[float, float]
    """Share of the answer tokens (the end token apart) that are the argmax, before and after."""
    nll: tuple[float, float]
    """Mean NLL of the answer tokens, before and after."""
    kl: float
    """KL from the base model's to the edited model's distribution, mean over the answer's positions."""
    tokens: int


class Evaluator:
    """Scores one method on one model; `evaluate` is the way in."""

    def __init__(
        self, method: Method, specs: Sequence[LayerSpec], model: Any, tokenizer: Any, config: EvaluationConfig
    ) -> None:
        self.method, self.model, self.config = method, model, config
        method.require_fit(model)
        if not method.edits_weights and (config.scale != 1 or config.sequential):
            what = f"scale is {config.scale}" if config.scale != 1 else "edits one after another were asked for"
            why = "has no strength to change" if config.scale != 1 else "keeps each request by itself, in any order"
            raise InputError(f"{what}, but the method '{method.name}' {why}; leave that out")
        self.formatter = Formatter.of(model, tokenizer)
        self.trunk, self.rehearsal = Trunk.where_possible(model, specs), Rehearsal(model, self.formatter)
        if method.follows_along and config.num_edits > 1 and not config.sequential:
            raise InputError("normalizer_follows is for edits made one after another: give --sequential too")
        self.in_turn = method.edits_weights and (config.sequential or method.follows_along)
        """Whether a group's edits are made one after another."""

    def encode(self, example: EditExample, prompt: str, answer: str | None = None) -> Encoded:
        """A prompt with the example's target, or another answer, in the form that the configuration asks for."""
        return self.formatter.encode(prompt, answer or example.target, **self._form(example))

    def _form(self, example: EditExample) -> dict[str, bool]:
        chat, family = self.config.chat, self.formatter.family
        return {
            "chat": chat,
            "end": target_ends(self.config.target_end, question=example.question, chat=chat, family=family),
        }

    def edit(self, texts: list[Encoded], size: int | None = None) -> Intervention:
        """The edits of a chunk of requests, one a group of `size` of them (by default `num_edits`), all at once."""
        k = size or self.config.num_edits
        if not self.method.edits_weights:
            other: Any = self.method.edit(self.model, self.formatter.batch(texts))
            return cast("Intervention", other.grouped(k))
        limit, scale = self.config.batch_size, self.config.scale
        return edits_of(self.method, self.model, self.formatter, texts, k, limit, scale).require_finite()

    @torch.no_grad()
    def _edit_in_turn(self, texts: list[Encoded]) -> tuple[Edit, list[tuple[bool, bool]]]:
        """The edits of a chunk, made one after another within each group, and whether each held when it was made.

        A normaliser that follows along starts each group from the editor's own statistics.
        """
        stacks, held, k = [], [], self.config.num_edits
        for start in range(0, len(texts), k):
            stack: Edit | None = None
            with self.own_statistics():
                for place, text in enumerate(texts[start : start + k], start=start):
                    below = None if self.config.on_base else stack
                    with applied(self.model, below) if below is not None else contextlib.nullcontext():
                        new = cast("Edit", self.edit([text], 1))
                    if stack is not None and self.config.rehearse and self.method.changed_base() is None:
                        earlier, steps = texts[start:place], self.config.rehearse
                        new = side_by_side([self.rehearsal.joined(new[0], stack[0], [text], earlier, steps=steps)[0]])
                    stack = new if stack is None else (stack + new).fewest()
                    held.append(self.score([(0, text)], stack)[0].right)
            assert stack is not None
            stacks.append(stack)
        return join(stacks), held

    @contextlib.contextmanager
    def own_statistics(self) -> Iterator[None]:
        """Give the method back what its statistics were before the block."""
        learned = copy.deepcopy(self.method.state_dict()) if isinstance(self.method, Learned) else None
        try:
            yield
        finally:
            if isinstance(self.method, Learned) and learned is not None:
                self.method.load_state_dict(learned)

    @contextlib.contextmanager
    def _under(self, edit: Intervention, routing: Tensor) -> Iterator[None]:
        """Run the model with each row's edit, on what the method changed of the base."""
        change = self.method.changed_base()
        with change.on(self.model) if change is not None else contextlib.nullcontext(), edit.on(self.model, routing):
            yield

    @torch.no_grad()
    def score(self, texts: Sequence[tuple[int, Encoded]], edit: Intervention) -> list[_Score]:
        """Score texts, each under the edit whose index it names."""
        scores: list[_Score | None] = [None] * len(texts)
        for group in by_length([len(text) for _, text in texts], limit=self.config.batch_size):
            batch = self.formatter.batch([texts[i][1] for i in group])
            routing = torch.tensor([texts[i][0] for i in group], device=self.formatter.device)
            with self.trunk.record() as tape:
                base = scored_logits(self.model, batch)
            trunk = self.trunk.replay(tape) if isinstance(edit, Edit) else contextlib.nullcontext()
            with trunk, self._under(edit, routing):
                edited = scored_logits(self.model, batch)
            assert not bool((batch.label == NO_LABEL).any())

            def by_row(flags: Tensor, row: Tensor = batch.row, size: int = batch.size) -> list[bool]:
                return [bool(flag) for flag in all_by_row(flags, row, size).tolist()]

            before, after = base.argmax(-1), edited.argmax(-1)
            right = [by_row((found == batch.label) | batch.is_end) for found in (before, after)]
            kept = by_row((before == after) | batch.is_end)
            inside = batch.row[~batch.is_end]
            tokens_right = [
                mean_by_row((found == batch.label)[~batch.is_end].double(), inside, batch.size).tolist()
                for found in (before, after)
            ]
            nll = [token_nll(logits, batch.label, batch.row, batch.size).tolist() for logits in (base, edited)]
            kl = token_kl(base, edited, batch.row, batch.size).tolist()
            for place, index in enumerate(group):
                scores[index] = _Score(
                    right=(right[0][place], right[1][place]),
                    kept=kept[place],
                    tokens_right=(tokens_right[0][place], tokens_right[1][place]),
                    nll=(nll[0][place], nll[1][place]),
                    kl=kl[place],
                    tokens=len(texts[index][1].target),
                )
        return [score for score in scores if score is not None]

    def generate(self, texts: Sequence[tuple[int, Encoded]], edit: Intervention | None, extra: int = 4) -> list[str]:
        """Greedy answers with natural stop, a few tokens longer than the target at most."""
        answers = [""] * len(texts)
        for group in by_length([len(text.prompt) for _, text in texts], limit=self.config.batch_size):
            prompts = [texts[i][1] for i in group]
            routing = torch.tensor([texts[i][0] for i in group], device=self.formatter.device)
            lengths = [len(text.target) + extra for text in prompts]
            if edit is None:
                found = self.formatter.generate(self.model, prompts, max(lengths))
            else:
                with self._under(edit, routing):
                    found = self.formatter.generate(self.model, prompts, max(lengths))
            for index, tokens, length in zip(group, found, lengths, strict=True):
                answers[index] = self.formatter.decode(tokens[:length])
        return answers

    def probe(self, probes: Sequence[Probe]) -> list[Encoded]:
        """Unrelated prompts with their answers, or with the base model's own greedy ones."""
        texts = [self.formatter.encode(p.prompt, p.answer, chat=self.config.chat) for p in probes]
        open_ended = [i for i, probe in enumerate(probes) if probe.answer is None]
        for start in range(0, len(open_ended), self.config.batch_size):
            some = open_ended[start : start + self.config.batch_size]
            greedy = self.formatter.generate(self.model, [texts[i] for i in some], GREEDY_TOKENS)
            for index, tokens in zip(some, greedy, strict=True):
                end = (self.formatter.tokenizer.eos_token_id,)
                texts[index] = Encoded(texts[index].prompt, tokens or end)
        return texts

    def require_usable(
        self, examples: Sequence[EditExample], extra: Sequence[Sequence[Probe]], passages: Sequence[Probe]
    ) -> None:
        """Raise now for a text that `rows` could not use: it would end the evaluation after all chunks before."""
        form, chat = self.formatter, self.config.chat
        for one, probes in zip(examples, extra, strict=True):
            prompts = (one.prompt, *one.rephrasings)
            behind = [f"{self.config.context} {one.prompt}"] if self.config.generate and self.config.context else []
            form.require_usable([*prompts, *behind], one.target, **self._form(one))
            if one.old is not None:
                form.require_usable(prompts, one.old, **self._form(one))
            for probe in (*one.unrelated, *probes, *one.portability):
                form.require_usable([probe.prompt], probe.answer, chat=chat)
                if probe.answer is not None and probe.answer == one.old:
                    form.require_usable([probe.prompt], one.target, chat=chat)
        for passage in passages:
            form.require_usable([passage.prompt], passage.answer)

    def rows(self, examples: Sequence[EditExample], extra: Sequence[Sequence[Probe]], passages: Sequence[Probe]) -> list[Any]:
        """Edit a chunk of examples and score all of it; `extra` and `passages` are per example."""
        k, own = self.config.num_edits, [self.encode(e, e.prompt) for e in examples]
        edit, held = self._edit_in_turn(own) if self.in_turn else (self.edit(own), [])
        exact = [(i // k, text) for i, text in enumerate(own)]
        asked = [(i, p) for i, e in enumerate(examples) for p in e.rephrasings]
        rephrased = [(i // k, self.encode(examples[i], prompt)) for i, prompt in asked]
        watched = [(i, p) for i, e in enumerate(examples) for p in (*e.unrelated, *extra[i])]
        unrelated = [(i // k, text) for (i, _), text in zip(watched, self.probe([p for _, p in watched]), strict=True)]
        prose = [(i // k, self.formatter.encode(p.prompt, p.answer)) for i, p in enumerate(passages)]
        rows: list[dict[str, Any]] = [
            {"prompt": e.prompt, "target": e.target, "subject": e.subject, "generality": [], "locality": [], "portability": []}
            for e in examples
        ]
        of_exact, of_rephrased, of_unrelated = (self.score(texts, edit) for texts in (exact, rephrased, unrelated))
        for row, score in zip(rows, of_exact, strict=True):
            row["success"], row["token_accuracy"], row["nll"] = score.right, score.tokens_right, score.nll
        for i, right in enumerate(held):
            rows[i]["turn"], rows[i]["success_when_made"] = i % k, right
        for (i, _), score in zip(asked, of_rephrased, strict=True):
            rows[i]["generality"].append(score.right)
        for (i, probe), score in zip(watched, of_unrelated, strict=True):
            rows[i]["locality"].append({"answered": probe.answer is not None, "kind": probe.kind, **asdict(score)})
        following = [(i, probe) for i, e in enumerate(examples) for probe in e.portability]
        entailed = [(i // k, self.formatter.encode(p.prompt, p.answer, chat=self.config.chat)) for i, p in following]
        for (i, probe), score in zip(following, self.score(entailed, edit), strict=True):
            rows[i]["portability"].append({"kind": probe.kind, "right": score.right})
        self._rivals(rows, examples, edit, (of_exact, asked, of_rephrased, watched, of_unrelated))
        for row, score in zip(rows, self.score(prose, edit), strict=False):
            row["prose"] = {"nll": score.nll, "kl": score.kl, "tokens": score.tokens}
        norms = {name: update.norm().tolist() for name, update in edit.updates.items()} if isinstance(edit, Edit) else {}
        for i, row in enumerate(rows):
            row["norm"] = {name: values[i // k] for name, values in norms.items()}
        if self.config.generate:
            self._free(rows, examples, edit)
        return rows

    def _free(self, rows: list[dict[str, Any]], examples: Sequence[EditExample], edit: Intervention) -> None:
        """What is answered freely to the prompts, their rephrasings and, if so configured, behind a context."""
        prompts = [("success", i, e.prompt) for i, e in enumerate(examples)]
        prompts += [("generality", i, prompt) for i, e in enumerate(examples) for prompt in e.rephrasings]
        names = ["success", "generality"]
        if self.config.context:
            names.append("context")
            prompts += [("context", i, f"{self.config.context} {e.prompt}") for i, e in enumerate(examples)]
        for row, name in itertools.product(rows, names):
            row[f"{name}_generated"], row[f"{name}_contained"], row[f"{name}_text"] = [], [], []
        texts = [(i // self.config.num_edits, self.encode(examples[i], prompt)) for _, i, prompt in prompts]
        for (name, i, _), *found in zip(prompts, self.generate(texts, None), self.generate(texts, edit), strict=True):
            match = metrics.answers if examples[i].question else metrics.continues
            rows[i][f"{name}_generated"].append([match(text, examples[i].target) for text in found])
            rows[i][f"{name}_contained"].append([metrics.contains(text, examples[i].target) for text in found])
            rows[i][f"{name}_text"].append(found)

    def _rivals(
        self,
        rows: list[dict[str, Any]],
        examples: Sequence[EditExample],
        edit: Intervention,
        scored: tuple[Any, ...],
    ) -> None:
        """Whether the target is likelier than the old answer, before and after; and the old one on a neighbour.

        Likelier: the lower mean NLL of its tokens. For requests whose data names the old answer.
        """
        of_exact, asked, of_rephrased, watched, of_unrelated = scored
        k = self.config.num_edits
        places = [("prompt", i, e.prompt, of_exact[i]) for i, e in enumerate(examples)]
        places += [("rephrasing", i, prompt, score) for (i, prompt), score in zip(asked, of_rephrased, strict=True)]
        places = [place for place in places if examples[place[1]].old not in (None, examples[place[1]].target)]
        olds = [(i // k, self.encode(examples[i], prompt, examples[i].old)) for _, i, prompt, _ in places]
        for (where, i, _, new), old in zip(places, self.score(olds, edit), strict=True):
            better = [a < b for a, b in zip(new.nll, old.nll, strict=True)]
            rows[i].setdefault("new_over_old", {}).setdefault(where, []).append(better)
        # A neighbour is another statement of the data's that shares the old answer, which should stay the likelier one. Labels
        # and the groups of KnowEdit, whose texts may hold the target, are none.
        shared = [
            (i, probe, score)
            for (i, probe), score in zip(watched, of_unrelated, strict=True)
            if "new_over_old" in rows[i]
            and not examples[i].question
            and probe in examples[i].unrelated
            and probe.kind is None
            and probe.answer == examples[i].old
        ]
        chat = self.config.chat
        news = [(i // k, self.formatter.encode(probe.prompt, examples[i].target, chat=chat)) for i, probe, _ in shared]
        for (i, _, old), new in zip(shared, self.score(news, edit), strict=True):
            better = [a < b for a, b in zip(old.nll, new.nll, strict=True)]
            rows[i]["new_over_old"].setdefault("neighbour", []).append(better)

    def time_edits(self, examples: Sequence[EditExample]) -> tuple[list[float], float, int]:
        """Milliseconds of single edits, one a call, the first unmeasured, none of a method that does not run the model; by how
        many MiB they raise the memory in use at their peak; and the bytes of one as an adapter.
        """
        times, size, device = [], 0, self.formatter.device
        gc.collect()
        memory.forget_peak(device)
        start = memory.peak_mb(device)
        for example in [examples[0], *examples[: self.config.timed_edits]]:
            text = self.encode(example, example.prompt)
            begun = time.perf_counter()
            edit = self.edit([text], 1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - begun))
            if not isinstance(edit, Edit):
                continue
            change, own = self.method.changed_base(), edit.unbind()[0]
            updates = (own if change is None else change.detach() + own).updates
            rank = max(rank_of(updates), max(update.rows for update in updates.values()))
            size = max(size, rank * sum(4 * sum(update.shape) for update in updates.values()))
        return times[1:] if self.method.runs_model else [], memory.peak_mb(device) - start, size


def chunks(count: int, config: EvaluationConfig) -> range:
    """Where each chunk of so many requests starts: whole groups, of about as many requests as a batch has texts."""
    return range(0, count, max(1, config.batch_size // config.num_edits) * config.num_edits)


def require_work(requests: int, chunks: int) -> None:
    """Raise `InputError` if some of the processes would have nothing to do."""
    if chunks < processes.count():
        raise InputError(
            f"{requests} requests are {chunks} chunks of work, fewer than the {processes.count()} processes; "
            f"start at most {chunks}, give more requests, or make the batches smaller"
        )


def evaluate(
    method: Method,
    specs: Sequence[LayerSpec],
    model: Any,
    tokenizer: Any,
    data: Dataset,
    config: EvaluationConfig,
    *,
    locality: Sequence[Dataset] = (),
    about: dict[str, Any] | None = None,
    callback: Callable[[int, int], object] | None = None,
) -> Results:
    """Edit and score every request of `data`.

    Each request is scored on its own prompt, rephrasings and unrelated prompts, on one prompt of every further locality
    source, and on one passage of every source of running text. `about` goes into the summary; `callback` is told how many
    requests are done. A last group that is not full is edited together with the first requests, which are scored in their own
    group alone. Raises `InputError` if there are fewer requests than one group.

    Under several processes all call it alike: chunks of requests go to them in turn, each batch as it would be in one process,
    and all get the same results; one should save them. Raises `InputError` if there are fewer chunks than processes. Where
    the base is split over the processes (`mendlm.models.shard`), each does everything.
    """
    count = len(data.examples)
    k = count if config.sequential and config.num_edits == 1 else config.num_edits
    config = replace(config, num_edits=k)
    if not count or count < k:
        raise InputError(f"{data.name} has {count} requests, fewer than num_edits {k}")
    filled = -count % k
    examples = [*data.examples, *data.examples[:filled]]
    starts, alone = chunks(count, config), processes.count() == 1 or is_sharded(model)
    if not alone:
        require_work(count, len(starts))
        processes.agree({"data": data.sha256, "evaluation": plain(asdict(config)), "requests": count})
    evaluator = Evaluator(method, specs, model, tokenizer, config)
    memory.forget_peak(evaluator.formatter.device)
    asking = [source.probes for source in locality if not source.prose]
    reading = [source.probes for source in locality if source.prose]

    def chunk(start: int) -> tuple[Sequence[EditExample], list[list[Probe]], list[Probe]]:
        """The requests of a chunk, and the unrelated texts that are watched with each."""
        some = examples[start : start + starts.step]
        places = range(start, start + len(some))
        extra = [[probes[i % len(probes)] for probes in asking] for i in places]
        turns = [(reading[i % len(reading)], i // len(reading)) for i in places] if reading else []
        return some, extra, [probes[turn % len(probes)] for probes, turn in turns]

    for start in starts:
        evaluator.require_usable(*chunk(start))
    scored: dict[int, list[dict[str, Any]]] = {}
    for number, start in enumerate(starts):
        if alone or processes.mine(number):
            scored[start] = evaluator.rows(*chunk(start))
            if callback is not None:
                callback(min(start + starts.step, count), count)
    if not alone:
        scored = {int(start): part for process in processes.gathered(scored) for start, part in process.items()}
    rows = [row for start in starts for row in scored[start]][:count]
    for index, row in enumerate(rows):
        row["index"] = index
    answered = ", ".join((data.name, *(source.name for source in locality)))
    prose = ", ".join(source.name for source in locality if source.prose) or f"unrelated answers of {answered}"
    peak = memory.peak_mb(evaluator.formatter.device)
    with evaluator.own_statistics():
        times, edit_memory, size = evaluator.time_edits(examples)
    base, settings = base_of(model), getattr(method, "config", None)
    summary = {
        "format": metrics.FORMAT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": base["name"],
        "model_sha256": base["sha256"],
        "revision": getattr(model.config, "_commit_hash", None),
        "dtype": base["dtype"],
        "quantization": base.get("quantization"),
        "method_config": plain(asdict(cast("Any", settings))) if is_dataclass(settings) else {},
        "layers": [spec.name for spec in specs],
        **(about or {}),
        "method": method.name,
        "data": data.name,
        "data_sha256": data.sha256,
        "data_notes": list(data.notes),
        "locality_sources": [{"name": source.name, "sha256": source.sha256} for source in locality],
        "count": len(rows),
        "skipped": data.skipped,
        "left_out": data.left_out,
        "filled": filled,
        **{name: value for name, value in asdict(config).items() if name != "timed_edits"},
        **metrics.summarise(rows, seed=config.seed, labels=evaluator.formatter.family == "classifier"),
        "drawdown_text": prose,
        "edit_ms": {"p50": metrics.percentile(times, 0.5), "p95": metrics.percentile(times, 0.95)},
        "edit_memory_mb": edit_memory,
        "peak_memory_mb": peak,
        "adapter_bytes": size,
    }
    return Results(rows, summary)
