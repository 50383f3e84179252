"""Completions in OpenAI's form: whole, or as server-sent events.

The worker speaks on its own thread; here everything is on the event loop. A client that goes away is an event like any other,
and takes its rows out of the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mendlm.serve.problems import problem_of
from mendlm.serve.worker import CompletionRequest, Finished, Piece, Worker

Gone = Callable[[], Awaitable[None]]
"""Returns when the client has gone away."""
Event = Piece | Finished
Events = AsyncGenerator[tuple[int, Event]]
_log = logging.getLogger("mendlm.serve")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def events(worker: Worker, requests: Sequence[CompletionRequest], gone: Gone) -> Events:
    """What the worker says about each of the requests, by index, until all are finished.

    Ends them if this is closed early. Raises what the worker raises, and `ClientGone`.
    """
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()

    def listener(index: int) -> Callable[[Event | BaseException], None]:
        def tell(event: Event | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(inbox.put_nowait, (index, event))

        return tell

    async def watch() -> None:
        await gone()
        inbox.put_nowait((-1, ClientGone()))

    tickets, watching = [], asyncio.ensure_future(watch())
    try:
        for index, request in enumerate(requests):
            tickets.append(worker.complete(request, listener(index)))
        left = len(requests)
        while left:
            index, event = await inbox.get()
            if isinstance(event, BaseException):
                raise event
            left -= isinstance(event, Finished)
            yield index, event
    finally:
        watching.cancel()
        for ticket in tickets:
            ticket.cancel()


@dataclass(frozen=True)
class Reply:
    """How to write the answers to one request: its id, and which of OpenAI's two forms."""

    model: str
    chat: bool
    usage: bool
    """Whether a stream ends with the counts of tokens."""
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        begin = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{begin}-{self.number}", "object": kind, "created": self.created, "model": self.model}

    async def whole(self, found: Events, count: int) -> dict[str, Any]:
        """All answers as one object."""
        texts, ends = [""] * count, dict[int, Finished]()
        async with contextlib.aclosing(found):
            async for index, event in found:
                if isinstance(event, Finished):
                    ends[index] = event
                else:
                    texts[index] += event.text
        choices = []
        for index, text in enumerate(texts):
            said: dict[str, Any] = {"text": text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": ends[index].reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": _usage(list(ends.values()))}

    async def stream(self, first: tuple[int, Event], found: Events) -> AsyncGenerator[str]:
        """Server-sent events: a chunk a piece, and `[DONE]`. An error on the way is the last event, in OpenAI's form.

        `first` has been taken from what is found: until it has come, an error can still be an HTTP status.
        """
        ends: list[Finished] = []
        told: tuple[int, Event] | None = first
        async with contextlib.aclosing(found):
            try:
                if self.chat:
                    yield self._chunk(0, {"role": "assistant", "content": ""}, None)
                while told is not None:
                    index, event = told
                    if isinstance(event, Finished):
                        ends.append(event)
                        yield self._chunk(index, {} if self.chat else {"text": ""}, event.reason)
                    else:
                        yield self._chunk(index, {"content" if self.chat else "text": event.text}, None)
                    told = await anext(found, None)
                if self.usage:
                    yield _event({**self._head(self._kind), "choices": [], "usage": _usage(ends)})
                yield "data: [DONE]\n\n"
            except ClientGone:
                return
            except Exception as error:
                problem = problem_of(error)
                if problem.status == 500:
                    _log.exception("the stream %s was cut off", self.number)
                yield _event(problem.body)

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, said: dict[str, str], reason: str | None) -> str:
        choice = {"index": index, **({"delta": said} if self.chat else said), "logprobs": None, "finish_reason": reason}
        return _event({**self._head(self._kind), "choices": [choice], **({"usage": None} if self.usage else {})})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(ends: Sequence[Finished]) -> dict[str, int]:
    given, said = sum(end.prompt_tokens for end in ends), sum(end.completion_tokens for end in ends)
    return {"prompt_tokens": given, "completion_tokens": said, "total_tokens": given + said}
