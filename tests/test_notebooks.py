"""What nbval cannot see: that notebooks were saved from one clean run, and that prose and README say what they show."""

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import PAIR, ToleratedText

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
Notebook = nbformat.NotebookNode
IGNORED = "nbval-ignore-output"  # the one tag: what this cell shows is not compared, so nothing may rest on it
# What a table of claims may say. A claim must hold; a hypothesis may turn out wrong, and nbval compares the verdict.
ALLOWED = {"holds": {"True"}, "verdict": {"supported", "refuted", "undecided"}}


@functools.cache
def read(name: str) -> Notebook:
    return nbformat.read(FOLDER / name, as_version=4)


@functools.cache
def text_type() -> type[str]:
    """How to compare numbers in prose with outputs: exactly; but as nbval does if `make study` ran here since."""
    changed = ["git", "diff", "--quiet", "HEAD", "--", "notebooks/*.ipynb"]
    return ToleratedText if not shutil.which("git") or subprocess.run(changed, cwd=ROOT).returncode else str


def code_cells(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def compared(notebook: Notebook) -> list[Notebook]:
    return [cell for cell in code_cells(notebook) if IGNORED not in cell.metadata.get("tags", [])]


def outputs(cells: Iterable[Notebook]) -> list[Notebook]:
    return [output for cell in cells for output in cell.get("outputs", [])]


def output_texts(cells: Iterable[Notebook]) -> list[str]:
    """Return all text in outputs; a picture is no text, and its base64 may well contain `/tmp/`."""
    texts = []
    for output in outputs(cells):
        texts += [output[key] for key in ("text", "evalue") if key in output] + list(output.get("traceback", []))
        texts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return texts


def prose(notebook: Notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tables(notebook: Notebook) -> list[list[list[str]]]:
    """Return the HTML tables, the header first; where pandas writes two header rows, the lower one names the index."""
    found = []
    for output in outputs(compared(notebook)):
        for table in BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser").find_all("table"):
            head, body = (
                [[cell.get_text().strip() for cell in row.find_all(["th", "td"])] for row in table.select(f"{part} tr")]
                for part in ("thead", "tbody")
            )
            found.append([[next(filter(None, column[::-1]), "") for column in zip(*head, strict=False)], *body])
    return found


# --- Checks of a notebook -----------------------------------------------------------------------------------------


def complaints(notebook: Notebook) -> list[str]:
    checks = (run_from_top_to_bottom, shown_on_github, no_trace_of_the_machine, compared_by_nbval, claims_hold)
    return [complaint for check in checks for complaint in check(notebook)] + broken_links(prose(notebook), FOLDER)


def run_from_top_to_bottom(notebook: Notebook) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"not saved from Restart and Run All: counts {counts}"
    for cell in code_cells(notebook):
        if re.search(r"(?m)^(?:show|display|print)\(", cell.source) and not cell.outputs:
            yield f"shows something and has no output: {cell.source!r}"
    for output in outputs(notebook.cells):
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"an error or a warning: {output}"


def shown_on_github(notebook: Notebook) -> Iterator[str]:
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "kernelspec is not 'python3', which is the one that every reader has"
    if (size := len(nbformat.writes(notebook).encode())) >= 1_000_000:
        yield f"{size:,} bytes, more than 1 MB may not be shown"
    for output in outputs(notebook.cells):
        data, alt = output.get("data", {}), output.get("metadata", {}).get("image/png", {}).get("alt", "")
        if "application/vnd.jupyter.widget-view+json" in data:
            yield "a widget is not shown"
        if "image/png" in data and not alt.strip():
            yield "a figure has no alt text"


def no_trace_of_the_machine(notebook: Notebook) -> list[str]:
    trace = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/|\b[A-Z]:\\|\b0x[0-9a-fA-F]{6,}")
    texts = output_texts(notebook.cells) + [cell.source for cell in notebook.cells]
    return [f"machine path or address {match.group()!r}" for text in texts for match in trace.finditer(text)]


def compared_by_nbval(notebook: Notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        if set(cell.metadata.get("tags", [])) - {IGNORED} or re.search(r"#\s*(NBVAL|PYTEST_VALIDATE)", cell.source):
            yield f"no tag but {IGNORED} is allowed: {cell.source!r}"
        if re.search(r"\}[^\"'\n]?±|±[^\"'\n]?\{|([\"']) ± \1|\\u00b1|\\xb1", cell.source):
            yield f"write it by mean_sd or mean_interval: {cell.source!r}"
    for cell in compared(notebook):
        if re.search(r"\b(device|time_in_turn|perf_counter|timeit)\(", cell.source) and output_texts([cell]):
            yield f"depends on the machine, tag it {IGNORED}: {cell.source!r}"


def claims_hold(notebook: Notebook) -> Iterator[str]:
    for header, *rows in tables(notebook):
        for name in set(ALLOWED) & set(header):
            # Counted from the right: pandas puts its index, with or without a header, on the left.
            values = {row[header.index(name) - len(header)] for row in rows}
            if not values <= ALLOWED[name]:
                yield f"a claim has one of {values} under {name!r}"


def unsupported_pairs(markdown: str, notebooks: list[Notebook], text: type[str]) -> list[str]:
    """Complain about each `a ± s` in prose that no compared cell shows, or that is written in another way."""
    shown = "\n".join(output for notebook in notebooks for output in output_texts(compared(notebook)))
    stated, shown = ([match.group() for match in PAIR.finditer(each)] for each in (markdown, shown))
    problems = [f"{pair!r} is in no output" for pair in stated if not any(text(pair) == other for other in shown)]
    lookalikes = re.findall(r"[0-9]\s*%?\s*(?:±|\\pm|&plusmn;|\+/-)\s*[0-9]", markdown)
    if len(lookalikes) != len(stated):
        problems.append(f"write every mean and sd as `1.0 ± 0.1`: {lookalikes}")
    return problems


def links(markdown: str) -> list[str]:
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", markdown) + re.findall(r"(?:src|href)=[\"']([^\"']+)", markdown)
    return [unquote(link.split("#")[0]) for link in found if not re.match(r"https?:|mailto:|#", link)]


def broken_links(markdown: str, folder: Path) -> list[str]:
    return [f"broken link {link!r}" for link in links(markdown) if not (folder / link).exists()]


def readme_problems(readme: str, notebooks: list[Notebook], text: type[str]) -> list[str]:
    """Return what the README says and no notebook shows; each results table must be one that a notebook displays."""
    block = re.compile(r"(?s)<!-- results -->\n(.*?)<!-- /results -->")
    rest = block.sub("", readme)
    problems = unsupported_pairs(rest, notebooks, text)
    if not block.search(readme) or "results -->" in rest:
        return [*problems, "README has no results table between <!-- results --> and <!-- /results -->"]
    shown = [table for notebook in notebooks for table in tables(notebook)]
    shown += [[row[1:] for row in table] for table in shown if table[0][:1] == [""]]  # without the unnamed index
    for lines in block.findall(readme):
        head, _, *body = ([cell.strip(" *`") for cell in line.strip("| ").split("|")] for line in lines.splitlines())
        if [[text(cell) for cell in row] for row in [head, *body]] not in shown:
            problems.append(f"the README's results table {head} is displayed by no notebook")
    return problems


# --- The notebooks and the README of this project -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_notebook(name):
    nbformat.validate(read(name))
    assert complaints(read(name)) == []
    # One of several notebooks under one number may state what the others computed.
    assert unsupported_pairs(prose(read(name)), [read(o) for o in NAMES if o[:2] == name[:2]], text_type()) == []


def test_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_problems(readme, [read(name) for name in NAMES], text_type()) == []
    assert broken_links(readme, ROOT) == []
    assert {f"notebooks/{name}" for name in NAMES} <= set(links(readme))


# --- The checks can fail ------------------------------------------------------------------------------------------

# As pandas writes them, without and with a name of the index.
CLAIMS = """<table><thead><tr><th></th><th>claim</th><th>evidence</th><th>holds</th></tr></thead>
<tbody><tr><th>0</th><td>norm &gt; random</td><td>91.0 ± 2.7</td><td>True</td></tr></tbody></table>"""
RESULTS = """<table>
<thead><tr><th></th><th>MNIST</th><th>units</th></tr><tr><th>method</th><th></th><th></th></tr></thead>
<tbody><tr><th>norm</th><td>91.0 ± 2.7</td><td>270</td></tr>
<tr><th>random</th><td>35.2 ± 5.1</td><td>270</td></tr></tbody></table>"""
README = """
Norm keeps **91.0 ± 2.7** %, see [the test](tests/test_notebooks.py#here).
<!-- results -->
| method | MNIST | units |
|---|---:|---:|
| norm | 91.0 ± 2.7 | 270 |
| random | 35.2 ± 5.1 | 270 |
<!-- /results -->
"""


def good_notebook() -> Notebook:
    """A title with prose; then cells that show a text, a table of claims, one of results, a figure; and a time."""
    v4 = nbformat.v4
    shown = [
        v4.new_output("stream", text="norm 91.0 ± 2.7 at 0x1f\n"),
        v4.new_output("display_data", {"text/html": CLAIMS}),
        v4.new_output("display_data", {"text/html": RESULTS}),
        v4.new_output("display_data", {"image/png": "/tmp/"}, metadata={"image/png": {"alt": "Two falling lines"}}),
        v4.new_output("stream", text="2 CPU cores, 17.0 ± 2.8 ms\n"),
    ]
    code = [v4.new_code_cell(f"show({n})", execution_count=n, outputs=[out]) for n, out in enumerate(shown, 1)]
    code[-1].update(source="print(device())", metadata={"tags": [IGNORED]})
    title = "# What goes?\n\nIt keeps 91.0 ± 2.7 %, see [test](../tests/test_notebooks.py)."
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=[v4.new_markdown_cell(title), *code], metadata={"kernelspec": kernel})


def put(notebook: Notebook, kind: str, text: str = "") -> None:
    notebook.cells[1].outputs.append(nbformat.v4.new_output("display_data", {kind: text}))


def replace(notebook: Notebook, number: int, old: str, new: str) -> None:
    data = notebook.cells[number].outputs[0].data
    assert old in data["text/html"]
    data["text/html"] = data["text/html"].replace(old, new)


BREAKS = [
    ("Run All", lambda nb: nb.cells[5].update(execution_count=None)),
    ("Run All", lambda nb: nb.cells.append(nb.cells.pop(1))),
    ("no output", lambda nb: nb.cells[1].outputs.clear()),
    ("error or a warning", lambda nb: nb.cells[1].outputs[0].update(name="stderr")),
    ("error or a warning", lambda nb: nb.cells[1].outputs.append(nbformat.v4.new_output("error"))),
    ("address '/home/", lambda nb: nb.cells[1].outputs[0].update(text="/home/a/b")),
    ("address '0x7f", lambda nb: put(nb, "text/plain", "<X at 0x7f12ab34>")),
    ("address 'C:", lambda nb: put(nb, "text/plain", "C:\\x")),
    ("address '/root/", lambda nb: nb.cells[1].update(source="open('/root/x')")),
    ("a widget", lambda nb: put(nb, "application/vnd.jupyter.widget-view+json")),
    ("kernelspec", lambda nb: nb.metadata.kernelspec.update(name="venv")),
    ("bytes", lambda nb: nb.cells[4].outputs[0].data.update({"image/png": "A" * 1_000_000})),
    ("alt text", lambda nb: nb.cells[4].outputs[0].metadata["image/png"].update(alt=" ")),
    ("no tag but", lambda nb: nb.cells[1].metadata.update(tags=["nbval-skip"])),
    ("no tag but", lambda nb: nb.cells[1].update(source="f()  # NBVAL_SKIP")),
    ("on the machine", lambda nb: nb.cells[5].metadata.clear()),
    ("by mean_sd", lambda nb: nb.cells[1].update(source="print(f'{mean:.1f} ± {sd:.1f}')")),
    ("by mean_sd", lambda nb: nb.cells[1].update(source="print(mean + ' ± ' + sd)")),
    ("a claim", lambda nb: replace(nb, 2, "True", "False")),
    ("a claim", lambda nb: replace(nb, 2, "holds", "verdict")),
    ("a claim", lambda nb: replace(nb, 3, "units", "verdict")),
    ("link '99", lambda nb: nb.cells[0].update(source="[next](99_nothing.ipynb)")),
    ("link 'fig", lambda nb: nb.cells[0].update(source='<img src="figures/nothing.png">')),
]


def test_a_good_notebook_and_readme_have_no_complaints_also_with_a_verdict_and_with_numbers_of_another_machine():
    notebook = good_notebook()
    assert complaints(notebook) == readme_problems(README, [notebook], str) == []
    replace(notebook, 2, "holds", "verdict")
    replace(notebook, 2, "True", "refuted")
    assert complaints(notebook) == []
    other_machine = README.replace("91.0 ± 2.7", "92.3 ± 2.1")
    assert readme_problems(other_machine, [notebook], ToleratedText) == []
    assert readme_problems(other_machine.replace("270", "271"), [notebook], ToleratedText)


@pytest.mark.parametrize(("expected", "break_it"), BREAKS)
def test_broken_notebook(expected, break_it):
    notebook = good_notebook()
    break_it(notebook)
    (complaint,) = complaints(notebook)
    assert expected in complaint


# Shown nowhere; shown, but in a time, which is not compared; and written in two other ways.
@pytest.mark.parametrize("sentence", ["91.0 ± 2.8 %", "17.0 ± 2.8 ms", "$91.0 \\pm 2.7$ %", "91.0±2.7 %"])
def test_numbers_in_prose_are_those_of_compared_outputs(sentence):
    assert unsupported_pairs("91.0 ± 2.7 %, or 35.2 ± 5.1", [good_notebook()], str) == []
    assert len(unsupported_pairs(sentence, [good_notebook()], str)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| 91.0 ± 2.7", "| 91.1 ± 2.7"),
        ("| random | 35.2 ± 5.1 | 270 |\n", ""),
        ("| MNIST", "| Fashion-MNIST"),
        ("<!-- results -->", ""),
        ("**91.0 ± 2.7**", "**91.0 ± 2.6**"),
        (README, README + README.replace("35.2", "35.3")),
    ],
)
def test_broken_readme(old, new):
    assert readme_problems(README.replace(old, new), [good_notebook()], str)
