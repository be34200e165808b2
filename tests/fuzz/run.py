"""Fuzz a reader for some time: python tests/fuzz/run.py TARGET --seconds 60

Needs atheris (``pip install 'tscfile[fuzz]'``). Inputs grow from ``corpus/TARGET`` and from what
``seeds.py`` makes; new ones go to ``--work``, so that a second run goes on from there. Findings are
kept in ``WORK/findings``, one file for each place where something undocumented was raised, with the
traceback beside it; the exit code is 1 if there are any. A crash of the interpreter or a run past
the time limit ends the run and leaves its input there too.

``python tests/fuzz/run.py TARGET --minimise`` makes ``corpus/TARGET`` anew of its own inputs and
those of ``--work``: the smallest first, as long as each leads where the ones before do not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
SLACK_BYTES = 64 << 20
_CHILD = "TSCFILE_FUZZING"
_PAGE = resource.getpagesize()


def bounded(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """``function`` with no more new memory than twice its input and `SLACK_BYTES`."""

    def run(data: bytes) -> None:
        with open("/proc/self/statm", "rb") as file:
            used = int(file.read().split()[0]) * _PAGE
        limit = used + 2 * len(data) + SLACK_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            function(data)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    return run


def collecting(function: Callable[[bytes], None], findings: Path) -> Callable[[bytes], None]:
    """``function`` that stores what it finds and goes on; of each place the smallest input."""
    smallest: dict[str, int] = {}

    def run(data: bytes) -> None:
        try:
            function(data)
        except Exception as error:
            place = _place(error)
            if len(data) >= smallest.get(place, 1 << 62):
                return
            smallest[place] = len(data)
            (findings / f"{place}.bin").write_bytes(data)
            text = "".join(traceback.format_exception(error))
            (findings / f"{place}.txt").write_text(text)
            print(f"FOUND {place}: {len(data)} bytes", file=sys.stderr, flush=True)

    return run


def _place(error: Exception) -> str:
    """What was raised and in which line of the project, as part of a file name."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "tscfile" in frame.filename or "kernels" in frame.filename]
    last = (own or frames)[-1]
    return f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--work", type=Path, help="a folder for new inputs and findings")
    parser.add_argument("--seed", type=int, default=0, help="the same for the same run; 0: any")
    parser.add_argument("--minimise", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    work = options.work or Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}-"))
    if options.minimise:
        minimise(options.target, work)
        return 0
    if _CHILD in os.environ:
        fuzz(options.target, options.seconds, options.seed, work)
        return 0
    # Each arena of the allocator reserves 64 MB of addresses, which are what is limited here.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", _CHILD: "1"}
    arguments = [sys.executable, *sys.argv]
    if options.work is None:
        arguments += ["--work", str(work)]
    code = subprocess.run(arguments, env=environment, check=False).returncode
    found = [path for path in sorted((work / "findings").glob("*")) if path.suffix != ".txt"]
    print(f"{len(found)} findings in {work / 'findings'}", *map(str, found), sep="\n")
    return 1 if found or code else 0


def fuzz(name: str, seconds: int, seed: int, work: Path) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    # Not the kernels, which Numba compiles from their bytecode.
    with atheris.instrument_imports(include=["tscfile"]):
        from mutators import MUTATORS
        from seeds import make_seeds
        from targets import TARGETS
    target, corpus = TARGETS[name], HERE / "corpus" / name
    inputs, seeds, findings = (work / part for part in ("inputs", "seeds", "findings"))
    for made in (inputs, seeds, findings, corpus):
        made.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(make_seeds(name)):
        assert len(data) <= target.most, f"seed {number} of {name} has {len(data)} bytes"
        (seeds / str(number)).write_bytes(data)
    run = collecting(target.run, findings)
    # What is loaded or compiled once is neither memory nor time of an input.
    for path in [*seeds.iterdir(), *corpus.iterdir()]:
        run(path.read_bytes())
    arguments = [
        sys.argv[0], f"-seed={seed}", f"-max_len={target.most}", f"-timeout={target.seconds}",
        "-rss_limit_mb=0", f"-artifact_prefix={findings}/", f"-max_total_time={seconds}",
        "-print_final_stats=1", str(inputs), str(seeds), str(corpus),
    ]  # fmt: skip
    atheris.Setup(arguments, bounded(run), custom_mutator=MUTATORS.get(name))
    atheris.Fuzz()


# --- the corpus ----------------------------------------------------------------------------------

_MOST_BYTES = 18 << 10
"""Of all inputs of a target that are kept."""


def minimise(name: str, work: Path) -> None:
    """Keep the inputs of ``work`` and the corpus that lead along some pair of lines first."""
    from targets import TARGETS

    corpus, run = HERE / "corpus" / name, TARGETS[name].run
    corpus.mkdir(parents=True, exist_ok=True)
    paths = [*corpus.iterdir(), *(work / "inputs").glob("*")]
    known: set[Step] = set()
    kept: dict[str, bytes] = {}
    for data in sorted({path.read_bytes() for path in paths}, key=lambda data: (len(data), data)):
        steps = _steps(run, data)
        if steps - known and sum(map(len, kept.values())) + len(data) <= _MOST_BYTES:
            known |= steps
            kept[hashlib.sha1(data).hexdigest()[:16]] = data
    for path in corpus.iterdir():
        path.unlink()
    for key, data in kept.items():
        (corpus / key).write_bytes(data)
    print(f"{corpus}: {len(kept)} inputs, {sum(map(len, kept.values()))} bytes")


Step = tuple[object, int, int]
"""Code and two lines in it, one after the other."""


def _steps(function: Callable[[bytes], None], data: bytes) -> set[Step]:
    steps: set[Step] = set()

    def enter(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if "/tscfile/" not in frame.f_code.co_filename:
            return None
        last = frame.f_code.co_firstlineno

        def follow(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            nonlocal last
            if event == "line":
                steps.add((frame.f_code, last, frame.f_lineno))
                last = frame.f_lineno
            return follow

        return follow

    sys.settrace(enter)
    try:
        function(data)
    finally:
        sys.settrace(None)
    return steps


if __name__ == "__main__":
    sys.exit(main())
