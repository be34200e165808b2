"""What a conversation costs that is saved after every turn, in one archive.

    python tests/bench/series.py MODEL.gguf heldout.txt BOOK [--turns 20] [--tokens 90] [--json OUT]

Each window of the text is a conversation that grows by ``--tokens`` a turn. Its first save is
packed, the others are appended in the same tier. *Series ratio*: fp16 bytes of all saves over the
size of the file, of which *chunks* are the frames. *Snapshot ratio*: fp16 bytes of the last save
over what of the file restores it. *Alone*: the ratio of the last save packed by itself. KL and
recall KL are those of the last save, taken out of the archive: the next 256 tokens, and 128 from
the middle of the context, fed as in ``tsc eval``. The book is counted nowhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tscfile.archive import Archive
from tscfile.description import describe
from tscfile.quality.arrays import KVArrays
from tscfile.quality.codec import TierCodec
from tscfile.quality.engine import Engine
from tscfile.quality.metrics import compare
from tscfile.quality.windows import choose_windows, read_text
from tscfile.tiers import TIERS

N_CONTINUE, N_RECALL = 256, 128


def measure(
    engine: Engine, codec: TierCodec, saves: list[KVArrays], feeds: list[np.ndarray], book: Path
) -> dict[str, Any]:
    last = saves[-1]
    n = last.shape.n_tokens
    data, alone = codec.encode_series(saves), codec.encode(last)
    with tempfile.TemporaryDirectory(prefix="tscfile-") as folder:
        path = Path(folder) / "series.tsc"
        path.write_bytes(data)
        with Archive(path, book=book) as archive:
            info = describe(archive)
            blocks = archive.container.blocks
            chunks = sum(chunk.ref.length for block in blocks for chunk in block.chunks)
    row: dict[str, Any] = {
        "file_bytes": len(data),
        "chunk_bytes": chunks,
        "alone_bytes": len(alone),
        "series_ratio": sum(save.raw_bytes for save in saves) / len(data),
        "snapshot_ratio": info.snapshot_ratio,
        "alone_ratio": last.raw_bytes / len(alone),
    }
    if TIERS[codec.name].codec is None:
        return row
    for name, archived in (("", data), ("alone_", alone)):
        restored = codec.decode(archived, last.shape)
        for kind, feed in zip(("kl", "recall_kl"), feeds, strict=True):
            before, after = (engine.proceed(c, feed[:-1], n) for c in (last, restored))
            row[name + kind] = float(compare(before, after, feed[1:]).kl.mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "text", "book"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=90)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tiers", default=",".join(TIERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = Engine(arguments.model)
    documents = [engine.tokenize(part) for part in read_text(arguments.text).documents]
    n = arguments.turns * arguments.tokens
    found: dict[str, list[dict[str, Any]]] = {}
    for window in choose_windows(documents, n + N_CONTINUE + 1, arguments.windows, 0):
        last = engine.prefill(window.tokens[:n])
        saves = [last.head(arguments.tokens * turn) for turn in range(1, arguments.turns + 1)]
        middle = (n - N_RECALL) // 2
        feeds = [window.tokens[n:], window.tokens[middle : middle + N_RECALL + 1]]
        for tier in arguments.tiers.split(","):
            codec = TierCodec(tier, None if TIERS[tier].exact else arguments.book)
            row = measure(engine, codec, saves, feeds, arguments.book)
            found.setdefault(tier, []).append(row)
    print(
        f"{arguments.turns} saves, {arguments.tokens} to {n} tokens, {arguments.windows} windows\n"
        f"{'':10}{'file':>10}{'chunks':>10}{'series':>9}{'snapshot':>10}{'alone':>9}"
        f"{'KL':>9}{'recall':>9}{'alone KL':>9}{'recall':>9}"
    )
    summary = {
        tier: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        for tier, rows in found.items()
    }
    for tier, row in summary.items():
        keys = ("kl", "recall_kl", "alone_kl", "alone_recall_kl")
        kls = "".join(f"{row[k]:9.4f}" if k in row else f"{'-':>9}" for k in keys)
        print(
            f"{tier:10}{row['file_bytes']:10.0f}{row['chunk_bytes']:10.0f}{row['series_ratio']:9.1f}"
            f"{row['snapshot_ratio']:10.2f}{row['alone_ratio']:9.2f}{kls}"
        )
    if arguments.json:
        conditions = {
            "model": arguments.model.name, "text": arguments.text.name, "book": arguments.book.name,
            "turns": arguments.turns, "tokens": arguments.tokens, "n_windows": arguments.windows,
        }  # fmt: skip
        whole = {"conditions": conditions, "tiers": summary, "windows": found}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
