"""Stage 3: let base and fine-tuned model answer the same prompts, and measure what the fine-tuning changed.

    same prompts, same parameters, same dice -> style, copying, forgetting -> a verdict, a page, the numbers

Writes samples.jsonl, report.json, report.html, report.md, quiz.html and a model card into the fine-tuned folder.
notes/04_evaluation.md explains every measure.
"""

import argparse
import functools
import math
from pathlib import Path

from utils.cli import Parser, number, parse_first, print_table, run
from utils.errors import UserError, warn

OPENING_TOKENS = 32
MAX_ROUNDS = 20
# The seed project's prompt, one in the voice of the sample book, and none at all.
DEFAULT_PROMPTS = ["The old house", "Thursday, 14th November 1872.\n\nWind", ""]
CONTROL = Path("results/data/control.txt")


def temperature(text):
    value = number(float, 0)(text)
    if 0 < value < 1e-4:
        raise argparse.ArgumentTypeError(f"{text} is too small; use 0")
    return value


def parse_args(argv=None):
    parser = Parser("Compare the base and the fine-tuned model on the same prompts, and measure what changed.")
    add = parser.add_argument_group("models and texts").add_argument
    add("--finetuned-model", type=Path, default=Path("results/checkpoints/finetuned_model"),
        help="folder that finetune_generative.py wrote")  # fmt: skip
    add("--base-model", help="hub name or folder (default: the one the fine-tuning began with)")
    add("--data-dir", type=Path, help="prepared folder with held-out text (default: the fine-tuning's)")
    add("--control-path", type=Path, default=CONTROL, metavar="FILE", help="general text, to see what was forgotten")
    add("--measure", action=argparse.BooleanOptionalAction, default=True, help="--no-measure: samples only")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", help="a prompt; repeat the flag for more (default: three)")
    add("--prompts-file", type=Path, metavar="FILE", help="text file with one prompt a line")
    add("--num-validation-prompts", type=number(int, 0, 1000), default=64,
        help="prompts from validation segments, continued too and shown with what the author wrote next")  # fmt: skip
    add("--truncate", action="store_true", help="cut a prompt that is too long, from its left")
    add = parser.add_argument_group("decoding, as in generate()").add_argument
    add("--max-new-tokens", type=number(int, 1, 1023), default=75, help="tokens a sample")
    add("--temperature", type=temperature, default=1.0, help="below 1 safer, above 1 wilder; 0 is greedy")
    add("--top-k", type=number(int, 0), default=0, help="choose among the k likeliest tokens; 0 for all")
    add("--top-p", type=number(float, 0, 1, above=True), default=0.9, help="choose among tokens of this probability")
    add("--do-sample", action=argparse.BooleanOptionalAction, default=True,
        help="draw tokens; --no-do-sample is greedy")  # fmt: skip
    add("--num-samples", type=number(int, 1, 10_000), default=1, help="samples of each prompt and model, at least")
    add("--repetition-penalty", type=number(float, 0, above=True), default=1.0, help="above 1 avoids used tokens")
    add(
        "--no-repeat-ngram-size",
        type=number(int, 0),
        default=0,
        help="n-grams of this length stand once; 0 for no limit",
    )
    add(
        "--max-copy",
        type=number(int, 1, 1023),
        metavar="N",
        help="let no sample copy a run of more than N training tokens",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of the first sample; each pair has its own")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=number(int, 1), default=32, help="prompts continued at once")
    add("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"], help="where to compute")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="samples are computed in; auto: bf16 if in hardware; losses are in fp32, as any scorer's")  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered in 0.1 s, not in 4 s
    args = parse_first(parse_args)


def find_models(args):
    """Return the base's name, both model folders, the data folder, and what the run recorded, which flags overrule."""
    from utils.model.hub import locate_model
    from utils.storage import read_json
    from utils.training.checkpoint import list_checkpoints

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
    data_dir = args.data_dir or Path(recorded.get("data_dir") or "")
    data_dir = data_dir if args.data_dir or (data_dir.name and data_dir.is_dir()) else None
    return base_name, base, tuned, data_dir, recorded


def open_held_out(data_dir, tokenizer, missing):
    """Open the prepared data if it is there and of this tokenizer; without it the samples still run."""
    from utils.data.blocks import open_blocks
    from utils.data.tokenizer import fingerprint_tokenizer

    if data_dir is None:
        missing.append("style and copying: there is no prepared data; give --data-dir")
        return None
    data = open_blocks(data_dir)
    if data.manifest["tokenizer"]["sha256"] != fingerprint_tokenizer(tokenizer):
        raise UserError(f"data: {data_dir} was made with another tokenizer than the model's")
    if not len(data.validation):
        missing.append("what held-out text tells: the data was prepared without any (--val-split 0)")
    return data


