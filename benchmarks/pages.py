"""Figures in the pages stand between markers, which are invisible where a page is rendered.

<!-- =name -->3.405<!-- / -->     a figure in a line; never at its start, where Markdown would read the line as HTML

<!-- =name -->                    a table or a text on lines of its own
| a | b |
<!-- / -->
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "notes").glob("*.md"))]
CARD = ROOT / "results/base_model/README.md"
MARKED = re.compile(r"<!-- =([\w.]+) -->(.*?)<!-- / -->", re.DOTALL)


def name_marker(title: str) -> str:
    """Return a title as the name of a marker. Example: "this project, bf16" -> "this_project_bf16"."""
    return "_".join(re.findall(r"\w+", title))


def fill(text: str, contents: dict[str, str]) -> str:
    """Return a page with the contents between the markers of their names; other markers keep what they have."""
    return MARKED.sub(lambda found: f"<!-- ={found[1]} -->{contents.get(found[1], found[2])}<!-- / -->", text)


def fill_pages(contents: dict[str, str]) -> None:
    """Fill the README, all notes and the card of the base model."""
    for page in [*PAGES, CARD]:
        page.write_text(fill(page.read_text(encoding="utf-8"), contents), encoding="utf-8")
