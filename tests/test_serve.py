"""The service over HTTP: its forms, who may do what, hostile input, and a real server that is ended while it works."""

from __future__ import annotations

import asyncio
import base64
import configparser
import contextlib
import hashlib
import html
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import byte_tokenizer, files_limited_to, tiny
from mendlm.apply import Edit
from mendlm.checkpoint import save_editor
from mendlm.cli import app, main
from mendlm.errors import StorageError
from mendlm.gate import Gate, Guard
from mendlm.layers import default_layers
from mendlm.methods.mend import Mend, MendConfig
from mendlm.models import base_of, load
from mendlm.serve import page, schemas, tokens
from mendlm.serve.app import create_app
from mendlm.serve.door import Door, Rules
from mendlm.serve.metrics import Metrics
from mendlm.serve.worker import Closed, Limits, TimedOut, Worker
from mendlm.store import Store
from mendlm.text import Formatter
from test_session import PROMPTS, new_session

httpx = pytest.importorskip("httpx2")
uvicorn = pytest.importorskip("uvicorn")
TestClient = pytest.importorskip("fastapi.testclient").TestClient

ROOT = Path(__file__).parent.parent
HERE = "http://127.0.0.1"
EDIT = {"prompt": PROMPTS[0], "target": "a baker", "scale": 5.0}
LIMITS = Limits(gather_ms=0, max_tokens=40, prompt_tokens=100)


class Service:
    """A service on a tiny model, and a client of it."""

    def __init__(
        self, *, limits: Limits = LIMITS, rules: Rules | None = None, token_file: Path | None = None, **session: Any
    ) -> None:
        self.session = new_session(**{"rehearse": 1, **session})
        self.worker = Worker(self.session, limits)
        self.worker.start()
        known = None if token_file is None else tokens.Tokens(token_file)
        self.app = create_app(self.worker, tokens=known, name="tiny", rules=rules)
        self.http = TestClient(self.app, base_url=HERE)

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 200, **more: Any) -> Any:
        given = {} if body is None else {"json": body}
        answer = self.http.request(method, path, **given, **more)
        assert answer.status_code == status, answer.text
        if status >= 400:
            check_error(answer)
        return answer.json()

    def edit(self, **change: Any) -> dict[str, Any]:
        return self.ask("POST", "/v1/edits", {**EDIT, **change}, status=201)


def check_error(answer: Any) -> dict[str, Any]:
    """Every error has OpenAI's form and says nothing about the server."""
    told = schemas.ErrorBody.model_validate_json(answer.content, strict=True)
    for secret in ("Traceback", "/tmp", "site-packages", "mendlm/", ".py", "sqlite"):
        assert secret not in answer.text
    assert answer.headers["content-type"] == "application/json"
    check_headers(answer)
    return told.model_dump()["error"]


def check_headers(answer: Any) -> None:
    headers = answer.headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.worker.close(10)


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """One service for the tests that leave it as it is, and those that do not care."""
    made = Service(limits=Limits(gather_ms=0, max_tokens=8, prompt_tokens=100))
    yield made
    made.worker.close(10)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Service, dict[str, dict[str, str]]]]:
    """A service with tokens, and the headers of each role."""
    file = tmp_path / "tokens.json"
    headers = {role: {"Authorization": f"Bearer {tokens.add(file, f'a {role}er', role)}"} for role in tokens.ROLES}
    made = Service(token_file=file)
    yield made, headers
    made.worker.close(10)


# Edits


def test_an_edit_that_joins_another_is_rehearsed() -> None:
    service = Service(rehearse=2)
    made = [service.edit()["record"]["id"], service.edit(prompt=PROMPTS[1], target="Lyon")["record"]["id"]]
    assert [service.session.edits[one].about.get("rehearsed") for one in made] == [None, 2]


def test_an_edit_from_its_making_to_its_redoing(service: Service) -> None:
    base = service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0]})["choices"][0]["text"]
    tried = service.ask("POST", "/v1/preview", {**EDIT, "unrelated": [PROMPTS[1]]})
    schemas.Preview.model_validate(tried)
    assert [one["kind"] for one in tried["asked"]] == ["prompt", "unrelated"]
    assert service.ask("GET", "/v1/edits") == {"object": "list", "data": [], "head": "0" * 64, "has_more": False}

    made = service.edit(
        rephrasings=["Ana is"], unrelated=["Why?", {"prompt": "Who?", "answer": "Bo"}], author="Ana", reason="so"
    )
    schemas.MadeEdit.model_validate(made)
    record = made["record"]
    assert (record["author"], record["reason"], record["state"], record["number"]) == ("Ana", "so", "active", 1)
    assert record["request"]["unrelated"] == [{"prompt": "Why?", "answer": None}, {"prompt": "Who?", "answer": "Bo"}]
    assert record == service.session.store.record(record["id"]).to_json()
    assert made["passed"] == record["checks"]["passed"]
    assert [one["kind"] for one in record["checks"]["asked"]] == ["prompt", "rephrasing", "unrelated", "unrelated"]
    assert record["checks"]["norms"] == service.session.store.record(record["id"]).checks["norms"]

    path = f"/v1/edits/{record['id']}"
    assert service.ask("GET", path) == record
    under = service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0]})["choices"][0]["text"]
    assert under == service.session.answer(PROMPTS[0], max_new_tokens=16) != base
    undone = service.ask("DELETE", path, params={"author": "Bo", "reason": "no"})
    assert undone["state"] == "undone"
    assert service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0]})["choices"][0]["text"] == base
    assert service.ask("DELETE", path, status=409)["error"]["code"] == "conflict"
    assert service.ask("POST", f"{path}/redo")["state"] == "active"
    assert service.ask("POST", f"{path}/redo", status=409)["error"]["code"] == "conflict"
    assert service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0]})["choices"][0]["text"] == under


def test_a_second_edit_of_a_prompt_supersedes_the_first(service: Service) -> None:
    first = service.edit()["record"]["id"]
    assert service.ask("POST", "/v1/preview", {**EDIT, "target": "Bo"})["replaces"] == [first]
    made = service.edit(target="Bo")
    assert made["replaces"] == [first]
    states = {one["id"]: (one["state"], one["superseded_by"]) for one in service.ask("GET", "/v1/edits")["data"]}
    assert states == {first: ("superseded", made["record"]["id"]), made["record"]["id"]: ("active", None)}
    assert service.ask("POST", f"/v1/edits/{first}/redo", status=409)


