"""Stage 2: fine-tune a causal language model on the blocks of prepare_data.py.

    evaluate -> save -> stop? -> learning rate -> accumulate -> clip -> step, and again

A manual AdamW loop: nothing is hidden in a trainer. The best model by validation loss ends at the root of
--output-dir; the same command resumes an unfinished run. notes/03_training_loop.md explains the loop.
"""

import functools
import time
from contextlib import closing, nullcontext
from pathlib import Path

from utils.argument_types import auto_or, device_name, model_name, number, reporter
from utils.cli import Parser, StopSignal, check_processes, ignore_signals, parse_first, print_table, run
from utils.errors import UserError, explain_failures, resume_advice, warn


def parse_args(argv=None):
    positive = number(int, 1)
    parser = Parser("Fine-tune a causal language model on prepared blocks.", epilog="next: python generate_text.py")
    add = parser.add_argument_group("model and data").add_argument
    add("--data-dir", type=Path, default=Path("results/data/blocks"), help="folder written by prepare_data.py")
    add("--model-name", type=model_name, help="hub name or folder (default: the model the data was prepared for)")
    add("--from-scratch", type=Path, metavar="CONFIG.json", help="train random weights of this configuration instead")
    add("--dropout", type=number(float, 0, 1, below=True), help="dropout rate (default: the model's)")
    add("--lora-rank", type=number(int, 0), default=0, metavar="N",
        help="train a LoRA adapter of this rank, at 3 to 10 times the learning rate; 0 trains all weights")  # fmt: skip
    add("--lora-alpha", type=positive, help="LoRA's scale, times the rank (default: 2 N)")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=3, help="passes over the training blocks")
    add("--max-steps", type=positive, help="optimizer steps; overrides --epochs")
    add("--batch-size", type=positive, default=8, help="blocks per batch")
    add("--grad-accum-steps", type=positive, default=1, help="batches per optimizer step")
    add("--learning-rate", type=number(float, 0, above=True), default=5e-5, help="peak learning rate")
    add("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine", help="decay after warm-up")
    add("--warmup-ratio", type=number(float, 0, 1), default=0.06, help="share of the steps with linear warm-up")
    add("--weight-decay", type=number(float, 0), default=0.01, help="AdamW weight decay, matrices only")
    add("--adam-beta1", type=number(float, 0, 1, below=True), default=0.9, help="AdamW beta1")
    add("--adam-beta2", type=number(float, 0, 1, below=True), default=0.999, help="AdamW beta2")
    add("--adam-epsilon", type=number(float, 0, above=True), default=1e-8, help="AdamW epsilon")
    add("--max-grad-norm", type=number(float, 0, above=True), default=1.0, help="gradient norm above which to clip")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of batch order, dropout and new weights")
    add = parser.add_argument_group("evaluation and output").add_argument
    add("--output-dir", type=Path, default=Path("results/checkpoints/finetuned_model"), help="folder of the run")
    add("--overwrite", action="store_true", help="remove the contents of --output-dir and start a new run")
    add("--dry-run", action="store_true", help="forecast time, memory and disk; write nothing")
    add("--eval-every", type=positive, help="steps between evaluations (default: a tenth of the run)")
    add("--eval-batch-size", type=positive, default=16, help="blocks per forward pass in evaluation")
    add("--early-stopping-patience", type=positive, help="evaluations without improvement before training stops")
    add("--copy-samples", type=number(int, 0, 1000), default=16, help="samples to measure copying with; 0 for none")
    add("--max-copy-rate", type=number(float, 0, 1, above=True),
        help="share of copied tokens the best model may have (default: 3 times the validation text's)")  # fmt: skip
    add("--save-every", type=positive, help="steps between checkpoints (default: --eval-every; more if saving is slow)")
    add("--keep-checkpoints", type=positive, default=2, help="newest checkpoints to keep")
    add("--save-dtype", choices=["fp32", "bf16"], default="fp32", help="number type of the best model's weights file")
    add("--log-every", type=positive, default=1, help="steps between lines of metrics.jsonl; a GPU waits there")
    add("--report-to", type=reporter, choices=["none", "tensorboard"], default="none", help="also write metrics there")
    add("--sample-prompt", default="The old house", help="prompt to continue at each evaluation")
    add("--sample-tokens", type=number(int, 0, 1_000_000), default=40, help="tokens of that sample; 0 for none")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=device_name, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="number type of the computation; auto: bf16 where the hardware has it")  # fmt: skip
    add("--micro-batch-size", type=auto_or(positive), metavar="N",
        help="blocks per forward pass; fewer need less memory (default: auto, by free memory)")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="compute activations twice: slower, less memory")
    add("--compile", action="store_true", help="compile the model's layers (for GPUs; starts a minute later)")
    add("--deterministic", action="store_true", help="bit-identical runs on a GPU; slower")
    add("--num-workers", type=number(int, 0, 64), default=0, help="processes that load batches")
    add("--process-timeout", type=number(int, 1, 86_400), default=600, metavar="SECONDS",
        help="under torchrun: the longest wait for another process")  # fmt: skip
    args = parser.parse_args(argv)
    check_processes(args.batch_size)
    if args.from_scratch and args.model_name:
        raise UserError("--from-scratch and --model-name exclude each other")
    if args.lora_alpha and not args.lora_rank:
        raise UserError(f"--lora-alpha {args.lora_alpha} has no effect without --lora-rank")
    if args.lora_rank and args.from_scratch:
        raise UserError("--lora-rank and --from-scratch exclude each other")
    args.lora_alpha = args.lora_alpha or 2 * args.lora_rank or None
    return args


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered in 0.1 s, not in 4 s
    args = parse_first(parse_args)

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data.blocks import BatchOrder, open_blocks, read_manifest
from utils.data.tokenizer import fingerprint_tokenizer, load_tokenizer, start_ids
from utils.evaluation.generation import Decoding, encode_prompt, generate_ids, show_continued
from utils.evaluation.loss import describe_result, score_blocks, summarize_loss
from utils.evaluation.memorization import CopyMonitor
from utils.evaluation.unseen import save_training_ngrams
from utils.model import loading
from utils.model.hub import find_local, hash_model, locate_model
from utils.model.layers import use_fast_layers
from utils.model.lora import add_adapter
from utils.output_dir import check_output_dir, lock
from utils.storage import clear_folder, require_space, sweep
from utils.training import checkpoint as checkpoints
from utils.training import parallel, sharding
from utils.training.forecast import choose_micro_batch, forecast_run
from utils.training.metrics import MetricsLog, write_results, write_run_config
from utils.training.optim import StepFigures, build_optimizer, build_schedule, clip_gradients, set_lr
from utils.training.random_state import restore_random_state
from utils.training.setup import TrainingSetup, collect_settings, keep_freed_memory


