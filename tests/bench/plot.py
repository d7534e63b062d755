"""``plot.py results.json plot.png``: each peer's time as a multiple of the kernel's.

Needs matplotlib, and nothing of this project: it is run by the Python that has it, Debian's.
"""

from __future__ import annotations

import json
import sys

from matplotlib import pyplot  # type: ignore[import-not-found]

MARKS = "osD^vP*X"


def main(source: str, target: str) -> None:
    """Draw the rows which the kernel has a figure for, the first at the top."""
    with open(source, encoding="utf-8") as file:
        report = json.load(file)
    rows = [row for row in report["rows"] if row["cells"].get("kernel", {}).get("median")]
    if not rows:
        sys.exit("no row has a figure for the kernel")
    height = 1.5 + 0.27 * len(rows)
    figure, axes = pyplot.subplots(figsize=(11, height), layout="constrained")
    for peer, mark in zip(report["peers"], MARKS, strict=False):
        points = [
            (row["cells"][peer]["median"] / row["cells"]["kernel"]["median"], place)
            for place, row in enumerate(rows)
            if row["cells"][peer]["median"] is not None
        ]
        ours = peer in report["own"]
        axes.plot(
            [ratio for ratio, _ in points],
            [place for _, place in points],
            mark,
            label=peer,
            markersize=8 if ours else 6,
            alpha=1.0 if ours else 0.6,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log")
    axes.set_xlabel("time as a multiple of the kernel overlayfs's; less is better")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=True, color="0.9")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, 1 + 1.1 / height), ncols=4, frameon=False)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
