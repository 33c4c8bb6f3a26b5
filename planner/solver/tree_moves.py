"""Local search whose moves change a whole induced tree of nodes to its best assignment.

A move grows a random set of nodes whose induced graph is a tree, holds all others
fixed, and finds the tree's best choices by dynamic programming, with memory priced.
It is taken when no moment goes over its limit and the cost does not rise by more than
the tolerance of that time, which falls: threshold accepting.

Sources: Hamze & de Freitas, "From fields to trees", UAI 2004 (tree blocks);
Dueck & Scheuer, "Threshold accepting", J. Comput. Phys. 90, 1990.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiled import compiled
from .flat import Flat, cost_of
from .live import Live

ATTEMPTS = 3  # of one tree, each with a higher price where the last went over
COSTLESS = 0.2  # share of moves that ignore prices: most moments are not near their limits
MOST_PRICE = 1.5  # prices are scaled by a random factor up to this
RESET = 50  # moves after which prices raised on the way are forgotten


class FlatDemands(NamedTuple):
    """Demands by node: those of node i are `of[i] : of[i + 1]`; see `live.DemandTable`."""

    of: np.ndarray
    first: np.ndarray
    last: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    limits: np.ndarray


def flat_demands(live: Live) -> FlatDemands:
    table = live.table
    of = np.searchsorted(table.node, np.arange(len(live.costs) + 1)).astype(np.int64)
    return FlatDemands(of, table.first, table.last, table.offset, table.nbytes, live.limits)


class State(NamedTuple):
    """An assignment, the bytes used at each moment, and the best assignment met; changed in place."""

    choices: np.ndarray
    used: np.ndarray
    best: np.ndarray


class TreeMoves:
    """`TreeMoves(live, flat, costs).run(choices, prices, ...)`: start from an assignment that fits."""

    def __init__(self, live: Live, flat: Flat, costs: np.ndarray) -> None:
        self.held = flat_demands(live)
        self.live, self.flat, self.costs = live, flat, costs

    def run(
        self,
        choices: np.ndarray,
        prices: np.ndarray,
        *,
        seed: int,
        work: float,
        most_nodes: int,
        tolerance: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Move until `work` table entries were read; returns the last assignment, the best one
        and its cost."""
        start = np.array(choices, dtype=np.int64)
        state = State(start, self.live.used(start), start.copy())
        cost = cost_of(self.flat, self.costs, start)
        best = _walk(
            self.flat,
            self.costs,
            self.held,
            prices,
            state,
            cost,
            seed,
            work,
            most_nodes,
            tolerance,
        )
        return state.choices, state.best, best


@compiled
def _walk(
    flat: Flat,
    costs: np.ndarray,
    held: FlatDemands,
    prices: np.ndarray,
    state: State,
    cost: float,
    seed: int,
    work: float,
    most_nodes: int,
    tolerance: float,
) -> float:
    np.random.seed(seed)
    count, moments = flat.starts.size - 1, held.limits.size
    place = np.full(count, -1)  # position in the tree, -1 outside
    order, parent, link = (
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.empty(count, np.int64),
    )
    sums = np.empty(flat.starts[-1])  # per tree node, what its choices cost with all below
    at = np.empty(count + 1, np.int64)
    after = np.empty(count, np.int64)
    upto, change = np.zeros(moments + 1), np.zeros(moments + 1)
    then = state.used.copy()
    asked = prices.copy()
    best = cost
    move, done = 0, 0.0
    while done < work:
        if move % RESET == 0:
            asked[:] = prices
        move += 1
        most = 2 + int(most_nodes ** np.random.random())
        size = _grow(flat, np.random.randint(count), most, place, order, parent, link)
        factor = 0.0 if np.random.random() < COSTLESS else MOST_PRICE * np.random.random()
        for _ in range(ATTEMPTS):
            for t in range(moments):
                upto[t + 1] = upto[t] + factor * asked[t]
            done += moments + _own_costs(
                flat, costs, held, state.choices, place, order, size, upto, sums, at
            )
            _choose(flat, place, order, parent, link, size, sums, at, after)
            rise = _rise(flat, costs, state.choices, after, place, order, size)
            if rise > tolerance:
                break
            low, high, worst, over = _refill(held, state, after, order, size, change, then)
            if over > 0.0:  # ask more there, and try again
                factor = max(factor, 0.1)
                asked[worst] += 0.5 * max(-rise, 1e-6 * abs(cost)) / over / factor
                continue
            for k in range(size):
                state.choices[order[k]] = after[order[k]]
            for t in range(low, high):
                state.used[t] = then[t]
            cost += rise
            if cost < best:
                best = cost
                state.best[:] = state.choices
            break
        for k in range(size):
            place[order[k]] = -1
    return best


@compiled
def _grow(
    flat: Flat,
    root: int,
    most: int,
    place: np.ndarray,
    order: np.ndarray,
    parent: np.ndarray,
    link: np.ndarray,
) -> int:
    """Breadth first from `root`, taking a node while it touches the tree once; returns its size."""
    order[0], parent[0], place[root] = root, -1, 0
    size = 1
    head = 0
    while head < size and size < most:
        i = order[head]
        head += 1
        degree = flat.first[i + 1] - flat.first[i]
        turn = np.random.randint(degree) if degree > 0 else 0
        for k in range(degree):
            e = flat.near[flat.first[i] + (k + turn) % degree]
            j = flat.b[e] if flat.a[e] == i else flat.a[e]
            if size < most and place[j] < 0 and _touches_once(flat, j, place):
                place[j], order[size], parent[size], link[size] = size, j, i, e
                size += 1
    return size