def claim_output_dir(args):
    """Check the output folder and return its lock as a context; a dry run writes nothing and holds none."""
    if not parallel.is_main():
        return nullcontext()
    inputs = [args.data_dir, args.model_name or read_manifest(args.data_dir)["model_name"] or ""]
    is_ours = (args.output_dir / "run_config.json").is_file()
    check_output_dir(args.output_dir, is_ours, "finetune_generative.py", args.overwrite, inputs)
    return nullcontext() if args.dry_run else lock(args.output_dir, "train")


def find_base(args, data):
    """Return name and folder of the base model; the folder is None where it is not needed or no longer there."""
    if args.from_scratch:
        return str(args.output_dir / "untrained_model"), None
    base = args.model_name or data.manifest["model_name"]
    if base is None:
        raise UserError("the data has a tokenizer of its own and no model; give --from-scratch CONFIG.json")
    is_new = args.overwrite or not checkpoints.has_results(args.output_dir)
    return base, (locate_model if is_new else find_local)(base) if parallel.is_main() else None


def find_run(args, settings):
    """Return the checkpoint to resume from and its state; None and an empty state for a new run."""
    found, saved = None, {}
    if parallel.is_main():
        if not args.overwrite and (args.output_dir / "run_config.json").is_file():
            checkpoints.refuse_other_settings(args.output_dir / "run_config.json", settings)
            found = checkpoints.find_checkpoint(args.output_dir)
            saved = vars(checkpoints.read_state(found)) if found else checkpoints.read_end(args.output_dir)
        if not args.dry_run:
            sweep(args.output_dir)
    found, saved = parallel.from_main([found and str(found), saved])
    state, now = checkpoints.TrainState(**saved), parallel.size()
    before = state.machine.get("processes", 1) if found else now
    if args.deterministic and before != now:
        raise UserError(f"resume: the run has {before} processes, now {now}; with --deterministic use as many")
    return found and Path(found), state


