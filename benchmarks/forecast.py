"""Forecast: what --dry-run says beside what the run then takes, in five settings."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import main, run_alone

SHAPE = {"model_type": "gpt2", "n_positions": 128, "n_embd": 768, "n_layer": 12, "n_head": 12}
SETTINGS = {
    "embedded base, defaults, 2 epochs": ["--epochs", "2"],
    "embedded base, float32, batch 16": ["--dtype", "fp32", "--batch-size", "16", "--epochs", "2"],
    "embedded base, batch 64, no samples": ["--batch-size", "64", "--copy-samples", "0", "--sample-tokens", "0",
                                            "--epochs", "5", "--eval-every", "5"],
    "GPT-2's shape from scratch, 10 steps": ["--from-scratch", "{shape}", "--max-steps", "10", "--eval-every", "10"],
    "Llama of 135 million parameters, 20 steps": ["--model-name", "{llama}", "--max-steps", "20", "--eval-every", "10"],
}  # fmt: skip
# As SmolLM2-135M.
LLAMA = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
SIZES = {"s": 1, "min": 60, "h": 3600}


def make_llama(folder: Path) -> None:
    """Write a Llama of random weights with the embedded base model's tokenizer, which uses a part of its rows."""
    LlamaForCausalLM(LlamaConfig(**LLAMA, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    for path in Path("results/base_model").glob("tokenizer*"):
        shutil.copy(path, folder)


def measure(quick: bool) -> dict:
    """Run every setting dry and in earnest."""
    values, targets, facts = (
        {"time, forecast": [], "time, measured": [], "memory, forecast": [], "memory, measured": []},
        [],
        {},
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shape.json").write_text(json.dumps(SHAPE))
        prepare = [sys.executable, "prepare_data.py", "--model-name", "results/base_model"]
        subprocess.run([*prepare, "--output-dir", folder / "blocks"], check=True, capture_output=True)
        for setting, flags in list(SETTINGS.items())[: 1 if quick else None]:
            flags = [flag.format(shape=folder / "shape.json", llama=folder / "llama") for flag in flags]
            if str(folder / "llama") in flags:
                make_llama(folder / "llama")
            flags += ["--data-dir", str(folder / "blocks"), "--output-dir", str(folder / "run"), "--overwrite"]
            if quick:
                flags += ["--max-steps", "6", "--copy-samples", "2"]
            said, _ = run_alone("finetune_generative.py", *flags, "--dry-run")
            duration, memory = re.search(r"forecast +about (.+?) for .*?, ([\d.]+) GB of memory", said).groups()
            seconds = sum(int(n) * SIZES[unit] for n, unit in re.findall(r"(\d+) (s|min|h)\b", duration))
            started = time.perf_counter()
            _, peak = run_alone("finetune_generative.py", *flags)
            taken = json.loads((folder / "run/all_results.json").read_text())["train_runtime"]
            facts[setting] = {"whole command, s": round(time.perf_counter() - started, 1)}
            for key, value in zip(values, (seconds, taken, float(memory), peak), strict=True):
                values[key].append(value)
            targets.append(
                {"what": f"time, forecast / measured: {setting}", "value": seconds / taken, "wanted": "0.8 to 1.2"}
            )
            targets.append({"what": f"memory, forecast / measured: {setting}", "value": float(memory) / peak,
                            "wanted": "0.85 to 1.15"})  # fmt: skip
    return {"title": "Forecast, each value a setting and not a repeat", "unit": "s and GB", "values": values,
            "ours": "time, forecast", "targets": targets, "facts": facts}  # fmt: skip


if __name__ == "__main__":
    main(measure)
