"""What nbval cannot see: that notebooks were saved from one clean run, and that prose and README say what they show.

Each check takes a notebook and returns its complaints; the last section breaks a good notebook in every way.
"""

import copy
import functools
import re
import subprocess
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from conftest import PAIR, ToleratedText

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("[0-9]*.ipynb"))
Notebook = nbformat.NotebookNode
# What a table of claims may say. A claim must hold; a hypothesis may turn out wrong, and nbval compares the verdict.
ALLOWED = {"holds": ("True",), "verdict": ("supported", "refuted", "undecided")}


@functools.cache
def read(name: str) -> Notebook:
    return nbformat.read(FOLDER / name, as_version=4)


@functools.cache
def regenerated() -> bool:
    """Tell whether the notebooks were run again on this machine since they were committed."""
    try:
        return subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "notebooks/*.ipynb"], cwd=ROOT).returncode != 0
    except FileNotFoundError:
        return True


def text_type() -> type[str]:
    """Return how numbers in prose are compared with those in outputs: exactly, as long as both are the committed ones.

    After `make study` on another processor the last digits of the outputs differ from the README, which is right about
    the machine it was written on: then the tolerance of nbval applies.
    """
    return ToleratedText if regenerated() else str


# --- Reading a notebook -------------------------------------------------------------------------------------------


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def outputs(notebook: Notebook) -> list[Notebook]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def output_texts(notebook: Notebook) -> list[str]:
    """Return all text in outputs; a picture is no text, and its base64 may well contain `/tmp/`."""
    texts = []
    for output in outputs(notebook):
        texts += [output[key] for key in ("text", "evalue") if key in output] + list(output.get("traceback", []))
        texts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return texts


def prose(notebook: Notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def has_figure(cell: Notebook) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


class _Tables(HTMLParser):
    """Collect `tables`: for each one its head and its body, lists of rows, which are lists of texts."""

    def __init__(self):
        super().__init__()
        self.tables, self.part, self.cell = [], "tbody", None

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append({"thead": [], "tbody": []})
        elif tag in ("thead", "tbody"):
            self.part = tag
        elif tag == "tr":
            self.tables[-1][self.part].append([])
        elif tag in ("th", "td"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[-1][self.part][-1].append(self.cell.strip())
            self.cell = None


def tables(notebook: Notebook) -> list[tuple[list[str], list[list[str]]]]:
    """Return (header, rows) of each HTML table; where pandas writes two header rows, the lower one names the index."""
    found = []
    for output in outputs(notebook):
        parser = _Tables()
        parser.feed(output.get("data", {}).get("text/html", ""))
        for table in parser.tables:
            header = [next(filter(None, reversed(column)), "") for column in zip(*table["thead"], strict=False)]
            found.append((header, table["tbody"]))
    return found


def pairs(texts: Iterable[str]) -> list[str]:
    return [match.group() for text in texts for match in PAIR.finditer(text)]


# --- Checks of a notebook -----------------------------------------------------------------------------------------


def check_run_in_order(notebook: Notebook) -> list[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    expected = list(range(1, len(counts) + 1))
    return [] if counts == expected else [f"not saved from Restart and Run All: counts {counts}"]


def check_no_errors(notebook: Notebook) -> list[str]:
    errors = [f"error: {output.ename}" for output in outputs(notebook) if output.output_type == "error"]
    return errors + [f"stderr: {output.text!r}" for output in outputs(notebook) if output.get("name") == "stderr"]


def check_no_trace_of_the_machine(notebook: Notebook) -> list[str]:
    trace = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/|\b[A-Z]:\\|\b0x[0-9a-fA-F]{6,}")
    texts = output_texts(notebook) + [cell.source for cell in notebook.cells]
    return [f"machine path or address {match.group()!r}" for text in texts for match in trace.finditer(text)]


def check_no_widgets(notebook: Notebook) -> list[str]:
    view = "application/vnd.jupyter.widget-view+json"
    shown = any(view in output.get("data", {}) for output in outputs(notebook))
    return ["widget state or view is saved"] if shown or "widgets" in notebook.metadata else []


def check_kernel(notebook: Notebook) -> list[str]:
    name = notebook.metadata.get("kernelspec", {}).get("name")
    return [] if name == "python3" else [f"kernelspec is {name!r}, not 'python3'"]


def check_size(notebook: Notebook) -> list[str]:
    size = len(nbformat.writes(notebook).encode())
    return [] if size < 1_000_000 else [f"{size:,} bytes, 1 MB is too much"]


def check_figures_are_explained(notebook: Notebook) -> list[str]:
    followers = [*notebook.cells[1:], None]
    return [
        f"no sentence under the figure of cell {number}"
        for number, (cell, after) in enumerate(zip(notebook.cells, followers, strict=True))
        if has_figure(cell) and not (after and after.cell_type == "markdown" and after.source.strip())
    ]


def check_figures_have_alt_text(notebook: Notebook) -> list[str]:
    figures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    alts = [output.get("metadata", {}).get("image/png", {}).get("alt", "") for output in figures]
    return [f"figure {number} has no alt text" for number, alt in enumerate(alts, 1) if not alt.strip()]


def check_title(notebook: Notebook) -> list[str]:
    first = notebook.cells[0]
    titles = re.findall(r"(?m)^# .*", re.sub(r"(?ms)^```.*?^```", "", prose(notebook)))
    starts = first.cell_type == "markdown" and first.source.startswith("# ")
    return [] if starts and len(titles) == 1 else [f"must start with its only H1, has {titles}"]


def check_tags(notebook: Notebook) -> list[str]:
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])} - {"nbval-ignore-output"}
    comments = re.findall(r"#\s*(?:NBVAL|PYTEST_VALIDATE)\w*", "\n".join(cell.source for cell in notebook.cells))
    return [f"unknown tag {tag!r}" for tag in tags] + [f"{comment!r}: use the tag" for comment in comments]


