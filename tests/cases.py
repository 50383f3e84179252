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

_IDS = {"vocab_size": VOCAB, "bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
_ROPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "head_dim": 8}
_ROPE |= {"num_key_value_heads": 1, "max_position_embeddings": 128, **_IDS}
_GPT = {"n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_positions": 128, "n_inner": 24, **_IDS}


def _build(name: str) -> transformers.PreTrainedModel:
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
            kinds = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
            config = transformers.Gemma3TextConfig(sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8, **_ROPE)
            return transformers.Gemma3ForCausalLM(config)
        case "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
            options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
            options |= {"decoder_start_token_id": END}
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **options, **_IDS))
        case "bart":
            sizes = {"d_model": 16, "max_position_embeddings": 128, "decoder_start_token_id": END, "forced_eos_token_id": END}
            for side in ("encoder", "decoder"):
                sizes |= {f"{side}_layers": 3, f"{side}_ffn_dim": 24, f"{side}_attention_heads": 2}
            return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **_IDS))
        case "bert":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
            config = transformers.BertConfig(num_labels=1, max_position_embeddings=128, **sizes, **_IDS)
            return transformers.BertForSequenceClassification(config)
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
    """A batch of edit requests: random inputs, with the last two positions of each row scored for random targets."""
    rng = rng or generator()
    given = inputs(model, batch, tokens, rng)
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
