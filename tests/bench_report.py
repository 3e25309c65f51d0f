"""Run every benchmark, or those that are named, in a process of its own and write data/bench.md: `make bench`."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from bench_tools import MARK

HERE = Path(__file__).parent
NAMES = ("training", "sweep", "masks", "repair")
FILE = HERE.parent / "data" / "bench.md"
ABOUT = """# Benchmark

Written by `make bench`, or one section by `python tests/bench_report.py sweep`. Contenders take turns; a ratio is the
median over rounds, with the smallest and the largest. Below 1 we are faster. Training and sweeps:
784-1000-1000-500-200-10, batches of 128 with Adam, ten sparsities on 10,000 test images. Repair: two hidden layers of
equal width without 80 %."""
COLUMNS = ("what", "compared with", "ours", "theirs", "ours / theirs", "target")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rows_of(name: str) -> list[dict]:
    print(f"bench_{name} …", file=sys.stderr, flush=True)
    settings = {"capture_output": True, "text": True, "env": os.environ | {"TQDM_DISABLE": "1"}}
    done = subprocess.run([sys.executable, HERE / f"bench_{name}.py"], **settings)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\nbench_{name}.py ended with status {done.returncode}; no table was written")
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return json.loads(line.removeprefix(MARK))


def table(rows: list[dict]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections() -> dict[str, str]:
    """Return the text of every benchmark in the file, of those of this run their new text."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras", "numpy", "torch", "jax"))
    where = (
        f"{processor()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {packages}, {date.today()}."
    )
    found = dict(re.findall(r"(?ms)^## (\w+)\n\n(.*?)\n(?=\n## |\Z)", FILE.read_text("utf-8"))) if FILE.exists() else {}
    return {name: found.get(name) for name in NAMES} | {
        name: f"{where}\n\n{table(rows_of(name))}" for name in sys.argv[1:] or NAMES
    }


if __name__ == "__main__":
    parts = [f"## {name}\n\n{text}" for name, text in sections().items() if text]
    text = "\n\n".join([ABOUT, *parts]) + "\n"
    print(text)
    FILE.write_text(text, encoding="utf-8")
