"""Take each guard out, and change small things all over, to see that a test fails every time.

    python tests/mutants.py guards      every fsync, rename, checksum, lock, finiteness check ... removed
    python tests/mutants.py mistakes    the wrong lines of benchmarks/mistakes.py, each before the test that guards it
    python tests/mutants.py mutate      small changes in the modules of MUTATED, or in those named

A last word such as 2/8 runs every eighth mutant from the second on. A mutant is a module's source, changed and
given to a forked child in place of the file; the child runs the tests. Nothing on the disk is touched. Exit status 1:
no test failed for a guard, or fewer than 90 % were killed.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path

from counts import FILE, record_count

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["tests/test_storage.py", "tests/test_output_dir.py", "tests/training/test_checkpoint.py",
         "tests/training/test_random_state.py", "tests/training/test_optim.py"]  # fmt: skip
SLOWER = [
    f"tests/{name}.py"
    for name in (
        *("test_finetune_generative", "test_identity", "test_damage", "test_disk", "test_signals"),
        *("test_prepare_data", "data/test_formats", "data/test_blocks", "data/test_doctor", "test_refusals"),
        *("test_errors", "test_machines", "training/test_forecast", "training/test_lora", "model/test_layers"),
        *("model/test_families", "data/test_corpus", "data/test_tokenizer"),
        *("test_start_token", "evaluation/test_report", "evaluation/test_sharing", "evaluation/test_unseen"),
        *(f"evaluation/test_{name}" for name in ("compare", "columns", "reader", "style", "bootstrap", "verdict")),
        *(f"evaluation/test_{name}" for name in ("generation", "longtext", "interactive")),
        "test_parallel",
    )
]
MUTATED = ["utils/storage.py", "utils/output_dir.py", "utils/training/checkpoint.py"]
# Of computing, for the quick tests alone (True) and for more; by the clock, ten times as many.
SECONDS = {True: 90, False: 900}
# Module, what is taken out, what stands there instead.
GUARDS = [
    ("utils/storage.py", "        os.fsync(descriptor)\n", "        pass\n"),
    ("utils/storage.py", "        sync(partial)\n        os.replace(partial, path)",
     "        os.replace(partial, path)"),
    ("utils/storage.py", "        raise\n    sync(path.parent)\n", "        raise\n"),
    ("utils/storage.py", "        os.replace(partial, path)\n", "        path.write_bytes(partial.read_bytes())\n"),
    ("utils/storage.py", "        partial.unlink(missing_ok=True)\n        raise", "        raise"),
    ("utils/storage.py", "allow_nan=False", "allow_nan=True"),
    ("utils/storage.py", "    os.rename(path, old)\n    shutil.rmtree(old)\n", "    shutil.rmtree(path)\n"),
    ("utils/storage.py", "    if shutil.disk_usage(folder).free < size:\n", "    if False:\n"),
    ("utils/storage.py", "    require_space(folder, size, what)\n", ""),
    ("utils/storage.py", "            path.chmod(0o666 & ~mask)", "            pass"),
    ("utils/storage.py", "            sync(path)\n        manifest", "            pass\n        manifest"),
    ("utils/storage.py", "        os.rename(partial, target)\n        sync(target.parent)\n",
     "        os.rename(partial, target)\n"),
    ("utils/storage.py", "        discard(target)\n        os.rename(partial, target)\n",
     "        target.mkdir(exist_ok=True)\n        [os.replace(p, target / p.name) for p in partial.iterdir()]\n"),
    ("utils/storage.py", '{"replaces": _described(folder)}', "{}"),
    ("utils/storage.py", "        sync(folder)\n        os.replace(partial / MANIFEST",
     "        os.replace(partial / MANIFEST"),
    ("utils/storage.py", "        os.replace(partial / MANIFEST, folder / MANIFEST)\n        sync(folder)\n",
     "        os.replace(partial / MANIFEST, folder / MANIFEST)\n"),
    ("utils/storage.py", "or (before and verify_files(folder, before) is None)", ""),
    ("utils/storage.py", "    for path in (folder / PARTIAL, folder / OLD, *", "    for path in (*"),
    ("utils/storage.py", "        if real != ", "        if None is "),
    ("utils/storage.py", "        if size != expected:\n", "        if False:\n"),
    ("utils/storage.py", "        if hash_file(path) != sha256:\n", "        if False:\n"),
    ("utils/storage.py", "    if manifest.get(\"sha256\", said := _digest(manifest)) != said:\n", "    if False:\n"),
    ("utils/output_dir.py", "            fcntl.lockf(", "            (lambda *_: 0)("),
    ("utils/output_dir.py", "if os.path.samestat(os.fstat(descriptor), os.stat(path))", "if True"),
    ("utils/output_dir.py", "        sync(parent.parent)\n", ""),
    ("utils/output_dir.py", "                path.unlink()\n", "                pass\n"),
    ("utils/output_dir.py", " | os.O_NOFOLLOW", ""),
    ("utils/training/checkpoint.py", "    refuse_not_finite(model, optimizer)\n", ""),
    ("utils/training/checkpoint.py", "    refuse_not_finite(written)\n", ""),
    ("utils/training/checkpoint.py", "        reason = verify_folder(folder)\n", "        reason = None\n"),
    ("utils/training/checkpoint.py", "and made > FORMAT", "and False"),
    ("utils/training/checkpoint.py", "    if not fits:\n", "    if False:\n"),
    ("utils/training/checkpoint.py", "            if value is None or value.shape != target.shape:\n",
     "            if False:\n"),
    ("utils/training/random_state.py", '    torch.set_rng_state(states["cpu"])\n', ""),
    ("utils/training/random_state.py", "set_rng_state(states[device.type], device)", "id(states)"),
    ("utils/training/forecast.py", "    with keep_random_state(setup.device):\n", "    if True:\n"),
    ("utils/training/forecast.py", "mean(passes[WARM_UP_STEPS:])", "mean(passes)"),
    ("utils/model/layers.py", "    if n_dropped == 2**16:", "    if False:"),
    ("utils/errors.py", '"DataLoader worker (pid"', '"DataLoader worker"'),
    ("utils/evaluation/render.py", "if found := BLOCK_START.match(escaped):", "if found := None:"),
    ("utils/evaluation/render.py", "base_model=None if Path(base).is_dir() else base", "base_model=base"),
    ("utils/evaluation/render.py", "if _is_text(known.get(name))", "if known.get(name)"),
    ("utils/training/random_state.py", '        if len(states.get("cpu", [])) != expected:\n', "        if False:\n"),
    ("utils/training/parallel.py", "    if changed:\n", "    if False:\n"),
    ("utils/training/parallel.py", "    torch.set_autocast_cache_enabled(False)", "    pass"),
    ("utils/training/forecast.py", ' // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))', ""),
    ("utils/training/checkpoint.py", "    for old in saved[saved.index(folder) :][keep:]:\n", "    for old in []:\n"),
    ("utils/training/checkpoint.py", "    if changed:\n        name, was", "    if False:\n        name, was"),
    ("utils/errors.py", "        if not math.isfinite(value):\n", "        if False:\n"),
    ("utils/model/loading.py", "if not all(map(is_finite, (parameter, *", "if not all(map(id, (parameter, *"),
    ("utils/model/checks.py", "if is_mask(tensor) or (tensor.numel() == 1 and tensor.item() < -1000):", "if True:"),
    ("utils/model/checks.py", "is_binary and not tensor.triu(1).any() and ", "is_binary and "),
    ("utils/model/checks.py", "    if not torch.allclose(", "    if last < 0 and not torch.allclose("),
    ("utils/model/checks.py", "        if torch.equal(before, torch.get_rng_state()):\n", "        if False:\n"),
    ("utils/model/checks.py", "    if not is_text:\n", "    if False:\n"),
    ("utils/model/checks.py", "    if config.is_encoder_decoder:\n", "    if False:\n"),
    ("utils/data/tokenizer.py", "    if len(start_ids(tokenizer)) > 1:\n", "    if False:\n"),
    ("utils/data/tokenizer.py", ", sample, *start_ids(tokenizer)]", ", sample]"),
    ("utils/training/metrics.py", "if row[\"step\"] <= (step if \"train/loss\" in row else evaluated_step)", ""),
    ("utils/training/metrics.py", ", allow_nan=False", ""),
    ("utils/model/loading.py", "if verified or not (folder / MANIFEST).is_file() else verify_folder(folder)", ""),
    ("utils/data/formats.py", '"--sandbox", ', ""),
    ("utils/data/formats.py", "total > MAX_BYTES or ", ""),
    ("utils/data/formats.py", " or len(entries) > MAX_ENTRIES", ""),
    ("utils/data/formats.py", "file.read(entry.file_size)", "file.read()"),
    ("utils/data/formats.py", " and ENCRYPTED.search(data)", " and False"),
    ("utils/data/formats.py", ", timeout=SECONDS", ""),
    ("utils/data/formats.py", ", *LIMITS]", "]"),
    ("utils/data/formats.py", 'or ".." in re.split(r"[/\\\\]", entry)', ""),
    ("utils/data/formats.py", "    if any(entry.flag_bits & 1 ", "    if any(False "),
    ("utils/data/formats.py", "    if any(entry.compress_type not in ", "    if any(entry.compress_type in (99,) and "),
    ("utils/data/blocks.py", "    problem = verify_folder(folder)\n", "    problem = None\n"),
    ("utils/data/page_layout.py", "n_lower > len(edits) / 2 and ", ""),
    ("utils/data/page_layout.py", " and len(edits) * limit > MIN_WRAPPED * len(text)", ""),
    ("utils/data/page_layout.py", " and len(full) > 0.6 * len(fills)", ""),
    ("utils/data/page_layout.py", "max(MIN_DIVISIONS, 0.75 * len(divisions))", "MIN_DIVISIONS"),
    ("utils/data/page_layout.py", "or (named <= len(chain) / 2 and len(amid & chain) <= len(chain) / 5)", ""),
    ("utils/data/page_layout.py", "if k not in headings}", "}"),
    ("utils/data/doctor.py", " or right - left > MAX_LICENCE", ""),
    ("utils/data/doctor.py", "        if end - start >= MIN_DUPLICATE:\n", "        if end > start:\n"),
    ("utils/data/text.py", "not text.strip() and cleaned:\n", "False:\n"),
    ("utils/data/corpus.py", "    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, n_read):\n",
     "    if False:\n"),
    ("utils/data/corpus.py", "        if sha256 != book.sha256:\n", "        if False:\n"),
    ("utils/data/corpus.py", "            if len(held) > LONGEST_SLICE:\n", "            if False:\n"),
    ("utils/data/tokenizer.py", "        if asked and not self.exact:", "        if False:"),
    ("utils/data/workers.py", "            child.kill()\n", "            pass\n"),
    ("utils/data/workers.py", "    threading.Thread(target=_end_with_parent, daemon=True).start()\n", ""),
    ("utils/data/workers.py", "        if isinstance(error, BrokenProcessPool):\n", "        if False:\n"),
    ("utils/data/workers.py", "        if len(waiting) > ahead:\n", "        if len(waiting) > 1 << 30:\n"),
    ("utils/evaluation/loss.py", "        if stopping:\n", "        if False:\n"),
    ("utils/cli.py", "        if signal.getsignal(number) != signal.SIG_IGN:\n", "        if True:\n"),
    ("utils/cli.py", "        if self.number and self.is_alone:\n            leave(number, frame)\n", ""),
    ("utils/cli.py", "            if _raised:\n                raise Stopped(_raised[0]) from error\n", ""),
    ("finetune_generative.py", "                log.sync()\n", ""),
    ("utils/training/optim.py", "        require_finite(f", "        dict(a=f"),
    ("utils/training/optim.py", "        optimizer.found_inf = ", "        unused = "),
    ("utils/training/checkpoint.py", '  require_finite(self.step, **{"validation loss"', '  dict(**{"validation loss"'),
    ("finetune_generative.py", "    restore_random_state(", "    (lambda *_: 0)("),
    ("finetune_generative.py", "    checkpoints.restore_optimizer(model, optimizer, ", "    str("),
    ("finetune_generative.py", 'else lock(args.output_dir, "train")', "else nullcontext()"),
    ("finetune_generative.py", "                        generator=torch.Generator(), ", "                        "),
    ("finetune_generative.py", ", worker_init_fn=ignore_signals", ""),
    ("finetune_generative.py", "        sweep(args.output_dir)\n", "        pass\n"),
    ("finetune_generative.py", "if due and state.evaluated_step != state.step:", "if due and state.step > resumed_at:"),
    ("prepare_data.py", '    with lock(args.output_dir, "prepare"):\n', "    if True:\n"),
    ("prepare_data.py", "        sweep(args.output_dir)\n", ""),
    ("utils/evaluation/unseen.py", "    if n_seen > (", "    if 0 > ("),
    ("generate_text.py", '    with lock(args.finetuned_model, "samples"):', "    if True:"),
    ("utils/evaluation/style.py", "self.numbers.get(text, len(self.features[0]) + column.groups[i])",
     "len(self.features[0]) + column.groups[i]"),
    ("utils/evaluation/style.py", "        size = min(len(c.texts) for c in beside), min(c.n_terms for c in beside)\n",
     "        size = len(column.texts), column.n_terms\n"),
    ("utils/evaluation/columns.py", "    kept = sorted(first.values())\n", "    kept = list(range(len(texts)))\n"),
    ("utils/evaluation/reader.py", "counts = [total - part for total, part in zip(counts, own, strict=True)]", "pass"),
    ("utils/evaluation/bootstrap.py", " or np.percentile((base.draws - redrawn) / gap, 2.5) < MIN_OWN_SHARE", ""),
    ("utils/evaluation/verdict.py", 'if share["high"] < 1:', "if False:"),
    ("utils/evaluation/generation.py", "rule(self.texts[row], ", "rule(self.windows[row], "),
    ("utils/evaluation/generation.py", "            if len(window) >= limit:\n",
     "            if max(map(len, self.windows)) >= limit:\n"),
    ("utils/evaluation/generation.py", "[self.sampling.generators[number] for number in kept]",
     "self.sampling.generators"),
    ("utils/evaluation/generation.py",
     "in enumerate(self.rows) if not self.finished[row]]\n        for number, row in writing",
     "in enumerate(self.rows)]\n        for number, row in writing"),
    ("utils/evaluation/longtext.py", "            os.truncate(self.path, self.n_bytes)\n", ""),
    ("utils/evaluation/longtext.py", "self.pending[: len(self.pending) - held]", "self.pending"),
    ("utils/evaluation/longtext.py", '"xb"', '"wb"'),
    ("utils/evaluation/interactive.py", "& ~termios.ECHO", ""),
    ("utils/model/lora.py", "    torch.manual_seed(seed)\n", ""),
    ("utils/model/lora.py", "        refused = not all(", "        refused = 0 * all("),
    ("utils/model/lora.py", " = sorted(config.target_modules), True", " = config.target_modules, True"),
    ("utils/model/lora.py", "        if shapes.get(name) != expected.get(name):\n", "        if False:\n"),
    ("utils/model/lora.py", "(change.T if module.fan_in_fan_out else change)", "change.view(module.weight.shape)"),
    ("utils/model/lora.py", "module.scaling[ADAPTER] * (b @ a)", "b @ a"),
    ("utils/model/loading.py", '    if (folder / "adapter_config.json").is_file():', "    if False:"),
    ("utils/training/checkpoint.py", " if p.requires_grad) + OTHER", ") + OTHER"),
    ("utils/training/checkpoint.py", 'partial / "adapter")', 'output_dir / "adapter")'),
    ("utils/training/setup.py", 'settings["lora_rank"] or None', "None"),
    ("finetune_generative.py", 'run_config.json", {"base_sha256": hash_model(folder)})', 'run_config.json", {})'),
    ("utils/evaluation/verdict.py", "supported and not faults and", "supported and"),
    ("utils/evaluation/verdict.py", " and not own_reader", ""),
]  # fmt: skip


class Finder(importlib.abc.MetaPathFinder):
    """Give one module of the project another source."""

    def __init__(self, path, source):
        self.name, self.path, self.source = path.removesuffix(".py").replace("/", "."), str(ROOT / path), source

    def find_spec(self, name, _path=None, _target=None):
        if name != self.name:
            return None
        loader = SourceFileLoader(name, self.path)
        loader.get_code = lambda _: compile(self.source, self.path, "exec")
        return importlib.util.spec_from_loader(name, loader)


def folder_of(pid):
    return Path(tempfile.gettempdir(), f"mutants-{pid}")


def start(path, source, tests):
    """Fork a child that runs tests with a changed module; its exit status is 0 when they pass."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.environ.pop(FILE, None)  # what a mutant counts is of no use
    sys.meta_path.insert(0, Finder(path, source))
    import pytest

    code = pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder_of(os.getpid())}", *tests], [Notes()]
    )
    os._exit(int(code))