def test_an_edit_is_made_on_what_is_asked_for(service: Service) -> None:
    first = service.edit()["record"]["id"]
    under = service.edit(prompt="a", on_base=False)["record"]
    base = service.edit(prompt="a")["record"]
    assert (under["stack"], base["stack"]) == ([first], [])
    assert under["file"] != base["file"]


def test_the_journal_and_a_check_of_all_promises(service: Service) -> None:
    made = service.edit(unrelated=[PROMPTS[1]], author="Ana", reason="so")["record"]["id"]
    checks = service.ask("POST", "/v1/check")
    schemas.Checks.model_validate(checks)
    assert [one["kind"] for one in checks["asked"]] == ["prompt", "unrelated"]
    under = service.ask("POST", "/v1/completions", {"prompt": PROMPTS[1], "max_tokens": 4})["choices"][0]["text"]
    assert checks["asked"][1]["after"].startswith(under)
    service.ask("DELETE", f"/v1/edits/{made}", params={"author": "Bo", "reason": "too early"})
    told = service.ask("GET", "/v1/journal")
    schemas.Journal.model_validate(told)
    entries = [(e["kind"], e["edit"], e["author"], e["reason"]) for e in told["data"]]
    assert entries == [("add", made, "Ana", "so"), ("undo", made, "Bo", "too early")]
    assert told["head"] == told["data"][-1]["hash"]
    assert service.ask("POST", "/v1/check")["asked"] == []


def test_pages_of_the_list(service: Service) -> None:
    ids = [service.edit(prompt=f"Who is {who}?")["record"]["id"] for who in ("Ana", "Bo", "Cy")]
    service.ask("DELETE", f"/v1/edits/{ids[1]}")
    page_, after, found = None, {}, []
    while page_ is None or page_["has_more"]:
        page_ = service.ask("GET", "/v1/edits", params={"limit": 1, **after})
        schemas.EditList.model_validate(page_)
        found += [one["id"] for one in page_["data"]]
        after = {"after": found[-1]}
        assert len(found) <= 3
    assert found == ids
    assert page_["head"] == service.session.store.head
    assert [one["id"] for one in service.ask("GET", "/v1/edits", params={"state": "active"})["data"]] == [ids[0], ids[2]]
    service.ask("GET", "/v1/edits", params={"after": "none"}, status=404)
    for bad in ({"limit": 0}, {"limit": "x"}, {"limit": 1001}, {"state": "x"}, {"after": "a" * 65}):
        service.ask("GET", "/v1/edits", params=bad, status=400)


def test_a_refused_edit_is_a_conflict_that_says_why() -> None:
    service = Service(gate=Gate(guards=(Guard(PROMPTS[1]),), on_fail="refuse"))
    error = service.ask("POST", "/v1/edits", {**EDIT, "scale": 50.0}, status=409)["error"]
    assert error["code"] == "gate_refused"
    assert not error["checks"][0]["passed"]
    assert {one["kind"] for one in error["checks"][0]["asked"]} == {"prompt", "guard"}
    assert service.ask("GET", "/v1/edits")["data"] == []
    assert service.edit(scale=50.0, on_fail="report")["passed"] is False
    service.worker.close(10)


def test_ids_are_whole(service: Service) -> None:
    name = service.edit()["record"]["id"]
    for wrong in (name[:6], name + "0", "x", "%00", "a" * 3000, "..%2F..%2Fetc"):
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/redo"), ("GET", "/adapter")):
            service.ask(method, f"/v1/edits/{wrong}{path}", status=404)
    for wrong in ("x", name[:6]):
        error = service.ask("POST", "/v1/completions", {"prompt": "a", "edits": [wrong]}, status=404)["error"]
        assert error["code"] == "unknown_edit"


def test_adapters_hold_the_edits(service: Service, tmp_path: Path) -> None:
    assert service.ask("GET", "/v1/adapter", status=404)["error"]["code"] == "no_edit"
    one, two = service.edit()["record"]["id"], service.edit(prompt=PROMPTS[1], target="Lyon")["record"]["id"]
    for path, wanted in ((f"/v1/edits/{two}/adapter", service.session.edits[two]), ("/v1/adapter", service.session.active)):
        answer = service.http.get(path)
        assert answer.headers["content-type"] == "application/zip"
        check_headers(answer)
        folder = tmp_path / path.replace("/", "-")
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert {"adapter_config.json", "adapter_model.safetensors", "edit.json"} <= set(archive.namelist())
            archive.extractall(folder)
        assert str(tmp_path) not in (folder / "edit.json").read_text()
        edit = Edit.load(folder)
        for name, update in wanted.updates.items():
            assert edit.updates[name].dense().equal(update.dense())
    assert one in service.session.edits


# Completions


def test_completions_are_those_of_the_session(service: Service) -> None:
    answer = service.ask("POST", "/v1/completions", {"prompt": PROMPTS, "max_tokens": 6, "model": "tiny", "user": "me", "n": 1})
    schemas.Completion.model_validate(answer)
    assert [one["text"] for one in answer["choices"]] == service.session.answers(PROMPTS, max_new_tokens=6)
    lengths = [len(service.session.formatter.encode(prompt, None).prompt) for prompt in PROMPTS]
    said = answer["usage"]
    assert said["prompt_tokens"] == sum(lengths)
    assert said["total_tokens"] == said["prompt_tokens"] + said["completion_tokens"]
    assert {one["finish_reason"] for one in answer["choices"]} <= {"stop", "length"}
    chat = service.ask("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 6})
    schemas.ChatCompletion.model_validate(chat)
    assert chat["choices"][0]["message"]["content"] == service.session.answer(PROMPTS[0], chat=True, max_new_tokens=6)
    parts = [{"type": "text", "text": part} for part in (PROMPTS[0][:3], PROMPTS[0][3:])]
    again = service.ask(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 6}
    )
    assert again["choices"] == chat["choices"]


