"""The pages: complete, self-contained, safe, and whole on a phone."""

import html
import json
import re
import shutil
import subprocess
import unicodedata
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from utils.evaluation.plots import draw_copying, draw_loss, draw_parts, render_svg
from utils.evaluation.render import draw_gap, draw_plots, escape, quote, render_page, render_terminal
from utils.evaluation.report import Report, list_quarters, list_scores

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(measured):
    values = json.loads((measured / "report.json").read_text(encoding="utf-8"))
    assert next(iter(values.items())) == ("format", 1)
    del values["format"]
    return Report(**values)


def test_only_what_was_measured_is_in_the_file():
    values = Report(forgetting_percent=4.0).to_dict()
    assert next(iter(values)) == "format"
    assert values["forgetting_percent"] == 4.0
    assert not {"delta", "parts", "words", "max_copy", "forgetting"} & values.keys()
    assert values["missing"] == values["quiz"] == []


def test_all_pages_carry_the_same_numbers(measured, report):
    pages = {name: (measured / name).read_text(encoding="utf-8") for name in ("report.html", "report.md", "README.md")}
    text = {name: html.unescape(page).replace("\\", "") for name, page in pages.items()}
    rows = list_scores(report)
    assert len(rows) >= 20
    for page in text.values():
        for sentence in report.verdict:
            assert sentence in page
        for row in rows:
            for name in ("base", "finetuned", "reference"):
                assert row[name] in page
    quarters = list_quarters(report)
    assert len(quarters) == 6
    for name in ("report.html", "report.md"):
        for row in quarters:
            assert row["label"] in text[name]
            for share in row["quarters"]:
                assert share in text[name]
    shown = render_terminal(report, width=120)
    for row in rows:
        assert row["finetuned"].split(" [")[0] in shown
    assert report.verdict[0] in shown.replace("\n", " ")


def test_scores_are_the_reports(report):
    rows = {row["label"]: row for row in list_scores(report)}
    assert rows["Burrows' Delta"]["reference"].startswith(f"{report.delta['reference']:.3f} [")
    assert rows["reader's AUC against the book"]["base"].startswith(f"{report.reader_auc['base']['value']:.3f} [")
    assert rows["tokens in n-grams of 16+"]["finetuned"] == f"{report.copy_rate['finetuned']['16']:.2%}"
    assert rows["validation text: perplexity"]["reference"] == ""
    exact = report.extraction["finetuned"]["train"]["exact_match"]
    assert rows["continued verbatim, training"]["finetuned"] == f"{exact:.0%}"
    for label, gain in (("gain on validation text", report.book_gain), ("style gain", report.style_gain)):
        assert rows[label]["finetuned"] == "{value:.3f} [{low:.3f}, {high:.3f}]".format(**gain)


def between(value, low, high):
    return {"value": value, "low": low, "high": high}


PARTS = {"words": between(0.6, 0.2, 1.0), "spelling": between(0.9, 0.7, 0.95), "sense": between(0.1, 0.0, 0.3)}
# A copy of another's columns: figures that only it has, a part that could not be measured, nothing measured.
JUDGED = {
    "mine": {"n_texts": 12, "copy_rate": 0.1234, "parts": PARTS | {"sense": between(0.77, 0.71, 0.82)}},
    "short_one": {"n_texts": 1, "copy_rate": None, "parts": {}, "gap_closed": None},
    "$a_b$": {"n_texts": 11, "copy_rate": 0.0, "parts": {"words": between(0.0, 0.0, 0.05)}},
}


def test_a_judged_file_has_a_column_in_the_tables(report):
    report = replace(report, judged=JUDGED)
    markdown = MarkdownIt("commonmark").enable("table").render(render_page("report.md", report))
    for page in (render_page("report.html", report), markdown):
        rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page, re.DOTALL)]
        cells = {row[0].split(" <span")[0]: row[4:7] for row in rows if len(row) >= 4 + len(JUDGED)}
        assert cells["measure"] == list(JUDGED)
        assert cells["tokens in n-grams of 8+"] == ["12.34%", "", "0.00%"]
        assert cells["gap closed: words"] == ["0.600 [0.200, 1.000]", "", "0.000 [0.000, 0.050]"]
        assert cells["texts"] == ["12", "1", "11"]


