"""Tasks: file formats of requests and of unrelated texts. They yield text, never tensors."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from mendlm.errors import InputError, RecordError
from mendlm.tasks.base import Dataset, EditExample, Fields, Probe, Task, read_text
from mendlm.tasks.counterfact import CounterFact
from mendlm.tasks.fever import Fever
from mendlm.tasks.knowedit import KnowEdit
from mendlm.tasks.records import Records
from mendlm.tasks.unrelated import NaturalQuestions, RawText
from mendlm.tasks.wikitext import WikiText
from mendlm.tasks.zsre import ZsRE

_ALL = (CounterFact(), ZsRE(), Records(), Fever(), WikiText(), KnowEdit(), NaturalQuestions(), RawText())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
TRIED = 20
"""Records that are looked at to see whose a file is: the first may be malformed."""
_RECORDS = re.compile(r"\s*(\[\s*([{\]]|$)|\{\s*([\"'}]|$))")
"""How a file of records begins: with an object, or with a list of objects."""

__all__ = ["TASKS", "Dataset", "EditExample", "Probe", "Task", "combine", "load", "load_edits", "load_unrelated"]


def load(source: str, *, skip_bad: bool = False, seed: int = 0) -> Dataset:
    """Load `TASK:PATH`; `seed` is that of what the task draws. Raises `RecordError`, which names the right task where the file
    looks like another's.
    """
    name, colon, path = source.partition(":")
    if not colon or name not in TASKS:
        raise InputError(f"'{source}' is not TASK:PATH with a known task; tasks are {', '.join(TASKS)}")
    task, file = type(TASKS[name])(seed), Path(path)
    try:
        dataset = task.load(file, skip_bad=skip_bad)
    except RecordError as error:
        looks = _looks(file, task)
        if not looks:
            raise
        raise RecordError(error.path, error.line, error.field, f"{error.problem}; the file {looks}") from None
    looks = _looks(file, task) if task.prose else ""  # raw text would take any file
    if looks:
        raise RecordError(file, None, None, looks)
    return dataset


def _looks(path: Path, given: Task) -> str:
    """What a file looks like, and how to name it, where it looks less like one of the task that it was given to."""
    try:
        text = read_text(path)
    except RecordError:
        return ""
    if not _RECORDS.match(text):
        plain = text.strip() and not given.prose
        return f"does not hold JSON records; if it is plain text, use it as --locality text:{path}" if plain else ""
    places = {task.name: _first(task, path) for task in TASKS.values() if not task.prose}
    nearest = min(places.values())
    names = [name for name, place in places.items() if place == nearest < TRIED]
    if given.name in names or not names:
        return ""
    return "looks like " + " or ".join(f"the task '{name}': use {name}:{path}" for name in names)


def _first(task: Task, path: Path) -> int:
    """How many records stand before the first that is one of the task's; `TRIED` where there is none among so many."""
    with contextlib.suppress(RecordError):  # where not even the form of the file is the task's
        for place, (number, record) in enumerate(itertools.islice(task.records(path), TRIED)):
            with contextlib.suppress(RecordError):
                task.parse(Fields(path, number, record))
                return place
    return TRIED


def load_edits(source: str, *, skip_bad: bool = False, seed: int = 0) -> Dataset:
    """Load `TASK:PATH` as requests. Raises `InputError` for a task that holds only unrelated texts."""
    dataset = load(source, skip_bad=skip_bad, seed=seed)
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


def load_unrelated(source: str, *, skip_bad: bool = False, seed: int = 0) -> Dataset:
    """Load `TASK:PATH` as unrelated texts: a source of them, or those of its requests."""
    dataset = load(source, skip_bad=skip_bad, seed=seed)
    if not dataset.probes:
        raise InputError(f"'{source}' holds no unrelated texts, so it cannot measure or teach locality")
    return dataset
