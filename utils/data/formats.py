"""Books in other formats: EPUB, Word, OpenDocument, RTF and HTML become plain paragraphs.

Pandoc, of the optional package pypandoc_binary, parses the file in a sandbox: without network, without other files,
and with bounded memory and time. Here the paragraphs are taken from its document tree.
"""

import functools
import importlib.util
import io
import itertools
import json
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError

READERS = {".epub": "epub", ".docx": "docx+empty_paragraphs", ".odt": "odt", ".rtf": "rtf",
           ".html": "html+raw_html", ".htm": "html+raw_html", ".xhtml": "html+raw_html"}  # fmt: skip
ARCHIVES = {".epub": "META-INF/container.xml", ".docx": "word/", ".odt": "content.xml"}  # what each must have
MARKUP = (".xml", ".xhtml", ".html", ".htm", ".opf", ".ncx", ".rels")  # pictures, fonts and styles are not unpacked
ENCRYPTED = re.compile(rb"""URI=["'][^"']+\.(x?html?|xml)["']""")  # text; obfuscated fonts can be left out
MAX_BYTES, MAX_ENTRIES = 16_000_000, 20_000  # of unpacked markup; War and Peace has 4 MB
LIMITS = ["+RTS", "-M4g", "-RTS"]  # pandoc needs about 150 bytes of memory per byte of markup
SECONDS = 300
CHAPTER_MARK = "\ufdd0"  # stands before a chapter; a noncharacter of Unicode, which no text has
MIN_HEADINGS = 3  # the first level with so many headings, higher ones included, is that of chapters
SCENE_BREAK = "* * *"
FILE, NAVIGATION = -1, -2  # levels of what is no text: the start of a file of an EPUB, a paragraph of links
MIN_LINKS, MAX_TITLE_CHARS = 3, 40  # so many such paragraphs are a table of contents, with a title above
SKIPPED = {"footnotes", "footnote", "endnotes", "doc-footnote", "doc-endnotes", "toc", "doc-toc", "pagenum", "pageno",
           "pagebreak", "doc-pagebreak", "doc-backlink"}  # fmt: skip
MAX_LINK_CHARS = 200  # of a paragraph that is only links, and no prose
INLINE = {"Space": " ", "SoftBreak": " ", "LineBreak": "\n"}
QUOTES = {"DoubleQuote": "\u201c{}\u201d", "SingleQuote": "\u2018{}\u2019"}


@functools.lru_cache(maxsize=1)  # a book is read once to be measured and once or twice to be tokenized
def convert_book(raw: bytes, suffix: str, name: str) -> str:
    """Convert a file of a format in READERS to paragraphs, with a CHAPTER_MARK before each chapter but the first.

    Headings are lines of their own, rules become SCENE_BREAK; notes, navigation, page numbers and pictures are left
    out. UserError if the file is damaged, locked, too large, or if pandoc is missing or fails.
    """
    source = _select_markup(raw, suffix, name) if suffix in ARCHIVES else raw
    if len(source) > MAX_BYTES:
        raise UserError(f"{name} has {len(source):,} bytes, more than {MAX_BYTES:,}; split it into parts")
    try:
        blocks = json.loads(_run_pandoc(source, suffix, name), object_hook=_shrink)["blocks"]
        return _join_parts(list(_list_parts(blocks)))
    except RecursionError:
        raise UserError(f"{name}: its markup is nested too deeply; save it as plain text") from None


def take_chapters(text: str) -> tuple[str, tuple[int, ...]]:
    """Return a converted text without its marks, and the characters at which its chapters start; () for only one."""
    chapters = [chapter for chapter in text.split(CHAPTER_MARK) if chapter]
    starts = itertools.accumulate(map(len, chapters[:-1]), initial=0)
    return "".join(chapters), tuple(starts) if len(chapters) > 1 else ()


