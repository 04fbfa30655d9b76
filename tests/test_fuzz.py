"""Whatever a file or a command line holds: no crash, no hang, no traceback, nothing accepted that gives another result.

Hypothesis makes the damage, forked children take it. A model folder from elsewhere has no checksums, so what the keys
in MEANINGFUL say is taken at its word: they describe another model or tokenizer, not a damaged one.
"""

import contextlib
import hashlib
import inspect
import io
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from counts import record_count
from forked import Child, Ended, digest_run, fresh, run_child, undisturbed, workshop  # noqa: F401
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import finetune_generative
import generate_text
import prepare_data
from utils.cli import run
from utils.data.blocks import open_blocks
from utils.data.text import choose_validation_spans, read_book, split_book
from utils.data.tokenizer import encode_text, load_tokenizer
from utils.evaluation.generation import Decoding, generate_ids
from utils.model.loading import check_fit, load_pair
from utils.storage import MANIFEST, describe_files, write_sealed

ROOT = Path(__file__).parents[1]
BATCH = 10  # examples that share a forked child; when one of them fails, each gets a child of its own
MEMORY = 2 << 30


def run_each(works, folder):
    """Run functions as scripts are run, one after another in this process; prints code, out and err of each."""
    real = sys.stdout, sys.stderr
    for number, work in enumerate(works):
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
        try:
            run(partial(work, fresh(folder / f"example-{number}")))
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            code = 99
            traceback.print_exc()
        texts = []
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode())
        sys.stdout, sys.stderr = real
        print(json.dumps([code, *texts]), flush=True)


def attempt(works, folder, seconds):
    """Run functions in one child; returns an Ended for each. The child reaches them through this module's main."""
    child = Child(
        __name__, [], lambda: globals().update(parse_args=tuple, main=lambda _: run_each(works, folder)), MEMORY
    )
    ended = child.wait(seconds * len(works))
    assert ended.code == 0, f"code {ended.code}\n{ended.err[-3000:]}"
    # The tokenizers library prints a line of its own about a key that it does not know.
    results = [Ended(*json.loads(line)) for line in ended.out.splitlines() if line.startswith("[")]
    assert len(results) == len(works), ended
    return results


def check_ended(ended):
    """A child ends well, or with one line that says why."""
    assert ended.code in (0, 2, 3, 4), ended
    assert "Traceback" not in ended.err, ended
    errors = [line for line in re.split(r"[\n\r]+", ended.err) if line.startswith("error: ")]
    assert len(errors) == (ended.code != 0), ended
    assert all(8 < len(line) <= 240 for line in errors), ended


def fuzz(count, mine, name, example, work, check, folder, known=(), seconds=20):
    """Let Hypothesis make examples.

    Args:
        count: how many.
        mine: chooses those of this session.
        name: of the target, for the summary.
        example: the strategy.
        work: work(example, folder), run in a child; what it prints is what it accepted.
        check: check(example, Ended) looks at what came of it; returns True for an example that was accepted.
        folder: gives each example an empty folder of its own.
        known: examples that once found a defect; they come first.
        seconds: that one example may take.
    """
    examples, accepted = [*known], 0

    @settings(max_examples=count, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck), phases=[Phase.generate])  # fmt: skip
    @given(example)
    def collect(one):
        examples.append(one)

    def judge(batch):
        results = attempt([partial(work, one) for one in batch], folder, seconds)
        for one, ended in zip(batch, results, strict=True):
            check_ended(ended)
            yield bool(check(one, ended))

    collect()
    examples = mine(examples)
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        try:
            accepted += sum(judge(batch))
        except Exception as error:
            found = f"only together: {batch!r}\n{error}"
            for number, one in enumerate(batch, start):
                try:
                    list(judge([one]))
                except Exception as alone:
                    found = f"example {number}: {one!r}\n{alone}"
                    break
            pytest.fail(f"{name}: {found}", pytrace=False)
    assert 0 < accepted < len(examples), f"{name}: {accepted} of {len(examples)} accepted, so one side is not tried"
    record_count("fuzz", target=name, examples=len(examples), accepted=accepted)


# Bytes of books: plain text with what is special in it, in several encodings, damaged or not.