def check_lengths(notebook: Notebook) -> list[str]:
    lines = max((len(cell.source.splitlines()) for cell in code_cells(notebook)), default=0)
    words = sum(any(map(str.isalnum, word)) for word in prose(notebook).split())
    measured = {
        "lines in the longest code cell": (lines, 1, 25),
        "cells": (len(notebook.cells), 20, 40),
        "words of prose": (words, 600, 1700),
    }
    return [
        f"{value} {what}, allowed are {low} to {high}"
        for what, (value, low, high) in measured.items()
        if not low <= value <= high
    ]


def check_claims_hold(notebook: Notebook) -> list[str]:
    # Counted from the right: pandas puts its index, with or without a header, on the left.
    columns = [
        (name, row[header.index(name) - len(header)])
        for header, rows in tables(notebook)
        for name in ALLOWED
        if name in header
        for row in rows
    ]
    if not columns:
        return ["no table of claims with a column 'holds' or 'verdict'"]
    return [f"a claim has {value!r} under {name!r}" for name, value in columns if value not in ALLOWED[name]]


def check_prose_numbers(notebook: Notebook, text: type[str] = str, others: Iterable[Notebook] = ()) -> list[str]:
    return unsupported_pairs(prose(notebook), [notebook, *others], text)


def check_links(notebook: Notebook) -> list[str]:
    return broken_links(prose(notebook), FOLDER)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


# --- Checks of prose, for the README too --------------------------------------------------------------------------


def unsupported_pairs(markdown: str, notebooks: list[Notebook], text: type[str]) -> list[str]:
    """Return a complaint for each `a ± s` in prose that no cell computes, or that is written in another way."""
    shown = pairs(output for notebook in notebooks for output in output_texts(notebook))
    stated = pairs([markdown])
    complaints = [f"{pair!r} is in no output" for pair in stated if not any(text(pair) == other for other in shown)]
    lookalikes = re.findall(r"[0-9]\s*%?\s*(?:±|\\pm|&plusmn;|\+/-)\s*[0-9]", markdown)
    if len(lookalikes) != len(stated):
        complaints.append(f"write every mean and sd as `1.0 ± 0.1`: {lookalikes}")
    return complaints


def broken_links(markdown: str, folder: Path) -> list[str]:
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", markdown) + re.findall(r"(?:src|href)=[\"']([^\"']+)", markdown)
    local = [target for target in targets if not re.match(r"https?:|mailto:|#", target)]
    return [f"broken link {target!r}" for target in local if not (folder / unquote(target.split("#")[0])).exists()]


