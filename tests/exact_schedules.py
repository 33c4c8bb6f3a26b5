"""The fastest order of a pipeline's passes under limits of memory, by constraint programming: an oracle for tests.

Whole numbers of seconds and of memory. Passes of a rank come in any order, a backward pass may be one with its
weight pass. Transfers take `send` after their pass and never wait for each other, which holds in the simulator
where no pass is shorter than a transfer.

It runs in a process of its own: ortools and highspy, which the planner uses, cannot be loaded together.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.planner.pipeline.simulate import StageSeconds
    from meshwright.planner.pipeline.tighten import ActivationMemory


def optimum(
    stages: Sequence[StageSeconds],
    held: ActivationMemory,
    microbatches: int,
    placement: Sequence[Sequence[int]],
) -> float:
    """The least makespan; `placement` has the stages of each rank."""
    oracle = _oracle()
    assert oracle.stdin and oracle.stdout
    passes = [
        (s.forward, s.backward, s.weight, s.sending("forward"), s.sending("backward"))
        for s in stages
    ]
    print(
        json.dumps([passes, asdict(held), microbatches, placement]), file=oracle.stdin, flush=True
    )
    return float(oracle.stdout.readline())


@cache
def _oracle() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@dataclass
class Passes:
    """Of one stage."""

    forward: float
    backward: float
    weight: float
    send: float
    back: float


def solved(
    stages: Sequence[Passes], held: dict, microbatches: int, placement: Sequence[Sequence[int]]
) -> float:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    horizon = int(
        sum(microbatches * (s.forward + s.backward + s.weight + s.send + s.back) for s in stages)
    )
    keys = [(kind, s, m) for kind in "FBW" for s in range(len(stages)) for m in range(microbatches)]
    start = {key: model.new_int_var(0, horizon, "".join(map(str, key))) for key in keys}
    whole = {key[1:]: model.new_bool_var("whole") for key in keys if key[0] == "B"}
    seconds = [{"F": int(s.forward), "B": int(s.backward), "W": int(s.weight)} for s in stages]
    end = model.new_int_var(0, horizon, "end")
    for kind, s, m in keys:
        model.add(end >= start[kind, s, m] + seconds[s][kind])
    for (s, m), one in whole.items():
        model.add(start["B", s, m] >= start["F", s, m] + seconds[s]["F"])
        model.add(start["W", s, m] >= start["B", s, m] + seconds[s]["B"])
        model.add(start["W", s, m] == start["B", s, m] + seconds[s]["B"]).only_enforce_if(one)
    on = {stage: rank for rank, mine in enumerate(placement) for stage in mine}
    for s in range(len(stages) - 1):
        there, back = (
            int(t) if on[s] != on[s + 1] else 0 for t in (stages[s].send, stages[s + 1].back)
        )
        for m in range(microbatches):
            model.add(start["F", s + 1, m] >= start["F", s, m] + seconds[s]["F"] + there)
            late = seconds[s + 1]["W"] * whole[s + 1, m]
            model.add(start["B", s, m] >= start["B", s + 1, m] + seconds[s + 1]["B"] + late + back)
    for m in range(microbatches - 1):
        model.add(
            start["F", 0, m] < start["F", 0, m + 1]
        )  # which microbatch is which does not matter
    for rank, mine in enumerate(placement):
        passes = [key for key in keys if key[1] in mine]
        model.add_no_overlap(
            model.new_fixed_size_interval_var(start[k], seconds[k[1]][k[0]], "") for k in passes
        )
        lives, sizes = [], []
        for s in mine:
            for m in range(microbatches):
                spans = (
                    ("F", "B", held["forward"][s], True),
                    ("B", "W", held["kept"][s], whole[s, m].negated()),
                )
                for first, last, size, there in spans:
                    long = model.new_int_var(0, horizon, "")
                    lives.append(
                        model.new_optional_interval_var(
                            start[first, s, m], long, start[last, s, m], there, ""
                        )
                    )
                    sizes.append(int(size))
        model.add_cumulative(lives, sizes, int(held["limits"][rank]))
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    return solver.objective_value


if __name__ == "__main__":
    for line in sys.stdin:
        passes, *rest = json.loads(line)
        print(solved([Passes(*each) for each in passes], *rest), flush=True)
