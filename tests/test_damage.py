"""Damaged, hostile, old and misplaced files: found before use, never run, still readable, never followed."""

import ast
import functools
import hashlib
import io
import json
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import stat
import struct
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
from counts import record_count
from forked import (  # noqa: F401
    WRITTEN,
    Child,
    Workshop,
    digest_files,
    digest_run,
    fresh,
    run_child,
    strays,
    undisturbed,
    workshop,
)
from safetensors.torch import load_file, save_file

import utils.training.checkpoint
from utils.data.blocks import open_blocks
from utils.errors import UserError
from utils.storage import MANIFEST, discard, read_sealed, verify_folder, write_sealed

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
Case = namedtuple("Case", "file kind content")
SEED = 7
platform.platform()  # asks the system by a command, once: no child has to


def stop_after(step):
    """Return a hook that kills the child as soon as checkpoint-<step> is published."""

    def prepare():
        save = utils.training.checkpoint.save_checkpoint

        def save_and_die(*args):
            folder = save(*args)
            if folder.name == f"checkpoint-{step}":
                os.kill(os.getpid(), signal.SIGKILL)
            return folder

        utils.training.checkpoint.save_checkpoint = save_and_die

    return prepare


@pytest.fixture(scope="module")
def stopped(workshop):  # noqa: F811
    """Folder of a run that was killed after checkpoint-4, beside checkpoint-2."""
    out = workshop.folder / "stopped"
    assert run_child(*workshop.finetune(out), prepare=stop_after(4)).code == -signal.SIGKILL
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    shutil.rmtree(out / ".partial", ignore_errors=True)
    (out / ".train.lock").unlink()
    return out


