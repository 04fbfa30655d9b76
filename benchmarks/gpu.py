"""GPU: training, generation and memory of GPT-2 124M on one NVIDIA GPU; writes gpu.json and README.md here.

python -m benchmarks.gpu          everything, about five minutes on an H100
python -m benchmarks.gpu --quick  tiny models on any device; prints, writes nothing

A training variant does WARM_UP steps, which compile, and then TIMED steps. A step is 65,536 tokens, in micro-batches
of the size that the project chooses. The models keep GPT-2's dropout of 0.1, but for one variant.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.forecast import SHAPE
from benchmarks.generation import SAMPLED
from benchmarks.run import HERE, describe_machine, write_page
from benchmarks.training import TINY, FakeBlocks, make_step
from utils.evaluation.generation import Decoding, generate_ids
from utils.model.layers import use_fast_layers
from utils.model.loading import autocast, count_parameters, pick_device, set_deterministic
from utils.training.forecast import choose_micro_batch, read_clock

RESULTS = HERE / "gpu.json"
BLOCKS, TOKENS, WARM_UP, TIMED = (128, 1024), 65_536, 3, 10
VARIANTS = ("this project, --compile", "this project", "this project, --deterministic",
            "this project, --compile --dropout 0", "plain loop, compiled", "Trainer, bf16, compiled")  # fmt: skip
# Dense bf16 matrix products, from the data sheets; of another GPU, the measured rate alone is shown.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
PROMPTS, NEW_TOKENS = 64, 128


def find_peak(device: str) -> float | None:
    """Return the peak of a device by a word of its name; None if it is not known. An L40S is no L4."""
    return next((PEAKS[word] for word in re.findall(r"\w+", device) if word in PEAKS), None)


def build_model(quick: bool, device: torch.device, dropout: float = 0.1):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**(TINY if quick else {}), **rates)).train().to(device)


def count_flops(model, block_size: int) -> float:
    """Return the operations of forward and backward pass per token: 6 per weight, and 12 LTD of attention.

    Source: Chowdhery et al. 2022 (PaLM), appendix B; position embeddings are looked up, not multiplied.
    """
    weights = count_parameters(model) - model.transformer.wpe.weight.numel()
    return 6 * weights + 12 * model.config.n_layer * block_size * model.config.n_embd


def measure_product(device: torch.device, size: int) -> float:
    """Return the operations per second of a large bf16 matrix product, the best that this device reaches."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = time_steps(lambda _: left @ right, device)
    return 2 * size**3 / seconds


def time_steps(step, device: torch.device) -> float:
    """Return the seconds per step, without those that warm up; step takes its number."""
    for number in range(WARM_UP):
        step(number)
    started = read_clock(device)
    for number in range(WARM_UP, WARM_UP + TIMED):
        step(number)
    return (read_clock(device) - started) / TIMED


def micro_batch_of(model, device: torch.device, block_size: int, n_blocks: int) -> int:
    rows = FakeBlocks(torch.randint(0, model.config.vocab_size, (2, block_size)))
    data = SimpleNamespace(train=rows, block_size=block_size)
    return choose_micro_batch(model, data, functools.partial(autocast, device, "bf16"), n_blocks, None)


def train_plainly(model, device: torch.device, batches: list[torch.Tensor]) -> float:
    """Return the seconds of a step of the loop that everyone writes, the whole model compiled."""
    optimizer, compiled = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True), torch.compile(model)

    def step(number: int) -> None:
        for ids in batches:
            input_ids = ids.to(device, non_blocking=True)
            with autocast(device, "bf16"):
                loss = compiled(input_ids=input_ids, labels=input_ids, use_cache=False).loss / len(batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_steps(step, device)


def train_with_trainer(model, device: torch.device, batches: list[torch.Tensor]) -> float:
    """Return the seconds of a step of transformers' Trainer, bf16 and compiled."""
    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (WARM_UP, WARM_UP + TIMED):
                moments.append(read_clock(device))

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.cat(batches)] * (WARM_UP + TIMED)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=len(batches[0]), gradient_accumulation_steps=len(batches),
            max_steps=WARM_UP + TIMED, bf16=True, torch_compile=True, optim="adamw_torch_fused", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=device.type == "cpu")  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return (moments[1] - moments[0]) / TIMED


