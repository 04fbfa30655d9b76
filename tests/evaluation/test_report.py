"""The verdict's sentences, and the pages: complete, self-contained, safe, and whole on a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest
from markdown_it import MarkdownIt

from utils.evaluation.report import draw_plots, judge, list_scores, quote, render_page, render_terminal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def report(measured):
    return json.loads((measured / "report.json").read_text(encoding="utf-8"))


def figures(gain=(0.2, 0.3), book=(0.3, 0.4), copied=0.05, own=0.04, recited=0.0, forgot=4.0, loops=0.0):
    def between(low, high):
        return {"value": (low + high) / 2, "low": low, "high": high}

    extraction = {"train": {"exact_match": recited, "prefixes": 50, "tokens": 32}, "reference": {"exact_match": 0.0}}
    return {
        "style_gain": between(*gain), "book_gain": between(*book), "control_gain": between(-0.1, 0.0),
        "forgetting_percent": forgot,
        "copy_rate": {"finetuned": {"8": copied}, "reference": {"8": own}},
        "longest_copy": {"finetuned": {"tokens": 21}},
        "extraction": {"finetuned": extraction}, "repetition": {"finetuned": {"loops": loops}},
    }  # fmt: skip


def test_verdict_of_a_healthy_run():
    sentences, flags = judge(figures())
    assert sentences == [
        "It learned the book: unseen pages cost 0.35 bits per byte less than for the base model.",
        "It copies little: 5.0% of its tokens stand in runs of 8 or more of the book, the longest 21 tokens; "
        "the author's own unseen pages share 4.0%.",
        "It does not recite: given the beginnings of 50 segments it was trained on, it goes on word for word, "
        "32 tokens long, in 0% of cases.",
        "It forgot little: general text costs 4.0% more bits than before.",
    ]
    assert flags == {"learned_the_book": True, "copies": False, "recites": False, "forgot": False}


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
        ({"copied": 0.03, "own": 0.0}, "copies", False, "share 0.0%"),
        ({"copied": 0.031, "own": 0.0}, "copies", True, "copies much"),
        ({"recited": 0.1}, "recites", True, "It recites: given"),
        ({"recited": 0.98}, "recites", True, "in 98% of cases"),
        ({"recited": 0.08}, "recites", False, "does not recite"),
        ({"forgot": 20.0}, "forgot", True, "forgot much: general text costs 20.0% more"),
        ({"forgot": 19.9}, "forgot", False, "forgot little"),
        ({"forgot": 0.5}, "forgot", False, "forgot nothing"),
        ({"forgot": -2.0}, "forgot", False, "forgot nothing: general text costs 2.0% fewer"),
        ({"loops": 0.2}, "forgot", False, "20% of its samples end in a loop"),
    ],
)
def test_verdict_names_what_is_wrong(change, flag, value, words):
    sentences, flags = judge(figures(**change))
    assert flags[flag] is value
    assert words in " ".join(sentences)


def test_without_general_text_the_likelihood_of_unseen_pages_is_still_judged():
    report = figures()
    del report["style_gain"], report["control_gain"], report["forgetting_percent"]
    sentences, flags = judge(report)
    assert sentences[0] == "It learned the book: unseen pages cost 0.35 bits per byte less than for the base model."
    assert flags["learned_the_book"] is True


def test_the_headline_claims_nothing_about_the_samples():
    """A chain of five characters was told that it writes like the book; only the likelihood is sound so far."""
    for change in ({}, {"gain": (-1.0, 1.0)}, {"book": (-1.0, 1.0)}):
        sentences, _ = judge(figures(**change))
        assert not re.search(r"of the way|writes like|write like", " ".join(sentences))


def test_verdict_of_nothing_is_empty():
    assert judge({}) == ([], dict.fromkeys(("learned_the_book", "copies", "recites", "forgot")))


def test_all_pages_carry_the_same_numbers(measured, report):
    pages = {name: (measured / name).read_text(encoding="utf-8") for name in ("report.html", "report.md", "README.md")}
    text = {name: html.unescape(page).replace("\\", "") for name, page in pages.items()}
    rows = list_scores(report)
    assert len(rows) >= 20
    for page in text.values():
        for sentence in report["verdict"]:
            assert sentence in page
        for row in rows:
            for name in ("base", "finetuned", "reference"):
                assert row[name] in page
    shown = render_terminal(report, width=120)
    for row in rows:
        assert row["finetuned"].split(" [")[0] in shown
    assert report["verdict"][0] in shown.replace("\n", " ")


def test_scores_are_the_reports(report):
    rows = {row["label"]: row for row in list_scores(report)}
    assert rows["Burrows' Delta"]["reference"].startswith(f"{report['delta']['reference']:.3f} [")
    assert rows["told from the book, AUC"]["base"].startswith(f"{report['auc']['base']:.3f}")
    assert rows["copied in runs of 16+"]["finetuned"] == f"{report['copy_rate']['finetuned']['16']:.2%}"
    assert rows["held-out pages: perplexity"]["reference"] == ""
    exact = report["extraction"]["finetuned"]["train"]["exact_match"]
    assert rows["continued word for word, trained"]["finetuned"] == f"{exact:.0%}"


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
    for row in report["texts"]:
        row["prompt"] = NASTY
        for texts in row["columns"].values():
            texts[:] = [[{"text": NASTY, "place": None}]]
    report["words"][0]["word"] = report["quiz"][0]["text"] = report["books"][0]["name"] = NASTY
    report["verdict"] = report["missing"] = [NASTY]
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


def test_curves_are_drawn_to_scale():
    evals = [{"step": s, "loss": loss, "bits_per_byte": loss / 2, "copy_rate": rate}
             for s, loss, rate in ((0, 4.0, 0.0), (50, 3.0, 0.02), (100, 3.5, 0.1))]  # fmt: skip
    training = {"train": [[1, 4.2], [100, 2.2]], "eval": evals, "best_step": 50, "max_copy_rate": 0.05}
    loss, style = draw_plots({"training": training})
    points = loss["curves"]["held-out"]
    assert [p["x"] for p in points] == [52, 340, 628]
    assert points[1]["y"] == pytest.approx(258 - 246 * (3.0 - 2.2) / (4.2 - 2.2), abs=0.1)
    assert [p["best"] for p in points] == [False, True, False]
    assert loss["levels"]["base model"] == points[0]["y"]
    assert style["limits"]["allowed"] == pytest.approx(52 + 576 * 0.05 / 0.1)
    assert [label for _, label in loss["x_ticks"]] == ["0", "20", "40", "60", "80", "100"]
    assert draw_plots({"training": {}}) == draw_plots({}) == []


def test_plots_take_runs_without_copying_or_change():
    """Runs of before, a diverged flat line, one evaluation."""
    rows = [{"step": s, "loss": 2.0, "bits_per_byte": 1.0, "copy_rate": None} for s in (0, 1)]
    training = {"train": [], "eval": rows, "best_step": None, "max_copy_rate": None}
    assert len(draw_plots({"training": training})) == 1
    assert draw_plots({"training": training | {"eval": rows[:1]}}) == []


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
    low, high = (round(100 * share) for share in report["quiz_intervals"][7])
    assert full.startswith(f"7 of 10 right; you would be right in {low} to {high}% of many.")
    assert "cannot be said to tell them apart" in full
