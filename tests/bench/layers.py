"""What quality layers cost: a file with layers, cut down to each of them, against one of that tier.

    python tests/bench/layers.py --model MODEL.gguf --text TEXT --book BOOK [--frames 768]
        [--windows 8] [--tiers archive,balanced,lossless]

Prints bytes, summed over the windows of ``tsc eval``, and what the layers add in percent: ``file``,
all of it, and ``frames``, the stored chunks alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import tscfile
from tscfile.demotion import demote
from tscfile.quality.codec import snapshot_from_arrays
from tscfile.quality.engine import Engine
from tscfile.quality.windows import choose_windows, read_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "text", "book"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tiers", default="archive,balanced,lossless")
    arguments = parser.parse_args()
    tiers = arguments.tiers.split(",")
    engine = Engine(arguments.model)
    text = read_text(arguments.text)
    documents = [engine.tokenize(document) for document in text.documents]
    # The windows of tsc eval, with its 256 tokens of continuation and the token that starts them.
    opening = np.full(0 if engine.bos is None else 1, engine.bos or 0, np.int32)
    length = arguments.frames + 257 - len(opening)
    windows = choose_windows(documents, length, arguments.windows, 0)
    sums = {tier: np.zeros(4) for tier in tiers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for window in windows:
            tokens = np.concatenate([opening, window.tokens])[: arguments.frames]
            cache = engine.prefill(tokens)
            for tier, found in measure(snapshot_from_arrays(cache), tiers, arguments, folder):
                sums[tier] += found
    print(f"{'tier':<10}{'alone':>12}{'layers':>12}{'file':>9}{'frames':>9}")
    for tier, (alone, layered, frames, all_frames) in sums.items():
        print(
            f"{tier:<10}{alone:>12.0f}{layered:>12.0f}{100 * (layered / alone - 1):>8.2f}%"
            f"{100 * (all_frames / frames - 1):>8.2f}%"
        )


def measure(snapshot, tiers, arguments, folder):  # type: ignore[no-untyped-def]
    whole = folder / "layers.tsc"
    tscfile.pack(snapshot, whole, tier=tiers, book=arguments.book, force=True)
    for tier in tiers:
        alone, cut = folder / "alone.tsc", folder / "cut.tsc"
        tscfile.pack(snapshot, alone, tier=tier, book=arguments.book, force=True)
        demote(whole, cut, tier, force=True)
        yield tier, (
            alone.stat().st_size, cut.stat().st_size,
            frame_bytes(alone, arguments.book), frame_bytes(cut, arguments.book),
        )  # fmt: skip


def frame_bytes(path: Path, book: Path) -> int:
    with tscfile.open(path, book=book) as archive:
        return sum(c.ref.length for block in archive.container.blocks for c in block.chunks)


if __name__ == "__main__":
    main()