def test_each_request_names_its_edits(service: Service) -> None:
    base = service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0]})["choices"]
    one, two = service.edit()["record"]["id"], service.edit(prompt=PROMPTS[1], target="Lyon")["record"]["id"]
    answers = {
        key: service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0], "edits": edits})["choices"]
        for key, edits in (("base", []), ("one", [one]), ("both", [one, two]), ("active", None))
    }
    assert answers["base"] == base
    assert answers["both"] == answers["active"] != base
    service.ask("DELETE", f"/v1/edits/{two}")
    assert answers["one"] == service.ask("POST", "/v1/completions", {"prompt": PROMPTS[0]})["choices"]


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_adds_up_to_the_whole(shared: Service, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPTS[0]}]} if chat else {"prompt": PROMPTS}
    body = {**body, "max_tokens": 6, "temperature": 1.0, "seed": 3}
    whole = shared.ask("POST", path, body)
    answer = shared.http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    check_headers(answer)
    *chunks, last = events(answer.text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    texts, ends = [""] * len(whole["choices"]), [""] * len(whole["choices"])
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert (chunk["usage"], chunk["id"]) == (None, last["id"])
        texts[choice["index"]] += (choice["delta"].get("content") or "") if chat else choice["text"]
        ends[choice["index"]] = choice["finish_reason"] or ends[choice["index"]]
    assert texts == [one["message"]["content"] if chat else one["text"] for one in whole["choices"]]
    assert ends == [one["finish_reason"] for one in whole["choices"]]
    assert chunks[0]["object"] == ("chat.completion.chunk" if chat else "text_completion")
    assert len(chunks) > 4


def test_what_would_change_the_answer_is_refused(shared: Service) -> None:
    text = {"prompt": "a", "max_tokens": 2}
    neutral = {
        "n": 1, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "logit_bias": {}, "frequency_penalty": 0,
        "presence_penalty": 0.0, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "u",
        "metadata": {"a": "b"}, "store": False, "stop": None, "seed": None, "stream": False, "service_tier": "auto",
    }  # fmt: skip
    shared.ask("POST", "/v1/completions", {**text, **neutral})
    for field, value in (
        ("n", 2),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "b"),
        ("logprobs", 0),
        ("logprobs", True),
        ("top_logprobs", 1),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.1),
        ("presence_penalty", True),
        ("tools", [{}]),
        ("tool_choice", {}),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "high"),
    ):
        error = shared.ask("POST", "/v1/completions", {**text, field: value}, status=400)["error"]
        assert f"'{field}' is not supported" in error["message"]


TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {}, "prompt", "required"),
        ("completions", {"prompt": [1, 2]}, None, "token ids"),
        ("completions", {"prompt": [[1]]}, None, "token ids"),
        ("completions", {"prompt": []}, "prompt", "at least 1"),
        ("completions", {"prompt": ""}, "prompt", "at least 1"),
        ("completions", {"prompt": ["a"] * 33}, "prompt", "at most 32"),
        ("completions", {"prompt": "a" * 70_000}, "prompt", "at most 65536"),
        ("completions", {"prompt": "a " * 60}, None, "allows at most 100"),
        ("completions", {"prompt": " "}, None, "empty"),
        ("completions", {"prompt": "a", "temprature": 1}, "temprature", "not known"),
        ("completions", {"prompt": "a", "temperature": 3}, "temperature", "2"),
        ("completions", {"prompt": "a", "temperature": "1"}, "temperature", "number"),
        ("completions", {"prompt": "a", "temperature": True}, "temperature", "number"),
        ("completions", {"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "1"),
        ("completions", {"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
        ("completions", {"prompt": "a", "max_tokens": 9}, None, "at most 8"),
        ("completions", {"prompt": "a", "seed": -1}, "seed", "0"),
        ("completions", {"prompt": "a", "seed": 2**63}, "seed", "less than"),
        ("completions", {"prompt": "a", "stop": ["a"] * 5}, "stop", "at most 4"),
        ("completions", {"prompt": "a", "stop": ""}, "stop", "at least 1"),
        ("completions", {"prompt": "a", "edits": "x"}, "edits", "list"),
        ("completions", {"prompt": "a", "edits": ["x"] * 1025}, "edits", "1024"),
        ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, None, "stream"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [TURN] * 257}, "messages", "256"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "user"),
        ("chat/completions", {"messages": [{**TURN, "tool_calls": [{}]}]}, "messages.0.tool_calls", "None"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "text"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ("chat/completions", {"messages": [TURN], "max_tokens": 1, "max_completion_tokens": 2}, None, "one of them"),
        ("edits", {"prompt": "a"}, "target", "required"),
        ("edits", {"prompt": "a", "target": " "}, None, "empty"),
        ("edits", {"prompt": "a", "target": "b", "scale": 0}, "scale", "greater than 0"),
        ("edits", {"prompt": "a", "target": "b", "on_fail": "ignore"}, "on_fail", "report"),
        ("edits", {"prompt": "a", "target": "b", "rephrasings": ["a"] * 33}, "rephrasings", "32"),
        ("edits", {"prompt": "a", "target": "b", "unrelated": [{"prompt": "a", "x": 1}]}, None, ""),
        ("edits", {"prompt": "a", "target": "b", "author": "a" * 201}, "author", "200"),
        ("edits", {"prompt": "a\0" * 4000, "target": "b"}, None, "window"),
        ("preview", {"prompt": "a", "target": "b", "reason": "c"}, "reason", "not known"),
        ("preview", [1], None, "object"),
    ],
)  # fmt: skip
def test_bad_input_is_said_to_be_bad(shared: Service, path: str, body: Any, param: str | None, words: str) -> None:
    error = shared.ask("POST", f"/v1/{path}", body, status=400)["error"]
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


def test_an_answer_without_a_length_fits_the_window(shared: Service) -> None:
    window = shared.session.formatter.window
    assert window is not None
    for left in (3, 1):
        service = Service(limits=Limits(gather_ms=0, max_tokens=8, prompt_tokens=window))
        usage = service.ask("POST", "/v1/completions", {"prompt": "a" * (window - left)})["usage"]
        assert usage["prompt_tokens"] == window - left
        assert 1 <= usage["completion_tokens"] <= left
        service.worker.close(10)


def test_bad_input_in_a_query_is_said_to_be_bad(shared: Service) -> None:
    for query, param in (("limit=0", "limit"), ("state=x", "state"), ("after=" + "a" * 65, "after")):
        error = shared.ask("GET", f"/v1/edits?{query}", status=400)["error"]
        assert (error["param"], error["message"][: len(param)]) == (param, param)


@pytest.mark.parametrize("path", ["edits", "preview"])
def test_an_edit_has_a_longest_text(path: str) -> None:
    service = Service(limits=Limits(gather_ms=0, max_tokens=10, edit_tokens=40))
    for body, words in (
        ({**EDIT, "unrelated": ["a" * 12, {"prompt": "a" * 12}], "rephrasings": ["a" * 12]}, "at most 40"),
        ({"prompt": "a", "target": "b" * 12}, "an answer has 13 tokens; this service allows at most 10"),
        ({"prompt": "a", "target": "b", "unrelated": [{"prompt": "a", "answer": "b" * 12}]}, "allows at most 10"),
    ):
        body = {key: value for key, value in body.items() if path == "edits" or key not in ("author", "reason", "on_fail")}
        assert words in service.ask("POST", f"/v1/{path}", body, status=400)["error"]["message"]
    service.ask(
        "POST", f"/v1/{path}", {"prompt": "a" * 20, "target": "b", "unrelated": ["a"]}, status=201 if path == "edits" else 200
    )
    service.worker.close(10)


def test_a_model_that_is_not_served(shared: Service) -> None:
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": [TURN]})):
        error = shared.ask("POST", f"/v1/{path}", {**body, "model": "gpt-4"}, status=404)["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert [card["id"] for card in shared.ask("GET", "/v1/models")["data"]] == ["tiny"]
    assert shared.ask("GET", "/v1/models/tiny")["id"] == "tiny"
    shared.ask("GET", "/v1/models/org/other", status=404)


# What the worker has to say


def test_what_the_worker_refuses(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, held = threading.Event(), threading.Event()
    service.worker.limits = Limits(waiting=1)
    blocked = service.worker.call(lambda session: (held.set(), hold.wait(30)))
    held.wait(30)
    waiting = service.worker.call(lambda session: None)
    for method, path, body in (
        ("POST", "/v1/completions", {"prompt": "a"}),
        ("GET", "/v1/edits", None),
        ("POST", "/v1/edits", EDIT),
    ):
        answer = service.http.request(method, path, json=body)
        assert answer.status_code == 429
        assert check_error(answer)["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "1"
    assert service.ask("GET", "/healthz") == {"status": "ok"}
    hold.set()
    blocked.result(30), waiting.result(30)

    def raising(error: Exception) -> Any:
        def task(*_: Any, **__: Any) -> None:
            raise error

        return task

    full = sqlite3.OperationalError("database or disk is full at /tmp/x.py")
    held_by = sqlite3.OperationalError("locked")
    held_by.sqlite_errorcode = sqlite3.SQLITE_BUSY
    for error, cause, status in (
        (StorageError("cannot write /tmp/x.py: no space"), full, 507),
        (StorageError("the store /tmp is held"), held_by, 503),
        (TimedOut("no whole answer"), None, 504),
        (Closed("closing /tmp"), None, 503),
        (RuntimeError("at /tmp/x.py"), None, 500),
    ):
        error.__cause__ = cause
        monkeypatch.setattr(service.session, "edit", raising(error))
        service.ask("POST", "/v1/edits", EDIT, status=status)
    service.worker.close(10)
    for method, path, body in (
        ("POST", "/v1/completions", {"prompt": "a"}),
        ("GET", "/v1/edits", None),
        ("GET", "/healthz", None),
    ):
        service.ask(method, path, body, status=503)


def stored(tmp_path: Path) -> Service:
    """A service whose store is a folder."""
    return Service(store=Store.open(tmp_path / "s", base_of(tiny("llama"))))


def test_a_full_disk_loses_nothing_and_the_service_goes_on(tmp_path: Path) -> None:
    service = stored(tmp_path)
    kept = service.edit()["record"]
    for limit in (1, 2000):  # nothing can be written, or the journal but not the edit
        with files_limited_to(limit):
            error = service.ask("POST", "/v1/edits", {**EDIT, "target": "a smith"}, status=507)["error"]
            assert error["code"] == "storage"
            assert service.ask("POST", "/v1/completions", {"prompt": "a"})["choices"]
    with files_limited_to(1):
        service.ask("DELETE", f"/v1/edits/{kept['id']}", status=507)
    assert service.ask("GET", "/v1/edits")["data"] == [kept]
    assert service.session.store.verify().problems == ()
    assert service.edit(target="a smith")["replaces"] == [kept["id"]]
    service.worker.close(10)


def test_an_edit_whose_file_is_damaged_can_be_undone_and_not_redone(tmp_path: Path) -> None:
    service = stored(tmp_path)
    name = service.edit()["record"]["id"]
    (file,) = (tmp_path / "s" / "edits").iterdir()
    file.write_bytes(file.read_bytes()[:-4] + b"gone")
    service.session._kept.clear()
    assert service.ask("POST", "/v1/completions", {"prompt": "a"}, status=500)["error"]["code"] == "damaged"
    assert service.ask("DELETE", f"/v1/edits/{name}")["state"] == "undone"
    assert service.ask("POST", "/v1/completions", {"prompt": "a"})["choices"]
    service.ask("POST", f"/v1/edits/{name}/redo", status=500)
    assert service.ask("GET", f"/v1/edits/{name}")["state"] == "undone"
    service.worker.close(10)


def test_an_answer_that_comes_too_late() -> None:
    service = Service(limits=Limits(seconds=0.001, max_tokens=100))
    assert service.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 100}, status=504)["error"]["code"] == "too_late"
    assert service.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 100, "stream": True}, status=504)
    service.worker.close(10)


# Who may


