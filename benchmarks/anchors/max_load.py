"""dnn-partitioning's inputs: operators of a graph on accelerators and CPUs, the fullest device as light as can be.

Source: Tarnawski et al., Efficient Algorithms for Device Placement of DNN Graph Operators, NeurIPS 2020,
section 3, and its published code: a device's load is the time of its operators per sample; an accelerator
also pays once for each result that leaves it and once for each that it takes from elsewhere. Operators of
one colour stay together (a forward pass and its backward pass). Times are in the files' unit, ms.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from functools import cached_property
from graphlib import TopologicalSorter
from itertools import accumulate, groupby
from typing import Any

import numba
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from meshwright.ir.errors import PlanError
from meshwright.planner.pipeline.ideals import closed_sets
from meshwright.planner.pipeline.partition import best_cuts

SETS = 1500  # closed sets that are all looked at

MOVES = 1_000_000  # tried per search
SEEDS = 2
COSTLY = (
    np.inf,
    0.3,
    0.1,
    0.03,
    0.01,
    0.003,
)  # results' costs that join groups at first, as parts of the same
HOT, WARM, COLD = (
    0.03,
    0.003,
    0.0003,
)  # temperatures, as parts of the lightest conceivable fullest device


class Graph:
    """Operators by number, joined into groups that stay together; device 0 is the CPU, the others accelerators."""

    def __init__(self, file: dict[str, Any]) -> None:
        nodes, number = file["nodes"], {node["id"]: i for i, node in enumerate(file["nodes"])}
        given = [
            node.get("colorClass") for node in nodes
        ]  # null and missing are the same: tied to nothing
        colours = [
            f"own {node['id']}" if colour is None else colour
            for node, colour in zip(nodes, given, strict=True)
        ]
        at = {colour: g for g, colour in enumerate(sorted(set(colours), key=str))}
        self.group = np.array([at[colour] for colour in colours])
        self.devices = int(file["maxFPGAs"]) + 1
        assert file["maxCPUs"] == 1, "as all published cases"
        self.limit = float(file["maxSizePerFPGA"])
        count = len(at)
        self.cpu, self.accelerator, self.size = (
            np.bincount(self.group, [float(node[key]) for node in nodes], count)
            for key in ("cpuLatency", "fpgaLatency", "size")
        )
        supported = (
            np.bincount(self.group, [not node["supportedOnFpga"] for node in nodes], count) == 0
        )
        self.size[~supported] = np.inf
        self.edges = np.array([(number[a], number[b]) for a, b, _ in file["edges"]])
        self.backward = np.array([bool(node["isBackwardNode"]) for node in nodes])
        self.cost = np.zeros(len(nodes))
        for a, _, cost in file["edges"]:
            self.cost[number[a]] = cost

    def loads(self, devices: np.ndarray) -> np.ndarray:
        """Of each device, for the devices of all groups."""
        loads = np.bincount(
            devices, np.where(devices == 0, self.cpu, self.accelerator), self.devices
        )
        of = devices[self.group]
        crossing = {(a, of[a], of[b]) for a, b in self.edges if of[a] != of[b]}
        for a, leaving in {(a, leaving) for a, leaving, _ in crossing}:
            loads[leaving] += self.cost[a] if leaving else 0.0
        for a, _, arriving in crossing:
            loads[arriving] += self.cost[a] if arriving else 0.0
        return loads

    def of(self, devices: np.ndarray) -> float:
        """The load of the fullest device; inf where something does not fit."""
        sizes = np.bincount(devices, np.where(devices == 0, 0.0, self.size), self.devices)
        return float(self.loads(devices).max()) if sizes.max() <= self.limit else np.inf

    # ------------------------------------------------------------ search

    def best(self) -> np.ndarray:
        """The lightest placement found: cut in line or dealt out evenly, then moved while it cools.

        First what is joined by costly results moves as one, then group by group.
        """
        found, floor = [self.lined()], self.accelerator.sum() / (self.devices - 1)
        found += [self._annealed(found[0], seed, WARM) for seed in range(SEEDS)]
        for seed, costly in enumerate(COSTLY):
            joined, of = self._joined(costly * floor)
            start = joined._annealed(joined._even(), seed, HOT)[of]
            found.append(self._annealed(start, seed, WARM))
        return min(found, key=self.of)

    def _joined(self, costly: float) -> tuple[Graph, np.ndarray]:
        """The same operators in larger groups, that no result of such a cost leaves; and the new group of each old."""
        ends = self.group[self.edges[self.cost[self.edges[:, 0]] > costly]]
        count = len(self.cpu)
        graph = csr_array(
            (np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(count, count)
        )
        of = connected_components(graph, directed=False)[1]
        joined = copy(self)
        for name in ("follows", "unit"):
            joined.__dict__.pop(name, None)  # of the old groups
        joined.group = of[self.group]
        joined.cpu, joined.accelerator, joined.size = (
            np.bincount(of, old) for old in (self.cpu, self.accelerator, self.size)
        )
        return joined, of

    def lined(self) -> np.ndarray:
        """The lightest placement on accelerators that a pipeline could have: each between two closed sets."""
        sets = self._sets()
        last, count = len(sets) - 1, len(sets)
        fixed = self.group, self.edges, self.cost
        inside = sets[:, self.unit]
        # positions count twice: before and after the CPU has had its part
        table = np.full((2, 2 * count, 2 * count), np.inf)
        table[1, :count, :count] = _between(inside, *fixed, self.accelerator, self.size, self.limit)
        table[1, count:, count:] = table[1, :count, :count]
        table[1, :count, count:] = _between(
            inside, *fixed, self.cpu, 0 * self.cpu, self.limit, False
        )
        cuts = best_cuts(0, table, table, self.devices)
        most = cuts.seconds[:, [last, last + count]]
        most[-1, 0] = np.inf  # as many stages as devices, and none on the CPU
        stages, with_cpu = np.unravel_index(most.argmin(), most.shape)
        devices, next_device = np.zeros(len(self.cpu), int), 0
        for piece in cuts.pieces(last + count * int(with_cpu), int(stages)):
            on_cpu = piece.first < count <= piece.last
            next_device += not on_cpu
            here = inside[piece.last % count] & ~inside[piece.first % count]
            devices[here] = 0 if on_cpu else next_device
        return devices

    def _sets(self) -> np.ndarray:
        """Closed sets of units, smaller ones first; of graphs with too many, those along one order."""
        count = int(self.unit.max()) + 1
        pairs = {
            (int(self.unit[a]), int(self.unit[b]))
            for a, b in self.follows
            if self.unit[a] != self.unit[b]
        }
        try:
            found = closed_sets(count, pairs, SETS)
        except PlanError:
            needs: dict[int, set[int]] = {unit: set() for unit in range(count)}
            for a, b in pairs:
                needs[b].add(a)
            order = TopologicalSorter(needs).static_order()
            found = [0, *accumulate((1 << unit for unit in order), int.__or__)]
        return np.array([[some >> unit & 1 for unit in range(count)] for some in found], bool)

    @cached_property
    def unit(self) -> np.ndarray:
        """Of each group: the groups that come before one another are one unit."""
        count = len(self.cpu)
        ones = np.ones(len(self.follows), bool)
        graph = csr_array((ones, (self.follows[:, 0], self.follows[:, 1])), shape=(count, count))
        return connected_components(graph, connection="strong")[1]

    @cached_property
    def follows(self) -> np.ndarray:
        """Pairs of groups, one before the other in the forward pass.

        A group with backward passes alone goes with the group to or from which most moves; among equals, with one
        that has a forward pass.
        """
        ends = self.group[self.edges]
        found = {(int(a), int(b)) for a, b in ends[~self.backward[self.edges].any(axis=1)]}
        forward = np.bincount(self.group, ~self.backward, len(self.cpu)) > 0
        for lone in np.flatnonzero(~forward):
            touching = [i for i, (a, b) in enumerate(ends) if lone in (a, b) and a != b]
            if touching:
                most = max(
                    touching, key=lambda i: (self.cost[self.edges[i, 0]], forward[ends[i]].any())
                )
                a, b = map(int, ends[most])
                found |= {(a, b), (b, a)}
        return np.array(sorted(found))

    def _even(self) -> np.ndarray:
        """Units in an order that respects the graph, dealt out by their time alone."""
        sets = self._sets()
        first = sets.argmax(axis=0)  # the first set that holds a unit
        order = np.argsort(first[self.unit], kind="stable")
        share = np.cumsum(self.accelerator[order]) / self.accelerator.sum()
        devices = np.zeros(len(order), int)
        devices[order] = np.minimum((share * (self.devices - 1)).astype(int), self.devices - 2) + 1
        devices[~np.isfinite(self.size)] = 0
        return devices

    def _annealed(self, start: np.ndarray, seed: int, hot: float) -> np.ndarray:
        pairs = sorted(
            {(self.group[b], a) for a, b in self.edges} | {(g, a) for a, g in enumerate(self.group)}
        )
        touched = _rows(pairs, len(self.cpu))
        uses = _rows(sorted((self.group[b], a) for a, b in self.edges), len(self.cpu))
        floor = self.accelerator.sum() / (self.devices - 1)
        seconds = np.stack([self.cpu, *[self.accelerator] * (self.devices - 1)])
        return _cooled(
            start.copy(), self.group, self.edges, self.cost, seconds, self.size, self.limit,
            *touched, *uses, MOVES, seed, hot * floor, COLD * floor,
        )  # fmt: skip


def _rows(pairs: Iterable[tuple[int, int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted pairs (row, value) as values and where each row begins."""
    values, ends = [], np.zeros(count + 1, int)
    for row, some in groupby(pairs, key=lambda pair: pair[0]):
        values += [value for _, value in some]
        ends[row + 1] = len(values)
    return np.array(values), np.maximum.accumulate(ends)