MARKS = ["\n", "\r", "\r\n", "\n\n", "\ufeff", "<|endoftext|>", "\u2028", "\x0c", "\x85", "\x1c", "%PDF", "PK\x03\x04",
         "It was so. ", "word ", "\U0001f642", "é"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(MARKS) | st.text(max_size=8), max_size=20).map("".join)
ENCODINGS = ["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"]


@st.composite
def books(draw):
    """Return the bytes of a book, a share and a seed for its segments, and whether to run the whole script."""
    raw = draw(st.binary(max_size=40) | st.builds(lambda text, how: text.encode(how, "ignore"), TEXTS,
                                                  st.sampled_from(ENCODINGS)))  # fmt: skip
    raw *= draw(st.sampled_from([1, 1, 1, 7]))
    if raw and draw(st.integers(0, 3)) == 0:
        raw = damage_bytes(raw, draw(SPOTS))
    share = draw(st.sampled_from([0, 1e-9, 0.1, 0.5, 0.999999]))
    return raw, share, draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 19)) == 7


# (place, new byte), None cuts there
SPOTS = st.lists(st.tuples(st.integers(0, 2**16), st.none() | st.integers(0, 255)), min_size=1, max_size=4)


def damage_bytes(raw, spots):
    for place, byte in spots:
        if raw:
            place %= len(raw)
            raw = raw[:place] if byte is None else raw[:place] + bytes([byte]) + raw[place + 1 :]
    return raw


def read_plainly(raw):
    """The straightforward reading of a book: strict UTF-8, every line end made LF; None for what is no text."""
    try:
        text = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline=None).read()
    except UnicodeDecodeError:
        return None
    text = text[1:] if text[:1] == "\ufeff" else text
    return None if "\0" in text or not text.strip() or raw[:4] in (b"%PDF", b"PK\x03\x04") else text


