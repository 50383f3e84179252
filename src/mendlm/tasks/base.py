"""What a task is: a file format of edit requests or of unrelated texts. Tasks yield text, never tensors.

`TASK:PATH` names a task and a file. A malformed record is a `RecordError` that names file, record and field.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mendlm.errors import InputError, RecordError


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is watched, and the answer if it is known."""

    prompt: str
    answer: str | None = None
    kind: str | None = None
    """The group that the data put it in, as KnowEdit does: "Reasoning", "Relation_Specificity", ..."""


@dataclass(frozen=True, kw_only=True)
class EditExample:
    """One request: make the model answer `target` to `prompt`, and what is checked afterwards."""

    prompt: str
    target: str
    old: str | None = None
    """The answer that the target replaces, where the data names it."""
    rephrasings: tuple[str, ...] = ()
    """Other ways to ask, which should get the target too."""
    unrelated: tuple[Probe, ...] = ()
    """Prompts whose answers should stay as they are."""
    portability: tuple[Probe, ...] = ()
    """Prompts whose answers follow from the edit."""
    subject: str | None = None
    question: bool = False
    """The target is a whole answer, which ends; otherwise it continues the prompt."""


@dataclass(frozen=True)
class Dataset:
    """A file's content, in file order, with what a result must say about where it came from."""

    name: str
    """`TASK:FILE`, the file without its folder."""
    sha256: str
    examples: tuple[EditExample, ...]
    probes: tuple[Probe, ...]
    """Unrelated texts: those of a locality source, or of all examples."""
    skipped: int = 0
    """Malformed records left out on request."""
    prose: bool = False
    """The probes are passages of running text, for perplexity, not questions with an answer."""
    left_out: int = 0
    """Well-formed records that are no request."""
    notes: tuple[str, ...] = ()
    """What an output must say about the data: what is not published but made here, and how."""

    def limited(self, count: int | None) -> Dataset:
        """The first `count` examples."""
        examples = self.examples[:count]
        return replace(self, examples=examples, probes=tuple(p for e in examples for p in e.unrelated))

    def split(self, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Two parts, for training and validation, the second with about `share` of the prompts.

        A hash of prompt and seed decides: records with one prompt stay together, and no other record has a say. An
        unrelated prompt goes with its request, even if it is also the prompt of a request on the other side.
        """
        if not 0 < share < 1:
            raise InputError(f"the share of the second part must lie between 0 and 1, got {share}")

        def part(name: str, keep: Callable[[str], bool]) -> Dataset:
            examples = tuple(e for e in self.examples if keep(e.prompt))
            unrelated = tuple(p for e in examples for p in e.unrelated)
            probes = unrelated if self.examples else tuple(p for p in self.probes if keep(p.prompt))
            note = f"the {name} part of a split that puts {share:g} of the prompts into validation, seed {seed}"
            return replace(self, examples=examples, probes=probes, notes=(*self.notes, note))

        held_out = {p.prompt: chance("split", seed, p.prompt) < share for p in self.examples or self.probes}
        return part("training", lambda prompt: not held_out[prompt]), part("validation", held_out.__getitem__)


class Fields:
    """One record, read field by field; what is wrong is named with file, record number and field."""

    def __init__(self, path: Path, line: int, record: Any, within: str = "") -> None:
        self.path, self.line, self.within = path, line, within
        if not isinstance(record, dict):
            problem = f"expected an object with fields, got {type(record).__name__}"
            raise RecordError(path, line, within.rstrip(".") or None, problem)
        self.record = record

    def error(self, field: str, problem: str) -> RecordError:
        """A `RecordError` about a field of this record."""
        return RecordError(self.path, self.line, self.within + field, problem)

    def inside(self, field: str, value: Any) -> Fields:
        """The fields of an object inside this record; `field` is where it stands."""
        return Fields(self.path, self.line, value, f"{self.within}{field}.")

    def refuse(self, field: str, of: str) -> None:
        """Refuse a field that belongs to another form, since it would be silently ignored."""
        if field in self.record:
            raise self.error(field, f"is a field of {of}")

    def text(self, field: str) -> str:
        """A field that must be a non-empty string."""
        value = self.optional(field)
        if value is None:
            has = ", ".join(map(repr, self.record)) or "none"
            raise self.error(field, f"is missing (the record has the fields {has})")
        return value

    def optional(self, field: str) -> str | None:
        """A field that may be absent or null, but not empty or of another type."""
        value = self.record.get(field)
        if value is None:
            return None
        return self._check(field, value)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of non-empty strings; absent means none."""
        return tuple(self._check(f"{field}[{i}]", value) for i, value in enumerate(self._list(field)))

    def objects(self, field: str) -> list[Fields]:
        """A list of objects with fields; absent means none."""
        return [self.inside(f"{field}[{i}]", value) for i, value in enumerate(self._list(field))]

    def probes(self, field: str, *, answered: bool = False) -> tuple[Probe, ...]:
        """A list of `{"prompt", "answer"?, "kind"?}` objects; absent means none."""
        probes = []
        for index, value in enumerate(self._list(field)):
            if not isinstance(value, dict):
                raise self.error(f"{field}[{index}]", f'expected {{"prompt": ...}}, got {type(value).__name__}')
            prompt = self._check(f"{field}[{index}].prompt", value.get("prompt"))
            answer = value.get("answer")
            if answer is not None or answered:
                answer = self._check(f"{field}[{index}].answer", answer)
            kind = value.get("kind")
            probes.append(Probe(prompt, answer, kind if kind is None else self._check(f"{field}[{index}].kind", kind)))
        return tuple(probes)

    def _list(self, field: str) -> list[Any]:
        value = self.record.get(field)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(field, f"expected a list, got {type(value).__name__}")
        return value

    def _check(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(field, f"expected text, got {type(value).__name__}")
        if not value.strip():
            raise self.error(field, "is empty")
        if not is_text(value):
            raise self.error(field, "holds half of a surrogate pair, which is no character")
        return value


class Task(ABC):
    """A file format. Subclasses say how one record becomes an example or an unrelated text."""

    name: ClassVar[str]
    """What stands before the colon in `TASK:PATH`."""
    prose: ClassVar[bool] = False
    """The file holds running text."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        """What is drawn for a record is a hash of this and of its text, whatever else the file holds."""

    @abstractmethod
    def parse(self, fields: Fields) -> EditExample | Probe | None:
        """One record as a request, as an unrelated text, or None for a well-formed one that is neither.

        Raises `RecordError`.
        """

    def finish(self, examples: list[EditExample]) -> list[EditExample]:
        """A file's requests, completed by what only the whole file can give."""
        return examples

    def notes(self, examples: Sequence[EditExample]) -> tuple[str, ...]:
        """What an output must say about these requests, as `Dataset.notes`."""
        return ()

    def records(self, path: Path) -> Iterator[tuple[int, Any]]:
        """The file's raw records, each with its number: the line of JSON Lines, the position in a JSON list."""
        text = read_text(path)
        if text.lstrip()[:1] == "[":
            try:
                yield from enumerate(json.loads(text), start=1)
            except (ValueError, RecursionError) as error:
                raise RecordError(path, None, None, f"is not valid JSON: {error}") from None
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    problem = f"is not valid JSON: {error}; a line holds one record, or the file is one JSON list of them"
                    yield number, RecordError(path, number, None, problem)

    def load(self, path: str | Path, *, skip_bad: bool = False) -> Dataset:
        """Read a whole file. With `skip_bad`, malformed records are counted and left out."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"the data file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        examples: list[EditExample] = []
        probes: list[Probe] = []
        skipped = left_out = 0
        for number, record in self.records(path):
            try:
                if isinstance(record, RecordError):
                    raise record
                parsed = self.parse(Fields(path, number, record))
            except RecordError:
                if not skip_bad:
                    raise
                skipped += 1
                continue
            if parsed is None:
                left_out += 1
            elif isinstance(parsed, Probe):
                probes.append(parsed)
            else:
                examples.append(parsed)
        if not examples and not probes:
            counts = f"{skipped} malformed" + (f", {left_out} that are no request" if left_out else "")
            raise RecordError(path, None, None, f"holds no usable record ({counts})")
        examples = self.finish(examples)
        return Dataset(
            name=f"{self.name}:{path.name}",
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            examples=tuple(examples),
            probes=(*probes, *(probe for example in examples for probe in example.unrelated)),
            skipped=skipped,
            prose=self.prose,
            left_out=left_out,
            notes=self.notes(examples),
        )


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone: the same on every machine and in every run.

    The first part says what is drawn, so that two draws about one text are independent.
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def exchange(examples: list[EditExample]) -> list[EditExample]:
    """Unrelated prompts from the file itself, for data that has none of its own.

    An example whose only unrelated prompt is its own prompt offers it to others, and gets that of the example half the
    file away, or the next one with another prompt; alone in the file, it has none.
    """
    offers = [i for i, e in enumerate(examples) if [p.prompt for p in e.unrelated] == [e.prompt]]
    exchanged = list(examples)
    for place, index in enumerate(offers):
        turned = (offers[(place + len(offers) // 2 + step) % len(offers)] for step in range(len(offers)))
        other = next((examples[i].unrelated for i in turned if examples[i].prompt != examples[index].prompt), ())
        exchanged[index] = replace(examples[index], unrelated=other)
    return exchanged


def is_question(prompt: str) -> bool:
    """Whether a prompt asks for a whole answer, rather than to be continued: it ends with a question mark."""
    return prompt.rstrip().endswith("?")


def is_text(value: str) -> bool:
    """Whether a string is valid Unicode text: JSON escapes can spell half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def read_text(path: Path) -> str:
    """A file's text: UTF-8, a byte-order mark and Windows line ends allowed."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(path, None, None, f"is not UTF-8 text: {error}") from None
    except OSError as error:
        raise RecordError(path, None, None, f"cannot be read: {error.strerror or error}") from None
