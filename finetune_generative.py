"""Stage 2: fine-tune a causal language model on the blocks of prepare_data.py.

    load -> evaluate -> save -> stop? -> learning rate -> accumulate -> clip -> update, and again

A manual AdamW loop: nothing is hidden in a trainer. The best model by held-out loss ends at the root of
--output-dir; the same command again continues an unfinished run. notes/03_training_loop.md explains it.
"""

import math
import time
from contextlib import closing, nullcontext
from pathlib import Path

from utils.cli import Parser, StopSignal, auto_or, device_name, number, parse_first, print_table, run
from utils.errors import UserError, warn

# Every flag is in one of the two: it shapes the result, and may not differ when a run is continued, or it does not.
SHAPING_FLAGS = {
    "model_name", "from_scratch", "dropout", "epochs", "max_steps", "batch_size", "grad_accum_steps", "learning_rate",
    "lr_schedule", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
    "eval_every", "eval_batch_size", "early_stopping_patience", "copy_samples", "max_copy_rate", "save_dtype", "dtype",
    "deterministic", "compile",
}  # fmt: skip
FREE_FLAGS = {
    "data_dir", "output_dir", "overwrite", "device", "num_workers", "save_every", "keep_checkpoints", "log_every",
    "report_to", "sample_prompt", "sample_tokens", "micro_batch_size", "dry_run",
}  # fmt: skip


def parse_args(argv=None):
    parser = Parser("Fine-tune a causal language model on prepared blocks.", epilog="next: python generate_text.py")
    add = parser.add_argument_group("model and data").add_argument
    add("--data-dir", type=Path, default=Path("results/data/blocks"), help="folder that prepare_data.py wrote")
    add("--model-name", help="hub name or folder (default: the model the data was prepared for)")
    add("--from-scratch", type=Path, metavar="CONFIG.json", help="start from random weights of this shape instead")
    add("--dropout", type=number(float, 0, 1, below=True), help="dropout rate, 0 up to below 1 (default: the model's)")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=number(int, 1), default=3, help="passes over the training blocks")
    add("--max-steps", type=number(int, 1), help="optimizer updates; takes the place of --epochs")
    add("--batch-size", type=number(int, 1), default=8, help="blocks a batch")
    add("--grad-accum-steps", type=number(int, 1), default=1, help="batches an update")
    add("--learning-rate", type=number(float, 0, above=True), default=5e-5, help="peak learning rate")
    add("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine", help="its course after warm-up")
    add("--warmup-ratio", type=number(float, 0, 1), default=0.06, help="share of the updates with a rising rate")
    add("--weight-decay", type=number(float, 0), default=0.01, help="AdamW's decay, on matrices only")
    add("--adam-beta1", type=number(float, 0, 1, below=True), default=0.9, help="AdamW's decay of the mean")
    add("--adam-beta2", type=number(float, 0, 1, below=True), default=0.999, help="AdamW's decay of the square")
    add("--adam-epsilon", type=number(float, 0, above=True), default=1e-8, help="AdamW's least denominator")
    add("--max-grad-norm", type=number(float, 0, above=True), default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of the batch order, dropout and new weights")
    add = parser.add_argument_group("evaluation and output").add_argument
    add("--output-dir", type=Path, default=Path("results/checkpoints/finetuned_model"), help="folder of the run")
    add("--overwrite", action="store_true", help="remove what --output-dir holds and start anew")
    add("--dry-run", action="store_true", help="say what the run would take in time, memory and disk; write nothing")
    add("--eval-every", type=number(int, 1), help="updates between evaluations (default: a tenth of the run)")
    add("--eval-batch-size", type=number(int, 1), default=16, help="blocks a forward pass in evaluation")
    add("--early-stopping-patience", type=number(int, 1), help="stop after so many evaluations without a better one")
    add(
        "--copy-samples",
        type=number(int, 0, 1000),
        default=16,
        help="validation prompts continued to measure copying; 0 for none",
    )
    add("--max-copy-rate", type=number(float, 0, 1, above=True), help="share it may copy (default: 3 times the book)")
    add(
        "--save-every",
        type=number(int, 1),
        help="updates between checkpoints (default: as --eval-every; rarer if slow)",
    )
    add("--keep-checkpoints", type=number(int, 1), default=2, help="newest checkpoints kept")
    add("--save-dtype", choices=["fp32", "bf16"], default="fp32", help="number type of the best model's file")
    add("--log-every", type=number(int, 1), default=1, help="updates between lines of metrics.jsonl")
    add("--report-to", choices=["none", "tensorboard"], default="none", help="write metrics there too")
    add("--sample-prompt", default="The old house", help="continued at each evaluation, to see it change")
    add("--sample-tokens", type=number(int, 0, 1023), default=40, help="tokens of that sample, if they fit; 0 for none")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=device_name, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="computed in; auto: bf16 if in hardware")
    add("--micro-batch-size", type=auto_or(number(int, 1)), metavar="N",
        help="blocks at once; less memory, same up to rounding (default: auto, by free memory)")  # fmt: skip
    add("--compile", action="store_true", help="compile the model's layers: a minute more to start, for a GPU")
    add("--deterministic", action="store_true", help="on a GPU: bit-identical runs, slower")
    add("--num-workers", type=number(int, 0, 64), default=0, help="processes that load batches")
    args = parser.parse_args(argv)
    if args.from_scratch and args.model_name:
        raise UserError("--from-scratch and --model-name exclude each other")
    return args  # fmt: skip


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered in 0.1 s, not in 4 s
    args = parse_first(parse_args)