def split_readme(readme: str) -> tuple[list[list[list[str]]], str]:
    """Return the results tables, lists of rows of which the first is the header, and the README without them."""
    block = re.compile(r"<!-- results -->\n(.*?)<!-- /results -->", re.DOTALL)
    found = []
    for text in block.findall(readme):
        rows = [[cell.strip(" *`") for cell in line.strip().strip("|").split("|")] for line in text.split("\n") if line]
        found.append(rows[:1] + rows[2:])
    return found, block.sub("", readme)


def readme_problems(readme: str, notebooks: list[Notebook], text: type[str]) -> list[str]:
    """Return what the README says and no notebook shows; each results table must be one that a notebook displays."""
    found, rest = split_readme(readme)
    complaints = unsupported_pairs(rest, notebooks, text)
    if not found or "results -->" in rest:
        return [*complaints, "README has no results table between <!-- results --> and <!-- /results -->"]
    shown = [[head, *body] for notebook in notebooks for head, body in tables(notebook)]
    shown += [[row[1:] for row in other] for other in shown if other[0][:1] == [""]]  # without the unnamed index
    for table in found:
        if not any(same_table(table, other, text) for other in shown):
            complaints.append(f"the README's results table {table[0]} is displayed by no notebook")
    return complaints


def same_table(first: list[list[str]], second: list[list[str]], text: type[str]) -> bool:
    shapes = [[len(row) for row in table] for table in (first, second)]
    return shapes[0] == shapes[1] and all(
        text(one) == other
        for row, other_row in zip(first, second, strict=True)
        for one, other in zip(row, other_row, strict=True)
    )


# --- The notebooks and the README of this project -----------------------------------------------------------------


def test_notebooks_are_numbered_from_one_and_no_number_twice():
    """A notebook that grew too long is continued under the same number: 04, 04b, 04c."""
    labels = [name.split("_")[0] for name in NAMES]
    assert all(re.fullmatch("[0-9]{2}[b-z]?", label) for label in labels)
    assert len(set(labels)) == len(labels)
    assert sorted({int(label[:2]) for label in labels}) == list(range(1, int(labels[-1][:2]) + 1))
    assert {label[:2] for label in labels} <= set(labels)


@pytest.mark.parametrize("name", NAMES)
def test_notebook(name):
    checks = [check for check in CHECKS if check is not check_prose_numbers]
    # The first of several notebooks under one number may state what the others computed.
    others = [read(other) for other in NAMES if name[2] == "_" and other[:2] == name[:2]]
    checks.append(functools.partial(check_prose_numbers, text=text_type(), others=others))
    assert [complaint for check in checks for complaint in check(read(name))] == []
    nbformat.validate(read(name))


def test_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_problems(readme, [read(name) for name in NAMES], text_type()) == []
    assert broken_links(readme, ROOT) == []


# --- The checks can fail ------------------------------------------------------------------------------------------

# As pandas writes them, without and with a name of the index.
CLAIMS = """<table>
<thead><tr><th></th><th>claim</th><th>evidence</th><th>holds</th></tr></thead>
<tbody><tr><th>0</th><td>norm &gt; random</td><td>91.0 ± 2.7 &gt; 35.2 ± 5.1</td><td>True</td></tr></tbody>
</table>"""
RESULTS = """<table>
<thead><tr><th></th><th>MNIST</th><th>units</th></tr><tr><th>method</th><th></th><th></th></tr></thead>
<tbody><tr><th>norm</th><td>91.0 ± 2.7</td><td>270</td></tr>
<tr><th>random</th><td>35.2 ± 5.1</td><td>270</td></tr></tbody>
</table>"""
README = """# Title

Norm keeps **91.0 ± 2.7** %, see [the test](tests/test_notebooks.py#here).

<!-- results -->
| method | MNIST | units |
|---|---:|---:|
| norm | 91.0 ± 2.7 | 270 |
| random | 35.2 ± 5.1 | 270 |
<!-- /results -->
"""


