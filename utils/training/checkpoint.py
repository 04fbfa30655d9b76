"""Save, find and restore checkpoints: folders checkpoint-<step> of safetensors and JSON, never a pickle.

Tensors are whole in the files, so a run of any number of processes resumes from them. Every process calls the functions
that save and restore; process 0 writes and reads.
"""

import copy
import platform
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from utils.errors import UserError, require_finite, warn
from utils.model.loading import refuse_not_finite
from utils.model.lora import has_adapter, save_adapter
from utils.storage import (
    MANIFEST,
    diff_settings,
    discard,
    open_tensors,
    publish_files,
    publish_folder,
    read_json,
    read_sealed,
    verify_folder,
    write_json,
    write_tensors,
)
from utils.training import parallel, sharding
from utils.training.metrics import RESULT_NAMES, RESULTS
from utils.training.random_state import save_random_state

FORMAT = 1
STATE = "trainer_state.json"
OPTIMIZER, RANDOM = "optimizer.safetensors", "rng_state.safetensors"
OTHER_BYTES = 8_000_000  # upper estimate for tokenizer, configs and RNG state


@dataclass
class TrainState:
    """State of a run besides weights, optimizer and RNG."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # trained on
    seconds: float = 0.0  # of all sessions
    evaluated_step: int = -1  # the last one whose evaluation finished
    best_step: int = 0
    base_metrics: dict = field(default_factory=dict)
    best_metrics: dict = field(default_factory=dict)
    evals_without_gain: int = 0
    finished: bool = False
    machine: dict = field(default_factory=dict)  # what bit identity depends on

    def record_evaluation(self, result: dict[str, float], max_copy_rate: float) -> bool:
        """Record an evaluation of the current step; return whether it is the best: copying first, then the loss.

        Without validation blocks the result is {} and every step counts as the best. A model with an eval/copy_rate
        above max_copy_rate is best only when all others exceed it too.
        """

        def rank(metrics: dict[str, float]) -> tuple[bool, float]:
            return metrics.get("eval/copy_rate", 0.0) > max_copy_rate, metrics["eval/loss"]

        require_finite(self.step, **{"validation loss": result.get("eval/loss", 0.0)})
        self.evaluated_step = self.step
        if self.step == 0:
            self.base_metrics = result
            return False
        self.evals_without_gain += 1
        better = not result or not self.best_metrics or rank(result) < rank(self.best_metrics)
        if better:
            self.best_step, self.best_metrics, self.evals_without_gain = self.step, result, 0
        return better


def save_checkpoint(output_dir: Path, model, tokenizer, optimizer, state: TrainState, keep: int) -> Path:
    """Write checkpoint-<step>, then remove all but the newest `keep` checkpoints."""
    refuse_not_finite(model, optimizer)
    folder = output_dir / f"checkpoint-{state.step}"
    # A step saved before differs in trainer_state.json only; replacing files keeps one of the two whole at any moment.
    publishing = nullcontext()
    if parallel.is_main():
        publish = publish_files if folder.is_dir() and check_checkpoint(folder) is None else publish_folder
        publishing = publish(folder, {"format": FORMAT}, checkpoint_bytes(model), "a checkpoint")
    with publishing as partial:
        _save_trained(model, partial)
        save_optimizer(model, optimizer, partial and partial / OPTIMIZER)
        save_random_state(partial and partial / RANDOM, model.device)
        if partial:
            tokenizer.save_pretrained(partial)
            write_json(partial / STATE, asdict(state))
    if parallel.is_main():
        remove_older(folder, keep)
    return folder


def _save_trained(model, folder: Path | None) -> None:
    if has_adapter(model):
        adapter = sharding.gather_weights(model, trained_only=True)
        if folder:
            save_adapter(model, adapter, folder)
    elif whole := sharding.gather_model(model):
        whole.save_pretrained(folder)


def remove_older(folder: Path, keep: int) -> None:
    """Remove all checkpoints except this one and the `keep` - 1 before it; newer ones are damaged and stay."""
    saved = list_checkpoints(folder.parent)
    for old in saved[saved.index(folder) :][keep:]:
        discard(old)


def checkpoint_bytes(model) -> int:
    """Estimate the bytes of a checkpoint: trained weights and AdamW's two averages."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) + OTHER_BYTES


def best_bytes(model) -> int:
    """Estimate the bytes of the best model at the root of the output folder."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) + OTHER_BYTES // 3


def save_best(output_dir: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Write model (weights in `dtype`, adapter merged and beside it) and tokenizer to the root of the output folder."""
    adapter = sharding.gather_weights(model, trained_only=True) if has_adapter(model) else {}
    if not (whole := sharding.gather_model(model)):
        return
    output_dir.mkdir(exist_ok=True)
    # A copy keeps tied weights tied, so that they are written once.
    written = whole if whole.dtype == dtype else copy.deepcopy(whole).to(dtype)
    refuse_not_finite(written)
    with publish_files(output_dir, {"format": FORMAT}, best_bytes(model), "the model") as partial:
        written.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if adapter:
            save_adapter(model, adapter, partial / "adapter")


