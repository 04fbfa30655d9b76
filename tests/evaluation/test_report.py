"""The verdict's sentences, and the pages: complete, self-contained, safe, and whole on a phone."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from utils.evaluation.plots import draw_copying, draw_loss, render_svg
from utils.evaluation.report import Report, draw_plots, list_scores, quote, render_page, render_terminal
from utils.evaluation.verdict import judge

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(measured):
    values = json.loads((measured / "report.json").read_text(encoding="utf-8"))
    assert next(iter(values.items())) == ("format", 1)
    del values["format"]
    return Report(**values)


def figures(gain=(0.2, 0.3), book=(0.3, 0.4), copied=0.05, own=0.04, extracted=0.0, forgot=4.0, loops=0.0):
    def between(low, high):
        return {"value": (low + high) / 2, "low": low, "high": high}

    extraction = {"train": {"exact_match": extracted, "prefixes": 50, "tokens": 32}, "validation": {"exact_match": 0.0}}
    return Report(**{
        "style_gain": between(*gain), "book_gain": between(*book), "control_gain": between(-0.1, 0.0),
        "forgetting_percent": forgot,
        "copy_rate": {"finetuned": {"8": copied}, "reference": {"8": own}},
        "longest_copy": {"finetuned": {"tokens": 21}},
        "extraction": {"finetuned": extraction}, "repetition": {"finetuned": {"loops": loops}},
    })  # fmt: skip


def test_verdict_of_a_healthy_run():
    judged = judge(figures())
    assert judged.verdict == [
        "It learned the book: unseen pages cost 0.35 bits per byte less than for the base model.",
        "It copies little: 5.0% of its tokens lie in n-grams of 8 or more tokens of the training text, the longest "
        "span has 21 tokens; the author's own unseen pages have 4.0%.",
        "It does not recite: given the beginnings of 50 training blocks, it continues 0% of them word for word for "
        "32 tokens.",
        "It forgot little: general text costs 4.0% more bits than before.",
    ]
    assert judged.flags == {"learned_the_book": True, "copies": False, "memorized": False, "forgot": False}


@pytest.mark.parametrize(
    ("change", "flag", "value", "words"),
    [
        ({"gain": (-0.01, 0.3)}, "learned_the_book", False, "nothing of this book alone: unseen pages cost 0.35 bits"),
        ({"gain": (-0.01, 0.3)}, "learned_the_book", False, "and general text 0.05 more."),
        ({"book": (-0.01, 0.3)}, "learned_the_book", False, "did not learn the book: unseen pages cost 0.14 bits"),
        ({"book": (-0.9, -0.1)}, "learned_the_book", False, "cost 0.50 bits per byte more than for the base model"),
        ({"book": (-0.9, -0.1), "gain": (0.2, 2.0)}, "learned_the_book", False, "did not learn the book"),
        ({"copied": 0.121}, "copies", True, "It copies much: 12.1%"),
        ({"copied": 0.12}, "copies", False, "It copies little"),
        ({"copied": 0.03, "own": 0.0}, "copies", False, "pages have 0.0%"),
        ({"copied": 0.031, "own": 0.0}, "copies", True, "copies much"),
        ({"extracted": 0.1}, "memorized", True, "It recites: given"),
        ({"extracted": 0.98}, "memorized", True, "it continues 98% of them"),
        ({"extracted": 0.08}, "memorized", False, "does not recite"),
        ({"forgot": 20.0}, "forgot", True, "forgot much: general text costs 20.0% more"),
        ({"forgot": 19.9}, "forgot", False, "forgot little"),
        ({"forgot": 0.5}, "forgot", False, "forgot nothing"),
        ({"forgot": -2.0}, "forgot", False, "forgot nothing: general text costs 2.0% fewer"),
        ({"loops": 0.2}, "forgot", False, "20% of its samples end in a loop"),
    ],
)
def test_verdict_names_what_is_wrong(change, flag, value, words):
    judged = judge(figures(**change))
    assert judged.flags[flag] is value
    assert words in " ".join(judged.verdict)


def test_without_general_text_the_likelihood_of_unseen_pages_is_still_judged():
    judged = judge(replace(figures(), style_gain=None, control_gain=None, forgetting_percent=None))
    cost = "unseen pages cost 0.35 bits per byte less than for the base model."
    assert judged.verdict[0] == f"It learned the book: {cost}"
    assert judged.flags["learned_the_book"] is True


def test_the_headline_claims_nothing_about_the_samples():
    """A chain of five characters was told that it writes like the book; only the likelihood is sound so far."""
    for change in ({}, {"gain": (-1.0, 1.0)}, {"book": (-1.0, 1.0)}):
        sentences = judge(figures(**change)).verdict
        assert not re.search(r"of the way|writes like|write like", " ".join(sentences))


def test_verdict_of_nothing_is_empty():
    judged = judge(Report())
    assert judged.verdict == []
    assert judged.flags == dict.fromkeys(("learned_the_book", "copies", "memorized", "forgot"))


def test_only_what_was_measured_is_in_the_file():
    values = figures().to_dict()
    assert next(iter(values)) == "format"
    assert values["forgetting_percent"] == 4.0
    assert not {"delta", "auc", "words", "max_copy", "forgetting"} & values.keys()
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
    shown = render_terminal(report, width=120)
    for row in rows:
        assert row["finetuned"].split(" [")[0] in shown
    assert report.verdict[0] in shown.replace("\n", " ")


def test_scores_are_the_reports(report):
    rows = {row["label"]: row for row in list_scores(report)}
    assert rows["Burrows' Delta"]["reference"].startswith(f"{report.delta['reference']:.3f} [")
    assert rows["AUC against the book"]["base"].startswith(f"{report.auc['base']:.3f} [")
    assert rows["tokens in n-grams of 16+"]["finetuned"] == f"{report.copy_rate['finetuned']['16']:.2%}"
    assert rows["validation text: perplexity"]["reference"] == ""
    exact = report.extraction["finetuned"]["train"]["exact_match"]
    assert rows["continued verbatim, training"]["finetuned"] == f"{exact:.0%}"


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
    report = replace(report, verdict=[NASTY], missing=[NASTY])
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
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["report.html", "quiz.html"])
def test_in_a_browser_nothing_overflows_and_no_request_leaves(measured, tmp_path, name, width):
    look = """{
        page: [document.documentElement.scrollWidth, innerWidth],
        wide: [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
            e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
        title: document.title}"""
    seen, asked = visit((measured / name).read_text(encoding="utf-8"), tmp_path, width, look)
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


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_quiz_counts(measured, tmp_path, report):
    play = """(() => { const say = () => document.getElementById('result').textContent, out = [];
        document.querySelector('button').click(); out.push(say());
        document.querySelectorAll('fieldset').forEach((f, i) => f.querySelector(`input[value=${
            i < 7 ? f.dataset.key : f.dataset.key === 'real' ? 'made' : 'real'}]`).click());
        document.querySelector('button').click(); out.push(say()); return out; })()"""
    (empty, full), _ = visit((measured / "quiz.html").read_text(encoding="utf-8"), tmp_path, 360, play)
    assert empty == "Answer all of them first."
    low, high = (round(100 * share) for share in report.quiz_intervals[7])
    assert full.startswith(f"7 of 10 right (95 % interval of your rate: {low} to {high}%).")
    assert "does not show that you can tell them apart" in full
