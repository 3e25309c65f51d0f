"""The comparison that conftest.py gives to nbval: by hand first, then through a real run of nbval."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from conftest import ToleratedText
from nbclient import NotebookClient

TABLE = """method     sparsity    accuracy
------------------------------
norm         90 %    91.0 ± 2.7
random       90 %    35.2 ± 5.1

67 dead pixels, 2,384,000 weights"""


def equal(first: str, second: str) -> bool:
    """Compare both ways, and with `!=`, which is what nbval uses."""
    first, second = ToleratedText(first), ToleratedText(second)
    different, *equal = first != second, first == second, second == first
    assert equal == [not different] * 2
    return not different


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("91.0 ± 1.0", "97.1 ± 1.0"),  # 3 (1 + 1) + 0.1
        ("91.0 ± 0.0, 91 ± 0", "91.1 ± 0.0, 92 ± 0"),  # one unit of the last digit
        ("\u22120.1 ± 0.1, +0.1 ± 0.1", "-0.1 ± 0.1, -0.1 ± 0.1"),
        ("999.5 ± 3.2", "1,001.5 ± 3.2"),
        ("1,234,567 ± 9", "1,234,571 ± 9"),
        ("3.1 ± 0.2x, 3.1 ± 0.2.", "3.2 ± 0.2x, 3.0 ± 0.2."),
        (TABLE, TABLE.replace("91.0", "92.9").replace("35.2 ", "41.2 ")),
        (TABLE, TABLE.replace("    91.0 ± 2.7", "  100.0 ± 12.7").replace("---\n", "----\n")),
        (" sd\n1.0 ± 0.1", "  sd\n 1.0 ± 0.1"),
        ("nan ± nan", "nan ± nan"),
    ],
)
def test_equal(first, second):
    assert equal(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("91.0 ± 1.0", "97.2 ± 1.0"),
        ("91.0 ± 0.0", "91.2 ± 0.0"),
        ("1.0 ± 0.1", "-1.0 ± 0.1"),
        ("1,234 ± 1", "2,234 ± 1"),
        ("91.0 ± 2.7", "91.00 ± 2.7"),  # another number of digits
        ("91.0 ± 2.7", "91.0 ± 2.70"),
        ("91.0 ± 2.7", "91.0 ± "),
        ("91.0 ± 2.7", "nan ± nan"),
        ("1e-5 ± 1e-6", "2e-5 ± 1e-6"),  # no such notation: compared strictly
        ("1.0 ± 1.0e-9", "1.1 ± 1.0e-9"),
        ("1e-1 ± 2", "1e-2 ± 2"),
        ("1,23 ± 4", "1,29 ± 4"),
        ("1.0 ± 0.1 2.0 ± 0.1", "2.0 ± 0.1 1.0 ± 0.1"),
        (TABLE, TABLE.replace("random       90 %    35.2 ± 5.1\n", "")),
        (TABLE, TABLE.replace("norm         90 %", "norm         95 %")),
        (TABLE, TABLE.replace("\n\n", "\n")),
    ],
)
def test_different(first, second):
    assert not equal(first, second)


def test_only_text_is_tolerated_and_compared_with_plain_text():
    assert ToleratedText("91.0 ± 2.7") != "64.0 ± 2.7" and ToleratedText("1") != 1
    plugin = pytest.importorskip("nbval.plugin")
    cell = type("Cell", (), {"parent": type("File", (), {"sanitize_patterns": {"secret": "***"}})})
    for output in (None, 3, {"a": 1}, ["91.0 ± 2.7"]):
        assert plugin.IPyNbCell.sanitize(cell, output) is output
    cleaned = plugin.IPyNbCell.sanitize(cell, "secret 91.0 ± 2.7")
    assert type(cleaned).__name__ == "ToleratedText"
    assert cleaned == "*** 92.0 ± 2.7"  # nbval's own patterns still work


# --- Through nbval ------------------------------------------------------------------------------------------------

CELLS = [
    "import pandas as pd\nprint('method  accuracy')\nprint('norm   ', '91.0 ± 2.7')\nprint(67, 'dead pixels')",
    "pd.DataFrame({'method': ['random'], 'accuracy': ['35.2 ± 1.1'], 'units': [2700]})",
]


def executed() -> nbformat.NotebookNode:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS], metadata=kernel)
    return NotebookClient(notebook, timeout=60).execute()


def falsified(notebook: nbformat.NotebookNode, kind: str, old: str, new: str) -> nbformat.NotebookNode:
    """Return a copy in which `old`, in the output of a kind ("text" of a stream or a mime type), is shown as `new`."""
    notebook = copy.deepcopy(notebook)
    places = [output.get("data", output) for cell in notebook.cells for output in cell.outputs]
    (place,) = (place for place in places if old in place.get(kind, ""))
    place[kind] = place[kind].replace(old, new)
    return notebook


TOLERATED = {
    "mean_moved_a_little": ("text", "91.0 ± 2.7", "93.0 ± 2.7"),
    "mean_in_a_frame_moved_a_little": ("text/html", "35.2 ± 1.1", "36.0 ± 1.1"),
}
FALSIFIED = {
    "mean_moved_by_ten_sd": ("text", "91.0 ± 2.7", "64.0 ± 2.7"),
    "mean_in_a_frame_moved_by_ten_sd": ("text/html", "35.2 ± 1.1", "46.2 ± 1.1"),
    "label": ("text", "norm", "taylor"),
    "count": ("text", "67", "68"),
    "count_in_a_frame": ("text/html", "2700", "2701"),
}


def test_nbval_refuses_each_false_output_in_its_cell_and_nothing_else(tmp_path):
    """One process compares a notebook per change, beside a copy of conftest.py and away from this project."""
    notebook, changes = executed(), TOLERATED | FALSIFIED
    for name, change in changes.items():
        nbformat.write(falsified(notebook, *change), tmp_path / f"{name}.ipynb")
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "--junitxml=report.xml", "."]
    run = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True)
    outcomes = {}  # from the report: what is printed depends on the terminal and on the variable CI
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        cell = (Path(case.get("classname")).stem, int(case.get("name").removeprefix("Cell ")))
        outcomes[cell] = next((problem.get("message") for problem in case), None)
    assert set(outcomes) == {(name, cell) for name in changes for cell in (0, 1)}, run.stdout
    expected = {(name, int(kind == "text/html")) for name, (kind, _, _) in FALSIFIED.items()}
    assert {cell for cell, problem in outcomes.items() if problem} == expected, run.stdout
    assert all("Cell outputs differ" in outcomes[cell] for cell in expected)
    assert run.returncode == 1