def name_processor() -> str:
    """Return the processor's model where the system names it, else its architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found.group(1) if found else platform.machine()


def record_machine(state: TrainState, device: torch.device, dtype: str, micro_batch_size: int) -> None:
    """Record in the state what a bit-identical resume depends on, and warn where the run was started differently."""
    machine = {"processes": parallel.size(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "device": device.type, "dtype": dtype, "processor": name_processor(),
               "micro_batch_size": micro_batch_size}  # fmt: skip
    before, state.machine = state.machine, machine
    changed = [f"{name} {now}, was {before[name]}" for name, now in machine.items() if before.get(name, now) != now]
    if changed:
        warn(f"not bit-identical from here: {'; '.join(changed)}")


def refuse_other_settings(path: Path, settings: dict) -> None:
    """Raise UserError when the settings, of which hashes end in _sha256, differ from those in a run_config.json."""
    changed = diff_settings(read_json(path).get("settings"), settings)
    if changed:
        name, was, now = changed
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
    """Return the newest undamaged checkpoint, None without any; UserError if all are damaged."""
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
        raise UserError(f"output-dir: {len(reasons)} checkpoints, none usable; --overwrite starts a new run: {listed}")
    return None


def has_results(output_dir: Path) -> bool:
    """Say whether a run has saved something: a checkpoint, or the results that are written when it ends."""
    return bool(list_checkpoints(output_dir)) or (output_dir / RESULTS).is_file()


def read_end(output_dir: Path) -> dict:
    """Return step and finished of a finished run whose checkpoints were removed, {} for a run that has saved none.

    UserError for an unfinished one: nothing is left to resume from, and a new run would replace its model.
    """
    if not has_results(output_dir):
        return {}
    results = read_json(output_dir / RESULTS)
    if results.get("finished") is not True:
        raise UserError(f"output-dir: the checkpoints of {output_dir} were removed, so that the run cannot go on; "
                        "--overwrite starts a new one")  # fmt: skip
    return {"step": results["step"], "finished": True}


def check_checkpoint(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None; UserError for a newer format, not to lose steps."""
    try:
        made = read_sealed(folder).get("format")
        reason = verify_folder(folder)
        if reason is None and read_state(folder).step != int(folder.name.split("-")[1]):
            reason = f"{STATE} belongs to another step"
        lacking = [name for name in (OPTIMIZER, RANDOM) if not (folder / name).is_file()]
        if reason is None and lacking:
            reason = f"{lacking[0]} is missing"
    except UserError as error:
        return str(error)
    if isinstance(made, int) and made > FORMAT:
        raise UserError(f"{folder}: format {made} is newer than this program ({FORMAT}); use the one that wrote it")
    return reason if isinstance(made, int) else f"{folder / MANIFEST} is damaged: no format"


def read_state(folder: Path) -> TrainState:
    """Read trainer_state.json; UserError for a missing or unknown field, another type or an impossible number."""
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


def save_optimizer(model, optimizer, path: Path | None) -> None:
    """Write AdamW's two averages and step count of each parameter under the parameter's name."""
    tensors = {f"{key}/{name}": value for name, parameter in model.named_parameters()
               for key, value in optimizer.state.get(parameter, {}).items()}  # fmt: skip
    gathered = (sharding.gather(value).cpu().numpy() for value in tensors.values())
    if path:
        write_tensors(path, {name: value.shape for name, value in tensors.items()}, gathered)
    for _ in gathered:  # the other processes have their part in it
        pass


def restore_optimizer(model, optimizer, path: Path) -> None:
    """Restore AdamW from save_optimizer's file; UserError for a tensor of another shape, which AdamW would accept."""
    file = open_tensors(path) if parallel.is_main() else None
    saved = set(parallel.from_main(file and list(file.keys())))
    for name, parameter in model.named_parameters():
        if not any(key.partition("/")[2] == name for key in saved):
            continue
        # Fused AdamW keeps its step counts on the parameter's device.
        entry = {"step": torch.zeros((), device=parameter.device)}
        entry |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        for key, target in entry.items():
            value = torch.empty(target.shape)
            if file:
                value = file.get_tensor(f"{key}/{name}") if f"{key}/{name}" in saved else None
            if value is None or value.shape != target.shape:
                found = "missing" if value is None else "x".join(map(str, value.shape))
                raise UserError(f"{path}: {key} of {name} is {found}, expected {'x'.join(map(str, target.shape))}")
            sharding.scatter(value, target)
        optimizer.state[parameter] = entry
