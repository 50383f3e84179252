"""Tasks: file formats of requests and of unrelated texts. They yield text, never tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mendlm.errors import InputError
from mendlm.tasks.base import Dataset, EditExample, Probe, Task
from mendlm.tasks.counterfact import CounterFact
from mendlm.tasks.records import Records
from mendlm.tasks.unrelated import NaturalQuestions, RawText
from mendlm.tasks.zsre import ZsRE

TASKS: dict[str, Task] = {task.name: task for task in (CounterFact(), ZsRE(), Records(), NaturalQuestions(), RawText())}

__all__ = ["TASKS", "Dataset", "EditExample", "Probe", "Task", "combine", "load_edits", "load_unrelated"]


def _load(source: str, skip_bad: bool) -> Dataset:
    name, colon, path = source.partition(":")
    if not colon or name not in TASKS:
        raise InputError(f"'{source}' is not TASK:PATH with a known task; tasks are {', '.join(TASKS)}")
    return TASKS[name].load(path, skip_bad=skip_bad)


def load_edits(source: str, *, skip_bad: bool = False) -> Dataset:
    """Load `TASK:PATH` as requests. Raises `InputError` for a task that holds only unrelated texts."""
    dataset = _load(source, skip_bad)
    if not dataset.examples:
        raise InputError(f"'{source}' holds unrelated texts, no requests; use it with --locality")
    return dataset


def combine(datasets: Sequence[Dataset]) -> Dataset:
    """Several files of requests as one; the hash is that of their hashes."""
    if len(datasets) == 1:
        return datasets[0]
    examples, probes = (tuple(item for d in datasets for item in getattr(d, kind)) for kind in ("examples", "probes"))
    digest = hashlib.sha256("".join(d.sha256 for d in datasets).encode()).hexdigest()
    return Dataset(" + ".join(d.name for d in datasets), digest, examples, probes, sum(d.skipped for d in datasets))


def load_unrelated(source: str, *, skip_bad: bool = False) -> Dataset:
    """Load `TASK:PATH` as unrelated texts: a source of them, or those of its requests."""
    dataset = _load(source, skip_bad)
    if not dataset.probes:
        raise InputError(f"'{source}' holds no unrelated texts, so it cannot measure or teach locality")
    return dataset
