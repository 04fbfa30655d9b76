"""Stage 3: let the base and the fine-tuned model answer the same prompts, and score both.

    score the held-out text -> same prompts, same parameters, same seeds -> side by side

Writes samples.jsonl and comparison.md into the fine-tuned folder. notes/04_evaluation.md explains how to
read them.
"""

import argparse
import json
from pathlib import Path

from utils.cli import Parser, UserError, print_table, real_number, run, warn
from utils.cli import whole_number as whole

OPENING_TOKENS = 32
# The seed project's prompt, one in the voice of the sample book, and none at all.
DEFAULT_PROMPTS = ["The old house", "Thursday, 14th November 1872.\n\nWind", ""]


def parse_args(argv=None):
    parser = Parser("Compare the base and the fine-tuned model on the same prompts.")
    add = parser.add_argument_group("models").add_argument
    add(
        "--finetuned-model",
        type=Path,
        default=Path("results/checkpoints/finetuned_model"),
        help="folder that finetune_generative.py wrote",
    )
    add("--base-model", help="hub name or folder (default: the one the fine-tuning began with)")
    add("--data-dir", type=Path, help="prepared folder with held-out text (default: the fine-tuning's)")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", help="a prompt; repeat the flag for more (default: three, and --num-openings)")
    add("--prompts-file", type=Path, metavar="FILE", help="text file with one prompt a line")
    add(
        "--num-openings",
        type=whole(0, 100),
        default=2,
        help="openings of held-out passages, shown with what the author wrote next",
    )
    add("--truncate", action="store_true", help="cut a prompt that is too long, from its left")
    add = parser.add_argument_group("decoding, as in generate()").add_argument
    add("--max-new-tokens", type=whole(1, 1023), default=75, help="tokens a sample")
    add("--temperature", type=temperature, default=0.8, help="below 1 safer, above 1 wilder; 0 is greedy")
    add("--top-k", type=whole(0), default=50, help="choose among the k likeliest tokens; 0 for all")
    add("--top-p", type=real_number(0, 1, above=True), default=0.95, help="choose among tokens of this probability")
    add(
        "--do-sample", action=argparse.BooleanOptionalAction, default=True, help="draw tokens; --no-do-sample is greedy"
    )
    add("--num-samples", type=whole(1, 10_000), default=1, help="samples of each prompt and model")
    add("--repetition-penalty", type=real_number(0, above=True), default=1.0, help="above 1 avoids used tokens")
    add("--no-repeat-ngram-size", type=whole(0), default=0, help="n-grams of this length stand once; 0 for no limit")
    add("--seed", type=whole(0, 2**32 - 1), default=42, help="of the first sample; each pair has its own")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=whole(1), default=32, help="prompts continued, or blocks scored, at once")
    add("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"], help="where to compute")
    add(
        "--dtype",
        choices=["auto", "fp32", "bf16"],
        default="fp32",
        help="computed in; fp32 gives figures that any other scorer finds too",
    )
    return parser.parse_args(argv)  # fmt: skip


def temperature(text):
    value = real_number(0)(text)
    if 0 < value < 1e-4:
        raise argparse.ArgumentTypeError(f"{text} is too small; use 0")
    return value


def find_models(args):
    """Return the two folders and the data folder, from flags or from what the run recorded."""
    from utils.checkpoint import list_checkpoints
    from utils.files import read_json
    from utils.hub import locate_model

    tuned = args.finetuned_model
    if not tuned.is_dir():
        raise UserError(f"model: {tuned}: no such directory; has training finished?")
    if not (tuned / "model.safetensors").is_file() and list_checkpoints(tuned):
        newest = list_checkpoints(tuned)[0].name
        raise UserError(f"model: {tuned} has no finished model; newest is {newest}")
    recorded = read_json(tuned / "run_config.json") if (tuned / "run_config.json").is_file() else {}
    base_name = args.base_model or recorded.get("base_model")
    if not base_name:
        raise UserError(f"{tuned} does not say what it was fine-tuned from; give --base-model")
    base = locate_model(base_name, "base model")
    if base.resolve() == tuned.resolve():
        raise UserError("base and tuned are the same directory")
    data_dir = args.data_dir or (Path(recorded["data_dir"]) if recorded.get("data_dir") else None)
    return base, tuned, data_dir


def open_held_out(args, data_dir, tokenizer):
    """Open the prepared data if it is there and of this tokenizer; without it the samples still run."""
    from utils.data import open_blocks
    from utils.tokens import fingerprint_tokenizer

    if data_dir is None or (not data_dir.is_dir() and not args.data_dir):
        warn(f"no held-out text ({data_dir or 'not recorded'}): samples only; give --data-dir for scores")
        return None
    data = open_blocks(data_dir)
    if data.manifest["tokenizer"]["sha256"] != fingerprint_tokenizer(tokenizer):
        raise UserError(f"data: {data_dir} was made with another tokenizer than the model's")
    return data if len(data.validation) else None