def test_roles(guarded: tuple[Service, dict[str, dict[str, str]]]) -> None:
    service, headers = guarded
    reads = [
        ("GET", "/v1/edits", None), ("GET", "/v1/models", None), ("GET", "/metrics", None), ("POST", "/v1/preview", EDIT),
        ("POST", "/v1/completions", {"prompt": "a"}), ("POST", "/v1/chat/completions", {"messages": [TURN]}),
    ]  # fmt: skip
    changes = [
        ("POST", "/v1/edits", EDIT),
        ("DELETE", "/v1/edits/x", None),
        ("POST", "/v1/edits/x/redo", None),
        ("PUT", "/new", {}),
    ]
    wrong = {
        "none": {},
        "empty": {"Authorization": ""},
        "basic": {"Authorization": headers["edit"]["Authorization"].replace("Bearer", "Basic")},
        "other": {"Authorization": "Bearer mendlm_other"},
        "cut": {"Authorization": headers["edit"]["Authorization"][:-1]},
        "bytes": {"Authorization": b"Bearer \xff\xfe"},
    }
    for method, path, body in reads + changes:
        for how in wrong.values():
            answer = service.http.request(method, path, json=body, headers=how)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert check_error(answer)["type"] == "authentication_error"
    both = [("Authorization", headers[role]["Authorization"]) for role in ("read", "edit")]
    assert service.http.get("/v1/edits", headers=both).status_code == 400
    for method, path, body in reads:
        assert service.http.request(method, path, json=body, headers=headers["read"]).status_code == 200
    for method, path, body in changes:
        answer = service.http.request(method, path, json=body, headers=headers["read"])
        assert (answer.status_code, check_error(answer)["type"]) == (403, "permission_error")
    assert service.session.store.records() == []
    made = service.ask("POST", "/v1/edits", {**EDIT, "author": "Ana"}, status=201, headers=headers["edit"])
    assert made["record"]["author"] == "Ana (token a editer)"
    other = service.ask("POST", "/v1/edits", {**EDIT, "prompt": "b"}, status=201, headers=headers["edit"])
    assert other["record"]["author"] == "a editer"
    path = f"/v1/edits/{made['record']['id']}"
    assert service.ask("DELETE", path, headers=headers["edit"])["state"] == "undone"
    for public in ("/healthz", "/openapi.json"):
        assert service.http.get(public).status_code == 200
    assert service.http.get("/nothing").status_code == 401
    assert service.http.post("/healthz").status_code == 401
    described = service.http.get("/openapi.json").json()
    assert described["security"] == [{"token": []}]


def test_a_service_whose_tokens_are_gone_is_closed_to_all(guarded: tuple[Service, dict[str, dict[str, str]]]) -> None:
    service, headers = guarded
    service.ask("GET", "/v1/edits", headers=headers["read"])
    service.app.user_middleware[0].kwargs["tokens"].path.unlink()
    error = service.ask("GET", "/v1/edits", headers=headers["read"], status=503)["error"]
    assert error["code"] == "no_tokens"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "localhost.evil.example:8000", "0.0.0.0"]
)
def test_without_tokens_the_host_must_be_this_machine(shared: Service, host: str) -> None:
    for method, path in (("GET", "/v1/edits"), ("GET", "/"), ("POST", "/v1/preview")):
        assert shared.ask(method, path, status=403, headers={"Host": host})["error"]["code"] == "host"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:80", "127.8.9.1:1"])
def test_this_machine_has_several_names(shared: Service, host: str) -> None:
    assert shared.ask("GET", "/healthz", headers={"Host": host})


def test_without_tokens_no_other_page_may_change_anything(shared: Service) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "https://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert shared.ask("POST", "/v1/completions", body, status=403, headers=headers)["error"]["code"] == "origin"
    for headers in ({"Origin": HERE}, {"Sec-Fetch-Site": "same-origin"}, {}):
        shared.ask("POST", "/v1/completions", body, headers=headers)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/vnd.api+json"):
        answer = shared.http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": kind})
        assert (answer.status_code, check_error(answer)["code"]) == (415, "content_type")
    answer = shared.http.post(
        "/v1/completions", content=b"x", headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
    )
    assert answer.status_code == 415
    assert (
        "access-control-allow-origin" not in shared.http.options("/v1/edits", headers={"Origin": "http://evil.example"}).headers
    )


# Hostile input


def raw(service: Service, content: Any, path: str = "/v1/edits", **headers: str) -> Any:
    answer = service.http.post(path, content=content, headers={"Content-Type": "application/json", **headers})
    check_error(answer)
    return answer


def test_a_body_has_a_largest_size_whatever_it_says() -> None:
    service = Service(rules=Rules(body=1000))
    large = json.dumps({**EDIT, "reason": "a" * 1000}).encode()
    assert raw(service, large).status_code == 413
    assert raw(service, iter([large[:600], large[600:]])).status_code == 413  # in chunks: no length is said
    assert raw(service, b"{}", **{"Content-Length": "9" * 30}).status_code == 413
    assert raw(service, iter([b"a" * 900] * 5), path="/nothing").status_code == 413
    service.worker.close(10)


def test_a_body_that_does_not_come(shared: Service) -> None:
    async def never() -> Any:
        await asyncio.sleep(30)

    async def cut() -> Any:
        return {"type": "http.disconnect"}

    async def ask(receive: Any) -> int:
        said: list[Any] = []

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/edits", "headers": [(b"host", b"localhost")], "scheme": "http"}
        slow = create_app(shared.worker, rules=Rules(seconds=0.05))
        await slow(
            {**scope, "asgi": {"version": "3.0"}, "query_string": b"", "raw_path": b"/v1/edits", "root_path": ""}, receive, send
        )
        return int(said[0]["status"])

    assert asyncio.run(ask(never)) == 408
    assert asyncio.run(ask(cut)) == 400


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"\xff\xfe", b"", b"null", b"1", b'"a"', b"[" * 100_000, b'{"prompt":' * 5000, b"9" * 100_000, b"{} {}",
        b'{"prompt": "a", "target": "b", "scale": NaN}', b'{"prompt": "a", "target": "b", "scale": Infinity}',
        b'{"prompt": "a", "target": "b", "scale": 1e999}', b'{"prompt": "a", "max_tokens": 1, "metadata": {"a": NaN}}',
        b'{"prompt": "a", "max_tokens": 1, "user": -Infinity}',
        b'{"prompt": "\\ud800", "target": "b"}', b'{"prompt": "a", "target": "\\udfff\\ud800"}', b'{"\\ud800": 1}',
        b'{"prompt": {"prompt": {}}, "target": []}', b'{"prompt": "a", "target": "b", "scale": 1e-400}', b"\xef\xbb\xbf{}",
        b'{"prompt": "a\xc3", "target": "b"}', b"\0",
    ],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(shared: Service, content: bytes) -> None:
    for path in ("/v1/edits", "/v1/preview", "/v1/completions", "/v1/chat/completions"):
        assert raw(shared, content, path).status_code == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
WORDS = st.text(max_size=12) | st.sampled_from(["\0", "\u202e", "\U0001f600" * 3, " ", "a" * 500, "%s{0}", "<script>"])
FIELDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("prompt", "target", "author", "reason", "on_fail", "model", "stop"), WORDS | JSON)
    | {name: JSON | st.lists(WORDS, max_size=3) for name in ("rephrasings", "unrelated", "messages", "edits", "tools")}
    | {name: JSON | st.integers(-1, 8) for name in ("max_tokens", "seed", "n", "scale", "temperature", "top_p")}
    | dict.fromkeys(("stream", "chat", "stream_options", "logprobs"), JSON),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=FIELDS | JSON, path=st.sampled_from(["edits", "preview", "completions", "chat/completions", "edits/x/redo"]))
