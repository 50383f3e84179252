"""`mendlm inspect --plan`: what training takes, by the plan."""

from __future__ import annotations

from typing import Any

from mendlm.cli import common

GB = 1e9


def show(
    model: str, origin: common.Origin, layers: list[str], sizes: dict[str, Any], data: list[str], *, json_output: bool
) -> None:
    """Print the plan of training on a model, of which nothing but the configuration is read; `sizes` are those of `plans`."""
    from mendlm.layers import block_stacks, choose
    from mendlm.methods import method_types
    from mendlm.models import as_device, as_dtype, skeleton, tokenizer_of
    from mendlm.plan import CARDS, Lengths, can_be_kept, plans
    from mendlm.replay import Trunk
    from mendlm.tasks import load
    from mendlm.text import Formatter
    from mendlm.training import states_bytes

    where: dict[str, Any] = {"revision": origin.revision, "from_wheel": origin.from_wheel}
    fake = skeleton(model, report=common.note, **where)
    found = plans(fake, tuple(layers), **sizes)
    content: dict[str, Any] = {
        "model": type(fake).__name__,
        "parameters": sum(p.numel() for p in fake.parameters()),
        "blocks": {name: len(blocks) for name, blocks in block_stacks(fake).items()},
        "method": sizes["method"],
        "editor_rank": sizes["rank"] if hasattr(method_types(sizes["method"])[1], "rank") else None,
        "batch_size": sizes["batch_size"],
        "num_edits": sizes["num_edits"],
        "micro_batch_size": sizes["micro_batch_size"],
        "plans": {base: one.figures() for base, one in found.items()},
    }
    if data:
        sources = [load(source) for source in data]
        formatter = Formatter.of(fake, tokenizer_of(model, **where))
        dtype = as_dtype(origin.dtype, as_device(origin.device))
        content["trunk_cache_dtype"] = str(dtype).removeprefix("torch.")
        kept = can_be_kept(fake, Trunk.where_possible(fake, choose(fake, layers)))
        content["trunk_cache_bytes"] = states_bytes(fake, formatter, sources, dtype=dtype) if kept else None
    if json_output:
        common.emit(True, content, "")
        return
    one, lengths, rank = found["bf16"], Lengths(), content["editor_rank"]
    some, k = sizes["micro_batch_size"], sizes["num_edits"]
    common.emit(
        False,
        {},
        f"{content['model']}, {content['parameters']:,} parameters; {content['method']}{f' of rank {rank}' if rank else ''}; "
        f"{sizes['batch_size']} requests a step{f', {some} at a time' if some else ''}"
        f"{f', {k} edited at once' if k > 1 else ''}\n"
        f"prompts of {lengths.edit} tokens, rephrasings of {lengths.rephrasing}, unrelated texts of {lengths.unrelated}; "
        "longer ones take more",
    )
    rows = [
        (
            base,
            *(f"{size / GB:.2f}" for size in (p.base, p.editor, p.optimizer, p.step, p.total)),
            *("yes" if card in p.fits() else "-" for card in CARDS),
        )
        for base, p in found.items()
    ]
    columns = ("base in", "base", "editor", "Adam", "step", "all, GB", *(f"{card} GB" for card in CARDS))
    common.table("memory of training, computed", columns, rows)
    text = (
        f"operations: {one.flops / 1e9:,.1f} G for each request of a training step, {one.edit_flops / 1e9:,.1f} G for one edit"
    )
    if data:
        size = content["trunk_cache_bytes"]
        text += "\ntrunk cache of these texts: " + (
            f"{size / GB:.2f} GB in {content['trunk_cache_dtype']}, each text once"
            if size is not None
            else "not possible for this model"
        )
    common.emit(False, {}, text)
