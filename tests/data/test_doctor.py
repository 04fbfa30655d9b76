"""The book doctor: planted faults are found and mended, what only looks like a fault is left alone.

    python -m pytest -m slow -s tests/data/test_doctor.py [--books FOLDER]

plants every fault in books of prose, and counts what is found and what mending gives back.
"""

import difflib
import itertools
import random
import re
from pathlib import Path

import pytest
from faults import (
    FOOTERS,
    HEADERS,
    MARKS,
    PLANTS,
    add_licence,
    curl,
    decode_wrongly,
    divide_words,
    number_pages,
    repeat_part,
    wrap,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from utils.data.blocks import open_blocks
from utils.data.doctor import FAULTS, apply_edits, clean, examine
from utils.data.text import read_book
from utils.data.tokenizer import load_tokenizer
from utils.storage import MANIFEST, read_json

NOUNS = ["harbour", "lantern", "captain", "morning", "kitchen", "letter", "garden", "window", "mountain", "sister"]
VERBS = ["remembered", "carried", "followed", "answered", "mended", "counted", "forgot", "promised", "watched", "sold"]
WORDS = ["slowly", "again", "quietly", "together", "before", "dinner", "without", "another", "behind", "everything"]


def phrase(rng, n_words):
    return " ".join(
        f"{rng.choice(('the', 'a', 'his', 'her'))} {rng.choice((NOUNS, VERBS, WORDS)[i % 3])}" for i in range(n_words)
    )


def make_prose(n_paragraphs=160, seed=0):
    """Write paragraphs in one line each, with chapters, speech, an accent and years."""
    rng, paragraphs = random.Random(seed), []
    for i in range(n_paragraphs):
        sentences = [phrase(rng, rng.randint(3, 9)).capitalize() + "." for _ in range(rng.randint(2, 7))]
        if i % 3:
            sentences.insert(0, f'"It\'s {phrase(rng, 3)}," said Zoé, "isn\'t it? In {1800 + i}."')
        paragraphs += [f"CHAPTER {i // 40 + 1}"] * (i % 40 == 0) + [" ".join(sentences)]
    return "\n\n".join(paragraphs) + "\n"


def make_verse(seed=1):
    rng = random.Random(seed)
    stanzas = (
        [f"{phrase(rng, rng.randint(2, 5))}{',' * (line % 2)}".capitalize() for line in range(4)] for _ in range(200)
    )
    return "\n\n".join("\n".join(stanza) for stanza in stanzas) + "\n"


def join_compounds(text):
    """Join words by hyphens, every fifth time with a word that stands nowhere else."""
    words = (f"{second}{chr(97 + i % 26)}{chr(97 + i // 26)}" for i, second in enumerate(NOUNS * 70))
    count = itertools.count()
    return re.sub(
        r"(\w+) (?:her|his) (\w+)", lambda m: f"{m[1]}-{m[2] if next(count) % 5 else next(words, m[2])}", text
    )


PROSE, VERSE = make_prose(), make_verse()
PARAGRAPHS, LINES = PROSE.split("\n\n"), [line for line in VERSE.split("\n") if line]
EVEN = wrap(phrase(random.Random(2), 800), random.Random(2), 50).split("\n")
CONTROLS = {
    "prose": PROSE,
    "verse": VERSE,
    "verse in lower case": VERSE.lower(),
    "play": "\n\n".join(f"{'ADA' if i % 2 else 'BRAM'}:\n{line}" for i, line in enumerate(LINES)),
    "list": "\n".join(f"{i + 1}. {line}" for i, line in enumerate(LINES)),
    "list in lower case": "\n".join(f"- {line.lower()}" for line in LINES),
    "table": "\n".join(f"{line.lower():<70}{i * 37 % 1009:>8}" for i, line in enumerate(LINES)),
    "letters": "".join(
        f"Skerrow, {i} May 1871\n\nMy dear Zoé,\nI have your letter.\n{text}\n\nYours ever,\nTobias Marrack\nKeeper\n\n"
        for i, text in enumerate(PARAGRAPHS)
    ),
    "numbered chapters": "\n\n".join(f"{i + 1}\n\nLETTER {i + 1}\n\n{text}" for i, text in enumerate(PARAGRAPHS[1:60])),
    "years": "\n".join(f"{1700 + i}\n{line}." for i, line in enumerate(LINES)),
    "compounds": wrap(join_compounds(make_prose(300)), random.Random(0), 66),
    "even verse": "\n".join(line.capitalize() if i % 4 else line for i, line in enumerate(EVEN)),
    "a letter in short lines": f"{PROSE}\n" + "\n".join(EVEN[1:28]) + "\n",
    "curly": curl(PROSE) + "It stood 5' 11\" high at 34° 12' 5\", 6' 2\" wide.\n" * 3,
    "refrain": "\n\n".join(f"{text}\n\n{VERSE[:700]}" for text in PARAGRAPHS),
    "French": "« Où est le château ? » demanda Noël. Ça coûte 5 £, à l’œil nu. Âme, Île, Être, ÂÊÎÔÛ.\n\n" * 9,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_is_no_fault_is_not_found(name):
    found = {finding.name: finding.example for finding in examine(CONTROLS[name])}
    assert (name == "compounds") == ("lines" in found)  # this one is wrapped, and its line ends divide compounds
    assert set(found) <= {"lines"}, found


@pytest.mark.parametrize("path", ["results/data/book.txt", "results/data/control.txt"])
def test_the_texts_of_the_project_have_no_faults(path):
    assert examine(read_book(Path(path))[0]) == []
    assert clean(read_book(Path(path))[0], list(FAULTS)) == (read_book(Path(path))[0], {})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plant", PLANTS, ids=" ".join)
def test_a_planted_fault_is_found_and_mended(plant, seed):
    rng, (prepare, spoil, names) = random.Random(seed), PLANTS[plant]
    good = prepare(PROSE, rng) if prepare else PROSE
    bad = spoil(good, rng)
    before = {finding.name for finding in examine(good)}
    found = {finding.name: finding for finding in examine(bad)}
    assert plant[0] in found
    assert not before & {plant[0]}
    assert set(found) - before <= set(names)  # and nothing else
    mended, counts = clean(bad, names)
    assert counts[plant[0]] == found[plant[0]].count
    if plant[0] == "pages":  # where a page ends with a sentence, only blank lines tell whether a paragraph ends too
        assert mended.split() == good.split()
        assert len(set(mended.split("\n\n")) ^ set(good.split("\n\n"))) <= 0.1 * counts["pages"] + 3
    else:
        assert mended == good


def test_all_faults_at_once_are_mended_in_their_order():
    rng = random.Random(5)
    good = make_prose(400, seed=5)
    bad = number_pages(divide_words(repeat_part(good, rng), rng), rng, MARKS[0])
    bad = add_licence(decode_wrongly(bad.replace("isn't", "isn’t", 40), rng), rng)
    # A part that was broken in other places is found only when its lines are whole again.
    assert {finding.name for finding in examine(bad)} == set(FAULTS) - {"duplicates"}
    mended, counts = clean(bad, list(reversed(FAULTS)))  # the order given does not matter
    assert list(counts) == list(FAULTS)
    assert min(counts.values()) > 0
    assert examine(mended) == []
    ratio = difflib.SequenceMatcher(None, good.split("\n\n"), mended.split("\n\n"), autojunk=False).ratio()
    assert ratio > 0.97  # a page that ends with a sentence may end a paragraph or not


def test_a_hyphen_before_the_first_letter_divides_no_word():
    """The character before the first is none, and not the last."""
    mended, counts = clean("-\nfoo for-\nget, re-\nmember, har-\nbour end", ["hyphens"])
    assert (mended, counts) == ("-\nfoo\nforget,\nremember,\nharbour end", {"hyphens": 3})


def test_a_hyphen_that_belongs_to_the_word_is_kept():
    text = ("He said that the well-known doornail was a thing of beauty to behold.\n" * 3) + (
        "They met a well-\nknown man, who des-\ncribed the door-\nnail to a sis-\nter-in-law of remark-\nable wit.\n"
    )
    mended, counts = clean(text, ["hyphens"])
    assert counts == {"hyphens": 4}
    assert mended.endswith(
        "They met a well-\nknown man, who\ndescribed the\ndoornail to a\nsister-in-law of\nremarkable wit.\n"
    )


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("line one\n\n{n}\n\nand so it went", "line one and so it went"),
        ("It ended.\n\n{n}\n\nThen it began", "It ended.\n\nThen it began"),
        ("It ended.\n\n{n}\n\n\n\nThen it began", "It ended.\n\n\n\nThen it began"),
        ("the name of\n\n{n}\n\nThe Title of It\n\nhis old ship", "the name of his old ship"),
        ("a divi-\n\n{n}\n\nded word", "a divi-\nded word"),
    ],
)
def test_what_a_page_number_interrupts_is_joined(text, mended):
    pages = [text.format(n=n) if n % 2 else f"some words\n\n{n}\n\nof more" for n in range(1, 21)]
    found = clean("\n\n".join(pages), ["pages"])[0]
    assert found == "\n\n".join(mended if n % 2 else "some words of more" for n in range(1, 21))


