"""mendlm: correct what a pre-trained language model knows.

    import mendlm

    model, tokenizer = mendlm.load("starter")
    editor = mendlm.Editor.load("starter", model, tokenizer)
    edit = editor.edit("The capital of France is", " Lyon")
    with edit.on(model):
        ...

Exports are lazy: importing mendlm loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mendlm.apply import Edit as Edit
    from mendlm.apply import Intervention as Intervention
    from mendlm.apply import MergeReport as MergeReport
    from mendlm.apply import Snapshot as Snapshot
    from mendlm.apply import applied as applied
    from mendlm.apply import merge as merge
    from mendlm.editor import Editor as Editor
    from mendlm.errors import FormatError as FormatError
    from mendlm.errors import GateError as GateError
    from mendlm.errors import InputError as InputError
    from mendlm.errors import LayerError as LayerError
    from mendlm.errors import MendError as MendError
    from mendlm.errors import MissingPackageError as MissingPackageError
    from mendlm.errors import ModelError as ModelError
    from mendlm.errors import NumericalError as NumericalError
    from mendlm.errors import RecordError as RecordError
    from mendlm.errors import StorageError as StorageError
    from mendlm.evaluation import EvaluationConfig as EvaluationConfig
    from mendlm.evaluation import evaluate as evaluate
    from mendlm.gate import Checks as Checks
    from mendlm.gate import Gate as Gate
    from mendlm.gate import Guard as Guard
    from mendlm.journal import Record as Record
    from mendlm.layers import LayerSpec as LayerSpec
    from mendlm.layers import default_layers as default_layers
    from mendlm.layers import select as select
    from mendlm.lowrank import LowRank as LowRank
    from mendlm.methods.base import Method as Method
    from mendlm.methods.finetune import FineTune as FineTune
    from mendlm.methods.finetune import FineTuneConfig as FineTuneConfig
    from mendlm.methods.mend import Mend as Mend
    from mendlm.methods.mend import MendConfig as MendConfig
    from mendlm.models import load as load
    from mendlm.models import shard as shard
    from mendlm.recording import Recording as Recording
    from mendlm.recording import record as record
    from mendlm.replay import Trunk as Trunk
    from mendlm.session import Session as Session
    from mendlm.store import Store as Store
    from mendlm.tasks import load_edits as load_edits
    from mendlm.tasks import load_unrelated as load_unrelated
    from mendlm.tasks.base import Dataset as Dataset
    from mendlm.tasks.base import EditExample as EditExample
    from mendlm.tasks.base import Probe as Probe
    from mendlm.tasks.base import Task as Task
    from mendlm.text import Formatter as Formatter
    from mendlm.training import TrainConfig as TrainConfig
    from mendlm.training import train as train

__version__ = "0.1.0"

_HOMES = {
    "apply": ("Edit", "Intervention", "MergeReport", "Snapshot", "applied", "merge"),
    "editor": ("Editor",),
    "errors": (
        "FormatError",
        "GateError",
        "InputError",
        "LayerError",
        "MendError",
        "MissingPackageError",
        "ModelError",
        "NumericalError",
        "RecordError",
        "StorageError",
    ),
    "evaluation": ("EvaluationConfig", "evaluate"),
    "gate": ("Checks", "Gate", "Guard"),
    "journal": ("Record",),
    "layers": ("LayerSpec", "default_layers", "select"),
    "lowrank": ("LowRank",),
    "methods.base": ("Method",),
    "methods.finetune": ("FineTune", "FineTuneConfig"),
    "methods.mend": ("Mend", "MendConfig"),
    "models": ("load", "shard"),
    "recording": ("Recording", "record"),
    "replay": ("Trunk",),
    "session": ("Session",),
    "store": ("Store",),
    "tasks": ("load_edits", "load_unrelated"),
    "tasks.base": ("Dataset", "EditExample", "Probe", "Task"),
    "text": ("Formatter",),
    "training": ("TrainConfig", "train"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mendlm' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mendlm.{_HOME[name]}"), name)

    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
