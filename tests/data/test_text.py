"""Books: reading changes nothing but line ends, and the split covers every character once."""

import hashlib
import itertools
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.text import (
    LETTER,
    MAY_BE_UNSPACED,
    choose_validation_spans,
    find_books,
    find_cuts,
    read_book,
    split_book,
)
from utils.errors import UserError

SAMPLE = Path("results/data/book.txt")
# Every level of structure, and none: blank lines, lines, sentences, words, a wall of letters.
PIECE = st.sampled_from(["\n\n", "\n \t\n", "\n", ". ", "! ", " ", "word", "x", "\n\n    ", "caf\u00e9", "\U0001f44b"])
TEXT = st.lists(PIECE | st.text(max_size=8), max_size=60).map("".join)


def split_books(texts, val_split, seed):
    """Split several books as prepare_data.py does; segments by book."""
    spans = choose_validation_spans(sum(map(len, texts)), val_split, seed)
    offset, found = 0, []
    for index, text in enumerate(texts):
        found.append(list(split_book(text, index, offset, spans)))
        offset += len(text)
    return found


def validation_of(text, val_split=0.1, seed=42):
    [segments] = split_books([text], val_split, seed)
    return [p for p in segments if p.split == "validation"]


def check_cover(texts, found):
    """Each character stands in exactly one segment, in order."""
    for index, (text, segments) in enumerate(zip(texts, found, strict=True)):
        assert "".join(p.text for p in segments) == text
        position = 0
        for p in segments:
            assert (p.book_index, p.start, p.text) == (index, position, text[p.start : p.end])
            assert p.end > p.start
            position = p.end
        assert position == len(text)


@pytest.fixture(scope="module")
def sample():
    return read_book(SAMPLE)[0]


# Reading


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"One.\r\nTwo.\r\n\r\nThree.\r\n", "One.\nTwo.\n\nThree.\n"),
        (b"One.\rTwo.\r\rThree.", "One.\nTwo.\n\nThree."),
        (b"\r\n\r \n\rx", "\n\n \n\nx"),
        (b"\xef\xbb\xbfMark.\r\n", "Mark.\n"),
        (b"\xef\xbb\xbf\xef\xbb\xbfTwo marks", "\ufeffTwo marks"),
        (
            "  caf\u00e9 \ufeff e\u0301\u00a0\t\x0b\x0c\u2028\u0085 \n ".encode(),
            "  caf\u00e9 \ufeff e\u0301\u00a0\t\x0b\x0c\u2028\u0085 \n ",
        ),
    ],
    ids=["CRLF", "CR", "mixed", "mark", "two marks", "nothing else changes"],
)
def test_reading_changes_the_mark_and_line_ends_only(tmp_path, raw, text):
    path = tmp_path / "book.txt"
    path.write_bytes(raw)
    found, book = read_book(path)
    assert found == text
    assert book.sha256 == hashlib.sha256(raw).hexdigest()
    assert (book.n_chars, book.n_bytes, book.n_words) == (len(text), len(text.encode()), len(text.split()))


def test_another_encoding_on_request(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("caf\u00e9\r\n".encode("latin-1"))
    with pytest.raises(UserError, match="byte 0xe9 at offset 3"):
        read_book(path)
    text, book = read_book(path, "latin-1")
    assert (text, book.n_bytes) == ("caf\u00e9\n", 6)


def test_folders_are_expanded_and_sorted(tmp_path):
    for name in ["b.txt", "a.md", "sub/c.TXT", "notes.pdf", "d.txt.gz", "z.txt"]:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "in" / "folder.txt").mkdir()
    (tmp_path / "last.rst").write_text("x")
    files = [tmp_path / "last.rst", tmp_path / "in" / "z.txt"]
    names = [p.name for p in find_books([files[0], tmp_path / "in", files[1]])]
    assert names == ["last.rst", "a.md", "b.txt", "c.TXT", "z.txt"]  # z.txt once, where it came first
    assert [p.name for p in find_books([files[1], tmp_path / "in"])] == ["z.txt", "a.md", "b.txt", "c.TXT"]


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(UserError, match=r"is a directory without \.txt or \.md files"):
        find_books([tmp_path])


def test_a_loop_of_links_is_left_for_read_book_to_explain(tmp_path):
    loop, other = tmp_path / "loop.txt", tmp_path / "other.txt"
    os.symlink(loop, loop)
    other.write_text("x")
    assert find_books([loop, other]) == [loop, other]
    with pytest.raises(UserError, match="too many levels of symbolic links"):
        read_book(loop)


# Splitting


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(TEXT.filter(str.strip), min_size=1, max_size=4),
    val_split=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_character_stands_in_exactly_one_segment(texts, val_split, seed):
    found = split_books(texts, val_split, seed)
    check_cover(texts, found)
    for segments in found:
        assert val_split > 0 or [p.split for p in segments] == ["train"]


@settings(max_examples=100, deadline=None)
@given(n_chars=st.integers(0, 10**8), val_split=st.floats(0, 0.999), seed=st.integers(0, 2**32 - 1))
def test_chosen_spans_are_in_order_inside_and_apart(n_chars, val_split, seed):
    spans = choose_validation_spans(n_chars, val_split, seed)
    ends = [position for span in spans for position in span]
    assert ends == sorted(ends)
    assert not ends or (ends[0] >= 0 and ends[-1] <= n_chars)
    assert sum(b - a for a, b in spans) == pytest.approx(val_split * n_chars, abs=len(spans) + 1)
    assert not spans or len(spans) >= 3
    third = n_chars / 3
    if val_split * n_chars >= 3:
        for part in range(3):
            assert any(a < third * (part + 1) and b > third * part for a, b in spans)


