"""Books in other scripts are cut, counted and measured as English ones are; where they are not, the report says so."""

import json
import random

import numpy as np
import pytest
from languages import LANGUAGES, UNSPACED, make_text

from utils.data.blocks import decode_cuts, open_blocks
from utils.data.text import count_words, find_cuts, make_printable
from utils.data.tokenizer import load_tokenizer, train_tokenizer
from utils.evaluation.columns import build_column
from utils.evaluation.compare import CUT_WORD
from utils.evaluation.render import render_page, render_terminal
from utils.evaluation.report import Report
from utils.evaluation.stylometry import (
    build_word_profile,
    is_other_language,
    is_unspaced,
    measure_delta,
    measure_lengths,
    measure_unknown,
    split_terms,
    split_words,
)
from utils.evaluation.verdict import judge

ENGLISH = "results/data/control.txt"


def read_english():
    with open(ENGLISH, encoding="utf-8") as file:
        return file.read()


# Words and pairs


def test_neighbors_in_a_script_without_spaces_are_pairs():
    assert split_terms("我来了。你") == ["我", "来", "我来", "了", "来了", "你"]
    assert split_terms("我 来") == ["我", "来"]
    assert split_terms("abc漢字x 字") == ["abc", "漢", "字", "漢字", "x", "字"]
    assert split_terms("สวัสดี") == ["ส", "วั", "สวั", "ส", "วัส", "ดี", "สดี"]
    assert split_terms("がが") == ["\u304c", "\u304c", "\u304c\u304c"]  # composed, as words are


@pytest.mark.parametrize("language", LANGUAGES)
def test_terms_are_words_where_words_have_spaces(language):
    text = make_text(language, 30)
    terms, words = split_terms(text), split_words(text)
    assert is_unspaced(words) == (language in UNSPACED)
    if language in UNSPACED:
        assert [term for term in terms if term in set(words)] == words
        assert len(terms) > 1.5 * len(words)
    else:
        assert terms == words
        assert count_words(text) == len(text.split())


def test_english_has_the_same_terms_with_a_foreign_name_in_it():
    text = read_english()
    assert split_terms(text) == split_words(text)
    assert split_terms(text[:200] + " 我们 ") == [*split_words(text[:200]), "我", "们", "我们"]
    assert not is_unspaced(split_words(text[:200] + " 我们 "))


@pytest.mark.parametrize("language", UNSPACED)
def test_words_of_the_manifest_are_letters(language):
    text = make_text(language, 30)
    assert count_words("我来了。 two words, 三") == 6
    assert count_words(text) == pytest.approx(len(split_words(text)), rel=0.1)  # and the numbers


@pytest.mark.parametrize("language", UNSPACED)
def test_pairs_tell_the_author_from_letters_in_random_order(language):
    paragraphs = make_text(language, 700).split("\n\n")
    book, rest = "\n\n".join(paragraphs[:500]), paragraphs[500:]
    letters = split_words("\n\n".join(rest))
    random.Random(0).shuffle(letters)
    step = len(letters) // 20
    author = [split_terms("\n\n".join(rest[start : start + 10])) for start in range(0, 200, 10)]
    mixed = [split_terms("".join(letters[start : start + step])) for start in range(0, 20 * step, step)]
    profile, known = build_word_profile(book), set(split_terms(book))
    near, far = (measure_delta(texts, profile, 10**6, 0)["delta"].value for texts in (author, mixed))
    assert near < 0.5 * far
    assert measure_unknown(author, known, 0).value == 0
    assert measure_unknown(mixed, known, 0).value > 0.1
    assert set(letters) <= set(split_words(book))  # letters alone would say nothing


def test_lengths_count_letters_once():
    assert measure_lengths("我来了。你好！\n\n他") == {"sentence_words": 3.0, "paragraph_words": 6.0}
    column = build_column(["我来了。你好！"], [np.zeros(3)], [0])
    assert (column.n_words, column.n_terms) == (5, 8)


# General text of another language


@pytest.mark.parametrize("language", LANGUAGES)
def test_english_is_another_language(language):
    book, other = make_text(language, 400), make_text(language, 60)
    assert is_other_language(split_words(read_english()), split_words(book))
    assert not is_other_language(split_words(other), split_words(book))


