"""How a training ends badly: values that are not finite, and words for what the machine did."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.cli import EXIT_DIVERGED, EXIT_MACHINE, UserError, machine_reason


def require_finite(state, lr: float | None, **values: float) -> None:
    """Stop before an update that would fill every weight with NaN.

    Args:
        state: the run's TrainState.
        lr: learning rate of the update at hand, None outside one.
        values: what to look at, by name.
    """
    for what, value in values.items():
        if not math.isfinite(value):
            at = f" {state.step + 1} (lr {lr:g})" if lr is not None else f" {state.step}"
            raise UserError(f"{what} is not a finite number at step{at}", EXIT_DIVERGED)


def explain(error: Exception, args, state, saved: list[Path]) -> UserError | None:
    """Say what ended a training, what is safe and what to do; None for a defect of this program.

    Args:
        error: what was raised.
        args: the flags.
        state: the run's TrainState.
        saved: its checkpoints, newest first.
    """
    what, advice = machine_reason(error), "the same command goes on from there"
    code = getattr(error, "code", EXIT_MACHINE)
    if isinstance(error, UserError):
        what = str(error)
        advice = f"try a --learning-rate below {args.learning_rate:g}" if code == EXIT_DIVERGED else advice
    elif isinstance(error, torch.OutOfMemoryError):
        what = f"out of GPU memory (batch {args.batch_size})"
        advice = f"try --batch-size {max(1, args.batch_size // 2)}"
    elif "DataLoader worker" in str(error):
        what = "a data worker was killed (out of memory?)"
    if what is None:
        return None
    at = "" if "at step" in what else f" at step {state.step}"
    safe = f"{saved[0].name} is safe" if saved else "no checkpoint yet"
    return UserError(f"{what}{at}; {safe}; {advice}", code)


@contextmanager
def explained(args, state, list_checkpoints: Callable[[Path], list[Path]]) -> Iterator[None]:
    """Put what explain() says in the place of what is raised inside; arguments as there."""
    try:
        yield
    except Exception as error:
        raise explain(error, args, state, list_checkpoints(args.output_dir)) or error from None


def is_finite(tensor: torch.Tensor) -> bool:
    """Say whether no value is NaN or infinite: least and greatest tell, in one pass that allocates nothing."""
    return not tensor.numel() or all(value.isfinite() for value in tensor.aminmax())


def refuse_not_finite(model, optimizer=None) -> None:
    """Raise before a value that is not finite reaches a file, where it would spoil every later run."""
    for name, parameter in model.named_parameters():
        for tensor in (parameter, *(optimizer.state.get(parameter, {}).values() if optimizer else ())):
            if not is_finite(tensor):
                raise UserError(f"{name} has a value that is not a finite number", EXIT_DIVERGED)
