"""The reports' sections as Markdown, as one HTML page that needs nothing else, and as the tables of a README."""

import base64
import pathlib
import re
import string
import tempfile
from collections.abc import Callable, Sequence

from experiments.report_figures import Figure
from experiments.report_sections import Section

INTRODUCTION = "Made by `python -m experiments.report` of the records in `experiments/results` alone."
MARKED = re.compile(r"(<!-- report: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: 0.85rem; }
th, td { border: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap; }
th { background: #f3f5f7; }
img { max-width: 100%; }
</style>
</head>
<body>
<nav>$links</nav>
$body</body>
</html>
""")


def markdown(sections: Sequence[Section], title: str = "", *, drawn: bool = True) -> str:
    """The text; with links to the figures where they are drawn."""
    parts = [f"# {title}", INTRODUCTION] if title else []
    for section in sections:
        parts.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, str):
                parts.append(part)
            elif drawn:
                parts.append(f"![{part.caption}]({part.name}.svg)")
    return "\n\n".join(parts) + "\n"


def draw(sections: Sequence[Section], folder: pathlib.Path) -> list[pathlib.Path]:
    """Every figure, below the folder."""
    return [part.write(folder) for section in sections for part in section.parts if isinstance(part, Figure)]


def page(sections: Sequence[Section], title: str) -> str:
    """HTML with its style and figures in it, and no script."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(sections, title))
    with tempfile.TemporaryDirectory() as folder:
        draw(sections, pathlib.Path(folder))
        body = re.sub(r'(?<=<img src=")[^"]+', lambda name: _inlined(pathlib.Path(folder) / name[0]), body)
    body = re.sub(r"<h2>(.*?)</h2>", r'<h2 id="\1">\1</h2>', body)
    links = " ".join(f'<a href="#{section.title}">{section.title}</a>' for section in sections)
    return PAGE.substitute(title=title, links=links, body=body)


def _inlined(path: pathlib.Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def marked(text: str, table: Callable[[str], str]) -> str:
    """The text with what stands between <!-- report: WORDS --> and <!-- end --> made again by table(WORDS)."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text)
