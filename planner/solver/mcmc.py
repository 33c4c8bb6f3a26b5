"""FlexFlow's search, for comparison: a Markov chain that changes one decision at a time.

A proposal gives one random node one random choice. It is taken when it costs less, else
with probability exp(-rise / temperature). Bytes over the limit cost time, so a chain may
pass through what does not fit. A chain ends with its time, or when it found nothing better
for half of that. The first one starts where it is told (data parallelism), others anywhere.

Sources: Jia, Zaharia & Aiken, "Beyond data and model parallelism for deep neural networks",
MLSys 2019, section 6; the price of bytes over the limit (1 ms per MB) is that of FlexFlow's
simulator. The paper does not give its temperature; several are tried, in turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from time import perf_counter

import numpy as np

from .compiled import compiled
from .contraction import contract
from .flat import Flat, cost_of, flatten
from .live import Live, finite, tighten
from .onehot import Choices, Solution
from .tree_moves import FlatDemands, flat_demands

SECONDS_PER_BYTE = 1e-3 / 1e6
TEMPERATURES = (1e-3, 1e-4, 1e-2)  # share of the start's cost
RATE = 3e5  # proposals per second of the time given: counted, so that equal seeds walk alike
LEAST_SECONDS = 5.0  # a walk is not cut off earlier: the first one compiles
PROPOSALS = 20_000  # between looks at the clock
CHAINS = 4  # the time is cut into this many


def walk(live: Live, start: Choices, *, time_limit: float, seed: int = 0) -> Solution:
    """The cheapest fitting assignment that the chains meet; `lower_bound` says nothing (-inf).

    `time_limit` is counted in proposals; on a machine too slow for that it is cut off at twice
    the time.

    Ctrl-C ends the walk like the time limit does.
    """
    step = contract(live)
    if step is None:
        reason = "no assignment meets all forbidden choices and pairs"
        return Solution("infeasible", "proof", None, None, inf, reason)
    chains = _Chains(
        finite(tighten(step.live)), seed, perf_counter() + max(2 * time_limit, LEAST_SECONDS)
    )
    stopped_by = "time"
    try:
        chains.run(step.lower(start), time_limit / CHAINS)
    except KeyboardInterrupt:
        stopped_by = "interrupt"
    if chains.best is None:
        return Solution("feasible", stopped_by, None, None, -inf, "no assignment that fits was met")
    choices = step.lift(chains.best)
    if not live.fits(choices):
        return Solution("feasible", stopped_by, None, None, -inf, "no assignment that fits was met")
    return Solution("feasible", stopped_by, choices, live.cost(choices), -inf)


@dataclass
class _Chains:
    live: Live
    seed: int
    deadline: float
    best: np.ndarray | None = None
    least: float = inf

    def run(self, start: np.ndarray | None, seconds: float) -> None:
        rng = np.random.default_rng(self.seed)
        batches = max(2, int(seconds * RATE / PROPOSALS))
        left, number = CHAINS * batches, 0
        while left > 0 and perf_counter() < self.deadline:
            if start is None:
                start = rng.integers(self.live.sizes)
            temperature = TEMPERATURES[number % len(TEMPERATURES)] * self.known_cost(start)
            left -= self.chain(start, temperature, min(batches, left), number)
            start, number = None, number + 1

    def known_cost(self, start: np.ndarray) -> float:
        """A cost to measure temperatures by: the best one met, or the start's."""
        return self.least if self.least < inf else abs(self.live.cost(start))

    def chain(self, start: np.ndarray, temperature: float, batches: int, number: int) -> int:
        """One chain; how many batches of proposals it took."""
        costs = np.concatenate(self.live.costs)
        flat, held = flatten(self.live.sizes, self.live.edges), flat_demands(self.live)
        choices = np.array(start, dtype=np.int64)
        used, best = self.live.used(choices), choices.copy()
        cost, least = cost_of(flat, costs, choices), inf
        risen = batch = 0
        while batch < batches and batch - risen <= batches / 2 and perf_counter() < self.deadline:
            seed = ((self.seed * 1000 + number) * 1_000_003 + batch) % 2**32
            cost, found = _walk(
                flat, costs, held, choices, used, best, cost, least, temperature, PROPOSALS, seed
            )
            batch += 1
            if found < least:
                least, risen = found, batch
        if least < self.least:
            self.least, self.best = least, best
        return batch


@compiled
def _walk(
    flat: Flat,
    costs: np.ndarray,
    held: FlatDemands,
    choices: np.ndarray,
    used: np.ndarray,
    best: np.ndarray,
    cost: float,
    least: float,
    temperature: float,
    proposals: int,
    seed: int,
) -> tuple[float, float]:
    """Proposals one after another, in place; the last cost and the least one that fitted."""
    np.random.seed(seed)
    over = _over(used, held.limits)
    then = used.copy()
    for _ in range(proposals):
        i = np.random.randint(flat.starts.size - 1)
        width: int = flat.starts[i + 1] - flat.starts[i]
        p, old = np.random.randint(width), choices[i]
        if p == old:
            continue
        rise = _rise(flat, costs, choices, i, p)
        moved = False
        for d in range(held.of[i], held.of[i + 1]):
            more = held.nbytes[held.offset[d] + p] - held.nbytes[held.offset[d] + old]
            if more != 0.0:
                moved = True
                for t in range(held.first[d], held.last[d]):
                    then[t] += more
        after = _over(then, held.limits) if moved else over
        total = rise + SECONDS_PER_BYTE * (after - over)
        if total <= 0.0 or np.random.random() < np.exp(-total / temperature):
            choices[i] = p
            cost += rise
            over = after
            if moved:
                used[:] = then
            if over <= 0.0 and cost < least:
                least = cost
                best[:] = choices
        elif moved:
            then[:] = used
    return cost, least


@compiled
def _over(used: np.ndarray, limits: np.ndarray) -> float:
    """Bytes over the limit at the worst moment."""
    worst = 0.0
    for t in range(limits.size):
        worst = max(worst, used[t] - limits[t])
    return worst


@compiled
def _rise(flat: Flat, costs: np.ndarray, choices: np.ndarray, i: int, p: int) -> float:
    """How much more it costs when node i takes choice p."""
    start = flat.starts[i]
    rise = costs[start + p] - costs[start + choices[i]]
    for n in range(flat.first[i], flat.first[i + 1]):
        e = flat.near[n]
        a, b = flat.a[e], flat.b[e]
        width = flat.starts[b + 1] - flat.starts[b]
        if a == i:
            rise += flat.tables[flat.at[e] + p * width + choices[b]]
            rise -= flat.tables[flat.at[e] + choices[i] * width + choices[b]]
        else:
            rise += flat.tables[flat.at[e] + choices[a] * width + p]
            rise -= flat.tables[flat.at[e] + choices[a] * width + choices[i]]
    return float(rise)
