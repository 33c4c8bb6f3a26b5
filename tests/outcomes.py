"""Numbered programs run in child processes, so that one that ends its process (XLA aborts) or hangs is seen too."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SECONDS = 240  # after which a program counts as hung
BORN = 60  # programs of one child: compiled programs stay in memory


@dataclass(frozen=True)
class Outcome:
    seed: int
    kind: str  # ok, refused, WRONG, CRASH
    words: str  # of the program
    what: str = ""

    def __str__(self) -> str:
        told = f" | {self.what}" if self.what else ""
        return f"{self.seed} {self.kind}{told} | {self.words}".replace("\n", " ; ")


def numbers(text: str) -> list[int]:
    """A range `0:500`, or numbers `3,7,11`."""
    first, _, last = text.partition(":")
    return list(range(int(first), int(last))) if last else [int(n) for n in text.split(",")]


def attempt(seed: int, words: str, run: Callable[[], None], trace: bool = False) -> Outcome:
    """What becomes of a program: `run` raises VerificationError where a number is wrong."""
    from meshwright.ir.errors import MeshwrightError, VerificationError

    try:
        run()
    except VerificationError as error:
        return Outcome(seed, "WRONG", words, str(error))
    except MeshwrightError as error:
        if trace:
            traceback.print_exc()
        return Outcome(seed, "refused", words, str(error))
    except Exception as error:
        if trace:
            traceback.print_exc()
        what = f"{_place(error)}: {type(error).__name__}: {str(error)[:200]}"
        return Outcome(seed, "CRASH", words, what)
    return Outcome(seed, "ok", words)


def _place(error: BaseException) -> str:
    """The innermost line of ours that an error passed."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename
    ]
    ours = [f for f in frames if "tests" not in f.filename] or frames
    return (
        f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"
    )


def off_by(want: Any, have: Any, before: Any) -> float:
    """How far two arrays are apart, of what the step moved; inf where one is not a number."""
    import numpy as np

    want, have = (np.asarray(each, np.float64) for each in (want, have))
    if want.shape != have.shape or not np.array_equal(np.isnan(want), np.isnan(have)):
        return float("inf")
    old = np.zeros_like(want) if before is None else np.asarray(before, np.float64)
    size = np.linalg.norm(want - old) + 1e-5 * np.linalg.norm(want) + 1e-9
    return float(np.linalg.norm(np.nan_to_num(have - want)) / size)


# ---------------------------------------------------------------- child processes


def here(found: Iterable[Outcome]) -> int:
    """Print outcomes as they come."""
    for outcome in found:
        print(outcome, flush=True)
    return 0


def told(lines: Iterable[str]) -> int:
    """Print lines as they come, then a summary; 1 if anything was wrong or crashed."""
    start, kept = time.monotonic(), []
    for line in lines:
        kept.append(line)
        print(line, flush=True)
    print(summary(kept), f"\n{time.monotonic() - start:.0f} s")
    return int(any(line.split()[1] in ("WRONG", "CRASH") for line in kept))


def outcomes(
    module: str, seeds: list[int], options: list[str], words: Callable[[int], str]
) -> Iterator[str]:
    """Lines of `python -m MODULE --seeds ... --child OPTIONS`; what a child dies of is the outcome of its last seed."""
    while seeds:
        child = _Child(module, seeds[:BORN], options)
        for line in child:
            yield line
            seeds = seeds[1:]
        if child.died and seeds:
            yield f"{seeds[0]} CRASH | {child.died} | {words(seeds[0])}"
            seeds = seeds[1:]


class _Child:
    def __init__(self, module: str, seeds: list[int], options: list[str]):
        command = [sys.executable, "-m", module, "--seeds", ",".join(map(str, seeds)), "--child"]
        self.left, self.died = len(seeds), ""
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __iter__(self) -> Iterator[str]:
        assert self.process.stdout is not None and self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        while self.left:
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            line = self.process.stdout.readline() if ready else ""
            if not line:
                self._end(hung=not ready)
                return
            if line[:1].isdigit():
                self.left -= 1
                yield line.rstrip()
        self.process.wait()

    def _end(self, hung: bool) -> None:
        if hung:
            self.process.kill()
        code, told = self.process.wait(), (self.process.stderr and self.process.stderr.read()) or ""
        first = next(
            (line for line in told.splitlines() if "Check failed" in line or "Error" in line), ""
        )
        self.died = (
            f"hung for {SECONDS} s" if hung else f"the process ended with {code}: {first[:200]}"
        )


def summary(lines: list[str]) -> str:
    kinds = Counter(line.split()[1] for line in lines)
    parts = [f"{kinds[kind]} {kind}" for kind in ("ok", "refused", "WRONG", "CRASH")]
    reasons = Counter(_reason(line) for line in lines if line.split()[1] != "ok")
    return "\n".join(
        [
            f"{len(lines)} programs: {', '.join(parts)}",
            *(f"{n:5d}  {r}" for r, n in reasons.most_common()),
        ]
    )


def _reason(line: str) -> str:
    """What was said of a program, without its numbers."""
    kind, what = line.split()[1], line.split(" | ")[1].split(" ; ")[0]
    return f"{kind} " + "".join("#" if c.isdigit() else c for c in what)[:150]


def prepare_process(devices: int) -> None:
    """So many CPU devices, and code made quickly rather than fast: it runs once."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    )
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