def find_base(args, data):
    """Return the name of the base model and its folder; None for a folder that is not needed, or not there any more."""
    from utils.model.hub import find_local, locate_model

    if args.from_scratch:
        return str(args.output_dir / "untrained_model"), None
    base = args.model_name or data.manifest["model_name"]
    if base is None:
        raise UserError("the data has a tokenizer of its own and no model; give --from-scratch CONFIG.json")
    is_new = args.overwrite or not (args.output_dir / "run_config.json").is_file()
    return base, locate_model(base) if is_new else find_local(base)


def load_base(args, data, base, folder):
    """Load the base model, or make a new one, with its tokenizer."""
    from utils.data.tokenizer import fingerprint_tokenizer, load_tokenizer
    from utils.model.hub import locate_model
    from utils.model.loading import check_fit, load_pair, new_model

    if args.from_scratch:
        tokenizer = load_tokenizer(args.data_dir / "tokenizer")
        model = new_model(args.from_scratch, tokenizer, args.seed)
    else:
        model, tokenizer = load_pair(folder or locate_model(base))
        if fingerprint_tokenizer(tokenizer) != data.manifest["tokenizer"]["sha256"]:
            advice = f"run prepare_data.py --model-name {base}"
            raise UserError(f"data was made with another tokenizer than {base}'s; {advice}")
    check_fit(model, data)
    return model, tokenizer


def settings_of(args, data, base, folder):
    """Everything that shapes the result, with hashes of data and base model: equal settings give an equal run."""
    from utils.storage import hash_files

    settings = {name: value for name, value in vars(args).items() if name in SHAPING_FLAGS - {"model_name"}}
    settings["model_name"] = None if args.from_scratch else base
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    settings["data_sha256"] = data.sha256
    if args.from_scratch and args.from_scratch.is_file():
        settings["base_sha256"] = hash_files([args.from_scratch])
    elif folder:  # a hub model that has left the cache is not needed to go on
        settings["base_sha256"] = hash_files([*folder.glob("model*.safetensors"), *folder.glob("config.json")])
    return settings


def find_unfinished(args, settings):
    """Return the checkpoint to continue from, None for a new run, or refuse other settings by name."""
    from utils.training.checkpoint import find_checkpoint, refuse_other_settings

    if args.overwrite or not (args.output_dir / "run_config.json").is_file():
        return None
    refuse_other_settings(args.output_dir / "run_config.json", settings)
    return find_checkpoint(args.output_dir)


