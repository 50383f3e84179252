"""The HTTP face of a worker: `create_app`.

The routes take and give the forms of `schemas`; what they do is in `operations` (edits) and `answers` (completions), who may do
it in `door`. fastapi is imported when an app is made, not before. The annotations of the routes are evaluated, since fastapi
reads them: this module has no `from __future__ import annotations`.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mendlm.errors import MendError, require
from mendlm.serve import description, operations, page, schemas
from mendlm.serve.answers import ClientGone, Reply, events
from mendlm.serve.door import CALLER, NUMBER, Door, Rules
from mendlm.serve.metrics import CONTENT_TYPE, Metrics, Number
from mendlm.serve.problems import Problem, problem_of
from mendlm.serve.tokens import Tokens
from mendlm.serve.worker import CompletionRequest, Stats, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI

DEFAULT_TOKENS = 16
"""The longest answer to a text whose request does not say, as OpenAI's."""
NOTHING_SENT: dict[str, Any] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own telemetry, off whatever the environment says."""
_ABOUT = """Correct what a language model knows, while it runs.

Every error has OpenAI's form. 400: what was sent cannot be used. 401, 403: no token, or one that may not do this. 404: no such
edit, model or path. 409: the gate refused the edit (`checks` says why), or the edit is undone, or active, already. 413, 415: a
body too large, or no JSON. 429, 503, 504: too busy, closing, too late: try again after `Retry-After` seconds. 507: the server's
disk is full."""
_log = logging.getLogger("mendlm.serve")


def create_app(worker: Worker, *, tokens: Tokens | None = None, name: str = "mendlm", rules: Rules | None = None) -> "FastAPI":
    """The service of a worker, which is started and closed by whoever made it.

    Without `tokens` only requests that name this machine are answered: bind it to a loopback address then. `name` is the
    model's for clients. Raises `MissingPackageError` without fastapi.
    """
    require("fastapi", "serve")
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    found, metrics, created = page.files(), Metrics(), int(time.time())
    rules = rules or Rules()
    rules = Rules(**{**vars(rules), "public": {*rules.public, *(f"/{file}" for file in found)}})
    app = FastAPI(
        title="mendlm",
        version=importlib.metadata.version("mendlm"),
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": schemas.ErrorBody, "description": "An error."}},
        telemetry=NOTHING_SENT,  # type: ignore[arg-type]
    )
    app.add_middleware(Door, tokens=tokens, metrics=metrics, rules=rules)

    class EventStream(StreamingResponse):
        """Server-sent events; whatever ends the sending also ends what makes them."""

        media_type = "text/event-stream"

        async def stream_response(self, send: Any) -> None:
            async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
                await super().stream_response(send)

    async def call(task: operations.Task) -> Any:
        return await asyncio.wrap_future(worker.call(task))

    def refused(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if problem.status in (500, 507):
            _log.error("request %s failed", request.scope[NUMBER], exc_info=error)
        return JSONResponse(problem.body, problem.status, headers=problem.headers)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refused(request, _first(error.errors()))

    def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "there is nothing at this path; /openapi.json lists what there is", 405: "this path takes another method"}
        answer = refused(request, Problem(error.status_code, said.get(error.status_code, str(error.detail)), "no_route"))
        answer.headers.update(error.headers or {})
        return answer

    for kind in (MendError, Problem):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, no_route)

    def author(request: Request, given: str) -> str:
        """Who the journal names: what the client says, and always the token that was used."""
        caller = request.scope.get(CALLER)
        return given if caller in (None, given) else f"{given} (token {caller})" if given else str(caller)

    By = Annotated[str, Query(alias="author", max_length=200, description="Who asks for it; kept in the journal.")]
    Why = Annotated[str, Query(max_length=2000, description="Why; kept in the journal.")]
    missing: dict[int | str, Any] = {404: _error("There is no such thing.")}
    conflict: dict[int | str, Any] = {409: _error("Its state, or its gate, is against it.")}
    zipped: dict[int | str, Any] = {200: {"content": {"application/zip": {}}, "description": "An adapter's folder, zipped."}}
    zipped |= {**missing, "default": _error("An error.")}
    counts: dict[int | str, Any] = {200: {"content": {"text/plain": {}}, "description": "The numbers."}}
    counts |= {"default": _error("An error.")}
    streamed: dict[int | str, Any] = {
        200: {"content": {"text/event-stream": {}}, "description": "The answers; with `stream`, as server-sent events."}
    }

    # Edits

    @app.post("/v1/edits", status_code=201, response_model=schemas.MadeEdit, responses=conflict, tags=["edits"])
    async def make_edit(request: Request, body: schemas.EditRequest) -> Response:
        """Make an edit, ask its gate, and keep it: it is active, and on the disk, when this answers."""
        return JSONResponse(await call(operations.make(body, author(request, body.author), worker.limits)), 201)

    @app.get("/v1/edits", response_model=schemas.EditList, responses=missing, tags=["edits"])
    async def list_edits(
        limit: Annotated[int, Query(ge=1, le=schemas.PAGE, description="The most edits of a page.")] = schemas.PAGE,
        after: Annotated[str | None, Query(max_length=64, description="The last id of the page before.")] = None,
        state: Annotated[Literal["active", "undone", "superseded"] | None, Query(description="Only those.")] = None,
    ) -> Response:
        """The journal's edits, oldest first."""
        return JSONResponse(await call(operations.list_edits(limit, after, state)))

    @app.get("/v1/edits/{id}", response_model=schemas.EditRecord, responses=missing, tags=["edits"])
    async def show_edit(id: str) -> Response:
        """One edit, with all that its gate saw."""
        return JSONResponse(await call(operations.show(id)))

    @app.delete("/v1/edits/{id}", response_model=schemas.EditRecord, responses={**missing, **conflict}, tags=["edits"])
    async def undo_edit(request: Request, id: str, by: By = "", reason: Why = "") -> Response:
        """Undo an edit: the model is as if it had not been made, and what it had replaced is active again."""
        return JSONResponse(await call(operations.turn("undo", id, author(request, by), reason)))

    @app.post("/v1/edits/{id}/redo", response_model=schemas.EditRecord, responses={**missing, **conflict}, tags=["edits"])
    async def redo_edit(request: Request, id: str, by: By = "", reason: Why = "") -> Response:
        """Put an undone edit back in its place."""
        return JSONResponse(await call(operations.turn("redo", id, author(request, by), reason)))

    @app.get("/v1/journal", response_model=schemas.Journal, tags=["edits"])
    async def journal() -> Response:
        """Every entry of the journal, oldest first: who added, undid and redid what, when and why."""
        return JSONResponse(await call(operations.journal))

    @app.post("/v1/check", response_model=schemas.Checks, tags=["edits"])
    async def check() -> Response:
        """Ask again everything that the active edits promised, and the guards: before is the base model, after is today's."""
        return JSONResponse(await call(operations.check))

    @app.post("/v1/preview", response_model=schemas.Preview, tags=["edits"])
    async def preview(body: schemas.PreviewRequest) -> Response:
        """Try an edit on, ask its gate, and throw it away."""
        return JSONResponse(await call(operations.preview(body, worker.limits)))

    @app.get("/v1/edits/{id}/adapter", response_class=Response, responses=zipped, tags=["edits"])
    async def edit_adapter(id: str) -> Response:
        """One edit as a PEFT LoRA adapter."""
        return await archive(operations.one_edit(id), f"edit-{id}.zip")

    @app.get("/v1/adapter", response_class=Response, responses=zipped, tags=["edits"])
    async def active_adapter() -> Response:
        """All active edits as one PEFT LoRA adapter."""
        return await archive(operations.active_edits, "edits.zip")

    async def archive(task: operations.Task, file: str) -> Response:
        content = await asyncio.to_thread(operations.adapter, await call(task))
        return Response(
            content, headers={"Content-Disposition": f'attachment; filename="{file}"'}, media_type="application/zip"
        )

    # Completions

    @app.post("/v1/completions", response_model=schemas.Completion, responses={**streamed, **missing}, tags=["completions"])
    async def complete(request: Request, body: schemas.CompletionBody) -> Response:
        """Continue a text, or several."""
        how = {"max_tokens": body.max_tokens, "default_tokens": DEFAULT_TOKENS, **_sampling(body)}
        return await answer(request, body, [CompletionRequest(prompt=prompt, **how) for prompt in body.prompts])

    @app.post(
        "/v1/chat/completions", response_model=schemas.ChatCompletion, responses={**streamed, **missing}, tags=["completions"]
    )
    async def complete_chat(request: Request, body: schemas.ChatBody) -> Response:
        """Continue a chat."""
        turns = [message.turn() for message in body.messages]
        return await answer(request, body, [CompletionRequest(messages=turns, max_tokens=body.longest, **_sampling(body))])

    async def answer(
        request: Request, body: schemas.CompletionBody | schemas.ChatBody, wanted: list[CompletionRequest]
    ) -> Response:
        if body.model not in (None, name):
            raise Problem(
                404, f"the model {body.model!r} is not served here; ask for {name!r}", "model_not_found", param="model"
            )

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        reply = Reply(name, isinstance(body, schemas.ChatBody), body.with_usage)
        found = events(worker, wanted, gone)
        try:
            if body.stream:
                first = await anext(found)
                return EventStream(reply.stream(first, found), headers={"X-Accel-Buffering": "no"})
            return JSONResponse(await reply.whole(found, len(wanted)))
        except ClientGone:
            return Response(status_code=499)  # as in nginx; nobody sees it

    # The service

    card = {"id": name, "object": "model", "created": created, "owned_by": "mendlm"}

    @app.get("/v1/models", response_model=schemas.ModelList, tags=["service"])
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{id:path}", response_model=schemas.ModelCard, responses=missing, tags=["service"])
    async def model(id: str) -> Response:
        """The model that is served, by its name."""
        if id != name:
            raise Problem(
                404, f"the model {id[:256]!r} is not served here; there is {name!r}", "model_not_found", param="model"
            )
        return JSONResponse(card)

    @app.get("/healthz", response_model=schemas.Health, tags=["service"])
    async def health() -> Response:
        """Whether the service works."""
        if not worker.alive:
            raise Problem(503, "the service is closing, or its worker has ended", "closing")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses=counts, tags=["service"])
    async def metrics_text() -> Response:
        """Counts and times in Prometheus' text format."""
        return Response(metrics.text(_numbers(worker.stats)), media_type=CONTENT_TYPE)

    def file_route(file: page.File, headers: dict[str, str]) -> Callable[[], Awaitable[Response]]:
        async def send_file() -> Response:
            return Response(file.content, media_type=file.type, headers=headers)

        return send_file

    for path, file in found.items():
        headers = {"Content-Security-Policy": page.policy(file.content)} if file.type.startswith("text/html") else {}
        place = "/" if path == page.INDEX else f"/{path}"
        app.add_api_route(place, file_route(file, headers), response_class=Response, include_in_schema=False)
    if page.INDEX not in found:

        @app.get("/", include_in_schema=False)
        async def no_page() -> Response:
            return PlainTextResponse("There is no page here. /openapi.json describes the service.\n", 404)

    @app.get("/docs", include_in_schema=False)
    async def described() -> Response:
        content = description.html(app.openapi())
        return Response(content, media_type=page.TYPES[".html"], headers={"Content-Security-Policy": page.policy(content)})

    app.openapi = functools.cache(functools.partial(_openapi, app.openapi, tokens is not None))  # type: ignore[method-assign]
    return app


