"""Edits and editors in a Hugging Face hub repository: pushed with a card that says what was measured, and pulled back.

What travels is safetensors, JSON and the card (`README.md`), by the names in `FILES`, from the repository's top: no pickle, no
code. A thing is checked before it is pushed, and what was pulled is checked like any local file before it gets its name.

`huggingface_hub` is imported when used; it comes with transformers. Its environment holds here, too: `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE`. This module makes no request that nobody asked for.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mendlm import adapter, metrics
from mendlm.checkpoint import editor_path, load_editor
from mendlm.errors import FormatError, HubError, InputError
from mendlm.files import new_folder, read_json, sha256

Kind = Literal["edit", "editor"]
CARD, RESULTS, EDITOR, RUN = "README.md", "summary.json", "editor.safetensors", "run.json"
FILES: dict[Kind, tuple[str, ...]] = {
    "edit": (adapter.ABOUT, adapter.CONFIG, adapter.ADAPTER, adapter.EXACT, RESULTS),
    "editor": (EDITOR, RUN, RESULTS),
}
"""What is pushed and pulled of each kind, beside the card. Of a run, its training state and its log stay at home."""
MEASURED = {
    "success": "success",
    "generality": "generality",
    "locality": "locality",
    "success_generated": "success, in free generation",
    "generality_generated": "generality, in free generation",
}
"""Keys of a summary that hold a share with an interval -> what the card calls them."""


@dataclass(frozen=True)
class Pulled:
    """What `pull` brought: of what kind, which files, what it left in the repository, and of which commit."""

    kind: Kind
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    commit: str


@dataclass(frozen=True, eq=False)
class _Thing:
    """What is to be pushed: its files by name, and what the card says of it."""

    kind: Kind
    files: Mapping[str, Path]
    base: Mapping[str, Any]
    method: str | None
    layers: tuple[str, ...]
    told: Mapping[str, Any]


def push(
    path: str | Path,
    repo: str,
    *,
    results: str | Path | None = None,
    private: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Push an edit's folder, a run folder or an editor file to the repository `repo` ("owner/name"); returns the commit's URL.

    The repository is made if there is none, with `private` a private one. `results` is the folder of an evaluation whose
    `summary.json` goes with it and fills the card; a folder of its own `summary.json` needs no other. `endpoint` and `token`
    are by default those of huggingface_hub. Raises `FormatError` for a damaged thing, `InputError` for results of another base,
    method or layers, and for a public repository that is to be private, and `HubError` for whatever the hub refuses.
    """
    import huggingface_hub

    thing = _read(Path(path))
    summary = _summary(Path(results) if results is not None else None, thing)
    if token is None and huggingface_hub.get_token() is None:
        raise HubError("there is no token to push with; log in by `hf auth login`, set HF_TOKEN, or give one")
    files = dict(thing.files)
    if summary is not None and results is not None:
        files[RESULTS] = Path(results) / RESULTS
    with _asking(repo, endpoint):
        api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="mendlm")
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        there = api.model_info(name)
        if private and not there.private:
            raise InputError(f"the repository {name} exists and is public; name another, or make it private on the hub first")
        old = {sibling.rfilename for sibling in there.siblings or ()} & {file for kind in FILES.values() for file in kind}
        operations: list[Any] = [huggingface_hub.CommitOperationDelete(file) for file in sorted(old - set(files))]
        operations += [huggingface_hub.CommitOperationAdd(file, str(source)) for file, source in files.items()]
        card = huggingface_hub.CommitOperationAdd(CARD, _card(name, thing, summary).encode())
        commit = api.create_commit(name, [*operations, card], commit_message=f"An {thing.kind} of mendlm")
    return str(commit.commit_url)