def start_run(args, settings, data, base, plan, model, tokenizer):
    """Make room for a new run, and write down what it is."""
    import torch

    from utils.evaluation.unseen import write_seen
    from utils.model.loading import DTYPES
    from utils.storage import clear_folder, require_space
    from utils.training.checkpoint import checkpoint_bytes, describe_machine, save_best
    from utils.training.metrics import write_run_config

    torch.manual_seed(args.seed)
    given_back = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
    require_space(args.output_dir, 2 * checkpoint_bytes(model) - given_back, "a pair of checkpoints")
    # Only now: everything that could be refused has been. What marks the folder as ours is replaced last.
    clear_folder(args.output_dir, keep=["run_config.json"])
    write_run_config(args, settings, base, data, describe_machine(plan))
    write_seen(args.output_dir, data.ids("train"))
    if args.from_scratch:  # so that generate_text.py has a base to compare with
        Path(base).mkdir(exist_ok=True)
        save_best(Path(base), model, tokenizer, DTYPES[args.save_dtype])


def forward_backward(model, input_ids, n_blocks):
    """Add a micro-batch's gradients, weighted by its share of the update's blocks; return its share of the loss."""
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss  # shifts inside
    loss = loss * (len(input_ids) / n_blocks)
    loss.backward()
    return loss.detach()


def train(args, plan, model, tokenizer, data, optimizer, state):
    """The loop. Nothing else advances state.step."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from utils.cli import ignore_signals
    from utils.errors import require_finite
    from utils.evaluation.loss import describe_result
    from utils.model.loading import DTYPES
    from utils.training.checkpoint import save_best, save_checkpoint
    from utils.training.metrics import MetricsLog
    from utils.training.optim import set_lr

    stopping, started, resumed_at = StopSignal(), time.monotonic() - state.seconds, state.step
    log = MetricsLog(args.output_dir, state.step, state.evaluated_step, args.report_to == "tensorboard")
    # A generator of its own: a DataLoader without one draws from the generator that dropout uses.
    loader = DataLoader(data.train, sampler=plan.order.batches(state.step, plan.max_steps), batch_size=None,
                        num_workers=args.num_workers, pin_memory=plan.device.type == "cuda",
                        generator=torch.Generator(), worker_init_fn=ignore_signals)  # fmt: skip
    batches = iter(loader)
    model.train()
    with tqdm(total=plan.max_steps, initial=state.step, unit="step", desc="training") as bar, closing(log):
        while True:
            last = state.step >= plan.max_steps
            due = last or state.step % plan.eval_every == 0
            if due and state.evaluated_step != state.step:  # 1 evaluate; step 0 measures the base model
                result = evaluate(args, plan, model, data, stopping)
                if result is not None:  # else a signal came, and it is done when the run goes on
                    if is_better(result, state, plan.probe.limit):
                        save_best(args.output_dir, model, tokenizer, DTYPES[args.save_dtype])
                    log.write(state.step, result)
                    tqdm.write(f"step {state.step}: {describe_result(result)}{sample(args, plan, model, tokenizer)}")
                    last = last or state.evals_without_gain == (args.early_stopping_patience or math.inf)
            state.seconds, state.finished = time.monotonic() - started, last and state.evaluated_step == state.step
            if last or stopping or (state.step % plan.save_every == 0 and state.step > resumed_at):  # 2 save
                log.sync()
                save_checkpoint(args.output_dir, model, tokenizer, optimizer, state, args.keep_checkpoints)
            if last or stopping:  # 3 stop
                break
            step_started = time.monotonic()
            lr = plan.schedule(state.step)  # 4 learning rate
            set_lr(optimizer, lr)
            update = plan.order.step_batches(state.step)
            n_blocks = sum(map(len, update))
            mean_loss = torch.zeros((), device=model.device)
            with plan.autocast():  # 5 accumulate, weighted by tokens; in one context, so that weights are cast once
                for _ in update:
                    batch = next(batches)["input_ids"].to(model.device, non_blocking=True)
                    for input_ids in batch.split(plan.micro_batch_size):
                        mean_loss += forward_backward(model, input_ids, n_blocks)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            train_loss = mean_loss.item()
            require_finite(
                f"{state.step + 1} (lr {lr:g})", loss=train_loss, gradient=grad_norm
            )  # 6 refuse NaN before the update
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
    return 0 if state.finished else stopping.number


def evaluate(args, plan, model, data, stopping):
    """Score all validation blocks, measure copying; {} when there are none, None when a signal came before the end."""
    from tqdm import tqdm

    from utils.evaluation.loss import score_blocks, summarize_loss

    if not len(data.validation):
        return {}
    with tqdm(total=len(data.validation), unit="block", desc="evaluating", leave=False, delay=2) as bar:
        scored = score_blocks(model, data.validation, args.eval_batch_size, plan.autocast, bar.update, stopping)
    if scored:
        result = summarize_loss(sum(scored[0]), scored[1], data.bytes_per_token)
    return result | plan.probe.measure(model, plan.autocast) if scored else None


def is_better(result, state, max_copy_rate):
    """Note an evaluation; say whether this is the best model so far: first it may not copy, then its loss counts."""
    from utils.errors import require_finite

    def rank(metrics):
        return metrics.get("eval/copy_rate", 0.0) > max_copy_rate, metrics["eval/loss"]

    require_finite(state.step, **{"validation loss": result.get("eval/loss", 0.0)})
    state.evaluated_step = state.step
    if state.step == 0:
        state.base_metrics = result
        return False
    state.evals_without_gain += 1
    better = not result or not state.best_metrics or rank(result) < rank(state.best_metrics)
    if better:
        state.best_step, state.best_metrics, state.evals_without_gain = state.step, result, 0
    return better


def sample(args, plan, model, tokenizer):
    """Continue the fixed prompt with a fixed seed, within the context; training's random numbers are not touched."""
    from utils.evaluation.generation import Decoding, encode_prompt, fit_context, generate_ids

    if not args.sample_tokens:
        return ""
    prompt, new_tokens = fit_context(model, encode_prompt(tokenizer, args.sample_prompt), args.sample_tokens)
    decoding = Decoding(max_new_tokens=new_tokens)
    ids = generate_ids(model, tokenizer.eos_token_id, [prompt], [args.seed], decoding, plan.autocast)[0]
    return "\n  | " + (args.sample_prompt + tokenizer.decode(ids)).replace("\n", "\n  | ")