def test_general_text_of_the_same_language_is_recognized():
    english = split_words(read_english())
    with open("results/data/book.txt", encoding="utf-8") as file:
        assert not is_other_language(english, split_words(file.read()))
    assert not is_other_language([], english)
    french = "Le chat est sur la table et il ne me dit pas un mot de son long voyage, on a plus de temps."
    assert is_other_language(english, split_words(french))


def test_the_report_says_how_it_counts():
    figures = {"unknown_words": {"base": 0.5, "finetuned": 0.25, "reference": 0.125}, "forgetting_percent": 50.0,
               "settings": {"finetuned_model": "tuned", "base_model": "base"}}  # fmt: skip
    usual, foreign = (judge(Report(**figures, unspaced=flag, other_language=flag)) for flag in (False, True))
    sentence = "The script has no spaces between words: words are characters and pairs of neighboring characters"
    pages = [render_page(name, foreign) for name in ("report.html", "report.md")]
    for page in [" ".join(render_terminal(foreign).split()), json.dumps(foreign.to_dict()), *pages]:
        assert sentence in page
    assert sentence not in json.dumps(usual.to_dict())
    spelling = [next(s for s in report.verdict if s.startswith("Spelling")) for report in (usual, foreign)]
    assert "words that stand in neither book nor general text is 25.0%" in spelling[0]
    assert "words that do not stand in the book is 25.0%" in spelling[1]
    forgot = next(s for s in foreign.verdict if s.startswith("It forgot"))
    assert forgot == ("It forgot much: general text, which is of another language than the book, costs 50.0% more bits "
                      "than before.")  # fmt: skip


@pytest.mark.parametrize(("other", "is_fault"), [(False, True), (True, False)])
def test_a_forgotten_language_is_no_fault_of_a_book_in_another(other, is_fault):
    share = {"value": 1.0, "low": 0.9, "high": 1.0}
    parts = {"finetuned": dict.fromkeys(("words", "spelling", "sense"), share)}
    report = judge(Report(parts=parts, forgetting_percent=90.0, other_language=other, reader="r"))
    assert report.flags["forgot"] is True
    assert report.flags["writes_like_the_book"] is not is_fault
    assert ("but it forgot much" in report.verdict[0]) == is_fault


# Sentences, cuts and characters


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ("One. Two? Three.", ["Two? ", "Three"]),
        ("我来了。你好！“谁？”他说。", ["你好！“谁", "“谁？”他说", "他说。"]),
        ("एक दो। तीन चार॥ पाँच।", ["तीन चार॥ ", "पाँच।"]),
        ("أين هو؟ هنا هو۔ نعم.", ["هنا هو۔", "نعم."]),
        ("Այո այո։ Ոչ։", ["Ոչ։"]),
    ],
)
def test_segments_may_start_after_sentences(text, starts):
    cuts = find_cuts(text, 3)[1:-1]
    assert len(cuts) == len(starts)
    assert all(text[cut:].startswith(start) for cut, start in zip(cuts, starts, strict=True))


@pytest.mark.parametrize("language", LANGUAGES)
def test_prompts_and_spans_have_whole_characters(language, script, tmp_path):
    """With a small vocabulary a letter is two or three tokens, and a cut may lie within it."""
    text = make_text(language)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    flags = ["--input-path", tmp_path / "book.txt", "--train-tokenizer", 300, "--block-size", 32]
    code, out, _ = script("prepare_data", *flags, "--output-dir", tmp_path / "blocks")
    assert code == 0
    assert f"{count_words(text):,} words" in out
    data, tokenizer = open_blocks(tmp_path / "blocks"), load_tokenizer(tmp_path / "blocks/tokenizer")
    pairs = data.validation_prompts(tokenizer, 12, 20, 20)
    assert len(pairs) == 12
    for prompt, following in pairs:
        shown = tokenizer.decode(prompt)
        assert "\ufffd" not in shown
        assert shown in text
        assert shown + tokenizer.decode(following).rstrip("\ufffd") in text
    for position in range(0, 400, 7):
        place = data.locate(position, 9, tokenizer)
        assert place["before"] + place["text"] + place["after"] in text
        assert text[place["char"] :].startswith(place["text"])