def test_nothing_that_is_sent_breaks_it(shared: Service, body: Any, path: str) -> None:
    answer = shared.http.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        check_error(answer)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    query=st.dictionaries(st.sampled_from(["limit", "after", "state", "author", "reason", "x"]), WORDS, max_size=3),
    method=st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "BREW"]),
)
def test_no_path_breaks_it(shared: Service, path: str, query: dict[str, str], method: str) -> None:
    for start in ("/", "/v1/edits/", "/v1/models/"):
        answer = shared.http.request(method, start + quote(path, safe="/"), params=query)
        assert answer.status_code < 500, answer.text
        check_headers(answer)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["host", "origin", "authorization", "content-type", "content-length", "sec-fetch-site", "x"]),
    value=st.binary(max_size=40),
)
def test_no_header_breaks_it(shared: Service, name: str, value: bytes) -> None:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers = [(key, old) for key, old in headers if key != name.encode()] + [(name.encode(), value)]
    said: list[Any] = []

    async def ask() -> None:
        coming = [{"type": "http.request", "body": b'{"prompt": "a", "max_tokens": 1}', "more_body": False}]

        async def receive() -> Any:
            return coming.pop() if coming else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "scheme": "http", "headers": headers}
        await shared.app({**scope, "asgi": {"version": "3.0"}, "query_string": b"", "root_path": ""}, receive, send)

    asyncio.run(ask())
    assert said[0]["status"] < 500


def test_a_client_that_does_not_read_is_not_waited_for(shared: Service) -> None:
    async def receive() -> Any:
        return await asyncio.sleep(60)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    metrics = Metrics()
    layer = Door(shared.app, tokens=None, metrics=metrics, rules=Rules(seconds=0.05))
    scope = {"type": "http", "method": "GET", "path": "/healthz", "scheme": "http", "headers": [(b"host", b"localhost")]}
    asyncio.run(layer({**scope, "asgi": {"version": "3.0"}, "query_string": b"", "root_path": ""}, receive, send))
    assert metrics.open == 0


def test_too_many_at_a_time(shared: Service) -> None:
    full = create_app(shared.worker, rules=Rules(requests=0))
    answer = TestClient(full, base_url=HERE).get("/healthz")
    assert answer.status_code == 429
    check_error(answer)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(shared: Service) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

    schema = schemathesis.openapi.from_asgi("/openapi.json", shared.app, headers={"Host": "localhost"})
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    for operation in schema.get_all_operations():
        case_of = operation.ok().as_strategy()

        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=case_of)
        def run(case: Any) -> None:
            case.call_and_validate(checks=checks, headers={"Host": "localhost"})

        run()


# A real server


class Live:
    """A real server in this process, on a free port."""

    def __init__(self, service: Service) -> None:
        self.service, self.socket = service, socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(service.app, http="h11", ws="none", lifespan="off", log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture
def live(guarded: tuple[Service, dict[str, dict[str, str]]]) -> Iterator[tuple[Live, str]]:
    """A real server, and a token that may edit."""
    made = Live(guarded[0])
    yield made, guarded[1]["edit"]["Authorization"].removeprefix("Bearer ")
    made.close()


def client_of(live: tuple[Live, str]) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{live[0].url}/v1", api_key=live[1], max_retries=0)


def test_the_official_client(live: tuple[Live, str]) -> None:
    import openai

    service, client = live[0].service, client_of(live)
    headers = {"Authorization": f"Bearer {live[1]}"}
    name = service.ask("POST", "/v1/edits", EDIT, status=201, headers=headers)["record"]["id"]
    session, chat = service.session, [{"role": "user", "content": PROMPTS[0]}]
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    texts = {}
    for key, extra in (("active", {}), ("base", {"edits": []}), ("one", {"edits": [name]})):
        whole = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=20, extra_body=extra)
        stream = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=20, extra_body=extra, stream=True)
        texts[key] = whole.choices[0].text
        assert "".join(chunk.choices[0].text for chunk in stream) == texts[key]
    assert texts["active"] == texts["one"] == session.answer(PROMPTS[0], max_new_tokens=20) != texts["base"]
    said = client.chat.completions.create(model="tiny", messages=chat, max_completion_tokens=20, temperature=1, seed=5, n=1)
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="tiny", messages=chat, max_tokens=20, temperature=1, seed=5, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said.choices[0].message.content
    assert chunks[-1].usage == said.usage
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    for error, call in (
        (openai.BadRequestError, lambda: client.completions.create(model="tiny", prompt=[1, 2])),
        (openai.NotFoundError, lambda: client.completions.create(model="gpt-4", prompt="a")),
        (openai.NotFoundError, lambda: client.completions.create(model="tiny", prompt="a", extra_body={"edits": ["x"]})),
        (openai.AuthenticationError, lambda: client.with_options(api_key="wrong").models.list()),
    ):
        with pytest.raises(error) as caught:
            call()
        assert caught.value.body["message"]


