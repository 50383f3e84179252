"""Who may use the service: bearer tokens, of which a file keeps salted hashes.

    {"format": "mendlm-tokens-1", "tokens": [{"name", "role", "created", "salt", "hash"}, ...]}     hash = sha256(salt + token)

A token is 32 bytes from the system's random source. A plain hash is right for that: nobody can try 2^256 values, so a slow
hash as for passwords (scrypt) would protect nothing, and would let anyone who sends wrong tokens keep the server busy. The salt
means that equal tokens would not look equal. A token is shown once, when it is made.

The service reads the file again as soon as it changes, so that a removed token is refused at the next request. If the file
cannot be read then, no token is valid. Knows no HTTP.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import filelock

from mendlm.errors import FormatError, InputError
from mendlm.files import folder, read_json, storing, write_json
from mendlm.journal import now

FORMAT = "mendlm-tokens-1"
PREFIX = "mendlm_"
"""How every token begins, so that one that was published by mistake can be found."""
Role = Literal["read", "edit"]
"""`read`: ask, list, try edits on. `edit`: also make, undo and redo them."""
ROLES: tuple[Role, ...] = get_args(Role)
MOST_NAMES, LONGEST_NAME = 1024, 100
_BYTES = 32


@dataclass(frozen=True)
class Token:
    """What is known of a token."""

    name: str
    role: Role
    created: str
    """ISO 8601, UTC."""
    salt: str
    """Base64, 16 bytes."""
    hash: str
    """sha256 of the salt and the token, in hexadecimal."""


class Tokens:
    """The tokens of a file, as it is now. Raises `FormatError` for one that is missing, damaged, or without tokens."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stamp = _stamp(self.path)
        self._tokens: tuple[Token, ...] | None = load(self.path)
        if not self._tokens:
            raise FormatError(f"{self.path} has no tokens, so nobody could use the service; run `mendlm token add {self.path}`")

    def find(self, secret: str) -> Token | None:
        """The token, or None for one that is not valid. The time it takes does not depend on what is right in it.

        Raises `FormatError` if the file cannot be read any more.
        """
        if (stamp := _stamp(self.path)) != self._stamp or self._tokens is None:
            self._tokens = None
            self._tokens, self._stamp = load(self.path), stamp
        found = None
        for token in self._tokens:
            if hmac.compare_digest(_hash(token.salt, secret), token.hash):
                found = token
        return found


def load(path: Path) -> tuple[Token, ...]:
    """The tokens of a file. Raises `FormatError` for one that is missing or damaged."""
    content = read_json(path)
    try:
        if content["format"] != FORMAT or set(content) != {"format", "tokens"}:
            raise ValueError("its format is another")
        tokens = tuple(Token(**token) for token in content["tokens"])
        for token in tokens:
            _require(token)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is no file of tokens, or is damaged ({error}); make one with `mendlm token add`") from None
    if len({token.name for token in tokens}) < len(tokens):
        raise FormatError(f"{path} is damaged: two tokens have one name")
    return tokens


def add(path: Path, name: str, role: Role) -> str:
    """Make a token, write its hash into the file, and return it. Raises `InputError` for a name that is taken or no name."""
    if role not in ROLES:
        raise InputError(f"the role '{role}' is not known; choose {' or '.join(ROLES)}")
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise InputError(f"a token needs a printable name of at most {LONGEST_NAME} characters, got {name[:120]!r}")
    with _changing(path) as tokens:
        if any(token.name == name for token in tokens):
            raise InputError(f"{path} has a token named '{name}'; choose another name, or remove that one")
        if len(tokens) >= MOST_NAMES:
            raise InputError(f"{path} has {len(tokens)} tokens, the most that it may; remove some")
        secret = PREFIX + secrets.token_urlsafe(_BYTES)
        salt = base64.b64encode(secrets.token_bytes(16)).decode()
        tokens.append(Token(name, role, now(), salt, _hash(salt, secret)))
    return secret


def remove(path: Path, name: str) -> None:
    """Take a token out of the file. Raises `InputError` if there is none of that name."""
    with _changing(path, must_exist=True) as tokens:
        kept = [token for token in tokens if token.name != name]
        if len(kept) == len(tokens):
            names = ", ".join(token.name for token in tokens) or "none"
            raise InputError(f"{path} has no token named '{name}'; there are: {names}")
        tokens[:] = kept


@contextlib.contextmanager
def _changing(path: Path, *, must_exist: bool = False) -> Iterator[list[Token]]:
    """The file's tokens, to be changed; written if the block ends well. The file is for its owner alone, unless it was not."""
    with folder(path.parent), storing(path), filelock.FileLock(f"{path}.lock", timeout=30):
        exists = must_exist or path.exists()
        tokens = list(load(path)) if exists else []
        yield tokens
        mode = stat.S_IMODE(path.stat().st_mode) if exists else 0o600
        write_json(path, {"format": FORMAT, "tokens": [asdict(token) for token in tokens]})
        os.chmod(path, mode)


def _hash(salt: str, secret: str) -> str:
    return hashlib.sha256(base64.b64decode(salt) + secret.encode("utf-8", "surrogatepass")).hexdigest()


def _require(token: Token) -> None:
    if not all(isinstance(value, str) for value in asdict(token).values()) or token.role not in ROLES:
        raise ValueError("a token lacks a field, or has a wrong one")
    try:
        right = len(base64.b64decode(token.salt, validate=True)) == 16 and len(bytes.fromhex(token.hash)) == 32
    except binascii.Error:
        right = False
    if not right:
        raise ValueError("a token's hash is none")


def _stamp(path: Path) -> Any:
    """What changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