def print_settings(args, plan, data, model, base, expected):
    import torch

    from utils.model.loading import count_parameters

    batch = plan.order.blocks_per_step
    print_table("training", [
        ("model", f"{base}, {count_parameters(model):,} parameters"),
        ("data", f"{args.data_dir}: {len(data.train):,} + {len(data.validation):,} blocks of {data.block_size}"),
        ("update", f"{batch} blocks ({args.grad_accum_steps} x {args.batch_size}), {batch * data.block_size:,} tokens; "
                   f"{plan.micro_batch_size} at once"),
        ("length", f"{plan.max_steps:,} updates, {plan.order.steps_per_epoch:,} an epoch"),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_schedule}, warm-up {args.warmup_ratio:.0%}"),
        ("evaluate, save", f"every {plan.eval_every:,} and {plan.save_every:,} updates"),
        ("copying", f"at most {plan.probe.limit:.1%} of a sample's tokens" if plan.probe.prompts else None),
        ("device", f"{plan.device}, computing in {plan.dtype}, {torch.get_num_threads()} threads"),
        ("output", args.output_dir),
        ("will take", expected),
    ])  # fmt: skip
    if len(data.train) < batch:
        warn(f"a batch is the {len(data.train)} blocks there are, not {batch}")


def print_outcome(args, plan, state, results):
    if {"base_eval_loss", "eval_loss", "base_perplexity", "perplexity"} <= results.keys():
        print(f"held-out loss {results['base_eval_loss']:.4f} -> {results['eval_loss']:.4f} nats a token "
              f"(best at step {state.best_step}), perplexity {results['base_perplexity']:.2f} -> "
              f"{results['perplexity']:.2f}; {state.seconds:.0f} s")  # fmt: skip
        if results.get("copy_rate", 0) > plan.probe.limit:
            warn(f"every model copied more than {plan.probe.limit:.1%} of its sample; fewer epochs help")
        if results["eval_loss"] >= results["base_eval_loss"]:
            warn("no evaluation was better than the base model's; try a lower --learning-rate or fewer epochs")
    print(f"best model: {args.output_dir}\nnext: python generate_text.py")


