"""What the reports say: a section of each group of tasks, and those of the kernels and of generation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from experiments import costs, generation_costs, plots, report_tables
from experiments.report_cells import Cell, chosen
from experiments.report_figures import AGAINST_WIDTH, Figure, figures
from ssm import naming

LEGEND = "Best of the seeds (median of the seeds) [published]; what is empty was not run."
KERNEL_TABLES = {
    "layers": ("One layer, forward / forward + backward, by its fastest implementation", costs.layers),
    "peers": ("Beside other projects' kernels", costs.peers),
    "training": ("Whole training steps", costs.training),
}
GENERATION_TABLES = {
    "rates": ("Reading and writing text", generation_costs.table),
    "steps": ("One decode step", generation_costs.steps),
}


class Section(NamedTuple):
    title: str
    parts: list[str | Figure]  # text in Markdown, or a figure


def everything(cells: Sequence[Cell]) -> list[Section]:
    """The groups in which something was run or published, the kernels, and generation where it was measured."""
    groups = dict.fromkeys(cell.group for cell in cells if cell.result or cell.published)
    return [*(group(cells, name) for name in groups), *measured()]


def named(cells: Sequence[Cell], name: str) -> Section:
    """One of `measured`, or a group. Raises ValueError for another name."""
    return next((section for section in measured() if section.title == name), None) or group(cells, name)


def group(cells: Sequence[Cell], name: str) -> Section:
    """The report of that name: models beside tasks where these are several, figures, and every run.

    Raises ValueError for another name.
    """
    mine = chosen(cells, name)
    configs = "\n".join(dict.fromkeys(f"- `{cell.file}`: {cell.about}" for cell in mine if cell.file))
    beside = [cell for cell in mine if cell.task not in AGAINST_WIDTH]
    several = len({cell.task for cell in beside}) > 1
    tables = [LEGEND, report_tables.summary(beside)] if several else []
    rows = [cell for cell in mine if cell.result or (cell in beside and not several)]
    runs = report_tables.runs(rows) if rows else ""
    parts = [configs, report_tables.accounts(mine), *tables, *figures(mine), runs]
    return Section(name.replace("_", " "), [part for part in parts if part])


def measured() -> list[Section]:
    """What kernels and generation cost, of the records there are."""
    sections = []
    if records := costs.read(costs.KERNELS):
        parts = _tables(KERNEL_TABLES, records)
        parts.append(Figure("kernels/length", "Time against the length", partial(costs.draw, records=records)))
        for device in sorted({r["device"] for r in records if costs.ours(r)}):
            mine = [r for r in records if r["device"] == device]
            parts += [f"### Every measurement on {device}", costs.table(mine)]
        sections.append(Section("kernels", [*parts, "### Sources", costs.sources(records)]))
    if records := costs.read(generation_costs.GENERATION):
        draw = partial(plots.compare, panels=generation_costs.panels(records))
        parts = [*_tables(GENERATION_TABLES, records), Figure("generation/generation", "Generation", draw)]
        sections.append(Section("generation", [*parts, "### Sources", costs.sources(records)]))
    return sections


def _tables(tables: dict[str, tuple[str, Callable]], records: Sequence[dict]) -> list[str | Figure]:
    return [text for title, table in tables.values() for text in (f"### {title}", table(records))]


def table(cells: Sequence[Cell], words: str) -> str:
    """One table by its words: "NAME runs" of what was run, "NAME summary" of models beside tasks, where NAME is a
    report's or "all"; or "kernels" or "generation" and a table of theirs. Raises ValueError for other words.
    """
    name, _, part = words.partition(" ")
    known = {"kernels": (KERNEL_TABLES, costs.KERNELS), "generation": (GENERATION_TABLES, generation_costs.GENERATION)}
    if name in known:
        tables, folder = known[name]
        if part not in tables:
            raise naming.unknown(f"table of {name}", part, tables)
        return tables[part][1](costs.read(folder))
    mine = list(cells) if name == "all" else chosen(cells, name)
    tables = {
        "runs": lambda: report_tables.runs([cell for cell in mine if cell.result]),
        "summary": lambda: report_tables.summary(mine),
    }
    if part not in tables:
        raise naming.unknown(f"table of {name}", part, tables)
    return tables[part]()
