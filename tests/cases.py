"""Tiny random models, one for each family that mendlm treats differently, and tokenizers made in memory.

All models are frozen, in evaluation mode and float32. They are cached: a test that changes one works on a deep copy.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import string
from collections.abc import Iterator

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mendlm.text import Batch

VOCAB = 300
BLOCKS = 4
END = 0  # the id of end, of padding and of a decoder's start

DECODERS = ("gpt2", "gpt_neo", "gptj", "opt", "llama", "qwen3", "gemma3")
ENCODER_DECODERS = ("t5", "bart")
CLASSIFIERS = ("bert",)
GENERATORS = DECODERS + ENCODER_DECODERS
ALL = GENERATORS + CLASSIFIERS
"""What every test of a module runs on."""

MORE = ("mistral", "qwen2", "gemma", "gemma2", "gemma3 vision", "smollm3", "phi", "phi3", "gpt_neox")
MORE += ("t5 v1.0", "t5 v1.1", "mt5", "mbart")
MORE += ("bert two logits", "roberta", "roberta two logits", "distilbert", "distilbert two logits")
MORE += ("modernbert", "modernbert two logits")
EVERY = ALL + MORE
"""What `test_families.py` runs on: every architecture in the table of default layers."""

_IDS = {"vocab_size": VOCAB, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
_ROPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "head_dim": 8}
_ROPE |= {"num_key_value_heads": 1, "max_position_embeddings": 128, **_IDS}
_GPT = {"n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_positions": 128, "n_inner": 24, **_IDS}


_ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
_ENCODER |= {"max_position_embeddings": 128, **_IDS}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2, "dropout_rate": 0.0}
_T5 |= {"decoder_start_token_id": END, **_IDS}
_BART = {"d_model": 16, "max_position_embeddings": 128, "decoder_start_token_id": END, "forced_eos_token_id": END, **_IDS}
for _side in ("encoder", "decoder"):
    _BART |= {f"{_side}_layers": 3, f"{_side}_ffn_dim": 24, f"{_side}_attention_heads": 2}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2)}


def _build(name: str) -> transformers.PreTrainedModel:
    labels = {"num_labels": 2 if name.endswith(" two logits") else 1}
    name = name.removesuffix(" two logits")
    match name:
        case "gpt2":
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT))
        case "gpt_neo":
            kinds = [[["global", "local"], BLOCKS // 2]]
            sizes = {"hidden_size": 16, "num_layers": BLOCKS, "num_heads": 2, "intermediate_size": 24, "window_size": 6}
            config = transformers.GPTNeoConfig(attention_types=kinds, max_position_embeddings=128, **sizes, **_IDS)
            return transformers.GPTNeoForCausalLM(config)
        case "gptj":
            return transformers.GPTJForCausalLM(transformers.GPTJConfig(rotary_dim=4, tie_word_embeddings=False, **_GPT))
        case "opt":
            sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
            config = transformers.OPTConfig(max_position_embeddings=128, word_embed_proj_dim=16, **sizes, **_IDS)
            return transformers.OPTForCausalLM(config)
        case "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=False, **_ROPE))
        case "qwen3":
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(tie_word_embeddings=True, **_ROPE))
        case "gemma3":
            config = transformers.Gemma3TextConfig(query_pre_attn_scalar=8, **_SLIDING, **_ROPE)
            return transformers.Gemma3ForCausalLM(config)
        case "mistral":
            return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=6, **_ROPE))
        case "qwen2":
            sizes = {name: value for name, value in _ROPE.items() if name != "head_dim"}
            return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(tie_word_embeddings=False, **sizes))
        case "gemma":
            return transformers.GemmaForCausalLM(transformers.GemmaConfig(**_ROPE))
        case "gemma2":
            config = transformers.Gemma2Config(query_pre_attn_scalar=8, final_logit_softcapping=5.0, **_SLIDING, **_ROPE)
            return transformers.Gemma2ForCausalLM(config)
        case "gemma3 vision":
            text = {"query_pre_attn_scalar": 8, **_SLIDING, **_ROPE}
            vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
            return transformers.Gemma3ForConditionalGeneration(config)
        case "smollm3":
            return transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**_ROPE))
        case "phi":
            sizes = {name: value for name, value in _ROPE.items() if name != "head_dim"} | {"num_key_value_heads": 2}
            return transformers.PhiForCausalLM(transformers.PhiConfig(partial_rotary_factor=0.5, **sizes))
        case "phi3":
            sizes = {name: value for name, value in _ROPE.items() if name != "head_dim"}
            return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))
        case "gpt_neox":
            return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_ENCODER))
        case "t5" | "t5 v1.0" | "t5 v1.1" | "mt5":
            kind, tied = ("relu", True) if name == "t5 v1.0" else ("gated-gelu", False)
            options = {"feed_forward_proj": kind, "tie_word_embeddings": tied, **_T5}
            if name == "mt5":
                model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**options))
            else:
                model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options))
            if name in ("t5 v1.1", "mt5"):
                # Built from its configuration the head is tied whatever that says; read from a file it is not.
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            return model
        case "bart":
            return transformers.BartForConditionalGeneration(transformers.BartConfig(**_BART))
        case "mbart":
            return transformers.MBartForConditionalGeneration(transformers.MBartConfig(**_BART))
        case "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(**labels, **_ENCODER))
        case "roberta":
            return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**labels, **_ENCODER))
        case "distilbert":
            sizes = {"dim": 16, "hidden_dim": 24, "n_layers": BLOCKS, "n_heads": 2, "max_position_embeddings": 128}
            return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes, **labels, **_IDS))
        case "modernbert":
            options = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
            config = transformers.ModernBertConfig(**options, **labels, **_ENCODER)
            return transformers.ModernBertForSequenceClassification(config)
    raise KeyError(name)


@functools.cache
def tiny(name: str) -> transformers.PreTrainedModel:
    """The tiny model of that name, with weights large enough that its answers depend on every block."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = _build(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.25)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


