"""Aceso's published profiles of operators on V100s, and how its cost model counts a stage.

Source: Liu et al., Aceso, EuroSys 2024, and the cost model of its published search: a microbatch of a
stage takes the profiled seconds of its operators, those of recomputed forward passes, and its input and
output over the measured link; memory counts what Megatron keeps. Inside: seconds and MB, as profiled.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log2
from pathlib import Path
from typing import NamedTuple

import numpy as np

LAYERS = 24  # of both published models, in the encoder and the decoder
STATES = 8  # gradients, optimizer and fp32 copies, and the weights: 1 + 4 + 2 + 1 times the weights
FIELDS = (
    "forward",
    "backward",
    "input",
    "output",
    "weights",
    "activations",
    "reserved_forward",
    "reserved_backward",
)


class Split(NamedTuple):
    """How one operator runs: split `tensor` ways in one of its manners, replicated `data` ways."""

    tensor: int
    data: int
    manner: int = 0


@dataclass(frozen=True)
class Profile:
    """Of all operators in order, one array each."""

    forward: np.ndarray
    backward: np.ndarray
    input: np.ndarray
    output: np.ndarray
    weights: np.ndarray
    activations: np.ndarray
    reserved_forward: np.ndarray
    reserved_backward: np.ndarray

    @property
    def megabytes(self) -> np.ndarray:
        """What each operator keeps while two microbatches are in flight."""
        return STATES * self.weights + 2 * self.activations

    def mixed(self, others: Sequence[Profile], which: np.ndarray) -> Profile:
        """Operator i as in profile which[i] of this one and the others."""
        at = np.arange(len(which))
        return Profile(
            *(np.stack([getattr(p, f) for p in (self, *others)])[which, at] for f in FIELDS)
        )


@dataclass(frozen=True)
class Recorded:
    """The operators of one model in order, their profiles by (microbatch, tensor degree, manner), the link's GB/s.

    layers: the span of each layer's operators.
    """

    names: tuple[str, ...]
    layers: tuple[range, ...]
    profiles: dict[tuple[int, int, int], Profile]
    link: tuple[float, ...]

    @property
    def moves_between_splits(self) -> bool:
        """Whether Aceso counts moving data between operators that are split differently; it does not for T5."""
        return not any(name.startswith("dec-") for name in self.names)

    def moving(self, megabytes: float) -> float:
        """Seconds between stages; the link was measured at powers of two, as the anchor looks them up."""
        if megabytes == 0:
            return 0.0
        power = int(log2(megabytes))
        rate = self.link[min(power - 1 if power >= 1 else power, len(self.link) - 1)]
        return megabytes / rate * 1e-3

    def profile(self, splits: Sequence[Split], batch: int) -> Profile:
        """Of operators that run so, for a microbatch of `batch` samples over all replicas."""
        used = sorted(set(splits))
        first, *others = (self.profiles[batch // s.data, s.tensor, s.manner] for s in used)
        return first.mixed(others, np.array([used.index(s) for s in splits]))


def read(folder: Path, model: str) -> Recorded:
    """All profiles of a model that the folder holds."""
    profiles, names, layers = {}, (), ()
    for path in sorted(folder.glob(f"{model}_mbs*_tp*_algo*.csv")):
        with path.open() as file:
            rows = list(csv.reader(file))[1:]
        names, layers, order = _unrolled([row[0] for row in rows])
        columns = np.array([[float(cell) for cell in row[1:]] for row in rows])[order].T
        fields = dict(zip(FIELDS, columns, strict=True))
        fields["forward"], fields["backward"] = fields["forward"] * 1e-6, fields["backward"] * 1e-6
        fields["activations"] = fields["activations"] * [_shared(name) for name in names]
        key = re.search(r"_mbs(\d+)_tp(\d+)_algo(\d+)", path.stem)
        assert key
        profiles[int(key[1]), int(key[2]), int(key[3])] = Profile(**fields)
    if not profiles:
        return Recorded((), (), {}, ())
    with (folder / "p2p_intra_node.csv").open() as file:
        link = tuple(float(cell) for cell in list(csv.reader(file))[1])
    return Recorded(names, layers, profiles, link)


def _unrolled(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[range, ...], list[int]]:
    """A profile lists each layer's operators once; layers begin with their first norm and end with a dropout."""
    order: list[int] = []
    layers = []
    at = 0
    while at < len(names):
        if not names[at].endswith("1st-layernorm"):
            order.append(at)
            at += 1
            continue
        last = next(i for i in range(at, len(names)) if names[i].endswith("post-MLP-dropout"))
        for _ in range(LAYERS):
            layers.append(range(len(order), len(order) + last + 1 - at))
            order += range(at, last + 1)
        at = last + 1
    return tuple(names[i] for i in order), tuple(layers), order


def _shared(name: str) -> float:
    """Encoder attention: the softmax is computed in place, and its dropout keeps half as much again."""
    return {"enc-attention-softmax": 0.0, "enc-attention-dropout": 1.5}.get(name, 1.0)


@dataclass(frozen=True)
class Stage:
    """Operators first to last - 1, how each runs, and which are recomputed."""

    first: int
    last: int
    splits: tuple[Split, ...]
    recomputed: frozenset[int]

    @property
    def devices(self) -> int:
        return self.splits[0].tensor * self.splits[0].data


@dataclass(frozen=True)
class Counted:
    """One stage in Aceso's accounting, for a microbatch over all replicas."""

    recorded: Recorded
    stage: Stage
    batch: int

    @cached_property
    def profile(self) -> Profile:
        """Of the stage's operators alone."""
        own, whole = range(self.stage.first, self.stage.last), self.recorded
        used = {
            s: whole.profiles[self.batch // s.data, s.tensor, s.manner]
            for s in set(self.stage.splits)
        }
        rows = list(zip(own, self.stage.splits, strict=True))
        return Profile(
            *(np.array([getattr(used[s], field)[i] for i, s in rows]) for field in FIELDS)
        )

    @property
    def forward(self) -> float:
        return float(self.profile.forward.sum())

    @property
    def backward(self) -> float:
        """With what is recomputed."""
        again = sum(
            float(self.profile.forward[i - self.stage.first]) for i in self.stage.recomputed
        )
        return float(self.profile.backward.sum()) + again

    @property
    def arriving(self) -> float:
        return self.recorded.moving(float(self.profile.input[0]))

    @property
    def leaving(self) -> float:
        """Aceso looks the output up under the tensor degree of the stage's first operator."""
        first, last = self.stage.splits[0], self.stage.splits[-1]
        profile = self.recorded.profiles[self.batch // last.data, first.tensor, last.manner]
        return self.recorded.moving(float(profile.output[self.stage.last - 1]))

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.arriving + self.leaving

    def memory(self, behind: int) -> float:
        """MB on each device; `behind` more microbatches are in flight than the one at work."""
        p, first, again = self.profile, self.stage.first, self.stage.recomputed
        saved, peak, run = 0.0, 0.0, 0.0
        for i, megabytes in enumerate(map(float, p.activations[:-1])):
            if not {first + i, first + i + 1} <= again:
                run = 0.0
                continue
            run += megabytes
            peak = max(peak, run)
            if self.recorded.names[first + i + 1] == "enc-1st-layernorm":
                run = 0.0  # where a layer begins, its input is kept
            else:
                saved += megabytes
        weights, kept = float(p.weights.sum()), float(p.input[0] + p.activations.sum()) - saved
        reserved = float(
            p.reserved_forward[:-1].max(initial=0) + p.reserved_backward[:-1].max(initial=0)
        )
        return STATES * weights + kept * (behind + 1) + peak + max(reserved, weights)
