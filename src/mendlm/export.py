"""Edits in other engines' formats: one PEFT LoRA adapter, a merged model, or llama.cpp's LoRA adapter.

Each export takes any number of edits of one base and writes a new folder with their sum, whole or not at all. A merged model is
loaded again from its folder and asked: its report says what each edit's own prompts get from the base, from the edits as an
overlay, and from the merged weights.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mendlm import gguf_lora
from mendlm.adapter import versions
from mendlm.apply import Edit, Snapshot, applied, merge, stacked
from mendlm.engines import vllm_problems
from mendlm.errors import InputError, LayerError
from mendlm.files import new_folder, refuse_existing, write_json
from mendlm.gate import Asked, ask, questions
from mendlm.layers import dequantized, quantized
from mendlm.metrics import continues, mean
from mendlm.models import base_of, device_of, load, no_bars
from mendlm.tasks import EditExample
from mendlm.text import Formatter

GGUF, REPORT = "adapter.gguf", "export.json"
"""The files of an export that are ours to name: llama.cpp's adapter, and what is said about a merged model or that adapter."""
FORMAT = "mendlm-export-1"
TOKENS = 8
"""At least so many tokens of an answer are looked at."""


def combined(edits: Sequence[Edit]) -> Edit:
    """Edits of one base as one, which says of each its id and request. Raises `InputError` for none, or for several bases."""
    if not edits:
        raise InputError("there is nothing to export; name at least one edit folder")
    bases = {(edit.about.get("base") or {}).get("sha256") for edit in edits}
    if len(bases) > 1:
        raise InputError("the edits were made for different base models; export those of one base together")
    parts = [{key: edit.about[key] for key in ("id", "request") if key in edit.about} for edit in edits]
    whole = stacked(edits)
    return Edit(whole.updates, whole.transposed, {**whole.about, "base": edits[0].about.get("base"), "parts": parts})


def export_peft(
    edits: Sequence[Edit], folder: str | Path, *, engine: Literal["vllm"] | None = None, force: bool = False
) -> Edit:
    """Write edits of one base as one adapter folder, which is an edit too; returns their sum.

    More rows than the largest rank are compressed in the adapter, and kept exactly beside it. Raises `InputError` for no
    edits or edits of different bases, and for an adapter that the `engine` would not serve (see `mendlm.engines`).
    """
    whole = combined(edits)
    if engine is None:
        whole.save(folder, force=force)
        return whole
    with new_folder(Path(folder), force=force) as temporary:
        whole.save(temporary, force=True)
        if problems := vllm_problems(temporary):
            raise InputError(f"vLLM would not serve this adapter: {'; '.join(problems)}. Export to merged instead")
    return whole


