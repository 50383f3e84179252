"""`mendlm demo`, `edit`, `generate` and `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mendlm import processes
from mendlm.cli import common
from mendlm.errors import InputError

if TYPE_CHECKING:
    from mendlm.apply import Edit
    from mendlm.editor import Editor

CHUNK = 256
"""How many requests of a file are edited at a time."""


def demo(
    prompt: Annotated[str | None, typer.Option("--prompt", help="A prompt of your own; goes with --target.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="What the model should answer.")] = None,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "auto",
    quantize: common.Quantize = None,
    from_wheel: common.FromWheel = None,
) -> None:
    """Edit one fact of the starter model, and show what changes, what stays, and that the edit comes off."""
    if (prompt is None) != (target is None):
        raise InputError("--prompt and --target go together; give both, or neither for the default fact")
    origin = common.Origin(device=device, dtype=dtype, quantize=quantize, from_wheel=from_wheel)
    model, tokenizer = common.open_model("starter", origin, seed=seed)

    from mendlm.demo import PROMPT, TARGET, demonstrate

    editor = common.open_editor(None, "starter", model, tokenizer)
    prompt, target = prompt or PROMPT, target or TARGET
    seen = demonstrate(editor, tokenizer, prompt, target)
    facts = {
        "edit_ms": round(seen.milliseconds, 1),
        "rows": seen.edit.rows,
        "layers": len(seen.edit.updates),
        "bytes": seen.edit.nbytes,
        "bit_equal_after_undo": seen.bit_equal,
    }
    if json_output:
        content = {"prompt": prompt, "target": target, "answers": [asdict(shown) for shown in seen.shown], **facts}
        common.emit(True, content, "")
        return
    rows = [
        (s.kind, s.prompt, common.one_line(s.before), common.one_line(s.under), common.one_line(s.after)) for s in seen.shown
    ]
    common.table(f"{prompt!r} -> {target!r}", ("", "prompt", "before", "with the edit", "edit taken off"), rows)
    taken = "the same to the bit" if seen.bit_equal else "NOT the same"
    common.emit(
        False,
        {},
        f"The edit took {seen.milliseconds:.0f} ms: {seen.edit.rows} rows in each of {len(seen.edit.updates)} layers, "
        f"{seen.edit.nbytes:,} bytes.\nAfter taking it off, all logits were compared with those before it: {taken}.",
    )


@common.loads_model
def edit(
    out: Annotated[Path, typer.Option("--out", help="The edit's folder; with --data, the folder of one folder a record.")],
    model: common.Model = "starter",
    editor: common.EditorOption = None,
    method: common.MethodOption = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of the method; may repeat.")] = None,
    locality: Annotated[
        list[str] | None, typer.Option("--locality", help="TASK:PATH of texts that ft-kl watches; may repeat.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The prompt to correct.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The answer it should get.")] = None,
    rephrasings: common.Rephrasings = None,
    named: common.Unrelated = None,
    rehearse: common.Rehearse = None,
    data: Annotated[str | None, typer.Option("--data", help="TASK:PATH of requests, instead of one.")] = None,
    together: Annotated[
        bool, typer.Option("--together", help="With --data: one edit of all its requests, by malmen merged, else summed.")
    ] = False,
    scale: Annotated[float, typer.Option("--scale", help="Strength of the edit.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Pose the prompt as a chat turn.")] = False,
    target_end: Annotated[
        Literal["auto", "always", "never"], typer.Option("--target-end", help="Whether the answer ends after the target.")
    ] = "auto",
    force: common.Force = False,
    skip_bad: common.SkipBad = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Make an edit and save it as an adapter folder; of a file one folder a record, or one edit of all."""
    if (data is None) == (prompt is None and target is None) or (data is None and (prompt is None or target is None)):
        raise InputError("say what to edit: either --prompt and --target, or --data TASK:PATH")
    if together and data is None:
        raise InputError("--together makes one edit of many requests; give them by --data TASK:PATH")
    asked = bool(rephrasings or named)
    if asked and (data is not None or target_end != "auto" or scale <= 0):
        raise InputError(
            "--rephrasing and --unrelated are for one --prompt and --target, at a --scale above 0, whose answer ends as usual; "
            "leave --data and --target-end out"
        )
    if rehearse is not None and not asked:
        raise InputError("--rehearse is how often --rephrasing and --unrelated are rehearsed; name some, or leave it out")

    from mendlm.editor import Editor
    from mendlm.evaluation import require_work
    from mendlm.files import new_folder, refuse_existing
    from mendlm.models import is_sharded
    from mendlm.tasks import EditExample, load_edits, load_unrelated

    refuse_existing(out, force=force)
    values = common.plain_settings(settings)
    common.known(method, values)
    if locality and method != "ft-kl":
        raise InputError("--locality gives texts that the method 'ft-kl' watches; no other method reads them")
    unrelated = [load_unrelated(source, skip_bad=skip_bad) for source in locality or ()]
    requests: list[Any] = [(prompt, target)] if data is None else []
    skipped = 0
    if data is not None:
        loaded_data = load_edits(data, skip_bad=skip_bad)
        requests, skipped = list(loaded_data.examples), loaded_data.skipped
    loaded, tokenizer = common.open_model(model, origin, seed=seed)
    chosen, about = common.open_method(method, values, editor, model, loaded, tokenizer, unrelated, force=force)
    opened = Editor(chosen, loaded, tokenizer, about)
    how: dict[str, Any] = {"chat": chat, "target_end": target_end}
    if data is not None:
        opened.require_usable(requests, **how)
    alone = processes.count() == 1 or is_sharded(loaded)
    if not alone:
        if data is None or together:
            raise InputError("one edit is the work of one process; start mendlm edit without a launcher, or give --data alone")
        require_work(len(requests), len(range(0, len(requests), CHUNK)))
        processes.agree({"requests": loaded_data.sha256, "out": str(out)})
    main, given = processes.is_main(), 0
    if data is None or together:
        given = sum(opened.already_given(requests, **how))
        if together:
            one = opened.edit_together(requests, scale=scale, **how)
        elif asked:
            one = _rehearsed(opened, requests[0], rephrasings or (), named or (), scale, chat, common.rehearsing(rehearse))
        else:
            one = opened.edit(*requests[0], scale=scale, **how)
        if main:
            one.save(out, force=force)
        folders = [out]
    else:
        names = [f"{number:06d}" for number in range(len(requests))]
        with new_folder(out, force=force) if main else nullcontext() as made, common.progress("editing") as show:
            place = Path(processes.gathered(str(made))[0])
            for start in range(0, len(requests), CHUNK):
                if not (alone or processes.mine(start // CHUNK)):
                    continue
                some: list[EditExample] = requests[start : start + CHUNK]
                given += sum(opened.already_given(some, **how))
                for number, one in enumerate(opened.edit_many(some, scale=scale, **how), start=start):
                    if main or not alone:
                        one.save(place / names[number])
                    show(number + 1, len(requests))
            told = processes.gathered(given)
            given = given if alone else sum(told)
        folders = [out / name for name in names]
    content = {
        "out": str(out),
        "edits": [str(folder) for folder in folders],
        "count": len(folders),
        "skipped": skipped,
        "already_given": given,
    }
    text = f"the edit is in {out}" if folders == [out] else f"{len(folders)} edits in {out}"
    if given:
        common.note(f"{given} of {len(requests)} targets are what the model answers already")
    common.emit(json_output, content, f"{text} ({skipped} malformed records skipped)" if skipped else text)


def _rehearsed(
    editor: Editor,
    request: tuple[str, str],
    rephrasings: Sequence[str],
    unrelated: Sequence[str],
    scale: float,
    chat: bool,
    how: dict[str, Any],
) -> Edit:
    """One edit, rehearsed on what is named beside its prompt; what does not hold all the same is said."""
    from mendlm.session import Session

    session = Session(editor.model, editor.formatter.tokenizer, editor, **how)
    tried = session.preview(*request, rephrasings=rephrasings, unrelated=unrelated, scale=scale, chat=chat, on_base=True)
    if not tried.checks.passed:
        common.note(f"not all of it holds:\n{tried.checks.failures()}")
    return tried.edit


@common.loads_model
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask.")],
    model: common.Model = "starter",
    edits: Annotated[list[Path] | None, typer.Option("--edit", help="An edit folder; may repeat, in order.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="A store, whose active edits are applied.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Pose the prompt as a chat turn.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of the answer.")] = 32,
    force: common.Force = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """Answer a prompt greedily, with edits applied as overlay."""
    from mendlm.apply import Edit
    from mendlm.models import base_of, device_of
    from mendlm.session import Session
    from mendlm.store import Store

    if store is not None:
        if edits:
            raise InputError("give --edit or --store, not both; `mendlm store DIR add` takes edit folders into a store")
        Store.open(store).close()
    opened = [Edit.load(folder) for folder in edits or ()]  # a bad one is said before the model is loaded
    loaded, tokenizer = common.open_model(model, origin, seed=seed)
    session = Session(loaded, tokenizer, store=None if store is None else Store.open(store, base_of(loaded)))
    names = list(session.edits) or [session.add(one.to(device_of(loaded)), force=force) for one in opened]
    answer = session.answer(prompt, chat=chat, max_new_tokens=max_new_tokens)
    common.emit(json_output, {"prompt": prompt, "chat": chat, "edits": names, "answer": answer}, answer.strip())


@common.loads_model
def inspect(
    model: Annotated[str, typer.Argument(help="'starter', a Hugging Face folder, or a hub id.")],
    rank: Annotated[int, typer.Option("--rank", min=1, help="The editor's rank, for its size.")] = 256,
    plan: Annotated[bool, typer.Option("--plan", help="Compute what training takes; no weight is read.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Requests a step, for the plan.")] = 64,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", min=1, help="Those in memory at a time, for the plan (default: all).")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="mend, malmen or enn, for the plan (default: mend).")] = None,
    num_edits: Annotated[
        int | None, typer.Option("--num-edits", min=1, help="Requests edited at once, for the plan (default: 1).")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Pattern of the layers to edit, for the plan; may repeat.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="TASK:PATH of requests or unrelated texts, whose trunk cache is planned, too; may repeat."),
    ] = None,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    *,
    origin: common.Origin,
) -> None:
    """What can be edited in a model, the default choice, and what editing and training take."""
    if data and not plan:
        raise InputError("--data is for the plan of a trunk cache; give --plan, too")
    if layers and not plan:
        raise InputError("--layers is for the plan of a training; give --plan, too")
    for name, given in (("micro-batch-size", micro_batch_size), ("method", method), ("num-edits", num_edits)):
        if given and not plan:
            raise InputError(f"--{name} is for the plan of a training; give --plan, too")
    if plan:
        from mendlm.cli import planning

        sizes = {"method": method or "mend", "rank": rank, "num_edits": num_edits or 1}
        sizes |= {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        planning.show(model, origin, layers or [], sizes, data or [], json_output=json_output)
        return
    loaded, tokenizer = common.open_model(model, origin, seed=seed)

    from mendlm.errors import LayerError
    from mendlm.layers import block_stacks, default_layers, editable, size
    from mendlm.methods.mend import Mend, MendConfig
    from mendlm.models import quantization
    from mendlm.text import Formatter

    found = editable(loaded)
    parameters, base = size(loaded)
    formatter = Formatter.of(loaded, tokenizer)
    content: dict[str, Any] = {
        "model": type(loaded).__name__,
        "model_type": loaded.config.model_type,
        "family": formatter.family,
        "labels": list(formatter.labels),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantization": quantization(loaded),
        "parameters": parameters,
        "bytes": base,
        "blocks": {name: len(blocks) for name, blocks in block_stacks(loaded).items()},
        "editable": [asdict(spec) for spec in found.values()],
        "default": [],
    }
    try:
        default = default_layers(loaded)
    except LayerError as error:
        content["no_default"] = str(error)
    else:
        editor = 4 * sum(p.numel() for p in Mend(default, MendConfig(rank=rank)).parameters())
        rows = 4 * 32 * sum(sum(spec.shape) for spec in default)  # an edit of 32 rows
        content |= {
            "default": [spec.name for spec in default],
            "editor_rank": rank,
            "editor_bytes": editor,
            "edit_memory_bytes": base + editor + rows,
        }
    if json_output:
        common.emit(True, content, "")
        return
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name, spec in found.items():
        parts = name.split(".")
        kinds.setdefault((".".join("*" if part.isdigit() else part for part in parts), spec.shape), []).append(name)
    rows_shown = [(pattern, f"{d_out} x {d_in}", len(names)) for (pattern, (d_out, d_in)), names in kinds.items()]
    stacks = ", ".join(f"{name} ({count} blocks)" for name, count in content["blocks"].items())
    mb = 2**20
    precision = content["dtype"] if content["quantization"] is None else f"{content['quantization']} and {content['dtype']}"
    common.emit(
        False,
        {},
        f"{content['model']} ({content['family']}), {parameters:,} parameters in {precision}, {base / mb:.0f} MB\n"
        f"blocks: {stacks}" + (f"\nlabels: {', '.join(content['labels'])}" if content["labels"] else ""),
    )
    common.table("editable layers", ("pattern", "d_out x d_in", "layers"), rows_shown)
    if not content["default"]:
        common.emit(False, {}, content["no_default"])
        return
    common.emit(
        False,
        {},
        "default layers: "
        + ", ".join(content["default"])
        + f"\neditor of rank {rank}: {content['editor_bytes'] / mb:.1f} MB in float32"
        + f"\nestimated memory: {content['edit_memory_bytes'] / mb:.0f} MB to edit; what training takes says --plan",
    )