def test_books(workshop, tmp_path, amount, mine):  # noqa: F811
    """A book is accepted if and only if it is UTF-8 text, and its segments and tokens are the whole of it."""
    tokenizer = Tokenizer.from_file(str(workshop.model / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    _, ours = load_pair(workshop.model)

    def work(example, folder):
        raw, share, seed, whole = example
        folder.mkdir()
        (folder / "book.txt").write_bytes(raw)
        if whole:
            flags = ["--input-path", folder / "book.txt", "--model-name", workshop.model, "--val-split", 0,
                     "--block-size", 2, "--output-dir", folder / "out"]  # fmt: skip
            sys.argv = ["prepare_data.py", *map(str, flags)]
            with contextlib.redirect_stdout(io.StringIO()):
                prepare_data.main(prepare_data.parse_args())
            print(json.dumps(open_blocks(folder / "out").train[:]["input_ids"].flatten().tolist()))
        else:
            text, book = read_book(folder / "book.txt")
            segments = list(split_book(text, 0, 0, choose_validation_spans(book.n_chars, share, seed)))
            ends = [segment.end for segment in segments]
            assert [segment.start for segment in segments] == [0, *ends[:-1]]
            print(json.dumps([segment.text for segment in segments]))

    def check(example, ended):
        raw, text, whole = example[0], read_plainly(example[0]), example[3]
        if whole and text:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert encode_text(ours, [text]) == ids
            assert (ended.code == 0) == (len(ids) >= 2), ended
            assert ended.code or json.loads(ended.out) == ids[: len(ids) // 2 * 2], ended
        else:
            assert (ended.code == 0) == (text is not None), (raw, ended)
            assert ended.code or "".join(json.loads(ended.out)) == text, ended
        return not ended.code

    fuzz(amount(300, 20_000), mine, "books", books(), work, check, tmp_path)


# Damage to folders: bytes changed or cut, files removed or replaced, JSON values of other types and sizes.

ODD = [None, True, False, 0, 1, -1, 2, 3, 5, 16, 48, 299, 301, 10**6, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1e-300,
       1e308, float("nan"), float("inf"), "", "x", "0", "gpt2", "llama", "bert", "mamba", "bloom", "opt", "gelu",
       "float16", "eager", "\ud800", "\0", "../../x", "/dev/zero", "<|endoftext|>", "train/x", "@deep", "@long",
       "@wide", [], {}, [[]], [0], [None, "x"], {"a": 1}, {"": {}}, {"type": "x"}]  # fmt: skip
BULK = {"@deep": "[" * 99_999 + "]" * 99_999, "@long": "9" * 5_000, "@wide": json.dumps("w" * 100_000)}
KEYS = ["", "\ud800", "auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "torch_dtype",
        "is_decoder", "is_encoder_decoder", "pruned_heads", "num_hidden_layers", "hidden_size",
        "max_position_embeddings", "use_return_dict", "return_dict", "output_attentions", "temperature", "do_sample",
        "num_beams", "max_length", "added_tokens_decoder", "tokenizer_file", "add_prefix_space",
        "extra_special_tokens", "chat_template", "base_model_tp_plan", "num_labels", "padding_side", "id2label", "x",
        "__class__", "self", "replaces", "chunk_size_feed_forward"]  # fmt: skip
STEPS = st.lists(st.integers(0, 2**16), min_size=1, max_size=5)  # a way into a tree of JSON
CHANGES = st.tuples(st.just("json"), STEPS, st.sampled_from([*["set"] * 4, "drop", *KEYS]), st.sampled_from(ODD))
DAMAGES = (
    CHANGES | CHANGES | st.tuples(st.just("bytes"), SPOTS) | st.tuples(st.sampled_from(["remove", "link", "folder"]))
)


def damaged(files):
    """Strategy: one to three (file, damage) of a folder."""
    return st.lists(st.tuples(st.sampled_from(files), DAMAGES), min_size=1, max_size=3)


def change_json(value, steps, what, new):
    """Walk into a tree by the remainders of steps, and set a value, take it away, or add a key; returns the top key."""
    trail, here = [], value
    for step in steps:
        if not here or not isinstance(here, dict | list):
            break
        key = list(here)[step % len(here)] if isinstance(here, dict) else step % len(here)
        trail.append((here, key))
        here = here[key]
    if trail and what == "set":
        trail[-1][0][trail[-1][1]] = new
    elif trail and what == "drop":
        del trail[-1][0][trail[-1][1]]
    elif trail:
        parent = next((holder for holder, _ in reversed(trail) if isinstance(holder, dict)), value)
        parent[what] = new
        return what if parent is value else trail[0][1]
    return trail[0][1] if trail else None


def damage_folder(folder, damages, consistent=False):
    """Apply damages, and make the manifest agree with them; returns the (file, key) pairs that were touched.

    The key is None where a file was damaged as a whole.
    """
    touched = set()
    for name, (kind, *how) in damages:
        path, key = folder / name, None
        if not path.is_file():
            continue
        if kind == "json" and path.suffix == ".json":
            try:
                value = json.loads(path.read_bytes())
            except (ValueError, RecursionError):
                continue
            key = change_json(value, *how)
            text = json.dumps(value)
            for mark, bulk in BULK.items():
                text = text.replace(json.dumps(mark), bulk)
            path.write_text(text)
        elif kind in ("json", "bytes"):
            path.write_bytes(
                damage_bytes(path.read_bytes(), how[0] if kind == "bytes" else [(how[0][0], how[0][-1] % 256)])
            )
        else:
            path.unlink()
            if kind == "link":
                path.symlink_to("/dev/zero")
            elif kind == "folder":
                path.mkdir()
        touched.add((name, key))
    if consistent and (folder / MANIFEST).is_file():
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            manifest["files"] = describe_files(folder)
            write_sealed(folder, manifest)
        except (ValueError, TypeError, OSError, RecursionError):
            pass  # the manifest itself is too damaged to agree with anything
    return touched


def names_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest(*tensors):
    return hashlib.sha256(
        b"".join(str(t.shape).encode() + t.contiguous().numpy().tobytes() for t in tensors)
    ).hexdigest()


def test_prepared_folders(workshop, tmp_path, amount, mine):  # noqa: F811
    """Damaged blocks are refused; an attacker's, with checksums that agree, are too, or are as the manifest says."""
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"n_positions": 48}),
                            get_input_embeddings=lambda: torch.nn.Embedding(300, 1))  # fmt: skip
    tokenizer = load_tokenizer(workshop.model)

    def use(folder):
        """Touch what the scripts touch of a prepared folder."""
        data = open_blocks(folder)
        check_fit(model, data)
        data.bytes_per_token, data.manifest["tokenizer"]["sha256"] + ""
        data.validation_prompts(tokenizer, 2, 4, 4), data.windows("train", 4, 9)
        splits = {"train": data.train, "validation": data.validation}
        ids = {name: split[list(range(len(split)))]["input_ids"] for name, split in splits.items() if len(split)}
        shapes = {name: list(rows.shape) for name, rows in ids.items()}
        said = {name: [data.manifest["splits"][name]["blocks"], data.block_size] for name in shapes}
        print(json.dumps({"ids": digest(*ids.values()), "shapes": shapes, "said": said,
                          "least": min(rows.min().item() for rows in ids.values()),
                          "greatest": max(rows.max().item() for rows in ids.values())}))  # fmt: skip

    def work(example, folder):
        shutil.copytree(workshop.data, folder)
        damage_folder(folder, *example)
        use(folder)

    clean = json.loads(attempt([lambda folder: use(workshop.data)], tmp_path, 60)[0].out)

    def check(example, ended):
        if ended.code == 0:
            found = json.loads(ended.out)
            assert found["shapes"] == found["said"], ended
            assert 0 <= found["least"] <= found["greatest"] < 300, ended
            assert example[1] or found == clean, ended
        return not ended.code

    # The Arrow files are most of the danger and few of the files.
    files = [*names_of(workshop.data), *["train/data-00000-of-00001.arrow", MANIFEST] * 3]
    example = st.tuples(damaged(files), st.booleans())
    fuzz(amount(300, 20_000), mine, "prepared folders", example, work, check, tmp_path)