def test_page_needs_nothing_from_elsewhere(measured):
    for name in ("report.html", "quiz.html"):
        page = (measured / name).read_text(encoding="utf-8")
        assert len(page) < 1_000_000
        assert "default-src 'none'" in page
        assert not re.search(r"https?://|@import|url\(|src=", page)
        assert {link[0] for link in re.findall(r'href="([^"]*)"', page)} <= {"#", "d"}  # inside the page, or data:


def test_every_link_has_its_place(measured):
    page = (measured / "report.html").read_text(encoding="utf-8")
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets
    assert targets <= set(re.findall(r'id="([^"]+)"', page))


NASTY = '<script>alert(1)</script> & "quoted" | *stars* `code` [link](x) {{ jinja }}\n# no heading'


def test_what_a_model_writes_is_never_markup(report):
    for row in report.texts:
        row["prompt"] = NASTY
        for texts in row["columns"].values():
            texts[:] = [[{"text": NASTY, "source": None}]]
    report.words[0]["word"] = report.quiz[0]["text"] = report.books[0]["name"] = NASTY
    report.quiz_pairs[0]["texts"][0] = NASTY
    report = replace(report, verdict=[NASTY], missing=[NASTY], judged={NASTY: JUDGED["mine"]})
    assert "<th>" + html.escape(NASTY).replace("&quot;", "&#34;") + "</th>" in render_page("report.html", report)
    for name in ("report.html", "quiz.html"):
        page = render_page(name, report)
        assert "<script>alert" not in page
        assert html.escape(NASTY, quote=True).replace("&quot;", "&#34;") in page
    for name in ("report.md", "card.md"):
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(render_page(name, report))
        assert "alert(1)" in page
        for markup in ("<script>", "<em>stars", "<code>code", '<a href="x"', "no heading</h1>"):
            assert markup not in page
    assert quote("a\nb") == "> a  \n> b  "


def read_quote(page, parser):
    """Return the text of a page that is one quotation, by a CommonMark parser, line by line."""
    tokens, lines = parser.parse(page), [""] * len(page.split("\n"))
    assert (tokens[0].type, tokens[-1].type) == ("blockquote_open", "blockquote_close")
    for token in tokens[1:-1]:
        assert token.type in ("paragraph_open", "inline", "paragraph_close")
        if token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "hardbreak"}
            text = "".join("\n" if child.type == "hardbreak" else child.content for child in token.children)
            lines[token.map[0] : token.map[1]] = text.split("\n")
    return "\n".join(lines)


PARSERS = [MarkdownIt("commonmark"), MarkdownIt("commonmark").enable(["table", "strikethrough"])]
PIECES = [*"-+*=_#>`~|:!&;$^@%\\[](){}<>.\"'0123456789ab \t\n\x0b\x85\xa0\u2028\u3000\u00e9", "\n", "1. ", "12) ",
          "---", "===", "    ", "\n\n", "&amp;", "&#35;", "https://a.b", "<b>", "<!--", "- [ ] ", "| a | b |",
          "|---|---|", ":-", "[a]: b", "```", "~~~", "<script>"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=30
)
BLOCKS = ["- a", "+ a", "1. a", "1) a", "12.", "-", "---", "a\n---", "a\n===", "    a", "\ta", " a ", "a | b\n:-",
          "a\n- b", "  - b", "a\n\n\n1. b"]  # fmt: skip


@pytest.mark.parametrize("parser", PARSERS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_a_quotation_is_read_as_the_text_that_it_is(parser, text):
    text = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text.strip("\n"))
    assert not text or read_quote(quote(text), parser) == text


@pytest.mark.parametrize("text", BLOCKS)
def test_a_quoted_line_starts_no_block(text):
    for parser in PARSERS:
        assert read_quote(quote(text), parser) == text
    plain = "\n".join(f"> {escape(line)}  " for line in text.split("\n"))
    assert not all(is_read_as(plain, parser, text) for parser in PARSERS), "escaped characters alone do as well"


def is_read_as(page, parser, text):
    with suppress(AssertionError):
        return read_quote(page, parser) == text
    return False


EVALS = [{"step": s, "loss": loss, "bits_per_byte": loss / 2, "copy_rate": rate}
         for s, loss, rate in ((0, 4.0, 0.0), (50, 3.0, 0.02), (100, 3.5, 0.1))]  # fmt: skip
TRAINING = {"train": [[1, 4.2], [100, 2.2]], "eval": EVALS, "best_step": 50, "max_copy_rate": 0.05}


