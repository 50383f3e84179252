"""The JSON that the service takes and gives: OpenAI's forms for completions, its own for edits.

Strict: a number is no text, a field that is not known is refused, and every text and list has a longest length. A field of
OpenAI's that changes no answer here is taken and ignored; one that would is refused, unless it says what is done anyway.
Knows no HTTP and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LONGEST = 65_536
"""Characters of a prompt, a target or a message."""
MOST_PROMPTS, MOST_MESSAGES, MOST_EDITS, MOST_STOPS = 32, 256, 1024, 4
MOST_REPHRASINGS, MOST_UNRELATED = 32, 64
PAGE = 1000
"""Edits that one answer lists at most."""

Text = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Author = Annotated[str, Field(max_length=200, description="Who asks for it; kept in the journal.")]
Reason = Annotated[str, Field(max_length=2000, description="Why; kept in the journal.")]
EditIds = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=64)]],
    Field(max_length=MOST_EDITS, description="Ids of edits to answer under, whatever their state; without: the active ones."),
]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


# Edits


class Unrelated(_Form):
    """A prompt whose answer should stay; with `answer`, what it is."""

    prompt: Text
    answer: Text | None = None


class PreviewRequest(_Form):
    """An edit to be tried on and thrown away."""

    prompt: Text
    target: Text = Field(description="The answer that the prompt should get.")
    rephrasings: list[Text] = Field(default=[], max_length=MOST_REPHRASINGS, description="Other wordings that should get it.")
    unrelated: list[Text | Unrelated] = Field(
        default=[], max_length=MOST_UNRELATED, description="Prompts whose answers should stay."
    )
    chat: bool = Field(default=False, description="The prompts are a user's turns in a chat.")
    scale: float = Field(default=1.0, gt=0, le=100, description="The edit's strength; the editor's own is 1.")
    on_base: bool = Field(
        default=True, description="Make it on the base model; else under the active edits, which disturbs most editors."
    )


class EditRequest(PreviewRequest):
    """An edit to be made, and kept if its gate lets it."""

    on_fail: Literal["report", "refuse", "retry"] | None = Field(
        default=None, description="What happens if it fails its gate; without: as the service was started."
    )
    author: Author = ""
    reason: Reason = ""


class Asked(BaseModel):
    """One prompt with its answers before and under an edit."""

    kind: Literal["prompt", "rephrasing", "unrelated", "guard"]
    prompt: str
    chat: bool
    wanted: str | None
    before: str
    after: str
    probability: tuple[float, float] = Field(
        description="A token of the wanted answer, or of the one before: before and after."
    )
    ok: bool
    was_ok: bool = Field(default=True, description="Whether it was so before: what was wrong already says nothing.")


class Checks(BaseModel):
    """What a gate saw of an edit. Empty for one that was taken into the store unchecked."""

    passed: bool | None = None
    kept: float | None = Field(
        default=None, description="The share that holds of the unrelated prompts and guards that were right."
    )
    asked: list[Asked] = []
    norms: dict[str, float] = Field(default={}, description="The Frobenius norm of the change, by layer.")


class EditRecord(BaseModel):
    """An edit in the journal."""

    id: str
    number: int = Field(description="The place of its entry in the journal, from 1.")
    time: str
    author: str
    reason: str
    request: dict[str, Any]
    editor: dict[str, Any]
    base: dict[str, Any]
    file: str = Field(description="The sha256 of its file.")
    size: int = Field(description="The bytes of its file.")
    stack: list[str] = Field(description="The edits that it was made under: none for one made on the base.")
    checks: Checks
    state: Literal["active", "undone", "superseded"]
    superseded_by: str | None
    supersedes: list[str]
    imported: dict[str, Any] | None = None


class EditList(BaseModel):
    """Edits in the journal's order."""

    object: Literal["list"]
    data: list[EditRecord]
    head: str = Field(description="The hash of the journal's last entry.")
    has_more: bool