def load_model(args, data, base, folder, checkpoint, device):
    """Load the checkpoint's model, the base model or a new one, with its tokenizer, and prepare it for training."""
    model, tokenizer = None, load_tokenizer(args.data_dir / "tokenizer")
    if not parallel.is_main():
        pass  # process 0 alone reads the model
    elif checkpoint and not args.lora_rank:
        model, tokenizer = loading.load_pair(checkpoint, verified=True, dropout=args.dropout)
    elif args.from_scratch:
        model = loading.new_model(args.from_scratch, tokenizer, args.seed, args.dropout)
    else:
        if folder is None:  # the base has left the cache since the run was started
            folder = locate_model(base)
            checkpoints.refuse_other_settings(args.output_dir / "run_config.json", {"base_sha256": hash_model(folder)})
        model, tokenizer = loading.load_pair(folder, dropout=args.dropout)
    if fingerprint_tokenizer(tokenizer) != data.manifest["tokenizer"]["sha256"]:
        raise UserError(f"data was made with another tokenizer than {base}'s; run prepare_data.py --model-name {base}")
    model = sharding.build_alike(model).train()
    loading.check_fit(model, data)
    if args.lora_rank:
        add_adapter(model, args.lora_rank, args.lora_alpha, args.seed, base, checkpoint if parallel.is_main() else None)
    use_fast_layers(model, device, args.compile)
    if args.gradient_checkpointing:
        loading.use_checkpointing(model)
    sharding.shard(model, device)
    return model, tokenizer


