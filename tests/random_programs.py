"""Random training steps, planned and run on emulated devices, compared with plain `jax.jit`: a tool and a test.

    python -m tests.random_programs --seeds 0:500               without pipelines
    python -m tests.random_programs --seeds 0:500 --pipelines   with them
    python -m tests.random_programs --seeds 17 --trace          one seed, with its traceback

One line per seed: `ok`, `refused` with the message, `WRONG` with the output that differs, `CRASH` with the error that
was none of ours. The same seed is the same program. Programs run in a child process, so that one that ends its
process (XLA aborts) or hangs is a crash too. Ends with 1 if anything was wrong or crashed.
"""

from __future__ import annotations

import argparse
import os
import select
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SECONDS = 240  # after which a program counts as hung
BORN = 60  # programs of one child: compiled programs stay in memory
ROUNDING = {"float32": 2e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Outcome:
    seed: int
    kind: str  # ok, refused, WRONG, CRASH
    words: str  # of the program
    what: str = ""

    def __str__(self) -> str:
        told = f" | {self.what}" if self.what else ""
        return f"{self.seed} {self.kind}{told} | {self.words}".replace("\n", " ; ")


def run_seed(seed: int, pipelines: bool, trace: bool = False) -> Outcome:
    """Plan and run the program of a seed, and compare it with plain jax."""
    from meshwright.ir.errors import MeshwrightError, VerificationError

    from .random_steps import random_step

    made = random_step(seed, pipelines)
    try:
        wrong = _difference(made)
    except VerificationError as error:
        return Outcome(seed, "WRONG", made.words, str(error))
    except MeshwrightError as error:
        if trace:
            traceback.print_exc()
        return Outcome(seed, "refused", made.words, str(error))
    except Exception as error:
        if trace:
            traceback.print_exc()
        return Outcome(
            seed,
            "CRASH",
            made.words,
            f"{_place(error)}: {type(error).__name__}: {str(error)[:200]}",
        )
    return Outcome(seed, "WRONG" if wrong else "ok", made.words, wrong)


def _difference(made: Any) -> str:
    import jax

    import meshwright as mw

    wanted = jax.jit(made.step)(*made.args)
    found = mw.parallelize(made.step, cluster=made.cluster, **made.request)(*made.args)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    before = [*jax.tree.leaves(made.args[0]), *[None] * len(names)]
    wanted, found = jax.tree.leaves(wanted), jax.tree.leaves(found)
    kind = "bfloat16" if "bf16" in made.words else "float32"
    wrong = [
        f"{name}: {off:.2g}"
        for name, want, have, old in zip(names, wanted, found, before, strict=False)
        if (off := _off(want, have, old)) > ROUNDING[kind]
    ]
    if wrong:
        _judge(made, found)  # which may be rounding, magnified: measured
    return ""


def _off(want: Any, have: Any, before: Any) -> float:
    """How far two arrays are apart, of what the step moved; inf where one is not a number."""
    import numpy as np

    want, have = (np.asarray(each, np.float64) for each in (want, have))
    if want.shape != have.shape or not np.array_equal(np.isnan(want), np.isnan(have)):
        return float("inf")
    old = np.zeros_like(want) if before is None else np.asarray(before, np.float64)
    size = np.linalg.norm(want - old) + 1e-5 * np.linalg.norm(want) + 1e-9
    return float(np.linalg.norm(np.nan_to_num(have - want)) / size)


def _judge(made: Any, found: Any) -> None:
    """Raise VerificationError unless rounding explains it, as `verify=True` does."""
    import jax

    from meshwright.backends.xla.capture import capture
    from meshwright.backends.xla.verify import reference, verify_outputs

    leaves, tree = jax.tree.flatten(made.args)
    flat = jax.jit(lambda *leaves: made.step(*jax.tree.unflatten(tree, leaves)))
    captured = capture(made.step, *made.args)
    verify_outputs(reference(flat, captured, leaves), found, captured.graph.output_names)


def _place(error: BaseException) -> str:
    """The innermost line of ours that an error passed."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename
    ]
    ours = [f for f in frames if "tests" not in f.filename] or frames
    return (
        f"{os.path.basename(ours[-1].filename)}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"
    )


# ---------------------------------------------------------------- the tool


def children(seeds: list[int], pipelines: bool) -> Iterator[str]:
    """Outcomes of seeds, from child processes; what a child dies of is the outcome of its last seed."""
    while seeds:
        child = _Child(seeds[:BORN], pipelines)
        for line in child:
            yield line
            seeds = seeds[1:]
        if child.died and seeds:
            yield f"{seeds[0]} CRASH | {child.died} | {_words(seeds[0], pipelines)}"
            seeds = seeds[1:]


class _Child:
    def __init__(self, seeds: list[int], pipelines: bool):
        numbers = ",".join(map(str, seeds))
        command = [sys.executable, "-m", "tests.random_programs", "--seeds", numbers, "--child"]
        self.left, self.died = len(seeds), ""
        self.process = subprocess.Popen(
            [*command, *(["--pipelines"] if pipelines else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
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


def _words(seed: int, pipelines: bool) -> str:
    from .random_steps import random_step

    return random_step(seed, pipelines).words


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0:50", help="a range 0:500, or numbers 3,7,11")
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--trace", action="store_true", help="in this process, with tracebacks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    first, _, last = given.seeds.partition(":")
    seeds = list(range(int(first), int(last))) if last else [int(n) for n in given.seeds.split(",")]
    if given.child or given.trace:
        for seed in seeds:
            print(run_seed(seed, given.pipelines, given.trace), flush=True)
        return 0
    start, lines = time.monotonic(), []
    for line in children(seeds, given.pipelines):
        lines.append(line)
        print(line, flush=True)
    print(summary(lines), f"\n{time.monotonic() - start:.0f} s")
    return int(any(line.split()[1] in ("WRONG", "CRASH") for line in lines))


def prepare_process() -> None:
    """Eight CPU devices, and code made quickly rather than fast: it runs once."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    )
    import jax

    jax.config.update("jax_num_cpu_devices", 8)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