@pytest.fixture(scope="module")
def broken_off(workshop):  # noqa: F811
    """A run with checkpoints at steps 2 and 4 of 6."""
    out = workshop.folder / "broken_off"
    ended = run_child(*workshop.finetune(out, "--keep-checkpoints", 3))
    assert ended.code == 0, ended.err
    shutil.rmtree(out / "checkpoint-6")
    return out


def test_checkpoints(workshop, undisturbed, broken_off, tmp_path, amount, mine):  # noqa: F811
    """A damaged checkpoint is passed over; an attacker's is refused or has the shapes of the model."""
    train = finetune_generative.train

    def look(setup, save_every, model, tokenizer, data, optimizer, state):
        """Take the place of the training: print what it would begin with."""
        assert 0 <= state.step <= setup.max_steps, state.step
        tensors = [torch.get_rng_state()]
        for parameter in model.parameters():
            entry = optimizer.state[parameter]
            assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameter.shape
            tensors += [parameter.detach(), *entry.values()]
        print(json.dumps([state.step, state.tokens, state.best_step, digest(*tensors)]))
        raise SystemExit

    def work(example, folder):
        damages, consistent, whole = example
        shutil.copytree(broken_off, folder)
        damage_folder(folder / "checkpoint-4", damages, consistent)
        finetune_generative.train = train if whole else look
        sys.argv = ["finetune_generative.py", *map(str, workshop.finetune(folder)[1])]
        left = finetune_generative.main(finetune_generative.parse_args())
        if whole and left == 0:
            print(json.dumps(digest_run(folder)))
        return left

    def outcome(ended):
        return json.loads(ended.out.splitlines()[-1])

    def without_newest(folder):
        return work(([(name, ("remove",)) for name in names_of(broken_off / "checkpoint-4")], False, False), folder)

    starts = attempt([partial(work, ([], False, False)), without_newest], tmp_path, 60)
    assert [outcome(start)[0] for start in starts] == [4, 2]

    def check(example, ended):
        if not example[1] and "is newer than this program" not in ended.err:
            assert ended.code == 0, ended
            expected = [digest_run(undisturbed)] if example[2] else map(outcome, starts)
            assert outcome(ended) in expected, ended
        return not ended.code

    files = [*names_of(broken_off / "checkpoint-4"), *["trainer_state.json", "optimizer.safetensors", MANIFEST] * 2]
    # One in thirty trains to its end, which takes ten times as long as the look at its beginning.
    example = st.tuples(damaged(files), st.booleans(), st.integers(0, 29).map(lambda n: n == 7))
    known = [
        ([("optimizer.safetensors", ("bytes", [(999, 1)]))], False, False),
        ([("optimizer.safetensors", ("remove",))], True, False),
        ([("trainer_state.json", ("link",))], True, False),
        ([("trainer_state.json", ("json", [0], "step", 48))], True, False),
        ([("trainer_state.json", ("json", [0], "seconds", float("inf")))], True, True),
    ]
    fuzz(amount(50, 20_000), mine, "checkpoints", example, work, check, tmp_path, known)


