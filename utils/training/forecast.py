"""Say before a training what it will take: time, memory, disk; choose the micro-batch that fits.

Owns measuring a few steps that leave no trace. What is trained, and how, is the script's.
"""

import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import warn
from utils.evaluation.generation import Decoding, generate_ids
from utils.model.hub import position_limit
from utils.training.checkpoint import checkpoint_bytes
from utils.training.optim import set_lr

# More tokens at once are no faster: the matrix products are large enough. notes/03_training_loop.md has the table.
ENOUGH_TOKENS = {"cpu": 2048}
ENOUGH_TOKENS_ELSEWHERE = 16_384
USABLE = 0.8  # of the free memory: other programs use it too
TEMPORARY = 1.25  # what a backward pass takes, in times of what the forward pass has kept for it
CALIBRATION_STEPS = 3
# Of the run: a long one is measured for longer than three steps, but nobody waits long for a forecast.
CALIBRATION_SHARE, CALIBRATION_SECONDS = 0.01, 10
CALIBRATION_TOKENS = 8
SAVED_BYTES_PER_SECOND = 6e8  # written, hashed and synced; a solid-state disk, measured
# A checkpoint that takes a second or more is written when fifty times as long has been trained.
NOTICED_SECONDS, SAVING_FACTOR = 1.0, 50
LATER_BYTES = 60_000_000  # resident: what a peak rises by after calibrating, importing matplotlib among it; measured


@dataclass
class Forecast:
    """What a run will take from its next step to its end."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    steps: int
    epochs: float

    def __str__(self) -> str:
        return (f"about {format_seconds(self.seconds)} for {self.steps:,} updates ({self.epochs:.3g} epochs), "
                f"{self.peak_bytes / 1e9:.3g} GB of memory, {self.disk_bytes / 1e9:.2f} GB of disk")  # fmt: skip


def format_seconds(seconds: float) -> str:
    """Write a duration as a person says it: 45 s, 2 min 30 s, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken: a GPU's, else the machine's, or the container's if that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        free = 1024 * _read_numbers(meminfo)["MemAvailable:"]
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()).isdecimal():
        cached = _read_numbers(group / "memory.stat").get("inactive_file", 0)
        free = min(free, int(limit) - int((group / "memory.current").read_text()) + cached)
    return max(0, free)


