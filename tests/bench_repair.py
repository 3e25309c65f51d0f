"""Repair of neurons and weights: seconds and memory against width and number of images, with the fitted exponents."""

import functools
import threading
import time

import numpy as np
import psutil
from bench_tools import hand_over, measured

from pruning_utils import load_dataset, prune_neurons, prune_weights, relu_network, repair, time_in_turn

WIDTHS, COUNTS = (250, 500, 1000, 2000, 4000), (1000, 3000, 10_000)
x = load_dataset("mnist").x_train


def memory_on_top(run) -> float:
    """Return by how many MB the process grew at most while `run` ran, looking every 5 ms."""
    process, stop = psutil.Process(), threading.Event()
    start = most = process.memory_info().rss

    def watch():
        nonlocal most
        while not stop.is_set():
            most = max(most, process.memory_info().rss)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    stop.set()
    watcher.join()
    return (most - start) / 1e6


def timed(prune, width: int, count: int) -> tuple[float, float]:
    """Return the median seconds of a repair without 80 %, two layers of `width` units, and the MB it needs on top."""
    dense = relu_network((width, width), seed=0)
    run = functools.partial(repair, prune(dense, 0.8), dense, x[:count])
    return time_in_turn({"repair": run}, rounds=3)["repair"].median(), memory_on_top(run)


def rows_of(what: str, prune) -> list[dict]:
    grids = {
        "with the width": {width: timed(prune, width, 3000) for width in WIDTHS},
        "with the images": {count: timed(prune, 1000, count) for count in COUNTS},
    }
    sizes = {"with the width": "width {:,}, 3,000 images", "with the images": "width 1,000, {:,} images"}
    rows = []
    for grid, results in grids.items():
        for size, (seconds, grown) in results.items():
            name = f"repair of {what}, {sizes[grid].format(size)}"
            rows.append(measured(name, f"{seconds:.3g} s, {grown:.0f} MB on top"))
        largest = {size: seconds for size, (seconds, _) in results.items() if size >= 1000}
        power = np.polyfit(np.log(list(largest)), np.log(list(largest.values())), 1)[0]
        rows.append(measured(f"repair of {what}, seconds grow {grid} (from 1,000 on) to the power", f"{power:.2f}"))
    return rows


if __name__ == "__main__":
    hand_over(rows_of("neurons", prune_neurons) + rows_of("weights", prune_weights))