def test_a_chapter_heading_that_looks_like_a_running_head_stays():
    text = "1 THE ARRIVAL\n\n" + number_pages(
        wrap(PROSE, random.Random(0)), random.Random(0), "THE NAME OF THE BOOK {n}"
    )
    text = text.replace("CHAPTER 2", "2 THE SECOND").replace("\n\nTHE NAME OF THE BOOK 1\n\n", "\n")  # pages from 2 on
    mended, _ = clean(text, ["pages"])
    assert mended.startswith("1 THE ARRIVAL\n\nCHAPTER 1\n")
    assert "\n2 THE SECOND\n" in mended
    assert "NAME OF THE BOOK" not in mended


def test_books_joined_in_one_file_lose_every_licence():
    parts = [make_prose(20, seed) for seed in range(3)]
    books = [HEADERS[i].format("A BOOK") + part + FOOTERS[i].format("A BOOK") for i, part in enumerate(parts)]
    mended, counts = clean("".join(books), ["gutenberg"])
    assert mended == "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    assert counts["gutenberg"] == 4
    long = make_prose(250)
    assert len(long) > 40_000
    mended, _ = clean(books[0] + "The second book\n\n" + long, ["gutenberg"])  # nothing marks where it starts
    assert mended.endswith("The second book\n\n" + long)