def _read_numbers(path: Path) -> dict[str, int]:
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has had: on a GPU there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_activations(model, plan, input_ids: torch.Tensor) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, weights left out.

    Args:
        input_ids: (B, T).
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> None:
        # The memory alone, without its graph: a graph that keeps its own result is never freed.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with plan.autocast(), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        model(input_ids=input_ids, labels=input_ids, use_cache=False)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def pick_micro_batch(args, plan, model, data, state) -> int:
    """Return how many blocks go through the model at once: as many as are of use, and fit into the memory.

    Args:
        args: the flags batch_size and micro_batch_size (None: chosen here).
        plan: the run's TrainingSetup.
        model: on its device.
        data: Blocks.
        state: TrainState; a run that goes on keeps what it began with, to the bit.
    """
    enough = max(1, ENOUGH_TOKENS.get(plan.device.type, ENOUGH_TOKENS_ELSEWHERE) // data.block_size)
    blocks = data.train[:2]["input_ids"].to(model.device)
    with torch.random.fork_rng():
        one, both = (count_activations(model, plan, part) for part in (blocks[:1], blocks))
    a_block = max(both - one, 1) if len(blocks) == 2 else one  # weights in bf16 are kept in both
    training = 4 * checkpoint_bytes(model) // 3  # gradients, two averages, weights in bf16 and something over
    fits = max(0, math.floor((USABLE * free_bytes(plan.device) - training) / (TEMPORARY * a_block)))
    before = state.machine.get("micro_batch_size", args.batch_size) if state.machine else None
    given = args.micro_batch_size or before
    wanted = min(args.batch_size, given or enough)
    if wanted > fits:
        needed = (training + TEMPORARY * a_block * (wanted if given else 1)) / 1e9
        have = f"{free_bytes(plan.device) / 1e9:.1f} GB are free"
        if given or not fits:
            advice = f"--micro-batch-size {fits} fits" if fits else "a smaller model or --block-size may fit"
            warn(f"memory is short: about {needed:.1f} GB are needed, {have}; {advice}")
    return wanted if given else max(1, min(wanted, fits))


class Stopwatch:
    """Seconds since the last look, when the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.look()

    def look(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = getattr(self, "last", 0.0), time.perf_counter()
        return self.last - before


def forecast_run(args, plan, model, optimizer, data, step: int, forward_backward) -> Forecast:
    """Measure three steps and more, an evaluation and some tokens; model, optimizer and random state stay as they are.

    Args:
        args: the flags about evaluation, samples and checkpoints.
        plan: the run's TrainingSetup; its save_every is set here when a checkpoint takes long.
        model, optimizer: of the run, before its state is restored.
        data: Blocks.
        step: updates done before.
        forward_backward: the loop's own function of model, input_ids and number of blocks.
    """
    watch, n_left = Stopwatch(plan.device), plan.max_steps - step
    with torch.random.fork_rng():
        block_seconds, update_seconds = time_steps(args, plan, model, optimizer, data, forward_backward, n_left)
        evaluating = time_evaluation(args, plan, model, data, watch)
    blocks_left = sum(len(batch) for batch in plan.order.batches(step, plan.max_steps))
    seconds = blocks_left * block_seconds + n_left * update_seconds
    saving = checkpoint_bytes(model) / SAVED_BYTES_PER_SECOND
    if not args.save_every and saving > NOTICED_SECONDS:
        between = plan.eval_every * seconds / max(1, n_left)
        plan.save_every = plan.eval_every * math.ceil(SAVING_FACTOR * saving / between)
    n_evaluations = count_due(step, plan.max_steps, plan.eval_every)
    n_saves = count_due(step, plan.max_steps, plan.save_every)
    n_of_base = int(step == 0)  # evaluated, not saved
    seconds += (n_evaluations + n_of_base) * evaluating + n_evaluations * saving / 3 + n_saves * saving
    disk = checkpoint_bytes(model) * (min(n_saves, args.keep_checkpoints + 1) + 1 / 3)
    peak = peak_bytes(plan.device) + (0 if plan.device.type == "cuda" else LATER_BYTES)
    return Forecast(seconds, peak, int(disk), n_left, blocks_left / len(data.train))


def count_due(step: int, last: int, interval: int) -> int:
    """Return how often something is done after a step that is due at every interval, and at the last step."""
    return last // interval - step // interval + (last % interval > 0)


def time_steps(args, plan, model, optimizer, data, forward_backward, n_left: int) -> tuple[float, float]:
    """Return seconds a block of forward and backward pass, and seconds of the rest of an update.

    AdamW works with a learning rate of zero and is emptied again, so that no weight changes.
    """
    blocks = data.train[: plan.micro_batch_size]["input_ids"].to(model.device)
    passes, updates = [], []
    watch, n_micro_batches = Stopwatch(plan.device), n_left * plan.order.blocks_per_step / len(blocks)
    while len(passes) < CALIBRATION_STEPS or sum(passes[1:]) < min(
        CALIBRATION_SHARE * passes[-1] * n_micro_batches, CALIBRATION_SECONDS
    ):
        with plan.autocast():
            forward_backward(model, blocks, len(blocks))
        passes.append(watch.look())
        if torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).isfinite():
            set_lr(optimizer, 0.0)  # else the loop refuses the gradient, and says so
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates.append(watch.look())
    optimizer.state.clear()
    # The first has made room for all the others.
    return sum(passes[1:]) / len(passes[1:]) / len(blocks), sum(updates[1:]) / len(updates[1:])


def time_evaluation(args, plan, model, data, watch: Stopwatch) -> float:
    """Return the seconds of an evaluation: a few blocks scored and a few tokens drawn, times what there is."""
    if not len(data.validation):
        return 0.0
    some = data.validation[: args.eval_batch_size]["input_ids"].to(model.device)
    model.eval()
    for _ in range(2):  # the first makes room
        watch.look()
        with torch.no_grad(), plan.autocast():
            model(input_ids=some, labels=some, use_cache=False)
        seconds = watch.look() * len(data.validation) / len(some)
    model.train()
    room = (position_limit(model.config.to_dict()) or args.sample_tokens + 1) - 1  # beside a prompt of one token
    drawn = [(plan.probe.prompts, plan.probe.new_tokens), ([[0]], min(args.sample_tokens, room))]
    for prompts, new_tokens in drawn:
        if prompts and new_tokens:
            few = Decoding(max_new_tokens=min(new_tokens, CALIBRATION_TOKENS))
            generate_ids(model, plan.probe.eos_token_id, prompts, [0] * len(prompts), few, plan.autocast)
            seconds += watch.look() * new_tokens / few.max_new_tokens
    return seconds
