"""What a data set holds: counts, lengths, a few examples. Reads and counts text, needs no model."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mendlm.tasks.base import Dataset


def describe(data: Dataset, examples: int = 3) -> dict[str, Any]:
    """Counts, lengths of prompts and answers in characters and words, provenance, and the first requests or texts.

    Where there are no requests, prompts and answers are those of the unrelated texts.
    """
    asked = data.examples or data.probes
    answers = [e.target for e in data.examples] or [p.answer for p in data.probes if p.answer is not None]
    portability = [probe for example in data.examples for probe in example.portability]
    return {
        "name": data.name,
        "sha256": data.sha256,
        "requests": len(data.examples),
        "rephrasings": sum(len(example.rephrasings) for example in data.examples),
        "unrelated": len(data.probes),
        "portability": len(portability),
        "groups": dict(Counter(probe.kind for probe in (*data.probes, *portability) if probe.kind is not None)),
        "left_out": data.left_out,
        "skipped": data.skipped,
        "prompts": _lengths([item.prompt for item in asked]),
        "targets": _lengths(answers),
        "notes": list(data.notes),
        "examples": [asdict(item) for item in asked[:examples]],
    }


def _lengths(texts: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Median and longest, in characters and in words; None of no texts."""
    if not texts:
        return None
    sizes = {"characters": [len(text) for text in texts], "words": [len(text.split()) for text in texts]}
    return {unit: {"median": statistics.median(some), "longest": max(some)} for unit, some in sizes.items()}
