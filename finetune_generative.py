"""Stage 2: fine-tune a causal language model on the blocks of prepare_data.py.

    load -> evaluate -> save -> stop? -> learning rate -> accumulate -> clip -> update, and again

A manual AdamW loop: nothing is hidden in a trainer. The best model by held-out loss ends at the root of
--output-dir; the same command again continues an unfinished run. notes/03_training_loop.md explains it.
"""

import argparse
import math
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

from utils.cli import EXIT_DIVERGED, EXIT_MACHINE, Parser, UserError, print_table, real_number, run, warn
from utils.cli import whole_number as whole

# Flags that change nothing about the result: free to differ when a run is continued. All others are compared.
FREE_FLAGS = {
    "data_dir", "output_dir", "overwrite", "device", "num_workers", "save_every", "keep_checkpoints", "log_every",
    "report_to", "sample_prompt", "sample_tokens",
}  # fmt: skip


def parse_args(argv=None):
    parser = Parser("Fine-tune a causal language model on prepared blocks.", epilog="next: python generate_text.py")
    add = parser.add_argument_group("model and data").add_argument
    add("--data-dir", type=Path, default=Path("results/data/blocks"), help="folder that prepare_data.py wrote")
    add("--model-name", help="hub name or folder (default: the model the data was prepared for)")
    add("--from-scratch", type=Path, metavar="CONFIG.json", help="start from random weights of this shape instead")
    add("--dropout", type=real_number(0, 1, below=True), help="dropout rate, 0 up to below 1 (default: the model's)")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=whole(1), default=3, help="passes over the training blocks")
    add("--max-steps", type=whole(1), help="optimizer updates; takes the place of --epochs")
    add("--batch-size", type=whole(1), default=8, help="blocks a micro-batch")
    add("--grad-accum-steps", type=whole(1), default=1, help="micro-batches an update")
    add("--learning-rate", type=real_number(0, above=True), default=5e-5, help="peak learning rate")
    add("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine", help="its course after warm-up")
    add("--warmup-ratio", type=real_number(0, 1), default=0.06, help="share of the updates with a rising rate")
    add("--weight-decay", type=real_number(0), default=0.01, help="AdamW's decay, on matrices only")
    add("--adam-beta1", type=real_number(0, 1, below=True), default=0.9, help="AdamW's decay of the mean")
    add("--adam-beta2", type=real_number(0, 1, below=True), default=0.999, help="AdamW's decay of the square")
    add("--adam-epsilon", type=real_number(0, above=True), default=1e-8, help="AdamW's least denominator")
    add("--max-grad-norm", type=real_number(0, above=True), default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=whole(0, 2**32 - 1), default=42, help="of the batch order, dropout and new weights")
    add = parser.add_argument_group("evaluation and output").add_argument
    add("--output-dir", type=Path, default=Path("results/checkpoints/finetuned_model"), help="folder of the run")
    add("--overwrite", action="store_true", help="remove what --output-dir holds and start anew")
    add("--eval-every", type=whole(1), help="updates between evaluations (default: a tenth of the run)")
    add("--eval-batch-size", type=whole(1), default=16, help="blocks a forward pass in evaluation")
    add("--early-stopping-patience", type=whole(1), help="stop after so many evaluations without a better one")
    add("--save-every", type=whole(1), help="updates between checkpoints (default: as --eval-every)")
    add("--keep-checkpoints", type=whole(1), default=2, help="newest checkpoints kept")
    add("--save-dtype", choices=["fp32", "bf16"], default="fp32", help="number type of the best model's file")
    add("--log-every", type=whole(1), default=1, help="updates between lines of metrics.jsonl")
    add("--report-to", choices=["none", "tensorboard"], default="none", help="write metrics there too")
    add("--sample-prompt", default="The old house", help="continued at each evaluation, to see it change")
    add("--sample-tokens", type=whole(0, 1023), default=40, help="tokens of that sample; 0 for none")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=device_name, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="computed in; auto: bf16 if in hardware")
    add("--num-workers", type=whole(0, 64), default=0, help="processes that load batches")
    args = parser.parse_args(argv)
    if args.from_scratch and args.model_name:
        raise UserError("--from-scratch and --model-name exclude each other")
    return args  # fmt: skip


def device_name(text):
    kind, colon, number = text.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; use auto, cpu, mps, cuda or cuda:N")
    return text


