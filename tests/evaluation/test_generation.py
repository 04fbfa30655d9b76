"""Texts longer than the context, and what ends or restricts them, against a forward pass per token."""

import re

import numpy as np
import pytest
import torch
from conftest import make_book, make_sentencepiece_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from utils.data.tokenizer import load_tokenizer
from utils.evaluation.generation import (
    Decoding,
    SeededSampling,
    StopTexts,
    TokenChooser,
    encode_prompt,
    forbid_repeated_ngrams,
    generate_ids,
    penalize_repetition,
    show_continued,
)
from utils.evaluation.memorization import CopyGuard
from utils.evaluation.ngrams import NgramIndex
from utils.model.loading import autocast

LIMIT = 64  # positions of the tiny model
LONG = Decoding(max_new_tokens=110, temperature=1.0)  # two seams or more
TEXTS = ["Day 12. Hal went to", "", "Ada", "It was 3 steps away.\n\nDay 5. Ines went to the old quay and"]


def fp32():
    return autocast(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def pair(tiny_model):
    """A model that writes words of ASCII and never ends; its large weights make every token of the context count."""
    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(5)
    sizes = {"vocab_size": len(tokenizer), "n_positions": LIMIT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).eval()
    texts = tokenizer.batch_decode([[token] for token in range(model.config.vocab_size)])
    never = torch.tensor([[0.0 if re.fullmatch(r" ?[A-Za-z.]+", text) else -torch.inf for text in texts]])
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits + never)
    return model, tokenizer


@pytest.fixture(scope="module")
def prompts(pair):
    ids = [encode_prompt(pair[1], text) for text in TEXTS]
    ids.append(encode_prompt(pair[1], "Ada went to the mill. " * 30)[:LIMIT])  # the whole context
    assert len(set(map(len, ids))) == 4
    return ids


def write(pair, prompts, seeds, decoding=LONG, **more):
    return generate_ids(pair[0], pair[1].eos_token_id, prompts, seeds, decoding, fp32, **more)


