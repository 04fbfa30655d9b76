"""Stage 3: let the base and the fine-tuned model continue the same prompts, and measure what fine-tuning changed.

    same prompts, parameters and seeds -> samples -> style, copying, forgetting -> verdict and report

Writes samples.jsonl, report.json, report.html, report.md, quiz.html and a model card into the fine-tuned folder.
notes/04_evaluation.md explains every measure.
"""

import argparse
import functools
import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path

from utils.argument_types import device_name, language_code, license_name, number, plain_text, temperature
from utils.cli import Parser, StopSignal, parse_first, print_table, run
from utils.errors import UserError, warn

PROMPT_TOKENS = 32  # of a prompt from validation text
MAX_ROUNDS = 20  # samples per prompt that are drawn to have enough words to measure
MAX_TOKENS = 1_000_000  # per sample
DEFAULT_PROMPTS = ["The old house", ""]
LIVE_FLAGS = {"to_file", "words", "interactive"}  # with which nothing is measured
CONTROL = Path("results/data/control.txt")


def parse_args(argv=None):
    parser = Parser("Compare the base and the fine-tuned model on the same prompts, and measure what changed.")
    add = parser.add_argument_group("models and texts").add_argument
    add("--finetuned-model", type=Path, default=Path("results/checkpoints/finetuned_model"),
        help="folder written by finetune_generative.py")  # fmt: skip
    add("--base-model", help="hub name or folder (default: the model that the fine-tuning started from)")
    add("--data-dir", type=Path, help="prepared folder with the validation text (default: the fine-tuning's)")
    add("--control-path", type=Path, default=CONTROL, metavar="FILE", help="general text, to measure forgetting")
    add("--reader-model", metavar="NAME", help="hub name or folder of the model that reads texts (default: the base)")
    add("--judge", action="extend", type=Path, nargs="+", metavar="FILE",
        help='texts from elsewhere to measure: .jsonl rows with "text", or text with lines of --- between')  # fmt: skip
    add("--measure", action=argparse.BooleanOptionalAction, default=True,
        help="--no-measure: samples only; a measured report and its model card stay as they are")  # fmt: skip
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", action="append", help="prompt to continue; repeat the flag for more (default: two)")
    add("--prompts-file", type=Path, metavar="FILE", help="text file with one prompt per line")
    add("--num-validation-prompts", type=number(int, 0, 1000), default=64,
        help="prompts from the validation text, shown with the author's continuation")  # fmt: skip
    add("--truncate", action="store_true", help="cut prompts that are too long at their left end")
    add = parser.add_argument_group("one text, without samples and report").add_argument
    add("--to-file", type=Path, metavar="FILE", help="write the fine-tuned model's text for one --prompt here")
    add("--words", type=number(int, 1, 1_000_000), metavar="N",
        help="end that text with the sentence that reaches N words, instead of --max-new-tokens")  # fmt: skip
    add("--interactive", action="store_true", help="type prompts and watch both models continue them")
    add = parser.add_argument_group("decoding, as in transformers' generate()").add_argument
    add("--max-new-tokens", type=number(int, 1, MAX_TOKENS), default=75,
        help="tokens per sample; may be more than the model's context")  # fmt: skip
    add("--stop", action="append", type=plain_text, metavar="TEXT",
        help="text before which a sample ends; repeat the flag for more")  # fmt: skip
    add("--temperature", type=temperature, default=0.9, help="below 1: likelier tokens; above 1: rarer ones; 0: greedy")
    add("--top-k", type=number(int, 0), default=0, help="sample from the k most likely tokens; 0 for all")
    add("--top-p", type=number(float, 0, 1, above=True), default=1.0, help="sample from this much probability mass")
    add("--do-sample", action=argparse.BooleanOptionalAction, default=True, help="--no-do-sample: greedy decoding")
    add("--num-samples", type=number(int, 1, 10_000), default=1,
        help="samples per prompt and model; more are drawn if ten prompts give too few words to measure")  # fmt: skip
    add("--repetition-penalty", type=number(float, 0, above=True), default=1.0, help="above 1: fewer repeated tokens")
    add("--no-repeat-ngram-size", type=number(int, 0), default=0, help="length of n-grams not to repeat; 0 for none")
    add("--max-copy", type=number(int, 1, 1023), metavar="N", help="copy no span of training longer than N tokens")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of the first sample; both models use the same")
    add = parser.add_argument_group("model card (README.md)").add_argument
    add("--language", type=language_code, metavar="CODE", help="language, such as en (default: the base's card's)")
    add("--license", type=license_name, metavar="NAME", help="license, such as mit (default: the base's card's)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=number(int, 1), default=32, help="prompts continued at once")
    add("--device", type=device_name, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="number type of sampling; auto: bf16 where the hardware has it; losses are always in fp32")  # fmt: skip
    args = parser.parse_args(argv)
    if args.to_file and args.interactive:
        raise UserError("--to-file and --interactive exclude each other")
    if args.to_file and (len(args.prompt or []) != 1 or args.prompts_file):
        raise UserError("--to-file continues one prompt; give --prompt once")
    if args.words and not args.to_file:
        raise UserError("--words needs --to-file")
    if args.interactive and (args.prompt or args.prompts_file):
        raise UserError("--interactive asks for its prompts; leave out --prompt and --prompts-file")
    args.max_new_tokens = MAX_TOKENS if args.words else args.max_new_tokens
    return args


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered in 0.1 s, not in 4 s
    args = parse_first(parse_args)

from tqdm import tqdm

from utils.data.blocks import open_blocks
from utils.data.text import read_book
from utils.data.tokenizer import fingerprint_tokenizer, start_ids
from utils.evaluation import compare, style, stylometry
from utils.evaluation.columns import build_columns, columns_of_files
from utils.evaluation.generation import Decoding, StopTexts, encode_prompt, fit_prompt, generate_ids
from utils.evaluation.interactive import converse
from utils.evaluation.longtext import check_new_file, write_text_file
from utils.evaluation.memorization import CopyGuard
from utils.evaluation.ngrams import NgramIndex
from utils.evaluation.reader import read_texts
from utils.evaluation.render import describe_terms, has_measures, render_terminal, write_report
from utils.evaluation.report import Report
from utils.evaluation.unseen import check_unseen, is_known_training_text
from utils.evaluation.verdict import judge
from utils.model.hub import hash_model, locate_model, position_limit
from utils.model.layers import use_fast_layers
from utils.model.loading import autocast, check_fit, load_pair, pick_device, pick_dtype
from utils.output_dir import lock
from utils.storage import hash_file, read_json, write_text
from utils.training.checkpoint import list_checkpoints
from utils.training.metrics import RESULTS, read_metrics


def find_models(args):
    """Return the base's name, both model folders, the data folder and the run's record; flags overrule the record."""
    tuned = args.finetuned_model
    if not tuned.is_dir():
        raise UserError(f"model: {tuned}: no such directory; has training finished?")
    saved = list_checkpoints(tuned)
    if saved and not [*tuned.glob("model*.safetensors")]:
        raise UserError(f"model: {tuned} has no finished model; newest is {saved[0].name}")
    recorded = read_json(tuned / "run_config.json") if (tuned / "run_config.json").is_file() else {}
    data_dir = args.data_dir or Path(recorded.get("data_dir") or "")
    data_dir = data_dir if args.data_dir or (data_dir.name and data_dir.is_dir()) else None
    base_name = args.base_model or recorded.get("base_model")
    if args.to_file:  # the base writes nothing
        return base_name, {"finetuned": tuned}, data_dir, recorded
    if not base_name:
        raise UserError(f"{tuned} does not say what it was fine-tuned from; give --base-model")
    base = locate_model(base_name, "base model")
    if base.resolve() == tuned.resolve():
        raise UserError("base and tuned are the same directory")
    return base_name, {"base": base, "finetuned": tuned}, data_dir, recorded


def load_models(folders, top_k):
    """Load both models and their tokenizer."""
    pairs = {name: load_pair(folder) for name, folder in folders.items()}
    sizes = {name: len(tokenizer) for name, (_, tokenizer) in pairs.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"base has {sizes['base']} tokens, tuned {sizes['finetuned']}; not the same family")
    if len({fingerprint_tokenizer(tokenizer) for _, tokenizer in pairs.values()}) > 1:
        raise UserError("base and tuned have different tokenizers; not the same family")
    if top_k > sizes["finetuned"]:
        raise UserError(f"--top-k must be 0 to {sizes['finetuned']}, not {top_k}")
    return {name: model for name, (model, _) in pairs.items()}, pairs["finetuned"][1]


def open_data(data_dir, tokenizer):
    """Open a prepared folder that was made with the models' tokenizer."""
    data = open_blocks(data_dir)
    if data.manifest["tokenizer"]["sha256"] != fingerprint_tokenizer(tokenizer):
        raise UserError(f"data: {data_dir} was made with another tokenizer than the model's")
    return data


def open_texts(args, tokenizer, data_dir, recorded):
    """Return the data or None, the general text, whether the data is of another book, and what is missing.

    Samples need neither text; only texts named by a flag must be there.
    """
    data, control, is_other_book, missing = None, "", False, []
    if data_dir is None:
        missing.append("style and copying: there is no prepared data; give --data-dir")
    else:
        data = open_data(data_dir, tokenizer)
        if not len(data.validation):
            missing.append("measures on validation text: the data was prepared without any (--val-split 0)")
    if args.measure and args.control_path == CONTROL and not CONTROL.is_file():
        missing.append(f"forgetting: {CONTROL} is not here; give --control-path")
    elif args.measure:
        control = read_book(args.control_path)[0]
    if data:
        is_other_book = check_unseen(args.finetuned_model, recorded, data)
        if is_other_book is None and len(data.validation):
            tuned = args.finetuned_model
            missing.append(f"whether the validation text is unseen: {tuned} does not say what it was trained on")
    return data, control, bool(is_other_book), missing


def build_guard(max_copy, data, tokenizer):
    """Return the guard that --max-copy asks for, or None."""
    if max_copy and not data:
        raise UserError("--max-copy needs the text that the model was trained on; give its --data-dir")
    return CopyGuard(NgramIndex(data.ids("train"), max_copy), tokenizer.eos_token_id) if max_copy else None


def collect_prompts(args, data, tokenizer, limit):
    """Return the prompts as dicts of prompt, prompt_ids and next_ids, the author's continuation in validation text."""
    texts = list(args.prompt or [])
    if args.prompts_file:
        texts += [line for line in read_book(args.prompts_file)[0].split("\n") if line.strip()]
    for text in texts:
        if text != text.rstrip(" "):
            warn(f"prompt {text!r} ends in a space, which spoils the next token; leave it out")
    # A tokenizer with not one token longer than a byte for English text was trained on another language.
    usual = [text for text in DEFAULT_PROMPTS if not text or len(encode_prompt(tokenizer, text)) < len(text)]
    found = [(text, encode_prompt(tokenizer, text), []) for text in texts or usual]
    start = start_ids(tokenizer)
    if data and len(data.validation):
        longest = max(map(len, data.segments("validation")))
        n_prompt = min(PROMPT_TOKENS, limit // 2, max(1, longest // 2))
        # Where no segment is as long as a prompt with a sample, the author's continuation is half a segment.
        n_next = args.max_new_tokens if n_prompt + args.max_new_tokens <= longest else longest // 2
        pairs = data.validation_prompts(tokenizer, args.num_validation_prompts, n_prompt, n_next)
        found += [(tokenizer.decode(ids), start + ids, next_ids) for ids, next_ids in pairs]
    prompts = {}
    for text, ids, next_ids in found:  # each text once; --num-samples repeats it
        ids = fit_prompt(ids, limit, args.max_new_tokens, args.truncate, len(start))
        prompts.setdefault(text, {"prompt": text, "prompt_ids": ids, "next_ids": next_ids})
    return list(prompts.values())


def collect_decoding(args):
    """Return the decoding flags as a Decoding."""
    return Decoding(**{entry.name: getattr(args, entry.name) for entry in fields(Decoding)})


def write_live(args, folders, data_dir, recorded):
    """Write one text into a file, or continue what is typed on the terminal; nothing is measured."""
    if args.to_file:
        check_new_file(args.to_file)
    device = pick_device(args.device)
    models, tokenizer = load_models(folders, args.top_k)
    data = open_data(data_dir, tokenizer) if data_dir and (args.max_copy or args.interactive) else None
    if data and not is_known_training_text(args.finetuned_model, recorded, data):
        data = None
    for model in models.values():
        use_fast_layers(model.to(device), device)
    limit = min(position_limit(model.config.to_dict()) or sys.maxsize for model in models.values())
    options = {
        "decoding": collect_decoding(args),
        "autocast": functools.partial(autocast, device, pick_dtype(args.dtype, device)),
        "guard": build_guard(args.max_copy, data, tokenizer),
        "stop": StopTexts(tokenizer, args.stop) if args.stop else None,
        "start": start_ids(tokenizer),
    }

    def encode(text):
        ids = encode_prompt(tokenizer, text)
        return fit_prompt(ids, limit, args.max_new_tokens, args.truncate, len(options["start"]))

    def generate(name, ids, seed, watch):
        return generate_ids(models[name], tokenizer.eos_token_id, [ids], [seed], watch=watch, **options)

    if args.interactive:
        index = NgramIndex(data.ids("train"), compare.SHOWN_NGRAM) if data else None
        return converse(list(models), encode, generate, tokenizer, index, args.seed)
    stopping, write = StopSignal(), functools.partial(generate, "finetuned", encode(args.prompt[0]), args.seed)
    print(write_text_file(
        args.to_file, tokenizer, write, args.max_new_tokens, args.words, args.stop or (), stopping
    ))  # fmt: skip
    return 128 + stopping.number if stopping else 0


def draw_samples(args, models, tokenizer, data, prompts, guard, autocast):
    """Continue every prompt --num-samples times, and more often until there are enough words to measure style.

    The seed of a sample depends on --seed, its prompt and its index only: both models use the same seeds.
    """
    decoding, stop = collect_decoding(args), StopTexts(tokenizer, args.stop) if args.stop else None
    is_random = decoding.do_sample and decoding.temperature > 0  # otherwise every round has the same texts
    needed = stylometry.MIN_WORDS if args.measure and data and len(prompts) >= style.MIN_TEXTS else 0
    samples, texts, n_words = [], set(), dict.fromkeys(models, 0)
    for index in range(max(args.num_samples, MAX_ROUNDS) if is_random else 1):
        if index >= args.num_samples and min(n_words.values()) >= needed:
            break
        seeds = [(args.seed + index * len(prompts) + number) % 2**32 for number in range(len(prompts))]
        for name, model in models.items():
            for start in tqdm(range(0, len(prompts), args.batch_size), desc=f"{name} writes", delay=2, leave=False):
                batch, some = prompts[start : start + args.batch_size], seeds[start : start + args.batch_size]
                ids = [prompt["prompt_ids"] for prompt in batch]
                new = generate_ids(model, tokenizer.eos_token_id, ids, some, decoding, autocast, guard, stop,
                                   start=start_ids(tokenizer))  # fmt: skip
                for prompt, seed, new_ids in zip(batch, some, new, strict=True):
                    text = tokenizer.decode(new_ids)
                    if (name, text) not in texts:  # copies are measured once
                        n_words[name] += len(stylometry.split_words(text))
                    texts.add((name, text))
                    samples.append({"prompt": prompt["prompt"], "model": name, "sample_index": index, "seed": seed,
                                    "prompt_ids": prompt["prompt_ids"], "generated_ids": new_ids,
                                    "text": text})  # fmt: skip
    order = {prompt["prompt"]: number for number, prompt in enumerate(prompts)}
    return sorted(samples, key=lambda row: (row["model"], order[row["prompt"]], row["sample_index"]))


def load_reader(args, folders, models, tokenizer, device):
    """Return the model that reads the texts, and its tokenizer: the base, unless --reader-model names another."""
    folder = locate_model(args.reader_model, "reader model") if args.reader_model else folders["base"]
    if folder.resolve() == folders["base"].resolve():
        return models["base"], tokenizer
    model, own_tokenizer = load_pair(folder)
    use_fast_layers(model.to(device), device)
    return model, own_tokenizer


def open_judged(args, data, tokenizer):
    """Return the texts of the --judge files as columns, by the files' names without their endings."""
    if args.judge and not (data and args.measure):
        raise UserError("--judge needs the training text, and measures; give --data-dir, leave out --no-measure")
    return columns_of_files(args.judge or [], tokenizer, args.max_new_tokens)


def measure(args, models, tokenizer, data, control, limit, samples, judged, recorded, read, autocast):
    """Return the figures as fields of Report, and what is missing."""
    if not args.measure:
        return {}, ["everything (--no-measure)"]
    figures, missing = compare.measure_losses(models, tokenizer, data, control, limit, args.seed, autocast)
    if not data:
        return figures, missing
    if len(data.validation):
        decoding = collect_decoding(args)
        figures["extraction"] = compare.extract_blocks(models, data, limit, decoding, args.batch_size, autocast)
    columns = build_columns(samples, data, tokenizer, args.max_new_tokens)
    texts, reasons = compare.compare_texts(
        columns, judged, data, tokenizer, control, args.max_new_tokens, read, args.seed
    )
    quiz = compare.make_quiz(samples, data, tokenizer, args.seed)
    if not quiz:
        reasons.append(f"the quiz: {compare.QUESTIONS} different texts as long as a sample are needed on both sides")
    results = args.finetuned_model / RESULTS
    best_step = read_json(results).get("best_step") if results.is_file() else None
    max_copy_rate = compare.find_copy_limit(recorded.get("settings") or {}, data, models["finetuned"], tokenizer)
    curves = compare.arrange_curves(read_metrics(args.finetuned_model), best_step, max_copy_rate)
    return {**figures, **texts, **quiz, "training": curves}, missing + reasons


def describe_settings(args, base_name, folders, data, recorded, dtype):
    """Return everything that shapes the figures, with hashes of models, data, general and judged texts."""
    settings = {name: value for name, value in vars(args).items() if name not in LIVE_FLAGS}
    settings |= {"base_model": base_name, "data_dir": data.folder if data else None, "dtype": dtype}
    settings |= {name: (recorded.get("settings") or {}).get(name) for name in ("lora_rank", "lora_alpha")}
    for name, folder in folders.items():
        settings[f"{name}_sha256"] = hash_model(folder)
    settings["data_sha256"] = hash_file(data.folder / "manifest.json") if data else None
    settings["reader_model"] = args.reader_model or base_name
    settings["judge"] = ", ".join(map(str, args.judge)) if args.judge else None
    settings["judged_sha256"] = {path.stem: hash_file(path) for path in args.judge or []}
    settings["control_sha256"] = hash_file(args.control_path) if args.measure and args.control_path.is_file() else None
    return settings | describe_terms(folders["base"], args.language, args.license)


def main(args):
    base_name, folders, data_dir, recorded = find_models(args)
    if args.to_file or args.interactive:
        return write_live(args, folders, data_dir, recorded)
    with lock(args.finetuned_model, "samples"):  # a lock of its own: a training in progress may be looked at
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        models, tokenizer = load_models(folders, args.top_k)
        data, control, is_other_book, missing = open_texts(args, tokenizer, data_dir, recorded)
        guard = build_guard(args.max_copy, None if is_other_book else data, tokenizer)
        limit = min(position_limit(model.config.to_dict()) or sys.maxsize for model in models.values())
        prompts = collect_prompts(args, data, tokenizer, limit)
        for model in models.values():
            if data:
                check_fit(model, data)
            use_fast_layers(model.to(device), device)
        reader, reader_tokenizer = load_reader(args, folders, models, tokenizer, device)
        judged = open_judged(args, data, tokenizer)
        settings = describe_settings(args, base_name, folders, data, recorded, dtype)

        # Seeds: args.seed + number of the sample, the same for both models; bootstrap and quiz use args.seed too.
        sampling, scoring = (functools.partial(autocast, device, name) for name in (dtype, "fp32"))
        samples = draw_samples(args, models, tokenizer, data, prompts, guard, sampling)
        read = functools.partial(read_texts, reader, reader_tokenizer, batch_size=args.batch_size, autocast=sampling)
        figures, reasons = measure(
            args, models, tokenizer, data, control, limit, samples, judged, recorded, read, scoring
        )
        if guard:
            generated = sum(len(sample["generated_ids"]) for sample in samples)
            figures["max_copy"] = {"tokens": args.max_copy, "acted": guard.acted, "generated": generated}

        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        settings["samples_sha256"] = hashlib.sha256(lines.encode()).hexdigest()
        texts, sources = compare.arrange_texts(prompts, samples, data, tokenizer)
        report = judge(Report(settings=settings, books=compare.list_training_books(data, is_other_book),
                              other_book=is_other_book, missing=missing + reasons, n_samples=len(samples),
                              reader=settings["reader_model"], reader_is_base=reader is models["base"],
                              shown_ngram=compare.SHOWN_NGRAM, texts=texts, sources=sources, **figures))  # fmt: skip
        tuned = args.finetuned_model
        write_text(tuned / "samples.jsonl", lines)
        is_written = args.measure or not has_measures(tuned)
        if is_written:
            write_report(tuned, report)
    print_table("comparison", [entry for entry in settings.items() if not entry[0].endswith("_sha256")])
    print(render_terminal(report))
    if is_written:
        print(f"\nworth opening: {tuned / 'report.html'}; the numbers: {tuned / 'report.json'}")
    else:
        print(f"\nthe samples: {tuned / 'samples.jsonl'}; report and model card stay those of the measured samples")


if __name__ == "__main__":
    run(main, args)