def good_notebook() -> Notebook:
    v4 = nbformat.v4
    figure = v4.new_output("display_data", {"image/png": "/tmp/"}, metadata={"image/png": {"alt": "Two falling lines"}})
    shown = [
        v4.new_output("stream", text="norm 91.0 ± 2.7 at 0x1f\n"),
        v4.new_output("display_data", {"text/html": CLAIMS}),
        v4.new_output("display_data", {"text/html": RESULTS}),
        figure,
    ]
    code = [v4.new_code_cell(f"show({n})", execution_count=n, outputs=[out]) for n, out in enumerate(shown, 1)]
    title = "# What goes?\n\nIt keeps 91.0 ± 2.7 %, see [test](../tests/test_notebooks.py).\n```\n# comment\n```"
    prose_cells = [v4.new_markdown_cell("A sentence of some words. " * 8) for _ in range(16)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(
        cells=[v4.new_markdown_cell(title), *code, *prose_cells],  # 0, 1 to 4, 5 to 20
        metadata={"kernelspec": kernel},
    )


def put(notebook: Notebook, number: int, **output: str | dict) -> None:
    notebook.cells[number].outputs.append(nbformat.from_dict(output))


def append(notebook: Notebook, number: int, source: str) -> None:
    notebook.cells[number].source += source


def replace(notebook: Notebook, number: int, old: str, new: str) -> None:
    data = notebook.cells[number].outputs[0].data
    assert old in data["text/html"]
    data["text/html"] = data["text/html"].replace(old, new)


BREAKS = [
    (check_run_in_order, lambda nb: nb.cells[2].update(execution_count=7)),
    (check_run_in_order, lambda nb: nb.cells[2].update(execution_count=None)),
    (check_run_in_order, lambda nb: [cell.update(execution_count=cell.execution_count + 1) for cell in code_cells(nb)]),
    (check_no_errors, lambda nb: put(nb, 1, output_type="stream", name="stderr", text="warning")),
    (check_no_errors, lambda nb: put(nb, 1, output_type="error", ename="ValueError", evalue="", traceback=[])),
    (check_no_trace_of_the_machine, lambda nb: put(nb, 1, output_type="stream", name="stdout", text="/home/a/b")),
    (
        check_no_trace_of_the_machine,
        lambda nb: put(nb, 1, output_type="stream", name="stdout", text="<X at 0x7f12ab34>"),
    ),
    (check_no_trace_of_the_machine, lambda nb: put(nb, 1, output_type="display_data", data={"text/html": "/tmp/x"})),
    (check_no_trace_of_the_machine, lambda nb: put(nb, 1, output_type="display_data", data={"text/plain": "C:\\x"})),
    (check_no_trace_of_the_machine, lambda nb: append(nb, 1, "\nopen('/root/x')")),
    (check_no_widgets, lambda nb: nb.metadata.update(widgets={})),
    (
        check_no_widgets,
        lambda nb: put(nb, 1, output_type="display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
    ),
    (check_kernel, lambda nb: nb.metadata.kernelspec.update(name="venv")),
    (check_kernel, lambda nb: nb.metadata.pop("kernelspec")),
    (check_size, lambda nb: nb.cells[4].outputs[0].data.update({"image/png": "A" * 1_000_000})),
    (check_figures_are_explained, lambda nb: nb.cells[5].update(source=" ")),
    (check_figures_are_explained, lambda nb: nb.cells.append(nb.cells.pop(4))),
    (check_figures_have_alt_text, lambda nb: nb.cells[4].outputs[0].update(metadata={})),
    (check_figures_have_alt_text, lambda nb: nb.cells[4].outputs[0].metadata["image/png"].update(alt=" ")),
    (check_title, lambda nb: append(nb, 0, "\n# Another")),
    (check_title, lambda nb: nb.cells.insert(0, nb.cells.pop())),
    (check_tags, lambda nb: nb.cells[1].metadata.update(tags=["nbval-skip"])),
    (check_tags, lambda nb: append(nb, 1, "  # NBVAL_SKIP")),
    (check_lengths, lambda nb: append(nb, 1, "\npass" * 25)),
    (check_lengths, lambda nb: [nb.cells.pop() for _ in range(2)]),
    (check_lengths, lambda nb: nb.cells.extend(nb.cells[-1:] * 20)),
    (check_lengths, lambda nb: append(nb, 0, " word" * 1100)),
    (check_lengths, lambda nb: [cell.update(source="A | word.") for cell in nb.cells[5:]]),
    (check_claims_hold, lambda nb: replace(nb, 2, "True", "False")),
    (check_claims_hold, lambda nb: replace(nb, 2, "True", "")),
    (check_claims_hold, lambda nb: replace(nb, 2, "holds", "true")),
    (check_claims_hold, lambda nb: replace(nb, 2, "holds", "verdict")),
    (check_claims_hold, lambda nb: replace(nb, 3, "units", "verdict")),
    (check_claims_hold, lambda nb: replace(nb, 2, CLAIMS, CLAIMS.split("<tbody>")[0] + "</table>")),
    (check_prose_numbers, lambda nb: append(nb, 0, "\nIt keeps 91.0 ± 2.8 %.")),
    (check_prose_numbers, lambda nb: append(nb, 0, "\nIt keeps 1.0 ± 2.7 %.")),
    (check_prose_numbers, lambda nb: append(nb, 0, "\nIt keeps $91.0 \\pm 2.7$ %.")),
    (check_prose_numbers, lambda nb: append(nb, 0, "\nIt keeps 91.0±2.7 %.")),
    (check_links, lambda nb: append(nb, 0, "\n[next](99_nothing.ipynb)")),
    (check_links, lambda nb: append(nb, 0, '\n<img src="figures/nothing.png">')),
]


def test_good_notebook_has_no_complaints():
    assert [complaint for check in CHECKS for complaint in check(good_notebook())] == []
    assert {check for check, _ in BREAKS} == set(CHECKS)


@pytest.mark.parametrize(("check", "break_it"), BREAKS)
def test_broken_notebook(check: Callable, break_it: Callable):
    notebook = good_notebook()
    break_it(notebook)
    assert check(notebook)


@pytest.mark.parametrize("word", ["supported", "refuted", "undecided"])
def test_a_table_of_claims_may_give_verdicts(word):
    notebook = good_notebook()
    replace(notebook, 2, "holds", "verdict")
    replace(notebook, 2, "True", word)
    assert check_claims_hold(notebook) == []


def test_numbers_in_prose_may_come_from_the_notebooks_that_continue_it():
    notebook, other = good_notebook(), good_notebook()
    append(notebook, 0, "\nIt keeps 17.0 ± 2.8 %.")
    replace(other, 3, "35.2 ± 5.1", "17.0 ± 2.8")
    assert check_prose_numbers(notebook)
    assert check_prose_numbers(notebook, others=[other]) == []


def test_checks_change_nothing():
    notebook = good_notebook()
    before = copy.deepcopy(notebook)
    assert [check(notebook) for check in CHECKS]
    assert notebook == before


def test_good_readme_has_no_complaints():
    assert readme_problems(README, [good_notebook()], str) == []
    assert broken_links(README, ROOT) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 91.0 ± 2.7", "| 91.1 ± 2.7"),
        ("| 91.0 ± 2.7", "| 91.0"),
        ("| 35.2 ± 5.1 | 270", "| 35.2 ± 5.1 | 271"),
        ("| random | 35.2 ± 5.1 | 270 |\n", ""),
        ("| random", "| taylor"),
        ("| MNIST", "| Fashion-MNIST"),
        (" units |\n", " units | more |\n"),
        ("<!-- results -->", ""),
        ("<!-- /results -->", ""),
        ("**91.0 ± 2.7**", "**91.0 ± 2.6**"),
    ],
)
def test_broken_readme(old, new):
    assert old in README
    assert readme_problems(README.replace(old, new), [good_notebook()], str)


def test_every_results_table_of_the_readme_is_compared():
    block = README[README.index("<!-- results -->") :]
    assert readme_problems(README + block, [good_notebook()], str) == []
    assert readme_problems(README + block.replace("35.2", "35.3"), [good_notebook()], str)


def test_regenerated_numbers_are_tolerated_and_words_are_not():
    """After `make study` on another machine the README may differ by what nbval allows, and by nothing else."""
    other_machine = README.replace("91.0 ± 2.7", "92.3 ± 2.1")
    assert readme_problems(other_machine, [good_notebook()], str)
    assert readme_problems(other_machine, [good_notebook()], ToleratedText) == []
    assert readme_problems(other_machine.replace("270", "271"), [good_notebook()], ToleratedText)
    assert readme_problems(other_machine.replace("92.3", "64.0"), [good_notebook()], ToleratedText)
