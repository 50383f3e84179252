"""Tasks: file formats of requests and of unrelated texts. They yield text, never tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mendlm.errors import InputError, RecordError
from mendlm.tasks.base import Dataset, EditExample, Fields, Probe, Task
from mendlm.tasks.counterfact import CounterFact
from mendlm.tasks.fever import Fever
from mendlm.tasks.knowedit import KnowEdit
from mendlm.tasks.records import Records
from mendlm.tasks.unrelated import NaturalQuestions, RawText
from mendlm.tasks.wikitext import WikiText
from mendlm.tasks.zsre import ZsRE

_ALL = (CounterFact(), ZsRE(), Records(), Fever(), WikiText(), KnowEdit(), NaturalQuestions(), RawText())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}

__all__ = ["TASKS", "Dataset", "EditExample", "Probe", "Task", "combine", "load", "load_edits", "load_unrelated"]


def load(source: str, *, skip_bad: bool = False) -> Dataset:
    """Load `TASK:PATH`. Raises `RecordError`, which names the right task where the file looks like another's."""
    name, colon, path = source.partition(":")
    if not colon or name not in TASKS:
        raise InputError(f"'{source}' is not TASK:PATH with a known task; tasks are {', '.join(TASKS)}")
    task, file = TASKS[name], Path(path)
    try:
        dataset = task.load(file, skip_bad=skip_bad)
    except RecordError as error:
        looks = "" if _begins(task, file) and not task.prose else _looks(file)
        if not looks and error.line == 1 and not _is_json(file):
            looks = f"does not hold JSON; if it is plain text, use it as --locality text:{file}"
        if not looks:
            raise
        raise RecordError(error.path, error.line, error.field, f"{error.problem}; the file {looks}") from None
    looks = _looks(file) if task.prose else ""  # raw text would take any file
    if looks:
        raise RecordError(file, None, None, looks)
    return dataset


def _looks(path: Path) -> str:
    """What a file of records looks like, and how to name it, by its first record; empty where no task reads it."""
    if not _is_json(path):
        return ""
    names = [task.name for task in TASKS.values() if not task.prose and _begins(task, path)]
    return "looks like " + " or ".join(f"the task '{name}': use {name}:{path}" for name in names) if names else ""


def _is_json(path: Path) -> bool:
    """Whether a file begins as records do."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _begins(task: Task, path: Path) -> bool:
    """Whether a file's first record is one of the task's."""
    try:
        number, record = next(task.records(path))
        task.parse(Fields(path, number, record))
    except (RecordError, StopIteration):
        return False
    return True


def load_edits(source: str, *, skip_bad: bool = False) -> Dataset:
    """Load `TASK:PATH` as requests. Raises `InputError` for a task that holds only unrelated texts."""
    dataset = load(source, skip_bad=skip_bad)
    if not dataset.examples:
        raise InputError(f"'{source}' holds unrelated texts, no requests; use it with --locality")
    return dataset


def combine(datasets: Sequence[Dataset]) -> Dataset:
    """Several files of requests as one; the hash is that of their hashes."""
    if len(datasets) == 1:
        return datasets[0]
    examples, probes = (tuple(item for d in datasets for item in getattr(d, kind)) for kind in ("examples", "probes"))
    digest = hashlib.sha256("".join(d.sha256 for d in datasets).encode()).hexdigest()
    return Dataset(
        name=" + ".join(d.name for d in datasets),
        sha256=digest,
        examples=examples,
        probes=probes,
        skipped=sum(d.skipped for d in datasets),
        left_out=sum(d.left_out for d in datasets),
        notes=tuple(dict.fromkeys(note for d in datasets for note in d.notes)),
    )


def load_unrelated(source: str, *, skip_bad: bool = False) -> Dataset:
    """Load `TASK:PATH` as unrelated texts: a source of them, or those of its requests."""
    dataset = load(source, skip_bad=skip_bad)
    if not dataset.probes:
        raise InputError(f"'{source}' holds no unrelated texts, so it cannot measure or teach locality")
    return dataset