def pull(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    force: bool = False,
) -> Pulled:
    """Bring an edit or an editor from a hub repository into a new folder, whole or not at all.

    `revision` is a branch, tag or commit. Files of other names are left where they are, and named in what is returned. Raises
    `HubError` for a repository that cannot be read, and `FormatError` for one that holds neither, or a damaged one.
    """
    import huggingface_hub

    with new_folder(Path(folder), force=force) as temporary:
        with _asking(repo, endpoint):
            api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="mendlm")
            info = api.model_info(repo, revision=revision)
            held = [sibling.rfilename for sibling in info.siblings or ()]
            kind: Kind = "edit" if adapter.ABOUT in held else "editor"
            wanted = [name for name in (*FILES[kind], CARD) if name in held]
            if not {adapter.ABOUT, EDITOR} & set(held):
                raise FormatError(f"the repository {repo} holds no edit ({adapter.ABOUT}) and no editor ({EDITOR})")
            loading = temporary / ".loading"
            for name in wanted:
                api.hf_hub_download(repo, name, revision=info.sha, local_dir=loading)
        for name in wanted:
            (loading / name).rename(temporary / name)
        shutil.rmtree(loading)
        try:
            _read(temporary)
            if RESULTS in wanted:
                read_json(temporary / RESULTS)
        except FormatError as error:
            raise FormatError(f"{repo}: {str(error).replace(f'{temporary}/', '')}") from None
    return Pulled(kind, tuple(wanted), tuple(name for name in held if name not in wanted), str(info.sha))


def _read(path: Path) -> _Thing:
    """Check a thing as it is checked when it is used. Raises `FormatError`."""
    if (path / adapter.ABOUT).is_file():
        updates, transposed, about = adapter.read(path)
        for name, digest in about["sha256"].items():  # also of the file that only PEFT reads
            if not (path / name).is_file() or sha256(path / name) != digest:
                raise FormatError(f"{path / name} is missing, or has changed since it was written; make the edit again")
        if read_json(path / adapter.CONFIG) != adapter.peft_config(list(updates), about["rank"], bool(transposed), about):
            raise FormatError(f"{path / adapter.CONFIG} does not fit the edit beside it: PEFT would load something else")
        files = {name: path / name for name in FILES["edit"] if (path / name).is_file()}
        says = ("id", "rank", "rows", "request", "parts", "editor", "lost_share")
        told: dict[str, Any] = {key: about[key] for key in says if key in about}
        return _Thing("edit", files, about.get("base") or {}, about.get("method"), tuple(updates), told)
    file = editor_path(path)
    if not file.is_file():
        raise FormatError(f"{path} is neither an edit's folder ({adapter.ABOUT}) nor an editor ({EDITOR})")
    method, about = load_editor(file)
    files = {EDITOR: file}
    if path.is_dir():
        files |= {name: path / name for name in (RUN, RESULTS) if (path / name).is_file()}
        for name in set(files) - {EDITOR}:
            read_json(path / name)
    told = {key: about[key] for key in ("step", "data", "valid", "locality") if about.get(key)}
    return _Thing("editor", files, about.get("base") or {}, method.name, tuple(spec.name for spec in method.specs), told)


def _summary(results: Path | None, thing: _Thing) -> dict[str, Any] | None:
    """The measured results that go with a thing, if they are of its base, method and layers; None for none."""
    path = results / RESULTS if results is not None else thing.files.get(RESULTS)
    if path is None:
        return None
    summary = read_json(path)
    if not isinstance(summary, dict) or summary.get("format") != metrics.FORMAT:
        raise FormatError(f"{path} is not a summary of the format {metrics.FORMAT}; make one with `mendlm eval`")
    asked = {"model_sha256": thing.base.get("sha256"), "method": thing.method, "layers": list(thing.layers)}
    for key, own in asked.items():
        if own and summary.get(key) != own:
            raise InputError(
                f"{path} was measured with {key} {summary.get(key)}, but this {thing.kind} has {own}; give its own"
            )
    return summary