def test_many_at_once_get_each_their_own_answer(live: tuple[Live, str]) -> None:
    service, headers = live[0].service, {"Authorization": f"Bearer {live[1]}"}
    prompts = [*PROMPTS, "Why?", "The river runs", "a", "b c d"]
    name = service.ask("POST", "/v1/edits", EDIT, status=201, headers=headers)["record"]["id"]
    bodies = [{"prompt": prompt, "max_tokens": 12, "edits": edits} for prompt in prompts for edits in ([], [name])]
    with httpx.Client(base_url=live[0].url, headers=headers) as http, ThreadPoolExecutor(8) as pool:
        alone = [http.post("/v1/completions", json=body).json()["choices"] for body in bodies]
        for _ in range(3):
            together = list(pool.map(lambda body: http.post("/v1/completions", json=body).json()["choices"], bodies))
            assert together == alone
    assert sum(size for size in service.worker.stats.batches if size > 1) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_rows_along(live: tuple[Live, str], stream: bool) -> None:
    service = live[0].service
    service.worker.limits = Limits(gather_ms=0, max_tokens=100, batch=1)  # one after the other: it takes a while
    body = json.dumps({"prompt": ["a", "b", "c"] * 8, "max_tokens": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {live[1]}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live[0].port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        else:
            wait_for(lambda: service.worker.stats.running > 0)
    wait_for(lambda: sum(service.worker.stats.completions.values()) == 24)
    assert service.worker.stats.completions["cancelled"] > 15
    wait_for(
        lambda: (
            "mendlm_requests_open 1\n"
            in httpx.get(f"{live[0].url}/metrics", headers={"Authorization": f"Bearer {live[1]}"}).text
        )
    )


def wait_for(condition: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_metrics_are_prometheus_text(service: Service) -> None:
    service.ask("POST", "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3})
    service.edit()
    service.ask("GET", "/v1/edits/none", status=404)
    service.ask("GET", "/strange/path", status=404)
    answer = service.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values, kinds = {}, {}
    for line in answer.text.splitlines():
        if found := re.fullmatch(r"# TYPE (\S+) (counter|gauge|histogram)", line):
            assert found[1] not in kinds
            kinds[found[1]] = found[2]
        elif not line.startswith("# HELP "):
            name, value = re.fullmatch(r'([a-z_]+(?:\{(?:\w+="[^"]*",?)+\})?) (\S+)', line).groups()
            assert name not in values
            values[name] = float(value)
    assert {re.sub(r"_(bucket|sum|count)$|\{.*", "", re.sub(r"\{.*", "", name)) for name in values} == set(kinds)
    assert values['mendlm_requests_total{method="POST",route="/v1/completions",status="200"}'] == 1
    assert values['mendlm_requests_total{method="POST",route="/v1/edits",status="201"}'] == 1
    assert values['mendlm_requests_total{method="GET",route="/v1/edits/{id}",status="404"}'] == 1
    assert values['mendlm_requests_total{method="GET",route="other",status="404"}'] == 1
    assert values['mendlm_request_seconds_bucket{route="/v1/edits",le="+Inf"}'] == 1
    assert values["mendlm_prompt_tokens_total"] == 2
    assert values["mendlm_completion_tokens_total"] == service.worker.stats.completion_tokens > 0
    assert values['mendlm_calls_total{outcome="done"}'] == 1
    assert values['mendlm_calls_total{outcome="failed"}'] == 1


# The page, and the description


def test_a_page_runs_its_own_code_and_no_other(shared: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    html = b"<!doctype html><script src='a.js'></script><style>p { color: red }</style><script>alert('&amp;')</script>"
    found = {
        "index.html": page.File(html, "text/html; charset=utf-8"),
        "a.js": page.File(b"1", "text/javascript; charset=utf-8"),
    }
    monkeypatch.setattr(page, "files", lambda: found)
    http = TestClient(create_app(shared.worker), base_url=HERE)
    answer = http.get("/")
    assert answer.content == html
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text).digest()).decode()
        for kind, text in (("script", b"alert('&amp;')"), ("style", b"p { color: red }"))
    }
    assert rules["script-src"] == f"'self' 'sha256-{hashes['script']}'"
    assert rules["style-src"] == f"'self' 'sha256-{hashes['style']}'"
    assert {rules[name] for name in ("default-src", "frame-ancestors", "base-uri", "form-action")} == {"'none'"}
    assert rules["connect-src"] == "'self'"
    assert "unsafe" not in str(rules)
    assert (http.get("/a.js").content, http.get("/a.js").headers["content-type"]) == (b"1", "text/javascript; charset=utf-8")
    for away in ("/index.html", "/../tokens.py", "/..%2ftokens.py", "/page.py", "/%2e%2e/app.py"):
        assert http.get(away).status_code == 404
    monkeypatch.setattr(page, "files", dict)
    answer = TestClient(create_app(shared.worker), base_url=HERE).get("/")
    assert answer.status_code == 404
    check_headers(answer)


def test_the_description_lists_every_route_and_needs_no_other_host(shared: Service) -> None:
    described = shared.ask("GET", "/openapi.json")
    assert described["openapi"].startswith("3.")
    assert set(described["paths"]) == {
        "/v1/edits", "/v1/edits/{id}", "/v1/edits/{id}/redo", "/v1/edits/{id}/adapter", "/v1/adapter", "/v1/preview",
        "/v1/journal", "/v1/check",
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{id}", "/healthz", "/metrics",
    }  # fmt: skip
    for path, methods in described["paths"].items():
        for operation in methods.values():
            assert operation["description"]
            assert "422" not in operation["responses"], path
            assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
    shared.ask("GET", "/redoc", status=404)


def test_the_description_can_be_read_without_another_host(shared: Service) -> None:
    described, answer = shared.ask("GET", "/openapi.json"), shared.http.get("/docs")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    check_headers(answer)
    style = answer.text.partition("<style>")[2].partition("</style>")[0]
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in answer.headers["content-security-policy"]
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in answer.text
            assert html.escape(route["description"]) in answer.text
    for name, form in described["components"]["schemas"].items():
        assert f'id="{name}"' in answer.text
        assert all(f"<code>{field}</code>" in answer.text for field in form.get("properties", {}))
    assert all(f'id="{name}"' in answer.text for name in re.findall('href="#([^"]*)"', answer.text))
    assert not re.search("<script|https?:|src=", answer.text)


def test_it_imports_without_its_packages() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'uvicorn', 'starlette'])); import mendlm.cli.serving\n"
        "from mendlm.serve import answers, app, door, metrics, operations, page, problems, schemas, server, tokens, worker\n"
        "try: app.create_app(None)\nexcept app.MendError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mendlm[serve]" in done.stdout