@numba.njit(cache=True)
def _between(sets, group, edges, cost, seconds, size, limit, pays=True):
    """Loads of a device with what lies between two sets of groups, one within the other; inf elsewhere.

    pays: for what crosses.
    """
    count, groups = sets.shape
    loads = np.full((count, count), np.inf)
    inside, leaves, arrives = np.zeros(groups, np.bool_), np.zeros(len(group)), np.zeros(len(group))
    for a in range(count):
        for b in range(a + 1, count):
            load = held = 0.0
            for g in range(groups):
                if sets[a, g] and not sets[b, g]:
                    held = np.inf
                    break
                inside[g] = sets[b, g] and not sets[a, g]
                if inside[g]:
                    load, held = load + seconds[g], held + size[g]
            if held > limit:
                continue
            if not pays:
                loads[a, b] = load
                continue
            leaves[:], arrives[:] = 0.0, 0.0
            for node, user in edges:
                if inside[group[node]] and not inside[group[user]]:
                    leaves[node] = cost[node]
                elif inside[group[user]] and not inside[group[node]]:
                    arrives[node] = cost[node]
            loads[a, b] = load + leaves.sum() + arrives.sum()
    return loads


@numba.njit(cache=True)
def _pay(node, sign, devices, group, cost, consumers, loads):
    """Add (or take away) what a result's crossing costs the devices it leaves and reaches."""
    home, leaves = devices[group[node]], False
    for d in range(len(loads)):
        if d != home and consumers[node, d] > 0:
            leaves = True
            if d:
                loads[d] += sign * cost[node]
    if leaves and home:
        loads[home] += sign * cost[node]


