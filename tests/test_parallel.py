"""Several processes: the same run, the same folder, and an end for all when one fails.

The processes are forked children with torchrun's environment; the test holds the store, as torchrun's agent does.
One test starts torchrun itself.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import replace
from counts import record_count
from forked import Child, digest_run, fresh, run_child, strays, undisturbed, workshop  # noqa: F401
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import finetune_generative
from utils.evaluation import generation
from utils.model import hub, loading
from utils.storage import read_json
from utils.training import checkpoint, forecast, optim, parallel

ROOT = Path(__file__).parent.parent
SEED = 1872
SAME = ("--dropout", 0, "--micro-batch-size", 1, "--batch-size", 8, "--learning-rate", "1e-3")


class Group:
    """N processes of one command, or of a list of N.

    Args:
        prepare: called in each process with its rank before the script, to set hooks and traps.
    """

    def __init__(self, n, command, prepare=None):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                                   timeout=timedelta(seconds=60))  # fmt: skip
        commands = command if isinstance(command, list) else [command] * n
        self.children = [Child(*command, self._hook(rank, n, prepare)) for rank, command in enumerate(commands)]

    def _hook(self, rank, n, prepare):
        def hook():
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                           "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
            if prepare:
                prepare(rank)

        return hook

    def wait(self, timeout=60):
        """Return what each process has ended with."""
        return [child.wait(timeout) for child in self.children]

    def wait_for(self, path, timeout=60):
        """Wait until the processes have made a file or folder."""
        until = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < until, f"{path} was not made"
            time.sleep(0.01)

    def kill(self, number=signal.SIGKILL, rank=None):
        for child in self.children if rank is None else [self.children[rank]]:
            child.kill(number)


def run_group(n, command, prepare=None, timeout=60):
    if n == 1:
        return [run_child(*command, timeout=timeout)]
    return Group(n, command, prepare).wait(timeout)


def check_all(ended, code=0):
    assert [process.code for process in ended] == [code] * len(ended), "\n".join(process.err for process in ended)
    return ended


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same_run(one, other, loss=1e-6, weights=1e-5):
    """Check that two runs have the same losses (relative) and last weights (absolute); return rows and differences."""
    differences, pairs = [0.0], list(zip(read_rows(one), read_rows(other), strict=True))
    for before, after in pairs:
        assert before.keys() == after.keys()
        for name in {"train/loss", "eval/loss", "train/grad_norm"} & before.keys():
            assert after[name] == pytest.approx(before[name], rel=loss), (name, before["step"])
            differences.append(abs(after[name] / before[name] - 1))
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    of_weights = max((first[name] - second[name]).abs().max().item() for name in first)
    assert of_weights <= weights
    return len(pairs), max(differences), of_weights


def said(ended):
    """Return the error lines of all processes."""
    return [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]


def test_same_losses_for_any_number_of_processes(workshop, amount):  # noqa: F811
    steps = amount(12, 200)
    flags = (*SAME, "--max-steps", steps, "--eval-every", 6, "--save-every", steps)
    folders = {n: fresh(workshop.folder / f"same-{n}") for n in (1, 2, 4)}
    for n, folder in folders.items():
        check_all(run_group(n, workshop.finetune(folder, *flags), timeout=300))
        assert not strays(folder)
    for n in (2, 4):
        rows, losses, weights = check_same_run(folders[1], folders[n])
        assert rows > steps
        record_count("processes", number=n, most_steps=steps, most_loss=losses, most_weight=weights)
        names = {path.relative_to(folders[n]).as_posix() for path in folders[n].rglob("*")}
        assert names == {path.relative_to(folders[1]).as_posix() for path in folders[1].rglob("*")}


def test_two_processes_equal_one_to_the_bit(workshop):  # noqa: F811
    """x + y = y + x: with one block per pass and process, and no norm summed by parts, nothing is left to differ."""
    flags = (*SAME, "--batch-size", 2, "--max-grad-norm", "1e9")
    digests = []
    for n in (1, 2):
        folder = fresh(workshop.folder / f"bits-{n}")
        check_all(run_group(n, workshop.finetune(folder, *flags)))
        digests.append((digest_run(folder), [row.get("train/loss", row.get("eval/loss")) for row in read_rows(folder)]))
    assert digests[0] == digests[1]


def test_bf16_gives_the_same_losses_and_keeps_no_whole_weights(workshop):  # noqa: F811
    """Autocast keeps the weights that it has cast, in one process; in several, they would be whole in each."""
    flags = (*SAME, "--dtype", "bf16", "--max-steps", 12, "--copy-samples", 2)
    folders = {n: fresh(workshop.folder / f"bf16-{n}") for n in (1, 2)}

    def check_cache(_rank):
        def forward(*args):
            assert not torch.is_autocast_cache_enabled()
            return forward_backward(*args)

        def generate(*args, **options):
            assert torch.is_autocast_cache_enabled()  # else each token casts all weights
            return generate_ids(*args, **options)

        forward_backward, generate_ids = finetune_generative.forward_backward, generation.generate_ids
        replace(finetune_generative, "forward_backward", forward)
        replace(generation, "generate_ids", generate)

    check_all(run_group(1, workshop.finetune(folders[1], *flags)))
    check_all(run_group(2, workshop.finetune(folders[2], *flags), check_cache))
    check_same_run(folders[1], folders[2], loss=1e-4, weights=1e-4)


def test_gradient_checkpointing_changes_no_bit(workshop):  # noqa: F811
    digests = set()
    for flags in ((), ("--gradient-checkpointing",)):
        out = fresh(workshop.folder / "checkpointing")
        check_all(run_group(2, workshop.finetune(out, *SAME, "--dropout", "0.3", *flags)))
        digests.add(digest_run(out))
    assert len(digests) == 1


def test_the_evaluation_has_the_same_bits_for_any_number_of_processes(workshop):  # noqa: F811
    flags = (*SAME, "--max-steps", 1, "--eval-batch-size", 2, "--copy-samples", 2)
    losses = []
    for n in (1, 2, 3, 4):
        folder = fresh(workshop.folder / f"eval-{n}")
        check_all(run_group(n, workshop.finetune(folder, *flags)))
        losses.append(next((row["eval/loss"], row.get("eval/copy_rate")) for row in read_rows(folder)))
    assert len(set(losses)) == 1


@pytest.mark.parametrize("n_blocks", [1, 2, 5, 7, 8, 33])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_every_block_is_scored_once_in_as_many_passes_as_elsewhere(monkeypatch, n_blocks, batch_size):
    for n in (1, 2, 3, 4):
        found, passes = {}, set()
        rows = []
        for rank in range(n):
            monkeypatch.setattr(parallel, "size", lambda n=n: n)
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            blocks, own = parallel.share_batches(n_blocks, batch_size)
            passes.add(math.ceil(len(blocks) / batch_size))
            rows.append(torch.tensor(blocks[:own], dtype=torch.float64))
            found |= dict.fromkeys(blocks[:own], rank)
        assert passes == {math.ceil(math.ceil(n_blocks / batch_size) / n)}
        assert sorted(found) == list(range(n_blocks))
        monkeypatch.setattr(parallel, "gather_rows", lambda _own, rows=rows: rows)
        assert parallel.join_batches(rows[0].tolist(), batch_size) == list(range(n_blocks))


@pytest.mark.parametrize("n_blocks", [1, 2, 5, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_block_is_trained_on_once_in_as_many_passes_as_elsewhere(monkeypatch, n_blocks, micro_batch_size):
    for n in (1, 2, 3, 4):
        counted, passes = 0, set()
        for rank in range(n):
            monkeypatch.setattr(parallel, "size", lambda n=n: n)
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            mine = torch.tensor(parallel.share(list(range(n_blocks))))[:, None]
            parts = parallel.split_passes(mine, n_blocks, micro_batch_size)
            counted += sum(count for _, count in parts)
            passes.add(len(parts))
            assert all(len(part) for part, _ in parts)
        assert counted == n_blocks
        assert len(passes) == 1


def stop_at(n, command, out, step):
    """Start n processes and stop them, all at once, when they have saved a step."""
    group = Group(n, command)
    group.wait_for(out / f"checkpoint-{step}")
    group.kill(signal.SIGTERM)
    return group.wait()


def test_processes_take_over_from_each_other(workshop):  # noqa: F811
    flags = (*SAME, "--max-steps", 40, "--eval-every", 20, "--save-every", 5)
    whole, out = fresh(workshop.folder / "unbroken"), fresh(workshop.folder / "relay")
    check_all(run_group(1, workshop.finetune(whole, *flags)))
    command, done = workshop.finetune(out, *flags), 0
    for n in (1, 2, 4):
        ended = check_all(stop_at(n, command, out, done + 5), 143)
        done = checkpoint.find_checkpoint(out)
        done = int(done.name.split("-")[1]) // 5 * 5
        assert "saved; run the same command to resume" in ended[0].out
    ended = check_all(run_group(1, command))
    assert "warning: not bit-identical from here: processes 1, was 4" in ended[0].err
    assert check_same_run(whole, out)[0] == 43


def test_as_many_processes_resume_to_the_bit(workshop):  # noqa: F811
    """With dropout: every process draws from a generator of its own, which the checkpoint keeps."""
    flags = ("--dropout", "0.3", "--batch-size", 4, "--max-steps", 30, "--save-every", 5, "--eval-every", 10)
    whole, out = fresh(workshop.folder / "unbroken-2"), fresh(workshop.folder / "resumed-2")
    check_all(run_group(2, workshop.finetune(whole, *flags)))
    command = workshop.finetune(out, *flags)
    check_all(stop_at(2, command, out, 5), 143)
    check_all(run_group(2, command))
    assert digest_run(out, 30) == digest_run(whole, 30)
    states = load_file(out / "checkpoint-30" / "rng_state.safetensors")
    assert not torch.equal(states["cpu"], states["cpu.1"])


def test_an_adapter_is_the_same_for_any_number_of_processes(workshop):  # noqa: F811
    """Of rank 2 some of four processes hold no row of A; two that are stopped are resumed by two, to the bit."""
    pytest.importorskip("peft")  # before the forks, so that no child imports it
    flags = (*SAME, "--lora-rank", 2, "--max-steps", 12, "--eval-every", 6, "--save-every", 6)
    folders = {n: fresh(workshop.folder / f"adapter-{n}") for n in (1, 2, 4)}
    for n, folder in folders.items():
        check_all(run_group(n, workshop.finetune(folder, *flags)))
        assert not strays(folder)
    for n in (2, 4):
        assert check_same_run(folders[1], folders[n])[0] > 12
        names = {path.relative_to(folders[n]).as_posix() for path in folders[n].rglob("*")}
        assert names == {path.relative_to(folders[1]).as_posix() for path in folders[1].rglob("*")}
    out = fresh(workshop.folder / "adapter-resumed")
    check_all(run_group(2, workshop.finetune(out, *flags), stop_in_step(6)), 143)
    assert not (out / "checkpoint-12").exists()
    check_all(run_group(2, workshop.finetune(out, *flags)))
    assert digest_run(out, 12) == digest_run(folders[2], 12)


def stop_in_step(step):
    """Return a hook that sends SIGTERM to each process in the step that begins at `step`."""

    def prepare(_rank):
        def stopping(*settings, build=optim.build_schedule):
            schedule = build(*settings)
            return lambda now: (now == step and signal.raise_signal(signal.SIGTERM)) or schedule(now)

        replace(optim, "build_schedule", stopping)

    return prepare


def test_each_process_holds_its_share(workshop):  # noqa: F811
    """Counted: weights and gradients in the last step, AdamW's two averages when they are saved."""
    out, held = fresh(workshop.folder / "shares"), workshop.folder / "held"
    held.mkdir(exist_ok=True)

    def write_down(rank, what, tensors):
        n_held = sum(getattr(tensor, "to_local", tensor.detach)().numel() for tensor in tensors)
        (held / f"{what}-{rank}").write_text(str(n_held))

    def prepare(rank):
        def clip(model, max_norm):
            norm = clip_gradients(model, max_norm)
            write_down(rank, "weights", model.parameters())
            write_down(rank, "gradients", [p.grad for p in model.parameters()])
            return norm

        def save(model, optimizer, path):
            for key in ("exp_avg", "exp_avg_sq"):
                write_down(rank, key, [optimizer.state[p][key] for p in model.parameters()])
            save_optimizer(model, optimizer, path)

        clip_gradients, save_optimizer = finetune_generative.clip_gradients, checkpoint.save_optimizer
        replace(finetune_generative, "clip_gradients", clip)
        replace(checkpoint, "save_optimizer", save)

    check_all(run_group(4, workshop.finetune(out, *SAME), prepare))
    whole = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    for what in ("weights", "gradients", "exp_avg", "exp_avg_sq"):
        counts = [int((held / f"{what}-{rank}").read_text()) for rank in range(4)]
        assert sum(counts) == whole, what
        assert max(counts) <= 0.3 * whole, what


