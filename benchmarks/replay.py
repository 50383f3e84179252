"""A replayed pass over a full one: logits at the same few positions in both, bit-equal.

    python benchmarks/replay.py [--model starter] [--texts 32]

Bar: at most 0.2 for the last 3 of 30 blocks.
"""

from __future__ import annotations

import torch

import bench
import mendlm
from mendlm.replay import Trunk
from mendlm.text import Formatter, scored_logits


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--texts", type=int, default=32)
    arguments = parser.parse_args()
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    blocks = model.config.num_hidden_layers
    _, specs = bench.editor_for(model, range(max(0, blocks - 3), blocks))
    trunk, formatter = Trunk.below(model, specs), Formatter.of(model, tokenizer)
    texts = [formatter.encode(e.rephrasings[0], None) for e in bench.requests(arguments.data_dir, arguments.texts)]
    batch = formatter.batch(texts)
    with torch.no_grad():
        tape = trunk.run(model, batch.inputs)

        def full() -> torch.Tensor:
            return scored_logits(model, batch)

        def replayed() -> torch.Tensor:
            with trunk.replay(tape):
                return scored_logits(model, batch)

        equal = torch.equal(full(), replayed())
        seconds = bench.interleaved({"full": full, "replayed": replayed}, arguments.rounds * 4)
    result = {
        "ratio": seconds["replayed"] / seconds["full"],
        "bar": 0.2,
        "bit_equal": equal,
        "seconds": seconds,
        "blocks": f"last 3 of {blocks}",
        "texts": len(texts),
        "tokens": batch.inputs["input_ids"].shape[1],
        "dtype": str(model.dtype),
    }
    bench.save(arguments, "replay", model.device, result)


if __name__ == "__main__":
    main()
