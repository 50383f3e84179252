"""Several processes at one piece of work: which of them this is, and what they add up or gather.

A launcher (`accelerate launch`, `torchrun`) starts the processes and tells each its place in its environment; the first
question here joins them. Without a launcher there is one process, and every function is what it is for one. Those that
talk to the others must be called by all processes, in the same order. They exchange tensors and JSON, never pickle.

Imports torch only when it is asked something that needs it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mendlm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int]:
    """This process's number and how many there are, as the launcher says; (0, 1) without one."""
    if not all(os.environ.get(name) for name in _LAUNCHER):
        return 0, 1
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise InputError(f"the launcher says RANK={rank} and WORLD_SIZE={size}; RANK counts from 0 to below WORLD_SIZE")
    return int(rank), int(size)


def local_rank() -> int:
    """This process's number on its machine, which is also that of its card."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def _joined() -> Any:
    """`torch.distributed`, with all processes joined; None where this one is alone."""
    import torch
    from torch import distributed

    if not distributed.is_available():
        return None
    if not distributed.is_initialized():
        if launched()[1] == 1:
            return None
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())
    return distributed if distributed.get_world_size() > 1 else None


def count() -> int:
    """How many processes there are."""
    group = _joined()
    return int(group.get_world_size()) if group else 1


def rank() -> int:
    """This process's number; 0 is the main one."""
    group = _joined()
    return int(group.get_rank()) if group else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def mine(number: int) -> bool:
    """Whether a piece of work, by its number, is this process's: they take turns."""
    return number % count() == rank()


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, of one shape, in each of them."""
    group = _joined()
    if group is None:
        return tensor
    summed = tensor.detach().clone()
    group.all_reduce(summed)
    return summed


def follow_main(tensors: Iterable[Tensor]) -> None:
    """Fill the tensors with those of the main process."""
    group = _joined()
    for tensor in tensors if group else ():
        group.broadcast(tensor.detach(), 0)


def gathered(content: Any) -> list[Any]:
    """What each process has to say, in their order: JSON, as it is after a journey through a file."""
    group = _joined()
    if group is None:
        return [json.loads(json.dumps(content))]
    import torch

    device = "cpu" if "gloo" in group.get_backend_config() else "cuda"
    said = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(count())]
    group.all_gather(sizes, torch.tensor([len(said)], device=device))
    lengths = [int(size) for size in sizes]
    heard = [torch.zeros(max(lengths), dtype=torch.uint8, device=device) for _ in lengths]
    group.all_gather(heard, torch.cat([said, said.new_zeros(max(lengths) - len(said))]))
    return [json.loads(one[:length].cpu().numpy().tobytes()) for one, length in zip(heard, lengths, strict=True)]


def wait() -> None:
    """Go on when all processes have come here."""
    gathered(None)


def some(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(gathered(bool(flag)))


def agree(given: Mapping[str, Any]) -> None:
    """Raise `InputError`, in every process, unless all were given the same."""
    first, *others = gathered(given)
    for number, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise InputError(
                    f"process {number} has {name} = {other.get(name)}, the main process {value}; "
                    "start all processes, on all machines, with the same command, files and folder"
                )


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process of each machine does what is inside before the others do it: they find it done."""
    if count() > 1 and local_rank() > 0:
        wait()
    try:
        yield
    finally:
        if count() > 1 and local_rank() == 0:
            wait()