def damages(folder, other, n_flips):
    """List ways to spoil every file of a folder; `other` holds files of the same names, content None deletes."""
    rng, found = random.Random(SEED), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, good = path.relative_to(folder).as_posix(), path.read_bytes()
        size = len(good)
        kinds = {f"cut to {n}": good[:n] for n in {0, 1, 8, size // 2, size - 1}}
        kinds |= {"zeroed": bytes(size), "1 byte more": good + b"x", "10 bytes more": good + bytes(10), "deleted": None}
        if (other / name).is_file():
            kinds["other"] = (other / name).read_bytes()
        for place in rng.sample(range(8 * size), min(n_flips, 8 * size)):
            flipped = bytearray(good)
            flipped[place // 8] ^= 1 << place % 8
            kinds[f"bit {place} flipped"] = bytes(flipped)
        found += [Case(name, kind, content) for kind, content in kinds.items() if content != good]
    return found


def spoil(folder, case):
    path = folder / case.file
    path.unlink() if case.content is None else path.write_bytes(case.content)


def choose(found, count):
    """Choose cases so that every file and every kind is among them."""
    found = random.Random(SEED).sample(found, len(found))
    first = {}
    for case in found:
        kind = case.kind.split()[0]
        first.setdefault(case.file, case)
        if kind not in {c.kind.split()[0] for c in first.values()}:
            first[kind] = case
    chosen = list(dict.fromkeys(first.values()))
    return chosen + [case for case in found if case not in chosen][: max(0, count - len(chosen))]


@functools.cache
def openers():
    """Every place where a function stands that opens tensors or maps Arrow files."""
    originals = {id(safetensors.torch.load_file), id(safetensors.safe_open), id(datasets.load_from_disk)}
    names = [(module, name, value) for module in list(sys.modules.values()) for name, value in vars(module).items()]
    return [(module, name, value) for module, name, value in names if id(value) in originals]


def recording(log):
    """Return a hook that notes in a file what is opened as tensors or mapped as Arrow."""
    log.write_text("")
    places = openers()

    def noting(function):
        def noted(path, *args, **kwargs):
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{path}\n")
            return function(path, *args, **kwargs)

        return noted

    return lambda: [setattr(module, name, noting(value)) for module, name, value in places] and None


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def refused(ended, says):
    """Say whether a script ended with exit status 2 and one error line that holds every part of `says`."""
    errors = [line for line in ended.err.splitlines() if not line.startswith("warning: ")]
    return (
        ended.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and all(s in errors[0] for s in says)
    )


def spoilt_copy(folder, target, case, inside="."):
    shutil.copytree(folder, fresh(target))
    spoil(target / inside, case)
    return target


def test_damaged_checkpoint(workshop, undisturbed, stopped, tmp_path, amount):  # noqa: F811
    found = damages(stopped / "checkpoint-4", stopped / "checkpoint-2", amount(4, 60))
    out, log, harmless = tmp_path / "out", tmp_path / "log", []
    folder = shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4")
    for case in found:
        good = (folder / case.file).read_bytes()
        spoil(folder, case)
        try:
            reason = utils.training.checkpoint.check_checkpoint(folder)
        except UserError as error:
            reason = str(error)
            assert case.file == MANIFEST, case[:2]
        assert reason is None or case.file == MANIFEST or case.file in reason, (case[:2], reason)
        assert reason or case.file == MANIFEST, case[:2]
        if reason is None:
            harmless.append(case)
        (folder / case.file).write_bytes(good)
    trials = choose([case for case in found if case not in harmless], amount(12, 200)) + harmless[: amount(2, 9)]
    for case in trials:
        spoilt_copy(stopped, out, case, "checkpoint-4")
        ended = run_child(*workshop.finetune(out), prepare=recording(log))
        if refused(ended, ["format"]) and case.file == MANIFEST:
            continue
        assert ended.code == 0, (case[:2], ended.err)
        warnings = lines(ended.err, "warning: ")
        assert len(warnings) == (case not in harmless), (case[:2], ended.err)
        named = "" if case.file == MANIFEST else case.file  # a checksum flipped in the manifest speaks of its file
        parts = ["checkpoint-4 unusable", named, "resuming from checkpoint-2"]
        assert case in harmless or all(part in warnings[0] for part in parts), (case[:2], warnings)
        loaded = log.read_text(encoding="utf-8")
        assert ("checkpoint-4" in loaded) == (case in harmless) != ("checkpoint-2" in loaded), (case[:2], loaded)
        assert digest_run(out) == digest_run(undisturbed), case[:2]
        assert not strays(out)
    record_count("damage", what="checkpoint", ways=len(found), harmless=len(harmless), runs=len(trials))


def test_all_checkpoints_damaged(workshop, stopped, tmp_path, amount):  # noqa: F811
    found = [case for case in damages(stopped / "checkpoint-4", tmp_path, 2) if case.file != MANIFEST]
    for case in choose(found, amount(4, 30))[: amount(4, 30)]:
        out = spoilt_copy(stopped, tmp_path / "out", case, "checkpoint-4")
        (out / "checkpoint-2" / "model.safetensors").unlink()
        before = snapshot(out)
        ended = run_child(*workshop.finetune(out))
        parts = ["error: output-dir: 2 checkpoints, none usable", f"checkpoint-4 unusable ({case.file}", "checkpoint-2"]
        assert refused(ended, parts), (case[:2], ended.err)
        assert snapshot(out) == before, case[:2]


def snapshot(folder, without=()):
    """Everything that can be seen of what is below a folder, but for some folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not any(path == other or other in path.parents for other in without):
            state = path.lstat()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(state.st_mode) else None
            found[path] = (state.st_mode, state.st_mtime_ns if content else None, content)
    return found


class Mapped(BaseException):
    """Arrow would have mapped the data."""


def mapped(_folder):
    raise Mapped


def test_damaged_data(workshop, undisturbed, tmp_path, amount):  # noqa: F811
    folder, out, log, other = (tmp_path / name for name in ("data", "out", "log", "other"))
    assert run_child(*workshop.prepare(other, "--val-split", 0.4, "--seed", 1)).code == 0
    found, harmless = damages(workshop.data, other, amount(4, 60)), []
    shutil.copytree(workshop.data, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_from_disk", mapped)
        for case in found:
            spoil(folder, case)
            try:
                open_blocks(folder)
            except UserError as error:
                reason = str(error)
            except Mapped:
                reason = None
                harmless.append(case)
            assert case.file == MANIFEST or (reason and case.file in reason), (case[:2], reason)
            shutil.copyfile(workshop.data / case.file, folder / case.file)
    trials = choose([case for case in found if case not in harmless], amount(12, 200)) + harmless[: amount(2, 60)]
    for case in trials:
        spoilt_copy(workshop.data, folder, case)
        ended = run_child(*workshop.finetune(fresh(out), "--data-dir", folder), prepare=recording(log))
        if case in harmless and ended.code == 0:
            assert digest_run(out) == digest_run(undisturbed), case[:2]
            continue
        assert refused(ended, [case.file] if case.file != MANIFEST else []), (case[:2], ended.err)
        assert case in harmless or log.read_text() == "", case[:2]
        assert not out.exists(), case[:2]
        ended = run_child(*workshop.prepare(folder))
        if case.file == MANIFEST and ended.code:  # what the folder is can no longer be told: the user must say
            assert refused(ended, ["--overwrite"]), (case[:2], ended.err)
            ended = run_child(*workshop.prepare(folder, "--overwrite"))
        assert ended.code == 0, (case[:2], ended.err)
        assert case in harmless or digest_files(folder) == digest_files(workshop.data), case[:2]
    record_count("damage", what="data", ways=len(found), harmless=len(harmless), runs=len(trials))


def remove_written(folder):
    for name in WRITTEN:
        (folder / name).unlink()


def test_damaged_model(workshop, undisturbed, tmp_path, amount):  # noqa: F811
    """The final model, at the root of the run's folder."""
    tuned, harmless = tmp_path / "tuned", []
    shutil.copytree(undisturbed, tuned, ignore=shutil.ignore_patterns("checkpoint-*"))
    names = {*json.loads((tuned / MANIFEST).read_text())["files"], MANIFEST}
    found = [case for case in damages(tuned, undisturbed / "checkpoint-2", amount(4, 60)) if case.file in names]
    for case in found:
        good = (tuned / case.file).read_bytes()
        spoil(tuned, case)
        try:
            reason = verify_folder(tuned)
        except UserError as error:
            reason = str(error)
        assert case.file == MANIFEST or case.file in reason, (case[:2], reason)
        if reason is None:
            harmless.append(case)
        (tuned / case.file).write_bytes(good)
    clean = run_child(*workshop.generate(tuned))
    assert clean.code == 0, clean.err
    samples = (tuned / "samples.jsonl").read_bytes()
    remove_written(tuned)
    trials = choose(found, amount(12, 200))
    for case in trials:
        good = (tuned / case.file).read_bytes()
        spoil(tuned, case)
        before = snapshot(tuned)
        ended = run_child(*workshop.generate(tuned))
        if case.file == MANIFEST and ended.code == 0:
            assert (tuned / "samples.jsonl").read_bytes() == samples, case[:2]
            remove_written(tuned)
        else:
            assert refused(ended, [case.file] if case.file != MANIFEST else []), (case[:2], ended.err)
            assert snapshot(tuned) == before, case[:2]
        (tuned / case.file).write_bytes(good)
    record_count("damage", what="model", ways=len(found), harmless=len(harmless), runs=len(trials))


def test_no_code_runs_what_it_reads():
    forbidden = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "utils").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, where
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "compile", "__import__", "torch.load", "os.system"}, where
                for keyword in node.keywords:
                    value = ast.unparse(keyword.value)
                    assert (keyword.arg, value) not in {("shell", "True"), ("allow_pickle", "True")}, where
                    assert keyword.arg != "trust_remote_code" or value == "False", where
                if name.split(".")[0].startswith("Auto") and name.endswith("from_pretrained"):
                    assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, where


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def watching(log, *allowed):
    """Return a hook that notes whatever would run code, and files opened for writing outside some folders."""

    def prepare():
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))  # of work, not of waiting: the machine may be busy
        sys.stdin = io.StringIO("y\n" * 9)  # a person who says yes to every question
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def hook(event, args):
            bad = event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
            if event == "exec":
                bad = str(log.parent) in getattr(args[0], "co_filename", "")
            elif event == "import":
                bad = str(log.parent) in str(args[1])
            elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                bad = isinstance(args[0], str) and not args[0].startswith((*map(str, allowed), "/dev/"))
            if bad:
                os.write(descriptor, f"{event} {str(args)[:300]}\n".encode())

        sys.addaudithook(hook)

    return prepare


