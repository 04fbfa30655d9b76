"""Shared pieces of the tests: a tiny book, a tiny model, and the scripts run in this process."""

import importlib
import os
import shutil
import signal
import sys
from collections import namedtuple
from contextlib import contextmanager

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tests share the cores by process: pytest -n
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network; tests of the hub take this away

import pytest
import torch
from counts import FILE, record_count

from utils.cli import STOP_SIGNALS, run
from utils.training import parallel

for number in STOP_SIGNALS:  # a shell starts what runs in the background with some of them ignored
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

torch.set_num_threads(1)  # tiny models are faster so, and results do not depend on the machine's cores


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full counts of make soak, in place of the quick ones")
    parser.addoption("--slice", default="1/1", help="k/n: of a test's many trials, every n-th from the k-th on")
    parser.addoption("--books", help="folder of .txt books to plant faults in, instead of the sample book")


def pytest_configure(config):
    """Hide GPUs from all tests but those marked gpu: most compare bits, and no process may fork after it used a GPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def amount(request):
    """Choose a count: amount(quick, full) -> the one that this session wants."""
    return lambda quick, full: full if request.config.getoption("--full") else quick


@pytest.fixture(scope="session")
def mine(request):
    """Choose the trials of this session's slice: mine(items) -> list, all of them without --slice."""
    number, count = map(int, request.config.getoption("--slice").split("/"))
    return lambda items: list(items)[number - 1 :: count]


def pytest_terminal_summary(terminalreporter):
    if os.environ.get(FILE):
        reports = {name: terminalreporter.stats.get(name, []) for name in ("passed", "skipped", "failed", "error")}
        failures = [f"{one.nodeid}: {one.longreprtext[-500:]}" for one in reports["failed"] + reports["error"]]
        record_count("tests", passed=len(reports["passed"]), skipped=len(reports["skipped"]), failures=failures)


Result = namedtuple("Result", "code out err")


def replace(owner, name, new, set_attribute=setattr):
    """Replace a function where it is defined and in every module of the project that has imported it."""
    old, own = getattr(owner, name), ("utils", "prepare_data", "finetune_generative", "generate_text")
    set_attribute(owner, name, new)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] in own and vars(module).get(name) is old:
            set_attribute(module, name, new)


def run_script(name):
    """Run a script's main with the command line in sys.argv, as the script itself does."""
    module = importlib.import_module(name)
    may_speak = parallel.claim_error_line if name == "finetune_generative" else None
    run(lambda: module.main(module.parse_args()), may_speak=may_speak)


def write_segment(writer, segment):
    """Tokenize a segment and append it to its split, as prepare_data.py does."""
    writer.append(segment, writer.exact, *writer.encode((segment, writer.exact)))


NAMES = ["Ada", "Bram", "Cleo", "Dov", "Edda", "Finn", "Greta", "Hal", "Ines", "Jory"]
PLACES = ["the mill", "a ferry", "the old quay", "the orchard", "a cold inn", "the bell tower", "the ford"]
DEEDS = ["mended a net", "counted the stars", "lost her hat", "sang to the dog", "wrote nine letters", "slept"]


def make_book(n_paragraphs=240):
    """Write a small text with a form but without a repeated paragraph."""
    paragraphs = []
    for i in range(n_paragraphs):
        name, place, deed = NAMES[i % 10], PLACES[i % 7], DEEDS[(i * i + i // 6) % 6]
        paragraphs.append(f"Day {i + 1}. {name} went to {place} and {deed}. It was {i * 37 % 101} steps away.")
    return "\n\n".join(paragraphs) + "\n"


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """Path of a small book of about 16,000 characters."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(make_book(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, book):
    """Folder of a GPT-2 with 2 layers of width 32, 64 positions and a tokenizer of 400 ids."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from utils.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer([book.read_text(encoding="utf-8")], 400)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_start_token(tokenizer, token):
    """Let a tokenizer put a token before every text, as those of Llama or Gemma do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": token})
    special = [(token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=special)


def make_sentencepiece_tokenizer(text):
    """Return a tokenizer as Llama 2's: it puts a space before what it encodes, and drops the first when it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rust = Tokenizer(models.BPE(unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    rust.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    rust.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="</s>", unk_token="<unk>")


@contextmanager
def own_signals():
    """Give the process its signal handlers back: a script ends by ignoring all that would stop it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def script(capsys, monkeypatch):
    """Run a script's main in this process: script('prepare_data', '--flag', value) -> code, out, err."""

    def call(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capsys.readouterr()
        with own_signals(), pytest.raises(SystemExit) as left:
            run_script(name)
        return Result(left.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def script_once():
    """Run a script's main that must succeed, from a fixture of a wider scope than a test's."""

    def call(name, *argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
            with own_signals(), pytest.raises(SystemExit) as left:
                run_script(name)
        assert left.value.code == 0

    return call


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, book, tiny_model, script_once):
    """Folder of blocks of 32 tokens made from the book for the tiny model."""
    folder = tmp_path_factory.mktemp("data") / "blocks"
    flags = ["--input-path", book, "--model-name", tiny_model, "--block-size", 32, "--output-dir", folder]
    script_once("prepare_data", *flags)
    return folder


MEASURED_FLAGS = ["--max-new-tokens", 30, "--num-validation-prompts", 24]


@pytest.fixture(scope="session")
def large(tmp_path_factory, tiny_model, script_once):
    """Folder of a book long enough to be measured (book.txt), its blocks, and a model that learned some of it."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "book.txt").write_text(make_book(1700), encoding="utf-8")
    flags = ["--input-path", folder / "book.txt", "--model-name", tiny_model, "--block-size", 64]
    script_once("prepare_data", *flags, "--output-dir", folder / "blocks")
    flags = ["--data-dir", folder / "blocks", "--output-dir", folder / "model", "--learning-rate", "1e-2"]
    script_once("finetune_generative", *flags, "--max-steps", 300, "--dtype", "fp32", "--sample-tokens", 0,
                "--copy-samples", 4)  # fmt: skip
    return folder


def copy_run(run, folder):
    """Copy a run's folder without its checkpoints and without what generate_text.py wrote there."""
    kept = shutil.ignore_patterns("checkpoint-*", "README.md", "report.*", "quiz.html", "samples.jsonl")
    return shutil.copytree(run, folder, ignore=kept)


@pytest.fixture(scope="session")
def measured(large, tmp_path_factory, script_once):
    """A copy of that model's folder, with the report of generate_text.py and its MEASURED_FLAGS."""
    script_once("generate_text", "--finetuned-model", large / "model", *MEASURED_FLAGS)
    return shutil.copytree(large / "model", tmp_path_factory.mktemp("measured") / "model")
