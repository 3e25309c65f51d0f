"""Repair of neurons and weights: seconds and memory against width and number of images, with the fitted exponents."""

import functools
import threading
import time

import numpy as np
import psutil
from bench_tools import hand_over, in_turn, measured

from pruning_utils import load_dataset, prune_neurons, prune_weights, relu_network, repair

WIDTHS, COUNTS = (250, 500, 1000, 2000, 4000), (1000, 3000, 10_000)
x = load_dataset("mnist").x_train


def exponent(sizes, seconds) -> float:
    return np.polyfit(np.log(sizes), np.log(seconds), 1)[0]


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


if __name__ == "__main__":
    rows = []
    for what, prune in (("neurons", prune_neurons), ("weights", prune_weights)):
        times = []
        for width in WIDTHS:
            dense = relu_network((width, width), seed=0)
            run = functools.partial(repair, prune(dense, 0.8), dense, x[:3000])
            seconds = sorted(in_turn({"repair": run}, repeats=3)["repair"])[1]
            times.append(seconds)
            grown = memory_on_top(run)
            rows.append(
                measured(f"repair of {what}, width {width:,}, 3,000 images", f"{seconds:.3g} s, {grown:.0f} MB on top")
            )
        rows.append(
            measured(
                f"repair of {what}, seconds grow with the width to the power", f"{exponent(WIDTHS[2:], times[2:]):.2f}"
            )
        )
        times = []
        for count in COUNTS:
            dense = relu_network((1000, 1000), seed=0)
            run = functools.partial(repair, prune(dense, 0.8), dense, x[:count])
            times.append(sorted(in_turn({"repair": run}, repeats=3)["repair"])[1])
            rows.append(measured(f"repair of {what}, width 1,000, {count:,} images", f"{times[-1]:.3g} s"))
        rows.append(
            measured(f"repair of {what}, seconds grow with the images to the power", f"{exponent(COUNTS, times):.2f}")
        )
    hand_over(rows)
