"""Books in other formats become paragraphs and chapters; what is not a book is refused, and nothing is fetched."""

import contextlib
import hashlib
import http.server
import importlib.util
import io
import itertools
import random
import shutil
import threading
import tracemalloc
import zipfile

import pytest
from conftest import make_book
from counts import record_count

from utils.data import formats
from utils.data.blocks import open_blocks
from utils.data.corpus import read_segments
from utils.data.formats import CHAPTER_MARK, convert_book, take_chapters
from utils.data.text import Book, choose_chapters, read_book
from utils.data.tokenizer import load_tokenizer
from utils.errors import UserError
from utils.storage import MANIFEST, hash_file, read_json

PAGE = '<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"><body>{}</body></html>'
WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def pack(files, **options):
    """Return a zip archive of {name: text}."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def list_epub(*bodies):
    """Return the files of an EPUB: a table of contents and one file per body."""
    names = [f"c{number}.xhtml" for number in range(len(bodies))]
    links = "".join(f'<li><a href="{name}">Chapter {name}</a></li>' for name in names)
    items = "".join(f'<item id="{n}" href="{n}" media-type="application/xhtml+xml"/>' for n in ("nav.xhtml", *names))
    refs = "".join(f'<itemref idref="{name}"/>' for name in ("nav.xhtml", *names))
    return {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="b/c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        "b/c.opf": '<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/>'
        f"<manifest>{items}</manifest><spine>{refs}</spine></package>",
        "b/nav.xhtml": PAGE.format(f'<nav epub:type="toc"><h1>Contents</h1><ol>{links}</ol></nav>'),
    } | {f"b/{name}": PAGE.format(body) for name, body in zip(names, bodies, strict=True)}


def list_docx(*paragraphs):
    """Return the files of a Word document of (style, text); a text of None is an empty paragraph."""
    styles = "".join(f'<w:style w:type="paragraph" w:styleId="H{n}"><w:name w:val="heading {n}"/></w:style>'
                     for n in (1, 2))  # fmt: skip
    body = "".join(
        f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr>'
        + ("" if text is None else f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>')
        + "</w:p>"
        for style, text in paragraphs
    )
    relation = '<Relationship Id="r{}" Type="' + OFFICE + '/{}" Target="{}"/>'
    relations = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{}</Relationships>'
    return {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types"/>',
        "_rels/.rels": relations.format(relation.format(1, "officeDocument", "word/document.xml")),
        "word/_rels/document.xml.rels": relations.format(relation.format(1, "styles", "styles.xml")),
        "word/styles.xml": f'<w:styles xmlns:w="{WORD}">{styles}</w:styles>',
        "word/document.xml": f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>',
    }


def convert(raw, suffix):
    return convert_book(raw.encode() if isinstance(raw, str) else raw, suffix, "book")


def split_chapters(raw, suffix):
    """Return the text of each chapter."""
    text, starts = take_chapters(convert(raw, suffix))
    return [text[a:b] for a, b in itertools.pairwise([*starts, len(text)])] or [text]


def write_chapters(count, n_paragraphs=12):
    """Return (heading, paragraphs) of chapters of one length."""
    paragraphs = make_book(count * n_paragraphs).strip().split("\n\n")
    return [(f"Chapter {i + 1}", paragraphs[i * n_paragraphs : (i + 1) * n_paragraphs]) for i in range(count)]


def format_html(chapters):
    return "".join(f"<h2>{head}</h2>" + "".join(f"<p>{p}</p>" for p in body) for head, body in chapters)


def make_files(chapters):
    """Return the bytes of the same book by ending."""
    bodies = [format_html([chapter]) for chapter in chapters]
    paragraphs = [pair for head, body in chapters for pair in [("H1", head), *(("", text) for text in body)]]
    return {
        ".epub": pack(list_epub(*bodies)),
        ".docx": pack(list_docx(*paragraphs)),
        ".html": PAGE.format("".join(bodies)).encode(),
    }


@pytest.fixture
def prepare(script, tiny_model, tmp_path):
    """Prepare a file of the given content: prepare('book.epub', raw, *flags) -> code, out, err."""

    def run_prepare(name, raw, *flags):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        flags = ["--model-name", tiny_model, "--block-size", 16, *flags]
        return script("prepare_data", "--input-path", path, "--output-dir", tmp_path / f"{name}.blocks", *flags)

    return run_prepare


# Text and chapters


def test_prose_is_kept_and_the_rest_is_left_out():
    first = """<h2>Chapter <i>One</i></h2>
        <p>It was <b>a</b> dark &amp; \u201cstormy\u201d<sup><a href="#n1" epub:type="noteref">1</a></sup>
        night.<a href="#n2">[2]</a></p><p>A verse<br/> in two lines</p><hr/>
        <p><span class="pagenum">[Pg 5]</span>Af\u00adter <img alt="A picture" src="x.png"/>it.</p><p>* * *</p>
        <p><a id="page7"></a></p><p><img alt="x" src="y.png"/></p><p>Third.</p><p>&#160;</p><p>Fourth.</p>
        <aside epub:type="footnote" id="n1"><p>The first note.</p></aside>
        <div class="footnotes"><p id="n2">The second note.</p></div>"""
    second = """<h2><a href="nav.xhtml">Chapter Two</a></h2><blockquote><p>A letter.</p></blockquote>
        <p><ruby>\u6f22<rp>(</rp><rt>\u304b\u3093</rt><rp>)</rp></ruby> is a letter.</p>
        <p><img alt="I" src="i.png"/>t ends.</p><p><a href="c0.xhtml">Back</a> | <a href="nav.xhtml">Up</a></p>
        <script>steal()</script><iframe src="x.html"></iframe>"""
    expected = [
        "Chapter One\n\nIt was a dark & \u201cstormy\u201d night.\n\nA verse\nin two lines\n\n* * *\n\nAfter it.\n\n"
        "* * *\n\nThird.\n\n\nFourth.\n\n",
        "Chapter Two\n\nA letter.\n\n\u6f22 is a letter.\n\nIt ends.\n",
    ]
    assert split_chapters(pack(list_epub(first, second)), ".epub") == expected


def test_the_terms_of_a_definition_list_stand_before_their_definitions():
    page = """<p>Before.</p><dl><dt>Jib, <i>n.</i></dt><dd>A sail.</dd><dd><p>Of a crane.</p><p>An arm.</p></dd>
        <dt>Keel</dt><dt>Bilge</dt><dd>Below.</dd></dl><dl><dd>Without a term.</dd></dl><p>After.</p>"""
    expected = "Before.|Jib, n.|A sail.|Of a crane.|An arm.|Keel\nBilge|Below.|Without a term.|After."
    assert split_chapters(PAGE.format(page), ".html") == [expected.replace("|", "\n\n") + "\n"]


def test_a_word_document():
    empty = [("", None)] * 2
    found = split_chapters(
        pack(list_docx(("H1", "One"), ("", "It began. "), *empty, ("", "A new scene."), ("", "It went on."),
                       ("", "And ended."), ("H1", "Two"), *empty, ("H2", "Part"), ("", "More &amp; more."))), ".docx"
    )  # fmt: skip
    assert found == ["One\n\nIt began.\n\n\nA new scene.\n\nIt went on.\n\nAnd ended.\n\n",
                     "Two\n\nPart\n\nMore & more.\n"]  # fmt: skip
    spaced = [part for number in range(6) for part in (("", f"Paragraph {number}."), ("", None))]
    assert convert(pack(list_docx(*spaced)), ".docx") == "\n\n".join(text for _, text in spaced if text) + "\n"


def test_rich_text():
    raw = r"{\rtf1\ansi{\stylesheet{\s1 heading 1;}}\pard\s1\outlinelevel0 One\par\pard\plain It \i was\i0\rquote s " \
          r"caf\u233\'e9{\footnote A note}.\par * * *\par End.\par}"  # fmt: skip
    assert convert(raw, ".rtf") == "One\n\nIt was\u2019s caf\u00e9.\n\n* * *\n\nEnd.\n"


def test_a_table_of_contents_is_left_out_with_its_title():
    entries = "".join(f'<li><a href="#c{i}">Chapter {i}</a> {i * 10}</li>' for i in range(3))
    found = convert(f"<p>Before.</p><h2>Contents</h2><ul>{entries}</ul><h2>Chapter 0</h2><p>Text.</p>", ".html")
    assert found == f"Before.\n\n{CHAPTER_MARK}Chapter 0\n\nText.\n"
    found = convert('<h2>Chapter 0</h2><p><a href="#c1">Next chapter</a></p><p>Text.</p>', ".html")
    assert found == "Chapter 0\n\nText.\n"  # a single link takes no title with it


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<h1>Book</h1><h2>A</h2><p>a</p><h2>B</h2><p>b</p><h2>C</h2><h3>x</h3><p>c</p><h3>y</h3><p>d</p>",
         ["Book\n\nA\n\na\n\n", "B\n\nb\n\n", "C\n\nx\n\nc\n\ny\n\nd\n"]),
        ("<h1>A</h1><p>a</p><h1>B</h1><p>b</p><h1>C</h1><p>c</p><h2>x</h2><p>d</p>",
         ["A\n\na\n\n", "B\n\nb\n\n", "C\n\nc\n\nx\n\nd\n"]),
        ("<p>No heading.</p><p>At all.</p>", ["No heading.\n\nAt all.\n"]),
    ],
    ids=["the level with three headings", "the first level", "none"],
)  # fmt: skip
def test_chapters_start_at_headings(page, expected):
    assert split_chapters(page, ".html") == expected


def test_marks_may_stand_anywhere():
    mark = CHAPTER_MARK
    assert take_chapters(f"{mark}One.{mark}{mark}Two.{mark}") == ("One.Two.", (0, 4))
    assert take_chapters("One.") == ("One.", ())
    assert take_chapters("") == ("", ())


def test_the_three_formats_give_the_same_book():
    chapters = write_chapters(4)
    expected = ["\n\n".join([head, *body]) for head, body in chapters]
    for suffix, raw in make_files(chapters).items():
        assert [text.strip("\n") for text in split_chapters(raw, suffix)] == expected, suffix


def test_the_checksum_is_that_of_the_file(tmp_path):
    for suffix, raw in make_files(write_chapters(4)).items():
        path = tmp_path / f"book{suffix}"
        path.write_bytes(raw)
        text, book = read_book(path)
        assert book.sha256 == hashlib.sha256(raw).hexdigest()
        assert (book.n_chars, book.n_words, len(book.chapters)) == (len(text), len(text.split()), 4)
        assert CHAPTER_MARK not in text


def test_the_same_bytes_under_another_ending_are_another_book(script, tmp_path, tiny_model):
    (tmp_path / "w.txt").write_bytes(make_files(write_chapters(4))[".html"])
    shutil.copy(tmp_path / "w.txt", tmp_path / "w.html")
    flags = ["--model-name", tiny_model, "--block-size", 16, "--output-dir", tmp_path / "blocks"]
    assert script("prepare_data", "--input-path", tmp_path / "w.txt", *flags).code == 0
    assert read_json(tmp_path / "blocks" / MANIFEST)["settings"]["books"] == [hash_file(tmp_path / "w.txt")]
    code, _, err = script("prepare_data", "--input-path", tmp_path / "w.html", *flags)
    assert (code, "was prepared with other text; use another or --overwrite" in err) == (2, True)
    assert script("prepare_data", "--input-path", tmp_path / "w.html", *flags, "--overwrite").code == 0
    assert "up to date" in script("prepare_data", "--input-path", tmp_path / "w.html", *flags).out


def test_an_encoding_is_that_of_the_page(tmp_path):
    path = tmp_path / "book.html"
    path.write_bytes("<p>caf\u00e9</p>".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8: byte 0xe9"):
        read_book(path)
    assert read_book(path, "latin-1")[0] == "caf\u00e9\n"


# Splitting


def check_segments(segments, text, chapters):
    """Every character stands in one segment, and no chapter starts inside of one."""
    assert "".join(segment.text for segment in segments) == text
    for segment in segments:
        assert not [start for start in chapters if segment.start < start < segment.end]


@pytest.mark.parametrize("suffix", [".epub", ".docx", ".html"])
def test_whole_chapters_are_chosen_where_there_are_enough(prepare, tmp_path, suffix):
    code, out, _ = prepare(f"book{suffix}", make_files(write_chapters(40))[suffix], "--seed", 3)
    assert code == 0
    assert "40; 4 whole ones, spread over the book, are validation text" in out
    text, book = read_book(tmp_path / "in" / f"book{suffix}")
    manifest = read_json(tmp_path / f"book{suffix}.blocks" / MANIFEST)
    assert manifest["chapters"] == {"count": 40, "whole": 4}
    chosen = [span["chars"] for span in manifest["spans"] if span["split"] == "validation"]
    numbers = [book.chapters.index(start) for start, _ in chosen]
    assert [end for _, end in chosen] == [[*book.chapters, len(text)][number + 1] for number in numbers]
    assert [number // 10 for number in numbers] == [0, 1, 2, 3]
    assert sum(b - a for a, b in chosen) == pytest.approx(0.1 * len(text), rel=0.1)
    check_segments(list(read_segments([book], "utf-8", 0.1, 3)), text, book.chapters)
    blocks = open_blocks(tmp_path / f"book{suffix}.blocks")
    tokenizer = load_tokenizer(tmp_path / f"book{suffix}.blocks/tokenizer")
    for (start, end), ids in zip(chosen, blocks.segments("validation"), strict=True):
        assert text[start:end].startswith(tokenizer.decode(ids))


@pytest.mark.parametrize("seed", range(4))
def test_few_chapters_are_cut_at_paragraph_ends(prepare, tmp_path, seed):
    code, out, _ = prepare("book.epub", make_files(write_chapters(8, 60))[".epub"], "--seed", seed)
    assert code == 0
    assert "8; segments are cut at paragraph ends within them" in out
    text, book = read_book(tmp_path / "in/book.epub")
    segments = list(read_segments([book], "utf-8", 0.1, seed))
    check_segments(segments, text, book.chapters)
    assert all(text[: segment.start].endswith("\n\n") for segment in segments[1:])
    validation = [segment for segment in segments if segment.split == "validation"]
    assert sum(len(segment.text) for segment in validation) == pytest.approx(0.1 * len(text), rel=0.3)
    assert len({segment.start // (len(text) // 3) for segment in validation}) >= 3


def test_without_validation_each_chapter_is_one_segment(prepare, tmp_path):
    code, out, _ = prepare("book.html", make_files(write_chapters(6))[".html"], "--val-split", 0)
    assert (code, "  6; each is one segment\n" in out) == (0, True)
    assert len(read_json(tmp_path / "book.html.blocks" / MANIFEST)["spans"]) == 6


def test_uneven_chapters_are_not_chosen_whole(tmp_path):
    """One chapter is nine tenths of the book: no selection of whole ones is near a tenth."""
    sizes = [100] * 20 + [50_000] + [100] * 20
    starts = tuple(sum(sizes[:number]) for number in range(len(sizes)))
    book = Book(tmp_path, "", sum(sizes), 0, 0, chapters=starts)
    assert choose_chapters([book], 0.1, 0) == []
    assert len(choose_chapters([Book(tmp_path, "", 4_000, 0, 0, chapters=tuple(range(0, 4_000, 100)))], 0.1, 0)) == 4
    plain = Book(tmp_path, "", 4_000, 0, 0)
    assert choose_chapters([plain, book], 0.1, 0) == []


def test_a_file_for_validation_is_cut_at_its_chapters_too(prepare, tmp_path):
    raw = make_files(write_chapters(6))[".html"]
    (tmp_path / "other.html").write_bytes(raw)
    code, out, _ = prepare("book.html", raw[:-50] + b"x", "--val-path", tmp_path / "other.html")
    assert (code, "  12; each is one segment\n" in out) == (0, True)
    spans = read_json(tmp_path / "book.html.blocks" / MANIFEST)["spans"]
    assert [(span["book"], span["split"]) for span in spans] == [(0, "train")] * 6 + [(1, "validation")] * 6


# Refusals


BOOK = list_epub("<p>A page.</p>")
LOCKED = '<encryption><EncryptedData><CipherReference URI="b/c0.xhtml"/></EncryptedData></encryption>'
FONTS = '<encryption><EncryptedData><CipherReference URI="b/font.otf"/></EncryptedData></encryption>'


def lie_about_size(raw):
    """Say in the archive's directory that its largest file unpacks to 100 bytes."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        size = max(entry.file_size for entry in archive.infolist())
    return raw.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))