def test_quotation_marks_follow_the_larger_number():
    straight, curly = "\"Yes,\" it's 'so'.\n" * 3, "“Yes,” it’s ‘so’.\n" * 3
    assert clean(straight * 2 + curly, ["quotes"])[0] == straight * 3
    assert clean(curly * 2 + straight, ["quotes"])[0] == curly * 3
    tis = "’Tis “fine” – ‘I said’ (“ah”).\n" * 5
    assert clean(tis + '\'Tis "fine" – \'I said\' ("ah"). 6\' 2"\n', ["quotes"])[0] == (
        tis + "’Tis “fine” – ‘I said’ (“ah”). 6' 2\"\n"
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*MARKS[1:4], "\n", "\n\n", "- ", "word", "long-\ner", "“", '"', "Ã©", "*** END OF THE "
                "PROJECT GUTENBERG", "x" * 60, "Y z. " * 300, " "]) | st.text(max_size=6), max_size=80))  # fmt: skip
def test_edits_are_in_order_inside_any_text_and_apart(pieces):
    text = "".join(pieces)
    for find, *_ in FAULTS.values():
        edits = find(text)
        position = 0
        for start, end, _ in edits:
            assert position <= start <= end <= len(text)
            position = end
        assert (apply_edits(text, edits) == text) == (not edits)
    assert clean(text, [])[0] == text


