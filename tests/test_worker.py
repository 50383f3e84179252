import contextlib
import copy
import dataclasses
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

import oracles
from cases import byte_tokenizer, generator, tiny
from mendlm.apply import Edit, stacked
from mendlm.errors import InputError
from mendlm.layers import default_layers
from mendlm.serve import worker as module
from mendlm.serve.worker import (
    Busy,
    Closed,
    CompletionRequest,
    Finished,
    Limits,
    Piece,
    Stats,
    TimedOut,
    UnknownEdit,
    Worker,
)
from mendlm.text import Encoded, Formatter

WAIT = 30  # seconds that a test waits for what must come


@dataclass
class Record:
    id: str


@dataclass
class FakeStore:
    edits: dict[str, Edit]
    undone: set[str] = field(default_factory=set)

    def active(self):
        return [Record(name) for name in self.edits if name not in self.undone]

    def record(self, name):
        if name not in self.edits:
            raise InputError(f"no edit {name!r} in the store")
        return Record(name)


class FakeSession:
    """What a worker needs of a session: two random edits that change the model's answers."""

    def __init__(self, name="llama"):
        self.model, self.copy = tiny(name), copy.deepcopy(tiny(name))
        self.formatter = Formatter.of(self.model, byte_tokenizer())
        specs = default_layers(self.model)
        self.store = FakeStore({n: oracles.random_edit(specs, generator(i), size=1.5) for i, n in enumerate("ab", 1)})

    def stack(self, ids):
        chosen = [one.id for one in self.store.active()] if ids is None else [one for one in self.store.edits if one in ids]
        return stacked([self.store.edits[one] for one in chosen]) if chosen else None

    @property
    def active(self):
        return self.stack(None)

    def answer(self, prompt, ids, tokens=8):
        """The oracle: the answer by transformers' own generation, from a copy of the model, since the worker owns that."""
        text, edit = [Encoded(self.formatter.encode(prompt, None).prompt, ())], self.stack(ids)
        with edit.on(self.copy) if edit is not None else contextlib.nullcontext():
            return self.formatter.decode(self.formatter.generate(self.copy, text, tokens)[0])


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self, then=None):
        self.events, self.ended, self.then, self.threads = [], threading.Event(), then, set()

    def __call__(self, event):
        assert not self.ended.is_set(), "heard after the end"
        self.events.append(event)
        self.threads.add(threading.current_thread().name)
        if self.then:
            self.then(event)
        if not isinstance(event, Piece):
            self.ended.set()

    @property
    def end(self):
        assert self.ended.wait(WAIT)
        return self.events[-1]

    @property
    def text(self):
        assert isinstance(self.end, Finished), self.end
        return "".join(event.text for event in self.events[:-1])


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def session():
    return FakeSession()


@pytest.fixture
def make(session):
    """Workers that are closed after the test."""
    made = []

    def one(clock=None, **limits):
        made.append(Worker(session, Limits(**limits), **({"clock": clock} if clock else {})))
        return made[-1]

    yield one
    for worker in made:
        worker.close(0)


def ask(worker, prompt="The river", then=None, **request):
    heard = Heard(then)
    heard.ticket = worker.complete(CompletionRequest(prompt=prompt, **{"max_tokens": 8, **request}), heard)
    return heard


@pytest.fixture
def stuck():
    """A call that runs until it is let go."""

    class Stuck:
        begun, go = threading.Event(), threading.Event()

        def __call__(self, session):
            self.begun.set()
            assert self.go.wait(WAIT)
            return "went on"

        def occupies(self, worker):
            self.future = worker.call(self)
            assert self.begun.wait(WAIT)

    one = Stuck()
    one.begun, one.go = threading.Event(), threading.Event()
    yield one
    one.go.set()


# Answers


def test_requests_of_one_batch_answer_under_their_own_edits(session, make):
    worker = make(batch=8)
    sets = [None, (), ("a",), ("b",), ("b", "a"), ("a", "a")]
    heard = [ask(worker, "The capital of France is", edits=ids) for ids in sets]
    worker.start()
    wanted = [session.answer("The capital of France is", ids) for ids in sets]
    assert [one.text for one in heard] == wanted
    assert len(set(wanted)) == 4
    assert [one.end.edits for one in heard] == [("a", "b"), (), ("a",), ("b",), ("b", "a"), ("a",)]
    assert all(len(one.events) > 2 for one in heard)  # streamed, not sent at the end
    assert {name for one in heard for name in one.threads} == {"mendlm worker"}
    worker.close()
    stats = worker.stats
    assert stats.batches == {6: 1}
    assert sum(stats.completions.values()) == 6
    assert stats.completion_tokens == sum(one.end.completion_tokens for one in heard)
    assert stats.prompt_tokens == sum(one.end.prompt_tokens for one in heard)
    assert stats.decoding_seconds > 0
    assert (stats.waiting, stats.running) == (0, 0)


