"""The token that Llama's tokenizer puts before a text stands in blocks and prompts, and counts nowhere as text."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import add_start_token
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from utils.data.blocks import open_blocks
from utils.data.tokenizer import END_OF_TEXT, fingerprint_tokenizer, load_tokenizer, start_ids, train_tokenizer
from utils.errors import UserError
from utils.evaluation import compare
from utils.evaluation.generation import Decoding, encode_prompt, fit_prompt, generate_ids
from utils.evaluation.loss import cut_blocks, score_blocks, summarize_loss
from utils.evaluation.memorization import CopyGuard, CopyMonitor
from utils.evaluation.ngrams import NgramIndex
from utils.evaluation.reader import read_texts
from utils.model.loading import autocast, load_pair

FP32 = partial(autocast, torch.device("cpu"), "fp32")
BLOCK = 32


@pytest.fixture(scope="module", params=["<s>", END_OF_TEXT], ids=["own", "end of text"])
def started(request, tmp_path_factory, book, script_once):
    """Folder of a Llama whose tokenizer has a start token (model) and of one without (plain), and blocks for both."""
    folder = tmp_path_factory.mktemp("started")
    for name in ("plain", "model"):
        tokenizer = train_tokenizer([book.read_text(encoding="utf-8")], 400)
        tokenizer.add_special_tokens({"bos_token": request.param})  # both have the same vocabulary
        if name == "model":
            add_start_token(tokenizer, request.param)
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        flags = ["--input-path", book, "--model-name", folder / name, "--block-size", BLOCK]
        script_once("prepare_data", *flags, "--output-dir", folder / f"{name}_blocks")
    return folder


@pytest.fixture(scope="module")
def case(started):
    """The blocks with start tokens, those without, the model, its tokenizer and the start token's id."""
    model, tokenizer = load_pair(started / "model")
    data, plain = (open_blocks(started / f"{name}_blocks") for name in ("model", "plain"))
    return data, plain, model, tokenizer, start_ids(tokenizer)[0]


