import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

import oracles
from cases import DECODERS, END, byte_tokenizer, generator, spaced_tokenizer, tiny
from mendlm.errors import InputError, LayerError, ModelError
from mendlm.layers import default_layers
from mendlm.serve import decoding
from mendlm.serve.decoding import BASE, Row, _Answer, decode, require_decoder, sample
from mendlm.text import Encoded, Formatter

MODELS = (*DECODERS, "gemma", "gemma2", "gemma3 vision", "gpt_neox", "mistral", "phi", "phi3", "smollm3")
PROMPTS = ("The capital of France is", "a", "Who is the author? " * 3, "The river runs", "x", "of the city")
LIMITS = (9, 3, 7, 1, 12, 5)


def form(name="llama"):
    return Formatter.of(tiny(name), byte_tokenizer())


def some_edits(name, count=2):
    """Edits with different numbers of rows and, but for the first, different layers."""
    specs = default_layers(tiny(name))
    return [
        oracles.random_edit(specs if i == 0 else specs[i % len(specs) :], generator(i + 1), rows=1 + i, size=1.5)
        for i in range(count)
    ]


def run(model, formatter, rows, edits=(), **options):
    """What each row has said in the end: text, reason, tokens."""
    texts, ends = [""] * len(rows), {}
    for step in decode(model, formatter, rows, edits, **options):
        for one in step:
            texts[one.row] += one.text
            assert one.row not in ends
            if one.reason:
                ends[one.row] = (one.reason, one.tokens)
    return [(text, *ends.get(i, (None, None))) for i, text in enumerate(texts)]


def alone(model, formatter, row, edits):
    """The oracle: one row by transformers' own generation, under its edit alone."""
    prompt = [Encoded(row.prompt, ())]
    if row.edit == BASE:
        (tokens,) = formatter.generate(model, prompt, row.max_tokens)
    else:
        with edits[row.edit].on(model):
            (tokens,) = formatter.generate(model, prompt, row.max_tokens)
    limit = min(row.max_tokens, formatter.window - len(row.prompt) + 1)
    return formatter.decode(tokens), "length" if len(tokens) == limit else "stop", len(tokens)