@torch.no_grad()
def naive(pair, prompt, seed, decoding, rules=(), head=(), keep=LIMIT // 2):
    """One row, one full forward pass per token over the tokens kept, no cache."""
    model, text, window = pair[0], list(prompt), list(prompt)
    sampling = SeededSampling([seed], decoding)
    for _ in range(decoding.max_new_tokens):
        if len(window) >= LIMIT:
            window = [*head, *window[-(keep - len(head)) :]]
        scores = model(torch.tensor([window]), use_cache=False).logits[:, -1].float()
        for rule in rules:
            scores = rule(torch.tensor([text]), scores)
        token = int((sampling(None, scores) if decoding.do_sample else scores).argmax())
        text.append(token)
        window.append(token)
    return text[len(prompt) :]


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 20, "top_p": 0.9}])
def test_texts_beyond_the_context_equal_a_forward_pass_per_token(pair, prompts, options):
    decoding = Decoding(**{"max_new_tokens": LONG.max_new_tokens, "temperature": 1.0} | options)
    for seed, prompt in enumerate(prompts):
        assert write(pair, [prompt], [seed], decoding) == [naive(pair, prompt, seed, decoding)]
        if not options and seed == 0:
            others = [naive(pair, prompt, seed, decoding, keep=keep) for keep in (LIMIT // 2 - 1, LIMIT // 2 + 1)]
            assert naive(pair, prompt, seed, decoding) not in others, "the model does not use its context"


def test_a_long_text_depends_on_its_prompt_and_seed_alone(pair, prompts):
    """The rows reach the context at different tokens, and each goes on as if it were alone."""
    batch = write(pair, prompts, [5, 6, 7, 8, 9])
    for prompt, seed, ids in zip(prompts, [5, 6, 7, 8, 9], batch, strict=True):
        assert len(ids) == LONG.max_new_tokens
        assert write(pair, [prompt], [seed]) == [ids]
    assert write(pair, prompts[::-1], [9, 8, 7, 6, 5]) == batch[::-1]


def test_a_text_goes_on_where_a_shorter_one_ended(pair, prompts):
    longer, shorter = (write(pair, prompts, [1] * 5, Decoding(n, temperature=1.0)) for n in (105, 90))
    assert [ids[:90] for ids in longer] == shorter


def test_rows_that_end_leave_the_others_alone(pair, prompts):
    """A row that a string ends early has left the batch when the others reach the context."""
    free = write(pair, prompts, [5, 6, 7, 8, 9])
    stop = StopTexts(pair[1], [pair[1].decode(free[2][20:24])])
    ended = write(pair, prompts, [5, 6, 7, 8, 9], stop=stop)
    assert len(ended[2]) <= 20
    for whole, ids in zip(free, ended, strict=True):
        assert ids == whole[: len(ids)] or ids[:-1] == whole[: len(ids) - 1]
    assert sum(len(ids) == LONG.max_new_tokens for ids in ended) >= 2


def test_windows_keep_the_token_that_texts_start_with(pair, prompts):
    start, prompt = 7, [7, *prompts[0]]
    kept = write(pair, [prompt], [3], start=[start])
    assert kept == [naive(pair, prompt, 3, LONG, head=[start])]
    assert kept != write(pair, [prompt], [3])


@pytest.mark.parametrize(
    ("options", "rules"),
    [({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
     ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
     ({"no_repeat_ngram_size": 3, "repetition_penalty": 0.6},
      [RepetitionPenaltyLogitsProcessor(0.6), NoRepeatNGramLogitsProcessor(3)])],
)  # fmt: skip
def test_penalties_see_the_whole_text(pair, prompts, options, rules):
    """As transformers' processors do, given everything written so far; in a batch no row sees another's padding."""
    decoding = Decoding(**{"max_new_tokens": LONG.max_new_tokens, "temperature": 0.5} | options)
    expected = [naive(pair, prompt, 1, decoding, rules) for prompt in prompts[:3]]
    assert write(pair, prompts[:3], [1] * 3, decoding) == expected
    n = options.get("no_repeat_ngram_size")
    for prompt, ids in zip(prompts, expected, strict=False):
        ngrams = [tuple((prompt + ids)[i : i + n]) for i in range(len(prompt + ids) - n + 1)] if n else []
        assert len(set(ngrams)) == len(ngrams)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_forbidden_ngrams_are_transformers(length):
    rng = np.random.default_rng(length)
    for size in range(1, 30):
        ids, scores = rng.integers(0, 4, size).tolist(), torch.randn(6)
        expected = NoRepeatNGramLogitsProcessor(length)(torch.tensor([ids]), scores[None].clone())[0]
        forbid_repeated_ngrams(ids, scores, length)
        assert torch.equal(scores, expected)


def test_penalties_are_transformers():
    ids, scores = [1, 4, 4, 0], torch.randn(6)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), scores[None].clone())[0]
    penalize_repetition(ids, scores, 1.3)
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("longest", [2, 6])
def test_the_guard_sees_the_whole_text(pair, prompts, longest):
    """The training text is what the model writes freely, over the seam: no more than `longest` tokens of it remain."""
    free = write(pair, prompts[:1], [3])[0]
    seam = LIMIT - len(prompts[0])
    train = np.array(free[seam - longest : seam + 30])
    kept = write(pair, prompts[:1], [3], guard=CopyGuard(NgramIndex(train, longest), pair[1].eos_token_id))[0]
    assert kept[:seam] == free[:seam]
    assert kept[seam] != free[seam], "the guard forbids the first token after the seam"


def cut_by_hand(tokenizer, prompt, free, stops):
    """Return the text before the first string that ends in a new token, character by character."""
    written = tokenizer.decode(prompt)
    for end in range(1, len(free) + 1):
        text = tokenizer.decode(prompt + free[:end])
        found = [text.find(stop, max(0, len(written) - len(stop) + 1)) for stop in stops]
        if max(found) >= 0:
            return text[len(tokenizer.decode(prompt)) : min(i for i in found if i >= 0)]
        written = text.rstrip("\ufffd")
    return tokenizer.decode(free)


@pytest.mark.parametrize("place", [10, LIMIT - 10, LIMIT - 8, 90])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 0), (0, 2)])
def test_a_text_ends_before_a_string(pair, prompts, place, before, after):
    """Strings of four tokens, cut at both ends, in the first window, over the seam and after it."""
    prompt, tokenizer = prompts[0], pair[1]
    free = write(pair, [prompt], [4])[0]
    string = tokenizer.decode(free[place : place + 4])
    string = string[before : len(string) - after]
    assert len(string) >= 3
    new = write(pair, [prompt], [4], stop=StopTexts(tokenizer, ["never written", string]))[0]
    text = tokenizer.decode(new)
    assert text == cut_by_hand(tokenizer, prompt, free, [string])
    assert string not in text
    assert tokenizer.decode(free).startswith(text + string)


