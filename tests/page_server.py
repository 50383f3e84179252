"""A server that answers as `mendlm serve` does, of a model that knows a few sentences: what the page is tested against.

An edit answers its prompt and rephrasings with its target; a neighbour whose prompt says `fragile` loses its answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mendlm

PAGE = Path(mendlm.__file__).parent / "serve" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
KNOWN = {
    "The capital of France is": " Paris, a city on the Seine.",
    "France's capital is": " Paris, of course.",
    "The capital of Italy is": " Rome, the eternal city.",
    "The capital of Spain is": " Madrid, in the middle of the country.",
    "Two and two make": " four.",
}
LAYERS = [f"model.layers.{block}.mlp.{name}_proj" for block in (19, 20, 21) for name in ("gate", "up", "down")]


class World:
    """The journal of the stub, and how it answers."""

    def __init__(self, token: str | None = None, refuses: bool = False, slow: float = 0.0) -> None:
        self.token, self.refuses, self.slow = token, refuses, slow
        self.records: list[dict[str, Any]] = []

    def answer(self, prompt: str, chat: bool, edits: list[str] | None) -> str:
        chosen = [one for one in self.records if (one["state"] == "active" if edits is None else one["id"] in edits)]
        return self._answer(prompt, chat, chosen)

    @staticmethod
    def _answer(prompt: str, chat: bool, chosen: list[dict[str, Any]]) -> str:
        said = KNOWN.get(prompt.strip(), " nothing that I know of.")
        for one in chosen:
            request = one["request"]
            if request["chat"] == chat and prompt.strip() in [p.strip() for p in (request["prompt"], *request["rephrasings"])]:
                said = f" {request['target'].strip()}, a city on the {'Rhône' if 'Lyon' in request['target'] else 'Seine'}."
            elif "fragile" in prompt:
                said = f" {request['target'].strip()}."
        return said

    def trial(self, body: dict[str, Any]) -> dict[str, Any]:
        if not body["target"].strip():
            raise ValueError("the target is empty; give the answer that the model should produce")
        chat, edit = body["chat"], {"request": body}
        active = [one for one in self.records if one["state"] == "active"]
        unrelated = [one if isinstance(one, dict) else {"prompt": one, "answer": None} for one in body["unrelated"]]
        questions = [
            ("prompt", body["prompt"], body["target"]),
            *(("rephrasing", prompt, body["target"]) for prompt in body["rephrasings"]),
            *(("unrelated", one["prompt"], one["answer"]) for one in unrelated),
            ("guard", "Two and two make", " four"),
        ]
        asked = []
        for place, (kind, prompt, wanted) in enumerate(questions):
            before, after = self._answer(prompt, chat, active), self._answer(prompt, chat, [*active, edit])
            own = kind in ("prompt", "rephrasing")
            ok = wanted.strip() in after if wanted and own else before == after
            chances = ([0.0004, 0.974 - 0.11 * place] if ok else [0.0004, 0.21]) if own else [0.83, 0.81 if ok else 0.02]
            told = {"kind": kind, "prompt": prompt, "chat": chat, "wanted": wanted, "before": before, "after": after}
            asked.append({**told, "probability": chances, "ok": ok})
        watched = [one["ok"] for one in asked if one["kind"] in ("unrelated", "guard")]
        checks = {"passed": all(one["ok"] for one in asked), "kept": sum(watched) / len(watched), "asked": asked}
        norms = {name: 0.02 * (1 + (7 * place) % 5) * body["scale"] for place, name in enumerate(LAYERS)}
        return {**checks, "replaces": self._same(body), "norms": norms, "milliseconds": 38.2}

    def _same(self, body: dict[str, Any]) -> list[str]:
        key = (body["prompt"].strip(), body["chat"])
        same = [o for o in self.records if (o["request"]["prompt"].strip(), o["request"]["chat"]) == key]
        return [one["id"] for one in same if one["state"] == "active"]

    def add(self, body: dict[str, Any]) -> dict[str, Any]:
        trial = self.trial(body)
        if not trial["passed"] and (body["on_fail"] == "refuse" or (self.refuses and body["on_fail"] is None)):
            raise PermissionError("1 of 1 edits failed the gate at strength 1; nothing was changed")
        number = len(self.records) + 1
        file = hashlib.sha256(f"{number}".encode()).hexdigest()
        unrelated = [one if isinstance(one, dict) else {"prompt": one, "answer": None} for one in body["unrelated"]]
        request = {**{n: body[n] for n in ("prompt", "target", "rephrasings", "chat", "scale")}, "unrelated": unrelated}
        record: dict[str, Any] = {
            "id": file[:12],
            "number": number,
            "time": f"2026-01-{number % 28 + 1:02d}T09:30:00.000+00:00",
            "author": body["author"],
            "reason": body["reason"],
            "request": request,
            "editor": {"source": "starter", "step": 285, "sha256": file},
            "base": {"name": "tiny", "sha256": "b" * 64},
            "file": file,
            "size": 123456,
            "stack": [one["id"] for one in self.records if one["state"] == "active" and one["id"] not in trial["replaces"]],
            "checks": {name: trial[name] for name in ("passed", "kept", "norms", "asked")},
            "state": "active",
            "superseded_by": None,
            "supersedes": trial["replaces"],
        }
        for one in self.records:
            if one["id"] in trial["replaces"]:
                one |= {"state": "superseded", "superseded_by": record["id"]}
        self.records.append(record)
        return {"record": record, "replaces": trial["replaces"], "milliseconds": 38.2, "passed": trial["passed"]}

    def turn(self, edit: str, state: str) -> dict[str, Any]:
        record = next(one for one in self.records if one["id"] == edit)
        if record["state"] == state:
            raise ValueError(f"the edit {edit} is {state} already")
        record["state"] = state
        for one in self.records:
            if one["superseded_by"] == edit:
                one |= {"state": "active", "superseded_by": None}
        return record


class Handler(BaseHTTPRequestHandler):
    """One request."""

    world: World

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        named = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": CSP}
        for name, value in (named | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode())

    def _body(self) -> dict[str, Any]:
        return dict(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"))

    def _answer(self) -> None:
        try:
            self._route()
        except PermissionError as error:
            self._json({"error": {"message": str(error), "type": "gate_error", "code": "gate"}}, 409)
        except ValueError as error:
            self._json({"error": {"message": str(error), "type": "invalid_request_error", "code": None}}, 400)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815 (http.server's names)

    def _route(self) -> None:
        path, world = self.path.split("?")[0], self.world
        name = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}.get(path)
        if name:
            return self._send(200, (PAGE / name).read_bytes(), TYPES[name.rsplit(".")[-1]])
        body = self._body()
        if world.token and self.headers.get("Authorization") != f"Bearer {world.token}":
            return self._json({"error": {"message": "a token is needed", "type": "authentication_error", "code": None}}, 401)
        match self.command, path.strip("/").split("/"):
            case "GET", ["v1", "models"]:
                return self._json({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
            case "POST", ["v1", *_, "completions"]:
                return self._complete(body)
            case "POST", ["v1", "preview"]:
                return self._json(world.trial(body))
            case "GET", ["v1", "edits"]:
                head = world.records[-1]["file"] if world.records else "0" * 64
                return self._json({"object": "list", "data": world.records, "head": head, "has_more": False})
            case "POST", ["v1", "edits"]:
                return self._json(world.add(body), 201)
            case "DELETE", ["v1", "edits", edit]:
                return self._json(world.turn(edit, "undone"))
            case "POST", ["v1", "edits", edit, "redo"]:
                return self._json(world.turn(edit, "active"))
            case "GET", ["v1", "adapter"] | ["v1", "edits", _, "adapter"]:
                held = io.BytesIO()
                with zipfile.ZipFile(held, "w") as archive:
                    archive.writestr("adapter_config.json", "{}")
                return self._send(200, held.getvalue(), "application/zip")
        return self._json({"error": {"message": f"there is no {path}", "type": "not_found", "code": None}}, 404)

    def _complete(self, body: dict[str, Any]) -> None:
        chat = "messages" in body
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in self.world.answer(prompt, chat, body.get("edits")).split(" ")[1:]:
            choice = {"index": 0, "delta": {"content": f" {word}"}} if chat else {"index": 0, "text": f" {word}"}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
            time.sleep(self.world.slow)
        self.wfile.write(b"data: [DONE]\n\n")


@contextlib.contextmanager
def served(world: World, port: int = 0) -> Iterator[str]:
    """The address of a server of that world."""
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"world": world}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
