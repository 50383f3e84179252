"""`Session`: one running model with its editor, its gate and its journal of edits."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mendlm import hub
from mendlm.apply import Edit, applied, stacked
from mendlm.checkpoint import save_editor
from mendlm.editor import Editor
from mendlm.errors import GateError, InputError, NumericalError
from mendlm.export import export_peft
from mendlm.gate import Asked, Checks, Gate, OnFail, ask, judge, load_guards, questions
from mendlm.journal import Record
from mendlm.methods.base import Learned
from mendlm.methods.rehearse import STEPS, Rehearsal, require_steps
from mendlm.models import STARTER, base_of, device_of, load
from mendlm.store import Addition, Store
from mendlm.tasks import EditExample, Probe
from mendlm.tasks.base import is_question
from mendlm.text import Encoded, Formatter, by_length, target_ends

PROMISED = ("prompt", "rephrasing")
"""The kinds of questions whose answer an edit promised; those of the others are to stay."""
CACHE_BYTES = 2**28
"""Bytes of rows, single edits and stacks, that a session keeps in memory beside the store's files."""


@dataclass(frozen=True, eq=False)
class Trial:
    """An edit as it was tried on: what the gate saw, which active edits it would replace, and what it took."""

    edit: Edit = field(repr=False)
    checks: Checks
    replaces: tuple[str, ...]
    """Active edits of the same prompt, by id: they give way to this one."""
    milliseconds: float
    """Making the edit, without the gate."""

    @property
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of the change, by layer."""
        return {name: update.norm().item() for name, update in self.edit.updates.items()}

    def to_json(self) -> dict[str, Any]:
        """As a service sends it."""
        told = {"replaces": list(self.replaces), "norms": self.norms, "milliseconds": self.milliseconds}
        return {**self.checks.to_json(), **told}


@dataclass(frozen=True, eq=False)
class Made(Trial):
    """An edit that is in the journal and active, by its `id`."""

    id: str

    def to_json(self) -> dict[str, Any]:
        """As a service sends it."""
        return {"id": self.id, **super().to_json()}


class Session:
    """A model, its editor, and a journal of edits whose active ones it runs under.

    Undoing an edit removes its rows and nothing else. The active edits are one stacked `LowRank` a layer, so that an answer
    costs the same calls whatever their number; with `rank`, the stack is compressed to so many rows, always from the originals.
    An edit that joins others is rehearsed with them (`mendlm.methods.rehearse`), in at most `rehearse` steps.
    What another process writes into the store takes effect with the next call. One thread owns a session, since hooks belong to
    the process.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        editor: Editor | None = None,
        *,
        store: Store | None = None,
        gate: Gate | None = None,
        rank: int | None = None,
        rehearse: int = STEPS,
    ) -> None:
        require_steps(rehearse)
        self.model, self.tokenizer, self.editor = model, tokenizer, editor
        self.store = store or Store.memory(base_of(model))
        self.gate, self.rank, self.rehearse = gate or Gate(), rank, rehearse
        self.formatter, self._device = Formatter.of(model, tokenizer), device_of(model)
        self._rehearsal = Rehearsal(model, self.formatter)
        self._kept: OrderedDict[tuple[str, ...], Edit] = OrderedDict()
        with _under(model, self.active):  # raises if the model lacks the layers
            pass

    @classmethod
    def open(
        cls,
        source: str | Path = STARTER,
        *,
        editor: str | Path | None = None,
        store: str | Path | None = None,
        guards: str | Path | None = None,
        gate: Gate | None = None,
        rank: int | None = None,
        rehearse: int = STEPS,
        **options: Any,
    ) -> Session:
        """Load a model (`options` as in `mendlm.load`), its editor, its store (a folder, made if there is none) and its guards.

        The starter model has its own editor. Opened again, a store gives the very model that it was left with: the same logits
        to the bit. Raises `FormatError` for a store of another base model.
        """
        gate = gate or Gate()
        if guards is not None:
            gate = replace(gate, guards=(*gate.guards, *load_guards(guards)))
        model, tokenizer = load(source, **options)
        wanted = STARTER if editor is None and str(source) == STARTER else editor
        loaded = Editor.load(wanted, model, tokenizer) if wanted is not None else None
        opened = Store.open(Path(store), base_of(model)) if store is not None else None  # last: nothing is made for an error
        return cls(model, tokenizer, loaded, store=opened, gate=gate, rank=rank, rehearse=rehearse)

    def __repr__(self) -> str:
        return f"<Session of {self.store.base.get('name')}: {len(self.store.active())} active edits, {self.store}>"

    # The stack

    @property
    def edits(self) -> dict[str, Edit]:
        """The active edits by id, oldest first."""
        return {record.id: self._read(record.id) for record in self.store.active()}

    def read(self, edit: str) -> Edit:
        """An edit of the store by its id, whatever its state."""
        return self._read(self.store.record(edit).id)

    @property
    def active(self) -> Edit | None:
        """The active edits as one: the rows of all, in the journal's order."""
        return self.stack(None)

    @property
    def lost(self) -> dict[str, float]:
        """By layer, the share of the active stack's norm (0 to 1) that its compression to `rank` rows loses."""
        if self.rank is None or not self.edits:
            return {}
        whole = stacked(list(self.edits.values()))
        return {n: u.compress(self.rank)[1].item() if u.rows > self.rank else 0.0 for n, u in whole.updates.items()}

    def stack(self, ids: Sequence[str] | None) -> Edit | None:
        """The edits of these ids, whatever their state, as one; None for none of them. Without ids, the active ones."""
        chosen = self.store.active() if ids is None else [self.store.record(one) for one in dict.fromkeys(ids)]
        chosen = sorted({record.number: record for record in chosen}.values(), key=lambda record: record.number)
        return self._fused(tuple(record.id for record in chosen)) if chosen else None

    def _read(self, name: str) -> Edit:
        return self._cached((name, ""), lambda: edit_of(self.store, name).to(self._device))

    def _fused(self, names: tuple[str, ...]) -> Edit:
        return self._cached(names, lambda: self._fuse([self._read(name) for name in names]))

    def _fuse(self, edits: Sequence[Edit]) -> Edit:
        whole = stacked(edits)
        if self.rank is None:
            return whole
        rank = self.rank
        small = {n: u.compress(rank)[0] if u.rows > rank else u for n, u in whole.updates.items()}
        return replace(whole, updates=small)

    def _cached(self, key: tuple[str, ...], make: Callable[[], Edit]) -> Edit:
        """What was used last is kept, up to `CACHE_BYTES`, and at least the latest."""
        kept = self._kept
        if key not in kept:
            kept[key] = make()
            held = sum(edit.nbytes for edit in kept.values())
            while held > CACHE_BYTES and len(kept) > 1:
                held -= kept.popitem(last=False)[1].nbytes
        kept.move_to_end(key)
        return kept[key]

    # Edits

    def edit(
        self,
        prompt: str,
        target: str,
        *,
        rephrasings: Sequence[str] = (),
        unrelated: Sequence[Probe | str] = (),
        scale: float = 1.0,
        chat: bool = False,
        on_base: bool = False,
        on_fail: OnFail | None = None,
        author: str = "",
        reason: str = "",
    ) -> Made:
        """Make an edit, ask its gate, and write it into the journal as active: `edit_many` of one.

        An active edit of the same prompt gives way to it (`Made.replaces`). Errors leave everything as it was.
        """
        how: dict[str, Any] = {"scale": scale, "chat": chat, "on_base": on_base, "on_fail": on_fail}
        return self.edit_many([request(prompt, target, rephrasings, unrelated)], **how, author=author, reason=reason)[0]

    def edit_many(
        self,
        requests: Sequence[EditExample | tuple[str, str]],
        *,
        scale: float = 1.0,
        chat: bool = False,
        on_base: bool = False,
        on_fail: OnFail | None = None,
        author: str = "",
        reason: str = "",
        callback: Callable[[int, int], object] | None = None,
    ) -> list[Made]:
        """Independent edits, made in batches and judged together, each under all of them. All become active, or none.

        `scale` multiplies the edits; `chat` poses the prompts as chat turns. They are recorded under the active edits, and
        remember them; with `on_base`, as if there were none. `on_fail` is the gate's, or another; `callback` is told how many
        are ready, of how many, before they are judged, anew at each strength. Raises `GateError` if the gate refuses.
        """
        examples = [one if isinstance(one, EditExample) else request(*one) for one in requests]
        on_fail = on_fail or self.gate.on_fail
        strengths = (scale, *(scale * more for more in self.gate.scales)) if on_fail == "retry" else (scale,)
        for strength in strengths:
            try:
                trials = self._try(examples, scale=strength, chat=chat, on_base=on_base, callback=callback)
            except NumericalError:
                if strength == strengths[-1]:
                    raise
                continue
            failed = [trial.checks for trial in trials if not trial.checks.passed]
            if not failed or on_fail == "report":
                return self._keep(trials, author, reason)
        raise GateError(
            f"{len(failed)} of {len(trials)} edits failed the gate at strength {', '.join(f'{s:g}' for s in strengths)}, "
            "and nothing was changed. Word it differently, or report instead of refusing. Of the first, at the last strength:\n"
            f"{failed[0].failures()}",
            tuple(checks.to_json() for checks in failed),
        )

    def preview(
        self,
        prompt: str,
        target: str,
        *,
        rephrasings: Sequence[str] = (),
        unrelated: Sequence[Probe | str] = (),
        scale: float = 1.0,
        chat: bool = False,
        on_base: bool = False,
    ) -> Trial:
        """An edit tried on and thrown away: what `edit` would make, and what its gate would see."""
        return self._try([request(prompt, target, rephrasings, unrelated)], scale=scale, chat=chat, on_base=on_base)[0]

    def _try(
        self,
        examples: Sequence[EditExample],
        *,
        scale: float,
        chat: bool,
        on_base: bool,
        callback: Callable[[int, int], object] | None = None,
    ) -> list[Trial]:
        if self.editor is None:
            raise InputError("this session has no editor; open it with editor=RUN to make edits")
        replaced = [self.store.replaced_by({"prompt": example.prompt, "chat": chat}) for example in examples]
        rest = [record.id for record in self.store.active() if record.id not in replaced]
        before, below = self.active, self.stack(rest)
        begun = time.perf_counter()
        with _under(self.model, None if on_base else below):
            edits = self.editor.edit_many(examples, scale=scale, chat=chat)
        stack = [] if on_base else rest
        edits = [_told(edit, example, stack) for edit, example in zip(edits, examples, strict=True)]
        made = self._rehearsed(edits, examples, rest, chat) if self.rehearse and scale > 0 else iter(edits)
        for place, edit in enumerate(made):
            edits[place] = edit
            if callback is not None:
                callback(place + 1, len(edits))
        milliseconds = 1000 * (time.perf_counter() - begun) / max(1, len(edits))
        last = {example.prompt.strip(): edit for example, edit in zip(examples, edits, strict=True)}  # as in the journal
        after = self._fuse([*(self._read(name) for name in rest), *last.values()])
        asked = [[*questions(example, chat=chat), *self.gate.questions()] for example in examples]
        answered = iter(ask(self.model, self.formatter, list(itertools.chain(*asked)), before, after, self.gate.tokens))
        checks = [judge([next(answered) for _ in some], self.gate.needed) for some in asked]
        replaces = [() if one is None else (one,) for one in replaced]
        return [Trial(*parts, milliseconds) for parts in zip(edits, checks, replaces, strict=True)]

    def _rehearsed(
        self, edits: Sequence[Edit], examples: Sequence[EditExample], rest: Sequence[str], chat: bool
    ) -> Iterator[Edit]:
        """New edits one after another, each rehearsed on what it promises and what was promised before it, by those that stay
        active and by those new ones that do; unrelated prompts and guards are to keep the answers that they have now.
        """
        last = {example.prompt.strip(): place for place, example in enumerate(examples)}
        new = [questions(example, chat=chat) for example in examples]
        old = list(itertools.chain(*map(_promised, map(self.store.record, rest))))
        told = [*self.gate.questions(), *old, *itertools.chain(*new)]
        texts = {_key(one): self._promise(one) for one in told if one.kind in PROMISED}
        promised = {key: text for key, text in texts.items() if text is not None}
        watched = {_key(one): one for one in told if one.kind not in PROMISED and _key(one) not in texts}
        longest = max((len(promised[key].target) for one in new for key in map(_key, one) if key in promised), default=0)
        before, tokens = self.active, max(self.gate.tokens, longest + 1)
        kept = self._answers(list(watched.values()), before, tokens)
        earlier, live = {key for key in map(_key, old) if key in promised}, [self._read(name) for name in rest]
        for place, (edit, example) in enumerate(zip(edits, examples, strict=True)):
            if last[example.prompt.strip()] == place:
                own = {key for key in map(_key, new[place]) if key in promised}
                if live or kept or len(own) > 1:  # of a prompt alone the editor has seen whether it has taken
                    mine, others = ([promised[key] for key in promised if key in some] for some in (own, earlier - own))
                    below = stacked(live) if live else None
                    how: dict[str, Any] = {"before": before, "steps": self.rehearse}
                    moved, steps = self._rehearsal.joined(edit, below, mine, others, kept, **how)
                    edit = replace(moved, about={**edit.about, "rehearsed": steps}) if steps else edit
                live.append(edit)
                earlier |= own
            yield edit

    def _promise(self, one: Asked) -> Encoded | None:
        """A prompt with the answer that it must get; None for one that this model cannot be asked."""
        end = target_ends("auto", question=is_question(one.prompt), chat=one.chat, family=self.formatter.family)
        with suppress(InputError):
            return self.formatter.encode(one.prompt, one.wanted, chat=one.chat, end=end)
        return None

    def _answers(self, asked: Sequence[Asked], edit: Edit | None, tokens: int) -> list[Encoded]:
        """Prompts with their answers under an edit, of so many tokens, or up to their end; none that cannot be asked."""
        texts, end = [], self.formatter.tokenizer.eos_token_id
        for one in asked:
            with suppress(InputError):
                texts.append(self.formatter.encode(one.prompt, None, chat=one.chat))
        found = []
        for group in by_length([len(text) for text in texts], limit=16):
            with _under(self.model, edit):
                answers = self.formatter.generate(self.model, [texts[i] for i in group], tokens)
            for i, answer in zip(group, answers, strict=True):
                ended = len(answer) < tokens and self.formatter.family != "classifier" and end is not None
                found.append(Encoded(texts[i].prompt, (*answer, end) if ended else answer, ended))
        return [text for text in found if text.target]

    def _keep(self, trials: Sequence[Trial], author: str, reason: str) -> list[Made]:
        base = base_of(self.model)
        additions = [addition(trial.edit, base, {**trial.checks.to_json(), "norms": trial.norms}) for trial in trials]
        records = self.store.add_many(additions, author=author, reason=reason)
        kept = zip(trials, records, strict=True)
        return [Made(self._read(r.id), t.checks, r.supersedes, t.milliseconds, r.id) for t, r in kept]

    def add(self, edit: Edit, *, author: str = "", reason: str = "", force: bool = False) -> str:
        """Make an edit that exists already active; returns its id. One made for another base is refused unless `force`."""
        if not force:
            edit.require_base(self.model)
        with applied(self.model, edit):  # raises if the model lacks its layers
            pass
        stacked([*self.edits.values(), edit])  # raises if that would change the base twice
        new = addition(edit, base_of(self.model))
        file = hashlib.sha256(new.content).hexdigest()
        if (same := next((record for record in self.store.active() if record.file == file), None)) is not None:
            raise InputError(f"the edit {same.id} is the same and already active")
        return self.store.add(new, author=author, reason=reason).id

    def undo(self, name: str | None = None, *, author: str = "", reason: str = "") -> Edit:
        """Take an edit off, by default the latest active one; what it had replaced comes back. Returns the edit.

        Raises `FormatError` if its file is damaged; it is off all the same.
        """
        return self._read(self.store.undo(name, author=author, reason=reason).id)

    def redo(self, name: str | None = None, *, author: str = "", reason: str = "") -> Edit:
        """Put an undone edit back in its place of the stack, by default the one undone last. Returns the edit."""
        name = self.store.record(name).id if name is not None else self.store.latest("redo")
        stacked([*(one for key, one in self.edits.items() if key != name), self._read(name)])  # the base changes once
        return self._read(self.store.redo(name, author=author, reason=reason).id)

    # Answers

    def check(self) -> Checks:
        """Ask everything that every active edit promised, and the guards: the base model's answers and those of today."""
        asked = [*self.gate.questions(), *itertools.chain(*map(_promised, self.store.active()))]
        return judge(ask(self.model, self.formatter, asked, None, self.active, self.gate.tokens), self.gate.needed)

    def answer(self, prompt: str, *, chat: bool = False, max_new_tokens: int = 32) -> str:
        """The model's greedy answer under the active edits."""
        return self.answers([prompt], chat=chat, max_new_tokens=max_new_tokens)[0]

    def answers(self, prompts: Sequence[str], *, chat: bool = False, max_new_tokens: int = 32) -> list[str]:
        """Greedy answers to several prompts, in one batch."""
        texts = [self.formatter.encode(prompt, None, chat=chat) for prompt in prompts]
        with _under(self.model, self.active):
            found = self.formatter.generate(self.model, texts, max_new_tokens)
        return [self.formatter.decode(tokens) for tokens in found]

    # A hub

    def push(
        self,
        repo: str,
        what: str = "edits",
        *,
        results: str | Path | None = None,
        private: bool = False,
        endpoint: str | None = None,
        token: str | None = None,
    ) -> str:
        """Push something to a hub repository, as `mendlm.hub.push`; returns the commit's URL.

        `what` is "edits" (the active ones, as one), an edit's id, or "editor".
        """
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "pushed"
            if what == "editor":
                if self.editor is None or not isinstance(self.editor.method, Learned):
                    raise InputError("this session has no trained editor to push")
                place.mkdir()
                save_editor(place / hub.EDITOR, self.editor.method, self.editor.about)
            else:
                edits = list(self.edits.values()) if what == "edits" else [self.read(what)]
                export_peft(edits, place)
            return hub.push(place, repo, results=results, private=private, endpoint=endpoint, token=token)

    def pull(
        self,
        repo: str,
        *,
        revision: str | None = None,
        author: str = "",
        reason: str = "",
        endpoint: str | None = None,
        token: str | None = None,
    ) -> str | Editor:
        """Bring an edit from a hub repository, active, and return its id; or an editor, which makes the edits from then on.

        Raises as `mendlm.hub.pull`, and `FormatError` for one of another base model.
        """
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "pulled"
            found = hub.pull(repo, place, revision=revision, endpoint=endpoint, token=token)
            if found.kind == "editor":
                self.editor = Editor.load(place, self.model, self.tokenizer)
                return self.editor
            edit = Edit.load(place, self.model)
            return self.add(edit, author=author, reason=reason or f"pulled from {repo}, commit {found.commit}")


