"""What the benchmarks share: where the study is, and the rows of the table they fill."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))  # where study.py is

MARK = "benchmark rows: "


def against(what: str, seconds: pd.DataFrame, at_most: Mapping[str, float] | None = None) -> list[dict]:
    """Return a row per peer of the column "ours": our seconds over theirs, round by round.

    seconds: as `time_in_turn` returns them; at_most: peer -> the target for the ratio.
    """
    rows = []
    for peer in seconds.columns.drop("ours"):
        ratios = seconds["ours"] / seconds[peer]
        middle, target = ratios.median(), (at_most or {}).get(peer)
        rows.append(
            {
                "what": what,
                "compared with": peer,
                "ours": f"{seconds['ours'].median():.3g} s",
                "theirs": f"{seconds[peer].median():.3g} s",
                "ours / theirs": f"{middle:.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
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