def read_control(args, missing):
    """Read the general text; only one that was asked for by name must be there."""
    from utils.data.text import read_book

    if args.control_path == CONTROL and not CONTROL.is_file():
        missing.append(f"forgetting: {CONTROL} is not here; give --control-path")
        return ""
    return read_book(args.control_path)[0]


def collect_prompts(args, data, tokenizer, limit):
    """Return the prompts as dicts of prompt, prompt_ids and next_ids: what the author wrote after a validation prompt.

    Openings are as long as the models' context of `limit` tokens leaves room for.
    """
    from utils.data.text import read_book
    from utils.evaluation.generation import encode_prompt

    texts = list(args.prompt or [])
    if args.prompts_file:
        texts += [line for line in read_book(args.prompts_file)[0].split("\n") if line.strip()]
    for text in texts:
        if text != text.rstrip(" "):
            warn(f"prompt {text!r} ends in a space, which spoils the next token; leave it out")
    prompts = {
        text: {"prompt_ids": encode_prompt(tokenizer, text), "next_ids": []} for text in texts or DEFAULT_PROMPTS
    }
    room = min(OPENING_TOKENS, limit - args.max_new_tokens)
    if data and len(data.validation) and room > 0:
        for ids, following in data.validation_prompts(
            tokenizer, args.num_validation_prompts, room, args.max_new_tokens
        ):
            prompts.setdefault(tokenizer.decode(ids), {"prompt_ids": ids, "next_ids": following})
    # By their text: one given twice is asked once, --num-samples asks again.
    return [{"prompt": text, **prompt} for text, prompt in prompts.items()]


def fit_prompts(args, prompts, limit):
    """Refuse, or cut with --truncate, prompts that leave no room in the model's context."""
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


def draw_samples(args, models, tokenizer, prompts, guard, context):
    """Continue every prompt --num-samples times, and more often until the samples are long enough to measure.

    Seeds depend on prompt and sample alone: base and fine-tuned model have the same luck.
    """
    from tqdm import tqdm

    from utils.evaluation.generation import Decoding, generate_ids
    from utils.evaluation.stylometry import MIN_WORDS, split_words

    decoding = Decoding(**{name: vars(args)[name] for name in Decoding.__dataclass_fields__})
    samples, n_words = [], dict.fromkeys(models, 0)
    enough = MIN_WORDS if args.measure and any(prompt["next_ids"] for prompt in prompts) else 0
    for index in range(max(args.num_samples, MAX_ROUNDS)):
        if index >= args.num_samples and min(n_words.values()) >= enough:
            break
        for name, model in models.items():
            rows = [
                {"prompt": prompt["prompt"], "model": name, "sample_index": index,
                 "seed": (args.seed + index * len(prompts) + number) % 2**32, "prompt_ids": prompt["prompt_ids"]}
                for number, prompt in enumerate(prompts)
            ]  # fmt: skip
            for start in tqdm(range(0, len(rows), args.batch_size), desc=f"{name} writes", delay=2, leave=False):
                batch = rows[start : start + args.batch_size]
                ids, seeds = [row["prompt_ids"] for row in batch], [row["seed"] for row in batch]
                new = generate_ids(model, tokenizer.eos_token_id, ids, seeds, decoding, context, guard)
                for row, ids in zip(batch, new, strict=True):
                    row |= {"generated_ids": ids, "text": tokenizer.decode(ids)}
                    n_words[name] += len(split_words(row["text"]))
            samples += rows
    order = {prompt["prompt"]: number for number, prompt in enumerate(prompts)}
    return sorted(samples, key=lambda row: (row["model"], order[row["prompt"]], row["sample_index"]))


def measure(args, models, tokenizer, data, control, samples, prompts, missing, context):
    """Return all figures of the report."""
    from tqdm import tqdm

    from utils.evaluation import compare as comparison

    report = comparison.lay_out(prompts, samples, data, tokenizer)
    report |= {
        "scores": {},
        "shown_ngram": comparison.SHOWN_NGRAM,
        "n_samples": len(samples),
        "training": {},
        "quiz": [],
    }
    if not args.measure:
        missing.append("everything (--no-measure)")
        return report
    with tqdm(unit="block", desc="scoring", delay=2, leave=False) as bar:
        report |= comparison.score_models(models, tokenizer, data, control, args, context, missing, bar.update)
    if data:
        report |= comparison.compare_texts(samples, data, tokenizer, control, args, missing)
        report["quiz"] = comparison.make_quiz(samples, data, tokenizer, args.seed)
        report["training"] = comparison.read_training(args.finetuned_model, report["copy_rate"])
    return report