def request(prompt: str, target: str, rephrasings: Sequence[str] = (), unrelated: Sequence[Probe | str] = ()) -> EditExample:
    """A request in words: the rephrasings should get the target too, the unrelated prompts keep their answers."""
    probes = tuple(probe if isinstance(probe, Probe) else Probe(probe) for probe in unrelated)
    question = is_question(prompt)
    return EditExample(prompt=prompt, target=target, rephrasings=tuple(rephrasings), unrelated=probes, question=question)


def _told(edit: Edit, example: EditExample, stack: Sequence[str]) -> Edit:
    """An edit that says all that was asked of it, and what it was recorded under."""
    unrelated = [{"prompt": probe.prompt, "answer": probe.answer} for probe in example.unrelated]
    asked = {**edit.about["request"], "rephrasings": list(example.rephrasings), "unrelated": unrelated}
    return replace(edit, about={**edit.about, "request": asked, "stack": list(stack)})


def _key(one: Asked) -> tuple[str, bool]:
    return one.prompt.strip(), one.chat


def _promised(record: Record) -> list[Asked]:
    """What a record's edit promised, as its gate asked it; nothing where no request is named, or its edit takes away."""
    asked = []
    for told in record.request.get("parts") or [record.request]:
        scale = told.get("scale")
        if told.get("prompt") and told.get("target") and not (isinstance(scale, int | float) and scale <= 0):
            unrelated = [Probe(probe["prompt"], probe.get("answer")) for probe in told.get("unrelated", ())]
            example = request(told["prompt"], told["target"], told.get("rephrasings", ()), unrelated)
            asked += questions(example, chat=bool(told.get("chat")))
    return asked


def edit_of(store: Store, name: str) -> Edit:
    """An edit of a store by its whole id, which it carries; raises as `Store.content`."""
    edit = Edit.from_bytes(store.content(name), f"the edit {name}")
    return replace(edit, about={**edit.about, "id": name})


def addition(edit: Edit, base: Mapping[str, Any], checks: Mapping[str, Any] | None = None) -> Addition:
    """An edit as a store of that base takes it; the store gives it an id of its own."""
    about = {name: value for name, value in edit.about.items() if name != "id"}
    edit = replace(edit, about=about)
    parts = [part["request"] for part in about.get("parts") or () if part.get("request")]
    request = about.get("request") or ({"parts": parts} if parts else {})
    told: dict[str, Any] = {"request": request, "editor": about.get("editor") or {}}
    return Addition(content=edit.to_bytes(), base=base, checks=checks or {}, stack=about.get("stack") or (), **told)


def _under(model: Any, edit: Edit | None) -> AbstractContextManager[None]:
    return nullcontext() if edit is None else applied(model, edit)
