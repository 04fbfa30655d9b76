"""Generation: 32 samples of 75 tokens, this project's batches beside generate() called prompt by prompt."""

import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.timing import main
from benchmarks.training import TINY
from utils.evaluation.generation import Decoding, generate_ids
from utils.model.layers import use_fast_layers
from utils.model.loading import autocast

PROMPTS, ALONE = 32, 2
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "top_k": 0}  # the decoding of both


def measure(quick: bool) -> dict:
    """Compare tokens a second; check that greedy text in float32 is the same."""

    torch.manual_seed(0)
    device, n_tokens = torch.device("cpu"), 10 if quick else 75
    model = GPT2LMHeadModel(GPT2Config(**(TINY if quick else {}))).eval()
    prompts = torch.randint(0, 50256, (PROMPTS, 32))
    drawing = Decoding(max_new_tokens=n_tokens, **SAMPLED)
    options = {"do_sample": True, **SAMPLED, "max_new_tokens": n_tokens, "pad_token_id": 50256}

    def peer(rows: torch.Tensor, **more) -> int:
        mask = torch.ones_like(rows)
        return model.generate(rows, attention_mask=mask, **options, **more)[:, rows.shape[1] :].numel()

    def ours(dtype: str, decoding: Decoding) -> list[list[int]]:
        rows, seeds = prompts.tolist(), list(range(PROMPTS))
        return generate_ids(model, 50256, rows, seeds, decoding, lambda: autocast(device, dtype))

    plain = [
        model.generate(row[None], attention_mask=torch.ones(1, 32), max_new_tokens=n_tokens, do_sample=False,
                       pad_token_id=50256)[0, 32:].tolist()
        for row in prompts[:ALONE]
    ]  # fmt: skip
    use_fast_layers(model, device)
    greedy = ours("fp32", Decoding(max_new_tokens=n_tokens, do_sample=False))
    variants = {
        "generate(), prompt by prompt, float32": lambda: sum(peer(row[None]) for row in prompts[:ALONE]),
        "generate(), a batch of 32, float32": lambda: peer(prompts),
        "this project, float32": lambda: sum(map(len, ours("fp32", drawing))),
        "this project, bf16": lambda: sum(map(len, ours("bf16", drawing))),
    }
    values: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(2 if quick else 3):
        for name, call in variants.items():
            started = time.perf_counter()
            n = call()
            values[name].append(n / (time.perf_counter() - started))
    middle = {name: sorted(several)[len(several) // 2] for name, several in values.items()}
    alone = middle["generate(), prompt by prompt, float32"]
    targets = [{"what": f"{name}, speed / prompt by prompt", "value": middle[name] / alone, "wanted": wanted}
               for name, wanted in (("this project, bf16", ">= 10"), ("this project, float32", ">= 10"))]  # fmt: skip
    facts = {"greedy text in float32 equals generate()'s": greedy[:ALONE] == plain,
             "prompts asked one by one per repeat": ALONE}  # fmt: skip
    return {"title": f"Generation, GPT-2 124M, {PROMPTS} samples of {n_tokens} tokens, top-p 0.9", "unit": "tokens/s",
            "values": values, "ours": "this project, bf16", "targets": targets, "facts": facts}  # fmt: skip


if __name__ == "__main__":
    main(measure)