@compiled
def _touches_once(flat: Flat, node: int, place: np.ndarray) -> bool:
    touched = 0
    for k in range(flat.first[node], flat.first[node + 1]):
        e = flat.near[k]
        other = flat.b[e] if flat.a[e] == node else flat.a[e]
        if place[other] >= 0:
            touched += 1
            if touched > 1:
                return False
    return touched == 1


@compiled
def _own_costs(
    flat: Flat,
    costs: np.ndarray,
    held: FlatDemands,
    choices: np.ndarray,
    place: np.ndarray,
    order: np.ndarray,
    size: int,
    upto: np.ndarray,
    sums: np.ndarray,
    at: np.ndarray,
) -> float:
    """Per tree node: its costs, priced memory, and its edges to nodes that stay as they are.

    Returns how many table entries the whole move reads.
    """
    o = 0
    read = 0.0
    for k in range(size):
        i = order[k]
        at[k] = o
        start = flat.starts[i]
        width = flat.starts[i + 1] - start
        for p in range(width):
            sums[o + p] = costs[start + p]
        for d in range(held.of[i], held.of[i + 1]):
            rate = upto[held.last[d]] - upto[held.first[d]]
            if rate > 0.0:
                for p in range(width):
                    sums[o + p] += rate * held.nbytes[held.offset[d] + p]
        read += width * (1.0 + flat.first[i + 1] - flat.first[i])
        for n in range(flat.first[i], flat.first[i + 1]):
            e = flat.near[n]
            if flat.a[e] == i:
                j = flat.b[e]
                if place[j] >= 0:
                    read += flat.at[e + 1] - flat.at[e]
                else:
                    step = flat.starts[j + 1] - flat.starts[j]
                    for p in range(width):
                        sums[o + p] += flat.tables[flat.at[e] + p * step + choices[j]]
            elif place[flat.a[e]] < 0:
                row = flat.at[e] + choices[flat.a[e]] * width
                for p in range(width):
                    sums[o + p] += flat.tables[row + p]
        o += width
    return float(read)


@compiled
def _choose(
    flat: Flat,
    place: np.ndarray,
    order: np.ndarray,
    parent: np.ndarray,
    link: np.ndarray,
    size: int,
    sums: np.ndarray,
    at: np.ndarray,
    after: np.ndarray,
) -> None:
    """The tree's best choices, into `after`: up from the leaves, then down from the root."""
    for k in range(size - 1, 0, -1):
        i, j, e = order[k], parent[k], link[k]
        width, wide = flat.starts[i + 1] - flat.starts[i], flat.starts[j + 1] - flat.starts[j]
        down, across = (wide, 1) if flat.a[e] == i else (1, width)
        up = at[place[j]]
        for q in range(wide):
            low = np.inf
            for p in range(width):
                low = min(low, sums[at[k] + p] + flat.tables[flat.at[e] + p * down + q * across])
            sums[up + q] += low
    for k in range(size):
        i = order[k]
        width = flat.starts[i + 1] - flat.starts[i]
        low = np.inf
        for p in range(width):
            value = sums[at[k] + p]
            if k > 0:
                e, q = link[k], after[parent[k]]
                wide = flat.starts[parent[k] + 1] - flat.starts[parent[k]]
                value += flat.tables[
                    flat.at[e] + (p * wide + q if flat.a[e] == i else q * width + p)
                ]
            if value < low:
                low = value
                after[i] = p


@compiled
def _rise(
    flat: Flat,
    costs: np.ndarray,
    choices: np.ndarray,
    after: np.ndarray,
    place: np.ndarray,
    order: np.ndarray,
    size: int,
) -> float:
    """How much more the assignment costs after the move."""
    rise = 0.0
    for k in range(size):
        i = order[k]
        rise += costs[flat.starts[i] + after[i]] - costs[flat.starts[i] + choices[i]]
        for n in range(flat.first[i], flat.first[i + 1]):
            e = flat.near[n]
            a, b = flat.a[e], flat.b[e]
            inside = place[a] >= 0 and place[b] >= 0
            if inside and b == i:
                continue  # counted at its other end
            width = flat.starts[b + 1] - flat.starts[b]
            to_a = after[a] if place[a] >= 0 else choices[a]
            to_b = after[b] if place[b] >= 0 else choices[b]
            rise += flat.tables[flat.at[e] + to_a * width + to_b]
            rise -= flat.tables[flat.at[e] + choices[a] * width + choices[b]]
    return float(rise)


@compiled
def _refill(
    held: FlatDemands,
    state: State,
    after: np.ndarray,
    order: np.ndarray,
    size: int,
    change: np.ndarray,
    then: np.ndarray,
) -> tuple[int, int, int, float]:
    """Bytes after the move, into `then`: the moments that change, the worst of them, its excess."""
    low, high = held.limits.size, 0
    for k in range(size):
        i = order[k]
        if after[i] == state.choices[i]:
            continue
        for d in range(held.of[i], held.of[i + 1]):
            more = (
                held.nbytes[held.offset[d] + after[i]]
                - held.nbytes[held.offset[d] + state.choices[i]]
            )
            if more != 0.0:
                change[held.first[d]] += more
                change[held.last[d]] -= more
                low, high = min(low, held.first[d]), max(high, held.last[d])
    worst, over, more = -1, 0.0, 0.0
    for t in range(low, high):
        more += change[t]
        change[t] = 0.0
        then[t] = state.used[t] + more
        if then[t] - held.limits[t] > over:
            over = then[t] - held.limits[t]
            worst = t
    if high > 0:
        change[high] = 0.0
    return low, high, worst, over