def collect_prompts(args, data, tokenizer):
    """Return the prompts as dicts of prompt, prompt_ids and, for openings, what the author wrote."""
    from utils.book import read_book
    from utils.generation import encode_prompt

    texts = list(args.prompt or [])
    if args.prompts_file:
        texts += [line for line in read_book(args.prompts_file)[0].split("\n") if line.strip()]
    given = bool(texts)
    texts = dict.fromkeys(texts or DEFAULT_PROMPTS)  # a prompt given twice is asked once; --num-samples asks again
    prompts = [{"prompt": text, "author": None} for text in texts]
    for prompt in prompts:
        prompt["prompt_ids"] = encode_prompt(tokenizer, prompt["prompt"])
        if given and prompt["prompt"] != prompt["prompt"].rstrip(" "):
            warn(f"prompt {prompt['prompt']!r} ends in a space, which spoils the next token; leave it out")
    if data and not given:
        for ids, following in data.openings(args.num_openings, OPENING_TOKENS, args.max_new_tokens):
            prompts.append({
                "prompt": tokenizer.decode(ids), "prompt_ids": ids, "author": tokenizer.decode(following),
            })  # fmt: skip
    return prompts


def fit_prompts(args, prompts, limit):
    """Refuse, or cut with --truncate, prompts that leave no room in the model's context."""
    if limit is None:
        return
    room = limit - args.max_new_tokens
    for prompt in prompts:
        n = len(prompt["prompt_ids"])
        if args.truncate and n > room > 0:
            prompt["prompt_ids"] = prompt["prompt_ids"][-room:]
        elif n > limit:
            raise UserError(f"prompt has {n} tokens, the model takes {limit}; cut it or give --truncate")
        elif n > room:
            raise UserError(
                f"prompt has {n} tokens; with {args.max_new_tokens} new ones that is over the model's {limit}; "
                "shorten one or give --truncate"
            )


def draw_samples(args, name, model, tokenizer, prompts, context):
    """Continue every prompt --num-samples times; the seeds depend on prompt and sample alone."""
    from tqdm import tqdm

    from utils.generation import Decoding, generate_ids

    fields = Decoding.__dataclass_fields__
    decoding = Decoding(**{key: value for key, value in vars(args).items() if key in fields})
    wanted = [
        {"prompt": prompt["prompt"], "model": name, "sample_index": index,
         "seed": (args.seed + number * args.num_samples + index) % 2**32, "prompt_ids": prompt["prompt_ids"]}
        for number, prompt in enumerate(prompts) for index in range(args.num_samples)
    ]  # fmt: skip
    for start in tqdm(range(0, len(wanted), args.batch_size), desc=f"{name} writes", delay=2, leave=False):
        rows = wanted[start : start + args.batch_size]
        prompt_ids, seeds = [row["prompt_ids"] for row in rows], [row["seed"] for row in rows]
        new = generate_ids(model, tokenizer.eos_token_id, prompt_ids, seeds, decoding, context)
        for row, ids in zip(rows, new, strict=True):
            row |= {"generated_ids": ids, "text": tokenizer.decode(ids)}
    return wanted


def score(args, name, model, data, context):
    """Held-out loss, perplexity and bits per byte of one model."""
    from tqdm import tqdm

    from utils.evaluation import score_blocks, summarize_loss

    with tqdm(total=len(data.validation), unit="block", desc=f"scoring {name}", delay=2, leave=False) as bar:
        scored = score_blocks(model, data.validation, args.batch_size, context, bar.update)
    return summarize_loss(*scored, data.bytes_per_token)


def compare(args, base_dir, tuned_dir, data_dir):
    """Let both models speak, score them, and write the results into the fine-tuned folder."""
    from utils.files import write_text
    from utils.hub import position_limit
    from utils.model import autocast, check_fit, load_pair, pick_device, pick_dtype
    from utils.report import render_comparison, render_terminal

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    def context():
        return autocast(device, dtype)

    models = {name: load_pair(folder) for name, folder in (("base", base_dir), ("finetuned", tuned_dir))}
    sizes = {name: len(tokenizer) for name, (_, tokenizer) in models.items()}
    if sizes["base"] != sizes["finetuned"]:
        raise UserError(f"base has {sizes['base']} tokens, tuned {sizes['finetuned']}; not the same family")
    if args.top_k > sizes["base"]:
        raise UserError(f"--top-k must be 0 to {sizes['base']}, not {args.top_k}")
    tokenizer = models["finetuned"][1]
    data = open_held_out(args, data_dir, tokenizer)
    prompts = collect_prompts(args, data, tokenizer)
    for model, _ in models.values():
        if data:
            check_fit(model, data)
        fit_prompts(args, prompts, position_limit(model.config.to_dict()))

    scores, samples = {}, []
    for name, (model, _) in models.items():
        model.to(device)
        if data:
            scores[name] = score(args, name, model, data, context)
        samples += draw_samples(args, name, model, tokenizer, prompts, context)
        model.to("cpu")

    settings = {"base": str(base_dir), "finetuned": str(tuned_dir), "data": str(data_dir), "dtype": dtype}
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "do_sample", "num_samples", "repetition_penalty",
             "no_repeat_ngram_size", "seed")  # fmt: skip
    settings |= {name: getattr(args, name) for name in names}
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text(tuned_dir / "samples.jsonl", "".join(lines))
    write_text(tuned_dir / "comparison.md", render_comparison(prompts, samples, scores, settings))
    print_table("comparison", settings.items())
    print(render_terminal(prompts, samples, scores))
    print(f"written: {tuned_dir / 'comparison.md'} and {tuned_dir / 'samples.jsonl'}")


def main():
    args = parse_args()
    from utils.output import lock

    base_dir, tuned_dir, data_dir = find_models(args)
    with lock(tuned_dir, "samples"):  # a lock of its own: a training in progress may be looked at
        compare(args, base_dir, tuned_dir, data_dir)


if __name__ == "__main__":
    run(main)
