"""Save a training whole, find the newest checkpoint, restore it to the bit.

A checkpoint is a folder checkpoint-<step> of safetensors and JSON; no pickle is written or read.
"""

import copy
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from utils.errors import UserError, warn
from utils.model.loading import refuse_not_finite
from utils.storage import (
    MANIFEST,
    discard,
    publish_files,
    publish_folder,
    read_json,
    read_sealed,
    verify_folder,
    write_json,
)
from utils.training.metrics import RESULT_NAMES

FORMAT = 1
STATE = "trainer_state.json"
OPTIMIZER, RANDOM = "optimizer.safetensors", "rng_state.safetensors"
# What a run did that was begun before the flag was there.
BEFORE_THE_FLAG = {"copy_samples": 0, "compile": False}
OTHER_BYTES = 8_000_000  # tokenizer, configs and random state of a checkpoint, generously


@dataclass
class TrainState:
    """What a run knows besides weights, optimizer and random state.

    step counts optimizer updates done, tokens those trained on, seconds those spent in all sittings;
    evaluated_step is the last step that was scored to its end, machine what bit identity depends on.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = -1
    best_step: int = 0
    base_metrics: dict = field(default_factory=dict)
    best_metrics: dict = field(default_factory=dict)
    evals_without_gain: int = 0
    finished: bool = False
    machine: dict = field(default_factory=dict)


def save_checkpoint(output_dir: Path, model, tokenizer, optimizer, state: TrainState, keep: int) -> Path:
    """Write checkpoint-<step>, then remove all but the newest `keep`."""
    refuse_not_finite(model, optimizer)
    folder = output_dir / f"checkpoint-{state.step}"
    # A step that is saved already differs in trainer_state.json alone: at every moment one of the two is whole.
    publish = publish_files if folder.is_dir() and check_checkpoint(folder) is None else publish_folder
    with publish(folder, {"format": FORMAT}, checkpoint_bytes(model), "a checkpoint") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_optimizer(model, optimizer, partial / OPTIMIZER)
        save_random_state(partial / RANDOM)
        write_json(partial / STATE, asdict(state))
    remove_older(folder, keep)
    return folder


def remove_older(folder: Path, keep: int) -> None:
    """Remove checkpoints but this one and the `keep` - 1 before it; a newer one is damaged, and not counted."""
    saved = list_checkpoints(folder.parent)
    for old in saved[saved.index(folder) :][keep:]:
        discard(old)


def checkpoint_bytes(model) -> int:
    """Return about how many bytes a checkpoint takes: weights and AdamW's two averages."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters()) + OTHER_BYTES


def save_best(output_dir: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Put a model, as save_pretrained writes it, and its tokenizer at the root of the output folder.

    Args:
        output_dir: receives the files, and a manifest of them.
        model: saved in dtype; the model itself stays as it is.
        tokenizer: saved beside it.
        dtype: of the written weights.
    """
    # A copy keeps tied weights tied, so that they are written once.
    written = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    refuse_not_finite(written)
    with publish_files(output_dir, {"format": FORMAT}, checkpoint_bytes(model) // 3, "the model") as partial:
        written.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def describe_machine(plan) -> dict:
    """Return what must be equal for a continued run to be equal to the bit."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": plan.device.type,
            "processor": platform.machine(), "layers": plan.layers,
            "micro_batch_size": plan.micro_batch_size}  # fmt: skip


def record_machine(state: TrainState, plan) -> None:
    """Put the machine into the state, and warn when the run was begun on another."""
    machine, before = describe_machine(plan), state.machine
    changed = [f"{name} {now}, was {before[name]}" for name, now in machine.items() if before.get(name, now) != now]
    if changed:
        warn(f"not bit-identical from here: {'; '.join(changed)}")
    state.machine = machine