def test_the_note_tells_how_many_segments_there_are(sample):
    note = " ".join(Path("notes/01_dataset_prep.md").read_text(encoding="utf-8").split())
    counts = [len(choose_validation_spans(n_chars, 0.1, 42)) for n_chars in (len(sample), 1_000_000)]
    assert "{} for *A Christmas Carol*, {} for a book of a megabyte".format(*counts) in note


@pytest.mark.parametrize("val_split", [0.02, 0.1, 0.3])
def test_the_size_is_that_asked_for_up_to_one_paragraph_per_segment(sample, val_split):
    longest = max(map(len, sample.split("\n\n"))) + 2
    for seed in range(10):
        segments = validation_of(sample, val_split, seed)
        missed = sum(len(p.text) for p in segments) - val_split * len(sample)
        assert abs(missed) <= longest * len(segments)


def test_each_third_has_a_segment_however_many_there_are():
    for n_chars in range(10_000, 300_000, 5_000):
        for seed in range(20):
            middles = [(a + b) / 2 / n_chars for a, b in choose_validation_spans(n_chars, 0.1, seed)]
            assert {int(3 * position) for position in middles} == {0, 1, 2}


@pytest.mark.parametrize("val_split", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_validation_of_the_sample_book_stands_for_the_whole_book(sample, val_split, seed):
    [segments] = found = split_books([sample], val_split, seed)
    check_cover([sample], found)
    splits = [p.split for p in segments]
    assert all(a != b for a, b in itertools.pairwise(splits))
    validation = [p for p in segments if p.split == "validation"]
    assert len(validation) >= 3
    assert {min(2, 3 * p.start // len(sample)) for p in validation} == {0, 1, 2}  # each third has one
    size = sum(len(p.text) for p in validation)
    assert size == pytest.approx(val_split * len(sample), rel=0.3)


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_cut_at_paragraph_ends(sample, seed):
    [segments] = split_books([sample], 0.1, seed)
    for p in segments[1:]:
        assert sample[p.start - 2 : p.start] == "\n\n"
        assert not sample[p.start].isspace()


def test_the_share_is_kept_over_several_books(sample):
    third = len(sample) // 3
    texts = [sample[:third], sample[third : 2 * third], sample[2 * third :]]
    found = split_books(texts, 0.1, 1)
    check_cover(texts, found)
    validation = [p for segments in found for p in segments if p.split == "validation"]
    assert {p.book_index for p in validation} == {0, 1, 2}
    assert sum(len(p.text) for p in validation) == pytest.approx(0.1 * len(sample), rel=0.3)


def test_a_span_across_two_books_is_kept_in_both():
    found = [list(split_book("x" * 100, index, 100 * index, [(90, 130), (150, 160)])) for index in (0, 1)]
    check_cover(["x" * 100] * 2, found)
    validation = [[(p.start, p.end) for p in segments if p.split == "validation"] for segments in found]
    assert validation == [[(90, 100)], [(0, 30), (50, 60)]]


def test_overlapping_spans_still_cover_each_character_once():
    found = list(split_book("x" * 100, 0, 0, [(10, 50), (49, 80), (60, 70)]))
    check_cover(["x" * 100], [found])
    assert [(p.start, p.end) for p in found if p.split == "validation"] == [(10, 50), (50, 80)]


def test_the_indent_of_a_paragraph_stays_with_it():
    text = "Some words.\n\n    Indented one.\n \t\n\n\tTabbed one.\n\nPlain." * 50
    starts = [text[cut : cut + 12] for cut in find_cuts(text, 100)[1:-1]]
    assert {"    Indented", "\tTabbed one.", "Plain.Some w", "Plain."} == set(starts)


def test_a_book_without_paragraphs_is_cut_at_the_next_best_position():
    lines = "One line of verse\n" * 2_000
    sentences = "One sentence of it. " * 2_000
    words = "word " * 8_000
    letters = "x" * 40_000
    for text, before in ((lines, "\n"), (sentences, ". "), (words, " "), (letters, "x")):
        validation = validation_of(text)
        assert len(validation) >= 3
        assert sum(len(p.text) for p in validation) == pytest.approx(0.1 * len(text), rel=0.05)
        assert all(text[: p.start].endswith(before) and text[: p.end].endswith(before) for p in validation)


def test_the_seed_alone_chooses_the_places(sample):
    places = {seed: [(p.start, p.end) for p in validation_of(sample, seed=seed)] for seed in range(6)}
    assert [(p.start, p.end) for p in validation_of(sample, seed=3)] == places[3]
    assert len({tuple(found) for found in places.values()}) == 6
    assert (
        choose_validation_spans(10_000, 0.1, 7)
        == choose_validation_spans(10_000, 0.1, 7)
        != choose_validation_spans(10_000, 0.1, 8)
    )


def test_the_quick_search_for_letters_without_spaces_misses_none():
    letters = [chr(code) for code in range(sys.maxunicode + 1) if LETTER.match(chr(code))]
    assert len(letters) > 90_000
    assert all(map(MAY_BE_UNSPACED.match, letters))
