"""The states of torch's generators, from which dropout draws: kept, saved and restored, for each process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.storage import open_tensors
from utils.training import parallel


def get_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the generators from which a run on `device` draws: the CPU's and the device's own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators to the output of get_random_state; a state of another type of device is left out."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Restore the generators of the CPU and of `device`, and no others, when the context ends."""
    states = get_random_state(device)
    try:
        yield
    finally:
        set_random_state(states, device)


def save_random_state(path: Path | None, device: torch.device) -> None:
    """Write the states of torch's generators, from which dropout draws, of all processes."""
    states = {}
    for kind, state in get_random_state(device).items():
        for number, row in enumerate(parallel.gather_rows(state[None])):
            states[f"{kind}.{number}" if number else kind] = row[0].clone()
    if path:
        save_file(states, path)


def restore_random_state(path: Path, device: torch.device) -> None:
    """Restore torch's generators from save_random_state's file; UserError for a state of another size."""
    states = {}
    if parallel.is_main():
        file, expected = open_tensors(path), len(torch.get_rng_state())
        states = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
        if len(states.get("cpu", [])) != expected:
            raise UserError(f"{path}: {len(states.get('cpu', []))} bytes, expected {expected}")
    states, number = parallel.from_main(states), parallel.rank()
    own = {kind: states.get(f"{kind}.{number}" if number else kind) for kind in ("cpu", device.type)}
    if own["cpu"]:  # there were as many processes
        own = {kind: torch.tensor(state, dtype=torch.uint8) for kind, state in own.items() if state}
        set_random_state(own, device)
