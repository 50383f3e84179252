"""Edits in other engines' formats. For now: several edits as one PEFT LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mendlm.apply import Edit, stacked
from mendlm.errors import InputError


def export_peft(edits: Sequence[Edit], folder: str | Path, *, force: bool = False) -> Edit:
    """Write edits of one base as one adapter folder, which is an edit too; returns their sum.

    More rows than the largest rank are compressed in the adapter, and kept exactly beside it. Raises `InputError` for no
    edits or edits of different bases.
    """
    if not edits:
        raise InputError("there is nothing to export; name at least one edit folder")
    bases = {(edit.about.get("base") or {}).get("sha256") for edit in edits}
    if len(bases) > 1:
        raise InputError("the edits were made for different base models; export those of one base together")
    parts = [{key: edit.about[key] for key in ("id", "request") if key in edit.about} for edit in edits]
    whole = stacked(edits)
    about = {**whole.about, "base": edits[0].about.get("base"), "parts": parts}
    whole = Edit(whole.updates, whole.transposed, about)
    whole.save(folder, force=force)
    return whole
