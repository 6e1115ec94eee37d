"""The notebooks as files: pairs agree, no outputs, prose enough, and a check at every section's end.

`make notebooks` runs them.
"""

import ast
import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
ALLOWED = {"ssm", "experiments", "numpy", "jax", "matplotlib"}


def cells(script):
    """(kind, source) of the cells of a percent script."""
    for part in script.read_text().split("\n# %%")[1:]:
        mark, _, source = part.partition("\n")
        if mark == " [markdown]":
            yield "markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.strip().split("\n"))
        else:
            yield "code", source.strip()


def notebook(script):
    return json.loads(script.with_suffix(".ipynb").read_text())


def test_there_are_notebooks_and_each_has_its_pair():
    assert SCRIPTS and [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
class TestNotebook:
    def test_its_pair_has_the_same_cells_and_no_outputs(self, script):
        paired = notebook(script)["cells"]
        assert [(cell["cell_type"], "".join(cell["source"])) for cell in paired] == list(cells(script))
        for cell in paired:
            assert not cell.get("outputs") and cell.get("execution_count") is None

    def test_its_code_is_the_librarys(self, script):
        for _, source in filter(lambda cell: cell[0] == "code", cells(script)):
            for node in ast.walk(ast.parse(source)):
                assert not isinstance(node, ast.FunctionDef | ast.ClassDef), node.name
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert {name.split(".")[0] for name in names} <= ALLOWED

    def test_a_third_of_its_lines_is_code_at_most(self, script):
        lines = {"code": 0, "markdown": 0}
        for kind, source in cells(script):
            lines[kind] += len(source.split("\n"))
        assert 3 * lines["code"] <= sum(lines.values())

    def test_its_sections_end_in_an_assertion(self, script):
        last, ends = None, []
        for kind, source in [*cells(script), ("markdown", "## end")]:
            if kind == "markdown" and "## " in source:
                ends, last = [*ends, last] if last else ends, None
            last = source if kind == "code" else last
        assert len(ends) > 3
        for source in ends[1:]:  # the first one imports
            assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source).body[-1])), source
