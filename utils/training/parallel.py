"""Several processes: torch.distributed. With one process, these functions return what they were given.

torchrun starts N processes. Each trains on 1/N of every batch and holds 1/N of the model (sharding.py); process 0 alone
reads weights and writes files. Losses equal those of one process up to rounding.
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import EXIT_MACHINE, UserError, lost_process, resume_advice
from utils.storage import diff_settings

SPEAKER = "speaker"  # the store's key for the process whose error line is printed
_store = None


@contextmanager
def joined(device: torch.device, timeout: int) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yield the device of this one.

    Args:
        timeout: seconds after which a process that does not answer ends all.
    Raises:
        UserError: the devices are too few; or (exit status 3) another process has ended or does not answer.
    """
    device = _join(device, timeout)
    try:
        yield device
    except Exception as error:
        reason = None if isinstance(error, UserError) else lost_process(error)
        if reason is None:
            raise
        raise UserError(f"{reason}; {resume_advice()}", EXIT_MACHINE) from error
    if size() > 1:  # not after an error: leaving in order would wait for the others, who notice that it has ended
        dist.destroy_process_group()


def _join(device: torch.device, timeout: int) -> torch.device:
    global _store
    n_processes, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if n_processes == 1:
        return device
    if device.type == "mps" or device.index is not None:
        raise UserError(f"--device {device}: {n_processes} processes need --device cpu or cuda, one GPU for each")
    if device.type == "cuda":
        if here > torch.cuda.device_count():
            raise UserError(f"{here} processes but {torch.cuda.device_count()} GPU; use fewer, or --device cpu")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    wait = timedelta(seconds=timeout)
    _store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    dist.init_process_group(store=_store, rank=rank, world_size=world_size, timeout=wait)
    torch.set_autocast_cache_enabled(False)  # what it keeps, weights in bf16, would be whole in every process
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return device


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Return whether this process writes the files."""
    return rank() == 0


def claim_error_line() -> bool:
    """Claim the one error line of all processes; return whether this process is the first that does."""
    if _store is None:
        return os.environ.get("RANK", "0") == "0"  # all processes fail alike before they have met
    try:
        return _store.compare_set(SPEAKER, "", str(rank())).decode() == str(rank())
    except RuntimeError:  # the store's host is gone
        return True


def share(blocks: list[int]) -> list[int]:
    """Return this process's part of a batch's blocks: every N-th, but one block at least, for it has to take part."""
    return blocks[rank() :: size()] or blocks[:1]


def split_passes(mine: torch.Tensor, n_blocks: int, micro_batch_size: int) -> list[tuple[torch.Tensor, float]]:
    """Split a process's part of a batch of n_blocks into as many forward passes as every process has.

    Returns:
        Pairs of (B, T) ids and the number of blocks that count: 0 in a pass that is made for the others only.
    """
    own = len(range(rank(), n_blocks, size()))
    parts = [(part, len(part)) for part in mine[:own].split(micro_batch_size) if len(part)]
    most = math.ceil(math.ceil(n_blocks / size()) / micro_batch_size)
    return parts + [(mine[:1], 0)] * (most - len(parts))


def share_batches(n_blocks: int, batch_size: int) -> tuple[list[int], int]:
    """Return the blocks that this process scores, in whole batches and as many as every process, and how many count.

    A batch has the same blocks for any number of processes: how a loss is rounded depends on the blocks beside it.
    """
    starts = range(0, n_blocks, batch_size)
    mine = list(starts[rank() :: size()])
    padded = [*mine, 0][: math.ceil(len(starts) / size())]
    blocks = [range(start, min(start + batch_size, n_blocks)) for start in padded]
    return list(itertools.chain(*blocks)), sum(map(len, blocks[: len(mine)]))


def join_batches(losses: list[float], batch_size: int) -> list[float]:
    """Return the losses of all blocks, in their order, from what each process has of share_batches."""
    if size() == 1:
        return losses
    parts = [part.tolist() for part in gather_rows(torch.tensor(losses, dtype=torch.float64))]
    rounds = range(0, max(map(len, parts)), batch_size)
    return [loss for start in rounds for part in parts for loss in part[start : start + batch_size]]


def sum_over(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def least(value: int) -> int:
    """Return the smallest value of all processes."""
    return _reduce(value, dist.ReduceOp.MIN)


def _reduce(value: int, operation: dist.ReduceOp) -> int:
    if size() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, operation)
    return int(tensor)


def from_main(value: Any) -> Any:
    """Return the value of process 0, anything that JSON holds, in every process."""
    if size() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    dist.broadcast(length, 0)
    data = data if is_main() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def refuse_other_command(flags: dict[str, Any], data_sha256: str) -> None:
    """Refuse other flags or blocks than those of process 0; a folder may have another path on another machine."""
    flags = {name: value for name, value in flags.items() if not isinstance(value, Path)} | {"data_dir": data_sha256}
    changed = diff_settings(from_main(flags), flags)
    if changed:
        flag, first, own = f"--{changed[0].replace('_', '-')}", *changed[1:]
        raise UserError(f"process {rank()} has {flag} {own}, process 0 has {first}; give all the same flags and data")


def gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Return the (..., D) CPU tensors of all processes, of any number of rows, in the order of the processes."""
    if size() == 1:
        return [rows]
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(size())]
    dist.all_gather(counts, torch.tensor(len(rows)))
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


class AgreedSignal:
    """A signal that any process has received. Every process has to ask as often."""

    def __init__(self, own) -> None:
        self.own = own

    @property
    def number(self) -> int:
        return _reduce(self.own.number, dist.ReduceOp.MAX)

    def __bool__(self) -> bool:
        return self.number > 0