def test_prompts_start_after_a_full_stop_of_the_script(script, tmp_path):
    """One paragraph without a space: the sentences are found by their full stops."""
    text = make_text("Chinese", 700).replace("\n", "")
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    flags = ["--input-path", tmp_path / "book.txt", "--train-tokenizer", 500, "--block-size", 32]
    assert script("prepare_data", *flags, "--output-dir", tmp_path / "blocks").code == 0
    data, tokenizer = open_blocks(tmp_path / "blocks"), load_tokenizer(tmp_path / "blocks/tokenizer")
    starts = [text.index(tokenizer.decode(prompt + rest).rstrip("\ufffd"))
              for prompt, rest in data.validation_prompts(tokenizer, 8, 20, 20)]  # fmt: skip
    assert len(starts) == 8
    assert {text[start - 1] for start in starts} <= set("。？！”")


def test_prompts_without_any_full_stop_have_whole_characters(script, tmp_path):
    """Where a prompt may start at any token, it may start within a character."""
    text = "".join(letter for letter in make_text("Chinese", 700) if letter.isalpha())
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    flags = ["--input-path", tmp_path / "book.txt", "--train-tokenizer", 280, "--block-size", 32]
    assert script("prepare_data", *flags, "--output-dir", tmp_path / "blocks").code == 0
    data, tokenizer = open_blocks(tmp_path / "blocks"), load_tokenizer(tmp_path / "blocks/tokenizer")
    pairs = data.validation_prompts(tokenizer, 40, 20, 20)
    assert len(pairs) == 40
    assert all(tokenizer.decode(prompt) in text for prompt, _ in pairs)
    assert len({len(prompt + following) for prompt, following in pairs}) > 1  # some start later


def test_a_character_across_a_cut_stands_in_the_later_piece():
    tokenizer = train_tokenizer(["a"], 257)  # every token is a byte
    ids = tokenizer("a我b")["input_ids"]
    assert [decode_cuts(tokenizer, ids, [0, cut, 5]) for cut in range(6)] == [
        ["", "a我b"], ["a", "我b"], ["a", "我b"], ["a", "我b"], ["a我", "b"], ["a我b", ""],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ing the cut wor", "the cut"),
        ("\ufffd我来了。\n\n你好！他\ufffd", "我来了。\n\n你好！他"),
        ("ing我 来d", "ing我 来d"),
    ],
)
def test_snippets_of_the_quiz_lose_cut_words_only(text, kept):
    assert CUT_WORD.sub("", text) == kept


def test_spaces_and_joiners_of_other_scripts_can_be_printed():
    text = "\t　段　落 क्\u200dया می\u200cروم ไทย\u200bไทย a\u00a0b"
    assert make_printable(text) == text
    assert make_printable("\x1b[31m\u202e\x85\x1c") == "\ufffd[31m\ufffd\ufffd\ufffd"


# All three scripts


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_book_in_its_own_script_from_scratch(language, script, tmp_path):
    folder, config = tmp_path, {"model_type": "gpt2", "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
    (folder / "book.txt").write_text(make_text(language, 1600), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--input-path", folder / "book.txt", "--train-tokenizer", 500, "--block-size", 64]
    assert script("prepare_data", *flags, "--output-dir", folder / "blocks").code == 0
    flags = ["--data-dir", folder / "blocks", "--from-scratch", folder / "config.json", "--learning-rate", "5e-3"]
    flags += ["--max-steps", 150, "--copy-samples", 4, "--output-dir", folder / "model", "--dtype", "fp32"]
    assert script("finetune_generative", *flags).code == 0
    flags = ["--finetuned-model", folder / "model", "--num-validation-prompts", 24, "--max-new-tokens", 48]
    code, out, _ = script("generate_text", *flags)
    assert code == 0
    report = json.loads((folder / "model/report.json").read_text(encoding="utf-8"))
    assert (report["unspaced"], report["other_language"]) == (language in UNSPACED, True)
    assert "cosine_delta" not in report
    assert "style_gain" not in report
    assert report["delta"]["reference"] < report["delta"]["finetuned"] < report["delta"]["base"]
    assert report["unknown_words"]["finetuned"] < report["unknown_words"]["base"]
    assert "The old house" not in out
    rows = [
        json.loads(line)
        for line in (folder / "model/samples.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
    ]
    assert not [row["prompt"] for row in rows if "\ufffd" in row["prompt"]]
    assert all(any(len(row["word"]) == n for row in report["words"]) for n in ((1, 2) if language in UNSPACED else ()))
