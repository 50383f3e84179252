"""Peak memory of training, over base weights, editor with its gradients and Adam state, and one batch's activations.

    python benchmarks/memory.py [--model starter] [--batch 64]

Each side runs in a process of its own, and its peak is reset after loading, which itself needs more for a moment. The
activations are those of the blocks above the trunk: the growth of memory in a forward pass with a graph, of the edit batch
alone.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import torch

import bench
import mendlm
import oracle
from mendlm import memory
from mendlm.losses import token_nll
from mendlm.recording import record
from mendlm.replay import Trunk
from mendlm.text import Formatter, by_length, scored_logits
from mendlm.training import TrainConfig, draw, outer_loss

CONFIG = TrainConfig(edit_weight=1.0, own_locality=1.0)


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", choices=["loaded", "activations", "step", "oracle"], help="run one side and print its peak")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(side(arguments)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--side"]
    found = {}
    for name in ("loaded", "activations", "step", "oracle"):
        output = subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    loaded = found["loaded"]
    activations = found["activations"]["peak_mb"] - loaded["peak_mb"]
    floor = loaded["peak_mb"] + loaded["editor_state_mb"] + activations
    result = {
        "peak_over_floor": found["step"]["peak_mb"] / floor,
        "oracle_over_floor": found["oracle"]["peak_mb"] / floor,
        "peak_mb": found["step"]["peak_mb"],
        "oracle_peak_mb": found["oracle"]["peak_mb"],
        "floor_mb": {
            "process with base and editor weights": loaded["peak_mb"],
            "base weights alone": loaded["base_mb"],
            "gradients and Adam state of the editor": loaded["editor_state_mb"],
            "activations of one batch above the trunk": activations,
        },
        "batch": arguments.batch,
    }
    bench.save(arguments, "memory", torch.device(loaded["device"]), result)


def side(arguments: Any) -> dict[str, Any]:
    """One side's peak, in MiB: of the process on a CPU, of the allocator on a GPU."""
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    formatter, rng = Formatter.of(model, tokenizer), random.Random(0)
    drawn = [draw(e, (), formatter, CONFIG, rng) for e in bench.requests(arguments.data_dir, arguments.batch)]
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
    if arguments.side in ("step", "oracle"):
        optimizer = torch.optim.Adam(method.parameters())
        for _ in range(2):
            if arguments.side == "step":
                loss, _sums = outer_loss(method, model, formatter, trunk, drawn, CONFIG)
                (loss / len(drawn)).backward()
            else:
                for one in drawn[:4]:
                    (oracle.outer_loss(method, model, one, CONFIG) / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
    device = model.device
    peak = memory.peak_mb(device)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    editor = sum(parameter.nbytes for parameter in method.parameters()) / 2**20
    return {"peak_mb": peak, "base_mb": weights, "editor_state_mb": 3 * editor, "device": device.type}


if __name__ == "__main__":
    main()
