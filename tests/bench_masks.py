"""The masks alone: 10^6, 10^7 and 10^8 scores, 90 % removed, and the memory they take."""

import math
import tracemalloc

import numpy as np
import torch
from bench_tools import against, hand_over, measured
from study import time_in_turn

from pruning_utils import keep_masks


def plain_mask(scores: np.ndarray, threshold: float) -> np.ndarray:
    return scores > threshold


def contenders(scores: np.ndarray) -> dict:
    removed = round(0.9 * scores.size)
    return {
        "ours": lambda: keep_masks({"layer": scores}, 0.9),
        "full sort": lambda: plain_mask(scores, np.sort(scores)[removed - 1]),
        "numpy.partition": lambda: plain_mask(scores, np.partition(scores, removed - 1)[removed - 1]),
        "torch.kthvalue": lambda: plain_mask(scores, float(torch.kthvalue(torch.from_numpy(scores), removed).values)),
        "one copy of the scores, the limit of memory": lambda: scores.copy(),
    }


if __name__ == "__main__":
    rows, medians = [], []
    for power in (6, 7, 8):
        scores = np.abs(np.random.default_rng(0).standard_normal(10**power, dtype=np.float32))
        seconds = time_in_turn(contenders(scores), rounds=9 if power < 8 else 3)
        medians.append(seconds["ours"].median())
        rows += against(f"masks of 10^{power} weights", seconds, {"full sort": 0.25} if power == 8 else {})
    tracemalloc.start()
    keep_masks({"layer": scores}, 0.9)
    peak = tracemalloc.get_traced_memory()[1] / scores.nbytes
    met = "met" if peak <= 2 else "missed"
    rows.append(measured("masks of 10^8 weights, memory on top", f"{peak:.2f} × the weights", f"≤ 2: {met}"))
    growth = math.log10(medians[2] / medians[0]) / 2
    rows.append(measured("masks, seconds grow with the number of weights to the power", f"{growth:.2f}"))
    hand_over(rows)