def lines(figure):
    """The points of each line of a figure, by its label; an underscore starts the label of an unnamed one."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines}


def test_curves_have_the_figures():
    loss = lines(draw_loss(TRAINING["train"], [(row["step"], row["loss"]) for row in EVALS], 50))
    assert loss == {
        "training": [(1, 4.2), (100, 2.2)], "validation": [(0, 4.0), (50, 3.0), (100, 3.5)],
        "base model": [(0, 4.0), (1, 4.0)], "best: 3.000 at step 50": [(50, 3.0)],
    }  # fmt: skip
    style = lines(draw_copying(EVALS, 50, 0.05))
    assert style["from the base model on"] == [(0.0, 2.0), (2.0, 1.5), (10.0, 1.75)]
    assert style["best: step 50"] == [(2.0, 1.5)]
    assert style["limit"] == [(5.0, 0), (5.0, 1)]
    assert len(lines(draw_copying(EVALS, None, None))) == 1
    assert lines(draw_loss([], [], 0)) == {}  # a run stopped before its first step has no curve


def test_the_chart_has_the_parts():
    """Each part on its line from base (0) to author (1); the points of judged files below the model's."""
    figure = draw_parts(PARTS, {"mine": JUDGED["mine"]["parts"], "some": JUDGED["$a_b$"]["parts"]})
    axes, points = figure.axes[0], lines(figure)
    at = dict(zip((tick.get_text() for tick in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert list(at) == ["words", "spelling", "sense"]
    assert points["base"] == [(0, y) for y in at.values()]
    assert points["author"] == [(1, y) for y in at.values()]
    assert points["fine-tuned"] == [(0.6, at["words"]), (0.9, at["spelling"]), (0.1, at["sense"])]
    assert [x for x, _ in points["mine"]] == [0.6, 0.9, 0.77]
    assert [x for x, _ in points["some"]] == [0.0]
    assert len({y for values in points.values() for _, y in values}) == 3 + 3 + 1  # none hides another
    bars = [[segment[:, 0].tolist() for segment in bar.get_segments()] for bar in axes.collections]
    assert bars == [[[0.2, 1.0], [0.7, 0.95], [0.0, 0.3]], [[0.2, 1.0], [0.7, 0.95], [0.71, 0.82]], [[0.0, 0.05]]]
    assert axes.yaxis_inverted()  # words on top


def test_the_chart_is_small_and_its_legend_beside_it():
    names = ["$\\frac{", "_hidden", "a name that is much too long for a legend", "fourth"]
    figure = draw_parts(PARTS, dict.fromkeys(names, PARTS))
    figure.draw_without_rendering()
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "base", "author", "fine-tuned", "$\\frac{", "_hidden", "a name that is mu\u2026"]  # fmt: skip
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_tightbbox())
    assert legend.get_window_extent().xmin >= 0
    assert legend.get_window_extent().xmax <= figure.bbox.width
    svg = render_svg(figure, "gap")
    assert re.search(r"<text [^>]*>\$\\frac{</text>", svg)
    assert "<b>" not in render_svg(draw_parts(PARTS, {"<b>": PARTS}), "gap")


def test_without_parts_there_is_no_chart(report):
    assert draw_gap(Report()) == draw_gap(Report(parts={"base": {}, "finetuned": {}})) == ""
    assert draw_gap(Report(parts={"finetuned": PARTS}, judged=JUDGED)).count("mine") == 1
    page = render_page("report.html", replace(report, parts=None))
    assert "Share of the gap" in render_page("report.html", report)
    assert "Share of the gap" not in page


def test_curves_take_runs_without_copying_or_change():
    """A run without copy rates, a diverged flat line, one evaluation, no run."""
    rows = [{"step": s, "loss": 2.0, "bits_per_byte": 1.0, "copy_rate": None} for s in (0, 1)]
    training = {"train": [], "eval": rows, "best_step": None, "max_copy_rate": None}
    assert len(draw_plots(Report(training=TRAINING))) == 2
    assert len(draw_plots(Report(training=training))) == 1
    assert draw_plots(Report(training=training | {"eval": rows[:1]})) == draw_plots(Report()) == []


def test_curves_in_the_page_are_the_same_every_time_and_apart_from_each_other():
    drawn, again = draw_plots(Report(training=TRAINING)), draw_plots(Report(training=TRAINING))
    assert drawn == again
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in drawn]
    assert not set(ids[0]) & set(ids[1])
    for svg, own in zip(drawn, ids, strict=True):
        assert len(own) == len(set(own))
        assert set(re.findall(r'href="#([^"]+)"', svg)) <= set(own)
        assert re.search(r"<text [^>]*>validation", svg)  # text as text
        assert "currentColor" in svg  # readable on a dark page
        assert "black" not in svg.replace("#000000", "black")
        assert not re.search(r"https?://|url\(|<style|<\?xml|<!DOCTYPE", svg)
    flat = render_svg(draw_loss([], [(0, 1.0)], None), "flat")
    assert flat.startswith("<svg ")
    assert flat.rstrip().endswith("</svg>")


