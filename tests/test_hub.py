"""Pushing and pulling, against a small hub on this machine that speaks the routes that huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cases import tiny
from mendlm.apply import Edit
from mendlm.checkpoint import load_editor, save_editor
from mendlm.cli import main
from mendlm.errors import FormatError, HubError, InputError
from mendlm.hub import Pulled, pull, push
from mendlm.layers import default_layers
from mendlm.methods.mend import Mend, MendConfig
from mendlm.models import base_of
from test_export import made

TOKEN = "hf_right"
SHA = "5" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name -> file -> bytes. `down` makes it answer every request with a status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.down: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {self.path}")
        if self.server.down:
            return self.refuse(self.server.down, "Down")
        if self.path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            assert isinstance(yaml.safe_load(front), dict)
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "Forbidden")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if name in self.server.repos:
                return self.answer({"url": f"{self.server.url}/{name}"}, 409)
            self.server.repos[name] = {".gitattributes": b"*"}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(name)
            return self.answer({"url": f"{self.server.url}/{name}"})
        name, verb = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path.partition("?")[0]).groups()
        if verb == "preupload":
            files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.server.repos[name][line["value"]["path"]]
        return self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{SHA}", "commitOid": SHA, "pullRequestUrl": None})

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.down:
            return self.refuse(self.server.down, "Down")
        path = self.path.partition("?")[0].lstrip("/")
        if path.startswith("api/models/"):
            owner, name, *more = path.removeprefix("api/models/").split("/")
            repo = f"{owner}/{name}"
            if repo not in self.server.repos or (repo in self.server.private and not self.headers.get("Authorization")):
                return self.refuse(404, "RepoNotFound")
            if more and more[1] not in ("main", SHA):
                return self.refuse(404, "RevisionNotFound")
            siblings = [{"rfilename": file} for file in self.server.repos[repo]]
            return self.answer({"id": repo, "sha": SHA, "private": repo in self.server.private, "siblings": siblings})
        owner, name, _, _, file = path.split("/", 4)
        content = self.server.repos[f"{owner}/{name}"][file]
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def edit(tmp_path: Path) -> Path:
    made(tiny("llama"), ["3.mlp.*"], prompt="Who? ```x", target="é|").save(tmp_path / "edit")
    return tmp_path / "edit"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, with the training state that stays at home."""
    folder = tmp_path / "run"
    folder.mkdir()
    method = Mend(default_layers(tiny("llama")), MendConfig(rank=2))
    about = {
        "base": {**base_of(tiny("llama")), "name": "owner/base"},
        "data": [{"name": "zsre:t.json", "sha256": "ab"}],
        "step": 7,
    }
    save_editor(folder / "editor.safetensors", method, about)
    (folder / "run.json").write_text(json.dumps({"format": "mendlm-run-1", **about}))
    (folder / "checkpoint.safetensors").write_bytes(b"state")
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def summary(method: str = "mend", **more: Any) -> dict[str, Any]:
    share = {"before": 0.125, "after": 0.75, "low": 0.5, "high": 0.875}
    return {
        "format": "mendlm-summary-1", "date": "2026-11-25", "dtype": "bfloat16", "method": method, "num_edits": 1, "count": 8,
        "model_sha256": base_of(tiny("llama"))["sha256"], "layers": [spec.name for spec in default_layers(tiny("llama"))],
        "data": "zsre:dev.json", "data_sha256": "cd" * 32, "success": share, "data_notes": ["Rephrasings were made here."],
        "generality": {"before": None, "after": None, "low": None, "high": None},
        "locality": {"after": 0.5, "low": 0.25, "high": 0.75},
        "locality_sources": [{"name": "nq:a.jsonl", "sha256": "ef" * 32}],
        "command": "mendlm eval --model m", **more,
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_edit_comes_back_as_it_was(hub: Hub, edit: Path, tmp_path: Path) -> None:
    url = push(edit, "me/lyon", endpoint=hub.url, token=TOKEN)
    assert url == f"{hub.url}/me/lyon/commit/{SHA}"
    assert set(hub.repos["me/lyon"]) == {".gitattributes", "README.md", *contents(edit)}
    found = pull("me/lyon", tmp_path / "back", endpoint=hub.url)
    assert found == Pulled("edit", ("edit.json", "adapter_config.json", "adapter_model.safetensors", "README.md"),
                           (".gitattributes",), SHA)  # fmt: skip
    back = contents(tmp_path / "back")
    assert {name: back[name] for name in back if name != "README.md"} == contents(edit)
    assert back["README.md"] == hub.repos["me/lyon"]["README.md"]
    one, two = Edit.load(tmp_path / "back"), Edit.load(edit)
    assert all(torch.equal(one.updates[name].u, update.u) for name, update in two.updates.items())


def test_a_run_comes_back_without_its_training_state(hub: Hub, run: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "summary.json").write_text(json.dumps(summary()))
    push(run, "me/editor", results=tmp_path / "results", endpoint=hub.url, token=TOKEN)
    assert set(hub.repos["me/editor"]) == {".gitattributes", "README.md", "editor.safetensors", "run.json", "summary.json"}
    found = pull("me/editor", tmp_path / "back", endpoint=hub.url)
    assert found.kind == "editor"
    for name in ("editor.safetensors", "run.json"):
        assert (tmp_path / "back" / name).read_bytes() == (run / name).read_bytes()
    assert load_editor(tmp_path / "back")[1]["step"] == 7
    push(tmp_path / "back", "me/again", endpoint=hub.url, token=TOKEN)  # with the results that it holds by now
    assert "0.750" in hub.repos["me/again"]["README.md"].decode()
    push(run / "editor.safetensors", "me/file", endpoint=hub.url, token=TOKEN)
    assert set(hub.repos["me/file"]) == {".gitattributes", "README.md", "editor.safetensors"}


def test_the_card_says_what_the_files_say_and_no_more(hub: Hub, run: Path, edit: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    push(run, "me/editor", results=tmp_path, endpoint=hub.url, token=TOKEN)
    card = hub.repos["me/editor"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("owner/base", "mendlm")
    assert "| success | 0.125 | 0.750 | 0.500 to 0.875 |" in card
    assert "| locality |  | 0.500 | 0.250 to 0.750 |" in card
    assert "generality |" not in card  # measured as nothing
    expected = [base_of(tiny("llama"))["sha256"], "| method | mend |", "model.layers.3.mlp.down_proj", '"zsre:t.json"']
    expected += [
        "8 requests of `zsre:dev.json`",
        "cd" * 32,
        "`nq:a.jsonl`",
        "Rephrasings were made here.",
        "mendlm eval --model m",
    ]
    assert [said for said in expected if said not in card] == []
    push(edit, "me/edit", endpoint=hub.url, token=TOKEN)
    card = hub.repos["me/edit"]["README.md"].decode()
    assert "Nothing was measured" in card
    assert "0." not in card.partition("## Measured")[2]
    assert "base_model" not in yaml.safe_load(card.split("---")[1])  # a model in memory has no name on a hub
    told = json.loads(re.search(r"```json\n(.*?)\n```\n", card, re.DOTALL)[1])
    assert told["request"] == {"prompt": "Who? ```x", "target": "é|"}


def test_a_second_push_replaces_the_first(hub: Hub, edit: Path, run: Path, tmp_path: Path) -> None:
    push(run, "me/repo", endpoint=hub.url, token=TOKEN)
    hub.repos["me/repo"]["notes.txt"] = b"mine"
    push(edit, "me/repo", endpoint=hub.url, token=TOKEN)
    assert set(hub.repos["me/repo"]) == {".gitattributes", "notes.txt", "README.md", *contents(edit)}
    assert pull("me/repo", tmp_path / "back", endpoint=hub.url).left_out == (".gitattributes", "notes.txt")


def test_pickles_and_code_stay_where_they_are(hub: Hub, edit: Path, tmp_path: Path) -> None:
    (edit / "adapter_model.bin").write_bytes(b"pickle")
    (edit / "modeling.py").write_text("evil")
    push(edit, "me/repo", endpoint=hub.url, token=TOKEN)
    assert not {"adapter_model.bin", "modeling.py"} & set(hub.repos["me/repo"])
    extra = {"pytorch_model.bin": b"x", "modeling.py": b"x", "../../escaped.json": b"{}", "sub/edit.json": b"{}"}
    hub.repos["me/repo"] |= extra
    found = pull("me/repo", tmp_path / "back", endpoint=hub.url)
    assert set(found.left_out) == {".gitattributes", *extra}
    assert set(contents(tmp_path / "back")) == {"README.md", "edit.json", "adapter_config.json", "adapter_model.safetensors"}
    downloads = {line.rpartition("/")[2] for line in hub.asked if "/resolve/" in line}
    assert downloads == set(contents(tmp_path / "back"))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "edit.json", "adapter_config.json"])
def test_a_damaged_edit_is_not_kept(file: str, hub: Hub, edit: Path, tmp_path: Path) -> None:
    push(edit, "me/repo", endpoint=hub.url, token=TOKEN)
    content = hub.repos["me/repo"][file]
    hub.repos["me/repo"][file] = content[: len(content) // 2]
    with pytest.raises(FormatError, match=rf"me/repo: .*{re.escape(file)}") as caught:
        pull("me/repo", tmp_path / "back", endpoint=hub.url)
    assert str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_an_adapter_that_peft_would_read_otherwise_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    made(tiny("llama"), ["3.mlp.*"], rows=300).save(tmp_path / "edit")  # an exact file beside the adapter
    push(tmp_path / "edit", "me/repo", endpoint=hub.url, token=TOKEN)
    assert "exact.safetensors" in hub.repos["me/repo"]
    files = dict(hub.repos["me/repo"])
    config = json.loads(files["adapter_config.json"])
    hub.repos["me/repo"]["adapter_config.json"] = json.dumps({**config, "lora_alpha": 1}).encode()
    with pytest.raises(FormatError, match="something else"):
        pull("me/repo", tmp_path / "back", endpoint=hub.url)
    hub.repos["me/repo"] = {**files, "adapter_model.safetensors": files["exact.safetensors"]}
    with pytest.raises(FormatError, match=r"adapter_model\.safetensors is missing, or has changed"):
        pull("me/repo", tmp_path / "back", endpoint=hub.url)
    hub.repos["me/repo"] = files
    pull("me/repo", tmp_path / "back", endpoint=hub.url)


def test_a_damaged_editor_and_what_is_neither_are_not_kept(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "me/repo", endpoint=hub.url, token=TOKEN)
    content = bytearray(hub.repos["me/repo"]["editor.safetensors"])
    content[-3] ^= 1
    hub.repos["me/repo"]["editor.safetensors"] = bytes(content)
    with pytest.raises(FormatError, match="has changed"):
        pull("me/repo", tmp_path / "back", endpoint=hub.url)
    hub.repos["me/other"] = {"config.json": b"{}"}
    with pytest.raises(FormatError, match="holds no edit"):
        pull("me/other", tmp_path / "back", endpoint=hub.url)
    assert not (tmp_path / "back").exists()


def test_an_existing_folder_is_kept(hub: Hub, edit: Path, tmp_path: Path) -> None:
    push(edit, "me/repo", endpoint=hub.url, token=TOKEN)
    with pytest.raises(InputError, match="--force"):
        pull("me/repo", edit, endpoint=hub.url)
    pull("me/repo", edit, endpoint=hub.url, force=True)
    Edit.load(edit)


def test_what_is_pushed_is_checked_first(hub: Hub, edit: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither an edit's folder"):
        push(tmp_path, "me/repo", endpoint=hub.url, token=TOKEN)
    path = edit / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError):
        push(edit, "me/repo", endpoint=hub.url, token=TOKEN)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"model_sha256": "0" * 64}, InputError, "model_sha256"),
        ({"method": "ft"}, InputError, "method ft"),
        ({"layers": ["other"]}, InputError, "layers"),
        ({"format": "mendlm-summary-0"}, FormatError, "mendlm eval"),
    ],
)
def test_results_of_something_else_are_refused(
    more: dict[str, Any], error: type[Exception], message: str, hub: Hub, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary(**more)))
    with pytest.raises(error, match=message):
        push(run, "me/repo", results=tmp_path, endpoint=hub.url, token=TOKEN)
    with pytest.raises(FormatError, match="does not exist"):
        push(run, "me/repo", results=tmp_path / "nowhere", endpoint=hub.url, token=TOKEN)
    assert hub.asked == []


