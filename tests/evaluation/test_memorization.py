"""Extraction and coverage equal independent calculations, the limit of copying is sane, the guard keeps spans short."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ngrams import array, first_place, followers, longest_shared, mark_copied
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from utils.data.blocks import open_blocks
from utils.evaluation.generation import Decoding, generate_ids
from utils.evaluation.memorization import (
    CopyGuard,
    CopyMonitor,
    count_samples,
    decoding_log_probs,
    default_copy_rate,
    measure_coverage,
    measure_extraction,
)
from utils.evaluation.ngrams import NOT_FOUND, NgramIndex, ngram_overlap
from utils.model.loading import autocast, load_pair


def fp32():
    return autocast(torch.device("cpu"), "fp32")


GREEDY = Decoding(max_new_tokens=20, do_sample=False)
SAMPLED = Decoding(max_new_tokens=20, temperature=0.7, top_k=30, top_p=0.95)


@pytest.fixture(scope="module")
def memorizer(tiny_model, book):
    """Return a model that memorized 8 rows of the book, its end of text, the book's ids, and beginnings."""
    model, tokenizer = load_pair(tiny_model)
    train = np.array(tokenizer(book.read_text(encoding="utf-8"))["input_ids"], np.uint16)
    rows = torch.from_numpy(train[:256].astype(np.int64)).view(8, 32)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    model.eval()  # no dropout: it is to memorize
    for _ in range(50):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [row[: 2 + number % 7].tolist() for number, row in enumerate(rows)]
    return model, tokenizer.eos_token_id, train, prompts


def longest_new_run(ids, n_prompt, train):
    """Return the tokens of the longest run of training that ends in a token after the prompt."""
    best = 0
    for end in range(n_prompt + 1, len(ids) + 1):
        while best < end and first_place(tuple(ids[end - best - 1 : end]), train) >= 0:
            best += 1
    return best


DECODINGS = {
    "default": Decoding(),
    "plain": Decoding(top_p=1.0),
    "hot": Decoding(temperature=1.7, top_p=0.97),
    "top_k": Decoding(top_k=7, top_p=1.0),
    "cold_both": Decoding(temperature=0.6, top_k=20, top_p=0.8),
    "zero": Decoding(temperature=0.0),
    "greedy": Decoding(do_sample=False),
}


def warped_log_probs(logits, decoding):
    """Log probabilities of the next token, from (V,) logits, by transformers' own processors."""
    scores = logits[None].float()
    if not decoding.do_sample or decoding.temperature == 0:
        best = torch.arange(len(logits)) == logits.argmax()
        return torch.where(best, 0.0, -torch.inf)
    scores = TemperatureLogitsWarper(decoding.temperature)(None, scores)
    if decoding.top_k:
        scores = TopKLogitsWarper(decoding.top_k)(None, scores)
    if decoding.top_p < 1:
        scores = TopPLogitsWarper(decoding.top_p)(None, scores)
    return scores.log_softmax(-1)[0]


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_log_probs_of_a_decoding_are_the_warpers(decoding):
    torch.manual_seed(0)
    logits = torch.randn(40, 300) * torch.linspace(0.1, 30, 40)[:, None]  # from flat to one token alone
    found = decoding_log_probs(logits, decoding)
    expected = torch.stack([warped_log_probs(row, decoding) for row in logits])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert decoding.top_p == 1 or not torch.isfinite(found).all()


def test_very_unlikely_tokens_keep_their_log_prob():
    logits = torch.tensor([[0.0, -500.0, -2000.0]])
    assert decoding_log_probs(logits, Decoding(temperature=1.0, top_p=1.0)).tolist() == [[0.0, -500.0, -2000.0]]
    assert decoding_log_probs(logits, Decoding(temperature=1.0, top_p=0.9)).tolist() == [[0.0, -math.inf, -math.inf]]
    equal = decoding_log_probs(
        torch.tensor([[2.0, 1.0, 1.0, 0.0]]), Decoding(temperature=1.0, top_k=2, top_p=1.0)
    )  # both or none
    assert equal.exp().tolist()[0] == pytest.approx([0.5761, 0.2119, 0.2119, 0], abs=1e-4)