def export_gguf_lora(edits: Sequence[Edit], model: Any, folder: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Write edits of one base as one LoRA adapter of llama.cpp, `adapter.gguf`, and what is said about it, `export.json`.

    `model` is the base, or its `mendlm.models.skeleton`: its configuration and layers are read, its weights only to tell
    whether it is the base of the edits. Raises `FormatError` if it is not (unless `force`), `LayerError` for edits of layers
    that it, or llama.cpp, does not have, and `InputError` for a model type that llama.cpp does not serve.
    """
    whole = _for_base(edits, model, force=force).detach().require_finite()
    names = gguf_lora.tensor_names(model.config, whole.updates)
    base = whole.about.get("base") or {}
    with new_folder(Path(folder), force=force) as temporary:
        rank = gguf_lora.write(temporary / GGUF, whole.updates, model.config, base.get("name"))
        about = {
            **_about("gguf-lora", whole),
            "file": GGUF,
            "architecture": gguf_lora.architecture(model.config),
            "rank": rank,
            "layers": {name: f"{found}.weight" for name, found in names.items()},
        }
        write_json(temporary / REPORT, about)
    return about


def export_merged(
    edits: Sequence[Edit], model: Any, tokenizer: Any, folder: str | Path, *, dequantize: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write a model with edits merged into its weights as a Hugging Face folder, and ask the written model.

    The weights keep the dtype of `model`, which is afterwards as it was, to the bit. The report, also written as `export.json`,
    says under `lost_share` what share of each layer's edit the rounding took (0 to 1), under `success` the share of the edits'
    own prompts, and of their rephrasings, whose greedy answer continues the target on the base, under the overlay and on the
    folder's model, and under `asked` each answer. The written model is held beside the given one while it is asked.

    Raises `LayerError` for a quantised model unless `dequantize`, which writes all its layers dense in the model's dtype; and
    `FormatError` for a base that is not that of the edits (unless `force`).
    """
    refuse_existing(Path(folder), force=force)
    whole = _for_base(edits, model, force=force).detach().require_finite().to(device_of(model))
    packed = {name: module for name, module in model.named_modules() if quantized(module)}
    if packed and not dequantize:
        name, module = next(iter(packed.items()))
        raise LayerError(
            f"the model is quantised (layer '{name}': {quantized(module)}), and edits would be lost in such weights; give the "
            "model as it was before, ask for dense weights (--dequantize), or export the edits to peft"
        )
    asked = _asked(edits)
    overlay = _answers(model, tokenizer, asked, whole)
    with new_folder(Path(folder), force=force) as temporary:
        with _dense(model, packed):
            merged = merge(model, whole)
            try:
                with no_bars():
                    model.save_pretrained(temporary)
            finally:
                merged.snapshot.restore(model)
        tokenizer.save_pretrained(temporary)
        for path in temporary.iterdir():  # safetensors' are for their owner alone
            path.chmod((temporary / "config.json").stat().st_mode & 0o777)
        written, its_tokenizer = load(temporary, dtype=_dtype(model), device=device_of(model))
        merged_answers = _answers(written, its_tokenizer, asked, None)
        told = [_told(number, *both) for (number, _), *both in zip(asked, overlay, merged_answers, strict=True)]
        about = {
            **_about("merged", whole),
            "base": base_of(model),
            "dtype": str(_dtype(model)).removeprefix("torch."),
            "dequantized": bool(packed),
            "lost_share": dict(merged.lost),
            "success": {place: _success(told, place) for place in ("base", "overlay", "merged")},
            "asked": told,
        }
        write_json(temporary / REPORT, about)
    return about


def _for_base(edits: Sequence[Edit], model: Any, *, force: bool) -> Edit:
    """The edits as one, if they are for this base model and its layers."""
    whole = combined(edits)
    if not force:
        whole.require_base(model)
    with applied(model, whole):  # raises if the model lacks the layers
        pass
    return whole


def _about(kind: str, whole: Edit) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "to": kind,
        "base": whole.about["base"],
        "edits": whole.about["parts"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _dtype(model: nn.Module) -> Any:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


@contextlib.contextmanager
def _dense(model: Any, packed: dict[str, nn.Module]) -> Iterator[None]:
    """The model with dense layers in place of its quantised ones, and without the marks of them; afterwards as before."""
    if not packed:
        yield
        return
    dtype = _dtype(model)
    quantizer, how = model.hf_quantizer, model.config.quantization_config
    try:
        for name, module in packed.items():
            model.set_submodule(name, dequantized(module, dtype))
        model.hf_quantizer = None
        del model.config.quantization_config
        yield
    finally:
        Snapshot({}, packed).restore(model)
        model.hf_quantizer, model.config.quantization_config = quantizer, how


def _answers(model: Any, tokenizer: Any, asked: Sequence[tuple[int, Asked]], edit: Edit | None) -> list[Asked]:
    return ask(model, Formatter.of(model, tokenizer), [one for _, one in asked], None, edit, TOKENS)


def _asked(edits: Sequence[Edit]) -> list[tuple[int, Asked]]:
    """The prompt and rephrasings of every edit that says what was requested, each with the edit's number."""
    asked = []
    for number, edit in enumerate(edits):
        request = edit.about.get("request") or {}
        if (target := request.get("target")) and request.get("prompt"):
            example = EditExample(prompt=request["prompt"], target=target, rephrasings=tuple(request.get("rephrasings") or ()))
            asked += [(number, one) for one in questions(example, chat=bool(request.get("chat")))]
    return asked


def _told(number: int, overlay: Asked, merged: Asked) -> dict[str, Any]:
    """What one question got in each place."""
    answers = {"base": overlay.before, "overlay": overlay.after, "merged": merged.after}
    success = {place: continues(answer, str(overlay.wanted)) for place, answer in answers.items()}
    asked = {"edit": number, "kind": overlay.kind, "prompt": overlay.prompt, "target": overlay.wanted, "chat": overlay.chat}
    return {**asked, "answers": answers, "success": success}


def _success(asked: Sequence[dict[str, Any]], place: str) -> dict[str, float | None]:
    """By kind, the share (0 to 1) of answers that continue the target; None where nothing was asked."""
    return {kind: mean([one["success"][place] for one in asked if one["kind"] == kind]) for kind in ("prompt", "rephrasing")}