def refuse_other_settings(path: Path, settings: dict) -> None:
    """Refuse to continue a run with other settings than run_config.json says it has.

    Args:
        path: the run's run_config.json.
        settings: what shapes the result now; hashes among them end in _sha256.
    """
    before = read_json(path).get("settings")
    for name, now in settings.items():
        was = before.get(name, BEFORE_THE_FLAG.get(name)) if isinstance(before, dict) else None
        if was != now:
            what = f"--{name.replace('_', '-')} {now} but the run has {was}"
            if name.endswith("_sha256"):
                kind = {"data_sha256": "data", "base_sha256": "base model"}[name]
                what = f"{kind} differs from the run's (sha256 {now[:8]} not {str(was)[:8]})"
            raise UserError(f"resume: {what}; use the same, another --output-dir, or --overwrite")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List checkpoint folders, newest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def find_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint whose every file is as it was written.

    Raises:
        UserError: there are checkpoints, and none is usable.
    """
    reasons = []
    for folder in list_checkpoints(output_dir):
        reason = check_checkpoint(folder)
        if reason is None:
            if reasons:
                warn(f"{reasons[0]}; resuming from {folder.name}")
            return folder
        reasons.append(f"{folder.name} unusable ({reason.replace(f'{folder}/', '')})")
    if reasons:
        listed = ", ".join(reasons)
        raise UserError(f"output-dir: {len(reasons)} checkpoints, none usable; --overwrite starts anew: {listed}")
    return None


def check_checkpoint(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None.

    Raises:
        UserError: it is of a newer format; an older one beside it would lose what is newer.
    """
    try:
        made = read_sealed(folder).get("format")
        reason = verify_folder(folder)
        if reason is None and read_state(folder).step != int(folder.name.split("-")[1]):
            reason = f"{STATE} is of another step"
        lacking = [name for name in (OPTIMIZER, RANDOM) if not (folder / name).is_file()]
        if reason is None and lacking:
            reason = f"{lacking[0]} is missing"
    except UserError as error:
        return str(error)
    if isinstance(made, int) and made > FORMAT:
        raise UserError(f"{folder}: format {made} is newer than this program ({FORMAT}); use the one that wrote it")
    return reason if isinstance(made, int) else f"{folder / MANIFEST} is damaged: no format"


def read_state(folder: Path) -> TrainState:
    """Read trainer_state.json.

    Raises:
        UserError: a field lacks, is unknown, of another type, or no number that a run gives.
    """
    values, types = read_json(folder / STATE), {name: type(value) for name, value in asdict(TrainState()).items()}
    fits = {name: type(value) for name, value in values.items()} == types
    if fits:
        base, best = values["base_metrics"], values["best_metrics"]
        numbers = [value for value in values.values() if isinstance(value, int | float)]
        numbers += [*base.values(), *best.values()]
        fits = all(isinstance(value, int | float) and abs(value) < 2**63 for value in numbers)  # false for NaN too
        fits = fits and {*base, *best} <= set(RESULT_NAMES)
    if not fits:
        raise UserError(f"{folder / STATE} is damaged: its fields are not {', '.join(types)}")
    return TrainState(**values)


def save_optimizer(model, optimizer, path: Path) -> None:
    """Write AdamW's two averages and step count of every parameter, under the parameter's name."""
    from safetensors.torch import save_file

    tensors = {
        f"{key}/{name}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, path)


def restore_optimizer(model, optimizer, path: Path) -> None:
    """Give AdamW back what save_optimizer wrote.

    Raises:
        UserError: a tensor has another shape than its parameter; AdamW itself would accept it.
    """
    tensors = read_tensors(path)
    for name, parameter in model.named_parameters():
        entry = {key: tensors.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if all(value is None for value in entry.values()):
            continue
        for key, value in entry.items():
            expected = torch.Size([]) if key == "step" else parameter.shape
            if value is None or value.shape != expected:
                found = "missing" if value is None else "x".join(map(str, value.shape))
                raise UserError(f"{path}: {key} of {name} is {found}, expected {'x'.join(map(str, expected))}")
        # Fused AdamW on a GPU keeps its step counts there, on a CPU they stay on the CPU.
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in entry.items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def save_random_state(path: Path) -> None:
    """Write the state of torch's generators, which dropout draws from."""
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, path)


def restore_random_state(path: Path) -> None:
    """Give torch's generators back the state that save_random_state wrote.

    Raises:
        UserError: the state has another size than this PyTorch's.
    """
    states = read_tensors(path)
    expected = len(torch.get_rng_state())
    if "cpu" not in states or len(states["cpu"]) != expected:
        raise UserError(f"{path}: {len(states.get('cpu', []))} bytes, expected {expected}")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
