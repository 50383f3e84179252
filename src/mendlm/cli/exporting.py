"""`mendlm export`: edits in the formats of other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mendlm.cli import common
from mendlm.errors import InputError

Format = Literal["peft", "merged", "gguf-lora"]


def export(
    folders: Annotated[
        list[Path], typer.Argument(metavar="EDIT_DIR|STORE...", help="Edit folders, in order, or a store: its active edits.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder.")],
    to: Annotated[
        Format,
        typer.Option("--to", help="peft: a LoRA adapter; merged: a whole model; gguf-lora: an adapter of llama.cpp."),
    ] = "peft",
    model: Annotated[str | None, typer.Option("--model", help="The edits' base, for merged and gguf-lora.")] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Merge into a quantised base, as dense weights.")] = False,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            "--edit", help="Of a store only this edit, by its id, active or not; may repeat (default: the active ones)."
        ),
    ] = None,
    engine: Annotated[
        Literal["vllm"] | None, typer.Option("--for", help="Refuse an adapter that this engine would not serve.")
    ] = None,
    force: common.Force = False,
    json_output: common.Json = False,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Store the adapter, or the merged weights, in this dtype (default: as they are)."),
    ] = None,
    quantize: common.Quantize = None,
    revision: common.Revision = None,
    from_wheel: common.FromWheel = None,
) -> None:
    """Write one or several edits as one: a PEFT LoRA adapter, a merged model, or a LoRA adapter of llama.cpp."""
    if to == "peft" and model is not None:
        raise InputError("an adapter is written without its base; leave --model out, or choose --to merged or gguf-lora")
    if to != "peft" and model is None:
        raise InputError(f"--to {to} needs the edits' base model: give it with --model")
    if to != "peft" and engine is not None:
        raise InputError(f"--for {engine} checks an adapter; it goes with --to peft")
    if to != "merged" and (dequantize or quantize is not None):
        raise InputError("--dequantize and --quantize are for --to merged: no other format holds the base's weights")

    from mendlm.files import refuse_existing
    from mendlm.models import as_device, as_dtype, skeleton, stored_dtype

    refuse_existing(out, force=force)
    where = as_device(device or "cpu")
    edits = [one.to(where) for folder in folders for one in _edits(folder, ids)]
    if dtype is not None and to != "merged":
        edits = [one.to(as_dtype(dtype, where)) for one in edits]
    where_from: dict[str, Any] = {"revision": revision, "from_wheel": from_wheel}
    if to == "peft":
        _peft(edits, out, engine, force=force, as_json=json_output)
    elif to == "gguf-lora":
        assert model is not None
        base = skeleton(model, report=common.note, **where_from)

        from mendlm.export import export_gguf_lora

        about = export_gguf_lora(edits, base, out, force=force)
        file = out / about["file"]
        common.emit(
            json_output,
            {"out": str(out), **about},
            f"{len(edits)} edits, a rank-{about['rank']} adapter for llama.cpp ({about['architecture']}): {file}",
        )
    else:
        assert model is not None
        kept = dtype or stored_dtype(model, **where_from)
        origin = common.Origin(device=device, dtype=kept, quantize=quantize, **where_from)
        opened = common.open_model(model, origin, seed=seed)

        from mendlm.export import export_merged

        about = export_merged(edits, *opened, out, dequantize=dequantize, force=force)
        _show_merged(about, out, len(edits), as_json=json_output)


def _edits(folder: Path, ids: list[str] | None) -> list[Any]:
    """The edit of a folder, or the active ones of a store, or those of these ids."""
    from mendlm.apply import Edit
    from mendlm.session import edit_of
    from mendlm.store import DATABASE, Store

    if not (folder / DATABASE).is_file():
        if ids:
            raise InputError(f"--edit names an edit of a store, and {folder} is none")
        return [Edit.load(folder)]
    store = Store.open(folder)
    records = [store.record(one) for one in ids] if ids else store.active()
    edits = [edit_of(store, name) for name in dict.fromkeys(record.id for record in records)]
    if not edits:
        raise InputError(
            f"the store {folder} has no active edit to export; `mendlm store {folder} list --all` shows the others"
        )
    return edits


def _peft(edits: list[Any], out: Path, engine: Literal["vllm"] | None, *, force: bool, as_json: bool) -> None:
    from mendlm.export import export_peft
    from mendlm.files import read_json

    whole = export_peft(edits, out, engine=engine, force=force)
    about = read_json(out / "edit.json")
    content = {"out": str(out), "format": "peft", "edits": len(edits), "rank": about["rank"], "lost_share": about["lost_share"]}
    worst = max(about["lost_share"].values(), default=0.0)
    kept = "exactly" if not worst else f"compressed, losing at most {worst:.2%} of a layer's norm"
    text = f"{len(edits)} edits, {whole.rows} rows, as a rank-{about['rank']} adapter ({kept}): {out}"
    if engine == "vllm":
        from mendlm.engines import vllm_rank

        content["max_lora_rank"] = vllm_rank(out)
        base = (about.get("base") or {}).get("name") or "BASE"
        text += f"\nvllm serve {base} --enable-lora --max-lora-rank {content['max_lora_rank']} --lora-modules {out.name}={out}"
    common.emit(as_json, content, text)


def _show_merged(about: dict[str, Any], out: Path, edits: int, *, as_json: bool) -> None:
    if as_json:
        common.emit(True, {"out": str(out), **about}, "")
        return
    common.table(
        "what the rounding of the weights took",
        ("layer", "share of the edit's norm"),
        [(name, f"{share:.2%}") for name, share in about["lost_share"].items()],
    )
    if about["asked"]:
        kinds = [kind for kind in ("prompt", "rephrasing") if about["success"]["base"][kind] is not None]
        rows = [(place, *(f"{found[kind]:.2f}" for kind in kinds)) for place, found in about["success"].items()]
        common.table("success of the edits' own requests", ("on", *kinds), rows)
    common.emit(False, {}, f"{edits} edits merged into a model in {about['dtype']}: {out}")
