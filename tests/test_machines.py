"""Machines unlike this one: what an Apple GPU lacks is never asked for, Windows is refused, a busy one is shared."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import replace
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import finetune_generative
from utils.evaluation import memorization, stylometry
from utils.evaluation.generation import SeededSampling
from utils.model import layers
from utils.training.optim import StepFigures

ROOT = Path(__file__).parent.parent
DOUBLES = {torch.float64, torch.complex128}


class Watch(TorchDispatchMode):
    """Collect the operations of PyTorch that take, give or are asked for float64, copies between devices included.

    No exception is made for the CPU: a tensor that is float64 there may be one on a GPU on another machine.
    """

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(str(function))
        pending = [*args, *(kwargs or {}).values(), result]
        while pending:
            value = pending.pop()
            if isinstance(value, list | tuple):
                pending += value
            elif (value.dtype if isinstance(value, torch.Tensor) else type(value) is torch.dtype and value) in DOUBLES:
                self.doubles.add(str(function))
        return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_model):
    """Folder of a Llama with the tiny model's tokenizer: rotary positions and RMS norm, as most new models have."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("llama") / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def watched(script, prepared, tmp_path, monkeypatch):
    """Run the scripts that use a device: watched(model, compare) -> Watch."""
    monkeypatch.setattr(stylometry, "MIN_WORDS", 60)
    monkeypatch.setattr(memorization, "MONITOR_TOKENS", 16)
    (tmp_path / "control.txt").write_text("General text is another's, and it is long enough. " * 60)

    def run(model, compare):
        out = tmp_path / "run"
        with Watch() as watch:
            ran = script("finetune_generative", "--data-dir", prepared, "--output-dir", out, "--model-name", model,
                         "--max-steps", 2, "--eval-every", 2, "--copy-samples", 2, "--sample-tokens", 0,
                         "--dropout", 0.1, "--learning-rate", "1e-2", "--batch-size", 4)  # fmt: skip
            assert ran.code == 0, ran.err
            if compare:
                ran = script("generate_text", "--finetuned-model", out, "--control-path", tmp_path / "control.txt",
                             "--max-new-tokens", 16, "--num-validation-prompts", 4, "--top-p", 0.9, "--top-k", 50,
                             "--max-copy", 6)  # fmt: skip
                assert ran.code == 0, ran.err
        return watch

    return run


@pytest.mark.parametrize("family", ["tiny_model", "llama"])
def test_no_operation_of_training_sampling_or_scoring_is_float64(watched, family, request):
    watch = watched(request.getfixturevalue(family), compare=True)
    assert not watch.doubles
    # The watcher saw training and backward pass, the optimizer, sampling and the guard.
    expected = {"embedding_dense_backward", "_fused_adamw_", "softmax", "scatter_", "topk", "argmax", "randint"}
    assert {name for name in expected if any(name in seen for seen in watch.names)} == expected


NEXT_TOKEN_LOSS = layers.next_token_loss


class WideBackward(torch.autograd.Function):
    """The identity, with a backward pass over float64."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.double().float()


def widen_backward(model, input_ids, share):
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss * share
    WideBackward.apply(loss).backward()
    return loss.detach()


def draw_from_doubles(self, rows, weights):
    """A number of NumPy's, which is float64, as the place to draw at."""
    points = torch.from_numpy(np.array([self.generators[row].initial_seed() / 2**64 for row in rows]))
    return (weights.cumsum(-1) <= points.to(weights)[:, None]).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


def no_loss_sum(model, blocks, *args):
    """Scores of blocks as the float64 tensor that a sum over NumPy's floats gives."""
    n_targets = blocks.num_rows * 31
    return [(torch.tensor(np.float64(n_targets)) / n_targets).item()] * blocks.num_rows, n_targets


CONTROLS = {
    "loss": (layers, "next_token_loss", lambda *args, **options: NEXT_TOKEN_LOSS(*args, **options).double().float()),
    "backward": (finetune_generative, "forward_backward", widen_backward),
    "sampling": (SeededSampling, "_draw", draw_from_doubles),
    "scoring": (finetune_generative, "score_blocks", no_loss_sum),
}