def describe_settings(args, base_name, folders, data, dtype):
    """Everything that shapes the figures, with hashes of what they were made from."""
    from utils.storage import hash_file, hash_files

    names = {"base_model": str(base_name), "finetuned_model": str(args.finetuned_model)}
    names |= {"data_dir": str(data.folder) if data else None}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings = flags | names | {"dtype": dtype}
    for name, folder in folders.items():
        settings[f"{name}_sha256"] = hash_files([*folder.glob("model*.safetensors"), *folder.glob("config.json")])
    settings["data_sha256"] = hash_file(data.folder / "manifest.json") if data else None
    settings["control_sha256"] = hash_file(args.control_path) if args.measure and args.control_path.is_file() else None
    return settings


def compare(args, base_name, base_dir, tuned_dir, data_dir, recorded):
    """Let both models speak, measure them, and write the results into the fine-tuned folder."""
    from utils.evaluation.compare import write_report
    from utils.evaluation.generation import CopyGuard
    from utils.evaluation.ngrams import NgramIndex
    from utils.evaluation.report import render_terminal
    from utils.evaluation.unseen import check_unseen
    from utils.model.hub import position_limit
    from utils.model.layers import use_fast_layers
    from utils.model.loading import autocast, check_fit, load_pair, pick_device, pick_dtype

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)

    folders, missing = {"base": base_dir, "finetuned": tuned_dir}, []
    pairs = {name: load_pair(folder) for name, folder in folders.items()}
    sizes = {name: len(tokenizer) for name, (_, tokenizer) in pairs.items()}
    if sizes["base"] != sizes["finetuned"]:
        raise UserError(f"base has {sizes['base']} tokens, tuned {sizes['finetuned']}; not the same family")
    if args.top_k > sizes["base"]:
        raise UserError(f"--top-k must be 0 to {sizes['base']}, not {args.top_k}")
    models, tokenizer = {name: model for name, (model, _) in pairs.items()}, pairs["finetuned"][1]
    data, control = open_held_out(data_dir, tokenizer, missing), read_control(args, missing) if args.measure else ""
    is_other_book = check_unseen(tuned_dir, recorded, data) if data and len(data.validation) else False
    if is_other_book is None:
        missing.append(f"whether the held-out pages are unseen: {tuned_dir} does not say what it was trained on")
    if args.max_copy and not data:
        raise UserError("--max-copy needs the training text; give --data-dir")
    guard = CopyGuard(NgramIndex(data.ids("train"), args.max_copy), tokenizer.eos_token_id) if args.max_copy else None
    limit = min(position_limit(model.config.to_dict()) or math.inf for model in models.values())
    prompts = collect_prompts(args, data, tokenizer, limit)
    fit_prompts(args, prompts, limit)
    for model in models.values():
        if data:
            check_fit(model, data)
        use_fast_layers(model.to(device), device)

    settings = describe_settings(args, base_name, folders, data, dtype)
    samples = draw_samples(args, models, tokenizer, prompts, guard, functools.partial(autocast, device, dtype))
    scoring = functools.partial(autocast, device, "fp32")
    report = measure(args, models, tokenizer, data, control, samples, prompts, missing, scoring)
    report |= {
        "other_book": bool(is_other_book),
        "missing": missing,
        "settings": settings,
        "books": data.manifest["books"] if data else [],
    }
    if guard:
        generated = sum(len(sample["generated_ids"]) for sample in samples)
        report["max_copy"] = {"tokens": args.max_copy, "acted": guard.acted, "generated": generated}
    report = write_report(tuned_dir, samples, report)
    print_table("comparison", [entry for entry in settings.items() if not entry[0].endswith("_sha256")])
    print(render_terminal(report))
    print(f"\nworth opening: {tuned_dir / 'report.html'}; the numbers: {tuned_dir / 'report.json'}")


def main(args):
    from utils.output_dir import lock

    found = find_models(args)
    with lock(args.finetuned_model, "samples"):  # a lock of its own: a training in progress may be looked at
        compare(args, *found)


if __name__ == "__main__":
    run(main, args)