MEANINGFUL = {
    "config.json": {"activation_function", "layer_norm_epsilon", "scale_attn_weights", "n_head",
                    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "_attn_implementation"},
    "generation_config.json": set(),
    "tokenizer.json": {"model", "normalizer", "pre_tokenizer", "added_tokens"},
    "tokenizer_config.json": {"eos_token", "add_prefix_space"},
}  # fmt: skip


def test_models(workshop, tmp_path, amount, mine):  # noqa: F811
    """A model folder is refused, or computes what it did and can be trained, saved and loaded again."""
    text = "Day 1. Ada went to the mill.\n\n  It was 37 steps away, caf\u00e9! <|endoftext|>"

    def use(folder):
        """Do with a model what the scripts do."""
        model, tokenizer = load_pair(folder)
        input_ids = torch.arange(48).view(2, 24)
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits
        ids = encode_text(tokenizer, [text]), tokenizer(text, add_special_tokens=False)["input_ids"]
        new = generate_ids(model, tokenizer.eos_token_id, [ids[0][:5]], [1], Decoding(4), contextlib.nullcontext)
        return model, tokenizer, [digest(logits), ids, new, tokenizer.eos_token_id]

    def changed(folder, name):
        """Name the keys of a JSON file that are not what they were."""
        if not (folder / name).is_file():
            return {None}
        try:
            before, now = (json.loads((place / name).read_bytes()) for place in (workshop.model, folder))
        except (ValueError, RecursionError):
            return {None}
        return {key for key in {*before, *now} if key not in now or before.get(key, now) != now[key]}

    def work(example, folder):
        shutil.copytree(workshop.model, folder)
        damage_folder(folder, example)
        model, tokenizer, found = use(folder)
        model.train()
        input_ids = torch.arange(48).view(2, 24)
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        model.save_pretrained(folder / "saved")
        tokenizer.save_pretrained(folder / "saved")
        assert use(folder / "saved")[2] == found
        print(json.dumps([found, [[name, key] for name in MEANINGFUL for key in changed(folder, name)]]))

    clean = json.loads(attempt([partial(work, [])], tmp_path, 60)[0].out)[0]

    def check(example, ended):
        if ended.code == 0:
            found, keys = json.loads(ended.out.splitlines()[-1])  # libraries may speak before
            assert found == clean or any(key in MEANINGFUL[name] for name, key in keys), (keys, found, clean)
        return not ended.code

    files = ["config.json"] * 4 + ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] * 2
    known = [
        [("config.json", ("json", [0], "num_hidden_layers", None))],
        [("config.json", ("json", [0], "vocab_size", 10**9))],
        [("config.json", ("json", [0], "return_dict", False))],
        [("config.json", ("json", [0], "output_attentions", True)), ("generation_config.json", ("remove",))],
        [("generation_config.json", ("json", [1], "return_dict_in_generate", True))],
        [("generation_config.json", ("json", [1], "suppress_tokens", list(range(290))))],
        [("tokenizer_config.json", ("json", [0], "model_max_length", [[]]))],
        [("tokenizer_config.json", ("json", [0], "x", "\ud800"))],
        [("tokenizer_config.json", ("json", [0], "chat_template", {"a": 1}))],
        [("tokenizer.json", ("json", [59624, 103, 15222, 347, 15222], "set", "@wide"))],
    ]
    fuzz(amount(80, 20_000), mine, "models", damaged(files), work, check, tmp_path, known)


