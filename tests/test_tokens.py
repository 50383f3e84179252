"""The file of tokens: what it holds, who changes it, and what the command line says."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mendlm.cli import main
from mendlm.errors import FormatError, InputError, StorageError
from mendlm.serve import tokens


def test_a_token_is_found_by_its_text_and_by_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "new" / "tokens.json"
    secrets = {name: tokens.add(file, name, role) for name, role in (("Ana", "edit"), ("Bo", "read"))}
    known = tokens.Tokens(file)
    for name, secret in secrets.items():
        assert known.find(secret).name == name
        for other in (secret[:-1], secret + "a", secret.upper(), "", name, "\ud800", known.find(secret).hash):
            assert known.find(other) is None
    assert (known.find(secrets["Ana"]).role, known.find(secrets["Bo"]).role) == ("edit", "read")


def test_the_file_holds_no_token_and_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    secrets = [tokens.add(file, name, "read") for name in "ab"]
    content = file.read_text()
    assert all(secret not in content and secret.removeprefix(tokens.PREFIX) not in content for secret in secrets)
    assert all(len(secret) > 43 for secret in secrets)
    salts = {token["salt"] for token in json.loads(content)["tokens"]}
    assert len(salts) == 2
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    tokens.add(file, "c", "read")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_removed_token_is_refused_at_once_and_a_new_one_known(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    first = tokens.add(file, "first", "read")
    known = tokens.Tokens(file)
    second = tokens.add(file, "second", "edit")
    assert known.find(second).name == "second"
    tokens.remove(file, "first")
    assert known.find(first) is None
    assert known.find(second).name == "second"


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_no_token_is_valid_while_the_file_is_not(tmp_path: Path, change: Any) -> None:
    file = tmp_path / "tokens.json"
    secret = tokens.add(file, "a", "read")
    known, whole = tokens.Tokens(file), file.read_bytes()
    change(file)
    for _ in range(2):
        with pytest.raises(FormatError):
            known.find(secret)
    file.write_bytes(whole)
    assert known.find(secret).name == "a"


def test_those_who_add_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: tokens.add(file, f"name {number}", "read"), range(24)))
    known = tokens.Tokens(file)
    assert [known.find(secret).name for secret in secrets] == [f"name {number}" for number in range(24)]


def good(**change: Any) -> dict[str, Any]:
    return {"name": "a", "role": "read", "created": "", "salt": "A" * 22 + "==", "hash": "0" * 64, **change}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '{"format": "mendlm-tokens-2", "tokens": []}',
        '{"format": "mendlm-tokens-1"}',
        '{"format": "mendlm-tokens-1", "tokens": 1}',
        *(
            json.dumps({"format": "mendlm-tokens-1", "tokens": [token]})
            for token in (
                1,
                {},
                good(more=1),
                good(name=1),
                good(role="admin"),
                good(salt="!" * 24),
                good(salt="AA=="),
                good(hash="0"),
                good(hash="z" * 64),
            )
        ),
        json.dumps({"format": "mendlm-tokens-1", "tokens": [good(), good()]}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(content)
    for use in (tokens.load, tokens.Tokens, lambda path: tokens.add(path, "b", "read"), lambda path: tokens.remove(path, "a")):
        with pytest.raises(FormatError, match=r"tokens\.json"):
            use(file)
    assert file.read_text() == content


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    for name in ("", " ", "a\nb", "a" * 101):
        with pytest.raises(InputError, match="name"):
            tokens.add(file, name, "read")
    with pytest.raises(InputError, match="read or edit"):
        tokens.add(file, "a", "admin")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="does not exist"):
        tokens.remove(file, "a")
    with pytest.raises(FormatError, match="does not exist"):
        tokens.Tokens(file)
    tokens.add(file, "a", "read")
    with pytest.raises(InputError, match="has a token named 'a'"):
        tokens.add(file, "a", "edit")
    with pytest.raises(InputError, match="there are: a"):
        tokens.remove(file, "b")
    tokens.remove(file, "a")
    with pytest.raises(FormatError, match="mendlm token add"):
        tokens.Tokens(file)
    with pytest.raises(StorageError):
        tokens.add(tmp_path / "tokens.json" / "below", "a", "read")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["token", *map(str, arguments)])
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens.json"
    code, secret, _ = run(capsys, "add", file, "--role", "edit", "--name", "Ana")
    assert (code, tokens.Tokens(file).find(secret.strip()).name) == (0, "Ana")
    code, out, _ = run(capsys, "add", file, "--name", "Bo", "--json")
    assert tokens.Tokens(file).find(json.loads(out)["token"]).role == "read"
    code, out, err = run(capsys, "list", file)
    assert [line.split()[1:] for line in out.splitlines()] == [["edit", "Ana"], ["read", "Bo"]]
    assert secret.strip() not in out + err
    assert json.loads(run(capsys, "list", file, "--json")[1])["tokens"][1]["name"] == "Bo"
    assert run(capsys, "remove", file, "--name", "Ana")[0] == 0
    assert [token.name for token in tokens.load(file)] == ["Bo"]
    code, _, err = run(capsys, "remove", file, "--name", "Ana")
    assert (code, "no token named 'Ana'" in err) == (2, True)
