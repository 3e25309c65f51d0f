"""Repair of neurons and weights: seconds and memory against width and number of images, with the fitted exponents."""

import functools
import multiprocessing
import resource
import threading
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from bench_tools import hand_over, measured
from study import load_dataset, relu_network

from pruning_utils import prune_neurons, prune_weights, repair

WIDTHS, COUNTS = (250, 500, 1000, 2000, 4000), (1000, 3000, 10_000)
METHODS = {"neurons": prune_neurons, "weights": prune_weights}


def resident() -> int:
    """Return the bytes of memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_on_top(run: Callable) -> float:
    """Return by how many MB the process grew at most while `run` ran, looking every 5 ms."""
    start, sizes, done = resident(), [], threading.Event()

    def watch():
        while not done.wait(0.005):
            sizes.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (max(sizes, default=start) - start) / 1e6


def repair_once(what: str, width: int, count: int) -> tuple[float, float]:
    """Return median seconds of a repair without 80 %, two layers of `width` units, and the MB its first call takes."""
    dense = relu_network((width, width), seed=0)
    run = functools.partial(repair, METHODS[what](dense, 0.8), dense, load_dataset("mnist").x_train[:count])
    grown = memory_on_top(run)
    return sorted(timeit.repeat(run, number=1, repeat=3))[1], grown


def in_its_own_process(*arguments) -> tuple[float, float]:
    """A process that has run before would hide memory: it keeps what it has and takes it again."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(repair_once, *arguments).result()


def rows_of(what: str) -> list[dict]:
    grids = {
        "width": {f"width {width:,}, 3,000 images": (width, 3000) for width in WIDTHS},
        "number of images": {f"width 1,000, {count:,} images": (1000, count) for count in COUNTS},
    }
    rows = []
    for position, (axis, grid) in enumerate(grids.items()):
        results = {name: in_its_own_process(what, *sizes) for name, sizes in grid.items()}
        rows += [
            measured(f"repair of {what}, {name}", f"{seconds:.3g} s, {grown:.0f} MB on top")
            for name, (seconds, grown) in results.items()
        ]
        points = [(sizes[position], results[name][0]) for name, sizes in grid.items() if sizes[position] >= 1000]
        power = np.polyfit(*np.log(points).T, 1)[0]
        rows.append(
            measured(f"repair of {what}, seconds grow with the {axis}, from 1,000, to the power", f"{power:.2f}")
        )
    return rows


if __name__ == "__main__":
    hand_over(rows_of("neurons") + rows_of("weights"))
