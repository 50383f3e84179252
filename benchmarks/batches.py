"""Edits per second over the size of a batch, in training and in editing; what ten times the work costs, in time and memory.

    python benchmarks/batches.py [--model starter] [--sizes 1,4,16,64,256] [--counts 10,100,1000]

A training batch is one step of so many requests, its optimiser left out; a batch of edits is one call of `edit_many` for so
many. The counts are of edits made as `mendlm edit --data` makes them; what it saves is timed apart, over making as many. Peaks
of memory are those of the process beyond what it held before. The editor is untrained, which costs the same.
"""

from __future__ import annotations

import gc
import random
import tempfile
from pathlib import Path
from typing import Any

import bench
import mendlm
from mendlm import memory
from mendlm.cli.edits import CHUNK
from mendlm.replay import Trunk
from mendlm.text import Formatter
from mendlm.training import TrainConfig, draw, outer_loss

CONFIG = TrainConfig(edit_weight=1.0, own_locality=1.0)


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--sizes", type=bench.numbers, default="1,4,16,64,256", help="requests a batch")
    parser.add_argument(
        "--counts", type=bench.numbers, default="10,100,1000", help="edits, each count about ten times the last"
    )
    arguments = parser.parse_args()
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    method, specs = bench.editor_for(model, bench.SHIPPED if arguments.model == "starter" else None)
    editor, trunk = mendlm.Editor(method, model, tokenizer), Trunk.below(model, specs)
    formatter, rng = Formatter.of(model, tokenizer), random.Random(0)
    asked = bench.requests(arguments.data_dir, max(*arguments.sizes, *arguments.counts))
    chunk = min(CHUNK, arguments.counts[-1])
    drawn = [draw(e, (), formatter, CONFIG, rng) for e in asked[: max(arguments.sizes)]]
    some = [formatter.encode(e.prompt, e.target) for e in asked[:32]]
    method.prepare(model, formatter.batch(some))
    assert editor.base  # the base's identity is hashed once a process, not once an edit

    def train(size: int) -> None:
        loss, _ = outer_loss(method, model, formatter, trunk, drawn[:size], CONFIG)
        (loss / size).backward()
        method.zero_grad()

    training: dict[str, Any] = {str(size): lambda size=size: train(size) for size in arguments.sizes}
    editing: dict[str, Any] = {
        str(size): lambda size=size: editor.edit_many(asked[:size], batch_size=size) for size in arguments.sizes
    }
    counts: dict[str, Any] = {
        str(count): lambda count=count: bench.edit_all(editor, asked[:count]) for count in arguments.counts
    }

    def peak(count: int) -> float:
        gc.collect()
        memory.forget_peak(model.device)
        before = memory.peak_mb(model.device)
        bench.edit_all(editor, asked[:count])
        return memory.peak_mb(model.device) - before

    found = [bench.interleaved(sides, arguments.rounds) for sides in (training, editing, counts)]
    peaks = {str(count): peak(count) for count in sorted({chunk, *arguments.counts})}
    made = editor.edit_many(asked[:chunk])
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            for number, edit in enumerate(made):
                edit.save(Path(folder) / str(number), force=True)

        saving = bench.interleaved({"edit": lambda: bench.edit_all(editor, asked[:chunk]), "save": save}, arguments.rounds)
    result = {
        "training_edits_per_second": {size: int(size) / seconds for size, seconds in found[0].items()},
        "edits_per_second": {size: int(size) / seconds for size, seconds in found[1].items()},
        "seconds_for_edits": found[2],
        "tenfold": found[2][str(arguments.counts[-1])] / found[2][str(arguments.counts[-2])],
        "peak_mb_beyond_the_process": peaks,
        "peak_of_most_over_a_chunk": peaks[str(arguments.counts[-1])] / peaks[str(chunk)],
        "saving_over_making": saving["save"] / saving["edit"],
        "saving_ms_per_edit": 1000 * saving["save"] / chunk,
        "layers": len(specs),
        "dtype": str(model.dtype),
    }
    bench.save(arguments, "batches", model.device, result)


if __name__ == "__main__":
    main()