def train(variant: str, quick: bool) -> dict:
    """Measure a variant at both block sizes: tokens per second, operations per second, peak memory in gigabytes."""
    device, results = pick_device("auto"), {}
    set_deterministic("deterministic" in variant)
    for block_size in (32, 64) if quick else BLOCKS:
        torch.compiler.reset()
        model = build_model(quick, device, 0.0 if "dropout 0" in variant else 0.1)
        n_blocks = (256 if quick else TOKENS) // block_size
        size = micro_batch_of(model, device, block_size, n_blocks)
        ids = torch.randint(0, model.config.vocab_size, (n_blocks, block_size))
        batches = [part.pin_memory() if device.type == "cuda" else part for part in ids.split(size)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        if variant.startswith("this project"):
            use_fast_layers(model, device, compiled="compile" in variant)
            seconds = time_steps(make_step(model, device, "bf16", batches), device)
        else:
            seconds = (train_plainly if "plain" in variant else train_with_trainer)(model, device, batches)
        speed = n_blocks * block_size / seconds
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        results[str(block_size)] = {
            "tokens_per_second": speed, "flops": speed * count_flops(model, block_size), "peak_gb": peak,
            "blocks_per_pass": size, "with_warm_up_s": time.perf_counter() - started,
        }  # fmt: skip
        del model, batches
        gc.collect()
    torch.use_deterministic_algorithms(False)
    return results


def generate(quick: bool) -> dict:
    """Compare tokens per second of a batch of samples with transformers' generate()."""
    device, n_tokens = pick_device("auto"), 8 if quick else NEW_TOKENS
    model, eos = build_model(quick, device).eval(), 50256
    prompts = torch.randint(0, eos, (PROMPTS, 32), device=device)
    options = {"do_sample": True, **SAMPLED, "max_new_tokens": n_tokens, "min_new_tokens": n_tokens,
               "pad_token_id": eos}  # fmt: skip

    def peer() -> int:
        with autocast(device, "bf16"):
            rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return rows[:, prompts.shape[1] :].numel()

    def ours() -> int:
        decoding = Decoding(max_new_tokens=n_tokens, **SAMPLED)
        context = functools.partial(autocast, device, "bf16")
        return sum(map(len, generate_ids(model, eos, prompts.tolist(), list(range(PROMPTS)), decoding, context)))

    results = {}
    for name, call in (("generate()", peer), ("this project", ours)):
        call()
        started = read_clock(device)
        n = call()
        results[name] = n / (read_clock(device) - started)
    return results


def forecast(quick: bool) -> dict:
    """Compare the memory and the time that --dry-run says with what the run then takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps(SHAPE | (TINY if quick else {})))
        prepare = [sys.executable, "prepare_data.py", "--model-name", "results/base_model"]
        subprocess.run([*prepare, "--output-dir", folder / "blocks"], check=True, capture_output=True)
        flags = ["--data-dir", folder / "blocks", "--from-scratch", folder / "shape.json", "--output-dir",
                 folder / "run", "--max-steps", 4 if quick else 100, "--batch-size", 2 if quick else 64]  # fmt: skip
        # The script itself, and then the peak of its process as PyTorch counts it.
        code = "import sys, torch, finetune_generative as f; from utils.cli import run; " \
            "run(f.main, f.parse_args(sys.argv[1:])); "  # fmt: skip
        code = (
            "import atexit, torch; atexit.register(lambda: print('peak', torch.cuda.max_memory_allocated()))\n" + code
        )
        said, ran = (
            subprocess.run([sys.executable, "-c", code, *map(str, [*flags, *more])], check=True, text=True,
                           stdout=subprocess.PIPE).stdout
            for more in (["--dry-run"], [])
        )  # fmt: skip
        duration, memory = re.search(r"forecast +about (.+?) for .*?, ([\d.]+) GB of memory", said).groups()
        results = json.loads((folder / "run/all_results.json").read_text())
        peak = int(re.search(r"peak (\d+)", ran).group(1)) / 1e9
    return {"time_forecast": duration, "time_measured_s": results["train_runtime"],
            "memory_forecast_gb": float(memory), "memory_measured_gb": peak}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--variant", choices=VARIANTS, help="this training alone; write nothing")
    args = parser.parse_args()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # of --deterministic, read when CUDA starts
    if args.variant:
        print(json.dumps(train(args.variant, args.quick)))
        return
    device = pick_device("auto")
    if device.type != "cuda" and not args.quick:
        sys.exit("error: no CUDA device; benchmarks.gpu measures a GPU")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    results = {"machine": describe_machine(), "device": name}
    peak = find_peak(name)
    results |= {"peak_flops": peak, "measured_flops": measure_product(device, 256 if args.quick else 8192)}

    def keep(what: str, values: dict) -> None:
        results[what] = results.get(what, {}) | values
        print(json.dumps({what: values}), flush=True)
        if not args.quick:  # what is measured is kept, whatever comes after
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")

    keep("generation", {"device": name, "decoding": "top-p 0.9", "tokens_per_second": generate(args.quick)})
    if device.type == "cuda":
        keep("forecast", forecast(args.quick))
    for variant in VARIANTS:
        figures = train(variant, args.quick)
        for each in figures.values():
            each["mfu"] = peak and each["flops"] / peak
        keep("training", {variant: figures})
    if not args.quick:
        (HERE / "README.md").write_text(write_page(json.loads((HERE / "results.json").read_text())))


if __name__ == "__main__":
    main()