def tensor_file(header, size=0):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


def hostile_folders(base, marker, outside):
    """List changes to a model folder: a dict changes JSON, None deletes, a Path is linked to, ... makes a folder."""
    weights, evil, code = "model.safetensors", pickle.dumps(Evil(marker)), f"open({str(marker)!r}, 'w')\n"
    good = (base / weights).read_bytes()
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    last, size = list(tensors)[-1], len(good) - 8 - int.from_bytes(good[:8], "little")
    overlapping = {name: entry | {"data_offsets": [0, size]} for name, entry in tensors.items()}
    archive = outside.parent / "archive"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", evil)
    own = {"AutoConfig": "own.X", "AutoModelForCausalLM": "own.X", "AutoTokenizer": ["own.X", "own.X"]}
    bomb = "[" * 100_000
    entry = tensors[last]

    def one(**changes):
        return tensor_file(header | {last: entry | changes}, size)

    def config(**changes):
        return {"config.json": changes}

    def listed(name, entry=None):
        return {MANIFEST: json.dumps({"format": 1, "files": {name: entry or {"bytes": 1, "sha256": "0"}}})}

    refused = {
        "only a pickle": {weights: None, "pytorch_model.bin": evil},
        "a pickle renamed": {weights: evil},
        "a zip renamed": {weights: archive.read_bytes()},
        "a wish for own code": config(auto_map=own) | {"own.py": code},
        "own code, own type": config(auto_map=own, model_type="own") | {"own.py": code},
        "tokenizer of own": {**config(model_type="own"), "own.py": code, "tokenizer_config.json": {"auto_map": own}},
        "weights are /etc/passwd": {weights: Path("/etc/passwd")},
        "tokenizer is /etc/passwd": {"tokenizer.json": Path("/etc/passwd")},
        "config is /etc/passwd": {"config.json": Path("/etc/passwd")},
        "manifest with ../": listed(f"../{outside.name}"),
        "manifest with /": listed("/etc/passwd"),
        "manifest with zero byte": listed("a\0b"),
        "manifest with half a letter": listed("\ud800"),
        "manifest with infinite size": listed("config.json", {"bytes": float("inf"), "sha256": "0"}),
        "manifest with long name": listed("a" * 5000),
        "manifest of a list": {MANIFEST: "[]"},
        "bert": config(model_type="bert"),
        "t5": config(model_type="t5"),
        "llama on gpt2's weights": config(model_type="llama", hidden_size=16, num_hidden_layers=1),
        "unknown type": config(model_type="own"),
        "type is a list": config(model_type=["gpt2"]),
        "10**9 layers": config(n_layer=10**9),
        "10**9 layers of a llama": config(model_type="llama", num_hidden_layers=10**9),
        "10**9 layers of a qwen": config(model_type="qwen2", num_hidden_layers=10**9),
        "10**9 wide": config(n_embd=10**9),
        "10**12 words": config(vocab_size=10**12),
        "10**12 positions": config(n_positions=10**12),
        "10**30 positions": config(n_positions=10**30),
        "10**30 inner": config(n_inner=10**30),
        "no layers": config(n_layer=-1),
        "layers in words": config(n_layer="one"),
        "layers are true": config(n_layer=True),
        "layers are not a number": config(n_layer=float("nan")),
        "heads are null": config(n_head=None),
        "activation unknown": config(activation_function="own.run"),
        "dropout in words": config(attn_pdrop="much"),
        "header of 2**60 bytes": {weights: struct.pack("<Q", 2**60) + good[8:]},
        "header nested deep": {weights: tensor_file(bomb.encode())},
        "header is a list": {weights: tensor_file([])},
        "header is empty": {weights: tensor_file({})},
        "tensors overlap": {weights: tensor_file(overlapping, size)},
        "tensor outside": {weights: one(data_offsets=[2**60, 2**60 + 4])},
        "tensor backwards": {weights: one(data_offsets=[-4, -8])},
        "tensor with one offset": {weights: one(data_offsets=[0])},
        "tensor with offsets in words": {weights: one(data_offsets=["0", "4"])},
        "tensor without shape": {weights: one(shape=None)},
        "tensor with shape in words": {weights: one(shape="16")},
        "tensor with negative shape": {weights: one(shape=[-16])},
        "tensor of unknown type": {weights: one(dtype="OWN")},
        "more tensors": {weights: tensor_file(header | {"more": entry}, size)},
        "unnamed shape among few": {weights: tensor_file({"more": entry | {"shape": None}}, entry["data_offsets"][1])},
        "config nested deep": {"config.json": bomb},
        "tokenizer nested deep": {"tokenizer.json": bomb},
        "tokenizer settings nested deep": {"tokenizer_config.json": bomb},
        "config is a folder": {"config.json": ...},
        "weights are a folder": {weights: ...},
        "tokenizer is a folder": {"tokenizer.json": ...},
        "adapter": {"adapter_config.json": json.dumps({"base_model_name_or_path": str(outside), "peft_type": "LORA"})},
        "index to outside": {weights: None, f"{weights}.index.json": index(tensors, f"../{outside.name}")},
        "index to outside, decoy inside": {
            weights: None, "model-1.safetensors": good, f"{weights}.index.json": index(tensors, f"../{outside.name}")
        },
    }  # fmt: skip
    harmless = {
        "pickle beside": {"pytorch_model.bin": evil, "training_args.bin": evil, "optimizer.pt": evil},
        "own tokenizer code": {"tokenizer_config.json": {"auto_map": own}, "own.py": code},
        "own tokenizer class": {"tokenizer_config.json": {"tokenizer_class": "own.X"}, "own.py": code},
        "tokenizer class of the library": {"tokenizer_config.json": {"tokenizer_class": "subprocess.Popen"}},
        "chat template": {"chat_template.jinja": f"{{{{ cycler.__init__.__globals__.os.popen('touch {marker}') }}}}"},
        "generation settings broken": {"generation_config.json": "{"},
        "generation settings hostile": {
            "generation_config.json": {"transformers_version": [], "custom_generate": "own"}
        },
        "code beside": {"__init__.py": code, "sitecustomize.py": code, "torch.py": code, "conftest.py": code},
    }
    return refused, harmless