def _select_markup(raw: bytes, suffix: str, name: str) -> bytes:
    """Return an archive of the markup alone, none of it compressed, or refuse it before anything is unpacked."""
    kept, total = io.BytesIO(), 0
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive, zipfile.ZipFile(kept, "w") as copy:
            entries = archive.infolist()
            _check_entries(entries, suffix, name)
            for entry in entries:
                if not entry.filename.lower().endswith(MARKUP):
                    continue
                total += entry.file_size
                if total > MAX_BYTES or len(entries) > MAX_ENTRIES:
                    raise UserError(f"{name} unpacks to more than {MAX_BYTES:,} bytes of text in {MAX_ENTRIES:,} files")
                with archive.open(entry) as file:
                    data = file.read(entry.file_size)  # read() would unpack all that is there, whatever its size
                copy.writestr(entry.filename, data)
                if entry.filename == "META-INF/encryption.xml" and ENCRYPTED.search(data):
                    raise UserError(f"{name} is encrypted (DRM); a copy without it is needed")
    except UserError:
        raise
    except Exception as error:  # zipfile and its decompressors each fail in their own ways
        raise UserError(f"{name} is damaged, it cannot be unpacked: {error or type(error).__name__}") from error
    return kept.getvalue()


def _check_entries(entries: list[zipfile.ZipInfo], suffix: str, name: str) -> None:
    names = [entry.filename for entry in entries]
    if not any(entry.startswith(ARCHIVES[suffix]) for entry in names):
        raise UserError(f"{name} is a zip file, but not {suffix[1:]}: it has no {ARCHIVES[suffix]}")
    for entry in names:
        if entry.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", entry):
            raise UserError(f"{name} has a file named {entry[:60]!r}, outside of itself; it may be malicious")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise UserError(f"{name} is packed in a way that no {suffix[1:]} file is; save it again")
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{name} is encrypted with a password; a copy without it is needed")


def _run_pandoc(source: bytes, suffix: str, name: str) -> bytes:
    """Return the document tree as JSON."""
    package = importlib.util.find_spec("pypandoc")
    pandoc = [path for root in (package.submodule_search_locations if package else [])
              for path in Path(root, "files").glob("pandoc*")]  # fmt: skip
    if not pandoc:
        raise UserError(f"{name}: {suffix} files need pandoc; install it: python -m pip install pypandoc_binary")
    command = [pandoc[0], "--sandbox", f"--from={READERS[suffix]}", "--to=json", *LIMITS]
    try:
        done = subprocess.run(command, input=source, capture_output=True, timeout=SECONDS, env={})
    except subprocess.TimeoutExpired:
        raise UserError(f"{name}: pandoc did not finish within {SECONDS} s; save it as plain text") from None
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if not line.startswith("[")]
        reason = said[0][:100] if said else f"exit status {done.returncode}"
        raise UserError(f"{name}: pandoc cannot read it ({reason}); save it as plain text")
    return done.stdout


def _shrink(node: dict) -> Any:
    """Replace words and spaces by strings while the tree is parsed, which saves most of its memory."""
    kind = node.get("t")
    return node["c"] if kind == "Str" else INLINE.get(kind, node)


def _list_parts(node: Any) -> Iterator[tuple[int, str]]:
    """Yield (level, text) of headings (1 to 6), paragraphs (0), files and navigation, depth first."""
    if isinstance(node, list):
        for child in node:
            yield from _list_parts(child)
    if not isinstance(node, dict) or "t" not in node:
        return
    kind, content = node["t"], node.get("c")
    if kind == "Header":
        yield content[0], _clean(_join_inlines(content[2]))
    elif kind in ("Para", "Plain"):
        text = _join_inlines(content)
        is_file = len(content) == 1 and not text and re.search(r"\.x?html?$|\.xml$", _attributes(content[0])[0])
        level = FILE if is_file else NAVIGATION if _is_navigation(content, text) else 0
        # A paragraph of white space, but not one of a picture, is a blank line.
        yield level, _clean(text) or ("\n" if text or not content else "")
    elif kind == "LineBlock":
        yield 0, _clean("\n".join(map(_join_inlines, content)))
    elif kind == "CodeBlock":
        yield 0, content[1].strip("\n")
    elif kind == "DefinitionList":
        for term, definitions in content:
            yield from _list_parts([{"t": "Plain", "c": term}, definitions] if term else definitions)
    elif kind == "HorizontalRule":
        yield 0, SCENE_BREAK
    elif kind not in ("Figure", "RawBlock") and not SKIPPED.intersection(_attributes(node)):
        yield from _list_parts(content)


