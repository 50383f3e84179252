"""The page in the browser: the files of `mendlm/serve/page`, read once, and the policy that lets only them run.

An inline script or style is named in the policy by its hash, so that nothing that anybody writes into an edit can run.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from dataclasses import dataclass
from html.parser import HTMLParser

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
INDEX = "index.html"


@dataclass(frozen=True)
class File:
    """A file of the page."""

    content: bytes
    type: str


def files() -> dict[str, File]:
    """The page's files by name; empty where it is not installed."""
    place = importlib.resources.files("mendlm.serve") / "page"
    if not place.is_dir():
        return {}
    found = {one.name: one for one in place.iterdir() if one.is_file()}
    suffix = {name: name[name.rfind(".") :] for name in found}
    return {name: File(one.read_bytes(), TYPES[suffix[name]]) for name, one in found.items() if suffix[name] in TYPES}


def policy(html: bytes) -> str:
    """The Content-Security-Policy under which this page works, and nothing else does."""
    inline = _Inline()
    inline.feed(html.decode())
    inline.close()
    scripts, styles = (" ".join(["'self'", *(_hash(text) for text in inline.found[tag])]) for tag in ("script", "style"))
    rules = {
        "default-src": "'none'",
        "script-src": scripts,
        "style-src": styles,
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


class _Inline(HTMLParser):
    """Collects the inline scripts and styles of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.found: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note where one begins."""
        if tag in self.found and "src" not in dict(attrs):
            self._inside = tag
            self.found[tag].append("")

    def handle_data(self, data: str) -> None:
        """Collect its text."""
        if self._inside is not None:
            self.found[self._inside][-1] += data

    def handle_endtag(self, tag: str) -> None:
        """Note where it ends."""
        if tag == self._inside:
            self._inside = None


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
