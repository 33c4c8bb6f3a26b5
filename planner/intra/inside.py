"""What an op sends while it runs: reductions that it settles, rows exchanged for equal work, keys that go round.

argmax over a cut dim      all_reduce of its result
causal attention, its rows cut and dealt out evenly      permute of half of q, and of half of o back
attention, keys cut as its rows      permutes of k and v from device to device, of their gradients with them
cross-entropy, its vocabulary cut    all_reduces of maxima and sums of each block of tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...ir.composites.loss_blocks import blocks_of, hidden_in, hidden_of, tokens_in
from ...ir.composites.ring import Ring, given, ring_of, travels
from ...ir.graph import ITEM_BYTES, Op, TensorType
from ...ir.mesh import Mesh
from ...ir.rules.rule import Joint, Rule, Strategy, settled_axes
from ..cost.collectives import Collectives
from ..pipeline.simulate import SLOWDOWN


@dataclass(frozen=True, slots=True)
class Sent:
    """Collectives over `axes`, each of this share of what a device has of one side: an operand, or a result after
    those. It is sent so many `times`, in 32 bits at least if `wide`; behind what the op computes if it may `hide`."""

    kind: Literal["all_reduce", "permute"]
    axes: tuple[str, ...]
    side: int
    share: float = 1.0
    times: int = 1
    wide: bool = False
    hides: bool = False


def may_send(op: Op, rule: Rule) -> bool:
    """Whether an op sends something by itself under some strategy."""
    reduces = any(factor.reduction not in ("", "sum") for factor in rule.factors)
    return reduces or bool(rule.joints) or op.has("joined")


def sent_inside(op: Op, rule: Rule, strategy: Strategy, mesh: Mesh) -> list[Sent]:
    """All that one run of an op sends by itself."""
    results = range(len(rule.operands), len(rule.operands) + len(rule.results))
    found = [
        Sent("all_reduce", axes, side)
        for axes in settled_axes(rule, strategy, mesh).values()
        for side in results
    ]
    for number, joint in enumerate(rule.joints, len(rule.factors)):
        if axes := _axes(strategy.axes, number, mesh):
            sent = _round if joint.how == "ring" else _exchanged
            found += sent(op, rule, joint, axes, mesh)
    if op.has("joined"):
        found += _joined(op, strategy, mesh)
    return found


@dataclass(frozen=True)
class Inside:
    """Prices what one run of an op sends under one strategy.

    Attributes:
        kinds: types of its sides, operands and then results; `ways` into how many parts each is cut.
        beside: whether sends that may hide run beside what the op computes.
    """

    op: Op
    rule: Rule
    strategy: Strategy
    prices: Collectives
    kinds: Sequence[TensorType]
    ways: Sequence[float]
    beside: bool

    def sent(self) -> list[Sent]:
        return sent_inside(self.op, self.rule, self.strategy, self.prices.mesh)

    def nbytes(self, sent: Sent) -> float:
        """Of sending it once."""
        kind = self.kinds[sent.side]
        if sent.wide and ITEM_BYTES[kind.dtype] < ITEM_BYTES["f32"]:
            kind = replace(kind, dtype="f32")
        return self.prices.wire_bytes(kind) * sent.share / self.ways[sent.side]

    def seconds(self, compute: float) -> list[float]:
        """Of all times that each is sent, what the op waits for, which computes for so long.

        In a ring all steps but the last have something to hide: sends and work of a step last as long as the longer of
        both, slowed down while they run side by side (`windows.py`).
        """
        found = self.sent()
        alone = [s.times * self.prices.line(s.kind, s.axes)(self.nbytes(s)) for s in found]
        hiding = sum(seconds for s, seconds in zip(found, alone, strict=True) if s.hides)
        if not self.beside or not hiding:
            return alone
        ring = ring_under(self.op, self.rule, self.strategy, self.prices.mesh)
        steps = 1 if ring is None else ring.steps
        work, slow = compute * (steps - 1) / steps, SLOWDOWN - 1
        left = max(slow * hiding, hiding + slow * work - work) / hiding
        return [s * left if one.hides else s for one, s in zip(found, alone, strict=True)]


def _exchanged(op: Op, rule: Rule, joint: Joint, axes: tuple[str, ...], mesh: Mesh) -> list[Sent]:
    sides, many = enumerate((*rule.operands, *rule.results)), len(op.inputs)
    unread = range(many - 1 - given(op), many) if given(op) else ()
    return [
        Sent("permute", axes, k, 0.5)
        for k, dims in sides
        if k not in unread and any(joint.factors[0] in dim for dim in dims)
    ]


def _round(op: Op, rule: Rule, joint: Joint, axes: tuple[str, ...], mesh: Mesh) -> list[Sent]:
    found: list[Sent] = []
    for one in travels(op, mesh.ways(axes)):
        home = one.side >= len(op.inputs)  # the last hop of a gradient has nothing to hide behind
        hops = one.hops - home
        if hops > 0:
            found.append(Sent("permute", axes, one.side, 1.0, hops, one.wide, hides=True))
        if one.hops and home:
            found.append(Sent("permute", axes, one.side, 1.0, 1, one.wide))
        found += [Sent("permute", axes, one.side, 0.5)] * one.halves
    return found


def _joined(op: Op, strategy: Strategy, mesh: Mesh) -> list[Sent]:
    """What devices that share a vocabulary bring together, in fp32: one number per token and value, so of each number
    of the hidden states a share."""
    vocabulary, joined = op.integer("vocabulary"), op.integer("joined")
    axes = _axes(strategy.axes, vocabulary, mesh)
    if not axes or not joined:
        return []
    named = zip(mesh.names, strategy.axes, strict=True)
    tokens = mesh.ways(tuple(name for name, code in named if 0 <= code < vocabulary))
    blocks = blocks_of(op, tokens, mesh.ways(axes))
    share = tokens_in(op) / hidden_in(op) / blocks
    return [Sent("all_reduce", axes, hidden_of(op), share, joined * blocks, wide=True)]


def ring_under(op: Op, rule: Rule, strategy: Strategy, mesh: Mesh) -> Ring | None:
    """The ring that a strategy makes, if it makes one."""
    rings = [code for code in strategy.axes if (j := rule.joint(code)) and j.how == "ring"]
    return ring_of(op, mesh.ways(_axes(strategy.axes, rings[0], mesh))) if rings else None


def _axes(codes: Sequence[int], code: int, mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name, each in zip(mesh.names, codes, strict=True) if each == code)