class Notes:
    """In the child: write down the test that fails."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            note_of(os.getpid()).write_text(report.nodeid)


def note_of(pid):
    return folder_of(pid).with_suffix(".txt")


def seconds_used(pid):
    """Return the seconds that a process has computed, and those of its children that have ended."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def run_all(mutants, at_once=2):
    """Run (name, path, source, tests) mutants; return by name which test noticed it, None for none."""
    waiting, running, found = list(mutants), {}, {}
    patience = SECONDS[all(set(tests) <= set(QUICK) for *_, tests in mutants)]
    while waiting or running:
        while waiting and len(running) < at_once:
            mutant = waiting.pop(0)
            running[start(*mutant[1:])] = mutant[0], time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        for late, (_, began) in running.items():
            with suppress(OSError):  # it has just ended
                if seconds_used(late) > patience or time.monotonic() - began > 10 * patience:
                    note_of(late).write_text("it did not end")
                    os.killpg(late, signal.SIGKILL)  # a hang is noticed too
        if not pid:
            time.sleep(0.05)
            continue
        name, _ = running.pop(pid)
        found[name] = None
        if status:
            found[name] = note_of(pid).read_text() if note_of(pid).exists() else "it could not be imported"
        else:
            print(f"survived: {name}", flush=True)
        note_of(pid).unlink(missing_ok=True)
        shutil.rmtree(folder_of(pid), ignore_errors=True)
        if len(found) % 50 == 0:
            print(f"... {len(found)} of {len(found) + len(waiting) + len(running)}", flush=True)
    return found