def _attributes(node: Any) -> list[str]:
    """Return id, classes and role of a Div or Span."""
    if not isinstance(node, dict) or node["t"] not in ("Div", "Span"):
        return [""]
    name, classes, pairs = node["c"][0]
    return [name, *classes, *(value for key, value in pairs if key in ("role", "epub:type"))]


def _join_inlines(inlines: list, with_links: bool = True) -> str:
    """Return the text of inline elements, without notes, pictures, ruby readings and marks of notes."""
    texts, is_reading = [], False
    for node in inlines:
        kind, content = (None, node) if isinstance(node, str) else (node["t"], node.get("c"))
        if kind == "RawInline":
            is_reading = content[1].startswith(("<rt", "<rp"))
        elif is_reading or kind == "Note":
            continue
        elif kind is None:
            texts.append(content)
        elif kind == "Quoted":
            texts.append(QUOTES[content[0]["t"]].format(_join_inlines(content[1], with_links)))
        elif kind in ("Code", "Math"):
            texts.append(content[1])
        elif kind == "Image":  # an initial as a picture is part of its word
            letter = _join_inlines(content[1])
            texts.append(letter if len(letter) == 1 < len(inlines) else "")
        elif kind == "Link":
            text = _join_inlines(content[1])  # [1], * and the like lead to a note
            texts.append(text if with_links and any(map(str.isalpha, text)) else "")
        elif not SKIPPED.intersection(_attributes(node)):
            texts.append(_join_inlines(content[1] if kind in ("Span", "Cite") else content, with_links))
    return "".join(texts)


def _is_navigation(inlines: list, text: str) -> bool:
    """Return whether all words of a paragraph are links: an entry of a table of contents."""
    is_short = len(text) < MAX_LINK_CHARS and any(map(str.isalpha, text))
    return is_short and not any(map(str.isalpha, _join_inlines(inlines, with_links=False)))


def _clean(text: str) -> str:
    """Drop soft hyphens, and white space around lines."""
    return re.sub(r"[ \t\u00a0]*\n[ \t\u00a0]*", "\n", text.replace("\u00ad", "")).strip(" \t\n\u00a0")


def _join_parts(parts: list[tuple[int, str]]) -> str:
    """Join the paragraphs, a blank line between two, with CHAPTER_MARK before chapters but the first."""
    levels = sorted(level for level, _ in parts if level > 0)
    deepest = levels[min(len(levels), MIN_HEADINGS) - 1] if levels else 0
    paragraphs = [text for text, _ in itertools.groupby(text for level, text in parts if level == 0 and text)]
    # Where blank lines stand between all paragraphs, they are no scene breaks.
    keeps_blank = 3 * paragraphs.count("\n") < len(paragraphs)
    pieces, has_prose, starts, is_blank, n_links = [], False, False, False, 0
    for level, text in parts:
        if level == NAVIGATION:
            n_links += 1
            if n_links == MIN_LINKS and pieces and len(pieces[-1]) <= MAX_TITLE_CHARS:
                starts = starts or CHAPTER_MARK in pieces.pop()
            continue
        n_links = 0 if text else n_links
        if level == FILE or 0 < level <= deepest:
            starts, has_prose, is_blank = starts or has_prose, False, False
        if text == "\n":
            is_blank = keeps_blank and bool(pieces)
        elif text:
            pieces.append("\n" * is_blank + CHAPTER_MARK * starts + text)
            starts, has_prose, is_blank = False, has_prose or level == 0, False
    return "\n\n".join(pieces) + "\n" if pieces else ""