def test_a_string_that_starts_in_the_prompt_leaves_nothing(pair, prompts):
    tokenizer, prompt = pair[1], encode_prompt(pair[1], "Ada went to the mill.")
    first = tokenizer.decode(write(pair, [prompt], [4])[0][:1])
    assert write(pair, [prompt], [4], stop=StopTexts(tokenizer, ["mill." + first[:1]])) == [[]]
    whole = write(pair, [prompt], [4], stop=StopTexts(tokenizer, ["to the"]))[0]
    assert tokenizer.decode(whole) == cut_by_hand(tokenizer, prompt, write(pair, [prompt], [4])[0], ["to the"])
    assert whole, "a string of the prompt alone ends nothing"


@pytest.mark.parametrize("text", ["Ça va, dit-elle. Où ? Là…", "日本語の本。「はい」と言った", "a👩‍🚀b 👍🏽"])
def test_strings_end_texts_of_any_alphabet(pair, text):
    tokenizer = pair[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(text)):
        for end in range(start + 1, min(start + 4, len(text)) + 1):
            stop, cut = StopTexts(tokenizer, [text[start:end]]), None
            for n in range(1, len(ids) + 1):
                cut = stop.cut(ids[:n], 0)
                if cut is not None:
                    break
            assert tokenizer.decode(cut) == text[: text.index(text[start:end])]


def test_strings_end_texts_of_a_tokenizer_that_puts_a_space_before_what_it_encodes():
    """'counted the stars' before 'ars' became 'counted the s t'; of a word cut in its middle, some may be lost."""
    chinese, long_word = "我们昨天在山上看见了一只很大的鸟，它飞走了。", "Supercalifragilisticexpialidocious"
    for text, most_lost in (("Hal counted the stars over the mill.", 0), (chinese, 3), (long_word, 12)):
        tokenizer = make_sentencepiece_tokenizer(make_book() + text * 9)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(4, len(text)):
            for end in range(start + 1, min(start + 4, len(text)) + 1):
                stop, before = StopTexts(tokenizer, [text[start:end]]), text[: text.index(text[start:end])]
                cut = next(cut for n in range(1, len(ids) + 1) if (cut := stop.cut(ids[:n], 0)) is not None)
                assert before.startswith(tokenizer.decode(cut))
                assert len(before) - len(tokenizer.decode(cut)) <= most_lost


@pytest.mark.parametrize("prompt", ["The old house", "", "Ada"])
def test_a_prompt_and_its_continuation_are_shown_as_one_text(prompt):
    tokenizer = make_sentencepiece_tokenizer(make_book() + "The old house \x1b[2J")
    new = tokenizer("stood there \x1b[2J", add_special_tokens=False)["input_ids"]
    shown = show_continued(tokenizer, encode_prompt(tokenizer, prompt), new)
    assert shown == f"{prompt} stood there \ufffd[2J".strip()


def test_watching_sees_every_token_and_may_end_the_text(pair, prompts):
    seen = []

    def watch(new):
        seen.append([list(ids) for ids in new])
        return len(new[0]) == 80

    out = write(pair, prompts[:2], [1, 2], watch=watch)
    assert [len(new[0]) for new in seen] == list(range(1, 81))
    assert out == seen[-1] == write(pair, prompts[:2], [1, 2], Decoding(80, temperature=1.0))


def test_a_finished_row_obeys_no_rule(pair):
    """After its end of text a row waits for the others: nothing is counted or written for it."""
    guard = CopyGuard(NgramIndex(np.array([5, 6, 7]), 2), 0)
    chooser = TokenChooser([[5, 6], [5, 6]], [1, 2], Decoding(3, do_sample=False), 0, [guard], None, None)
    scores = torch.zeros(2, 10)
    scores[0, 0] = scores[1, 8] = 1.0
    chooser(None, scores.clone())
    assert guard.acted == 2
    chooser.texts[1] = [5, 6]
    chooser(None, scores.clone())
    assert guard.acted == 3
    assert chooser.new_ids() == [[], [8]]
    assert chooser.are_finished(scores, None).tolist() == [True, False]


def test_an_end_of_text_in_the_prompt_is_no_copy():
    guard, scores = CopyGuard(NgramIndex(np.array([5, 0, 6, 7]), 2), 0), torch.zeros(10)
    guard([0, 6], scores)
    assert guard.acted == 0
    guard([9, 6], scores)
    assert not scores.any()


def test_a_model_without_a_fixed_context_has_no_seam(prompts):
    torch.manual_seed(1)
    model = BloomForCausalLM(BloomConfig(vocab_size=400, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0)).eval()
    new = generate_ids(model, 399, prompts[:1], [2], Decoding(100, do_sample=False), fp32)[0]
    ids = list(prompts[0])
    with torch.no_grad():
        for _ in new:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert new == ids[len(prompts[0]) :]