def _error(description: str) -> dict[str, Any]:
    """How an answer of `schemas.ErrorBody` is described, whatever the route's own answers are."""
    schema = {"$ref": "#/components/schemas/ErrorBody"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _sampling(body: schemas.CompletionBody | schemas.ChatBody) -> dict[str, Any]:
    """How to answer, as the worker takes it."""
    given = {"temperature": body.temperature, "top_p": body.top_p, "seed": body.seed}
    edits = None if body.edits is None else tuple(body.edits)
    return {**{key: value for key, value in given.items() if value is not None}, "stop": body.stops, "edits": edits}


def _first(errors: Sequence[Any]) -> Problem:
    """What a client is told of the errors of its form. What it sent is not repeated: it may be long."""
    error = next((one for one in errors if not one["type"].endswith("_type")), errors[0])  # else of a union, its first form
    named = [part for part in error["loc"][1:] if isinstance(part, int) or part in schemas.FIELDS]
    if error["type"] in _OF_A_NAME or error["loc"][0] == "query":
        named = list(error["loc"][1:])
    param = ".".join(str(part) for part in named)[:100] or None
    unknown = [str(one["loc"][-1])[:40] for one in errors if one["type"] == "extra_forbidden" and one is not error]
    more = f"; and the field '{unknown[0]}' is not known" if unknown else ""
    said = "this field is not known" if error["type"] == "extra_forbidden" else str(error["msg"]).removeprefix("Value error, ")
    return Problem(400, f"{param}: {said}{more}" if param else f"{said}{more}", "bad_input", param=param)


_OF_A_NAME = ("extra_forbidden", "missing")
"""Errors whose place ends with the name that the client sent, or should have sent."""


def _numbers(stats: Stats) -> list[Number]:
    """What the worker counts."""
    rows, runs = sum(size * count for size, count in stats.batches.items()), sum(stats.batches.values())
    ended = [
        Number("mendlm_completions_total", "counter", "Completions, by how they ended.", count, {"outcome": outcome})
        for outcome, count in sorted(stats.completions.items())
    ]
    calls = [
        Number(
            "mendlm_calls_total", "counter", "Edits, undos, lists and previews, by how they ended.", count, {"outcome": outcome}
        )
        for outcome, count in sorted(stats.calls.items())
    ]
    plain = (
        Number("mendlm_waiting", "gauge", "Accepted and not yet begun.", stats.waiting),
        Number("mendlm_running", "gauge", "Rows that are being decoded.", stats.running),
        Number("mendlm_batches_total", "counter", "Batches that were begun.", runs),
        Number("mendlm_rows_total", "counter", "Completions in those batches.", rows),
        Number("mendlm_prompt_tokens_total", "counter", "Tokens of prompts.", stats.prompt_tokens),
        Number("mendlm_completion_tokens_total", "counter", "Tokens of answers.", stats.completion_tokens),
        Number(
            "mendlm_waited_seconds_total",
            "counter",
            "How long completions had waited when they were begun.",
            stats.waited_seconds,
        ),
        Number("mendlm_decoding_seconds_total", "counter", "Time spent on completions.", stats.decoding_seconds),
        Number("mendlm_calling_seconds_total", "counter", "Time spent on edits and other calls.", stats.calling_seconds),
    )
    return [*ended, *calls, *plain]


def _openapi(plain: Callable[[], dict[str, Any]], with_tokens: bool) -> dict[str, Any]:
    """The description of the service, with its tokens."""
    found = plain()
    if with_tokens:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found