def undetected(found):
    return [name for name, test in found.items() if test is None]


SWAPS = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
         ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult}  # fmt: skip


def changes_of(node):
    """Yield (what, function that changes a copy of the node in place, or returns another one)."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "comparison", lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
        yield "operator", lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "no not", lambda n: n.operand
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, ast.Compare):
        yield "condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: ast.Constant(not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", lambda n: ast.Constant(n.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield "text", lambda n: ast.Constant(n.value + "X")
    if isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        yield "return", lambda n: ast.Return(ast.Constant(None))
    if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, (ast.Raise, ast.Continue)):
        yield "statement", lambda n: ast.Pass()
    if isinstance(node, ast.Assign):
        yield "assignment", lambda n: ast.Assign(n.targets, ast.Constant(None), lineno=n.lineno)
    if isinstance(node, ast.Call) and node.keywords and node.keywords[-1].arg:
        yield "keyword", lambda n: setattr(n, "keywords", n.keywords[:-1])


def places(tree):
    """Yield (parent, field, index, node) of all code: docstrings and annotations are none."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                docstring = isinstance(parent, ast.Expr) and isinstance(node, ast.Constant)
                if isinstance(node, ast.AST) and not docstring:
                    yield parent, field, index, node


def mutate(path):
    """Yield (name, source) of every small change of a module."""
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    for number, (_, _, _, node) in enumerate(list(places(tree))):
        for kind, (what, _) in enumerate(changes_of(node)):
            copied = copy.deepcopy(tree)
            parent, field, index, mine = list(places(copied))[number]
            other = list(changes_of(mine))[kind][1](mine)
            if isinstance(other, ast.AST):
                if index is None:
                    setattr(parent, field, other)
                else:
                    getattr(parent, field)[index] = other
            line = ast.get_source_segment(source, node).splitlines()[0]
            with_change = ast.unparse(ast.fix_missing_locations(copied))
            yield f"{path}:{node.lineno} {what} {number}: {line[:80]}", with_change