def asked(formatter, edits, prompts=PROMPTS, limits=LIMITS):
    ids = [formatter.encode(prompt, None).prompt for prompt in prompts]
    which = [BASE, *range(len(edits))]
    return [
        Row(prompt=prompt, max_tokens=limit, edit=which[i % len(which)])
        for i, (prompt, limit) in enumerate(zip(ids, limits, strict=True))
    ]


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_answers_as_alone_under_its_own_edit(name, count):
    model, formatter, edits = tiny(name), form(name), some_edits(name, count)
    rows = asked(formatter, edits)
    before = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits
    expected = [alone(model, formatter, row, edits) for row in rows]
    assert expected != [alone(model, formatter, replace(row, edit=BASE), edits) for row in rows]
    assert run(model, formatter, rows, edits) == expected
    assert torch.equal(model(torch.tensor([[5, 6, 7]]), use_cache=False).logits, before)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_step_equal_a_full_forward(name, monkeypatch):
    model, formatter, edits = tiny(name), form(name), some_edits(name)
    rows, seen = asked(formatter, edits), []
    choose = decoding._choose

    def watch(logits, answers):
        tokens = choose(logits, answers)
        seen.extend((a, len(a.tokens), one) for a, one in zip(answers, logits, strict=True))
        return tokens

    monkeypatch.setattr(decoding, "_choose", watch)
    run(model, formatter, rows, edits)
    assert len(seen) > len(rows)
    for answer, count, logits in seen:
        ids = torch.tensor([[*answer.row.prompt, *answer.tokens[:count]]])
        edit = None if answer.row.edit == BASE else edits[answer.row.edit]
        if edit is None:
            wanted = model(ids, use_cache=False).logits[0, -1]
        else:
            with edit.on(model):
                wanted = model(ids, use_cache=False).logits[0, -1]
        assert_close(logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", [[BASE, BASE], [0, 0], [0, BASE]])
def test_rows_of_one_set_of_edits(which):
    model, formatter, edits = tiny("llama"), form(), some_edits("llama", 1)
    rows = [replace(row, edit=one) for row, one in zip(asked(formatter, edits)[:2], which, strict=True)]
    assert run(model, formatter, rows, edits) == [alone(model, formatter, row, edits) for row in rows]


def test_an_end_of_sequence_token_ends_a_row_and_counts_for_nothing():
    model = copy.deepcopy(tiny("llama"))
    formatter = Formatter.of(model, byte_tokenizer())
    rows = asked(formatter, [])
    model.generation_config.eos_token_id = [END, formatter.generate(model, [Encoded(rows[0].prompt, ())], 3)[0][2]]
    expected = [alone(model, formatter, row, []) for row in rows]
    assert expected[0][1:] == ("stop", 2)
    assert any(reason == "length" for _, reason, _ in expected)
    assert run(model, formatter, rows) == expected


def test_answers_end_with_the_window_of_each_row_whatever_the_others_are():
    # gpt_neo cannot be run over more columns than its window, so padding must leave with the row that needed it.
    for name in ("gpt2", "gpt_neo", "opt"):
        model, formatter, edits = tiny(name), form(name), some_edits(name)
        rows = [Row(prompt=(7,) * 120, max_tokens=50, edit=0), Row(prompt=(9, 8), max_tokens=126, edit=1)]
        model = copy.deepcopy(model)
        model.generation_config.eos_token_id = 299  # so that only the window ends them
        expected = [alone(model, formatter, row, edits) for row in rows]
        assert expected[0][2] == 9
        assert run(model, formatter, rows, edits) == expected


def test_a_row_that_is_gone_leaves_and_the_others_go_on():
    model, formatter, edits = tiny("llama"), form(), some_edits("llama")
    rows = [replace(row, max_tokens=8) for row in asked(formatter, edits)[:3]]
    gone, said = set(), []
    for step in decode(model, formatter, rows, edits, gone=gone):
        said.append([one.row for one in step])
        gone.add(1)
    assert all(1 not in some for some in said[1:])
    whole = run(model, formatter, rows, edits)
    assert run(model, formatter, rows, edits, gone={1})[::2] == whole[::2]
    assert run(model, formatter, rows, edits, gone={0, 1, 2}) != whole


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_as_it_was_between_steps_and_after_an_early_end():
    model, formatter, edits = tiny("llama"), form(), some_edits("llama")
    rows, before = asked(formatter, edits), hooks(tiny("llama"))
    running = decode(model, formatter, rows, edits)
    next(running)
    assert hooks(model) == before
    running.close()
    assert hooks(model) == before
    with pytest.raises(LayerError, match="another model"):
        run(model, formatter, rows, [edits[0], *some_edits("gpt2", 1)])
    assert hooks(model) == before


def test_what_cannot_be_decoded_is_refused():
    formatter = form()
    row = Row(prompt=(5,), max_tokens=2)
    for name, word in (("t5", "encoder-decoder"), ("bert", "classifier")):
        with pytest.raises(InputError, match=f"only decoders are served, and this model is a {word}"):
            require_decoder(form(name))
        with pytest.raises(InputError, match="only decoders"):
            run(tiny(name), form(name), [row])
    with pytest.raises(InputError, match="129 tokens, the model's window 128"):
        run(tiny("llama"), formatter, [replace(row, prompt=(5,) * 129)])
    with pytest.raises(InputError, match="names edit 1"):
        run(tiny("llama"), formatter, [replace(row, edit=1)], some_edits("llama", 1))
    for name, value in (
        ("prompt", ()),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", tuple("abcde")),
    ):
        with pytest.raises(InputError, match=name):
            replace(row, **{name: value})


def test_a_model_without_a_cache_of_rows_is_refused(monkeypatch):
    model = copy.deepcopy(tiny("llama"))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: forward(**{**given, "use_cache": False}))
    with pytest.raises(ModelError, match="no DynamicCache"):
        run(model, form(), [Row(prompt=(5,), max_tokens=2)])


# Text


