"""`Editor`: a method bound to a model and its tokenizer."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mendlm.apply import CHANGED_BASE, Edit
from mendlm.checkpoint import editor_path, load_editor
from mendlm.errors import FormatError, InputError
from mendlm.files import sha256
from mendlm.losses import all_by_row
from mendlm.methods.base import Learned, Method, edits_of
from mendlm.models import STARTER, base_of, identity
from mendlm.tasks import EditExample
from mendlm.tasks.base import is_question
from mendlm.text import Encoded, Formatter, TargetEnd, by_length, scored_logits, target_ends

SHIPPED = {STARTER: "editor.safetensors", f"{STARTER}-many": "many.safetensors"}
"""The editors of the starter model by name: for single edits, and for several that are active together."""


class Editor:
    """Turns requests into edits of one model.

    Where the method has changed the base (ENN), an edit carries that change too, so that it works on the model as it was; it is
    to be made on that model, not under another such edit. `device` is where a trained method's networks are, by default where
    the model is; edits are on the model's device.
    """

    def __init__(
        self,
        method: Method,
        model: Any,
        tokenizer: Any,
        about: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if isinstance(method, Learned):
            method.require_fit(model)
            method.beside(model, device).eval()
        self.method = method
        self.model, self.formatter, self.about = model, Formatter.of(model, tokenizer), about or {}

    @functools.cached_property
    def base(self) -> dict[str, Any]:
        """What edits say about the model they are for."""
        return base_of(self.model)

    @classmethod
    def load(
        cls,
        source: str | Path,
        model: Any,
        tokenizer: Any,
        *,
        force: bool = False,
        device: str | torch.device | None = None,
    ) -> Editor:
        """A shipped editor of `SHIPPED`, or a run folder's or file's, for a loaded model; raises as `load_method`."""
        method, about = load_method(source, model, force=force)
        return cls(method, model, tokenizer, about, device)

    def edit(self, prompt: str, target: str, *, scale: float = 1.0, chat: bool = False, target_end: TargetEnd = "auto") -> Edit:
        """The edit that makes the model answer `target` to `prompt`, recorded on the model as it runs now.

        `scale` multiplies the edit, before it is refined (`mendlm.methods.refine`); `chat` poses the prompt as a user's turn;
        `target_end` says whether the answer ends after the target. Raises `InputError` for text that cannot be used, and
        `NumericalError` if the edit is not finite.
        """
        return self.edit_many([(prompt, target)], scale=scale, chat=chat, target_end=target_end)[0]

    def edit_many(
        self,
        requests: Sequence[EditExample | tuple[str, str]],
        *,
        scale: float = 1.0,
        chat: bool = False,
        target_end: TargetEnd = "auto",
        batch_size: int = 32,
    ) -> list[Edit]:
        """Independent edits, one a request, made in batches: requests are `EditExample`s or (prompt, target) pairs.

        Raises `InputError` for several by a method whose statistics follow along, in which edits depend on those before.
        """
        if len(requests) > 1 and self.method.follows_along:
            raise InputError(
                f"normalizer_follows is for edits made one after another, and {len(requests)} were asked for together; "
                "leave it out, or make them one by one"
            )
        examples, texts = self._encode(requests, chat, target_end)
        edits: list[Edit | None] = [None] * len(examples)
        finished = self._finished()
        for group in by_length([len(text) for text in texts], limit=batch_size):
            some = [texts[i] for i in group]
            batch = edits_of(self.method, self.model, self.formatter, some, 1, batch_size, scale).require_finite()
            for index, own in zip(group, batch.unbind(), strict=True):
                edits[index] = finished(own, self._about(examples[index], scale, chat))
        return [edit for edit in edits if edit is not None]

    def edit_together(
        self,
        requests: Sequence[EditExample | tuple[str, str]],
        *,
        scale: float = 1.0,
        chat: bool = False,
        target_end: TargetEnd = "auto",
        batch_size: int = 32,
    ) -> Edit:
        """One edit that makes all of the requests at once, as the method merges them: MALMEN by least squares, others by their
        sum. The method should be trained at about as many (`num_edits`); raises as `edit`.
        """
        if not requests:
            raise InputError("no requests were given; give one at least")
        examples, texts = self._encode(requests, chat, target_end)
        made = edits_of(self.method, self.model, self.formatter, texts, len(texts), batch_size, scale)
        (own,) = made.require_finite().fewest().unbind()
        abouts = [self._about(example, scale, chat) for example in examples]
        parts = [{"request": about.pop("request")} for about in abouts]
        return self._finished()(own, {**abouts[0], "parts": parts})

    def _finished(self) -> Callable[[Edit, Mapping[str, Any]], Edit]:
        """What gives an edit all that is said about it, and what the method has changed of the base."""
        found = self.method.changed_base()
        if found is None:
            return lambda own, about: replace(own, about=about)
        change, base = found.detach(), {CHANGED_BASE: found.id}
        return lambda own, about: replace(change + own, about={**about, **base})

    @torch.no_grad()
    def already_given(
        self,
        requests: Sequence[EditExample | tuple[str, str]],
        *,
        chat: bool = False,
        target_end: TargetEnd = "auto",
        batch_size: int = 32,
    ) -> list[bool]:
        """Whether the model as it runs now gives each request's target already: all its tokens (the end token apart) are the
        argmax under teacher forcing."""
        _, texts = self._encode(requests, chat, target_end)
        given = [False] * len(texts)
        for group in by_length([len(text) for text in texts], limit=batch_size):
            batch = self.formatter.batch([texts[i] for i in group])
            right = (scored_logits(self.model, batch).argmax(-1) == batch.label) | batch.is_end
            for index, flag in zip(group, all_by_row(right, batch.row, batch.size).tolist(), strict=True):
                given[index] = bool(flag)
        return given

    def _encode(
        self, requests: Sequence[EditExample | tuple[str, str]], chat: bool, target_end: TargetEnd
    ) -> tuple[list[EditExample], list[Encoded]]:
        examples = [
            r if isinstance(r, EditExample) else EditExample(prompt=r[0], target=r[1], question=is_question(r[0]))
            for r in requests
        ]
        ends = [self._ends(example, chat, target_end) for example in examples]
        texts = [self.formatter.encode(e.prompt, e.target, chat=chat, end=end) for e, end in zip(examples, ends, strict=True)]
        return examples, texts

    def _ends(self, example: EditExample, chat: bool, target_end: TargetEnd) -> bool:
        return target_ends(target_end, question=example.question, chat=chat, family=self.formatter.family)

    def require_usable(self, requests: Sequence[EditExample], *, chat: bool = False, target_end: TargetEnd = "auto") -> None:
        """Raise `InputError`, which names the request by its number, for text that an edit could not use."""
        for number, one in enumerate(requests, start=1):
            try:
                end = self._ends(one, chat, target_end)
                self.formatter.require_usable([one.prompt], one.target, chat=chat, end=end)
            except InputError as error:
                raise InputError(f"request {number}: {error}") from None

    def _about(self, example: EditExample, scale: float, chat: bool) -> dict[str, Any]:
        return {
            "request": {"prompt": example.prompt, "target": example.target, "chat": chat, "scale": scale},
            "base": self.base,
            "method": self.method.name,
            "editor": which_editor(self.about) | ({"refine": steps} if (steps := self.method.refine) else {}),
            "stack": [],
        }


def which_editor(about: Mapping[str, Any]) -> dict[str, Any]:
    """Which trained editor it was, of what is said about it: its file, hash and step, and the seed of its training."""
    seed = {"seed": about["training"]["seed"]} if "training" in about else {}
    return {key: about[key] for key in ("source", "step", "sha256") if key in about} | seed


def load_method(source: str | Path, model: Any, *, force: bool = False) -> tuple[Learned, dict[str, Any]]:
    """A trained method for a loaded model, and what is said about it; `source` as in `Editor.load`.

    Raises `LayerError` if the model's layers do not fit, and `FormatError` if the editor was trained on another base model
    (unless `force`) or its file is damaged.
    """
    path = editor_file(source)
    method, about = load_editor(path)
    trained_on = about.get("base", {}).get("sha256")
    method.require_fit(model)
    if trained_on and not force and trained_on != identity(model):
        raise FormatError(
            f"the editor '{source}' was trained on another base model ({about['base'].get('name')}, sha256 "
            f"{trained_on[:12]}...), not on this one ({identity(model)[:12]}...); train one for this model, or force it"
        )
    return method.beside(model).eval(), {**about, "source": Path(source).name, "sha256": sha256(path)}


def editor_file(source: str | Path) -> Path:
    """The file of an editor by name: a shipped one of `SHIPPED`, else a run folder's or the file itself."""
    if str(source) not in SHIPPED:
        return editor_path(Path(source))
    path = Path(str(importlib.resources.files("mendlm"))) / "starter" / SHIPPED[str(source)]
    if not path.is_file():
        raise FormatError("this installation of mendlm lacks the starter editor; install it again")
    return path
