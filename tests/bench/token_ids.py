"""Bytes of a token id: learnt tables, none, and zstd; by length of the session.

    python tests/bench/token_ids.py tokenizer.json calibration.txt heldout.txt [other.txt …]

Sessions are windows of each text as ``tsc eval`` takes them; everything that is stored counts but
the tables, whose size is given beside. Speeds are those of one core, kernels compiled before.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tscfile.entropy import ints, zstd
from tscfile.entropy.token_ids import TokenCoder, learn
from tscfile.quality.windows import choose_windows, read_text

LENGTHS = (256, 768, 1792, 8192)
WINDOWS = 24
NOTHING = np.zeros(0, np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("tokenizer", "calibration"):
        parser.add_argument(name, type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    calibration = tokenize(tokenizer, arguments.calibration)
    started = time.perf_counter()
    tables = learn(calibration, tokenizer.get_vocab_size())
    seconds = time.perf_counter() - started
    stored = sum(len(zstd.compress(array.tobytes(), 19)) for array in tables.values())
    n_learnt = sum(map(len, calibration))
    print(f"tables: {stored / 1e3:.0f} kB of {n_learnt} tokens in {seconds:.0f} s")
    coders = {"tables": TokenCoder(tables, "tables"), "none": TokenCoder(None, "none")}
    print(f"{'':28}{'zstd':>8}{'none':>8}{'tables':>8}   tables, encode and decode")
    for text in arguments.text:
        documents = tokenize(tokenizer, text)
        for length in LENGTHS:
            sessions = [window.tokens for window in choose_windows(documents, length, WINDOWS, 0)]
            planes = sum(len(ints._encode_planes(ids)) for ids in sessions) / length / WINDOWS
            measured = {name: measure(coder, sessions) for name, coder in coders.items()}
            sizes = "".join(f"{measured[name][0]:8.3f}" for name in ("none", "tables"))
            speeds = " ".join(f"{speed / 1e3:5.0f}k tokens/s" for speed in measured["tables"][1:])
            print(f"{text.name:20}{length:8}{planes:8.3f}{sizes}   {speeds}")


def tokenize(tokenizer: Tokenizer, path: Path) -> list[NDArray[np.int32]]:
    parts = tokenizer.encode_batch(list(read_text(path).documents))
    return [np.array(part.ids, np.int32) for part in parts]


def measure(coder: TokenCoder, sessions: list[NDArray[np.int32]]) -> tuple[float, float, float]:
    """Bytes of a token, tokens a second to encode and to decode."""
    n_tokens = sum(map(len, sessions))
    coder.decode(coder.encode(sessions[0], NOTHING), len(sessions[0]), NOTHING, "warm")
    started = time.perf_counter()
    coded = [coder.encode(session, NOTHING) for session in sessions]
    between = time.perf_counter()
    for session, data in zip(sessions, coded, strict=True):
        found = coder.decode(data, len(session), NOTHING, "bench")
        assert np.array_equal(found, session)
    ended = time.perf_counter()
    n_bytes = sum(map(len, coded))
    return n_bytes / n_tokens, n_tokens / (between - started), n_tokens / (ended - between)


if __name__ == "__main__":
    main()