def build_setup(args, data, model, tokenizer, device, dtype, order, max_steps, sample_ids, state):
    """Decide everything that the loop needs before its first step."""
    autocast = functools.partial(loading.autocast, device, dtype)
    # A resumed run keeps its micro-batch: another one rounds differently.
    given = args.micro_batch_size or state.machine.get("micro_batch_size")
    flags = {name: value for name, value in vars(args).items() if name in TrainingSetup.__dataclass_fields__}
    return TrainingSetup(**flags | {
        "device": device, "dtype": dtype, "autocast": autocast, "order": order, "max_steps": max_steps,
        "micro_batch_size": choose_micro_batch(model, data, autocast, args.batch_size, given),
        "schedule": build_schedule(args.lr_schedule, args.learning_rate, max_steps, args.warmup_ratio),
        "eval_every": args.eval_every or max(1, max_steps // 10),
        "copy_monitor": CopyMonitor(data, model, tokenizer, args.copy_samples, args.max_copy_rate, args.seed),
        "sample_ids": sample_ids,
    })  # fmt: skip


def start_run(args, settings, data, base, model, tokenizer, setup, state):
    """Clear the output folder and write down what the run is."""
    checkpoints.record_machine(state, setup.device, setup.dtype, setup.micro_batch_size)
    if parallel.is_main():
        used = sum(path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file())
        most = max(checkpoints.checkpoint_bytes(model), checkpoints.best_bytes(model))
        require_space(args.output_dir, 2 * most - used, "a new run")
        # Only now: everything that could be refused has been. The mark that makes the folder ours is replaced last.
        clear_folder(args.output_dir, keep=["run_config.json"])
        write_run_config(args.output_dir, settings, vars(args), base, model, data, state.machine)
        save_training_ngrams(args.output_dir, data.view("train"))
    if args.from_scratch:  # so that generate_text.py has a base to compare with
        checkpoints.save_best(Path(base), model, tokenizer, loading.DTYPES[args.save_dtype])


def resume_run(setup, model, optimizer, state, checkpoint):
    """Restore optimizer and RNG state from a checkpoint, whose weights are loaded already."""
    if parallel.is_main():
        require_space(setup.output_dir, checkpoints.checkpoint_bytes(model), "a checkpoint")
    checkpoints.restore_optimizer(model, optimizer, checkpoint / "optimizer.safetensors")
    restore_random_state(checkpoint / "rng_state.safetensors", setup.device)
    checkpoints.record_machine(state, setup.device, setup.dtype, setup.micro_batch_size)


def forward_backward(model, input_ids, share):
    """Add a micro-batch's gradients, weighted by its share of the step's blocks; return its share of the loss."""
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss * share  # shifts inside
    loss.backward()
    return loss.detach()


def train(setup, save_every, model, tokenizer, data, optimizer, state):
    """Run the loop; return 0 when the run is finished, else the number of the signal that stopped it."""
    stopping, started, resumed_at = parallel.AgreedSignal(StopSignal()), time.monotonic() - state.seconds, state.step
    out, clock = setup.output_dir, (time.monotonic(), state.tokens)  # since when the speed is measured
    log = MetricsLog(out, state.step, state.evaluated_step, setup.report_to == "tensorboard")
    # A generator of its own: a DataLoader without one draws from the generator that dropout uses.
    mine = map(parallel.share, setup.order.batches(state.step, setup.max_steps))
    loader = DataLoader(data.train, sampler=mine, batch_size=None,
                        num_workers=setup.num_workers, pin_memory=setup.device.type == "cuda",
                        generator=torch.Generator(), worker_init_fn=ignore_signals)  # fmt: skip
    batches, figures = iter(loader), StepFigures(model.device)
    model.train()
    with tqdm(total=setup.max_steps, initial=state.step, unit="step", desc="training") as bar, closing(log):
        while True:  # nothing else advances state.step
            last = state.step >= setup.max_steps
            due = last or state.step % setup.eval_every == 0
            if due and state.evaluated_step != state.step:  # 1 evaluate; step 0 measures the base model
                figures.read()
                result = evaluate(setup, model, data, stopping)
                if result is not None:  # None: a signal came; the resumed run evaluates this step
                    if state.record_evaluation(result, setup.copy_monitor.limit):
                        checkpoints.save_best(out, model, tokenizer, loading.DTYPES[setup.save_dtype])
                    log.write(state.step, result)
                    tqdm.write(f"step {state.step}: {describe_result(result)}{draw_sample(setup, model, tokenizer)}")
                    last = last or state.evals_without_gain == setup.early_stopping_patience
            state.seconds, state.finished = time.monotonic() - started, last and state.evaluated_step == state.step
            last = last or bool(stopping)
            saves = last or (state.step % save_every == 0 and state.step > resumed_at)
            if saves:  # 2 save
                figures.read()
                log.sync()
                checkpoints.save_checkpoint(out, model, tokenizer, optimizer, state, setup.keep_checkpoints)
            if last:  # 3 stop
                break
            if due or saves:
                clock = (time.monotonic(), state.tokens)
            lr = set_lr(optimizer, setup.schedule(state.step))  # 4 learning rate
            step_batches = setup.order.step_batches(state.step)
            n_blocks = sum(map(len, step_batches))
            mean_loss = torch.zeros((), device=model.device)
            with setup.autocast():  # 5 accumulate, weighted by tokens; in one context, so that weights are cast once
                for blocks in step_batches:
                    batch = next(batches)["input_ids"].to(model.device, non_blocking=True)
                    for input_ids, count in parallel.split_passes(batch, len(blocks), setup.micro_batch_size):
                        mean_loss += forward_backward(model, input_ids, count / n_blocks)
            grad_norm = clip_gradients(model, setup.max_grad_norm)
            # 6 refuse NaN before it reaches the weights: decided on the device, so that the loop does not wait for it
            figures.note(optimizer, state.step + 1, parallel.sum_over(mean_loss), grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1  # 7 count, then log
            state.tokens += n_blocks * data.block_size
            if state.step % setup.log_every == 0:
                train_loss, grad_norm = figures.read()
                now = (time.monotonic(), state.tokens)
                speed, clock = (now[1] - clock[1]) / (now[0] - clock[0]), now
                row = {"loss": train_loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_sec": round(speed, 1)}
                log.write(state.step, {f"train/{name}": value for name, value in row.items()})
                bar.set_postfix_str(f"loss {train_loss:.3f}, lr {lr:.1e}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
    return 0 if state.finished else stopping.number


def evaluate(setup, model, data, stopping):
    """Score all validation blocks and measure copying; {} without blocks, None when a signal interrupted it."""
    if not len(data.validation):
        return {}
    mine, own = parallel.share_batches(len(data.validation), setup.eval_batch_size)
    with tqdm(total=len(mine), unit="block", desc="evaluating", leave=False, delay=2) as bar:
        blocks = data.validation.select(mine)
        scored = score_blocks(model, blocks, setup.eval_batch_size, setup.autocast, bar.update, stopping)
    if scored is None:
        return None
    losses = parallel.join_batches(scored[0][:own], setup.eval_batch_size)
    result = summarize_loss(sum(losses), len(losses) * (data.block_size - 1), data.bytes_per_token)
    with sharding.unsharded(model) if setup.copy_monitor.prompts else nullcontext():
        return parallel.from_main(result | setup.copy_monitor.measure(model, setup.autocast))


def draw_sample(setup, model, tokenizer):
    """Continue the fixed prompt with a fixed seed; the RNG of the training is not used."""
    if not setup.sample_tokens:
        return ""
    decoding = Decoding(max_new_tokens=setup.sample_tokens)
    with sharding.unsharded(model):
        ids = generate_ids(model, tokenizer.eos_token_id, [setup.sample_ids], [setup.seed], decoding, setup.autocast,
                           start=start_ids(tokenizer))[0]  # fmt: skip
    return "\n  | " + show_continued(tokenizer, setup.sample_ids, ids).replace("\n", "\n  | ")


def print_settings(args, setup, data, model, base, forecast):
    batch, limit = setup.order.blocks_per_step, setup.copy_monitor.limit
    print_table("training", [
        ("model", f"{base}, {loading.count_parameters(model):,} parameters"),
        ("LoRA", f"rank {args.lora_rank}, alpha {args.lora_alpha}, {loading.count_parameters(model, trained=True):,} "
                 "parameters trained" if args.lora_rank else None),
        ("data", f"{args.data_dir}: {len(data.train):,} + {len(data.validation):,} blocks of {data.block_size} tokens"),
        ("step", f"{batch} blocks ({args.grad_accum_steps} x {args.batch_size}), {batch * data.block_size:,} tokens; "
                 f"{setup.micro_batch_size} blocks per forward pass"),
        ("length", f"{setup.max_steps:,} steps, {setup.order.steps_per_epoch:,} per epoch"),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_schedule}, warm-up {args.warmup_ratio:.0%}"),
        ("evaluate, save", f"every {setup.eval_every:,} and {forecast.save_every:,} steps"),
        ("copying", f"at most {limit:.1%} of a sample's tokens" if setup.copy_monitor.prompts else None),
        ("device", f"{setup.device}, {setup.dtype}, {torch.get_num_threads()} threads"),
        ("processes", parallel.size() if parallel.size() > 1 else None),
        ("output", args.output_dir),
        ("forecast", forecast),
    ])  # fmt: skip
    if len(data.train) < batch:
        warn(f"a batch is the {len(data.train)} blocks there are, not {batch}")


def print_results(setup, state, results):
    if {"base_eval_loss", "eval_loss", "base_perplexity", "perplexity"} <= results.keys():
        print(f"validation loss {results['base_eval_loss']:.4f} -> {results['eval_loss']:.4f} nats per token "
              f"(best at step {state.best_step}), perplexity {results['base_perplexity']:.2f} -> "
              f"{results['perplexity']:.2f}; {state.seconds:.0f} s")  # fmt: skip
        if results.get("copy_rate", 0) > setup.copy_monitor.limit:
            warn(f"every model copied more than {setup.copy_monitor.limit:.1%} of its sample; fewer epochs help")
        if results["eval_loss"] >= results["base_eval_loss"]:
            warn("no evaluation was better than the base model's; try a lower --learning-rate or fewer epochs")
    print(f"best model: {setup.output_dir}\nnext: python generate_text.py")


def main(args):
    keep_freed_memory()
    loading.set_deterministic(args.deterministic)
    joined = parallel.joined(loading.pick_device(args.device), args.process_timeout)
    with joined as device, claim_output_dir(args):
        data = open_blocks(args.data_dir)
        parallel.refuse_other_command(vars(args), data.sha256)
        dtype = loading.pick_dtype(args.dtype, device)
        order = BatchOrder(len(data.train), args.batch_size, args.grad_accum_steps, args.seed)
        max_steps = args.max_steps or args.epochs * order.steps_per_epoch
        base, folder = find_base(args, data)
        settings = collect_settings(vars(args), data.sha256, base, folder)
        checkpoint, state = find_run(args, settings)
        if state.finished:
            if checkpoint and not args.dry_run and parallel.is_main():
                checkpoints.remove_older(checkpoint, args.keep_checkpoints)
                write_results(args.output_dir, state, max_steps)
            print(f"already complete at step {state.step}: {args.output_dir}; --overwrite starts a new run")
            return 0
        if checkpoint:
            print(f"resuming from step {state.step} of {max_steps} ({checkpoint})")
        saved = functools.partial(checkpoints.list_checkpoints, args.output_dir)
        explained = functools.partial(explain_failures, state, saved, args.batch_size, args.learning_rate)
        with explained():
            model, tokenizer = load_model(args, data, base, folder, checkpoint, device)
            sample_ids = encode_prompt(tokenizer, args.sample_prompt)
            betas = (args.adam_beta1, args.adam_beta2)
            optimizer = build_optimizer(model, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
            setup = build_setup(args, data, model, tokenizer, device, dtype, order, max_steps, sample_ids, state)
            forecast = forecast_run(setup, model, optimizer, data, state.step, forward_backward)
        print_settings(args, setup, data, model, base, forecast)
        if args.dry_run:
            return 0
        # Of dropout, in each process another; batch order and samples have generators of their own.
        torch.manual_seed(args.seed + parallel.rank())
        if checkpoint:
            resume_run(setup, model, optimizer, state, checkpoint)
        else:
            start_run(args, settings, data, base, model, tokenizer, setup, state)
        with explained():
            stopped_by = train(setup, forecast.save_every, model, tokenizer, data, optimizer, state)
            results = write_results(args.output_dir, state, max_steps) if parallel.is_main() else {}
    if stopped_by:
        print(f"stopped at step {state.step} of {max_steps}, saved; {resume_advice()}")
        return 128 + stopped_by
    print_results(setup, state, results)
    return 0


if __name__ == "__main__":
    run(main, args, may_speak=parallel.claim_error_line)
