"""The README's code runs and prints what the README says; its commands and files exist."""

import contextlib
import io
import pathlib
import re
from functools import partial

import numpy as np

from experiments import report_cells, report_page, report_sections

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_print_what_is_shown():
    """All blocks in one session, as a reader would paste them. Numbers may differ in the last digit shown."""
    blocks, names, printed = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    lines = printed.getvalue().splitlines()
    assert len(blocks) == 3 and len(lines) == 3
    shown = [line for line in README.splitlines() if line.startswith(("recurrent", "parallel", "chunked"))]
    values = [np.array(re.findall(r"-?\d+\.\d+", line), float) for line in lines + shown]
    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], rtol=1e-4)


def test_files_and_targets_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_the_tables_are_the_records():
    """`python -m experiments.report --readme` makes every marked table; no other table holds a number."""
    cells = report_cells.cells()
    assert report_page.marked(README, partial(report_sections.table, cells)) == README
    rest = report_page.MARKED.sub("", README)
    assert len(report_page.MARKED.findall(README)) == README.count("<!-- report:") == README.count("<!-- end -->") == 5
    assert not re.search(r"^\|.*\d", re.sub(r"`[^`]*`|\([^)]*\)", "", rest), re.MULTILINE)
