"""What only a GPU shows: python -m pytest -m gpu."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import workshop  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel

from utils.evaluation.generation import Decoding, SeededSampling
from utils.model import layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
ROOT = Path(__file__).parent.parent

# The script, in which CUDA raises an error wherever the program waits for the device between two logged steps.
WATCHED = """
import sys, torch, finetune_generative as f
from utils.cli import run
from utils.training.optim import StepFigures
set_lr, read, train = f.set_lr, StepFigures.read, f.train
watched = []
def training(*arguments):
    def set_and_watch(optimizer, lr):
        watched.append(lr)
        torch.cuda.set_sync_debug_mode("error" if len(watched) > 2 else 0)  # what a first step allocates may wait
        return set_lr(optimizer, lr)
    def unwatched_read(figures):
        torch.cuda.set_sync_debug_mode(0)
        return read(figures)
    f.set_lr, StepFigures.read = set_and_watch, unwatched_read
    return train(*arguments)
f.train = training
run(f.main, f.parse_args())
"""


def start(code, flags):
    command = [sys.executable, "-c", code, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("more", [(), ("--compile",), ("--grad-accum-steps", 2, "--micro-batch-size", 1)])
def test_the_loop_waits_for_the_gpu_only_where_it_logs(workshop, tmp_path, more):  # noqa: F811
    _, flags = workshop.finetune(tmp_path / "run", "--device", "cuda", "--dtype", "bf16", "--max-steps", 24,
                                 "--log-every", 8, "--eval-every", 24, "--save-every", 24, *more)  # fmt: skip
    ended = start(WATCHED, flags)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [8, 16, 24]


def test_the_watched_loop_is_caught_when_it_waits(workshop, tmp_path):  # noqa: F811
    """The control of the test before: a loss read at every step."""
    _, flags = workshop.finetune(tmp_path / "run", "--device", "cuda", "--max-steps", 24, "--log-every", 8)
    waiting = "f.clip_gradients = lambda model, most, clip=f.clip_gradients: clip(model, most).cpu().cuda()\n"
    code = WATCHED.replace("watched = []\n", f"watched = []\n{waiting}")
    ended = start(code, flags)
    assert ended.returncode != 0
    assert "synchronizing CUDA operation" in ended.stderr


def test_a_bad_step_is_refused_though_nobody_reads_it(workshop, tmp_path):  # noqa: F811
    bad = "f.clip_gradients = lambda model, most, clip=f.clip_gradients: clip(model, most) * (float('nan') " \
        "if len(watched) == 6 else 1)\n"  # fmt: skip
    code = WATCHED.replace("watched = []\n", f"watched = []\n{bad}")
    _, flags = workshop.finetune(tmp_path / "run", "--device", "cuda", "--max-steps", 24, "--log-every", 24)
    ended = start(code, flags)
    assert ended.returncode == 4, ended.stderr
    assert "gradient is not a finite number at step 6" in ended.stderr
    assert "checkpoint-4 is safe" in ended.stderr


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vocab_size", [300, 50_257])
def test_layers_on_a_gpu_compute_what_the_plain_model_does(compiled, vocab_size):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0,
                        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    plain = GPT2LMHeadModel(config).train().cuda()
    fast = copy.deepcopy(plain)
    layers.use_fast_layers(fast, torch.device("cuda"), compiled)
    for rows in (3, 5):  # the last batch of an epoch is smaller
        input_ids = torch.randint(0, vocab_size, (rows, 64), device="cuda")
        losses = []
        for model in (plain, fast):
            model.zero_grad()
            losses.append(model(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
            losses[-1].backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
        for expected, found in zip(plain.parameters(), fast.parameters(), strict=True):
            assert torch.allclose(found.grad, expected.grad, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}])
def test_a_gpu_draws_the_tokens_that_the_cpu_draws(options):
    scores = torch.randn(64, 50_257, generator=torch.Generator().manual_seed(0)) * 4
    drawn = []
    for device in ("cpu", "cuda"):
        sampling = SeededSampling(list(range(64)), Decoding(**options))
        drawn.append([sampling(None, scores.to(device)).argmax(-1).tolist() for _ in range(4)])
    assert drawn[0] == drawn[1]