def read_mistakes():
    """Return (name, path, source, [test]) of the classic mistakes; read in a child, so that no module is imported."""
    command = [sys.executable, "-c", "import json; from benchmarks.mistakes import MISTAKES; print(json.dumps("
               "[(m.title, m.path, m.right, m.wrong, m.guard) for m in MISTAKES]))"]  # fmt: skip
    mutants = []
    for title, path, right, wrong, guard in json.loads(subprocess.check_output(command)):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert source.count(right) == 1, f"{path}: {right!r} stands there {source.count(right)} times"
        mutants.append((title, path, source.replace(right, wrong), [guard]))
    return mutants


def order_tests(path, tests):
    """Return tests, those of the module's own name first: most changes are noticed there."""
    own = sorted((ROOT / "tests").rglob(f"test_{Path(path).stem}.py"))
    return [*dict.fromkeys([*(str(test.relative_to(ROOT)) for test in own), *tests])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["guards", "mistakes", "mutate"])
    parser.add_argument("paths", nargs="*", metavar="module or slice", help="modules to mutate; 2/8: every eighth")
    args = parser.parse_args()
    what, paths = args.what, args.paths
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import datasets  # noqa: F401  what takes seconds to import is imported once, before the forks
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel  # noqa: F401

    torch.set_num_threads(1)
    number, n_slices = map(int, (paths.pop() if paths and re.fullmatch(r"\d+/\d+", paths[-1]) else "1/1").split("/"))
    mine = slice(number - 1, None, n_slices)
    if what == "mistakes":
        mistakes = read_mistakes()[mine]
        found = run_all(mistakes)
        survivors = undetected(found)
        record_count("mistakes", planted=len(found), noticed=len(found) - len(survivors), survivors=survivors)
        return bool(survivors)
    if what == "guards":
        mutants = []
        for path, guard, instead in GUARDS[mine]:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert source.count(guard) == 1, f"{path}: {guard!r} stands there {source.count(guard)} times"
            mutants.append(
                (f"{path}: {guard.strip()}", path, source.replace(guard, instead), order_tests(path, QUICK + SLOWER))
            )
        found = run_all(mutants)
        survivors = undetected(found)
        record_count("guards", removed=len(found), noticed=len(found) - len(survivors), by=found)
        return bool(survivors)
    changed = [(name, (path, source)) for path in paths or MUTATED for name, source in mutate(path)]
    mutants = dict(changed[mine])
    survivors = undetected(run_all([(name, *rest, order_tests(rest[0], QUICK)) for name, rest in mutants.items()]))
    print(f"{len(mutants)} mutants, {len(mutants) - len(survivors)} killed by the quick tests; now the slower ones")
    survivors = undetected(run_all([(name, *mutants[name], SLOWER) for name in survivors]))
    killed = len(mutants) - len(survivors)
    record_count("mutants", modules=paths or MUTATED, changes=len(mutants), detected=killed, survivors=survivors)
    return killed < 0.9 * len(mutants)


if __name__ == "__main__":
    sys.exit(main())
