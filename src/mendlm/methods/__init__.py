"""Editing methods, by name. The registry imports a method's module when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from mendlm.errors import InputError

_PLACES = {
    "mend": ("mend", "Mend", "MendConfig"),
    "malmen": ("malmen", "Malmen", "MalmenConfig"),
    "ke": ("knowledge_editor", "KnowledgeEditor", "KnowledgeEditorConfig"),
    "enn": ("enn", "Enn", "EnnConfig"),
    "ft": ("finetune", "FineTune", "FineTuneConfig"),
    "ft-kl": ("finetune", "FineTune", "FineTuneKLConfig"),
    "ft-strong": ("finetune", "FineTune", "FineTuneStrongConfig"),
    "lora": ("finetune", "FineTune", "LoRAConfig"),
    "prompt": ("prompt", "Prompt", "PromptConfig"),
    "cache": ("cache", "Cache", "CacheConfig"),
}
LEARNED = ("mend", "malmen", "ke", "enn")
"""The methods that `mendlm train` trains."""
METHODS = tuple(_PLACES)


def method_types(name: str) -> tuple[Any, Any]:
    """A method's class and its configuration's, by name. Raises `InputError` for an unknown one."""
    if name not in _PLACES:
        raise InputError(f"unknown method '{name}'; choose one of {', '.join(METHODS)}")
    module, method, config = _PLACES[name]
    loaded = importlib.import_module(f"mendlm.methods.{module}")
    return getattr(loaded, method), getattr(loaded, config)