def test_samples_needed_by_hand():
    shares = [1.0, 0.6, 0.5, 0.4, 0.01]
    needed = []
    for p in shares:
        needed.append(next(n for n in range(1, 1000) if 1 - (1 - p) ** n >= 0.5))
    assert count_samples(np.log(shares)).tolist() == needed == [1, 1, 1, 2, 69]
    tiny = count_samples(np.array([math.log(1e-300), -1000.0, -math.inf]))
    assert tiny.tolist() == [pytest.approx(math.log(2) * 1e300), math.inf, math.inf]


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
def test_extraction_equals_a_loop_over_tokens(memorizer, decoding):
    """Rows that the model memorized, others of the book, and noise."""
    model, _, train, _ = memorizer
    rng = np.random.default_rng(0)
    rows = [train[i : i + 13].tolist() for i in (0, 32, 64, 96, 128, 700, 800)] + rng.integers(1, 400, (2, 13)).tolist()
    log_p, plain, matched = [], [], []
    for row in rows:
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([row[:end]])).logits[0, -1].double() for end in range(6, 13)]
        log_p.append(sum(warped_log_probs(z, decoding)[token].item() for z, token in zip(logits, row[6:], strict=True)))
        plain += [z.log_softmax(-1)[token].item() for z, token in zip(logits, row[6:], strict=True)]
        agrees = [z.argmax().item() == token for z, token in zip(logits, row[6:], strict=True)]
        matched.append([*agrees, False].index(False))
    found = measure_extraction(model, rows, decoding, 4, fp32)
    p = np.exp(log_p)
    needed = [math.log(0.5) / math.log1p(-x) if 0 < x < 1 else (1 if x else math.inf) for x in p]
    assert found["extractable"] == {str(n): np.mean(1 - (1 - p) ** n >= 0.5) for n in (1, 100, 10_000)}
    assert found["samples_needed"] == math.ceil(min(needed))
    assert found["mean_log_prob"] == pytest.approx(np.mean(plain), abs=1e-4)
    assert (found["prefixes"], found["tokens"]) == (9, 7)
    assert found["exact_match"] == np.mean([n == 7 for n in matched])
    assert found["mean_matched"] == pytest.approx(np.mean(matched))
    assert 0 < found["extractable"]["10000"] < 1
    if not decoding.do_sample:
        assert found["extractable"] == dict.fromkeys(("1", "100", "10000"), found["exact_match"])


def test_noise_is_not_extractable(memorizer):
    model, _, _, _ = memorizer
    rows = np.random.default_rng(1).integers(1, 400, (3, 40)).tolist()
    for decoding in (Decoding(), Decoding(top_p=1.0)):  # impossible; possible in far more than 10^12 samples
        found = measure_extraction(model, rows, decoding, 2, fp32)
        assert (found["extractable"]["10000"], found["samples_needed"]) == (0, None)
        assert -30 < found["mean_log_prob"] < -3


def test_samples_agree_with_the_probability(memorizer):
    model, eos, train, _ = memorizer
    decoding, n_samples = Decoding(max_new_tokens=4, temperature=2.2, top_p=0.95), 600
    checked = 0
    for start in range(0, 256, 32):
        row = train[start : start + 8].tolist()
        n = measure_extraction(model, [row], decoding, 1, fp32)["samples_needed"]
        if n is None or not 4 <= n <= 40:
            continue
        least, most = 1 - 0.5 ** (1 / n), 1 - 0.5 ** (1 / (n - 1))
        new = generate_ids(model, eos, [row[:4]] * n_samples, list(range(n_samples)), decoding, fp32)
        share = sum(ids == row[4:] for ids in new) / n_samples
        error = 3 * math.sqrt(most * (1 - most) / n_samples)
        assert least - error < share < most + error
        checked += 1
    assert checked


def test_extraction_leaves_mode_and_random_state(memorizer):
    model, _, train, _ = memorizer
    model.train()
    before = torch.get_rng_state()
    measure_extraction(model, [train[:12].tolist()], Decoding(), 1, fp32)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    model.eval()