def test_terminal_shows_no_control_characters_and_no_line_beyond_its_width(report, monkeypatch):
    evil = "\x1b[31mred\x1b]0;title\x07 a\tb\rc\u202eright [bold]plain[/bold] :smile: " + "日本語" * 60 + "x" * 200
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for row in report.texts:
        row["prompt"] = evil
        for texts in row["columns"].values():
            texts[:] = [[{"text": evil, "source": None}]]
    report = replace(report, missing=[evil])
    for width in (40, 80, 100, 150):
        shown = render_terminal(report, width)
        assert all(c.isprintable() or c == "\n" for c in shown)
        assert max(sum(2 if c in "日本語" else 1 for c in line) for line in shown.splitlines()) <= width
        assert "[bold]plain[/bold] :smile:" in " ".join(re.sub(r"[|\s]+", " ", shown).split())
        assert shown.count("日") >= 60 * 3
        assert ("[fine-tuned model]" in shown) == (width < 3 * 28 + 6)


@pytest.mark.parametrize("width", [10, 20, 36])
def test_a_very_narrow_terminal_cuts_no_figure_off(report, width):
    report = replace(report, judged={f"a name of a file {i}": JUDGED["mine"] for i in range(9)})
    shown = render_terminal(report, width)
    assert "\u2026" not in shown
    for row in list_scores(report):
        for name in ("base", "finetuned", "reference"):
            assert row[name].split(" [")[0] in shown


def visit(page, tmp_path, width, script):
    """Open a page in Chromium in a frame as wide as a phone or a desk.

    Returns what the script found there, and the addresses asked for that are not the browser's own.
    """
    probe = f"<script>addEventListener('load', () => parent.postMessage(JSON.stringify({script}), '*'))</script>"
    frame = """<iframe src="page.html" width="WIDTH" height="900"></iframe><pre></pre><script>
        addEventListener("message", event => document.querySelector("pre").textContent = event.data)</script>"""
    text = page.replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(frame.replace("WIDTH", str(width)))
    log, profile = tmp_path / "net.json", tmp_path / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom",
             "--virtual-time-budget=3000", f"--user-data-dir={profile}", f"--log-net-log={log}"]  # fmt: skip
    command = [CHROMIUM, *flags, f"file://{tmp_path}/frame.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre>(.*?)</pre>", dom.stdout, re.DOTALL)
    assert found, dom.stderr[-500:]
    asked = re.findall(r'"url":"(https?://[^"]+)"', log.read_text(errors="replace"))
    return json.loads(html.unescape(found.group(1))), [url for url in asked if not re.search(r"google|gvt1", url)]


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["report.html", "quiz.html"])
def test_in_a_browser_nothing_overflows_and_no_request_leaves(report, tmp_path, name, width):
    report = replace(report, judged=JUDGED | {"x" * 200: JUDGED["mine"]}, verdict=["y" * 200, *report.verdict])
    look = """{
        page: [document.documentElement.scrollWidth, innerWidth],
        wide: [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
            e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
        title: document.title}"""
    seen, asked = visit(render_page(name, report), tmp_path, width, look)
    assert seen["title"]
    assert seen["page"][0] <= seen["page"][1] <= width
    assert seen["wide"] == []
    assert asked == []


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_browser_would_show_a_request_and_an_overflow(tmp_path):
    page = "<body><img src='http://outside.invalid/x.png'><div style='width:900px'>wide</div></body>"
    seen, asked = visit(page, tmp_path, 360, "[document.documentElement.scrollWidth, innerWidth]")
    assert seen[0] > seen[1]
    assert "http://outside.invalid/x.png" in asked