SCRIPTS = {"prepare_data": prepare_data, "finetune_generative": finetune_generative, "generate_text": generate_text}
FLAGS = {
    name: sorted({*re.findall(r'"(--[a-z0-9-]+)"', inspect.getsource(module.parse_args)), "--help"})
    for name, module in SCRIPTS.items()
}
VALUES = ["0", "1", "-1", "+1", "2", "008", "0.5", ".5", "5.", "1e-3", "1E3", "1e999", "-1e999", "1e-999", "nan",
          "-nan", "NaN", "inf", "infinity", "1_000", " 5 ", "5\n", "٣", "²", "５", "0x10", "1,5", "9" * 30, "9" * 5000,
          "", " ", "-", "-x", "x" * 100_000, "\ud800", "caf\udce9", "a\nb", "error: no", "\x1b[31m", "=", "a=b",
          "../..", "/dev/null", "книга", "cpu", "cuda:0", "cuda:٣", "cuda:", "cuda:" + "9" * 50, "bf16", "fp32",
          "utf-8", "utf_8", "rot13", "cosine", "%s", "{}"]  # fmt: skip
ODD_VALUES = st.sampled_from(VALUES)


@st.composite
def commands(draw):
    """Return a script and words for it, with the (flag, value) pairs that make them."""
    name = draw(st.sampled_from(list(SCRIPTS)))
    pairs, words = [], []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3]))):
        flag = draw(st.sampled_from(FLAGS[name]))
        value = draw(
            st.none()
            | ODD_VALUES
            | ODD_VALUES
            | ODD_VALUES
            | st.text(st.characters(exclude_characters="\0"), max_size=9)
        )
        twist = draw(st.integers(0, 31))
        place = draw(st.integers(2, len(flag)))
        odd = {0: flag[:place], 1: flag[:place] + flag[place + 1 :], 2: flag.upper(), 3: flag[1:], 4: "—" + flag[2:],
               5: flag.replace("-", "_"), 6: flag[:place] + "\ud800"}  # fmt: skip
        flag = odd.get(twist, flag if twist < 26 else "--" + flag[2:].replace("-", "_"))
        pairs.append((flag, value))
        joined = value is not None and draw(st.booleans())
        words += [f"{flag}={value}"] if joined else [flag] if value is None else [flag, value]
    return name, words, pairs


def test_command_lines(tmp_path, amount, mine):
    """A command line is refused in one line, or every value arrives as it was given."""

    def work(example, folder):
        args = vars(SCRIPTS[example[0]].parse_args(example[1]))
        print(json.dumps({key: [str(v) for v in value] if isinstance(value, list) else
                          value if isinstance(value, int | float | None) else str(value)
                          for key, value in args.items()}, allow_nan=False))  # fmt: skip

    def check(example, ended):
        name, _, pairs = example
        if ended.code or ended.out.startswith("usage: "):
            return False
        found = json.loads(ended.out)
        # A word without a hyphen is one more value of the flag before it, or refused.
        following = itertools.pairwise([*pairs, ("-", None)])
        pairs = [(flag, word if value is None and word[0] not in "-_" else value)
                 for (flag, value), (word, _) in following if flag[0] in "-_"]  # fmt: skip
        last = {"--" + flag[2:].replace("_", "-"): value for flag, value in pairs}
        for flag, value in last.items():
            assert flag in FLAGS[name], flag
            got = found[flag[2:].replace("-", "_")]
            if isinstance(got, bool):
                assert value is None
            elif isinstance(got, int | float):
                assert re.fullmatch(r"[0-9eE.+-]+", value)
                assert got == float(value) or got == int(value)
            else:
                assert value == got or str(Path(value)) in (got if isinstance(got, list) else [got]) or value in got
        return True

    fuzz(amount(500, 20_000), mine, "command lines", commands(), work, check, tmp_path, seconds=5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_command_line_is_answered_at_once(name):
    """In a process of its own: within a second of computing, and without torch."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", f"{name}.py", "--seed", "٣"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --seed: '٣' is not a plain number"
    assert not re.search(r"\| +(torch|transformers|datasets|numpy)$", done.stderr, re.MULTILINE)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 1