def _card(repo: str, thing: _Thing, summary: Mapping[str, Any] | None) -> str:
    """The card: what the thing is, how to use it, and what was measured; nothing that no file says."""
    base = thing.base
    name = str(base.get("name") or "unknown")
    head = ["library_name: mendlm", f"tags: [mendlm, model-editing{', lora, peft' if thing.kind == 'edit' else ''}]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # a hub id; a local folder's name is none
        head.append(f"base_model: {json.dumps(name)}")
    facts = {
        "base model": f"`{name}`" + (f", {base['quantization']}" if base.get("quantization") else ""),
        "sha256 of its weights": base.get("sha256"),
        "method": thing.method,
        "layers": ", ".join(f"`{layer}`" for layer in thing.layers),
    }
    lines = ["---", *head, "---", "", f"# {repo.rpartition('/')[2]}", ""]
    if thing.kind == "edit":
        lines += [
            "An edit of a language model, made by mendlm. It loads as a LoRA adapter, too, and is meant for this base only."
        ]
    else:
        lines += ["An editor: a network that turns a request into an edit of this base model, trained by mendlm."]
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items() if value), ""]
    lines += ["## Use", "", "```bash", f"mendlm pull {repo} --out {thing.kind}", "```", ""]
    lines += ["## What it holds", "", "```json", json.dumps(thing.told, indent=1, ensure_ascii=False), "```", ""]
    return "\n".join([*lines, "## Measured", "", *_measured(summary), ""])


def _measured(summary: Mapping[str, Any] | None) -> list[str]:
    if summary is None:
        return ["Nothing was measured, or no results were given."]
    of = "this method, edit by edit" if summary.get("num_edits") == 1 else f"{summary.get('num_edits')} edits at once"
    lines = [
        f"Of {of}: {summary.get('count')} requests of `{summary.get('data')}` (sha256 `{summary.get('data_sha256')}`), on "
        f"{summary.get('date')}, the model in {summary.get('dtype')}.",
        "",
        "| | before | after | 95 % interval |",
        "|---|---|---|---|",
    ]
    for key, called in MEASURED.items():
        found = summary.get(key)
        if isinstance(found, Mapping) and found.get("after") is not None:
            before, after, low, high = (found.get(part) for part in ("before", "after", "low", "high"))
            shown = [_share(before), _share(after), f"{_share(low)} to {_share(high)}" if low is not None else ""]
            lines.append(f"| {called} | {' | '.join(shown)} |")
    sources = [f"`{one['name']}` (sha256 `{one['sha256']}`)" for one in summary.get("locality_sources") or ()]
    lines += ["", f"Locality also on {', '.join(sources)}."] if sources else []
    lines += ["", *(f"- {note}" for note in summary["data_notes"])] if summary.get("data_notes") else []
    lines += ["", f"By `{summary['command']}`; all numbers are in `{RESULTS}`."] if summary.get("command") else []
    return lines


def _share(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float | int) else ""


@contextlib.contextmanager
def _asking(repo: str, endpoint: str | None) -> Iterator[None]:
    """What goes wrong while a hub is asked is a `HubError` that says what to do; the hub's client draws no bars."""
    import huggingface_hub

    errors: Any = huggingface_hub.errors
    bars: Any = huggingface_hub.utils
    place, drawing = endpoint or huggingface_hub.constants.ENDPOINT, not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError("the hub cannot be asked, since HF_HUB_OFFLINE is set; unset it where there is a network") from None
    except errors.HFValidationError as error:
        raise InputError(f"'{repo}' is no name of a repository ({error}); give it as OWNER/NAME") from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"the repository {repo} at {place} has no such revision; give a branch, a tag or a commit of it"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"there is no repository {repo} at {place}, or it is private or gated and your token may not read it; check the "
            "name, or log in by `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        hint = "; your token may not do this: give one that can write" if code in (401, 403) else ""
        raise HubError(f"{place} refused with status {code} for {repo}{hint} ({_first_line(error)})") from None
    except errors.HTTPError as error:
        raise HubError(f"{place} cannot be reached ({_first_line(error)}); check the network, or HF_ENDPOINT") from None
    finally:
        if drawing:
            bars.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