# The script


@pytest.fixture
def prepare(script, tiny_model, tmp_path):
    """Run prepare_data.py on the text files of tmp_path / 'in': prepare('--flag', value) -> code, out, err."""
    (tmp_path / "in").mkdir()
    flags = ["--input-path", tmp_path / "in", "--model-name", tiny_model, "--output-dir", tmp_path / "out"]
    return lambda *more: script("prepare_data", *flags, "--block-size", 32, *more)


def text_of(folder):
    """Return the text of the training blocks."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    return tokenizer.decode(open_blocks(folder).train[:]["input_ids"].flatten().tolist())


def fault_lines(out):
    return dict(line.strip().split("  ", 1) for line in out.split("\n\n")[0].splitlines()[1:])


def test_a_book_is_changed_only_on_request_and_the_manifest_says_how(prepare, tmp_path):
    good = wrap(PROSE, random.Random(2))
    (tmp_path / "in/book.txt").write_text(add_licence(good, random.Random(3)), encoding="utf-8")
    code, out, _ = prepare("--val-split", 0)
    assert code == 0
    found = fault_lines(out)
    assert set(found) == {"gutenberg", "lines"}
    assert re.search(
        r"2 headers, footers or licences .*: .* -> .*; --clean gutenberg removes them$", found["gutenberg"]
    )
    assert re.search(r"^ *\d{3} lines broken at a fixed width: .*\\n.* -> .*; --clean lines joins", found["lines"])
    assert "PROJECT GUTENBERG" in text_of(tmp_path / "out")
    assert read_json(tmp_path / "out" / MANIFEST)["books"][0]["cleaned"] == {}

    code, _, err = prepare("--val-split", 0, "--clean", "gutenberg")
    assert code == 2
    assert "was prepared without --clean, now gutenberg; use another or --overwrite" in err
    code, out, _ = prepare("--val-split", 0, "--clean", "gutenberg", "--overwrite")
    assert fault_lines(out)["gutenberg"].strip() == "mended: 2 headers, footers or licences of Project Gutenberg"
    assert "--clean lines" in out
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert manifest["settings"]["clean"] == "gutenberg"
    assert manifest["books"][0]["cleaned"] == {"gutenberg": 2}
    assert manifest["books"][0]["chars"] == manifest["splits"]["train"]["chars"] == len(good)
    assert manifest["spans"][-1]["chars"][1] == len(good)
    kept = text_of(tmp_path / "out")
    assert len(kept) > 0.99 * len(good)
    assert good.startswith(kept)
    assert "up to date" in prepare("--val-split", 0, "--clean", "gutenberg").out

    assert "--clean gutenberg, now gutenberg,lines;" in prepare("--val-split", 0, "--clean", "lines,gutenberg").err
    assert prepare("--val-split", 0, "--clean", "lines,gutenberg", "--overwrite").code == 0
    assert PROSE.startswith(text_of(tmp_path / "out"))
    assert "up to date" in prepare("--val-split", 0, "--clean", "gutenberg,lines").out


def test_faults_are_counted_over_all_books_and_validation_is_cleaned_too(prepare, tmp_path):
    texts = {f"{name}.txt": make_prose(120, seed) for seed, name in enumerate("abc")}
    for name, text in texts.items():
        bad = text if name == "a.txt" else wrap(text, random.Random(1))
        (tmp_path / "in" / name).write_text(bad, encoding="utf-8")
    out = prepare().out
    assert re.search(r"lines broken at a fixed width in 2 of 3 books, first b\.txt: ", fault_lines(out)["lines"])
    code, out, _ = prepare("--overwrite", "--clean", "all")
    assert code == 0
    assert fault_lines(out)["lines"].endswith("lines broken at a fixed width in 2 of 3 books")
    manifest = read_json(tmp_path / "out" / MANIFEST)
    assert [set(book["cleaned"]) for book in manifest["books"]] == [set(), {"lines"}, {"lines"}]
    assert [book["chars"] for book in manifest["books"]] == [len(text) for text in texts.values()]
    split_chars = [manifest["splits"][split]["chars"] for split in ("train", "validation")]
    assert sum(split_chars) == sum(len(text) for text in texts.values())
    for span in manifest["spans"]:
        assert span["chars"][1] <= manifest["books"][span["book"]]["chars"]


def test_a_good_book_is_said_to_be_good(prepare, tmp_path):
    (tmp_path / "in/book.txt").write_text(PROSE, encoding="utf-8")
    code, out, _ = prepare("--clean", "all")
    assert code == 0
    assert out.startswith("faults of the text\n  none  found\n")
    assert read_json(tmp_path / "out" / MANIFEST)["books"][0]["cleaned"] == {}


@pytest.mark.parametrize("value", ["typos", "lines,typos", "", "lines,", "Lines", "lines quotes"])
def test_an_unknown_fault_is_refused(prepare, tmp_path, value):
    (tmp_path / "in/book.txt").write_text(PROSE, encoding="utf-8")
    code, _, err = prepare("--clean", value)
    assert code == 2
    assert re.match(r"error: --clean: '.*' is unknown; use all, or some of mojibake,gutenberg,.*,duplicates\n", err)


def test_a_book_that_is_all_licence_is_refused(prepare, tmp_path):
    (tmp_path / "in/book.txt").write_text(add_licence("\n", random.Random(0)), encoding="utf-8")
    code, _, err = prepare("--clean", "gutenberg,lines")
    assert code == 2
    assert "book.txt has no text left after --clean gutenberg; leave it out" in err
    assert not (tmp_path / "out").exists()


def test_the_flag_knows_every_fault():
    assert list(FAULTS) == list(prepare_data.CLEAN)


# Many books


def spread(items, count):
    """Return some items, evenly spread."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