class Traffic(TorchDispatchMode):
    """Counts the bytes that collective operations gather or reduce."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d."):
            self.sent += max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        return function(*args, **(kwargs or {}))


def test_a_pass_gathers_the_weights_twice_and_reduces_the_gradients_once(workshop, tmp_path):  # noqa: F811
    def prepare(rank):
        def forward(*args):
            with Traffic() as traffic:
                loss = forward_backward(*args)
            (tmp_path / f"sent-{rank}").write_text(str(traffic.sent))
            return loss

        forward_backward = finetune_generative.forward_backward
        replace(finetune_generative, "forward_backward", forward)

    out = tmp_path / "out"
    check_all(run_group(2, workshop.finetune(out, *SAME, "--max-steps", 1), prepare))
    whole = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    for rank in range(2):
        assert int((tmp_path / f"sent-{rank}").read_text()) == pytest.approx(3 * 4 * whole, rel=0.02)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_the_same_command_resumes(workshop, amount, rank):  # noqa: F811
    flags = (*SAME, "--batch-size", 4, "--max-steps", 40, "--save-every", 2, "--eval-every", 20)
    whole = workshop.folder / "unbroken-kill"
    if not whole.is_dir():
        check_all(run_group(1, workshop.finetune(whole, *flags)))
    rng = random.Random(SEED + rank)
    for trial in range(amount(2, 25)):
        out = fresh(workshop.folder / f"killed-{rank}")
        group = Group(2, workshop.finetune(out, *flags))
        if trial % 2:  # while it starts; else at a save or soon after it, long before the end
            time.sleep(rng.uniform(0.1, 1))
        else:
            group.wait_for(out / f"checkpoint-{rng.randrange(2, 20, 2)}")
            time.sleep(rng.uniform(0, 0.1))
        group.kill(rank=rank)
        ended = group.wait(timeout=60)
        survivor = ended[1 - rank]
        where = f"rank {rank}, trial {trial}: {survivor.err}"
        assert (ended[rank].code, survivor.code) == (-signal.SIGKILL, 3), where
        assert len(said(ended)) == 1, where
        assert "another process has ended" in said(ended)[0], where
        assert "Traceback" not in survivor.err, where
        check_all(run_group(2, workshop.finetune(out, *flags)))
        check_same_run(whole, out)
        assert not strays(out)
    record_count("killed processes", rank=rank, kills=trial + 1)


def test_a_signal_to_all_saves_once(workshop):  # noqa: F811
    out = fresh(workshop.folder / "signal")
    flags = (*SAME, "--max-steps", 400, "--save-every", 5)
    ended = check_all(stop_at(2, workshop.finetune(out, *flags), out, 5), 143)
    assert "saved; run the same command to resume" in ended[0].out
    assert not said(ended)
    assert "stopped" not in ended[0].err + ended[1].err + ended[1].out
    assert checkpoint.find_checkpoint(out)


def test_a_signal_to_one_process_stops_all(workshop):  # noqa: F811
    out = fresh(workshop.folder / "signal-1")
    group = Group(2, workshop.finetune(out, *SAME, "--max-steps", 400, "--save-every", 5))
    group.wait_for(out / "checkpoint-5")
    group.kill(signal.SIGTERM, rank=1)
    check_all(group.wait(), 143)


def fail_in(rank, name, failure):
    """Return a hook that makes a function fail in one process, after the forecast and a few steps."""

    def prepare(own):
        if own == rank:
            calls = []
            real = getattr(finetune_generative, name)

            def fail(*args):
                calls.append(1)
                result = real(*args)
                return failure() if len(calls) > 6 else result

            replace(finetune_generative, name, fail)

    return prepare


def raise_full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("name", "failure", "code", "message"), [
    ("clip_gradients", lambda: torch.tensor(math.nan), 4, "gradient is not a finite number"),
    ("set_lr", raise_full, 3, "no space left on device"),
], ids=["nan", "disk"])  # fmt: skip
def test_what_one_process_sees_ends_all_and_is_said_once(workshop, rank, name, failure, code, message):  # noqa: F811
    out = fresh(workshop.folder / "fails")
    ended = run_group(2, workshop.finetune(out, *SAME), fail_in(rank, name, failure))
    assert ended[rank].code == code, ended[rank].err
    assert ended[1 - rank].code in (3, code)
    assert len(said(ended)) == 1, said(ended)
    assert message in said(ended)[0]
    assert "Traceback" not in "".join(process.err for process in ended)


def test_a_refusal_is_said_once(workshop, undisturbed):  # noqa: F811
    ended = run_group(2, workshop.finetune(undisturbed, "--max-steps", 7))
    assert {process.code for process in ended} <= {2, 3}
    assert len(said(ended)) == 1
    assert "resume: --max-steps 7 but the run has 6" in said(ended)[0]


def test_a_batch_smaller_than_the_processes_is_refused(workshop):  # noqa: F811
    out = fresh(workshop.folder / "small")
    ended = check_all(run_group(4, workshop.finetune(out, "--batch-size", 3)), 2)
    assert said(ended) == ["error: --batch-size 3 is less than the 4 processes; use a larger one, or fewer"]
    assert not out.exists()


def test_process_0_alone_reads_the_model_and_has_the_folder_of_the_run(workshop):  # noqa: F811
    """Machines need a copy of the data, under any path, and nothing else; also to resume."""
    flags = (*SAME, "--max-steps", 12, "--save-every", 3)
    whole, out, nowhere = (fresh(workshop.folder / name) for name in ("apart-1", "apart-2", "nowhere"))
    copied = shutil.copytree(workshop.data, fresh(workshop.folder / "copied"))
    check_all(run_group(1, workshop.finetune(whole, *flags)))
    commands = [workshop.finetune(out, *flags), workshop.finetune(nowhere, *flags, "--data-dir", copied)]

    def read_nothing(rank):
        if rank:
            for owner, name in ((loading, "load_pair"), (hub, "locate_model"), (hub, "find_local")):
                replace(owner, name, lambda *_, name=name: pytest.fail(name))

    group = Group(2, commands, read_nothing)
    group.wait_for(out / "checkpoint-3")
    group.kill(signal.SIGTERM)
    check_all(group.wait(), 143)
    check_all(run_group(2, commands, read_nothing))
    assert check_same_run(whole, out)[0]
    assert not nowhere.exists()


def test_other_flags_or_data_than_those_of_process_0_are_refused(workshop, tmp_path):  # noqa: F811
    out, first = tmp_path / "out", workshop.finetune(tmp_path / "out", *SAME)
    script, argv = workshop.prepare(tmp_path / "data")
    assert run_child(script, [*argv, "--val-split", "0.3"]).code == 0
    for other, says in (
        (("--batch-size", 4), "--batch-size 4, process 0 has 8; give all the same flags and data"),
        (("--micro-batch-size", 2), "--micro-batch-size 2, process 0 has 1; "),
        (("--data-dir", tmp_path / "data"), "--data-dir "),
    ):
        ended = run_group(2, [first, workshop.finetune(out, *SAME, *other)])
        assert [process.code for process in ended] == [3, 2]
        assert len(said(ended)) == 1
        assert f"error: process 1 has {says}" in said(ended)[0]
        assert not out.exists() or not [path for path in out.iterdir() if path.name != ".lock"]


def test_other_numbers_are_refused_where_bits_were_asked_for(workshop):  # noqa: F811
    out = fresh(workshop.folder / "deterministic")
    flags = (*SAME, "--deterministic", "--max-steps", 400, "--save-every", 5)
    check_all(stop_at(2, workshop.finetune(out, *flags), out, 5), 143)
    ended = check_all(run_group(1, workshop.finetune(out, *flags)), 2)
    assert "resume: the run has 2 processes, now 1" in said(ended)[0]


def test_a_process_that_hangs_is_waited_for_as_long_as_allowed(workshop):  # noqa: F811
    out = fresh(workshop.folder / "hangs")
    group = Group(2, workshop.finetune(out, *SAME, "--max-steps", 400, "--process-timeout", 3))
    group.wait_for(out / "checkpoint-2")
    group.kill(signal.SIGSTOP, rank=1)
    waiting = group.children[0].wait(timeout=60)
    group.kill(rank=1)
    assert waiting.code == 3, waiting.err
    assert "error: another process does not answer" in waiting.err
    assert "Traceback" not in waiting.err


def test_memory_is_counted_for_each_process(workshop):  # noqa: F811
    """Free memory is divided by the processes of this machine; the largest group is the rest of the model."""
    out, held = fresh(workshop.folder / "memory"), workshop.folder / "memory-held"
    held.mkdir(exist_ok=True)

    def prepare(rank):
        def choose(model, data, autocast, batch_size, given):
            (held / str(rank)).write_text(str(forecast.largest_group(model)))
            before = forecast.free_bytes(model.device)
            os.environ["LOCAL_WORLD_SIZE"] = "20"
            (held / f"free-{rank}").write_text(str(before / forecast.free_bytes(model.device)))
            os.environ["LOCAL_WORLD_SIZE"] = "2"
            return choose_micro_batch(model, data, autocast, batch_size, given)

        choose_micro_batch = forecast.choose_micro_batch
        replace(forecast, "choose_micro_batch", choose)

    ended = check_all(run_group(2, workshop.finetune(out, *SAME, "--dry-run"), prepare))
    assert "GB of memory in each process" in ended[0].out
    tensors = load_file(workshop.model / "model.safetensors")
    rest = sum(4 * tensor.numel() for name, tensor in tensors.items() if ".h." not in name)
    for rank in range(2):
        assert int((held / str(rank)).read_text()) == rest
        assert float((held / f"free-{rank}").read_text()) == pytest.approx(10, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
def test_forecast_of_memory(workshop, tmp_path, n):  # noqa: F811
    """Process 0's peak, saves included, with 43 million parameters: 16 bytes each are more than the program itself."""
    config = tmp_path / "config.json"
    shape = {"n_layer": 6, "n_embd": 768, "n_head": 12, "n_positions": 48}
    config.write_text(json.dumps({"model_type": "gpt2", **shape}))

    def prepare(_rank):
        def note(*args):
            print_results(*args)
            print(f"peak {forecast.peak_bytes(torch.device('cpu')) / 1e9} GB")

        print_results = finetune_generative.print_results
        replace(finetune_generative, "print_results", note)

    flags = ("--from-scratch", config, "--max-steps", 2, "--batch-size", 4, "--micro-batch-size", 1, "--eval-every", 2)
    command = workshop.finetune(tmp_path / "out", *flags)
    if n == 1:
        ended = [run_child(*command, prepare=lambda: prepare(0), timeout=300)]
    else:
        ended = run_group(n, command, prepare, timeout=300)
    printed = check_all(ended)[0].out
    expected, peak = (float(re.search(form, printed)[1]) for form in (r"([\d.]+) GB of memory", r"peak ([\d.]+) GB"))
    assert expected == pytest.approx(peak, rel=0.15)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Machines:
    """Two agents of torchrun, each as on a machine of its own with one process: another data folder, another session.

    Args:
        commands: of the two.
    """

    def __init__(self, commands, folder):
        meeting = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id run".split()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
        self.logs = [folder / f"machine-{number}.log" for number in range(2)]
        self.agents = []
        for (script, argv), log in zip(commands, self.logs, strict=True):
            with open(log, "wb") as file:
                self.agents.append(subprocess.Popen([*launcher, f"{script}.py", *map(str, argv)], cwd=ROOT,
                                                    stdout=file, stderr=file, start_new_session=True))  # fmt: skip

    def processes(self, number):
        """Return the process ids on a machine: the agent and what it has started."""
        agent = self.agents[number].pid
        return [agent, *map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split())]

    def wait(self):
        """Return the exit codes of the agents and what both machines have said."""
        return [agent.wait(timeout=120) for agent in self.agents], "".join(log.read_text() for log in self.logs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_machines(workshop, tmp_path):  # noqa: F811
    """Two agents train as one process does. One machine is lost: the other ends with one line; both start again."""
    flags = (*SAME, "--max-steps", 60, "--save-every", 5)
    whole, out = tmp_path / "whole", tmp_path / "out"
    copied = shutil.copytree(workshop.data, tmp_path / "copied")
    check_all(run_group(1, workshop.finetune(whole, *flags)))
    commands = [workshop.finetune(out, *flags), workshop.finetune(out, *flags, "--data-dir", copied)]
    for lost in (0, 1):
        machines, deadline = Machines(commands, tmp_path), time.monotonic() + 120
        before = checkpoint.list_checkpoints(out)
        while checkpoint.list_checkpoints(out)[:1] == before[:1]:
            assert time.monotonic() < deadline, machines.logs[0].read_text()
            time.sleep(0.01)
        for process in machines.processes(lost):
            os.kill(process, signal.SIGKILL)
        codes, text = machines.wait()
        assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, 1), text
        assert text.count("error: another process has ended") == 1, text
    codes, text = Machines(commands, tmp_path).wait()
    assert codes == [0, 0], text
    assert text.count("resuming from step") == text.count("best model: ") == 1
    assert check_same_run(whole, out)[0] > 60
    assert not strays(out)


def test_torchrun(workshop):  # noqa: F811
    """The real launcher: a run of two processes; then a refusal, said once by the script."""
    out = fresh(workshop.folder / "torchrun")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", str(free_port())]
    script, argv = workshop.finetune(out, *SAME)
    command = [*launcher, f"{script}.py", *map(str, argv)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("best model: ") == 1
    assert read_json(out / "run_config.json")["machine"]["processes"] == 2
    again = subprocess.run([*command, "--max-steps", "9"], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert again.returncode == 1
    assert again.stderr.count("error: resume: --max-steps 9") == 1
