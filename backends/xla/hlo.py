"""Read the collectives out of a compiled XLA program's text.

Only what an audit needs: kind, groups of devices, bytes of the larger local
side, and how often each runs (loops carry their trip count in the text).

Two habits of the TPU compiler: a gather that runs beside other work is cut up over the fusions of
a chain, each of which shows it whole; a reduce-scatter may be written as an all-reduce in a
computation named after what it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import numpy as np

from ...ir.mesh import Mesh

KINDS = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "collective-permute": "permute",
}
_OP = re.compile(
    r"= (?P<result>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\((?P<operands>.*?)\)(?:,|$)(?P<rest>.*)$"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|called_computations)=\{?%?([\w.\-, %]+)\}?"
)
_NAMED = re.compile(r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\] ?\{((?:'\w+',?)+)\}")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ITEM = {"pred": 1, "s4": 1, "u4": 1, "c64": 8, "c128": 16, "bf16": 2}


@dataclass(frozen=True, slots=True)
class CompiledCollective:
    """One collective of the compiled program, and how often it runs per step."""

    kind: str
    axes: tuple[str, ...]  # mesh axes its groups span; () when they match none
    nbytes: float
    count: int


def collectives(
    text: str, mesh: Mesh, often: Mapping[int, int] = MappingProxyType({})
) -> list[CompiledCollective]:
    """Every collective of the program with the number of times it runs per step.

    Args:
        often: turns of a loop -> in how many of them what its branches do is done; by default in all.
    """
    bodies = _computations(text)
    runs = _runs(bodies, often)
    chains: set[str] = set()
    return [
        CompiledCollective(kind, _axes(kind, groups, mesh), nbytes, runs[name])
        for name, lines in bodies.items()
        if runs.get(name)
        for kind, groups, nbytes in _in_lines(
            _first_links(lines, chains), "all-reduce-scatter" in name
        )
    ]


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(
                ("ENTRY " if line.startswith("ENTRY") else "") + match[1], []
            )
        else:
            current.append(line)
    return bodies


def _runs(bodies: dict[str, list[str]], often: Mapping[int, int]) -> dict[str, int]:
    """How often each computation runs: trip counts multiply along calls from the entry."""
    entry = next(name for name in bodies if name.startswith("ENTRY "))
    runs: dict[str, int] = {}
    stack = [(entry, 1, 1)]
    while stack:
        name, times, turns = stack.pop()  # `turns` of the loop whose body this is
        runs[name] = runs.get(name, 0) + times
        for line in bodies[name]:
            trips = int(m[1]) if (m := _TRIPS.search(line)) else 1
            branches = " conditional(" in line
            taken = times * often[turns] // turns if branches and turns in often else times * trips
            inside = trips if " while(" in line else 1 if branches else turns
            for called in _called(line):
                if called in bodies:
                    stack.append((called, taken, inside))
    return runs


def _called(line: str) -> Iterator[str]:
    for match in _CALLED.finditer(line):
        for name in match[1].split(","):
            yield name.strip().lstrip("%")


def _first_links(lines: list[str], chains: set[str]) -> Iterator[str]:
    """Lines, but of each chain (kept in `chains`) only the first."""
    for line in lines:
        if match := _CHAIN.search(line):
            if match[1] in chains:
                continue
            chains.add(match[1])
        yield line


def _in_lines(lines: Iterable[str], scatters: bool) -> Iterator[tuple[str, np.ndarray, float]]:
    """Kind, groups and bytes; an all-reduce of a computation that `scatters` keeps a part alone."""
    for line in lines:
        match = _OP.search(line)
        if not match:
            continue
        kind, groups = KINDS[match["kind"]], _groups(match["rest"])
        if scatters and kind == "all_reduce":
            yield "reduce_scatter", groups, _bytes(match["result"], bool(match["start"]))
            continue
        result = _bytes(match["result"], bool(match["start"]))
        grows = groups.shape[1] if kind == "reduce_scatter" and groups.size else 1
        yield kind, groups, result * grows


def _bytes(text: str, started: bool) -> float:
    """Bytes of all shapes of a result; an async start lists operand and result, count the larger."""
    sizes = [
        prod(map(int, dims.split(","))) * _item(kind) if dims else _item(kind)
        for kind, dims in _SHAPE.findall(text)
    ]
    if not sizes:
        return 0.0
    return float(max(sizes) if started else sum(sizes))


def _item(kind: str) -> int:
    return (
        _ITEM.get(kind)
        or int(re.sub(r"\D", "", kind[1:].split("e")[0] if kind.startswith("f8") else kind) or 8)
        // 8
        or 1
    )


def _groups(rest: str) -> np.ndarray:
    """replica_groups, or who sends to whom, as rows of device numbers, from any of XLA's three notations.

    Lists `{{0,1},{2,3}}`; iotas `[2,2]<=[4]`; since jax 0.11 also names of a mesh,
    `mesh['x'=4,'y'=2] {'y'}`, devices numbered in row-major order.
    """
    if match := _PAIRS.search(rest):
        return np.array(
            [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
        )
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest):
        return np.array(
            [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
        )
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        rows, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        order = np.arange(prod(dims)).reshape(dims)
        if match[3]:
            order = order.transpose([int(n) for n in match[3].split(",")])
        return order.reshape(rows)
    if match := _NAMED.search(rest):
        names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", match[1]), strict=True)
        inside = [names.index(name) for name in re.findall(r"'(\w+)'", match[2])]
        outside = [k for k in range(len(names)) if k not in inside]
        shape = [int(size) for size in sizes]
        order = np.arange(prod(shape)).reshape(shape).transpose(outside + inside)
        return order.reshape(-1, prod(shape[k] for k in inside))
    return np.zeros((0, 0), int)


def _axes(kind: str, groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, if groups are whole sub-meshes, or
    those that a permute joins, of all pairs: where a ring goes round two axes, most of its hops are along one."""
    if groups.size == 0:
        return ()
    looked_at = groups if kind == "permute" else groups[:1]
    places = np.array(np.unravel_index(looked_at, mesh.shape))  # [axis, group, member]
    moving = [i for i, at in enumerate(places) if (at != at[:, :1]).any()]
    names = tuple(mesh.names[i] for i in moving)
    return (
        names if kind == "permute" or prod(mesh.shape[i] for i in moving) == groups.shape[1] else ()
    )
