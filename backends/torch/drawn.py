"""Random numbers by place: what a step draws is a function of a seed, of which draw it is and of an element's place.

    dropout(x, 0.1)      where(bits(seed, x.shape) >= 0.1 · 2³¹, x / 0.9, 0)

So every layout has the same masks, as a shard draws its part alone; a pass that is computed again draws the same. The
seed is an input of the step and carried: each draw takes the next one of a chain, and what the last one leaves is the
seed of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi
from typing import Any

import torch
from torch import fx

from ...ir.errors import CaptureError
from . import compat

SEED = "random_seed"  # the buffer of a traced module, and where `Captured` finds it
STEP, START = (
    1_664_525,
    1_013_904_223,
)  # of a linear congruential chain: Numerical Recipes, 3rd ed., section 7.1
MIX = (
    (16, 0x85EBCA6B),
    (13, 0xC2B2AE35),
)  # and a last shift by 16: MurmurHash3's finalizer (A. Appleby, 2011)
aten = torch.ops.aten


def signed(word: int) -> int:
    """A word of 32 bits as the number that int32 has for it."""
    return (word + 2**31) % 2**32 - 2**31


@torch.library.custom_op("meshwright::bits", mutates_args=())
def bits(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """31 random bits for each place of a shape, from a seed of rank 0, int32."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(tuple(shape))
    return _shifted(_mixed(places ^ _mixed(seed)), 1)


@bits.register_fake
def _(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return seed.new_empty(shape)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    for by, factor in MIX:
        words = (words ^ _shifted(words, by)) * signed(factor)
    return words ^ _shifted(words, 16)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros behind."""
    return (words >> by) & ((1 << (32 - by)) - 1)


def next_seed(seed: torch.Tensor) -> torch.Tensor:
    return seed * STEP + START


def _apart(seed: torch.Tensor) -> torch.Tensor:
    """The first seed of another chain."""
    return bits(seed, [])


# ---------------------------------------------------------------- what is drawn


def dropout(seed: torch.Tensor, x: torch.Tensor, rate: float, train: bool = True) -> torch.Tensor:
    return _dropped(seed, x, rate, x.shape) if train and rate else x


def feature_dropout(
    seed: torch.Tensor, x: torch.Tensor, rate: float, train: bool = True
) -> torch.Tensor:
    """Of whole channels [n, c, ...]."""
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    return _dropped(seed, x, rate, shape) if train and rate else x


def _dropped(
    seed: torch.Tensor, x: torch.Tensor, rate: float, shape: Sequence[int]
) -> torch.Tensor:
    if rate == 1:
        return x * 0
    return torch.where(bits(seed, shape) >= round(rate * 2**31), x * (1 / (1 - rate)), 0.0)


def uniform(seed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """From 0 on, below 1: as many bits as f32 holds."""
    return ((bits(seed, shape) >> 7).float() * 2.0**-24).to(dtype)


def normal(seed: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Box and Muller (Annals of Mathematical Statistics 29, 1958), of two draws."""
    radius = (1 - uniform(seed, shape, torch.float32)).log().mul(-2).sqrt()
    angle = uniform(seed * STEP ^ START, shape, torch.float32) * (2 * pi)
    return (radius * angle.cos()).to(dtype)


def _rand(seed: torch.Tensor, shape: Sequence[int], dtype: Any = None, **_: Any) -> torch.Tensor:
    return uniform(seed, shape, dtype or torch.get_default_dtype())


def _randn(seed: torch.Tensor, shape: Sequence[int], dtype: Any = None, **_: Any) -> torch.Tensor:
    return normal(seed, shape, dtype or torch.get_default_dtype())


def _rand_like(seed: torch.Tensor, x: torch.Tensor, dtype: Any = None, **_: Any) -> torch.Tensor:
    return uniform(seed, x.shape, dtype or x.dtype)


def _randn_like(seed: torch.Tensor, x: torch.Tensor, dtype: Any = None, **_: Any) -> torch.Tensor:
    return normal(seed, x.shape, dtype or x.dtype)


def _bernoulli(seed: torch.Tensor, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return (uniform(seed, x.shape, torch.float32) < x).to(x.dtype)


DRAWS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.dropout.default: dropout,
    aten.dropout_.default: dropout,
    aten.feature_dropout.default: feature_dropout,
    aten.rand.default: _rand,
    aten.randn.default: _randn,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.bernoulli.default: _bernoulli,
}


# ---------------------------------------------------------------- which seed


def seeded(root: fx.GraphModule) -> None:
    """Hand seeds to what draws, in a module and in the parts that it calls; the seed is a buffer of it.

    Raises:
        CaptureError: a draw writes over what it is given.
    """
    if not _draws(root):
        return
    root.register_buffer(SEED, torch.zeros((), dtype=torch.int32))
    [output] = [node for node in root.graph.nodes if node.op == "output"]
    with root.graph.inserting_before(next(iter(root.graph.nodes))):
        seed = root.graph.get_attr(SEED)
    last = _chained(root, seed)
    with root.graph.inserting_before(output):
        root.graph.call_function(aten.copy_.default, (seed, last))
    root.recompile()


def _draws(part: fx.GraphModule) -> bool:
    return any(
        _is_draw(node) or any(_draws(inner) for inner in _called(part, node))
        for node in part.graph.nodes
    )


def _is_draw(node: fx.Node) -> bool:
    if node.target == aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0))
    if node.target in (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default):
        return bool(node.args[1]) and bool(node.args[2])
    return node.target in DRAWS


def _called(part: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Parts that a node calls, as one under autocast or computed again."""
    if node.op != "call_function":
        return []
    given = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    found = [getattr(part, str(a.target), None) for a in given]
    return [inner for inner in found if isinstance(inner, fx.GraphModule)]


def _chained(part: fx.GraphModule, seed: fx.Node) -> fx.Node:
    """Each draw takes the next seed, and a part that is called a chain of its own; the last one."""
    graph = part.graph
    for node in list(graph.nodes):
        inner = [each for each in _called(part, node) if _draws(each)]
        if not inner and not _is_draw(node):
            continue
        with graph.inserting_before(node):
            seed = graph.call_function(next_seed, (seed,))
        if inner:
            with graph.inserting_before(node):
                node.args = (*node.args, graph.call_function(_apart, (seed,)))
            _chain_of_its_own(inner[0])
        elif node.target == aten.scaled_dot_product_attention.default:
            node.kwargs = {**node.kwargs, "seed": seed}
        else:
            if node.target == aten.dropout_.default and len(node.args[0].users) > 1:
                raise CaptureError(
                    "dropout writes over what something else reads.",
                    where=compat.user_line(node) or "the step",
                    fix="dropout(x, p, inplace=False)",
                )
            node.args, node.target = (seed, *node.args), DRAWS[node.target]
    part.recompile()
    return seed


def _chain_of_its_own(part: fx.GraphModule) -> None:
    inputs = [node for node in part.graph.nodes if node.op == "placeholder"]
    first = next(iter(part.graph.nodes))
    place = part.graph.inserting_after(inputs[-1]) if inputs else part.graph.inserting_before(first)
    with place:
        seed = part.graph.placeholder(SEED)
    _chained(part, seed)
