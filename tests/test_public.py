"""The public names, and that importing them costs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mendlm

NAMES = [
    "Checks",
    "Dataset",
    "Edit",
    "EditExample",
    "Editor",
    "EvaluationConfig",
    "FineTune",
    "FineTuneConfig",
    "FormatError",
    "Formatter",
    "Gate",
    "GateError",
    "Guard",
    "InputError",
    "Intervention",
    "LayerError",
    "LayerSpec",
    "LowRank",
    "Mend",
    "MendConfig",
    "MendError",
    "MergeReport",
    "Method",
    "MissingPackageError",
    "ModelError",
    "NumericalError",
    "Probe",
    "Record",
    "RecordError",
    "Recording",
    "Session",
    "Snapshot",
    "StorageError",
    "Store",
    "Task",
    "TrainConfig",
    "Trunk",
    "applied",
    "default_layers",
    "evaluate",
    "load",
    "load_edits",
    "load_unrelated",
    "merge",
    "record",
    "select",
    "shard",
    "train",
]


def test_the_public_names_are_these() -> None:
    assert mendlm.__all__ == sorted(NAMES)
    assert set(NAMES) <= set(dir(mendlm))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_described(name: str) -> None:
    value = getattr(mendlm, name)
    assert callable(value)
    assert value.__doc__


def test_the_names_for_type_checkers_are_the_names_at_run_time() -> None:
    source = Path(mendlm.__file__).read_text()
    assert sorted(re.findall(r"import (\w+) as \1", source)) == mendlm.__all__


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mendlm.nonsense


def test_import_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, mendlm; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_error_tree_is_drawn() -> None:
    from mendlm import errors

    drawn = re.findall(r"(\w+Error)\b", (errors.__doc__ or "").split("A message")[0])
    defined = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.MendError)]
    assert set(defined) <= set(drawn)