def finetune(args):
    """Begin or continue the run in the output folder, which is locked."""
    from utils.data.blocks import open_blocks
    from utils.errors import explain_failures
    from utils.evaluation.loss import CopyMonitor
    from utils.model.layers import use_fast_layers
    from utils.model.loading import load_pair, pick_device, set_deterministic, set_dropout
    from utils.storage import require_space, sweep
    from utils.training import checkpoint as checkpoints
    from utils.training import forecast
    from utils.training.metrics import write_results
    from utils.training.optim import build_optimizer
    from utils.training.setup import TrainingSetup, keep_freed_memory

    keep_freed_memory()
    device, data = pick_device(args.device), open_blocks(args.data_dir)
    set_deterministic(args.deterministic)
    base, folder = find_base(args, data)
    settings = settings_of(args, data, base, folder)
    checkpoint = find_unfinished(args, settings)
    if not args.dry_run:
        sweep(args.output_dir)
    state = checkpoints.read_state(checkpoint) if checkpoint else checkpoints.TrainState()
    plan = TrainingSetup(args, data, device, state.machine)
    if state.finished:
        if not args.dry_run:
            checkpoints.remove_older(checkpoint, args.keep_checkpoints)
            write_results(args.output_dir, state, plan.max_steps)
        print(f"already complete at step {state.step}: {args.output_dir}; --overwrite starts anew")
        return 0

    if checkpoint:
        print(f"continuing from step {state.step} of {plan.max_steps} ({checkpoint})")
        model, tokenizer = load_pair(checkpoint, verified=True)
    else:
        model, tokenizer = load_base(args, data, base, folder)
    if args.dropout is not None:
        set_dropout(model, args.dropout)
    model.to(device)
    if plan.layers == "fast":
        use_fast_layers(model, device, args.compile)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    plan.probe = CopyMonitor(args, data, model, tokenizer)
    with explain_failures(
        state, lambda: checkpoints.list_checkpoints(args.output_dir), args.batch_size, args.learning_rate
    ):
        plan.micro_batch_size = forecast.pick_micro_batch(args, plan, model, data, state)
        expected = forecast.forecast_run(args, plan, model, optimizer, data, state.step, forward_backward)
    print_settings(args, plan, data, model, base, expected)
    if args.dry_run:
        return 0
    if checkpoint:
        require_space(args.output_dir, checkpoints.checkpoint_bytes(model), "a checkpoint")
        checkpoints.restore_optimizer(model, optimizer, checkpoint / "optimizer.safetensors")
        checkpoints.restore_random_state(checkpoint / "rng_state.safetensors")
    else:
        start_run(args, settings, data, base, plan, model, tokenizer)
    checkpoints.record_machine(state, plan)

    with explain_failures(
        state, lambda: checkpoints.list_checkpoints(args.output_dir), args.batch_size, args.learning_rate
    ):
        stopped_by = train(args, plan, model, tokenizer, data, optimizer, state)
        results = write_results(args.output_dir, state, plan.max_steps)
    if stopped_by:
        print(f"stopped at step {state.step} of {plan.max_steps}, saved; run the same command to resume")
        return 128 + stopped_by
    print_outcome(args, plan, state, results)
    return 0


def main(args):
    from utils.cli import refuse_many_processes
    from utils.data.blocks import read_manifest
    from utils.output_dir import check_output_dir, lock

    refuse_many_processes()
    prepared_for = read_manifest(args.data_dir)["model_name"]
    is_ours = (args.output_dir / "run_config.json").is_file()
    inputs = [args.data_dir, args.model_name or prepared_for or ""]
    check_output_dir(args.output_dir, is_ours, "finetune_generative.py", args.overwrite, inputs)
    with nullcontext() if args.dry_run else lock(args.output_dir, "train"):
        return finetune(args)


if __name__ == "__main__":
    run(main, args)
