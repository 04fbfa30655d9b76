"""Forecast time, memory and disk of a run before it starts, and choose the micro-batch that fits.

Measures a few steps that leave no trace in weights, optimizer or RNG state.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from utils.data.blocks import Blocks
from utils.errors import warn
from utils.evaluation.generation import Decoding, generate_ids
from utils.model.loading import own_part
from utils.training import parallel, sharding
from utils.training.checkpoint import best_bytes, checkpoint_bytes
from utils.training.optim import clip_gradients, set_lr
from utils.training.random_state import keep_random_state
from utils.training.setup import TrainingSetup

# More tokens per forward pass are no faster: the matrix products are large enough. notes/03_training_loop.md.
ENOUGH_TOKENS = {"cpu": 2048}
ENOUGH_TOKENS_ELSEWHERE = 16_384
USABLE = 0.8  # share of the free memory; other programs need some too
TEMPORARY = 1.25  # memory of a backward pass, as a multiple of the activations kept for it
# Memory of a group of weights that is gathered for a pass, as a multiple of their size: weights, gradients and what is
# sent and received. Measured with gloo.
GATHERED = 6
# The first step allocates the gradients, whose memory AdamW's averages then take: the second allocates them again.
WARM_UP_STEPS, CALIBRATION_STEPS = 2, 4
# A long run is measured for longer than four steps, up to this share of it and this many seconds.
CALIBRATION_SHARE, CALIBRATION_SECONDS = 0.01, 10
CALIBRATION_TOKENS = 8
SAVED_BYTES_PER_SECOND = 6e8  # written, hashed and synced on a solid-state disk; measured
# Where a checkpoint takes a second or more, fifty times as long is trained between two.
NOTICED_SECONDS, SAVING_FACTOR = 1.0, 50
PROGRAM_BYTES = 500_000_000  # resident memory before a model is loaded; measured
LATER_BYTES = 60_000_000  # resident memory added after the forecast, matplotlib among it; measured


@dataclass(frozen=True)
class Forecast:
    """What a run takes from its next step to its end, and after how many steps it should save."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    steps: int
    epochs: float
    save_every: int

    def __str__(self) -> str:
        each = " in each process" if parallel.size() > 1 else ""
        return (f"about {format_seconds(self.seconds)} for {self.steps:,} steps ({self.epochs:.3g} epochs), "
                f"{self.peak_bytes / 1e9:.3g} GB of memory{each}, {self.disk_bytes / 1e9:.2f} GB of disk")  # fmt: skip


