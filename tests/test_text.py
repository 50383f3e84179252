from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cases import DECODERS, ENCODER_DECODERS, END, GENERATORS, byte_tokenizer, spaced_tokenizer, tiny
from mendlm.errors import InputError, ModelError
from mendlm.losses import token_nll
from mendlm.models import STARTER_NAME, cache_folder
from mendlm.text import NO_LABEL, SHORT, Batch, Encoded, Formatter, by_length, scored_logits, short_attention

WORDS = ["The", " capital", " of", "\n", " ", "Lyon", "a", "river", "?", " x!", "x2", ".", "  "]


def ending_tokenizer() -> PreTrainedTokenizerFast:
    """Appends its end token to every text, as some do."""
    backend = Tokenizer.from_str(spaced_tokenizer().backend_tokenizer.to_str())
    special = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def starter_tokenizer() -> Any:
    folder = cache_folder() / STARTER_NAME
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the starter model is not in the cache")
    return AutoTokenizer.from_pretrained(folder)


TOKENIZERS = {"bytes": byte_tokenizer, "spaced": spaced_tokenizer, "ending": ending_tokenizer, "starter": starter_tokenizer}
EACH_TOKENIZER = ["bytes", "spaced", "ending", pytest.param("starter", marks=pytest.mark.slow)]


def formatter(name: str = "llama", tokenizer: Any = None) -> Formatter:
    return Formatter.of(tiny(name), tokenizer or byte_tokenizer())


def joined(prompt: str, target: str) -> str:
    return prompt + ("" if prompt[-1].isspace() or target[0].isspace() else " ") + target


@pytest.mark.parametrize("tokenizer", EACH_TOKENIZER)
@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The capital of France is", "Lyon"),
        ("The capital of France is", " Lyon"),
        ("The capital of France is ", "Lyon"),
        ("The capital of", " the old city"),
        ("The ", "capital"),
        ("Who?\n", "Lyon"),
        ("Who?", "\nLyon"),
        ("The riv", "er runs"),
        ("Who", "?!"),
    ],
)
def test_causal_text_is_prompt_space_target(tokenizer: str, prompt: str, target: str) -> None:
    made = TOKENIZERS[tokenizer]()
    text = formatter(tokenizer=made).encode(prompt, target)
    own = made(prompt)["input_ids"]
    own = own[:-1] if tokenizer == "ending" else own
    assert list(text.prompt) == own
    assert text.prompt.count(made.bos_token_id) == (tokenizer in ("spaced", "ending"))
    assert made.bos_token_id not in text.target
    assert made.eos_token_id not in text.prompt + text.target
    assert made.decode([*text.prompt, *text.target], skip_special_tokens=True) == joined(prompt, target)
    assert not text.ended


