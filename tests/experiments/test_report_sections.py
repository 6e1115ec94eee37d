"""Groups of configs and their records as tables, figures, a Markdown text, a page and a README's tables."""

import html.parser
import json

import pytest

from experiments import (
    commandline,
    generation_costs,
    report,
    report_cells,
    report_figures,
    report_page,
    report_sections,
    report_tables,
)
from tests.experiments.test_generation_speed import record

CONFIG = '''"""{head}"""
from configs.state_tracking import parity

{models}

def get_config(preset):
    config = parity.get_config(preset)
    config.task.name = "{task}"
    return config
'''
SWEEP = """
def sweep(add, preset):
    for model in ("mamba3", "mamba3_none"):
        add(f"{model},{preset}")
"""
TASK = {"name": "parity", "lengths": (40, 160), "stage_steps": 9, "test_length": 256}
RUN = {"learning_rate": 0.01, "seed": 0, "value": 99.0, "further": {"test_512": 40.0}}


def write(results, task, model, preset, value, *, metric="scaled_accuracy", options=TASK, width=64, **more):
    folder = results / task / f"{model}-{preset}"
    folder.mkdir(parents=True)
    result = dict(task=task, model=model, preset=preset, metric=metric, published=None, value=value, seeds=[0])
    result |= dict(parameters=1234, tokens_per_second=5678, wall_seconds=90.0, gpu_seconds=90.0, date="2026-11-29")
    result |= dict(hardware="1 x NVIDIA H200", command=f"train <{model}> & more", **more)
    (folder / "result.json").write_text(json.dumps(result))
    config = {"task": options | {"name": task}, "model": {"width": width}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configs of two tasks in a folder and one beside it, and four runs: one planned, one with replicas, two others."""
    root = tmp_path_factory.mktemp("report")
    configs, results = root / "configs", root / "results"
    (configs / "counting").mkdir(parents=True)
    sizes = 'SIZES = ("demo", "paper", "smoke")'
    (configs / "counting" / "__init__.py").write_text(sizes)  # of all files in the folder
    (configs / "counting" / "bits.py").write_text(CONFIG.format(head="Bits.", models="", task="parity") + SWEEP)
    pairs = CONFIG.format(head="Pairs.", models='MODELS = ("mamba2", "attention")', task="even_pairs")
    (configs / "counting" / "pairs.py").write_text(pairs)
    (configs / "alone.py").write_text(
        CONFIG.format(head="Alone.", models=f'MODELS = ("mamba",)\n{sizes}', task="cycle")
    )
    (configs / "shared.py").write_text("def helper():\n    pass\n")
    replicas = [RUN, RUN | {"learning_rate": 0.1}, RUN | {"seed": 1}, RUN | {"learning_rate": 0.1, "seed": 1}]
    further = {"test_512": 40.0, "test_1024": None}
    several = dict(seeds=[0, 1], median=98.0, replicas=replicas, further=further)
    write(results, "parity", "mamba3", "paper", 99.0, **several)
    write(results, "parity", "mamba2", "paper", 0.5, further={"test_512": -1.0})
    write(results, "parity", "mamba2", "demo", 0.0)
    options = {"length": 16, "vocabulary": 16, "pairs": (2,)}
    for width in (64, 32):
        write(results, "mqar", "mamba2", f"l16_d{width}", width, metric="accuracy", options=options, width=width)
    return configs, results


@pytest.fixture(scope="module")
def cells(folders):
    return report_cells.cells(*folders)


def test_cells_are_the_plans_and_what_else_was_run(cells):
    found = [(cell.group, cell.task, cell.model, cell.size, cell.result is not None) for cell in cells]
    assert found == [
        ("counting", "parity", "mamba3", "paper", True),
        ("counting", "parity", "mamba3_none", "paper", False),
        ("counting", "parity", "mamba2", "demo", True),
        ("counting", "parity", "mamba2", "paper", True),
        ("counting", "even_pairs", "mamba2", "paper", False),
        ("counting", "even_pairs", "attention", "paper", False),
        ("alone", "cycle", "mamba", "paper", False),
        ("mqar", "mqar", "mamba2", "l16_d32", True),
        ("mqar", "mqar", "mamba2", "l16_d64", True),
    ]
    counts = {name: len(report_cells.chosen(cells, name)) for name in ("counting", "bits", "even_pairs", "alone")}
    assert counts == {"counting": 6, "bits": 4, "even_pairs": 2, "alone": 1}
    with pytest.raises(ValueError, match="unknown report 'paritty'; did you mean 'parity'"):
        report_cells.chosen(cells, "paritty")


def test_the_plans_are_the_published_tables():
    plans = report_cells.planned(report_cells.CONFIGS)
    assert len({cell.key for cell in plans}) == len(plans), "two cells would have one record"
    tables = [cell for cell in plans if cell.group == "state_tracking" and cell.published]
    assert len(tables) == 15 and {cell.size for cell in tables} == {"paper"}
    mqar = [(cell.model, cell.config["model"]["width"], cell.size) for cell in plans if cell.task == "mqar"]
    assert len(mqar) == 6 * 4 * 3 and ("mamba2_n16", 32, "l1024_d32") in mqar


def test_models_beside_tasks(cells):
    """Best (median) [published], in the metric; what was not run is empty but for what is published."""
    assert report_tables.summary(report_cells.chosen(cells, "counting")).splitlines() == [
        "| model | parity, scaled accuracy (%) | even_pairs, scaled accuracy (%) |",
        "| --- | --- | --- |",
        "| mamba3 (paper) | 99.00 (98.00) [100.00] |  |",
        "| mamba3_none (paper) | [2.27] |  |",
        "| mamba2 (demo) | 0.00 |  |",
        "| mamba2 (paper) | 0.50 | [0.90] |",
        "| attention (paper) |  |  |",
    ]


def test_runs_one_a_row(cells):
    mine = report_cells.chosen(cells, "parity")
    head, _, *rows = ([c.strip() for c in row.split("|")[1:-1]] for row in report_tables.runs(mine).splitlines())
    first, empty, other, _ = (dict(zip(head, row, strict=True)) for row in rows)
    assert first["ours"] == "99.00 % (raw 99.50 %)" and first["median"] == "98.00 % (raw 99.00 %)"
    assert empty["paper"] == "2.27 % (raw 51.13 %), Lahoti et al. 2026" and first["seeds"] == "0, 1 x 2 learning rates"
    assert (first["GPU minutes"], first["time"], first["date"]) == ("1.5", "0:01:30", "2026-11-29")
    assert {name for name, value in empty.items() if value} == {"task", "model", "paper"}
    assert (other["median"], other["paper"], other["seeds"]) == ("", "", "0")
    assert report_tables.accounts(mine) == "3 of 4 cells were run, in 4.5 GPU minutes."
    assert "median" not in report_tables.runs(mine[1:]), "a column that no row fills"


def test_figures_are_the_records(cells):
    found = report_figures.panels(cells)
    assert list(found) == ["parity/lengths-paper", "mqar/widths"]
    (lengths,), (widths,) = (panels for _, panels in found.values())
    assert lengths.series == {"mamba3": [(256, 99.0), (512, 40.0)], "mamba2": [(256, 0.5), (512, -1.0)]}
    assert (lengths.levels, lengths.marks) == ({"chance": 0.0}, {"longest in training": 160})
    assert widths.series == {"mamba2": [(32, 32), (64, 64)]} and widths.title == "16 tokens"


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data.strip())


def test_the_page_needs_nothing_else(folders, cells, tmp_path, monkeypatch, capsys):
    for name, folder in zip(("CONFIGS", "RESULTS"), folders, strict=True):
        monkeypatch.setattr(report, name, folder)
    file = tmp_path / "report.html"
    assert commandline.run(report.main, ["report", "counting", "--html", str(file), "--write", str(tmp_path)]) == 0
    written = [tmp_path / name for name in ("counting.md", "parity/lengths-paper.svg")]
    assert capsys.readouterr().out.splitlines() == [f"written {path}" for path in (file, *written)]
    page = Page(file.read_text())
    assert page.links[0] == "#counting" and page.links[1].startswith("data:image/svg+xml;base64,")
    assert len(page.links) == 2 and not {"script", "link", "mamba3"} & set(page.tags)
    commands = [cell.result["command"] for cell in report_cells.chosen(cells, "counting") if cell.result]
    assert len(commands) == 3 and set(commands) < set(page.words)
    text = written[0].read_text()
    assert "](parity/lengths-paper.svg)" in text and "- `configs/counting/bits.py`: Bits.\n" in text
    assert commandline.run(report.main, ["report", "counting"]) == 0
    assert capsys.readouterr().out.count(".svg") == 0, "printed, where no figure is drawn"


def test_everything(cells, tmp_path, monkeypatch):
    """Groups in which nothing was run or published are left out; kernels and generation are in, with their sources."""
    about = {"date": "2026-11-29", "versions": {"jax": "0.11.2"}, "command": "python -m experiments.generation_speed"}
    (tmp_path / "gpu.jsonl").write_text(json.dumps(record("mamba2", 8, 600, 300, shape="", **about)) + "\n")
    monkeypatch.setattr(generation_costs, "GENERATION", tmp_path)
    titles = [section.title for section in report_sections.everything(cells)]
    assert titles == ["counting", "mqar", "kernels", "generation"]
    text = report_page.markdown(report_sections.everything(cells), "All")
    assert "kernels_pallas.benchmark" in text and "### Every measurement on NVIDIA H200" in text
    assert "| GPU | 2026-11-29 | jax 0.11.2 | `python -m experiments.generation_speed` |" in text
    assert "| mamba2, 1.34 B | 8 |" in report_sections.table(cells, "generation rates")
    assert report_sections.named(cells, "generation").title == "generation"


def test_marked_tables_are_made_again(cells):
    text = "a\n<!-- report: parity runs -->\nold\n<!-- end -->\nb\n<!-- report: all summary --><!-- end -->\n"
    made = report_page.marked(text.replace("--><", "-->\n<"), lambda words: report_sections.table(cells, words))
    assert "old" not in made and made.count("| mamba3_none") == 1 and made.startswith("a\n<!-- report: parity runs -->")
    assert report_page.marked(made, lambda words: report_sections.table(cells, words)) == made
    for words, message in {
        "parity rus": "unknown table of parity 'rus'",
        "kernels": "unknown table of kernels ''",
    }.items():
        with pytest.raises(ValueError, match=message):
            report_sections.table(cells, words)
