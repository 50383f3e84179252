"""Peak memory of training, over what it cannot do without, and over inference of the same texts beside the editor's state.

    python benchmarks/memory.py [--model starter | --shape 1b] [--batch 64] [--micro-batch 8]

What it cannot do without: base weights, the editor with its gradients and Adam state, and one batch's activations, which are
those of the blocks above the trunk: the growth of memory in a forward pass with a graph, of the edit batch alone. Each side
runs in a process of its own, and its peak is reset after loading, which itself needs more for a moment. With `--shape` the
model has random weights, texts are as in `scale.py`, and the oracle does not run: its dense weights are for small models.
Bar: 1.3 of inference with the editor's state.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

import bench
import oracle
import scale
from mendlm import memory
from mendlm.losses import token_nll
from mendlm.recording import record
from mendlm.replay import Trunk
from mendlm.text import by_length, scored_logits
from mendlm.training import TrainConfig, descend

CONFIG = TrainConfig(edit_weight=1.0, own_locality=1.0)
BATCH = 64


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batch", type=int, default=BATCH, help="requests a step")
    parser.add_argument("--micro-batch", type=int, help="requests of a step in memory at a time; by default all")
    parser.add_argument("--shape", choices=scale.SHAPES, help="a decoder of random weights instead of a model")
    sides = ["loaded", "activations", "inference", "step", "oracle"]
    parser.add_argument("--side", choices=sides, help="run one side and print its peak")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(side(arguments)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--side"]
    found = {}
    for name in sides[:-1] if arguments.shape else sides:
        output = subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    loaded, step = found["loaded"], found["step"]["peak_mb"]
    floor = found["activations"]["peak_mb"] + loaded["editor_state_mb"]
    inference = found["inference"]["peak_mb"] + loaded["editor_state_mb"]
    result = {
        "peak_over_floor": step / floor,
        "peak_over_inference": step / inference,
        "peak_over_inference_bar": 1.3,
        "peak_over_inference_beyond_process": (step - loaded["process_mb"]) / (inference - loaded["process_mb"]),
        "peak_mb": step,
        "inference_peak_mb": found["inference"]["peak_mb"],
        "floor_mb": {
            "process with base and editor weights": loaded["peak_mb"],
            "the process before it loads": loaded["process_mb"],
            "base weights alone": loaded["base_mb"],
            "gradients and Adam state of the editor": loaded["editor_state_mb"],
            "activations of one batch above the trunk": found["activations"]["peak_mb"] - loaded["peak_mb"],
        },
        "batch": arguments.batch,
        "micro_batch": arguments.micro_batch,
    }
    if "oracle" in found:
        result |= {"oracle_over_floor": found["oracle"]["peak_mb"] / floor, "oracle_peak_mb": found["oracle"]["peak_mb"]}
    name = f"memory-{arguments.shape}" if arguments.shape else "memory"
    name += f"-of-{arguments.batch}" if arguments.shape and arguments.batch != BATCH else ""
    name += f"-by-{arguments.micro_batch}" if arguments.micro_batch else ""
    bench.save(arguments, name, torch.device(loaded["device"]), result)


def side(arguments: Any) -> dict[str, Any]:
    """One side's peak, in MiB: of the process on a CPU, of the allocator on a GPU."""
    process = memory.peak_mb(torch.device("cpu"))
    model, formatter, drawn = scale.asked(arguments, CONFIG)
    blocks = model.config.num_hidden_layers
    method, specs = bench.editor_for(model, range(max(0, blocks - 3), blocks))
    trunk = Trunk.below(model, specs)
    with torch.no_grad():
        scored_logits(model, formatter.batch([drawn[0].edit]))
    memory.forget_peak(model.device)
    if arguments.side == "activations":
        kept = []
        for group in by_length([len(d.edit) for d in drawn]):
            batch = formatter.batch([drawn[i].edit for i in group])
            with record(model, specs):
                kept.append(token_nll(scored_logits(model, batch), batch.label, batch.row, batch.size).sum())
    if arguments.side == "inference":
        for kind in ("edit", "rephrasing", "unrelated"):
            texts = [text for d in drawn if (text := getattr(d, kind)) is not None]
            for group in by_length([len(text) for text in texts]):
                with torch.no_grad():
                    scored_logits(model, formatter.batch([texts[i] for i in group]))
    if arguments.side in ("step", "oracle"):
        optimizer = torch.optim.Adam(method.parameters())
        for _ in range(2):
            if arguments.side == "step":
                config = replace(CONFIG, micro_batch_size=arguments.micro_batch)
                descend(method, model, formatter, trunk, optimizer, drawn, config, len(drawn))
            else:
                optimizer.zero_grad()
                for one in drawn[:4]:
                    (oracle.outer_loss(method, model, one, CONFIG) / 4).backward()
                optimizer.step()
    device = model.device
    peak = memory.peak_mb(device)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    editor = sum(parameter.nbytes for parameter in method.parameters()) / 2**20
    found = {"peak_mb": peak, "base_mb": weights, "editor_state_mb": 3 * editor, "device": device.type}
    return found | {"process_mb": process if device.type == "cpu" else 0}


if __name__ == "__main__":
    main()