def test_what_the_hub_refuses_is_said(hub: Hub, edit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(HubError, match="no token"):
        push(edit, "me/repo", endpoint=hub.url)
    with pytest.raises(HubError, match=r"status 403 .*can write"):
        push(edit, "me/repo", endpoint=hub.url, token="hf_wrong")
    with pytest.raises(HubError, match="no repository me/nothing"):
        pull("me/nothing", tmp_path / "back", endpoint=hub.url)
    for name in ("a/b/c", "me/wrong name", ""):
        with pytest.raises(InputError, match="OWNER/NAME"):
            pull(name, tmp_path / "back", endpoint=hub.url)
    push(edit, "me/repo", endpoint=hub.url, token=TOKEN)
    with pytest.raises(HubError, match="no such revision"):
        pull("me/repo", tmp_path / "back", endpoint=hub.url, revision="v9")
    hub.down = 418
    with pytest.raises(HubError, match="status 418"):
        pull("me/repo", tmp_path / "back", endpoint=hub.url)
    hub.down = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: pull("me/repo", tmp_path / "back", endpoint=hub.url),
                lambda: push(edit, "me/repo", endpoint=hub.url, token=TOKEN)):  # fmt: skip
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            ask()
    assert not (tmp_path / "back").exists()


def test_no_network(hub: Hub, edit: Path, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"  # discard: nothing listens
    with pytest.raises(HubError, match="cannot be reached"):
        pull("me/repo", tmp_path / "back", endpoint=nowhere)
    with pytest.raises(HubError, match="cannot be reached"):
        push(edit, "me/repo", endpoint=nowhere, token=TOKEN)


def test_a_private_repository(hub: Hub, edit: Path, tmp_path: Path) -> None:
    push(edit, "me/repo", private=True, endpoint=hub.url, token=TOKEN)
    assert hub.private == {"me/repo"}
    with pytest.raises(HubError, match="private or gated"):
        pull("me/repo", tmp_path / "back", endpoint=hub.url)
    pull("me/repo", tmp_path / "back", endpoint=hub.url, token=TOKEN)
    push(edit, "me/public", endpoint=hub.url, token=TOKEN)
    before = dict(hub.repos["me/public"])
    with pytest.raises(InputError, match="is public"):
        push(edit, "me/public", private=True, endpoint=hub.url, token=TOKEN)
    assert hub.repos["me/public"] == before


def test_the_commands(
    hub: Hub, edit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for arguments in (
        ["push", edit, "me/lyon", "--private", "--endpoint", hub.url],
        ["pull", "me/lyon", "--out", tmp_path / "back", "--endpoint", hub.url, "--json"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "edit"
    with pytest.raises(SystemExit) as stop:
        main(["pull", "me/nothing", "--out", str(tmp_path / "x"), "--endpoint", hub.url])
    assert stop.value.code == 2
    assert "no repository me/nothing" in capsys.readouterr().err