def index(tensors, file):
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, file)})


def make_hostile(base, folder, changes):
    shutil.copytree(base, fresh(folder))
    for name, change in changes.items():
        path = folder / name
        value = json.dumps(json.loads(path.read_text()) | change) if isinstance(change, dict) else change
        path.unlink(missing_ok=True)
        if isinstance(value, Path):
            path.symlink_to(value)
        elif value is ...:
            path.mkdir()
        elif value is not None:
            path.write_bytes(value) if isinstance(value, bytes) else path.write_text(value)
    return folder


def test_hostile_models(workshop, undisturbed, tmp_path, amount):  # noqa: F811
    marker, outside, log, out = (tmp_path / name for name in ("marker", "outside.safetensors", "log", "out"))
    save_file({name: value * 2 for name, value in load_file(workshop.model / "model.safetensors").items()}, outside)
    refusals, harmless = hostile_folders(workshop.model, marker, outside)
    watch, evil = watching(log, out), pickle.dumps(Evil(tmp_path / "control"))
    control = Child("prepare_data", ["--nothing"], lambda: (watch(), pickle.loads(evil)))
    assert control.wait().code == 2
    assert log.read_text().startswith("pickle.find_class")
    log.unlink()
    count = 0
    for number, (name, changes) in enumerate({**refusals, **harmless}.items()):
        if number % amount(2, 1) and not any(
            word in name for word in ("own", "pickle", "index", "manifest", "tensor", "10**9")
        ):
            continue
        model = make_hostile(workshop.model, tmp_path / "hostile", changes)
        before = snapshot(model)
        commands = [workshop.finetune(fresh(out), "--model-name", model)]
        if number % amount(5, 1) == 0 or name in ("own code, own type", "10**9 layers of a qwen"):
            commands += [workshop.generate(model, "--base-model", workshop.model, "--data-dir", workshop.data),
                         workshop.prepare(fresh(tmp_path / "blocks"), "--model-name", model)]  # fmt: skip
        for command in commands:
            hook = watching(log, out, tmp_path / "blocks", model)
            ended = run_child(*command, prepare=hook, memory=2 << 30)
            assert log.read_text() == "", (name, command[0])
            assert not marker.exists(), (name, command[0])
            if command[0] == "finetune_generative" and name in harmless:
                assert ended.code == 0, (name, ended.err)
                assert digest_run(out) == digest_run(undisturbed), name
            elif command[0] == "finetune_generative" or ended.code:
                assert refused(ended, []), (name, command[0], ended.code, ended.err)
                assert not out.exists(), name
            for made in WRITTEN:  # generate_text.py writes beside the model
                (model / made).unlink(missing_ok=True)
            assert snapshot(model) == before, (name, command[0])
            count += 1
    record_count("hostile folders", folders=len(refusals) + len(harmless), hostile=len(refusals), opened=count)


