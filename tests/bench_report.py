"""Run every benchmark in a process of its own and write one table to data/bench.md: `make bench`."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from bench_tools import MARK

HERE = Path(__file__).parent
NAMES = ("training", "sweep", "masks", "repair")
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


if __name__ == "__main__":
    names = sys.argv[1:] or NAMES
    packages = ", ".join(f"{name} {version(name)}" for name in ("tensorflow", "keras", "numpy", "torch", "jax"))
    rows = [row for name in names for row in rows_of(name)]
    text = (
        f"# Benchmark\n\nOne run of `make bench` on {processor()}, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, {packages}. Contenders take turns; a ratio is the median over rounds, with the "
        f"smallest and the largest. Below 1 we are faster. Training and sweeps: 784-1000-1000-500-200-10, batches of "
        f"128 with Adam, ten sparsities on 10,000 test images. Repair: two hidden layers of equal width without 80 %."
        f"\n\n{table(rows)}\n"
    )
    print(text)
    if set(names) == set(NAMES):
        (HERE.parent / "data" / "bench.md").write_text(text, encoding="utf-8")
