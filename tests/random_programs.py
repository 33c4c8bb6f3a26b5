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
import sys
from collections.abc import Iterator
from typing import Any

from .outcomes import (
    Outcome,
    attempt,
    here,
    numbers,
    off_by,
    outcomes,
    prepare_process,
    told,
)  # fmt: skip

ROUNDING = {"float32": 2e-4, "bfloat16": 2e-2}


def run_seed(seed: int, pipelines: bool, trace: bool = False) -> Outcome:
    """Plan and run the program of a seed, and compare it with plain jax."""
    from .random_steps import random_step

    made = random_step(seed, pipelines)
    return attempt(seed, made.words, lambda: _difference(made), trace)


def _difference(made: Any) -> None:
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
        if (off := off_by(want, have, old)) > ROUNDING[kind]
    ]
    if wrong:
        _judge(made, found)  # which may be rounding, magnified: measured


def _judge(made: Any, found: Any) -> None:
    """Raise VerificationError unless rounding explains it, as `verify=True` does."""
    import jax

    from meshwright.backends.xla.capture import capture
    from meshwright.backends.xla.verify import reference, verify_outputs

    leaves, tree = jax.tree.flatten(made.args)
    flat = jax.jit(lambda *leaves: made.step(*jax.tree.unflatten(tree, leaves)))
    captured = capture(made.step, *made.args)
    verify_outputs(reference(flat, captured, leaves), found, captured.graph.output_names)


# ---------------------------------------------------------------- the tool


def children(seeds: list[int], pipelines: bool) -> Iterator[str]:
    """Outcomes of seeds, from child processes."""
    more = ["--pipelines"] if pipelines else []
    return outcomes("tests.random_programs", seeds, more, lambda seed: _words(seed, pipelines))


def _words(seed: int, pipelines: bool) -> str:
    from .random_steps import random_step

    return random_step(seed, pipelines).words


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0:50", help="a range 0:500, or numbers 3,7,11")
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--trace", action="store_true", help="in this process, with tracebacks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    seeds = numbers(given.seeds)
    if given.child or given.trace:
        return here(run_seed(seed, given.pipelines, given.trace) for seed in seeds)
    return told(children(seeds, given.pipelines))


if __name__ == "__main__":
    prepare_process(8)
    sys.exit(main())