def machine():
    """What bit identity depends on: another processor may round in another order."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return [platform.machine(), torch.__version__, hashlib.sha256("\n".join(known).encode()).hexdigest()]


def end_tensors(out):
    """All tensors of a run's end: best model, last model, optimizer."""
    files = {"best": "model", "last": "checkpoint-6/model", "averages": "checkpoint-6/optimizer"}
    return {f"{key}/{name}": tensor for key, file in files.items()
            for name, tensor in load_file(out / f"{file}.safetensors").items()}  # fmt: skip


def hash_ids(folder):
    blocks = open_blocks(folder)
    ids = [split["input_ids"][:].numpy().astype("<i8").tobytes() for split in (blocks.train, blocks.validation)]
    return hashlib.sha256(b"".join(ids)).hexdigest()


@pytest.fixture
def golden(tmp_path, monkeypatch):
    """Stand in a copy of the golden files; returns its commands, with relative paths."""
    monkeypatch.chdir(shutil.copytree(GOLDEN, tmp_path / "golden"))
    commands = Workshop.__new__(Workshop)
    commands.model, commands.data = Path("model"), Path("data")
    return commands


def test_old_files(golden):
    known = json.loads(Path("end.json").read_text())
    assert hash_ids(golden.data) == known["ids"]
    ended = run_child(*golden.finetune("run"))
    assert ended.code == 0, ended.err
    assert "resuming from step 2 of 6" in ended.out
    end, expected = end_tensors(Path("run")), load_file("end.safetensors")
    assert end.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            end[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert known["machine"] != machine() or digest_run(Path("run")) == known["digest"]


@pytest.mark.parametrize(("folder", "newest"), [("data", 2), ("run/checkpoint-2", 1)])
def test_newer_files(golden, folder, newest):
    write_sealed(Path(folder), read_sealed(Path(folder)) | {"format": newest + 1})
    before = snapshot(Path())
    ended = run_child(*golden.finetune("run"))
    assert refused(ended, [f"format {newest + 1}", f"({newest})"]), ended.err
    assert snapshot(Path()) == before


@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_modes(workshop, tmp_path, mask):  # noqa: F811
    data, out = tmp_path / "data", tmp_path / "out"
    for command in (workshop.prepare(data), workshop.finetune(out, "--data-dir", data), workshop.generate(out)):
        ended = run_child(*command, prepare=lambda: os.umask(mask) and None)
        assert ended.code == 0, ended.err
    for path in (data, out, *data.rglob("*"), *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_places(workshop, undisturbed, tmp_path, amount):  # noqa: F811
    """Nothing outside the output folder changes, also when the run is killed."""
    home, log, kills, rng = workshop.folder, tmp_path / "log", 0, random.Random(SEED)
    tuned = shutil.copytree(undisturbed, home / "tuned")
    outs = (home / "new-data", home / "new-run", tuned)
    commands = [workshop.prepare(outs[0]), workshop.finetune(outs[1]), workshop.generate(tuned)]
    for command, out in zip(commands, outs, strict=True):
        before = snapshot(home, [out])
        for trial in range(amount(4, 60)):
            limit = rng.uniform(0.01, 0.4) if trial else 60
            child = Child(*command, prepare=watching(log, out))
            try:
                child.wait(limit)
            except AssertionError:
                kills += 1
            assert snapshot(home, [out]) == before, (command[0], limit)
            assert log.read_text() == "", (command[0], limit)
        shutil.rmtree(out)
    record_count("places", kills=kills)


def test_links(workshop, stopped, undisturbed, tmp_path):  # noqa: F811
    victim = tmp_path / "victim"
    victim.mkdir()
    shutil.copytree(stopped / "checkpoint-4", victim / "checkpoint-4")
    (victim / "file").write_text("mine")
    foreign = [("link", "file"), (".partial", ""), (".old", ""), ("checkpoint-6", "checkpoint-4"), (MANIFEST, "file"),
               ("metrics.jsonl", "file"), (".metrics.jsonl.partial", "file"), (".train.lock", "file"),
               (".prepare.lock", "file"), ("train", "checkpoint-4"), ("tokenizer", "checkpoint-4")]  # fmt: skip
    inner, own = "checkpoint-4/model.safetensors", (*WRITTEN, *(f".{name}.partial" for name in WRITTEN))
    rows = [(script, *row, "is a symbolic link") for script in ("prepare", "finetune") for row in foreign]
    rows += [("finetune", inner, inner, None), ("prepare", "train/state.json", "file", None)]
    # A folder to generate from may be full of links, as the hub's cache is: only what is written counts.
    rows += [("generate", name, "file", None) for name in own] + [("generate", ".samples.lock", "file", "links")]
    before = snapshot(victim)
    for script, name, target, says in rows:
        source = {"prepare": workshop.data, "finetune": stopped, "generate": undisturbed}[script]
        out = shutil.copytree(source, fresh(tmp_path / "out"))
        discard(out / name)
        (out / name).symlink_to(victim / target)
        there = snapshot(out)
        ended = run_child(*getattr(workshop, script)(out))
        assert snapshot(victim) == before, (script, name)
        assert refused(ended, [says]) if says else ended.code == 0, (script, name, ended.err)
        assert not says or snapshot(out) == there, (script, name)
        assert name != inner or "checkpoint-4 unusable" in ended.err, ended.err
