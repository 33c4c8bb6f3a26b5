"""Where weights, gradients and optimizer state lie between the devices that share a batch, in ZeRO's words.

    weights gathered in each pass    ZeRO-3 (FSDP), or HSDP where shards belong to groups of those devices
    gathered once per step           ZeRO-2 where gradients are scattered as they are made, else ZeRO-1
    whole                            the same by where optimizer state lies; or replicated

A fully sharded plan need not gather in each pass: where memory allows, one gather serves both. It is no ZeRO-3, whose
memory it does not have. Source of the stages: Rajbhandari et al., SC'20.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from math import prod

from ..ir.graph import ITEM_BYTES
from ..ir.plan import Collective, Plan, Tensor

MOSTLY = 0.5  # share of FLOP or bytes from which a word applies
CAUSES = {  # of memory, in words that need no legend
    "parameter": "weights as the step keeps them",
    "optimizer": "optimizer state",
    "activations": "kept from the forward pass for the backward pass",
    "gradients": "of weights and of activations",
    "gathered": "copies of weights and activations, as products read them",
    "copies": "values under a second name, in the same layout",
    "casts": "weights in the type of the computation",
    "update": "what the optimizer makes on its way",
    "loop bodies": "within one turn of a loop",
    "moved": "operands brought to another layout",
    "handed over": "between stages",
    "microbatches in flight": "what further microbatches on their way keep",
}
SPOKEN = {"f32": "fp32", "f16": "fp16", "f64": "fp64"}


def states(plan: Plan, data: Collection[str]) -> str:
    """What of the states is in shards over the axes that cut the batch."""
    if prod(use.size for use in plan.uses if use.axis in data) == 1:
        return ""
    weights = [t for t in plan.tensors if t.role == "parameter"]
    if _cut_share(weights, data) < MOSTLY:
        optimizer = [t for t in plan.tensors if t.role == "optimizer"]
        if _cut_share(optimizer, data) < MOSTLY:
            return "replicated states"
        return _stage(plan, data, "")
    full = _cut_share(weights, data, every=True) >= MOSTLY
    passes, once = (_gathered(plan, data, weights, each) for each in (True, False))
    if passes >= max(MOSTLY, once):
        return "ZeRO-3 (FSDP)" if full else "hybrid-sharded states (HSDP)"
    told = _stage(plan, data, _weights(plan, data, weights, once, passes))
    return told if full else f"{told}, shards within groups"


def _stage(plan: Plan, data: Collection[str], weights: str) -> str:
    """ZeRO-1 or 2, and what lies in shards; `weights`: theirs, and when they are gathered."""
    parts = (
        ["optimizer state", "gradients"] if _scatters_gradients(plan, data) else ["optimizer state"]
    )
    stage, (what, comma, gathered) = len(parts), weights.partition(",")
    parts += [what] * bool(what)
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"ZeRO-{stage}: {listed} sharded{comma}{gathered}"


def _weights(
    plan: Plan, data: Collection[str], weights: list[Tensor], once: float, passes: float
) -> str:
    """ "fp32 weights, bf16 weights gathered once per step" """
    if once < MOSTLY:
        shares = ((passes, "gathered per pass"), (once, "gathered once per step"))
        parts = [f"{share:.0%} of weights {when}" for share, when in shares if share > 0.005]
        return f"weights, {' and '.join(parts)}" if parts else "weights"
    largest = max((t for t in weights if _share(plan, data, t, ("prepare",)) >= MOSTLY), key=_size)
    width = round(_share(plan, data, largest, ("prepare",)))
    narrow = next(
        (t.dtype for t in plan.tensors if t.role == "activation" and ITEM_BYTES[t.dtype] == width),
        "",
    )
    if not narrow or narrow == largest.dtype:
        return "weights, weights gathered once per step"
    kept, sent = (SPOKEN.get(name, name) for name in (largest.dtype, narrow))
    return f"{kept} weights, {sent} weights gathered once per step"


def _gathered(plan: Plan, data: Collection[str], weights: list[Tensor], each: bool) -> float:
    """Share of the weights that are gathered in `each` pass, or else once per step."""
    phases = (("forward",), ("backward",)) if each else (("prepare",),)
    found = [t for t in weights if any(_share(plan, data, t, phase) >= MOSTLY for phase in phases)]
    return sum(map(_size, found)) / max(1, sum(map(_size, weights)))


def _share(plan: Plan, data: Collection[str], weight: Tensor, phases: Collection[str]) -> float:
    """Bytes that each element of a weight has in the gathers of these phases; 0 where it is not gathered. Of gathers
    over one axis after another the last has all bytes."""
    nbytes: dict[tuple[str, ...], float] = defaultdict(float)
    for item in plan.collectives:
        named = item.what.partition(" -> ")[0] == weight.name
        if named and item.kind == "all_gather" and item.phase in phases and _over(item, data):
            nbytes[item.axes] += item.nbytes * item.count
    over = {axis for axes in nbytes for axis in axes}
    left = prod(plan.mesh.sizes.get(axis, 1) for axis in cut_axes(weight) if axis not in over)
    times = 1 if "prepare" in phases else plan.microbatches
    return max(nbytes.values(), default=0.0) * left / times / _size(weight)


def _over(item: Collective, axes: Collection[str]) -> bool:
    """Whether a collective is over any of these axes."""
    return not set(item.axes).isdisjoint(axes)


def _size(tensor: Tensor) -> int:
    """Elements of all layers."""
    return tensor.count * prod(tensor.shape)


def _cut_share(tensors: list[Tensor], axes: Collection[str], every: bool = False) -> float:
    """Share of the bytes of tensors whose resting layout is cut over one (or every) axis."""
    total = sum(map(_bytes, tensors))
    test = set(axes).issubset if every else (lambda cut: bool(set(axes) & cut))
    return sum(_bytes(t) for t in tensors if test(set(cut_axes(t)))) / total if total else 0.0


def cut_axes(tensor: Tensor) -> list[str]:
    """Axes that cut a tensor: "[x·y, -] + owes z" -> x, y."""
    inside = tensor.sharding.partition("[")[2].partition("]")[0]
    return [axis for dim in inside.split(", ") for axis in dim.split("·") if axis not in ("", "-")]


def _bytes(tensor: Tensor) -> float:
    """Of all its copies on all devices that hold different parts."""
    return tensor.local_bytes * prod(tensor.shape) / max(1, prod(tensor.local_shape))


def _scatters_gradients(plan: Plan, axes: Collection[str]) -> bool:
    """Whether gradients lie in shards from the backward pass on."""
    sums = {"backward": 0.0, "update": 0.0}
    for item in plan.collectives:
        if (
            item.phase in sums
            and item.kind in ("reduce_scatter", "all_reduce")
            and _over(item, axes)
        ):
            scattered = item.kind == "reduce_scatter" and item.phase == "backward"
            sums["backward" if scattered else "update"] += item.nbytes * item.count
    return sums["backward"] > sums["update"]