def load_start(args, data, base):
    """Load the base model, or make a new one, with its tokenizer."""
    from utils.hub import locate_model
    from utils.model import load_pair, new_model
    from utils.tokens import fingerprint_tokenizer, load_tokenizer

    if args.from_scratch:
        tokenizer = load_tokenizer(args.data_dir / "tokenizer")
        return new_model(args.from_scratch, tokenizer, args.seed), tokenizer
    if base is None:
        raise UserError("the data has a tokenizer of its own and no model; give --from-scratch CONFIG.json")
    model, tokenizer = load_pair(locate_model(base))
    if fingerprint_tokenizer(tokenizer) != data.manifest["tokenizer"]["sha256"]:
        raise UserError(f"data was made with another tokenizer than {base}'s; run prepare_data.py --model-name {base}")
    return model, tokenizer


def settings_of(args, data, base):
    """Everything that shapes the result, with the data's hash: equal settings give an equal run."""
    compared = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    train_file = next(entry for name, entry in data.manifest["files"].items() if name.startswith("train/data"))
    compared |= {"model_name": base, "data_sha256": train_file["sha256"]}
    return {name: str(value) if isinstance(value, Path) else value for name, value in compared.items()}


def find_unfinished(args, settings):
    """Return the checkpoint to continue from, None for a new run, or refuse other settings by name."""
    from utils.checkpoint import find_checkpoint
    from utils.files import read_json

    config = args.output_dir / "run_config.json"
    if args.overwrite or not config.is_file():
        return None
    before = read_json(config).get("settings", {})
    for name in settings:
        if before.get(name) != settings[name]:
            now, was = str(settings[name]), str(before.get(name))
            what = f"--{name.replace('_', '-')} {now} but the run has {was}"
            if name == "data_sha256":
                what = f"data differs from the run's (sha256 {now[:8]} not {was[:8]})"
            raise UserError(f"resume: {what}; use the same, another --output-dir, or --overwrite")
    return find_checkpoint(args.output_dir)


