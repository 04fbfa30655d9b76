"""Save a training whole, find the newest checkpoint, restore it to the bit.

A checkpoint is a folder checkpoint-<step> of safetensors and JSON; no pickle is written or read.
"""

import copy
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from utils.cli import UserError, warn
from utils.files import (
    MANIFEST,
    describe_files,
    publish_files,
    publish_folder,
    read_json,
    verify_files,
    write_json,
)

FORMAT = 1
STATE = "trainer_state.json"


@dataclass
class TrainState:
    """What a run knows besides weights, optimizer and random state.

    step counts optimizer updates done, tokens those trained on, seconds those spent in all sittings.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    base_metrics: dict = field(default_factory=dict)
    best_metrics: dict = field(default_factory=dict)
    evals_without_gain: int = 0
    finished: bool = False


def save_checkpoint(output_dir: Path, model, tokenizer, optimizer, state: TrainState, keep: int) -> Path:
    """Write checkpoint-<step>, then remove all but the newest `keep`."""
    folder = output_dir / f"checkpoint-{state.step}"
    with publish_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_optimizer(model, optimizer, partial / "optimizer.safetensors")
        save_random_state(partial / "rng_state.safetensors")
        write_json(partial / STATE, asdict(state))
        write_json(partial / MANIFEST, {"format": FORMAT, "files": describe_files(partial)})
    for old in list_checkpoints(output_dir)[keep:]:
        shutil.rmtree(old)
    return folder


def save_best(output_dir: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Put a model, as save_pretrained writes it, and its tokenizer at the root of the output folder.

    Args:
        output_dir: receives the files.
        model: saved in dtype; the model itself stays as it is.
        tokenizer: saved beside it.
        dtype: of the written weights.
    """
    # A copy keeps tied weights tied, so that they are written once.
    written = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    with publish_files(output_dir) as partial:
        written.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


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
        reasons.append(f"{folder.name} unusable ({reason})")
    if reasons:
        raise UserError(f"output-dir: {len(reasons)} checkpoints, none usable: {reasons[0]}; use --overwrite")
    return None


def check_checkpoint(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None."""
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["format"] > FORMAT:
            return f"format {manifest['format']} is newer than this program ({FORMAT})"
        return verify_files(folder, manifest["files"])
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return str(error)


def read_state(folder: Path) -> TrainState:
    """Read trainer_state.json."""
    return TrainState(**read_json(folder / STATE))


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
    from safetensors.torch import load_file

    tensors = load_file(path)
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
    from safetensors.torch import load_file

    states = load_file(path)
    expected = len(torch.get_rng_state())
    if "cpu" not in states or len(states["cpu"]) != expected:
        raise UserError(f"{path}: {len(states.get('cpu', []))} bytes, expected {expected}")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
