"""Execute notebooks in place and say which cell runs: python notebooks/run.py notebooks/02_weight_pruning.ipynb"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> None:
    """Execute a notebook in its own folder and write it back; if a cell fails, the file stays as it was."""
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()

    def say(text: str) -> None:
        print(f"{path.stem}, {(time.perf_counter() - start) / 60:.1f} minutes: {text}", flush=True)

    def before(cell, cell_index: int) -> None:
        prose = [above.source for above in notebook.cells[:cell_index] if above.cell_type == "markdown"]
        headings = [line.lstrip("# ") for text in prose for line in text.splitlines() if line.startswith("#")]
        say(f"cell {cell_index + 1} of {len(notebook.cells)}, {(headings or ['start'])[-1]}")

    settings = {"timeout": 1800, "record_timing": False, "resources": {"metadata": {"path": str(path.parent)}}}
    NotebookClient(notebook, on_cell_execute=before, **settings).execute()
    nbformat.write(notebook, path)
    say("done")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