REFUSED = {
    "cut": ("b.epub", pack(BOOK)[:-100], "is damaged, it cannot be unpacked"),
    "cut early": ("b.docx", pack(list_docx(("", "x")))[:40], "is damaged, it cannot be unpacked"),
    "no zip": ("b.epub", b"A book of plain text.", "is damaged, it cannot be unpacked: File is not a zip file"),
    "bytes": ("b.docx", random.Random(0).randbytes(500), "is not text: byte"),
    "bomb": ("b.epub", pack(BOOK | {"b/c0.xhtml": "<p>" + " " * 20_000_000}), "unpacks to more than 16,000,000 bytes"),
    "hidden bomb": ("b.epub", lie_about_size(pack(BOOK | {"b/c0.xhtml": "x" * 15_000_000})), "Bad CRC-32"),
    "many files": ("b.epub", pack(BOOK | {f"{n}.xml": "" for n in range(20_001)}), "in 20,000 files"),
    "large page": ("b.html", b"<p>" + b"x" * 16_000_000, "has 16,000,003 bytes, more than 16,000,000"),
    "no text": ("b.epub", pack(list_epub("<p> </p><img src='x.png'/>")), "has no text, only white space"),
    "empty": ("b.epub", b"", "is empty"),
    "locked": ("b.epub", pack(BOOK | {"META-INF/encryption.xml": LOCKED}), "is encrypted (DRM)"),
    "another zip": ("b.docx", pack(BOOK), "is a zip file, but not docx: it has no word/"),
    "a zip of pages": ("b.epub", pack({"a.html": "x"}), "but not epub: it has no META-INF/container.xml"),
    "outside": ("b.epub", pack(BOOK | {"../../x.html": "x"}), "has a file named '../../x.html', outside of itself"),
    "root": ("b.epub", pack(BOOK | {"/etc/x.html": "x"}), "has a file named '/etc/x.html', outside of itself"),
    "no package": ("b.epub", pack({**BOOK, "b/c.opf": "<x"}), "pandoc cannot read it"),
    "no document": ("b.docx", pack({**list_docx(), "word/document.xml": "x"}), "pandoc cannot read it"),
    "deep": ("b.html", b"<div>" * 3_000 + b"x", "its markup is nested too deeply"),
    "old Word": ("b.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "is an old Word file, or has a password"),
    "password": ("b.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "save it as .docx without one"),
    "PDF": ("b.pdf", b"%PDF-1.7\n", "is a PDF; save it as plain text"),
    "text name": ("b.txt", pack(BOOK), "is a zip file (docx or epub?); save it as plain text"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "says"), REFUSED.values(), ids=REFUSED)
def test_refusals(prepare, tmp_path, name, raw, says):
    code, _, err = prepare(name, raw)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert len(err) <= 241
    assert says in err
    assert [path.name for path in tmp_path.rglob("*")] == ["in", name]


def test_a_hidden_bomb_is_not_unpacked():
    """It says that it holds 100 bytes and holds 15 MB."""
    tracemalloc.start()
    with pytest.raises(UserError, match="Bad CRC-32"):
        convert(REFUSED["hidden bomb"][1], ".epub")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_encrypted_and_oddly_packed_entries_are_refused(prepare):
    raw = bytearray(pack(BOOK))
    raw[6] |= 1  # the first local header
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # and its entry of the directory
    assert "is encrypted with a password" in prepare("b.epub", bytes(raw)).err
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:  # its decompressor would not stop at a size
        for name, text in BOOK.items():
            archive.writestr(name, text)
    assert "is packed in a way that no epub file is" in prepare("b.epub", packed.getvalue()).err


def test_obfuscated_fonts_are_no_obstacle():
    assert convert(pack(BOOK | {"META-INF/encryption.xml": FONTS}), ".epub") == "A page.\n"


def test_pictures_do_not_count(monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 5_000)
    assert convert(pack(BOOK | {"b/map.png": "x" * 100_000}), ".epub") == "A page.\n"


def test_without_pandoc_the_command_that_installs_it_is_given(prepare, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = prepare("b.epub", pack(BOOK))
    assert code == 2
    assert err.endswith(": .epub files need pandoc; install it: python -m pip install pypandoc_binary\n")
    assert prepare("book.txt", make_book(40).encode()).code == 0


def test_a_converter_that_hangs_or_fails_is_ended(prepare, monkeypatch):
    raw = make_files(write_chapters(30))[".html"]
    monkeypatch.setattr(formats, "SECONDS", 0.001)
    assert "pandoc did not finish within 0.001 s" in prepare("b.html", raw).err
    monkeypatch.setattr(formats, "SECONDS", 60)
    monkeypatch.setattr(formats, "LIMITS", ["+RTS", "-M64m", "-RTS"])
    code, _, err = prepare("b.html", b"a b " * 400_000)
    assert (code, err.count("\n")) == (2, 1)
    assert "b.html: pandoc cannot read it (" in err
    assert "Heap exhausted" in err


@pytest.mark.parametrize("reader", [None, "html"])
def test_nothing_is_fetched_and_nothing_is_written(prepare, tmp_path, monkeypatch, reader):
    """A page with every kind of reference to a local server and to a file: neither is asked.

    Without its sandbox, pandoc's reader called html fetches what an iframe shows.
    """
    asked = []
    if reader:
        monkeypatch.setitem(formats.READERS, ".html", reader)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    secret = tmp_path / "secret.html"
    secret.write_text("<p>The secret.</p>")
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        tags = [f'<img src="{url}i"/>', f'<iframe src="{url}f"></iframe>', f'<link rel="stylesheet" href="{url}c"/>',
                f'<script src="{url}s"></script>', f'<object data="{url}o"></object>', f'<embed src="{url}e"/>',
                f'<video src="{url}v"></video>', f'<iframe src="{secret}"></iframe>',
                f'<iframe src="file://{secret}"></iframe>']  # fmt: skip
        body = "".join(f"<p>{p}</p>" for p in make_book(40).split("\n\n")) + "".join(tags)
        for name, raw in (("b.html", body.encode()), ("b.epub", pack(list_epub(body)))):
            assert prepare(name, raw, "--val-split", 0).code == 0
            assert "secret" not in read_book(tmp_path / "in" / name)[0]
        server.shutdown()
    assert asked == []
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["b.epub", "b.html"]


@pytest.mark.parametrize("suffix", [".epub", ".docx"])
def test_damaged_archives_give_a_text_or_one_line(suffix, amount):
    raw, rng = make_files(write_chapters(3, 3))[suffix], random.Random(1)
    for _ in range(count := amount(10, 1_000)):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(UserError):
            assert isinstance(convert(bytes(damaged), suffix), str)
    record_count("archives", kind=suffix, damaged=count)


def test_a_folder_has_text_files_only(prepare, script, tmp_path, tiny_model):
    (tmp_path / "library").mkdir()
    (tmp_path / "library/a.txt").write_text(make_book(40))
    (tmp_path / "library/a.epub").write_bytes(pack(BOOK))
    script("prepare_data", "--input-path", tmp_path / "library", "--model-name", tiny_model, "--block-size", 16,
           "--output-dir", tmp_path / "out")  # fmt: skip
    assert [book["name"] for book in read_json(tmp_path / "out" / MANIFEST)["books"]] == ["a.txt"]
    shutil.rmtree(tmp_path / "out")