def other() -> transformers.PreTrainedModel:
    """A decoder of a type that the table of default layers does not name."""
    sizes = {name: value for name, value in _ROPE.items() if name != "head_dim"}
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes))


def mixture() -> transformers.PreTrainedModel:
    """A mixture of experts, whose MLP matrices are 3-d parameters."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**_ROPE, "num_hidden_layers": 2}, num_local_experts=2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _padded(batch: int, tokens: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=rng)
    lengths = torch.randint(max(2, tokens // 2), tokens + 1, (batch,), generator=rng)
    lengths[-1] = tokens
    mask = torch.arange(tokens) < lengths[:, None]
    return torch.where(mask, ids, END), mask.long()


def inputs(
    model: transformers.PreTrainedModel, batch: int = 3, tokens: int = 7, rng: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Right-padded inputs of unequal lengths, shorter in a decoder than in its encoder; the last row is full."""
    rng = rng or generator()
    ids, mask = _padded(batch, tokens, rng)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    decoder_ids, decoder_mask = _padded(batch, max(2, tokens - 2), rng)
    decoder_ids[:, 0] = END
    decoder = {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    return {"input_ids": ids, "attention_mask": mask, **decoder}


def requests(model: transformers.PreTrainedModel, batch: int = 3, tokens: int = 7, rng: torch.Generator | None = None) -> Batch:
    """A batch of edit requests: random inputs, with the last two positions of each row scored for random targets.

    A classifier's rows have one random label each.
    """
    rng = rng or generator()
    given = inputs(model, batch, tokens, rng)
    if model.get_output_embeddings() is None:
        row, labels = torch.arange(batch), max(2, model.config.num_labels)
        label = torch.randint(labels, (batch,), generator=rng)
        return Batch(given, row, torch.zeros_like(row), label, torch.zeros(batch, dtype=torch.bool), batch)
    lengths = given.get("decoder_attention_mask", given["attention_mask"]).sum(1)
    row = torch.arange(batch).repeat_interleave(2)
    column = torch.stack([lengths - 2, lengths - 1], 1).flatten()
    label = torch.randint(3, VOCAB, (2 * batch,), generator=rng)
    return Batch(given, row, column, label, torch.zeros(2 * batch, dtype=torch.bool), batch)


_TEXTS = (
    "The capital of France is Paris.",
    "The river runs through the city of London, the old capital.",
    "Who is the author?",
)
_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]: {% endif %}"
)


@functools.cache
def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: end and padding are one id; with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": VOCAB, "initial_alphabet": alphabet, "special_tokens": ["<|end|>"], "show_progress": False}
    tokenizer.train_from_iterator(_TEXTS, trainers.BpeTrainer(**options))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = _TEMPLATE
    return fast


@functools.cache
def spaced_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """As SentencePiece's: a space belongs to the word after it, also at the start, and BOS comes first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    options = {"vocab_size": VOCAB, "initial_alphabet": list(string.printable), "show_progress": False}
    tokenizer.train_from_iterator(_TEXTS, trainers.BpeTrainer(special_tokens=special, **options))
    bos = [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=bos)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The system refuses to grow any file beyond `size` bytes, in the middle of a write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