def format_seconds(seconds: float) -> str:
    """Format a duration: 45 s, 2 min 30 s, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def free_bytes(device: torch.device) -> int:
    """Return the memory available: of a GPU, else this process's share of what machine and container have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        free = 1024 * _read_numbers(meminfo)["MemAvailable:"]
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()).isdecimal():
        cached = _read_numbers(group / "memory.stat").get("inactive_file", 0)
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + cached)
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _read_numbers(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # freed memory stays in its pools
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_activations(model, input_ids: torch.Tensor, autocast: Callable[[], AbstractContextManager]) -> int:
    """Return the bytes that a forward pass over (B, T) ids keeps for its backward pass, without the weights."""
    weights = {own_part(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> None:
        # The storage alone, without its graph: a graph that keeps its own result is never freed.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with autocast(), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        model(input_ids=input_ids, labels=input_ids, use_cache=False)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


def largest_group(model) -> int:
    """Return the bytes of the largest group of weights that several processes gather together; 0 for one process."""
    seen, sizes = set(), [0]
    for group in reversed(sharding.groups(model)):  # the whole model last: the rest of its weights is a group
        own = set(group.parameters()) - seen
        seen |= own
        sizes.append(sum(p.numel() * p.element_size() for p in own))
    return max(sizes)


def choose_micro_batch(
    model, data: Blocks, autocast: Callable[[], AbstractContextManager], batch_size: int, given: int | None
) -> int:
    """Return the blocks per forward pass: as many as are useful and fit into memory, batch_size at most.

    Args:
        given: asked for by flag or by the run that is resumed; a warning tells when it does not fit.
    """
    enough = max(1, ENOUGH_TOKENS.get(model.device.type, ENOUGH_TOKENS_ELSEWHERE) // data.block_size)
    blocks = data.train[:2]["input_ids"].to(model.device)
    with keep_random_state(model.device):
        one, both = (count_activations(model, part, autocast) for part in (blocks[:1], blocks))
    per_block = max(both - one, 1) if len(blocks) == 2 else one  # weights in bf16 are kept in both
    # Gradients, averages, weights in bf16, a margin.
    training = (checkpoint_bytes(model) + best_bytes(model)) // parallel.size() + GATHERED * largest_group(model)
    free = free_bytes(model.device)
    fits = max(0, math.floor((USABLE * free - training) / (TEMPORARY * per_block)))
    wanted = min(batch_size, given or enough)
    if wanted > fits and (given or not fits):
        needed = (training + TEMPORARY * per_block * (wanted if given else 1)) / 1e9
        advice = f"--micro-batch-size {fits} fits" if fits else "a smaller model or --block-size may fit"
        warn(f"memory is short: about {needed:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
             f"{advice}")  # fmt: skip
    return parallel.least(wanted if given else max(1, min(wanted, fits)))


def read_clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def forecast_run(
    setup: TrainingSetup, model, optimizer, data: Blocks, first_step: int, forward_backward: Callable
) -> Forecast:
    """Measure four steps or more, an evaluation and some tokens; model, optimizer and RNG state stay as they are.

    Args:
        optimizer: of the run, before its state is restored.
        first_step: steps already done.
        forward_backward: the loop's function of model, input_ids and share of the step's blocks.
    """
    n_left = setup.max_steps - first_step
    with keep_random_state(setup.device):
        block_seconds, step_seconds = time_steps(setup, model, optimizer, data, forward_backward, n_left)
        evaluating = time_evaluation(setup, model, data)
    blocks_left = sum(len(batch) for batch in setup.order.batches(first_step, setup.max_steps))
    seconds = blocks_left * block_seconds / parallel.size() + n_left * step_seconds
    checkpoint, best, keep = checkpoint_bytes(model), best_bytes(model), setup.keep_checkpoints
    saving, publishing = checkpoint / SAVED_BYTES_PER_SECOND, best / SAVED_BYTES_PER_SECOND
    save_every = setup.save_every or setup.eval_every
    if not setup.save_every and n_left and saving > NOTICED_SECONDS:
        between = setup.eval_every * seconds / max(1, n_left)
        save_every *= math.ceil(SAVING_FACTOR * saving / between)
    n_evaluations = count_due(first_step, setup.max_steps, setup.eval_every)
    n_saves = count_due(first_step, setup.max_steps, save_every)
    seconds += n_evaluations * (evaluating + publishing) + n_saves * saving
    seconds += evaluating * (first_step == 0)  # the base model is not saved
    # While a checkpoint or the best model is replaced, the old one is still there.
    disk = best + max(checkpoint * min(n_saves, keep + 1), checkpoint * min(n_saves - 1, keep) + best)
    peak = peak_bytes(setup.device)
    if setup.device.type == "cpu":
        peak = max(peak, saving_bytes(model)) + LATER_BYTES
    return Forecast(seconds, peak, disk, n_left, blocks_left / len(data.train), parallel.from_main(save_every))


def saving_bytes(model) -> int:
    """Return the memory of process 0 of several while it saves: whole weights, beside its part of all; else 0."""
    best = best_bytes(model)
    own = (best + 2 * checkpoint_bytes(model) // 3) // parallel.size()
    return PROGRAM_BYTES + own + best if parallel.size() > 1 else 0


def count_due(step: int, last: int, interval: int) -> int:
    """Count the steps after `step` that are a multiple of the interval or the last one."""
    return last // interval - step // interval + (last % interval > 0)


def time_steps(setup: TrainingSetup, model, optimizer, data, forward_backward, n_left: int) -> tuple[float, float]:
    """Return the seconds per block of forward and backward pass, and those of the rest of a step.

    AdamW works with a learning rate of zero and is emptied afterwards, so that no weight changes.
    """
    blocks = data.train[: setup.micro_batch_size]["input_ids"].to(model.device)
    passes, rests, n_micro_batches = [], [], n_left * setup.order.blocks_per_step / len(blocks)
    while len(passes) < CALIBRATION_STEPS or parallel.from_main(
        sum(passes[WARM_UP_STEPS:]) < min(CALIBRATION_SHARE * passes[-1] * n_micro_batches, CALIBRATION_SECONDS)
    ):
        started = read_clock(setup.device)
        with setup.autocast():
            forward_backward(model, blocks, 1.0)
        passed = read_clock(setup.device)
        if clip_gradients(model, setup.max_grad_norm).isfinite():
            set_lr(optimizer, 0.0)  # else the loop refuses the gradient, and says so
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        passes.append(passed - started)
        rests.append(read_clock(setup.device) - passed)
    optimizer.state.clear()
    return mean(passes[WARM_UP_STEPS:]) / len(blocks), mean(rests[WARM_UP_STEPS:])


def time_evaluation(setup: TrainingSetup, model, data: Blocks) -> float:
    """Return the seconds of an evaluation, extrapolated from a few blocks and a few tokens."""
    if not len(data.validation):
        return 0.0
    blocks = data.validation[: setup.eval_batch_size]["input_ids"].to(model.device)
    model.eval()
    for _ in range(2):  # the first pass allocates
        started = read_clock(setup.device)
        with torch.no_grad(), setup.autocast():
            model(input_ids=blocks, labels=blocks, use_cache=False)
        seconds = (read_clock(setup.device) - started) * len(data.validation) / len(blocks)
    model.train()
    monitor = setup.copy_monitor
    for prompts, new_tokens in ((monitor.prompts, monitor.new_tokens), ([setup.sample_ids], setup.sample_tokens)):
        if prompts and new_tokens:
            for n_tokens in (1, min(new_tokens, CALIBRATION_TOKENS)):  # on a GPU, the first call loads what it runs
                few, started = Decoding(max_new_tokens=n_tokens), read_clock(setup.device)
                with sharding.unsharded(model):
                    generate_ids(model, monitor.eos_token_id, prompts, [0] * len(prompts), few, setup.autocast)
            seconds += (read_clock(setup.device) - started) * new_tokens / n_tokens
    return seconds