class StopSignal:
    """Turn SIGINT, SIGTERM and SIGHUP into a wish that the loop sees; a second one ends at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.receive)

    def receive(self, number, _frame):
        if self.number:
            raise SystemExit(128 + number)
        self.number = number

    def __bool__(self):
        return self.number > 0


def train(args, plan, model, tokenizer, data, optimizer, state):
    """The loop. Nothing else advances state.step."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from utils.checkpoint import save_best, save_checkpoint
    from utils.metrics import MetricsLog, draw_loss_curve
    from utils.model import DTYPES
    from utils.optim import set_lr

    log = MetricsLog(args.output_dir, state.step, args.report_to == "tensorboard")
    # A generator of its own: a DataLoader without one draws from the generator that dropout uses.
    loader = DataLoader(data.train, sampler=plan.order.batches(state.step, plan.max_steps), batch_size=None,
                        num_workers=args.num_workers, pin_memory=plan.device.type == "cuda",
                        generator=torch.Generator())  # fmt: skip
    batches = iter(loader)
    stopping, started, resumed_at = StopSignal(), time.monotonic() - state.seconds, state.step
    model.train()
    with tqdm(total=plan.max_steps, initial=state.step, unit="step", desc="training") as bar, closing(log):
        while True:
            last = state.step == plan.max_steps
            due = state.step % plan.eval_every == 0 and state.step > resumed_at
            if due or last or state.step == 0:  # 1 evaluate; step 0 measures the base model
                result = evaluate(args, plan, model, data)
                if is_better(result, state):
                    state.best_step, state.best_metrics, state.evals_without_gain = state.step, result, 0
                    save_best(args.output_dir, model, tokenizer, DTYPES[args.save_dtype])
                log.write(state.step, result)
                tqdm.write(f"step {state.step}: {describe(result)}{sample(args, plan, model, tokenizer)}")
                last = last or state.evals_without_gain == (args.early_stopping_patience or math.inf)
            state.seconds, state.finished = time.monotonic() - started, last
            if last or stopping or (state.step % plan.save_every == 0 and state.step > resumed_at):  # 2 save
                save_checkpoint(args.output_dir, model, tokenizer, optimizer, state, args.keep_checkpoints)
            if last or stopping:  # 3 stop
                break
            step_started = time.monotonic()
            lr = plan.schedule(state.step)  # 4 learning rate
            set_lr(optimizer, lr)
            micro_batches = plan.order.update(state.step)
            n_blocks = sum(map(len, micro_batches))
            mean_loss = torch.zeros((), device=model.device)
            for _ in micro_batches:  # 5 accumulate, weighted by tokens
                input_ids = next(batches)["input_ids"].to(model.device, non_blocking=True)
                with plan.autocast():
                    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss  # shifts inside
                loss = loss * (len(input_ids) / n_blocks)
                loss.backward()
                mean_loss += loss.detach()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            train_loss = mean_loss.item()
            require_finite(args, state, lr, train_loss, grad_norm)  # 6 refuse NaN before the update
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1  # 7 count, then log
            state.tokens += n_blocks * data.block_size
            speed = n_blocks * data.block_size / (time.monotonic() - step_started)
            if state.step % args.log_every == 0:
                figures = {"loss": train_loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_sec": round(speed, 1)}
                log.write(state.step, {f"train/{name}": value for name, value in figures.items()})
            bar.set_postfix_str(f"loss {train_loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
    draw_loss_curve(args.output_dir)
    return stopping.number


class Plan:
    """What is decided before the first step: device, length of the run, schedule, intervals."""

    def __init__(self, args, data, device):
        from utils.data import BatchOrder
        from utils.model import autocast, pick_dtype
        from utils.optim import build_schedule

        self.device, self.dtype = device, pick_dtype(args.dtype, device)
        self.autocast = lambda: autocast(self.device, self.dtype)
        self.order = BatchOrder(len(data.train), args.batch_size, args.grad_accum_steps, args.seed)
        self.max_steps = args.max_steps or args.epochs * self.order.steps_per_epoch
        self.eval_every = args.eval_every or max(1, self.max_steps // 10)
        self.save_every = args.save_every or self.eval_every
        self.schedule = build_schedule(args.lr_schedule, args.learning_rate, self.max_steps, args.warmup_ratio)


def evaluate(args, plan, model, data):
    """Score all validation blocks; without any, there is nothing to report but the training loss."""
    from tqdm import tqdm

    from utils.evaluation import score_blocks, summarize_loss

    if not len(data.validation):
        return {}
    with tqdm(total=len(data.validation), unit="block", desc="evaluating", leave=False, delay=2) as bar:
        scored = score_blocks(model, data.validation, args.eval_batch_size, plan.autocast, bar.update)
    return summarize_loss(*scored, data.bytes_per_token)


def is_better(result, state):
    """Keep the base's figures at step 0; afterwards say whether this is the best model so far."""
    if state.step == 0:
        state.base_metrics = result
        return False
    state.evals_without_gain += 1
    return not result or result["eval/loss"] < state.best_metrics.get("eval/loss", math.inf)


def describe(result):
    if not result:
        return "no validation blocks"
    return (f"validation loss {result['eval/loss']:.4f}, perplexity {result['eval/perplexity']:.2f}, "
            f"bits per byte {result['eval/bits_per_byte']:.4f}")  # fmt: skip


def sample(args, plan, model, tokenizer):
    """Continue the fixed prompt with a fixed seed; training's random numbers are not touched."""
    from utils.generation import Decoding, encode_prompt, generate_ids

    if not args.sample_tokens:
        return ""
    prompt = encode_prompt(tokenizer, args.sample_prompt)
    decoding = Decoding(max_new_tokens=args.sample_tokens)
    ids = generate_ids(model, tokenizer.eos_token_id, [prompt], [args.seed], decoding, plan.autocast)[0]
    return "\n  | " + (args.sample_prompt + tokenizer.decode(ids)).replace("\n", "\n  | ")


def require_finite(args, state, lr, loss, grad_norm):
    """Stop before an update that would fill every weight with NaN."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = "gradient" if math.isfinite(loss) else "loss"
    checkpoints = sorted(args.output_dir.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    safe = f"{checkpoints[-1].name} is safe" if checkpoints else "no checkpoint yet"
    raise UserError(f"{what} is not a finite number at step {state.step + 1} (lr {lr:g}); {safe}; "
                    "try a lower --learning-rate", EXIT_DIVERGED)  # fmt: skip


def print_settings(args, plan, data, model, base):
    import torch

    from utils.model import count_parameters

    batch = plan.order.per_update
    print_table("training", [
        ("model", f"{base}, {count_parameters(model):,} parameters"),
        ("data", f"{args.data_dir}: {len(data.train):,} + {len(data.validation):,} blocks of {data.block_size}"),
        ("update", f"{batch} blocks ({args.grad_accum_steps} x {args.batch_size}), {batch * data.block_size:,} tokens"),
        ("length", f"{plan.max_steps:,} updates, {plan.order.steps_per_epoch:,} an epoch"),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_schedule}, warm-up {args.warmup_ratio:.0%}"),
        ("evaluate, save", f"every {plan.eval_every:,} and {plan.save_every:,} updates"),
        ("device", f"{plan.device}, computing in {plan.dtype}, {torch.get_num_threads()} threads"),
        ("output", args.output_dir),
    ])  # fmt: skip
    if len(data.train) < batch:
        warn(f"a batch is the {len(data.train)} blocks there are, not {batch}")


def start_run(args, settings, data, base):
    """Load or make the model of a new run, and write down what the run is."""
    import torch

    from utils.checkpoint import save_best
    from utils.metrics import write_run_config
    from utils.model import DTYPES, check_fit

    model, tokenizer = load_start(args, data, base)
    check_fit(model, data)
    torch.manual_seed(args.seed)
    if args.overwrite and args.output_dir.is_dir():
        shutil.rmtree(args.output_dir)  # only now: everything that could be refused has been
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.from_scratch:  # so that generate_text.py has a base to compare with
        Path(base).mkdir(exist_ok=True)
        save_best(Path(base), model, tokenizer, DTYPES[args.save_dtype])
    write_run_config(args, settings, base, data)
    return model, tokenizer


def print_outcome(args, state, results):
    if "eval_loss" in results:
        print(f"held-out loss {results['base_eval_loss']:.4f} -> {results['eval_loss']:.4f} nats a token "
              f"(best at step {state.best_step}), perplexity {results['base_perplexity']:.2f} -> "
              f"{results['perplexity']:.2f}; {state.seconds:.0f} s")  # fmt: skip
        if results["eval_loss"] >= results["base_eval_loss"]:
            warn("no evaluation was better than the base model's; try a lower --learning-rate or fewer epochs")
    print(f"best model: {args.output_dir}\nnext: python generate_text.py")


def main():
    args = parse_args()
    import torch

    from utils.checkpoint import TrainState, read_state, restore_optimizer, restore_random_state
    from utils.data import open_blocks
    from utils.files import check_output_dir
    from utils.metrics import write_results
    from utils.model import load_pair, pick_device, set_dropout
    from utils.optim import build_optimizer

    device = pick_device(args.device)
    data = open_blocks(args.data_dir)
    is_ours = (args.output_dir / "run_config.json").is_file()
    inputs = [args.data_dir, args.model_name or data.manifest["model_name"] or ""]
    check_output_dir(args.output_dir, is_ours, "finetune_generative.py", args.overwrite, inputs)
    plan = Plan(args, data, device)
    base = args.model_name or data.manifest["model_name"]
    base = str(args.output_dir / "untrained_model") if args.from_scratch else base
    settings = settings_of(args, data, base)
    checkpoint = find_unfinished(args, settings)
    state = read_state(checkpoint) if checkpoint else TrainState()
    if state.finished:
        write_results(args.output_dir, state, plan.max_steps)
        print(f"already complete at step {state.step}: {args.output_dir}; --overwrite starts anew")
        return 0

    if checkpoint:
        print(f"continuing from step {state.step} of {plan.max_steps} ({checkpoint})")
        model, tokenizer = load_pair(checkpoint)
    else:
        model, tokenizer = start_run(args, settings, data, base)
    if args.dropout is not None:
        set_dropout(model, args.dropout)
    model.to(device)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    if checkpoint:
        restore_optimizer(model, optimizer, checkpoint / "optimizer.safetensors")
        restore_random_state(checkpoint / "rng_state.safetensors")
    print_settings(args, plan, data, model, base)

    try:
        stopped_by = train(args, plan, model, tokenizer, data, optimizer, state)
    except torch.OutOfMemoryError:
        batch = f"batch {args.batch_size} x {data.block_size}"
        half = max(1, args.batch_size // 2)
        message = f"out of GPU memory at step {state.step + 1} ({batch}); try --batch-size {half}"
        raise UserError(message, EXIT_MACHINE) from None
    results = write_results(args.output_dir, state, plan.max_steps)
    if stopped_by:
        print(f"stopped at step {state.step} of {plan.max_steps}, saved; the same command goes on from here")
        return 128 + stopped_by
    print_outcome(args, state, results)
    return 0


if __name__ == "__main__":
    run(main)