HEADLINE = """A small part of the way from the base model to the author (0.12 [0.03, 0.27]): it does not have the book's
words (0.66), spelling (0.85) or sense (0.12); 5.5% of its words stand in neither book nor general text, of the
author's 3.9%; but it copies."""
SAMPLE = """one word, he went down the high road.

"Nonsense!" exclaimed the giants, springing slowly toward the shore, and taking the tree to the spot where he had slept.

"I wish for the three days, too."

"The first thing will be there," said Manfred.

"Yes, not"""


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_first_screen_has_headline_chart_and_three_texts(report, tmp_path, width):
    """With texts as long as the defaults give, and as many judged files as the chart shows."""
    row = {"prompt": "Went aboard the barque Halcyon off Ansel Head at dusk on the thirtieth of October, seven",
           "has_reference": True, "columns": {name: [[{"text": SAMPLE, "source": None}]] for name in report.parts},
           }  # fmt: skip
    report = replace(
        report, verdict=[HEADLINE, *report.verdict], texts=[*report.texts[:1], row, *report.texts[1:]],
        parts={"finetuned": PARTS}, judged={f"a name of a file {i}": JUDGED["mine"] for i in range(9)},
    )  # fmt: skip
    assert not report.texts[0]["has_reference"]
    look = """{
        headline: document.querySelector('h1').textContent,
        shown: [...document.querySelector('.columns').querySelectorAll('.text')].map(e => e.textContent),
        ends: ['h1', 'svg', '.columns'].map(what => document.querySelector(what).getBoundingClientRect().bottom),
        tops: [...document.querySelector('.columns').children].map(e => e.getBoundingClientRect().top),
        letters: [...document.querySelectorAll('.headline svg text')].map(e => e.getBoundingClientRect().height)}"""
    seen, _ = visit(render_page("report.html", report), tmp_path, width, look)
    assert seen["headline"] == HEADLINE
    assert seen["shown"] == [SAMPLE] * 3
    assert min(seen["letters"]) > 11  # pixels
    headline, chart, texts = seen["ends"]
    if width == 1200:
        assert max(headline, chart, texts) <= 900
        assert len(set(seen["tops"])) == 1  # side by side
    else:
        assert headline < chart < seen["tops"][0] < 844
        assert seen["tops"] == sorted(set(seen["tops"]))  # below each other


PLAY = """(() => {
    const say = () => document.getElementById('result').textContent, out = [];
    const tops = [...document.querySelector('.pair').children].map(e => e.getBoundingClientRect().top);
    document.querySelector('button').click(); out.push(say());
    const fieldsets = [...document.querySelectorAll('fieldset')], nSingles = fieldsets.length - 10;
    fieldsets.forEach((f, i) => f.querySelector(
        `input[value="${(i < nSingles ? i < 7 : i > nSingles) ? f.dataset.key : 1 - f.dataset.key}"]`).click());
    document.querySelector('button').click(); out.push(say());
    const wrong = [...document.querySelectorAll('.wrong')].map(f => fieldsets.indexOf(f));
    return {tops, out, wrong, legends: fieldsets.map(f => f.querySelector('legend').textContent)}; })()"""


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_quiz_counts_singles_and_pairs(tmp_path, report, width):
    """Of the singles, the first seven are answered right; of the pairs, all but the first."""
    seen, _ = visit(render_page("quiz.html", report), tmp_path, width, PLAY)
    empty, full = seen["out"]
    assert empty == "Answer all of them first."
    (low, high), (sharp_low, _) = ([round(100 * share) for share in report.quiz_intervals[n]] for n in (7, 9))
    singles, pairs, last = full.splitlines()
    assert singles.startswith(f"Single snippets: 7 of 10 right (95 % interval of your rate: {low} to {high}%).")
    assert "does not show that you can tell them apart" in singles
    assert pairs == f"Pairs: 9 of 10 right (95 % interval of your rate: {sharp_low} to 100%). You can tell them apart."
    assert "sharper question" in last
    assert seen["wrong"] == [7, 8, 9, 10]
    written = ["the author" if item["is_real"] else "the model" for item in report.quiz]
    written += [("the first", "the second")[pair["author"]] for pair in report.quiz_pairs]
    assert seen["legends"] == [f"{number}: {who}" for number, who in enumerate(written, start=1)]
    assert (seen["tops"][0] == seen["tops"][1]) == (width == 1200)


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_quiz_of_pairs_alone_counts(tmp_path, report):
    seen, _ = visit(render_page("quiz.html", replace(report, quiz=[])), tmp_path, 1200, PLAY)
    assert seen["out"][1].startswith("Pairs: 9 of 10 right")
    assert "Single snippets" not in seen["out"][1]
