"""AdamW leaves out the update of a step that is not finite, and all after it, before anyone has read its figures."""

import copy
import math

import pytest
import torch

from utils.errors import EXIT_DIVERGED, UserError
from utils.training.optim import StepFigures, build_optimizer, clip_gradients, set_lr


def make_step(model, optimizer, figures, step, loss):
    """Make the step of a loop whose loss may be NaN, and with it every gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, loss)
    figures.note(optimizer, step, torch.tensor(loss), clip_gradients(model, 1.0))
    optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_and_later_ones_change_nothing(bad):
    model = torch.nn.Linear(3, 2)
    optimizer, figures = build_optimizer(model, 0.1, 0.0, (0.9, 0.99), 1e-8), StepFigures(torch.device("cpu"))
    assert figures.read() == (0.0, 0.0)  # before the first step
    make_step(model, optimizer, figures, 1, 2.0)
    assert figures.read() == (2.0, pytest.approx(2 * 8**0.5))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    for step, loss in ((2, bad), (3, 1.0)):
        set_lr(optimizer, 0.25 / step)
        make_step(model, optimizer, figures, step, loss)
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert all(torch.equal(before[1][i][name], after[1][i][name]) for i in before[1] for name in before[1][i])
    with pytest.raises(UserError, match=r"^loss is not a finite number at step 2 \(lr 0.125\)$") as caught:
        figures.read()
    assert caught.value.code == EXIT_DIVERGED


def test_a_gradient_alone_is_enough():
    model = torch.nn.Linear(3, 2)
    optimizer, figures = build_optimizer(model, 0.1, 0.0, (0.9, 0.99), 1e-8), StepFigures(torch.device("cpu"))
    figures.note(optimizer, 1, torch.tensor(1.0), torch.tensor(math.inf))
    with pytest.raises(UserError, match=r"^gradient is not a finite number at step 1 "):
        figures.read()


def test_decay_pulls_matrices_alone():
    """A step without any gradient moves what decays, and nothing else."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, 0.1, 0.5, (0.9, 0.99), 1e-8).step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight"}
