"""The states of the generators: saved and restored for the run's own devices, and for no other."""

from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.training.random_state import keep_random_state, restore_random_state, save_random_state


def test_random_state_comes_back(tmp_path):
    cpu = torch.device("cpu")
    save_random_state(tmp_path / "r.safetensors", cpu)
    first = torch.rand(5)
    restore_random_state(tmp_path / "r.safetensors", cpu)
    assert torch.equal(first, torch.rand(5))


@pytest.fixture
def gpus(monkeypatch):
    """The states of the generators of three devices that are not there, by device; torch's functions use them."""
    states = {
        name: torch.tensor([number], dtype=torch.uint8) for number, name in enumerate(("cuda:0", "cuda:1", "mps"))
    }
    for module in (torch.cuda, torch.mps):
        monkeypatch.setattr(module, "get_rng_state", lambda device: states[str(device)].clone())
        monkeypatch.setattr(module, "set_rng_state", lambda state, device: states[str(device)].copy_(state))
    return states


@pytest.mark.parametrize("name", ["cuda:0", "cuda:1", "mps"])
def test_random_state_of_the_runs_own_gpu_comes_back(tmp_path, gpus, name):
    """That of the current device was saved, whichever --device cuda:N names, and that of MPS was not saved at all."""
    before = gpus[name].item()
    save_random_state(tmp_path / "r.safetensors", torch.device(name))
    for state in gpus.values():
        state.fill_(77)
    restore_random_state(tmp_path / "r.safetensors", torch.device(name))
    assert {other: state.item() for other, state in gpus.items()} == dict.fromkeys(gpus, 77) | {name: before}


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_random_state_is_kept_whatever_happens(gpus, name):
    before, cpu = gpus[name].item(), torch.get_rng_state()
    with suppress(KeyError), keep_random_state(torch.device(name)):
        torch.rand(3)
        for state in gpus.values():
            state.fill_(77)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), cpu)
    assert {other: state.item() for other, state in gpus.items()} == dict.fromkeys(gpus, 77) | {name: before}


def test_random_state_of_another_device_is_left_out(tmp_path, gpus):
    """A run that moves to another device, which prints a warning, resumes with the CPU's state alone."""
    save_random_state(tmp_path / "r.safetensors", torch.device("cuda:1"))
    first = torch.rand(5)
    for name in ("mps", "cpu"):
        restore_random_state(tmp_path / "r.safetensors", torch.device(name))
        assert torch.equal(first, torch.rand(5))
    assert gpus["mps"].item() == 2


@pytest.mark.parametrize(
    ("states", "says"), [({"cpu": torch.zeros(10, dtype=torch.uint8)}, "10 bytes"), ({}, "0 bytes")]
)
def test_random_state_of_another_size_is_refused(tmp_path, states, says):
    save_file(states, tmp_path / "r.safetensors")
    before = torch.get_rng_state()
    with pytest.raises(UserError) as raised:
        restore_random_state(tmp_path / "r.safetensors", torch.device("cpu"))
    assert str(raised.value) == f"{tmp_path / 'r.safetensors'}: {says}, expected {len(before)}"
