"""Draw the rate-distortion curves of kept evaluations in one picture.

    python tests/bench/curves.py tests/quality/{peers,tiers,nobook}-768.json -o curves-768.png

The reports must be of one model, text and choice of windows. Of a codec that is in several of them
the first is drawn.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tscfile.quality.plot import draw
from tscfile.quality.protocol import Report
from tscfile.quality.report import from_json

SAME = ("model", "text", "n_windows", "seed")


def join(reports: list[Report]) -> Report:
    first = reports[0]
    for other in reports[1:]:
        for key in SAME:
            if other.conditions.get(key) != first.conditions.get(key):
                raise SystemExit(f"the reports differ in {key}")
    results = {}
    for report in reports:
        for each in report.results:
            results.setdefault((each.family, each.codec, each.frames), each)
    return replace(first, results=list(results.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw(join([from_json(path.read_text(encoding="utf-8")) for path in arguments.reports]),
         arguments.output)  # fmt: skip


if __name__ == "__main__":
    main()