def test_coverage_by_hand():
    book = ["one", "two", "three", "four", "five", "six", "one", "two", "three", "four", "five", "seven"]

    def cover(*texts, of=book):
        found = measure_coverage([text.split() for text in texts], of)
        return found["covered"], found["longest_words"], found["n_words"]

    assert cover("then one two three four five") == (10 / 12, 5, 12)
    assert cover("one two three", "four five six")[0] == 0  # no span reaches from one text to the next
    assert cover("two three four five six", "three four five seven", "three four five six one two") == (7 / 12, 6, 12)
    assert cover(" ".join(book)) == (1.0, 12, 12)
    assert cover() == cover("") == (0, 0, 12)
    assert cover("one two", of=[]) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), n_texts=st.integers(0, 3), n_kinds=st.sampled_from([1, 2, 3, 9]))
def test_coverage_equals_a_brute_force_scan(seed, n_texts, n_kinds):
    rng = random.Random(seed)
    book = rng.choices("abcdefghi"[:n_kinds], k=rng.randint(0, 60))
    texts = []
    for _ in range(n_texts):
        start = rng.randint(0, len(book))
        texts.append(book[start : start + rng.randint(0, 12)] + rng.choices("abcdefghi"[:n_kinds], k=rng.randint(0, 8)))
    covered = [any(marks) for marks in zip(*(mark_copied(book, text, 5) for text in texts), strict=True)]
    assert measure_coverage(texts, book) == {
        "covered": sum(covered) / max(1, len(book)),
        "longest_words": max((longest_shared(text, book) for text in texts), default=0),
        "n_words": len(book),
    }


def test_the_default_copy_rate_leaves_room_above_the_author_and_below_all():
    rates = [default_copy_rate(rate) for rate in (0, 0.005, 0.01, 0.1, 0.2, 0.34, 0.8, 1.0)]
    assert rates == pytest.approx([0.03, 0.03, 0.03, 0.3, 0.6, 0.67, 0.9, 1.0])


@pytest.fixture(scope="module")
def monitored(tiny_model, prepared):
    """Return a model, its tokenizer, the blocks of a book, and a monitor of the copying of them."""
    (model, tokenizer), data = load_pair(tiny_model), open_blocks(prepared)
    return model, tokenizer, data, CopyMonitor(data, model, tokenizer, n_samples=4, max_copy_rate=None, seed=1)


def test_the_author_is_cut_like_the_samples(monitored):
    """N-grams over the edge of a window do not count, as they do not at the edge of a sample."""
    model, tokenizer, data, monitor = monitored
    ids, train, windows = data.ids("validation"), tuple(data.ids("train").tolist()), []
    for start, end, _ in data.spans("validation"):
        for edge in range(start, end - monitor.new_tokens + 1, monitor.new_tokens):
            windows.append(tuple(ids[edge : edge + monitor.new_tokens].tolist()))
    marks = [mark for window in windows for mark in mark_copied(window, train, 8)]
    rate = sum(marks) / len(marks)
    assert rate < ngram_overlap(data.segments("validation"), data.ids("train"))["8"]
    assert monitor.limit == default_copy_rate(rate)
    assert CopyMonitor(data, model, tokenizer, 1, 0.5, 1).limit == 0.5


def test_the_monitor_measures_the_same_sample_every_time(monitored):
    model, tokenizer, data, monitor = monitored
    before = torch.get_rng_state()
    assert monitor.measure(model, fp32) == monitor.measure(model, fp32)
    assert monitor.measure(model, fp32).keys() == {"eval/copy_rate"}
    assert torch.equal(before, torch.get_rng_state())
    assert CopyMonitor(data, model, tokenizer, 0, None, 1).measure(model, fp32) == {}


