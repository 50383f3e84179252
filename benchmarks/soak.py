"""The service under load: many clients edit, undo, redo and ask for minutes, and the process is killed in the middle.

    python benchmarks/soak.py [--seconds 600] [--clients 32] [--model starter] [--editor starter]

Each client has a fact of its own, about a place and with an answer that no other client has. It asks for it under its own edit,
on the base model and under all active edits, takes it back, brings it back, and corrects it anew. Written down: the status of
every answer; whether an answer under a client's own edit, or on the base, is the one that the model gives alone, without any
other request beside it, computed afterwards (arithmetic on batches of other sizes can turn a near tie), and whether it names
another client's answer (a leak); time by kind, p50 and p95; the process's memory in the second half's last part; and after
SIGKILL and a start on the same store, whether every acknowledged edit has its acknowledged state.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import bench
import mendlm
from mendlm.serve.decoding import Row, decode

FIRST = ("Al", "Bre", "Cor", "Dun", "El", "Fal", "Gor", "Hal")
LAST = ("dova", "mark", "stead", "wick")
ANSWERS = (  # noqa: SIM905
    "Lyon Oslo Quito Accra Turin Lima Kyoto Dakar Havana Tunis Riga Porto Hanoi Seville Nairobi Krakow "
    "Bogota Manila Zagreb Helsinki Santiago Bremen Leeds Osaka Perth Naples Ottawa Dublin Cairo Athens Warsaw Geneva"
).split()
TOKENS = 8
"""Tokens of an answer."""
SETTLED = 0.4
"""The share of the second half after which memory counts: by then every buffer has been used since the start in the middle."""


@dataclass
class Client:
    """One user with a fact of its own."""

    number: int
    prompt: str
    target: str
    edit: str | None = None
    state: str = "none"
    unsure: bool = False
    """Whether a change was asked for and not answered, when the process was killed."""
    heard: dict[str, Counter[str]] = field(default_factory=dict)
    """By edit, or "" for the base, the answers and how often they came."""


class Soak:
    """The process, its clients, and what they saw."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.statuses: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}
        self.memory: list[tuple[float, float]] = []
        self.lost: list[str] = []
        self.lock, self.down, self.over = threading.Lock(), threading.Event(), threading.Event()
        names = [first + last for last in LAST for first in FIRST]
        self.clients = [Client(i, f"The capital of {names[i % 32]} is", ANSWERS[i % 32]) for i in range(arguments.clients)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        """Start the service, and wait until it answers."""
        a = self.arguments
        options = ["--model", a.model, "--editor", a.editor, "--store", str(self.folder / "store"), "--port", str(self.port)]
        log = (self.folder / "log.txt").open("ab")
        command = [sys.executable, "-m", "mendlm", "serve", *options, "--dtype", a.dtype, "--rehearse", "0"]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit((self.folder / "log.txt").read_text()[-2000:])
            try:
                if self.call("GET", "/healthz")[0] == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("the service did not come up")

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request: its status and content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def asked(self, kind: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """A call, timed and counted; 0 where the process was down."""
        begun = time.perf_counter()
        try:
            status, content = self.call(method, path, body)
        except (OSError, http.client.HTTPException, ValueError):
            status, content = 0, None
            time.sleep(0.5)
        with self.lock:
            self.statuses[f"{kind} {status or 'no connection' + ('' if self.down.is_set() else ', unexpected')}"] += 1
            if 200 <= status < 300:
                self.seconds.setdefault(kind, []).append(time.perf_counter() - begun)
        if status == 429:
            time.sleep(0.5)
        return status, content

    def complete(self, client: Client, kind: str, edits: list[str] | None) -> None:
        """Ask for the fact, and compare with what was answered first."""
        body = {"prompt": client.prompt, "max_tokens": TOKENS, "temperature": 0}
        status, content = self.asked(kind, "POST", "/v1/completions", body if edits is None else {**body, "edits": edits})
        if status != 200 or edits is None:
            return
        client.heard.setdefault("".join(edits), Counter())[content["choices"][0]["text"]] += 1

    def change(self, client: Client) -> None:
        """Make, take back, or bring back the client's edit."""
        told = {"author": f"client {client.number}", "reason": "soak"}
        if client.edit is None or random.random() < 0.3:
            kind, status, wanted = "edit", 201, "active"
            request = {"prompt": client.prompt, "target": client.target, "on_base": True, **told}
            answer = self.asked(kind, "POST", "/v1/edits", request)
        elif client.state == "active":
            kind, status, wanted = "undo", 200, "undone"
            answer = self.asked(kind, "DELETE", f"/v1/edits/{client.edit}")
        else:
            kind, status, wanted = "redo", 200, "active"
            answer = self.asked(kind, "POST", f"/v1/edits/{client.edit}/redo")
        if answer[0] == status:
            if kind == "edit":
                client.edit = answer[1]["record"]["id"]
            client.state, client.unsure = wanted, False
        elif answer[0] == 0:
            client.unsure = True

    def settle(self, client: Client) -> None:
        """After the process was down: what the store says of an edit that was acknowledged, and not touched since."""
        if client.edit is not None:
            status, record = self.asked("look", "GET", f"/v1/edits/{client.edit}")
            if status == 200 and client.unsure:
                client.state, client.unsure = record["state"], False
            elif status == 404 or (status == 200 and record["state"] != client.state):
                self.lost.append(client.edit)

    def live(self, client: Client) -> None:
        """What a client does until time is over."""
        was_down = False
        while not self.over.is_set():
            if self.down.is_set():
                was_down = True
                time.sleep(0.2)
                continue
            if was_down:
                self.settle(client)
                was_down = False
            chance = random.random()
            if client.edit is None or chance < 0.1:
                self.change(client)
            elif chance < 0.6:
                self.complete(client, "own edit", [client.edit])
            elif chance < 0.8:
                self.complete(client, "base", [])
            else:
                self.complete(client, "active edits", None)

    def watch(self) -> None:
        """Note the process's resident memory."""
        while not self.over.is_set():
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
                held = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
                self.memory.append((time.monotonic(), held / 1024))
            except (OSError, StopIteration):
                pass
            self.over.wait(min(2.0, self.arguments.seconds / 40))

    def kill(self) -> None:
        """SIGKILL, and a start on the same store and port."""
        self.down.set()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        begun = time.monotonic()
        self.start()
        self.restart_seconds = time.monotonic() - begun
        self.memory.clear()
        self.down.clear()

    def compare(self) -> tuple[dict[str, int], list[dict[str, str]]]:
        """The answers that came, against those of the model alone: counts, and some that differ."""
        session = mendlm.Session.open(
            self.arguments.model, editor=self.arguments.editor, store=self.folder / "store", dtype=self.arguments.dtype
        )
        found: Counter[str] = Counter({"asked": 0, "as alone": 0, "leaks": 0})
        examples: list[dict[str, str]] = []
        for client in self.clients:
            others = {other.target for other in self.clients} - {client.target}
            row = Row(prompt=session.formatter.encode(client.prompt, None).prompt, max_tokens=TOKENS)
            for edit, heard in client.heard.items():
                edits = [session.stack([edit])] if edit else []
                steps = decode(session.model, session.formatter, [replace(row, edit=len(edits) - 1)], edits)
                alone = "".join(said.text for step in steps for said in step)
                for text, times in heard.items():
                    leaked = any(word in text and word not in alone for word in others)
                    found.update({"asked": times, "as alone": times * (text == alone), "leaks": times * leaked})
                    if text != alone and len(examples) < 20:
                        examples.append({"prompt": client.prompt, "edit": edit, "alone": alone, "heard": text})
        return dict(found), examples

    def run(self) -> dict[str, Any]:
        """All of it."""
        seconds: float = self.arguments.seconds
        threads = [threading.Thread(target=self.live, args=[client]) for client in self.clients]
        threads.append(threading.Thread(target=self.watch))
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        self.kill()
        again = time.monotonic()
        time.sleep(seconds / 2)
        self.over.set()
        for thread in threads:
            thread.join()
        self.process.send_signal(signal.SIGTERM)
        stopped = self.process.wait(60)
        compared, examples = self.compare()
        verified = subprocess.run(
            [sys.executable, "-m", "mendlm", "store", str(self.folder / "store"), "verify", "--json"], capture_output=True
        )
        settled = [mb for when, mb in self.memory if when > again + SETTLED * seconds / 2]
        return {
            "clients": len(self.clients),
            "seconds": seconds,
            "statuses": dict(sorted(self.statuses.items())),
            "server_errors": sum(n for name, n in self.statuses.items() if name.split()[-1].startswith("5")),
            "answers": compared,
            "other_answers": examples,
            "latency_ms": {
                kind: {"count": len(t), "p50": 1000 * statistics.median(t), "p95": 1000 * sorted(t)[int(0.95 * (len(t) - 1))]}
                for kind, t in sorted(self.seconds.items())
            },
            "requests_per_second": sum(map(len, self.seconds.values())) / seconds,
            "memory_mb": {"first": settled[0], "last": settled[-1], "most": max(settled)},
            "killed": {"restart_seconds": self.restart_seconds, "lost_edits": self.lost},
            "stopped_with": stopped,
            "store": json.loads(verified.stdout),
        }


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--editor", default="starter", help="a run folder or editor file")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32, help="at most 32 have a fact of their own")
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = Soak(arguments, Path(folder)).run()
    bench.save(arguments, "soak", torch.device("cpu"), result)


if __name__ == "__main__":
    main()