@numba.njit(cache=True)
def _move(
    g, to, devices, group, cost, seconds, consumers, loads, touched, touched_at, uses, uses_at
):
    origin = devices[g]
    for i in range(touched_at[g], touched_at[g + 1]):
        _pay(touched[i], -1.0, devices, group, cost, consumers, loads)
    for i in range(uses_at[g], uses_at[g + 1]):
        consumers[uses[i], origin] -= 1
        consumers[uses[i], to] += 1
    devices[g] = to
    loads[origin] -= seconds[origin, g]
    loads[to] += seconds[to, g]
    for i in range(touched_at[g], touched_at[g + 1]):
        _pay(touched[i], 1.0, devices, group, cost, consumers, loads)


@numba.njit(cache=True)
def _energy(loads):
    """Near the fullest device's load, and lower where the next ones are lighter."""
    most = loads.max()
    return most * np.sum((loads / most) ** 12) ** (1 / 12)


@numba.njit(cache=True)
def _cooled(
    devices, group, edges, cost, seconds, size, limit,
    touched, touched_at, uses, uses_at, moves, seed, hot, cold,
):  # fmt: skip
    np.random.seed(seed)
    count, groups = len(seconds), len(devices)
    loads, sizes = np.zeros(count), np.zeros(count)
    consumers = np.zeros((len(group), count), np.int64)
    for a, b in edges:
        consumers[a, devices[group[b]]] += 1
    for g in range(groups):
        loads[devices[g]] += seconds[devices[g], g]
        sizes[devices[g]] += size[g] if devices[g] else 0.0
    for node in range(len(group)):
        _pay(node, 1.0, devices, group, cost, consumers, loads)
    best, least, energy = devices.copy(), np.inf, _energy(loads)
    for step in range(moves):
        heat = hot * (cold / hot) ** (step / moves)
        g = np.random.randint(groups)
        origin, to = devices[g], np.random.randint(count)
        if np.random.random() < 0.7:  # where a neighbour is
            to = devices[group[touched[np.random.randint(touched_at[g], touched_at[g + 1])]]]
        if to == origin or (to and sizes[to] + size[g] > limit):
            continue
        _move(
            g,
            to,
            devices,
            group,
            cost,
            seconds,
            consumers,
            loads,
            touched,
            touched_at,
            uses,
            uses_at,
        )
        changed = _energy(loads)
        if changed <= energy or np.random.random() < np.exp((energy - changed) / heat):
            energy = changed
            sizes[to] += size[g] if to else 0.0
            sizes[origin] -= size[g] if origin else 0.0
            if loads.max() < least and sizes.max() <= limit:
                best[:], least = devices, loads.max()
        else:
            _move(
                g,
                origin,
                devices,
                group,
                cost,
                seconds,
                consumers,
                loads,
                touched,
                touched_at,
                uses,
                uses_at,
            )
    return best