def test_segments_shorter_than_a_sample_are_taken_whole(monitored):
    model, tokenizer, _, _ = monitored
    nothing = lambda *_: []  # noqa: E731
    segments = [np.arange(1, 21), np.arange(31, 51)]
    data = SimpleNamespace(validation=[1], windows=nothing, validation_prompts=nothing,
                           view=lambda _: np.arange(1, 10), segments=lambda _: segments)  # fmt: skip
    monitor = CopyMonitor(data, model, tokenizer, 4, None, 1)
    assert monitor.limit == default_copy_rate(9 / 40)
    assert monitor.measure(model, fp32) == {}


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_guard_keeps_copied_spans_short(memorizer, decoding):
    model, eos, train, prompts = memorizer
    book = tuple(train.tolist())
    free = generate_ids(model, eos, prompts, list(range(8)), decoding, fp32)
    runs = [longest_new_run(p + new, len(p), book) for p, new in zip(prompts, free, strict=True)]
    assert min(runs) > 8, runs
    for longest in (2, 5, 8):
        guard = CopyGuard(NgramIndex(train, longest), eos)
        kept = generate_ids(model, eos, prompts, list(range(8)), decoding, fp32, guard)
        runs = [longest_new_run(p + new, len(p), book) for p, new in zip(prompts, kept, strict=True)]
        assert max(runs) == longest, runs  # the whole length allowed is used, and no token more
        assert guard.acted > 0


@pytest.mark.parametrize("longest", [2, 5, 8])
def test_the_guard_counts_the_tokens_before_which_it_forbade(memorizer, longest):
    model, eos, train, prompts = memorizer
    book, index = tuple(train.tolist()), NgramIndex(train, longest)
    for prompt in prompts[:3]:
        guard, expected = CopyGuard(index, eos), 0
        new = generate_ids(model, eos, [prompt], [0], GREEDY, fp32, guard)[0]
        ids, chosen = prompt + new, min(len(new) + 1, GREEDY.max_new_tokens)  # the end of text is chosen too
        for at in range(len(prompt), len(prompt) + chosen):
            run = tuple(ids[max(0, at - longest) : at])
            expected += len(run) == longest and len(followers(run, book)) > 0
        assert guard.acted == expected > 0


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_where_the_guard_does_not_act_nothing_changes(memorizer, decoding):
    """A row stays as it is with a limit above its own longest run, and not with a limit below."""
    model, eos, train, prompts = memorizer
    book = tuple(train.tolist())
    for seed, prompt in enumerate(prompts[:4]):
        free = generate_ids(model, eos, [prompt], [seed], decoding, fp32)[0]
        longest = longest_new_run(prompt + free[:-1], len(prompt), book)  # after the last token nothing is chosen
        for allowed in (longest + 1, longest + 5, longest):
            guard = CopyGuard(NgramIndex(train, allowed), eos)
            new = generate_ids(model, eos, [prompt], [seed], decoding, fp32, guard)[0]
            assert (guard.acted == 0) == (allowed > longest)
            assert new == free or allowed == longest


def test_a_span_that_starts_in_the_prompt_is_not_continued(memorizer):
    model, eos, train, _ = memorizer
    book, prompt = tuple(train.tolist()), train[:20].tolist()
    free = generate_ids(model, eos, [prompt], [0], GREEDY, fp32)[0]
    assert free[:8] == train[20:28].tolist()
    kept = generate_ids(model, eos, [prompt], [0], GREEDY, fp32, CopyGuard(NgramIndex(train, 8), eos))[0]
    assert first_place((*prompt[-8:], kept[0]), book) == NOT_FOUND


def test_a_guard_of_another_text_does_nothing(memorizer):
    model, eos, _, prompts = memorizer
    free = generate_ids(model, eos, prompts, list(range(8)), SAMPLED, fp32)
    unused = sorted(set(range(400)) - {token for row in (*prompts, *free) for token in row})[:9]
    for train in (array(unused * 9), array(unused[:1]), array([])):
        guard = CopyGuard(NgramIndex(train, 2), eos)
        assert generate_ids(model, eos, prompts, list(range(8)), SAMPLED, fp32, guard) == free
        assert guard.acted == 0


def test_the_guard_does_not_depend_on_the_rows_beside(memorizer):
    """Training of two books has an end of text in its middle; a shorter prompt is filled up with the same token."""
    model, eos, _, _ = memorizer
    alone = [11, 12]
    new = generate_ids(model, eos, [alone], [0], GREEDY, fp32)[0]
    train = array([30, eos, *alone, new[0], 31])  # the second book begins as the sample does
    index = NgramIndex(train, 3)
    single = generate_ids(model, eos, [alone], [0], GREEDY, fp32, CopyGuard(index, eos))[0]
    batch = generate_ids(model, eos, [alone, [11, 12, 13]], [0, 1], GREEDY, fp32, CopyGuard(index, eos))[0]
    assert single == batch
