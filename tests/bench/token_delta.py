"""What token-position delta saves, from the kept measurements.

    python tests/bench/token_delta.py tests/quality/delta-768.json tests/quality/delta-1792.json

Bytes are compared with the same coder without a delta: as they are, in percent of the tier's whole
file, and at equal KL, where the coder without a delta is taken between its tiers on straight lines
of both logarithms. The files are made by ``tsc eval --codecs near,balanced,compact,archive,
rotated-k4v2,delta`` with the reference model, its book and both texts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tscfile.quality.book_delta import NONE, delta_name, settings
from tscfile.quality.protocol import CodecResult
from tscfile.quality.report import from_json

TIERS = ("near", "balanced", "compact", "archive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    for path in parser.parse_args().reports:
        report = from_json(path.read_text())
        by_name = {each.codec: each for each in report.results}
        alone = [by_name[delta_name(tier, NONE)] for tier in TIERS]
        print(f"{path.name}: saved, % of the file; of bytes at equal KL, and at equal KL of recall")
        for name, (tier, every, _) in settings().items():
            if every == NONE or name not in by_name:
                continue
            found, base = by_name[name], by_name[delta_name(tier, NONE)]
            saved = (base.stored_bytes - found.stored_bytes) / by_name[tier].stored_bytes
            equal = [saved_at_equal_kl(alone, found, recall) for recall in (False, True)]
            print(f"  {name:30}{100 * saved:8.2f}" + "".join(f"{100 * x:8.2f}" for x in equal))


def saved_at_equal_kl(alone: list[CodecResult], found: CodecResult, recall: bool) -> float:
    """Share of bytes saved against the coder without a delta at the KL that ``found`` has."""
    kls = np.log([kl_of(each, recall) for each in alone])
    sizes = np.log([each.stored_bytes for each in alone])
    kl = np.log(kl_of(found, recall))
    # Beyond the outermost tiers the nearest two go on.
    i = int(np.clip(np.searchsorted(kls, kl), 1, len(kls) - 1))
    slope = (sizes[i] - sizes[i - 1]) / (kls[i] - kls[i - 1])
    return float(1 - found.stored_bytes / np.exp(sizes[i - 1] + slope * (kl - kls[i - 1])))


def kl_of(result: CodecResult, recall: bool) -> float:
    quality = result.recall if recall else result.continuation
    assert quality is not None
    return quality.kl_mean


if __name__ == "__main__":
    main()