def test_an_undo_between_takes_effect_with_the_next(session, make, stuck):
    worker = make()
    before = ask(worker)
    undone = worker.call(lambda session: session.store.undone.add("b"))
    after, named = ask(worker), ask(worker, edits=("b",))
    redone = worker.call(lambda session: session.store.undone.clear())
    again = ask(worker)
    worker.start()
    assert (undone.result(WAIT), redone.result(WAIT)) == (None, None)
    assert before.text == again.text == session.answer("The river", ("a", "b"))
    assert after.text == session.answer("The river", ("a",)) != before.text
    assert named.text == session.answer("The river", ("b",))
    worker.close()
    assert worker.stats.batches == {1: 2, 2: 1}
    assert worker.stats.calls == {"done": 2}


def test_an_undo_while_an_answer_is_made_leaves_it_as_it_was_begun(session, make):
    undone = []
    worker = make()
    running = ask(worker, then=lambda event: undone or undone.append(worker.call(lambda s: s.store.undone.add("b"))))
    worker.start()
    assert running.text == session.answer("The river", ("a", "b"))
    undone[0].result(WAIT)
    assert ask(worker).text == session.answer("The river", ("a",))


def test_chats_sampling_stops_and_limits_reach_the_decoder(session, make):
    worker = make()
    worker.start()
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who runs?"})
    heard = Heard()
    worker.complete(CompletionRequest(messages=turns, max_tokens=5, edits=()), heard)
    rendered = "[system]: Be brief.\n[user]: Who runs?\n[assistant]: "
    assert heard.text == session.answer(rendered, (), 5)
    whole = ask(worker, edits=()).text
    assert ask(worker, edits=(), stop=(whole[3:5],)).text == whole[: whole.index(whole[3:5])]
    drawn = [ask(worker, temperature=2.0, top_p=0.9, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(worker, max_tokens=None).end.completion_tokens > 8
    one = ask(worker, "a" * 126, max_tokens=None)
    assert one.end.prompt_tokens + one.end.completion_tokens <= 128


# The queue


def test_completions_side_by_side_batch_and_all_take_their_turn(session, make, stuck):
    worker = make(batch=2)
    order = []

    def note(name):
        return lambda event: isinstance(event, Finished) and order.append(name)

    heard = [ask(worker, then=note(f"c{i}")) for i in range(3)]
    call = worker.call(lambda session: order.append("call"))
    heard += [ask(worker, then=note(f"c{i}")) for i in range(3, 5)]
    assert worker.stats.waiting == 6
    worker.start()
    worker.close()
    assert call.done()
    assert all(one.text for one in heard)
    assert order == ["c0", "c1", "c2", "call", "c3", "c4"]
    assert worker.stats.batches == {2: 2, 1: 1}


def test_a_completion_waits_for_company(make, stuck):
    worker = make(gather_ms=1000 * WAIT, batch=2)
    worker.start()
    first = ask(worker)
    assert not first.ended.wait(0.05)
    second = ask(worker, "a")
    assert isinstance(first.end, Finished)
    assert isinstance(second.end, Finished)
    assert worker.stats.batches == {2: 1}
    alone = ask(worker)
    worker.call(lambda session: None).result(WAIT)  # behind a call, nobody could join it
    assert isinstance(alone.end, Finished)


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(make, stuck):
    worker = make(waiting=2)
    worker.start()
    stuck.occupies(worker)
    waiting, call = ask(worker), worker.call(lambda session: 7)
    with pytest.raises(Busy, match="2 requests are waiting already"):
        ask(worker)
    with pytest.raises(Busy):
        worker.call(lambda session: None)
    assert call.cancel()
    more = ask(worker)  # the cancelled call has made room
    with pytest.raises(Busy):
        ask(worker)
    more.ticket.cancel()
    last = ask(worker)
    stuck.go.set()
    assert isinstance(waiting.end, Finished)
    assert isinstance(last.end, Finished)
    assert isinstance(ask(worker).end, Finished)
    assert not more.events
    worker.close()
    stats = worker.stats
    assert (stats.completions["refused"], stats.completions["cancelled"]) == (2, 1)
    assert stats.calls == {"refused": 1, "cancelled": 1, "done": 1}


def test_a_cancelled_future_is_not_run(make, stuck):
    worker, ran = make(), []
    worker.start()
    stuck.occupies(worker)
    call = worker.call(ran.append)
    assert call.cancel()
    stuck.go.set()
    assert worker.call(lambda session: "next").result(WAIT) == "next"
    assert stuck.future.result(WAIT) == "went on"
    assert not ran
    with pytest.raises(CancelledError):
        call.result(0)


def test_a_row_whose_client_has_gone_leaves_the_batch(session, make):
    worker = make()
    leaving = ask(worker, then=lambda event: leaving.ticket.cancel(), max_tokens=100)
    failing = ask(worker, then=lambda event: 1 / 0, max_tokens=100)
    staying = ask(worker, then=lambda event: silent.ticket.cancel())
    silent = ask(worker, max_tokens=100)
    worker.start()
    assert staying.text == session.answer("The river", None)
    worker.close()
    assert len(leaving.events) == len(failing.events) == 1
    assert not silent.events
    stats = worker.stats
    assert stats.completions["cancelled"] == 3
    assert stats.completion_tokens < 20


# Time


def test_who_waits_past_its_time_is_never_begun(make, stuck):
    clock = Clock()
    worker = make(clock, seconds=10)
    late = ask(worker)
    clock.now = 4
    early = ask(worker)
    clock.now = 10.5
    worker.start()
    assert isinstance(late.end, TimedOut)
    assert "within 10 seconds" in str(late.end)
    assert isinstance(early.end, Finished)
    worker.close()
    assert worker.stats.batches == {1: 1}
    assert worker.stats.completions["timed out"] == 1


def test_a_call_that_waits_past_its_time_is_never_run(make):
    clock, ran = Clock(), []
    worker = make(clock, seconds=10)
    late = worker.call(lambda session: ran.append("late"))
    clock.now = 4
    early = worker.call(lambda session: ran.append("early"))
    clock.now = 10.5
    worker.start()
    with pytest.raises(TimedOut, match="more than 10 seconds"):
        late.result(timeout=30)
    early.result(timeout=30)
    worker.close()
    assert ran == ["early"]
    assert worker.stats.calls == {"timed out": 1, "done": 1}


def test_a_row_past_its_time_leaves_the_batch_and_who_waits_hears_of_it_too(session, make):
    clock = Clock()
    worker = make(clock, seconds=10, batch=2)

    def later(event):
        if isinstance(event, Piece):
            clock.now = 10.5

    def look(event):
        if isinstance(event, Finished):
            heard.append(waiting.ended.is_set())

    heard = []
    slow = ask(worker, then=later, max_tokens=100)
    clock.now = 5
    fast = ask(worker, then=look)
    clock.now = 0
    waiting = ask(worker)
    clock.now = 5
    worker.start()
    assert isinstance(slow.end, TimedOut)
    assert isinstance(waiting.end, TimedOut)
    assert fast.text == session.answer("The river", None)
    worker.close()
    assert heard == [True]  # not only when its turn came
    assert len(slow.events) == 2
    assert worker.stats.completions["timed out"] == 2
    assert worker.stats.batches == {2: 1}


# Errors


def test_an_error_goes_to_its_own_and_the_thread_lives_on(session, make):
    worker = make(prompt_tokens=100)
    good = ask(worker)
    unknown = ask(worker, edits=("a", "nobody"))
    empty = ask(worker, "  ")
    long = ask(worker, "x" * 101)
    wide = ask(worker, "x" * 99, max_tokens=40)
    broken = worker.call(lambda session: 1 / 0)
    quits = worker.call(lambda session: sys.exit(3))
    fine = worker.call(lambda given: given is session)
    worker.start()
    assert good.text == session.answer("The river", None)
    assert isinstance(unknown.end, UnknownEdit)
    assert "'nobody'" in str(unknown.end)
    for heard, words in (
        (empty, "prompt is empty"),
        (long, "101 tokens; this service allows at most 100"),
        (wide, "99 tokens and max_tokens is 40, but the model's window holds 128"),
    ):
        assert isinstance(heard.end, InputError)
        assert words in str(heard.end)
    with pytest.raises(ZeroDivisionError):
        broken.result(WAIT)
    with pytest.raises(SystemExit):
        quits.result(WAIT)
    assert fine.result(WAIT)
    worker.close()
    assert worker.stats.completions["failed"] == 4
    assert worker.stats.calls == {"failed": 2, "done": 1}
    assert worker.stats.batches == {1: 1}


def test_an_error_of_a_batch_goes_to_all_of_it_and_no_further(session, make, monkeypatch):
    worker, decode = make(), module.decode

    def failing(*given, **options):
        running = decode(*given, **options)
        yield next(running)
        raise MemoryError("all of it")

    monkeypatch.setattr(module, "decode", failing)
    heard = [ask(worker), ask(worker, "a")]
    worker.start()
    assert all(isinstance(one.end, MemoryError) for one in heard)
    monkeypatch.setattr(module, "decode", decode)
    assert ask(worker).text == session.answer("The river", None)


def test_what_cannot_be_meant_is_refused_at_once(make):
    worker = make(max_tokens=20)
    with pytest.raises(InputError, match="max_tokens is 21; this service allows at most 20"):
        ask(worker, max_tokens=21)
    with pytest.raises(InputError, match="either a prompt or messages"):
        CompletionRequest()
    with pytest.raises(InputError, match="either a prompt or messages"):
        CompletionRequest(prompt="a", messages=[{"role": "user", "content": "a"}])
    for name, value in (("max_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("stop", tuple("abcde")), ("seed", -1)):
        with pytest.raises(InputError, match=name):
            CompletionRequest(prompt="a", **{name: value})
    for one in dataclasses.fields(Limits):
        with pytest.raises(InputError, match=f"{one.name} must be at least"):
            Limits(**{one.name: -1})
    with pytest.raises(InputError, match="only decoders"):
        Worker(SimpleNamespace(formatter=Formatter.of(tiny("t5"), byte_tokenizer())))
    assert worker.stats == Stats()


# The end


def test_closing_finishes_what_was_accepted_and_takes_no_more(session, make, stuck):
    worker = make(batch=2)
    worker.start()
    stuck.occupies(worker)
    heard = [ask(worker) for _ in range(3)]
    call = worker.call(lambda session: "done")
    closing = threading.Thread(target=worker.close)
    closing.start()
    while not worker._closing:
        pass
    with pytest.raises(Closed, match="shutting down"):
        ask(worker)
    with pytest.raises(Closed):
        worker.call(lambda session: None)
    stuck.go.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert [one.text for one in heard] == [session.answer("The river", None)] * 3
    assert call.result(0) == "done"
    assert not worker._thread.is_alive()
    worker.close()  # harmless
    worker.close(1)


def test_a_grace_ends_what_is_left(make):
    begun = threading.Event()
    worker = make(batch=1, max_tokens=10**6)
    endless = ask(worker, "a", then=lambda event: begun.set(), max_tokens=100)
    slow = threading.Event()
    endless.then = lambda event: (begun.set(), slow.wait(0.2))
    waiting, call = ask(worker), worker.call(lambda session: None)
    worker.start()
    assert begun.wait(WAIT)
    worker.close(0.01)
    assert isinstance(endless.end, Closed)
    assert isinstance(waiting.end, Closed)
    with pytest.raises(Closed):
        call.result(0)
    assert worker.stats.completions == {"closed": 2}
    assert worker.stats.calls == {"closed": 1}


def test_closing_a_worker_that_was_never_started_ends_what_waits(make):
    worker = make()
    heard, call = ask(worker), worker.call(lambda session: None)
    worker.close()
    assert isinstance(heard.end, Closed)
    with pytest.raises(Closed):
        call.result(0)


PROGRAM = """
import sys, time
sys.path.insert(0, "tests")
from test_worker import FakeSession, Worker
worker = Worker(FakeSession())
worker.start()
worker.call(lambda session: (time.sleep(0.3), print("first", flush=True)))
worker.call(lambda session: print("second", flush=True))
print("end of the program", flush=True)
"""


@pytest.mark.slow
def test_a_program_that_ends_without_closing_still_does_its_work_and_ends():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n") == ["end of the program", "first", "second", ""]