class Entry(BaseModel):
    """What was done."""

    number: int
    hash: str
    kind: Literal["add", "undo", "redo"]
    edit: str
    time: str
    author: str
    reason: str


class Journal(BaseModel):
    """All that was done, in order; at most `PAGE` entries, the latest."""

    object: Literal["list"]
    data: list[Entry]
    head: str


class Preview(Checks):
    """An edit as it was tried on."""

    replaces: list[str] = Field(description="Active edits of the same prompt, which it would replace.")
    milliseconds: float = Field(description="Making the edit, without its gate.")


class MadeEdit(BaseModel):
    """An edit that was made and is active."""

    record: EditRecord
    replaces: list[str]
    milliseconds: float
    passed: bool


# Completions

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""OpenAI's fields that change no answer here."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "moderation": (),
}
"""OpenAI's fields that are not supported, with the values that ask for nothing; null always does."""


class StreamOptions(_Form):
    """What a stream also says."""

    include_usage: bool | None = Field(default=None, description="A last chunk with the counts of tokens.")
    include_obfuscation: bool | None = Field(default=None, description="Taken and ignored.")


class _Sampling(_Form):
    """How to answer. The default is greedy: the answers that an edit's gate looks at."""

    model: str | None = Field(default=None, max_length=256, description="As in /v1/models; may be left out.")
    max_tokens: int | None = Field(default=None, ge=1, le=10**9)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default: the likeliest token each time.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    edits: EditIds | None = None

    @model_validator(mode="before")
    @classmethod
    def _openai(cls, given: Any) -> Any:
        """Leave out what changes nothing, and refuse what cannot be done."""
        if not isinstance(given, dict):
            return given
        for name, values in NEUTRAL.items():
            value = given.get(name)
            if value is not None and not any(_same(value, one) for one in values):
                raise ValueError(f"'{name}' is not supported by this service; leave it out")
        return {name: value for name, value in given.items() if name not in IGNORED and name not in NEUTRAL}

    @model_validator(mode="after")
    def _options(self) -> _Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' goes with 'stream': true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream counts its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


class CompletionBody(_Sampling):
    """A text, or several, to be continued."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]

    @model_validator(mode="before")
    @classmethod
    def _text(cls, given: Any) -> Any:
        prompt = given.get("prompt") if isinstance(given, dict) else None
        if isinstance(prompt, list) and any(isinstance(one, int | list) for one in prompt):
            raise ValueError("'prompt' holds token ids, which this service does not take; give text")
        return given

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(_Form):
    """A part of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=LONGEST)]


class Message(_Form):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=LONGEST)] | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: str | None = Field(default=None, max_length=256, description="Taken and ignored.")
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def turn(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(_Sampling):
    """A chat to be continued."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=10**9, description="The same as max_tokens.")

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("'max_tokens' and 'max_completion_tokens' are the same; give one of them")
        return self

    @property
    def longest(self) -> int | None:
        """The most tokens of the answer."""
        return self.max_tokens or self.max_completion_tokens


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class TextChoice(_Choice):
    """One answer."""

    text: str


class AssistantMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    """One answer."""

    message: AssistantMessage


class Completion(BaseModel):
    """Answers to texts. Streamed: server-sent events of the same form, each with a piece of the text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ChatCompletion(BaseModel):
    """The answer in a chat. Streamed: server-sent events whose choices have a `delta` instead of a `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the service works."""

    status: Literal["ok"]


# Errors


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None
    checks: list[Checks] | None = Field(default=None, description="What the gate saw of the edit that it refused.")


class ErrorBody(BaseModel):
    """Every error has this form."""

    error: ErrorDetail


FIELDS = frozenset(
    field
    for form in (EditRequest, Unrelated, CompletionBody, ChatBody, StreamOptions, Message, TextPart)
    for field in form.model_fields
)
"""The names of all fields that a client may send."""