def byte_fallback():
    """As Llama 2's: characters without a token are written as tokens of one byte."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefg", "▁a", "ab", "▁the"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def said(tokenizer, tokens, stop=()):
    """The pieces that a stream of tokens gives, and how many tokens were taken."""
    formatter = Formatter(tokenizer, "causal", torch.device("cpu"), None)
    answer = _Answer(formatter, Row(prompt=(1,), max_tokens=len(tokens), stop=tuple(stop)), {-1})
    pieces = []
    for count, token in enumerate(tokens, 1):
        one = answer.add(0, token)
        pieces.append(one.text)
        if one.reason:
            assert one.reason == "stop" or count == len(tokens)
            break
    return pieces, count


def cut(text, stop):
    return text[: min((text.find(one) for one in stop if one in text), default=len(text))]


TEXTS = st.text(st.sampled_from("ab c\né€𝄞") | st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(
    st.lists(st.integers(0, 299), min_size=1, max_size=24), st.lists(st.text("ab é\ufffd", min_size=1, max_size=3), max_size=4)
)
@pytest.mark.parametrize("tokenizer", [byte_tokenizer, spaced_tokenizer])
def test_pieces_of_any_tokens_join_to_their_text(tokenizer, tokens, stop):
    tokens = [token % len(tokenizer()) for token in tokens]
    pieces, count = said(tokenizer(), tokens, stop)
    whole = tokenizer().decode(tokens[:count], skip_special_tokens=True)
    assert "".join(pieces) == cut(whole, stop)
    if count < len(tokens):
        assert any(one in whole for one in stop)


@given(TEXTS, st.lists(st.text("ab €𝄞", min_size=1, max_size=3), max_size=4))
@pytest.mark.parametrize("tokenizer", [byte_tokenizer, byte_fallback])
def test_pieces_of_a_text_are_its_characters_and_never_a_part_of_one(tokenizer, text, stop):
    tokenizer = tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, count = said(tokenizer, tokens, stop)
    assert "".join(pieces) == cut(tokenizer.decode(tokens[:count], skip_special_tokens=True), stop)
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_text_is_sent_as_soon_as_it_is_certain():
    tokenizer = byte_tokenizer()

    def pieces(text, stop=()):
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        letters = "".join(word for word, _ in split)  # one a byte
        return said(tokenizer, tokenizer.convert_tokens_to_ids(list(letters)), stop)[0]

    assert pieces("xyz") == ["x", "y", "z"]
    assert pieces("x€y") == ["x", "", "", "€", "y"]
    assert pieces("xabxab", ["abc"]) == ["x", "", "", "abx", "", "ab"]
    assert pieces("xabab!z", ["ab!"]) == ["x", "", "", "ab", "", ""]
    assert pieces("aab", ["aab", "b"]) == ["", "", ""]
    assert pieces("€", ["€"]) == ["", "", ""]


# Sampling


def nucleus(logits, temperature, top_p):
    """The oracle: token by token in plain Python."""
    weights = [math.exp(value / temperature) for value in logits]
    chance = sorted(((w / sum(weights), i) for i, w in enumerate(weights)), key=lambda pair: -pair[0])
    kept, mass = {}, 0.0
    for p, token in chance:
        if mass >= top_p:
            break
        kept[token] = p
        mass += p
    return {token: p / mass for token, p in kept.items()}


@given(
    st.lists(st.floats(-6, 6), min_size=1, max_size=12, unique_by=lambda v: round(v, 2)),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0.05, 0.5, 0.93, 1.0]),
)
def test_sampling_gives_each_token_of_the_nucleus_its_share(logits, temperature, top_p):
    wanted = nucleus(logits, temperature, top_p)
    assume(set(wanted) == set(nucleus(logits, temperature, top_p - 1e-5)) == set(nucleus(logits, temperature, top_p + 1e-5)))
    grid = (torch.arange(4000) + 0.5) / 4000  # the uniform numbers, one after the other
    rows = len(grid)
    drawn = sample(torch.tensor(logits).expand(rows, -1), torch.full((rows,), temperature), torch.full((rows,), top_p), grid)
    counts = Counter(drawn.tolist())
    assert all(abs(counts[t] / rows - wanted.get(t, 0.0)) <= 1.01 / rows + 1e-5 for t in range(len(logits)))


def test_sampling_at_the_ends():
    logits = torch.tensor([[0.0, -math.inf, 3.0], [1e4, 1e4 - 1, -1e4], [0.0, 5.0, 1.0]])
    one = torch.tensor([1.0, 1e-30, 1.0])
    top = torch.tensor([1.0, 1.0, 1e-9])
    rising = torch.tensor([[0.3 * i for i in range(9)] + [-math.inf] * 3])  # in float32 its probabilities sum to less than 1
    for number in (0.0, 1.0 - 2**-24, 1.0):
        assert sample(rising, one[:1], top[:1], torch.tensor([number])).item() < 9
        drawn = sample(logits, one, top, torch.full((3,), number)).tolist()
        assert drawn[0] in (0, 2)  # never a token of no probability
        assert drawn[1:] == [0, 1]


@pytest.mark.parametrize("extreme", [{"temperature": 5e-129}, {"temperature": 1.0, "top_p": 5e-129}])
def test_what_rounds_to_nothing_leaves_the_likeliest_token(extreme):
    model, formatter, edits = tiny("llama"), form(), some_edits("llama")
    row = asked(formatter, edits)[0]
    assert run(model, formatter, [replace(row, seed=1, **extreme)], edits)[0] == alone(model, formatter, row, edits)


def test_a_seed_gives_the_same_answer_in_any_company():
    model, formatter, edits = tiny("llama"), form(), some_edits("llama")
    rows = [replace(row, temperature=1.5, top_p=0.9, seed=i) for i, row in enumerate(asked(formatter, edits))]
    together = run(model, formatter, rows, edits)
    assert [run(model, formatter, [row], edits)[0] for row in rows] == together
    other = run(model, formatter, [replace(row, seed=row.seed + 99) for row in rows], edits)
    assert all(a != b for a, b in zip(together, other, strict=True) if a[2] > 3)
    fresh = [run(model, formatter, [replace(rows[0], seed=None)], edits)[0] for _ in range(4)]
    assert len(set(fresh)) > 1
    mixed = [rows[0], replace(rows[4], temperature=0.0), rows[2]]
    found = run(model, formatter, mixed, edits)
    assert found[0] == together[0]
    assert found[2] == together[2]
    assert found[1] == alone(model, formatter, mixed[1], edits)