@pytest.mark.slow
def test_faults_planted_in_many_books(request):
    folder = request.config.getoption("--books")
    paths = sorted(Path(folder).glob("*.txt")) if folder else [Path("results/data/book.txt")]
    books = {path: read_book(path)[0] for path in paths}
    # Prose in paragraphs of one line, with speech; a double space at a line's end could not come back.
    books = {path: re.sub(r" +(?=\n)", "", re.sub(r"(?<=\S)  +", " ", text)) for path, text in books.items()}

    def is_prose(text):
        return len(re.findall(r"[^\n]\n(?=[^\n])", text)) < 0.01 * text.count("\n") and text.count('"') > 100

    good = spread([text for text in books.values() if is_prose(text) and not examine(text)], 20)
    print(f"\nfaults planted in {len(good)} of {len(books)} books\n")
    print("| planted fault | found | given back byte for byte | places that differ |")
    print("|---|---:|---:|---:|")
    for (fault, way), (prepare, spoil, names) in PLANTS.items():
        n_found = n_same = n_places = n_differ = 0
        for i, text in enumerate(good):
            rng = random.Random(i)
            text = prepare(text, rng) if prepare else text
            bad = spoil(text, rng)
            n_found += fault in {finding.name for finding in examine(bad)}
            mended, counts = clean(bad, names)
            n_same += mended == text
            n_places += counts.get(fault, 0)
            if mended != text:
                pieces = text.split("\n"), mended.split("\n")
                matcher = difflib.SequenceMatcher(None, *pieces)
                n_differ += sum(tag != "equal" for tag, *_ in matcher.get_opcodes())
        print(f"| {fault}, {way} | {n_found} of {len(good)} | {n_same} | {n_differ / max(1, n_places):.2%} |")
        assert n_found >= 0.95 * len(good)
        assert n_differ <= 0.1 * n_places