def test_start_tokens_of_tokenizers(book):
    tokenizer = train_tokenizer([book.read_text(encoding="utf-8")], 400)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    one, other = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = fingerprint_tokenizer(tokenizer)
    templates = {"$A": [], "<s> $A": [one], f"$A {END_OF_TEXT}": [], f"{END_OF_TEXT} $A": [other]}
    templates |= {f"<s> $A {END_OF_TEXT}": [one], f"<s> {END_OF_TEXT} $A": [one, other]}
    for template, expected in templates.items():
        special = [("<s>", one), (END_OF_TEXT, other)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        assert start_ids(tokenizer) == expected
        assert (fingerprint_tokenizer(tokenizer) == plain) == (not expected), "it gives a text other ids"


def test_two_start_tokens_are_refused(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    add_start_token(tokenizer, "<s>")
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> <s> $A", special_tokens=special)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="puts 2 tokens before a text, at most one is known"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_blocks_start_with_it_and_hold_the_same_text(case, split):
    data, plain, _, _, start = case
    rows, counts = getattr(data, split)[:]["input_ids"], data.manifest["splits"][split]
    assert rows.shape[1] == BLOCK
    assert (rows[:, 0] == start).all()
    text = rows[:, 1:].flatten().numpy()
    n_tokens = counts["tokens"]
    assert n_tokens == plain.manifest["splits"][split]["tokens"]
    assert (counts["blocks"], counts["tail_tokens"]) == divmod(n_tokens, BLOCK - 1) == (len(rows), n_tokens - len(text))
    common = min(len(text), len(plain.ids(split)))
    assert common > 150
    assert np.array_equal(text[:common], plain.ids(split)[:common])
    # All that reads the ids has positions in the text, without start tokens.
    assert np.array_equal(data.ids(split), text)
    assert sum(end - begin for begin, end, _ in data.spans(split)) == len(text)
    for (begin, end, span), ids in zip(data.spans(split), data.segments(split), strict=True):
        whole = plain.ids(split)[begin:end]
        assert np.array_equal(ids[: len(whole)], whole)
        assert span["tokens"][0] == begin
    windows = zip(data.window_starts(split, 9, 10), data.windows(split, 9, 10), strict=True)
    assert all(np.array_equal(window, text[first : first + 9]) for first, window in windows)
    assert data.id_range()[0] <= start <= data.id_range()[1]
    assert data.manifest["tokenizer"]["start_id"] == start
    assert "start_id" not in plain.manifest["tokenizer"]


def test_a_block_may_be_the_start_token_and_one_more(started, book, script, tmp_path):
    flags = ["--input-path", book, "--model-name", started / "model", "--block-size", 2, "--output-dir", tmp_path]
    assert script("prepare_data", *flags, "--overwrite").code == 0
    data = open_blocks(tmp_path)
    assert len(data.ids("train")) == len(data.train) == data.manifest["splits"]["train"]["tokens"]


def bits_by_hand(model, tokenizer, rows, start):
    """Bits per byte of rows of text ids, each scored after the start token, one token at a time."""
    nats = n_bytes = 0
    for row in rows:
        with torch.no_grad():
            logs = model(torch.tensor([[start, *row]])).logits[0].double().log_softmax(-1)
        nats -= sum(logs[position, token].item() for position, token in enumerate(row))
        n_bytes += len(tokenizer.decode(row).encode())
    return nats / n_bytes / math.log(2)


def test_bits_per_byte_count_all_of_the_text_and_nothing_else(case):
    data, _, model, tokenizer, start = case
    text = data.ids("validation").tolist()
    rows = [text[first : first + BLOCK - 1] for first in range(0, len(text), BLOCK - 1)]
    expected = bits_by_hand(model, tokenizer, rows, start)
    sums, n_targets = score_blocks(model, data.validation, 8, FP32)
    assert n_targets == len(text)
    bytes_per_token = len(tokenizer.decode(text).encode()) / len(text)
    found = summarize_loss(sum(sums), n_targets, bytes_per_token)["eval/bits_per_byte"]
    assert found == pytest.approx(expected, abs=1e-6)
    # The manifest's count is that of the text with its tail.
    assert data.bytes_per_token == pytest.approx(bytes_per_token, rel=0.02)

    general = tokenizer.decode(text)
    blocks, bytes_per_token = cut_blocks(general, tokenizer, BLOCK)
    assert torch.equal(blocks[:]["input_ids"], data.validation[:]["input_ids"])
    sums, n_targets = score_blocks(model, blocks, 8, FP32)
    assert summarize_loss(sum(sums), n_targets, bytes_per_token)["eval/bits_per_byte"] == pytest.approx(
        expected, abs=1e-6
    )


def test_prompts_start_with_it_and_keep_it_when_cut(case):
    _, _, _, tokenizer, start = case
    text = tokenizer("The old house", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "The old house") == [start, *text]
    assert encode_prompt(tokenizer, "") == [start]
    long = [start, *range(5, 105)]
    assert fit_prompt(long, 64, 20, True, 1) == [start, *range(62, 105)]
    assert fit_prompt(long, 64, 20, True, 0) == [*range(61, 105)]


def test_the_reader_sees_it_and_leaves_it_out(case):
    _, _, model, tokenizer, start = case
    texts = ["Day 3. Ada went to the mill.", "D", "", "Bram counted the stars. " * 40]
    hidden, surprise = read_texts(model, tokenizer, texts, 2, FP32)
    for text, states, figures in zip(texts[:2], hidden, surprise, strict=False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            output = model(torch.tensor([[start, *ids]]), output_hidden_states=True)
        chosen = output.hidden_states[1][0], output.hidden_states[2][0]
        assert states == pytest.approx(np.concatenate([layer[1:].mean(0).numpy() for layer in chosen]), abs=1e-5)
        logs = output.logits[0].log_softmax(-1)
        assert figures[0] == pytest.approx(np.mean([-float(logs[i, token]) for i, token in enumerate(ids)]), abs=1e-4)
    assert np.isfinite(hidden).all()


def test_the_copy_monitor_starts_its_prompts_with_it(case):
    data, _, model, tokenizer, start = case
    monitor = CopyMonitor(data, model, tokenizer, 4, None, 1)
    assert {prompt[0] for prompt in monitor.prompts} == {start}
    assert len(monitor.prompts[0]) + monitor.new_tokens == 64  # the context
    assert 0 <= monitor.measure(model, FP32)["eval/copy_rate"] <= 1


def test_the_copy_guard_counts_spans_of_text_alone(case):
    data, _, model, tokenizer, start = case
    train, eos = data.ids("train"), tokenizer.eos_token_id
    index = NgramIndex(train, 4)
    for first in (0, 3, 31, 62):
        text = train[first : first + 4].tolist()
        guard = CopyGuard(index, eos)
        scores = torch.zeros(2, 500)
        guard([start, *text], scores[0])
        guard(text, scores[1])
        assert torch.equal(scores[0], scores[1])
        assert scores[0, train[first + 4]] == -torch.inf
        assert guard.acted == 2
        guard([start, *text[:3]], torch.zeros(500))
        assert guard.acted == 2, "three tokens of text are no span of four"
    prompts = [[start, *train[:9].tolist()]]
    new = generate_ids(model, eos, prompts, [0], Decoding(max_new_tokens=20), FP32, CopyGuard(index, eos))
    assert len(new) == 1


def test_rows_of_extraction_are_the_beginnings_of_blocks(case, monkeypatch):
    data, _, model, _, start = case
    given = []
    monkeypatch.setattr(compare, "measure_extraction", lambda _, rows, *rest: given.append(rows))
    compare.extract_blocks({"base": model}, data, 64, Decoding(), 8, FP32)
    assert [len(rows[0]) for rows in given] == [BLOCK, BLOCK]
    assert {row[0] for rows in given for row in rows} == {start}


def test_data_that_was_prepared_without_it_is_refused(started, script, book, tmp_path):
    flags = ["--model-name", started / "model", "--output-dir", tmp_path / "run", "--max-steps", 1]
    ended = script("finetune_generative", "--data-dir", started / "plain_blocks", *flags)
    assert ended.code == 2
    assert f"data was made with another tokenizer than {started / 'model'}'s" in ended.err
    flags = ["--input-path", book, "--block-size", BLOCK, "--output-dir", started / "plain_blocks", "--model-name"]
    ended = script("prepare_data", *flags, started / "model")
    assert ended.code == 2
    assert " was prepared with" in ended.err
