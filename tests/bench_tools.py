"""What the benchmarks share: contenders timed in turn, so that a noisy machine is equally noisy for all of them."""

import json
import statistics
import time
from collections.abc import Callable, Mapping

MARK = "benchmark rows: "


def in_turn(contenders: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, list[float]]:
    """Return the seconds of every contender in each of `repeats` rounds, after one round that does not count."""
    seconds = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def against(what: str, ours: list[float], peers: Mapping[str, list[float]], at_most: Mapping[str, float]) -> list[dict]:
    """Return a row per peer: our seconds over theirs, round by round. `at_most` holds targets, where there are some."""
    rows = []
    for peer, theirs in peers.items():
        ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
        middle, target = statistics.median(ratios), at_most.get(peer)
        rows.append(
            {
                "what": what,
                "compared with": peer,
                "ours": f"{statistics.median(ours):.3g} s",
                "theirs": f"{statistics.median(theirs):.3g} s",
                "ours / theirs": f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                "target": "" if target is None else f"≤ {target:g}: {'met' if middle <= target else 'missed'}",
            }
        )
    return rows


def measured(what: str, value: str, target: str = "") -> dict:
    """Return a row for something that is measured and not compared."""
    return {"what": what, "compared with": "", "ours": value, "theirs": "", "ours / theirs": "", "target": target}


def hand_over(rows: list[dict]) -> None:
    """Print rows where bench_report.py finds them."""
    print(MARK + json.dumps(rows), flush=True)
