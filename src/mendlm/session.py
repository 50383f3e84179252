"""`Session`: one running model with its editor and the stack of edits that is on it, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mendlm.adapter import fingerprint
from mendlm.apply import Edit, applied, stacked
from mendlm.editor import Editor
from mendlm.errors import InputError
from mendlm.models import STARTER, load
from mendlm.text import Formatter


class Session:
    """A model, its editor and its stack of edits. Undoing an edit removes its rows and nothing else.

    One thread owns a session, since hooks belong to the process.
    """

    def __init__(self, model: Any, tokenizer: Any, editor: Editor | None = None) -> None:
        self.model, self.tokenizer, self.editor = model, tokenizer, editor
        self._stack: dict[str, Edit] = {}

    @classmethod
    def open(cls, source: str | Path = STARTER, *, editor: str | Path | None = None, **options: Any) -> Session:
        """Load a model (`options` as in `mendlm.load`) and its editor; the starter model has its own."""
        model, tokenizer = load(source, **options)
        wanted = STARTER if editor is None and str(source) == STARTER else editor
        return cls(model, tokenizer, Editor.load(wanted, model, tokenizer) if wanted is not None else None)

    @property
    def edits(self) -> dict[str, Edit]:
        """The active edits by id, oldest first."""
        return dict(self._stack)

    @property
    def active(self) -> Edit | None:
        """The whole stack as one edit: the rows of all, in order."""
        return stacked(list(self._stack.values())) if self._stack else None

    def edit(self, prompt: str, target: str, *, scale: float = 1.0, chat: bool = False, on_base: bool = False) -> str:
        """Make an edit and put it on the stack; returns its id. Errors leave the stack as it was.

        It is recorded under the active edits, and remembers them; with `on_base`, as if there were none.
        """
        if self.editor is None:
            raise InputError("this session has no editor; open it with editor=RUN to make edits")
        if self.active is None or on_base:
            return self.add(self.editor.edit(prompt, target, scale=scale, chat=chat))
        with applied(self.model, self.active):
            new = self.editor.edit(prompt, target, scale=scale, chat=chat)
        return self.add(replace(new, about={**new.about, "stack": list(self._stack)}))

    def add(self, edit: Edit, *, force: bool = False) -> str:
        """Put an edit on the stack; returns its id. One made for another base is refused unless `force`."""
        if not force:
            edit.require_base(self.model)
        with applied(self.model, edit):  # raises if the model lacks its layers
            pass
        name = fingerprint(edit.updates)
        if name in self._stack:
            raise InputError(f"the edit {name} is already active")
        stacked([*self._stack.values(), edit])  # raises if that would change the base twice
        self._stack[name] = edit
        return name

    def undo(self, name: str | None = None) -> Edit:
        """Take an edit off, by default the latest; returns it, so that it can be added again."""
        if name is None and self._stack:
            name = next(reversed(self._stack))
        if name not in self._stack or name is None:
            raise InputError(f"no active edit '{name}'; active are: {', '.join(self._stack) or 'none'}")
        return self._stack.pop(name)

    def answer(self, prompt: str, *, chat: bool = False, max_new_tokens: int = 32) -> str:
        """The model's greedy answer under the active edits."""
        return self.answers([prompt], chat=chat, max_new_tokens=max_new_tokens)[0]

    def answers(self, prompts: Sequence[str], *, chat: bool = False, max_new_tokens: int = 32) -> list[str]:
        """Greedy answers to several prompts, in one batch."""
        formatter = Formatter.of(self.model, self.tokenizer)
        texts = [formatter.encode(prompt, None, chat=chat) for prompt in prompts]
        if self.active is None:
            found = formatter.generate(self.model, texts, max_new_tokens)
        else:
            with applied(self.model, self.active):
                found = formatter.generate(self.model, texts, max_new_tokens)
        return [formatter.decode(tokens) for tokens in found]
