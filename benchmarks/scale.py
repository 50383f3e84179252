"""A training step and a single edit of large models with random weights: memory, time, and what 100,000 edits would take.

    python benchmarks/scale.py --shape 13b [--quantize nf4] [--rank 1920] [--batch 64]

Builds the architecture on the device itself, in bf16 or with the matrices of its blocks in NF4, and runs real steps of
`mendlm.training` and real edits on texts of the lengths of `mendlm.plan.Lengths`. What weights say does not change what
they cost. Beside each measurement stands what `mendlm.plan` computes. `--shape all` runs one after another; with `--plan`,
or where there is no CUDA device and the shape is not `SMALL`, only the plan is made, and marked as computed.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import nn

import bench
import mendlm
from mendlm import memory
from mendlm.layers import block_stacks, default_layers
from mendlm.methods.mend import Mend, MendConfig
from mendlm.models import fake_model
from mendlm.plan import Lengths, Plan, formatter_of, plans, step, texts
from mendlm.text import Formatter
from mendlm.training import Drawn, TrainConfig, draw

EDITS = 100_000


def llama(width: int, inner: int, blocks: int, heads: int, vocab: int = 32_000, **more: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads}
    return transformers.LlamaConfig(vocab_size=vocab, tie_word_embeddings=False, pad_token_id=0, **sizes, **more)


def t5(width: int, inner: int, blocks: int, heads: int, vocab: int = 32_128) -> transformers.PretrainedConfig:
    sizes = {"d_model": width, "d_ff": inner, "num_layers": blocks, "num_decoder_layers": blocks, "num_heads": heads}
    return transformers.T5Config(
        vocab_size=vocab, d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, **sizes,
    )  # fmt: skip


def neox(width: int, inner: int, blocks: int, heads: int, vocab: int = 50_432) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads}
    return transformers.GPTNeoXConfig(vocab_size=vocab, pad_token_id=0, **sizes)


SHAPES = {
    "toy": lambda: llama(64, 128, 6, 4, 512),
    "toy-t5": lambda: t5(64, 128, 4, 4, 512),
    "20m": lambda: llama(256, 688, 6, 4),
    "60m": lambda: llama(512, 1376, 8, 8),
    "100m": lambda: llama(768, 2048, 12, 12),
    "270m": lambda: llama(1024, 2816, 16, 16),
    "1b": lambda: llama(2048, 8192, 16, 32, 128_256, num_key_value_heads=8),  # Llama 3.2 1B
    "7b": lambda: llama(4096, 11_008, 32, 32),  # Llama 2 7B
    "t5-11b": lambda: t5(4096, 10_240, 24, 64),  # T5 1.1 XXL
    "13b": lambda: llama(5120, 13_824, 40, 40),  # Llama 2 13B
    "20b": lambda: neox(6144, 24_576, 44, 64),  # GPT-NeoX 20B
}
SMALL = ("toy", "toy-t5", "20m", "60m", "100m", "270m")
"""What a CPU measures in minutes."""
LARGE = ("7b", "t5-11b", "13b", "20b")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="toy")
    parser.add_argument("--quantize", choices=["nf4"])
    parser.add_argument("--plan", action="store_true", help="compute only")
    parser.add_argument("--rank", type=int, default=1920, help="the editor's; the paper has 1920")
    parser.add_argument("--batch", type=int, default=64, help="requests a step")
    parser.add_argument("--micro-batch", type=int, help="requests of a step in memory at a time; by default all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--edits", type=int, default=20, help="timed edits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=bench.Path, default=bench.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if arguments.shape == "all":  # each in a process of its own, so that one that does not fit costs no other
        for shape in LARGE:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--shape", shape], check=False)  # the last one holds
        return
    device, base = torch.device(arguments.device), arguments.quantize or "bf16"
    sizes = {"rank": arguments.rank, "batch_size": arguments.batch, "micro_batch_size": arguments.micro_batch}
    planned = plans(fake_model(SHAPES[arguments.shape]()), **sizes)[base]
    result = {
        "shape": arguments.shape, "base": base, "rank": arguments.rank, "batch": arguments.batch,
        "micro_batch": arguments.micro_batch, "lengths": asdict(Lengths()), "plan": planned.figures(),
    }  # fmt: skip
    if not arguments.plan and (device.type == "cuda" or arguments.shape in SMALL):
        result |= measure(arguments, device, planned)
    form = "-nf4" * bool(arguments.quantize) + (f"-by-{arguments.micro_batch}" if arguments.micro_batch else "")
    bench.save(arguments, f"scale-{arguments.shape}{form}", device, result)


def measure(arguments: Any, device: torch.device, planned: Plan) -> dict[str, Any]:
    """Real steps and edits of the shape."""
    start = rss_gb() if device.type == "cpu" else 0.0
    model = build(SHAPES[arguments.shape](), device, arguments.quantize)
    formatter = formatter_of(model)
    method = Mend(default_layers(model), MendConfig(rank=arguments.rank)).to(device)
    optimizer = torch.optim.Adam(method.parameters())
    drawn = texts(arguments.batch, Lengths(), formatter.family)
    config = TrainConfig(micro_batch_size=arguments.micro_batch)
    method.prepare(model, formatter.batch([drawn[0].edit]))
    gc.collect()
    memory.forget_peak(device)
    step(method, model, formatter, optimizer, drawn, config)
    steps = timed(arguments.steps, lambda: step(method, model, formatter, optimizer, drawn, config))
    peak = memory.peak_mb(device) * 2**20 / 1e9 - start
    optimizer.zero_grad()
    one = formatter.batch([drawn[0].edit])
    method.edit(model, one)
    memory.forget_peak(device)
    edits = timed(arguments.edits, lambda: method.edit(model, one))
    seconds = statistics.median(steps)
    return {
        "peak_gb": peak,
        "plan_over_peak": planned.total / 1e9 / peak,
        "edit_peak_gb": memory.peak_mb(device) * 2**20 / 1e9 - start,
        "seconds_per_step": {"median": seconds, "min": min(steps), "max": max(steps)},
        "edits_per_second": arguments.batch / seconds,
        f"hours_for_{EDITS}_edits": EDITS / arguments.batch * seconds / 3600,
        "tflop_per_second": planned.flops * arguments.batch / seconds / 1e12,
        "edit_ms": {"p50": 1000 * statistics.median(edits), "p95": 1000 * sorted(edits)[int(0.95 * (len(edits) - 1))]},
    }


def build(config: transformers.PretrainedConfig, device: torch.device, quantize: str | None) -> Any:
    """A frozen model of random bf16 weights, made on the device, block by block in NF4 if asked."""
    with torch.device("meta"):
        kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.bfloat16)
    inside = {name for stack in block_stacks(model) for name, _ in model.named_modules() if name.startswith(f"{stack}.")}
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()  # T5's wo: never quantised
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if quantize and name in inside and type(module) is nn.Linear and child not in kept:
            setattr(model.get_submodule(parent), child, nf4(module, device))
            continue
        module._parameters = {
            key: weight if weight is None else nn.Parameter(filled(weight, device), requires_grad=False)
            for key, weight in module._parameters.items()
        }
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.zeros_like(buffer, device=device)
    for module in model.modules():  # rotary tables are computed, not drawn
        if "inv_freq" in module._buffers:
            module.__init__(config)
            module.to(device)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def asked(arguments: argparse.Namespace, config: TrainConfig) -> tuple[Any, Formatter, list[Drawn]]:
    """What a script measures: of `--shape` a model of random weights and texts of `Lengths`, else a model and requests."""
    if arguments.shape:
        model = build(SHAPES[arguments.shape](), torch.device(arguments.device or "cpu"), None)
        formatter = formatter_of(model)
        return model, formatter, texts(arguments.batch, Lengths(), formatter.family)
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    formatter, rng = Formatter.of(model, tokenizer), random.Random(0)
    requests = bench.requests(arguments.data_dir, arguments.batch)
    return model, formatter, [draw(request, (), formatter, config, rng) for request in requests]


def filled(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Random values of a weight's shape: small for matrices, ones for the scales of norms."""
    made = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    return made.normal_(0, 0.02) if weight.dim() > 1 else made.fill_(1)


def nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    """A random layer in NF4."""
    import bitsandbytes

    has_bias, form = layer.bias is not None, {"quant_type": "nf4", "compress_statistics": False}  # as mendlm.load has it
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=has_bias, compute_dtype=torch.bfloat16, device="meta", **form
    )
    made.weight = bitsandbytes.nn.Params4bit(filled(layer.weight, device), requires_grad=False, **form)
    if has_bias:
        made.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.bfloat16), requires_grad=False)
    return made.to(device)


def timed(rounds: int, action: Any) -> list[float]:
    """Seconds of each call."""
    times = []
    for _ in range(rounds):
        bench.synchronise()
        begun = time.perf_counter()
        action()
        bench.synchronise()
        times.append(time.perf_counter() - begun)
    return times


def rss_gb() -> float:
    """What this process holds now."""
    (line,) = (line for line in bench.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / 1e9


if __name__ == "__main__":
    main()