# The command, and what is deployed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an editor for it, and tokens."""
    found = tmp_path_factory.mktemp("place")
    tiny("llama").save_pretrained(found / "model")
    byte_tokenizer().save_pretrained(found / "model")
    model, tokenizer = load(found / "model", dtype="float32")
    method = Mend(default_layers(model), MendConfig(rank=4, initial_rate=0.2))
    formatter = Formatter.of(model, tokenizer)
    method.fit_normalizer(method.gradient(model, formatter.batch([formatter.encode(p, "Bo") for p in PROMPTS])))
    save_editor(found / "run", method, {"base": base_of(model)})
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said, with exit code 2, before the model is loaded."""
    with pytest.raises(SystemExit) as stop:
        main(["serve", *map(str, arguments)])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert "loading" not in said
    return said


def test_what_cannot_be_served_is_said_before_the_model_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on = ("--model", place / "model", "--editor", place / "run", "--port", 0)
    store = ("--store", tmp_path / "store")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1: another program" in refused(capsys, *on[:4], *store, "--port", port)
    for host in ("0.0.0.0", "::"):
        assert "--token-file" in refused(capsys, *on, *store, "--host", host)
    assert "is not known" in refused(capsys, *on, *store, "--host", "no such host")
    assert "does not exist" in refused(capsys, *on, *store, "--token-file", tmp_path / "none.json")
    assert "one process" in refused(capsys, *on, *store, "--device-map", "shards")
    assert "guards.jsonl" in refused(capsys, *on, *store, "--guard", tmp_path / "guards.jsonl")
    assert "no editor for the model" in refused(capsys, "--model", place / "model", *store)
    assert "none" in refused(capsys, "--model", place / "model", "--editor", tmp_path / "none", *store)
    Store.open(tmp_path / "other", {"name": "another", "sha256": "0" * 64}).close()
    assert "another base model (another)" in refused(capsys, *on, "--store", tmp_path / "other")
    assert not (tmp_path / "store").exists()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "mendlm[serve]" in refused(capsys, *on, *store)


def serve_options() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def dockerfile() -> dict[str, list[str]]:
    """The arguments of the instructions, by instruction, of the last stage; lines that go on are joined."""
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text[text.rindex("FROM ") :].splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest.strip())
    return found


def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(ROOT / "deploy" / "mendlm.service")
    return dict(parser["Service"])


def deployed(which: str) -> list[str]:
    """The command that is deployed."""
    if which == "Dockerfile":
        found = dockerfile()
        return [*json.loads(found["ENTRYPOINT"][0]), *json.loads(found["CMD"][0])]
    return shlex.split(unit()["ExecStart"])


@pytest.mark.parametrize("which", ["Dockerfile", "unit"])
def test_what_is_deployed_is_a_command_that_exists(which: str) -> None:
    words = deployed(which)
    assert words[0].endswith("mendlm")
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= serve_options()


def test_the_container_and_the_unit_run_without_rights() -> None:
    found, service = dockerfile(), unit()
    assert found["USER"] == ["10001:10001"]
    assert found["STOPSIGNAL"] == ["SIGTERM"]
    assert found["VOLUME"] == ["/data"]
    for name, value in {
        "DynamicUser": "yes", "ProtectSystem": "strict", "StateDirectory": "mendlm", "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "", "KillSignal": "SIGTERM", "ProtectHome": "yes", "PrivateTmp": "yes",
    }.items():  # fmt: skip
        assert service[name] == value
    words = deployed("unit")
    assert int(service["TimeoutStopSec"]) > 2 * int(words[words.index("--grace") + 1])
    if shutil.which("systemd-analyze"):
        verify = ["systemd-analyze", "verify", "--man=no", str(ROOT / "deploy" / "mendlm.service")]
        said = subprocess.run(verify, capture_output=True, text=True).stderr
        assert "Unknown" not in said
        assert "Failed to parse" not in said


class Process:
    """`mendlm serve` as a process of its own."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        command = [sys.executable, "-m", "mendlm", *words]
        self.process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr))
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"serving (\S+) on http://\S+:(\d+)", line):
                self.name, self.port = found[1], int(found[2])
                break
        self.reader.start()
        if not hasattr(self, "port"):
            self.end()
            raise AssertionError("".join(self.said))

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait(60)
        self.reader.join(60)
        self.process.stderr.close()
        return code


@pytest.mark.slow
@pytest.mark.parametrize("which", ["Dockerfile", "unit"])
def test_what_is_deployed_runs_and_ends_well_in_the_middle_of_a_stream(which: str, place: Path, tmp_path: Path) -> None:
    secret = tokens.add(tmp_path / "tokens.json", "Ana", "edit")
    change = {"--model": place / "model", "--editor": place / "run", "--store": tmp_path / "store", "--port": 0}
    change |= {"--token-file": tmp_path / "tokens.json", "--grace": 600}  # what is said takes long on a busy machine
    words = deployed(which)[1:]
    for option, value in change.items():
        words[words.index(option) + 1] = str(value)
    served = Process([*words, "--max-batch", "1", "--gather-ms", "0", "--dtype", "float32"], tmp_path)
    try:
        url = f"http://127.0.0.1:{served.port}"
        check = dockerfile()["HEALTHCHECK"][0]
        check = json.loads(check[check.index("[") :])
        assert check[0] == "python"
        code = check[2].replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        headers = {"Authorization": f"Bearer {secret}"}
        made = httpx.post(f"{url}/v1/edits", json=EDIT, headers=headers, timeout=60)
        assert made.status_code == 201
        body = {"prompt": ["a", "b", "c"] * 8, "max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: refuses(served.port))
            with pytest.raises(subprocess.CalledProcessError):
                subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
            rest = [line for line in lines if line]
        chunks = events("\n\n".join([first, *rest]))
        ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert sum(end is not None for end in ends) == 24
        assert served.process.wait(60) == 0
        assert served.said[-1] == "closed\n"
    finally:
        served.end()
    assert secret not in "".join(served.said)
    with contextlib.closing(Store.open(tmp_path / "store")) as store:
        assert [record.id for record in store.active()] == [made.json()["record"]["id"]]
        assert store.verify().problems == ()


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
def test_the_code_of_the_guide_runs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    text = (ROOT / "docs" / "service.md").read_text()
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "run").symlink_to(place / "run")
    (add,) = [line for line in shell if line.startswith("mendlm token add")]
    done = subprocess.run([sys.executable, "-m", *shlex.split(add)], cwd=tmp_path, capture_output=True, text=True, check=True)
    secret = done.stdout.strip()
    (start,) = [line for line in shell if line.startswith("mendlm serve")]
    served = Process(shlex.split(start.replace("--port 8000", "--port 0"))[1:], tmp_path)
    try:
        for line in (line for line in shell if line.startswith("curl")):
            line = line.replace(":8000", f":{served.port}").replace("curl -s", "curl -sf")
            done = subprocess.run(["bash", "-c", line], env={**os.environ, "TOKEN": secret}, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
            assert "Who is Ana?" in done.stdout
        (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        scope: dict[str, Any] = {"TOKEN": secret}
        exec(compile(block.replace(":8000", f":{served.port}"), "service.md", "exec"), scope)
        assert scope["base"].choices[0].message.content != scope["now"].choices[0].message.content
        scope["client"].close()
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0
    finally:
        served.end()