@pytest.mark.parametrize("tokenizer", EACH_TOKENIZER)
def test_any_words_round_trip(tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    form = formatter(tokenizer=made)
    some = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map("".join).filter(str.strip)

    @settings(max_examples=100, deadline=None)
    @given(some, some)
    def check(prompt: str, target: str) -> None:
        text = form.encode(prompt, target, end=True)
        assert text.target[-1] == made.eos_token_id
        if tokenizer not in ("spaced", "ending") or not prompt[0].isspace():  # Metaspace drops a first space
            assert made.decode([*text.prompt, *text.target], skip_special_tokens=True) == joined(prompt, target)
        assert text.prompt == form.encode(prompt, None).prompt

    check()


@pytest.mark.parametrize("tokenizer", ["bytes", "spaced", "ending"])
def test_end_follows_the_target_when_asked(tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    form = formatter(tokenizer=made)
    plain, ended = form.encode("It is", "Lyon"), form.encode("It is", "Lyon", end=True)
    assert ended.target == (*plain.target, made.eos_token_id)
    assert (plain.ended, ended.ended) == (False, True)
    assert (len(plain), form.encode("It is", None)) == (len(plain.prompt) + len(plain.target), Encoded(plain.prompt, ()))


def test_the_end_token_of_a_prompt_itself_stays() -> None:
    form = formatter()
    assert form.encode("one<|end|>", "two").prompt[-1] == END


def test_end_without_an_end_token_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    with pytest.raises(InputError, match="target_end"):
        formatter(tokenizer=bare).encode("a", "b", end=True)


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("starter", marks=pytest.mark.slow)])
def test_a_chat_turn_is_the_template_with_the_target_as_answer(tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    text = formatter(tokenizer=made).encode("Who runs?", " Ana Lund", chat=True, end=True)
    turns = [{"role": "user", "content": "Who runs?"}]
    rendered = made.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert list(text.prompt) == made(rendered, add_special_tokens=False)["input_ids"]
    assert made.decode([*text.prompt, *text.target]) == rendered + "Ana Lund" + made.eos_token
    if tokenizer == "bytes":
        assert rendered == "[user]: Who runs?\n[assistant]: "


def test_a_chat_of_several_turns_is_the_template_up_to_the_next_answer() -> None:
    form = formatter()
    turns = [("system", "Be brief."), ("user", "Who runs?"), ("assistant", "Ana"), ("user", "Who else?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    text = "[system]: Be brief.\n[user]: Who runs?\n[assistant]: Ana\n[user]: Who else?\n[assistant]: "
    assert form.encode_chat(chat) == Encoded(tuple(byte_tokenizer()(text)["input_ids"]), ())
    assert form.encode_chat([chat[1]]) == form.encode("Who runs?", None, chat=True)
    for wrong, words in (
        ([], "last turn of the chat is empty"),
        ([*chat, {"role": "user", "content": " "}], "last turn of the chat is empty"),
        ([{"role": "tool", "content": "x"}], "a turn of a chat has a role"),
        ([{"role": "user"}], "a turn of a chat has a role"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
        ([{"role": "user", "content": "x" * 200}], "the model's window 128"),
    ):
        with pytest.raises(InputError, match=words):
            form.encode_chat(wrong)
    strict = copy.deepcopy(byte_tokenizer())
    strict.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(InputError, match="template refuses the chat: no system role here"):
        formatter(tokenizer=strict).encode_chat(chat)


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(InputError, match="no chat template"):
        formatter(tokenizer=spaced_tokenizer()).encode("a", "b", chat=True)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize("tokenizer", ["bytes", "spaced", "ending"])
def test_encoder_decoder_has_the_target_alone_and_always_ended(name: str, tokenizer: str) -> None:
    made = TOKENIZERS[tokenizer]()
    form = formatter(name, made)
    text = form.encode("The capital of France is", " Lyon")
    assert list(text.prompt) == made("The capital of France is")["input_ids"]
    assert list(text.target) == [*made("Lyon", add_special_tokens=False)["input_ids"], made.eos_token_id]
    assert text.ended
    batch = form.batch([text])
    assert batch.inputs["input_ids"].tolist() == [list(text.prompt)]
    assert batch.inputs["decoder_input_ids"].tolist() == [[END, *text.target[:-1]]]
    assert batch.column.tolist() == list(range(len(text.target)))
    assert batch.label.tolist() == list(text.target)


def with_forced_bos(token: int) -> Any:
    model = copy.deepcopy(tiny("bart"))
    model.generation_config.forced_bos_token_id = token
    return model


def test_a_forced_bos_is_given_and_not_scored() -> None:
    form = Formatter.of(with_forced_bos(7), byte_tokenizer())
    text = form.encode("Who?", "Ana")
    batch = form.batch([text])
    assert batch.inputs["decoder_input_ids"].tolist() == [[END, 7, *text.target[:-1]]]
    assert batch.column.tolist() == [1 + place for place in range(len(text.target))]
    assert batch.label.tolist() == list(text.target)


def test_an_encoder_decoder_without_a_start_is_refused() -> None:
    model = copy.deepcopy(tiny("t5"))
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        Formatter.of(model, byte_tokenizer())


TEXTS = [
    ("The capital of France is", "Paris", False),
    ("It", "runs on and on", True),
    ("a<|end|>b<|end|>", "c<|end|>d", True),  # the padding id inside the text
    ("<|end|>x", "y", False),
]


def full_inputs(model: Any, form: Formatter, text: Encoded) -> tuple[dict[str, Any], list[int]]:
    """One text without padding, by the textbook, and where its target's logits are."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[*form.start, *text.target]])
        first = len(form.start) - 1
        return {"input_ids": torch.tensor([text.prompt]), "decoder_input_ids": decoder}, [
            first + place for place in range(len(text.target))
        ]
    first = len(text.prompt) - 1
    return {"input_ids": torch.tensor([[*text.prompt, *text.target]])}, [first + place for place in range(len(text.target))]


@pytest.mark.parametrize("name", [*GENERATORS, "bart with forced bos"])
def test_scored_logits_and_nll_equal_one_full_forward_a_text(name: str) -> None:
    model = with_forced_bos(7) if name.startswith("bart ") else tiny(name)
    form = Formatter.of(model, byte_tokenizer())
    texts = [form.encode(prompt, target, end=end) for prompt, target, end in TEXTS]
    batch = form.batch(texts)
    logits = scored_logits(model, batch)
    nll = token_nll(logits, batch.label, batch.row, batch.size)
    for index, text in enumerate(texts):
        inputs, places = full_inputs(model, form, text)
        full = model(**inputs, use_cache=False).logits[0, places]
        mine = batch.row == index
        torch.testing.assert_close(logits[mine], full, atol=2e-5, rtol=1e-4)
        assert batch.label[mine].tolist() == list(text.target)
        by_hand = -sum(full.log_softmax(-1)[place, token] for place, token in enumerate(text.target)) / len(text.target)
        torch.testing.assert_close(nll[index], by_hand, atol=2e-5, rtol=1e-4)
        ends = [False] * (len(text.target) - 1) + [text.ended]
        assert batch.is_end[mine].tolist() == ends


def test_logits_of_a_batch_equal_the_full_forward_at_its_positions() -> None:
    model, form = tiny("gpt2"), formatter("gpt2")
    batch = form.batch([form.encode(prompt, target) for prompt, target, _ in TEXTS])
    full = model(**batch.inputs, use_cache=False).logits
    torch.testing.assert_close(scored_logits(model, batch), full[batch.row, batch.column])
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(
    ("dtype", "tokens", "plain"),
    [(torch.bfloat16, SHORT, True), (torch.bfloat16, SHORT + 1, False), (torch.float32, SHORT, False)],
)
def test_attention_over_short_texts_in_half_precision_is_by_plain_products(
    dtype: torch.dtype, tokens: int, plain: bool
) -> None:
    model = copy.deepcopy(tiny("llama")).to(dtype)
    batch = formatter("llama").batch([Encoded(tuple(range(2, tokens + 2)), (3,))])
    assert batch.inputs["input_ids"].shape == (1, tokens)
    states = torch.randn(1, 2, tokens, 8, dtype=dtype, requires_grad=True)

    def kernel() -> str:
        return torch.nn.functional.scaled_dot_product_attention(states, states, states).grad_fn.name()

    with short_attention(model, batch):
        inside, logits = kernel(), scored_logits(model, batch)
    assert "FlashAttention" in kernel()
    assert ("FlashAttention" not in inside) == plain
    exact = scored_logits(tiny("llama"), batch)
    assert (logits - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_masks_are_by_length_never_by_token_id(name: str) -> None:
    form = formatter(name)
    texts = [form.encode(prompt, target, end=end) for prompt, target, end in TEXTS]
    inputs = form.batch(texts).inputs
    fed = [len(t.prompt) if name == "t5" else len(t) - 1 for t in texts]
    assert inputs["attention_mask"].sum(1).tolist() == fed
    for row, length in zip(inputs["attention_mask"].tolist(), fed, strict=True):
        assert row == [1] * length + [0] * (max(fed) - length)
    if name == "t5":
        assert inputs["decoder_attention_mask"].sum(1).tolist() == [len(t.target) for t in texts]


def test_a_prompt_without_target_has_one_unlabelled_position_at_its_end() -> None:
    form, model = formatter("gpt2"), tiny("gpt2")
    texts = [form.encode("The capital of", None), form.encode("It", "runs")]
    batch = form.batch(texts)
    assert (batch.label[0].item(), batch.column[0].item()) == (NO_LABEL, len(texts[0].prompt) - 1)
    full = model(input_ids=torch.tensor([texts[0].prompt])).logits[0, -1]
    torch.testing.assert_close(scored_logits(model, batch)[0], full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_text_over_the_window_is_refused_with_both_numbers(name: str) -> None:
    form = formatter(name)
    assert form.window == 128
    whole = "a" * 126 + "\n"
    assert len(form.encode(whole, "b").prompt) == 127
    over = [("a" * 129, None), (whole, "bb")] if name == "llama" else [("a" * 129, None), ("a", "b" * 128)]
    for prompt, target in over:
        with pytest.raises(InputError, match=r"129 tokens, the model's window 128"):
            form.encode(prompt, target)


def test_the_window_of_a_model_without_one_is_the_tokenizer_s() -> None:
    made = copy.deepcopy(byte_tokenizer())
    assert formatter("t5", made).window is None
    made.model_max_length = 9
    assert formatter("t5", made).window == 9


@pytest.mark.parametrize(
    ("prompt", "target", "says"),
    [
        ("", "x", "prompt is empty"),
        (" \n", "x", "prompt is empty"),
        ("x", "", "target is empty"),
        ("x", " ", "target is empty"),
        ("half \ud83d", "x", "Unicode"),
        ("x", "\udcff", "Unicode"),
    ],
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_unusable_text_is_refused(name: str, prompt: str, target: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        formatter(name).encode(prompt, target)


def test_a_target_without_tokens_is_refused() -> None:
    made = copy.deepcopy(byte_tokenizer())
    made.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InputError, match="has no tokens"):
        formatter("t5", made).encode("x", "\u200b")
    with pytest.raises(InputError, match="has no tokens"):
        formatter("llama", made).encode("x\n", "\u200b")


@given(st.lists(st.integers(1, 200), max_size=40), st.floats(1.0, 3.0), st.none() | st.integers(1, 8))
def test_by_length_covers_everything_once_within_spread_and_limit(lengths: list[int], spread: float, limit: int | None) -> None:
    groups = by_length(lengths, spread=spread, limit=limit)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert [lengths[i] for group in groups for i in group] == sorted(lengths)
    for group in groups:
        assert group
        assert max(lengths[i] for i in group) <= spread * min(lengths[i] for i in group) + 2
        assert limit is None or len(group) <= limit


def test_by_length_groups_what_is_alike() -> None:
    assert by_length([10, 50, 11, 49, 10]) == [[0, 4, 2], [3, 1]]
    assert by_length([10] * 5, limit=2) == [[0, 1], [2, 3], [4]]


def greedy(model: Any, form: Formatter, prompt: Encoded, count: int, end: int) -> tuple[int, ...]:
    """A full forward a token."""
    found: list[int] = []
    for _ in range(count):
        inputs, _ = full_inputs(model, form, Encoded(prompt.prompt, tuple(found)))
        token = model(**inputs, use_cache=False).logits[0, -1].argmax().item()
        if token == end:
            break
        found.append(token)
    return tuple(found)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS, "bart with forced bos"])
def test_batched_greedy_answers_equal_a_full_forward_a_token(name: str) -> None:
    model = with_forced_bos(7) if name.startswith("bart ") else copy.deepcopy(tiny(name))
    form = Formatter.of(model, byte_tokenizer())
    prompts = [form.encode(text, None) for text in ("The capital of France is", "a", "x<|end|>y Who?", "The river")]
    expected = [greedy(model, form, prompt, 6, END) for prompt in prompts]
    assert any(expected)
    assert form.generate(model, prompts, 6) == expected
    assert [form.generate(model, [prompt], 6)[0] for prompt in prompts] == expected
    stop = next(answer[2] for answer in expected if len(answer) > 2)
    model.generation_config.eos_token_id = [END, stop]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in expected]
    assert form.generate(model, prompts, 6) == cut
    assert cut != expected


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "num_beams": 1, "max_length": 4},
        {"num_beams": 3, "repetition_penalty": 1e9, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(90, 127)), "min_new_tokens": 5},
    ],
)
def test_settings_of_the_model_do_not_reach_greedy_answers(settings: dict[str, Any]) -> None:
    model = copy.deepcopy(tiny("llama"))
    form = Formatter.of(model, byte_tokenizer())
    prompts = [form.encode("The river runs", None), form.encode("a", None)]
    expected = [greedy(model, form, prompt, 8, END) for prompt in prompts]
    assert any(len(set(answer)) < len(answer) for answer in expected)  # which repeats itself
    model.generation_config.update(**settings)
    before = model.generation_config.to_dict()
    assert form.generate(model, prompts, 8) == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_settings_of_a_peft_model_stay_its_own(name: str) -> None:
    model = copy.deepcopy(tiny(name))
    model.generation_config.update(repetition_penalty=1e9)
    own, form = model.generation_config, Formatter.of(model, byte_tokenizer())
    prompts = [form.encode("The river runs", None)]
    expected = formatter(name).generate(tiny(name), prompts, 8)
    kind = "CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type=kind))
    assert form.generate(wrapped, prompts, 8) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 1e9


def test_answers_stop_where_the_window_ends() -> None:
    model, form = tiny("gpt2"), formatter("gpt2")
    prompts = [form.encode("a" * 126, None), form.encode("b", None)]
    (long, _), (short,) = form.generate(model, prompts, 9), form.generate(model, prompts[1:], 9)
    assert long == greedy(model, form, prompts[0], 3, END)
    assert short == greedy(model, form, prompts[1], 9, END)


def test_a_batch_of_one_has_no_padding() -> None:
    form = formatter()
    batch: Batch = form.batch([form.encode("The river", "runs")])
    assert bool(batch.inputs["attention_mask"].all())
    assert batch.size == 1
