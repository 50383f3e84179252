"""One thread that owns a session: it makes edits and answers, one after the other, and answers in batches.

Edits and other calls share one queue with completions, first come, first served. Completions that stand side by side in it are
decoded as one batch, each under its own set of edits; a call runs alone. So an undo during a batch takes effect with the
next one, and nothing ever touches the model from two threads. What comes while the queue is full is refused (`Busy`).

Knows a session and decoding; knows no HTTP.
"""

from __future__ import annotations

import copy
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mendlm.apply import Edit
from mendlm.errors import InputError, MendError
from mendlm.serve.decoding import BASE, Reason, Row, decode, require_decoder

if TYPE_CHECKING:
    from mendlm.session import Session

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
Outcome = Literal["stop", "length", "cancelled", "timed out", "failed", "closed", "refused"]
"""How a completion ended: by itself, by a limit, its client gone, out of time, an error, a shutdown; or not accepted."""
_WATCH = 1.0
"""How often, in seconds, an idle worker looks whether its program has ended without closing it."""


class Busy(MendError):
    """The queue is full: try again later."""


class Closed(MendError):
    """The worker takes nothing more, or was closed before this was done."""


class TimedOut(MendError):
    """An answer took longer than it may."""


class UnknownEdit(InputError):
    """An edit that the store does not have."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker accepts and how it batches. Raises `InputError` for limits that make no sense."""

    waiting: int = 64
    """How many calls and completions may wait, accepted and not yet begun; more are refused."""
    batch: int = 16
    """How many completions are decoded together."""
    gather_ms: float = 5
    """How long a completion waits for company, in milliseconds after it was accepted."""
    max_tokens: int = 512
    """The longest answer that may be asked for, in tokens."""
    prompt_tokens: int = 2048
    """The longest prompt, in tokens; the model's window may allow less."""
    edit_tokens: int = 8192
    """The most tokens of all prompts of an edit or a preview together; their answers keep to `max_tokens`."""
    seconds: float = 60
    """How long a completion may take, from its acceptance to the end of its answer, and how long a call may wait."""

    def __post_init__(self) -> None:
        for one in fields(self):
            least, value = {"gather_ms": 0.0, "seconds": 0.001}.get(one.name, 1), getattr(self, one.name)
            if not value >= least:
                raise InputError(f"{one.name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A text or a chat to be continued, and how. Raises `InputError` for values that cannot be used."""

    prompt: str | None = None
    """The text; either this or `messages`."""
    messages: Sequence[Mapping[str, str]] | None = None
    """The turns of a chat, each with a `role` (system, user or assistant) and its `content`."""
    max_tokens: int | None = None
    """The longest answer in tokens. None: as long as the worker's limits and the model's window allow, and `default_tokens`."""
    default_tokens: int | None = None
    temperature: float = 0.0
    """As in `Row`, like the next three."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    edits: tuple[str, ...] | None = None
    """Ids of edits to answer under, whatever their state; `()`: the base. None: those active when the answer is begun."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InputError("give either a prompt or messages")
        self.row((0,), 1 if self.max_tokens is None else self.max_tokens, BASE)

    def row(self, prompt: tuple[int, ...], max_tokens: int, edit: int) -> Row:
        """As it is decoded."""
        how: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop": self.stop}
        return Row(prompt=prompt, max_tokens=max_tokens, edit=edit, **how)


@dataclass(frozen=True)
class Piece:
    """New text of an answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer."""

    reason: Reason
    prompt_tokens: int
    completion_tokens: int
    """Without an end-of-sequence token."""
    edits: tuple[str, ...]
    """The ids of the edits that it was made under."""


Listener = Callable[[Piece | Finished | Exception], None]


@dataclass
class Stats:
    """What a worker has done since it was made, and what it has to do."""

    completions: Counter[Outcome] = field(default_factory=Counter)
    """By how they ended."""
    calls: Counter[Literal["done", "failed", "cancelled", "timed out", "closed", "refused"]] = field(default_factory=Counter)
    batches: Counter[int] = field(default_factory=Counter)
    """How many batches were begun, by their number of rows."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    waited_seconds: float = 0.0
    """That begun completions had waited, together."""
    decoding_seconds: float = 0.0
    calling_seconds: float = 0.0
    waiting: int = 0
    """Accepted and not yet begun, now."""
    running: int = 0
    """Rows that are decoded, now."""


@dataclass(eq=False)
class Ticket:
    """An accepted completion."""

    request: CompletionRequest
    listener: Listener
    accepted: float
    due: float
    worker: Worker
    gone: bool = False
    """Nobody listens any more."""
    ended: bool = False

    def cancel(self) -> None:
        """The client has gone: nothing more is said to the listener, and the row leaves the queue or the batch."""
        self.worker._cancel(self)


@dataclass(eq=False)
class _Call:
    """An accepted call."""

    task: Callable[[Session], Any]
    future: Future[Any]
    due: float
    """When it is no longer begun."""


class Worker:
    """The thread that owns a session, and its queue.

    What is accepted before `start` waits for it. End it with `close`, which finishes what was accepted. The thread is not a
    daemon: a program that ends without `close` still gets its accepted work done, and ends within a second after that.
    Raises `InputError` for a model that is no decoder.
    """

    def __init__(self, session: Session, limits: Limits | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        require_decoder(session.formatter)
        self.limits = limits or Limits()
        self._session, self._clock = session, clock
        self._queue: deque[Ticket | _Call] = deque()
        self._changed = threading.Condition()  # guards all that follows, and the tickets
        self._closing = self._aborted = False
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="mendlm worker", daemon=False)

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For every thread

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def call(self, task: Callable[[Session], T]) -> Future[T]:
        """Run a task with the session, alone on the worker's thread: an edit, an undo, a list. Raises `Busy` and `Closed`.

        A future that is cancelled before its turn is not run, and one that waits longer than `Limits.seconds` ends with
        `TimedOut` without being run; what has begun is never cut off.
        """
        future: Future[T] = Future()
        with self._changed:
            self._accept(_Call(task, future, self._clock() + self.limits.seconds), self._stats.calls)
        return future

    def complete(self, request: CompletionRequest, listener: Listener) -> Ticket:
        """Answer a request: the listener hears each `Piece` and then `Finished`, or an exception, after which it hears no more.

        It is called on the worker's thread, which waits for it: it should be quick, and if it raises, its row is cancelled.
        Raises `Busy` and `Closed`, and `InputError` for more tokens than the limits allow. The rest is told to the listener,
        since it needs the session: `InputError` for a prompt that is too long or cannot be encoded, `UnknownEdit`, `TimedOut`,
        `Closed` after a grace.
        """
        if (request.max_tokens or 0) > self.limits.max_tokens:
            raise InputError(f"max_tokens is {request.max_tokens}; this service allows at most {self.limits.max_tokens}")
        now = self._clock()
        ticket = Ticket(request, listener, now, now + self.limits.seconds, self)
        with self._changed:
            self._accept(ticket, self._stats.completions)
        return ticket

    def close(self, grace: float | None = None) -> None:
        """Accept no more, finish what was accepted, and end the thread.

        After `grace` seconds (None: however long it takes) what is left is ended with `Closed`; a call that runs is waited for.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(grace)
        with self._changed:
            self._aborted = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        self._abandon()  # of a worker that was never started

    @property
    def alive(self) -> bool:
        """Whether it takes work, and does it."""
        return self._thread.is_alive() and not self._closing

    @property
    def stats(self) -> Stats:
        """A copy of the counters and gauges."""
        with self._changed:
            self._stats.waiting = len(self._queue)
            return copy.deepcopy(self._stats)

    def _accept(self, work: Ticket | _Call, counter: Counter[Any]) -> None:
        if self._closing:
            counter["refused"] += 1
            raise Closed("the service is shutting down; send this to another, or later")
        if len(self._queue) >= self.limits.waiting:
            self._forget_cancelled()
        if len(self._queue) >= self.limits.waiting:
            counter["refused"] += 1
            raise Busy(f"{len(self._queue)} requests are waiting already, which is as many as may; try again later")
        self._queue.append(work)
        self._changed.notify_all()

    def _forget_cancelled(self) -> None:
        for work in list(self._queue):
            if isinstance(work, _Call) and work.future.cancelled():
                work.future.set_running_or_notify_cancel()  # whoever waits for it hears of it
                self._stats.calls["cancelled"] += 1
                self._queue.remove(work)

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.gone = True
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._end(ticket, "cancelled", None)

    # On the worker's thread

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                if isinstance(work, _Call):
                    self._do(work)
                else:
                    self._answer(work)
        finally:
            self._closing = True
            self._abandon()

    def _next(self) -> _Call | list[Ticket] | None:
        """The first of the queue; if it is a completion, with its company. None at the end."""
        with self._changed:
            while not self._queue and not self._closing:
                if threading.main_thread().is_alive():
                    self._changed.wait(_WATCH)
                else:
                    self._closing = True
            if not self._queue or self._aborted:
                return None
            if isinstance(first := self._queue[0], _Call):
                self._queue.popleft()
                return first
            left = first.accepted + self.limits.gather_ms / 1000 - self._clock()
            self._changed.wait_for(lambda: self._closing or self._complete(), max(0.0, left))
            company = self._company()
            for _ in company:
                self._queue.popleft()
            return company

    def _company(self) -> list[Ticket]:
        """The completions that lead the queue, as many as one batch takes."""
        company: list[Ticket] = []
        for work in itertools.islice(self._queue, self.limits.batch):
            if isinstance(work, _Call):
                break
            company.append(work)
        return company

    def _complete(self) -> bool:
        """Whether who comes now could not join the first completion of the queue."""
        company = len(self._company())
        return company == self.limits.batch or company < len(self._queue)

    def _do(self, call: _Call) -> None:
        begun = self._clock()
        outcome: Literal["done", "failed", "cancelled", "timed out"] = "done"
        if not call.future.set_running_or_notify_cancel():
            outcome = "cancelled"
        elif begun > call.due:
            outcome = "timed out"
            call.future.set_exception(TimedOut(f"it waited for more than {self.limits.seconds:g} seconds, and was not begun"))
        else:
            try:
                result = call.task(self._session)
            except BaseException as error:
                outcome = "failed"
                call.future.set_exception(error)
            else:
                call.future.set_result(result)
        with self._changed:
            self._stats.calls[outcome] += 1
            self._stats.calling_seconds += self._clock() - begun

    def _answer(self, tickets: Sequence[Ticket]) -> None:
        """Decode completions as one batch. What goes wrong is told to its own listener, or to all if it befalls the batch."""
        batch: list[tuple[Ticket, Row, tuple[str, ...]]] = []
        edits: dict[frozenset[str], Edit] = {}
        for ticket in tickets:
            if self._stops(ticket):
                continue
            try:
                batch.append((ticket, *self._prepare(ticket.request, edits)))
            except Exception as error:
                self._end(ticket, "failed", error)
        if not batch:
            return
        begun, tokens, gone = self._clock(), [0] * len(batch), set[int]()
        rows = [row for _, row, _ in batch]
        with self._changed:
            self._stats.batches[len(batch)] += 1
            self._stats.running = len(batch)
            self._stats.prompt_tokens += sum(len(row.prompt) for row in rows)
            self._stats.waited_seconds += sum(begun - ticket.accepted for ticket, *_ in batch)
        try:
            for said in decode(self._session.model, self._session.formatter, rows, list(edits.values()), gone=gone):
                for one in said:
                    ticket, row, names = batch[one.row]
                    tokens[one.row] = one.tokens
                    if one.text:
                        self._tell(ticket, Piece(one.text))
                    if one.reason:
                        self._end(ticket, one.reason, Finished(one.reason, len(row.prompt), one.tokens, names))
                gone |= {place for place, (ticket, *_) in enumerate(batch) if self._stops(ticket)}
                self._end_late()
                self._stats.running = len(batch) - len(gone)
        except Exception as error:
            for ticket, *_ in batch:
                self._end(ticket, "failed", error)
        with self._changed:
            self._stats.running = 0
            self._stats.completion_tokens += sum(tokens)
            self._stats.decoding_seconds += self._clock() - begun

    def _prepare(self, request: CompletionRequest, edits: dict[frozenset[str], Edit]) -> tuple[Row, tuple[str, ...]]:
        """A request as a row, and the ids of its edits; they join the sets of edits that the batch already has."""
        form, limits = self._session.formatter, self.limits
        text = form.encode_chat(request.messages) if request.messages is not None else form.encode(request.prompt or "", None)
        size = len(text.prompt)
        if size > limits.prompt_tokens:
            raise InputError(f"the prompt has {size} tokens; this service allows at most {limits.prompt_tokens}")
        room = limits.max_tokens if form.window is None else form.window - size
        most = min(limits.max_tokens, request.default_tokens or limits.max_tokens)
        wanted = min(most, max(1, room)) if request.max_tokens is None else request.max_tokens
        if form.window is not None and wanted > room:
            raise InputError(
                f"the prompt has {size} tokens and max_tokens is {wanted}, but the model's window holds {form.window} "
                "together; shorten the prompt, or ask for fewer tokens"
            )
        names = self._names(request.edits)
        if not names:
            return request.row(text.prompt, wanted, BASE), ()
        if (key := frozenset(names)) not in edits:
            stack = self._session.stack(names)
            assert stack is not None
            edits[key] = stack
        return request.row(text.prompt, wanted, list(edits).index(key)), names

    def _names(self, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
        store = self._session.store
        if wanted is None:
            return tuple(record.id for record in store.active())
        for one in wanted:
            try:
                whole = store.record(one).id
            except InputError as error:
                raise UnknownEdit(str(error)) from None
            if one != whole:  # the beginning of an id could come to mean another edit
                raise UnknownEdit(f"there is no edit {one!r}; give whole ids, as {whole}")
        return tuple(dict.fromkeys(wanted))

    def _stops(self, ticket: Ticket) -> bool:
        """Whether a completion goes on no more; what had to end it now has been told."""
        if ticket.gone:
            self._end(ticket, "cancelled", None)
        elif self._aborted:
            self._end(ticket, "closed", _closed())
        elif self._clock() > ticket.due:
            few = f"no whole answer within {self.limits.seconds:g} seconds; ask for fewer tokens, or try again later"
            self._end(ticket, "timed out", TimedOut(few))
        return ticket.ended

    def _end_late(self) -> None:
        """End the completions that have waited past their time."""
        with self._changed:
            waiting = [work for work in self._queue if isinstance(work, Ticket)]
        if late := [ticket for ticket in waiting if self._stops(ticket)]:
            with self._changed:
                self._queue = deque(work for work in self._queue if work not in late)

    def _abandon(self) -> None:
        """End what still waits."""
        with self._changed:
            left, self._queue = self._queue, deque()
        for work in left:
            if isinstance(work, Ticket):
                self._end(work, "closed", _closed())
            elif work.future.set_running_or_notify_cancel():
                work.future.set_exception(_closed())
                self._stats.calls["closed"] += 1

    def _end(self, ticket: Ticket, outcome: Outcome, event: Finished | Exception | None) -> None:
        """A completion's end: counted once, and told unless nobody listens."""
        with self._changed:
            if ticket.ended:
                return
            ticket.ended = True
            self._stats.completions["cancelled" if ticket.gone else outcome] += 1
        if event is not None:
            self._tell(ticket, event)

    def _tell(self, ticket: Ticket, event: Piece | Finished | Exception) -> None:
        if not ticket.gone:
            try:
                ticket.listener(event)
            except Exception:
                ticket.gone = True
                _LOG.exception("a listener failed; its completion is cancelled")


def _closed() -> Closed:
    return Closed("the service was shut down before this was done; send it to another, or later")