@pytest.mark.parametrize("place", CONTROLS)
def test_the_watcher_finds_a_float64_wherever_it_is(watched, tiny_model, place, monkeypatch):
    owner, name, wide = CONTROLS[place]
    replace(owner, name, wide, monkeypatch.setattr)
    assert watched(tiny_model, compare=False).doubles


@pytest.mark.parametrize("name", ["prepare_data", "finetune_generative", "generate_text"])
def test_windows_is_refused_in_one_line(name):
    code = f"import runpy, signal, sys; sys.platform = 'win32'; del signal.SIGHUP; " \
        f"sys.argv = ['{name}.py', '--help']; runpy.run_path('{name}.py', run_name='__main__')"  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == "error: Windows is not supported; expected Linux or macOS, use WSL (wsl --install)\n"


class Waits(TorchDispatchMode):
    """Collect the operations between set_lr and StepFigures.read that make the program wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.in_step, self.found, self.steps = False, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.in_step and function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("given", "turns"), [
    ({}, "'3000'"), ({"GOMP_SPINCOUNT": "7"}, "'7'"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "'30000000000'")
])  # fmt: skip
def test_a_thread_of_libgomp_waits_shortly_unless_told_otherwise(given, turns):
    asked = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in asked}
    loaded = "from utils.cli import parse_first; parse_first(lambda: 0); import torch"
    command = ["-c", loaded] if given else ["finetune_generative.py", "--data-dir", "nowhere"]
    said = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=environment | {"OMP_DISPLAY_ENV": "verbose"} | given).stderr  # fmt: skip
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this PyTorch has another OpenMP library")
    assert f"GOMP_SPINCOUNT = {turns}\n" in said


@pytest.fixture
def waits(script, prepared, tmp_path, monkeypatch):
    """Run a training with the layers of a GPU, logged at every third of six steps: waits(model) -> Waits."""

    def run(model):
        watch, set_lr, read = Waits(), finetune_generative.set_lr, StepFigures.read
        train, use_fast_layers = finetune_generative.train, finetune_generative.use_fast_layers
        gpu = torch.device("cuda")

        def set_and_watch(optimizer, lr):
            watch.in_step, watch.steps = True, watch.steps + 1
            return set_lr(optimizer, lr)

        def read_unwatched(figures):
            watch.in_step = False
            return read(figures)

        def train_watched(*arguments):
            monkeypatch.setattr(finetune_generative, "set_lr", set_and_watch)
            monkeypatch.setattr(StepFigures, "read", read_unwatched)
            with watch:
                return train(*arguments)

        monkeypatch.setattr(finetune_generative, "train", train_watched)
        monkeypatch.setattr(finetune_generative, "use_fast_layers",
                            lambda model, _, compiled: use_fast_layers(model, gpu, compiled))  # fmt: skip
        ran = script("finetune_generative", "--data-dir", prepared, "--output-dir", tmp_path / "run", "--model-name",
                     model, "--max-steps", 6, "--log-every", 3, "--eval-every", 6, "--copy-samples", 0,
                     "--sample-tokens", 0, "--dropout", 0.1, "--batch-size", 4, "--grad-accum-steps", 2)  # fmt: skip
        assert ran.code == 0, ran.err
        assert watch.steps == 6
        return watch

    return run


@pytest.mark.parametrize("family", ["tiny_model", "llama"])
def test_a_step_that_is_not_logged_asks_the_device_nothing(waits, family, request):
    assert not waits(request.getfixturevalue(family)).found


@pytest.mark.parametrize("name", ["clip_gradients", "leave_out_mask"])
def test_a_step_that_asks_is_seen(waits, name, llama, monkeypatch):
    """Controls: a norm that is read, and the mask that transformers makes."""
    clip = finetune_generative.clip_gradients
    if name == "clip_gradients":
        monkeypatch.setattr(finetune_generative, name, lambda model, most: torch.tensor(clip(model, most).item()))
    else:
        monkeypatch.setattr(layers, name, lambda *_: None)
    assert waits(llama).found
