"""A plan in the field's words: data, tensor, sequence and expert parallel, ZeRO, FSDP.

The planner knows none of these names; it cuts factors. They are read off its
decisions here: what each axis cuts in the products, and where the states lie.
"""

from __future__ import annotations

from math import prod

from ..ir.plan import AxisUse, Plan, Tensor

MOSTLY = 0.5  # share of FLOP or bytes from which a word applies


def words(plan: Plan) -> tuple[str, ...]:
    """One phrase per form of parallelism found, the largest part first."""
    found = [_pipeline(plan), *_axes(plan), _states(plan)]
    if plan.microbatches > 1:
        found.append(f"{plan.microbatches} microbatches, gradients accumulated")
    if plan.recompute != "none":
        found.append(f"recompute {plan.recompute}")
    return tuple(phrase for phrase in found if phrase)


def _pipeline(plan: Plan) -> str:
    if plan.pipeline is None:
        return ""
    ranks, stages = len(plan.pipeline.first), len(plan.pipeline.stages)
    held = f", {stages // ranks} stages each" if stages > ranks else ""
    single = ", a single program for all stages" if plan.pipeline.program == "single" else ""
    return f"pipeline parallel {ranks}, {plan.pipeline.schedule}{held}{single}"


def duty(use: AxisUse) -> str:
    """What an axis does most: "data", "sequence", "expert", "tensor", "mixed" or "idle"."""
    shares = {
        "data": use.batch,
        "sequence": use.sequence,
        "expert": use.experts,
        "tensor": use.columns + use.sums,
        "idle": use.idle,
    }
    most = max(shares, key=lambda name: shares[name])
    return most if shares[most] >= MOSTLY else "mixed"


def _axes(plan: Plan) -> list[str]:
    found = []
    for name in ("data", "tensor", "expert", "sequence", "mixed", "idle"):
        uses = [use for use in plan.uses if duty(use) == name]
        if not uses:
            continue
        ways, axes = prod(use.size for use in uses), "·".join(use.axis for use in uses)
        if name == "idle":
            found.append(f"all {ways} devices along {axes} do the same work" if ways > 1 else _alone(plan))
        elif name == "mixed":
            found.append(f"mixed parallel {ways} over {axes}")
        else:
            found.append(f"{name} parallel {ways} over {axes}")
        if name == "tensor" and _scatters_activations(plan, {use.axis for use in uses}):
            found.append("sequence parallel between blocks")
    return found


def _alone(plan: Plan) -> str:
    return "one device" if plan.pipeline is None else "each stage on one device"


def _scatters_activations(plan: Plan, axes: set[str]) -> bool:
    """Whether forward sums over the tensor axes end scattered rather than replicated."""
    sums = {"reduce_scatter": 0.0, "all_reduce": 0.0}
    for item in plan.collectives:
        if item.phase == "forward" and item.kind in sums and set(item.axes) <= axes:
            sums[item.kind] += item.nbytes * item.count
    return sums["reduce_scatter"] > sums["all_reduce"]


def _states(plan: Plan) -> str:
    """ZeRO's stages over the axes that cut the batch."""
    data = {use.axis for use in plan.uses if duty(use) == "data"}
    ways = prod(use.size for use in plan.uses if use.axis in data)
    if ways == 1:
        return ""
    cut = {role: _cut_share(plan, role, data) for role in ("parameter", "optimizer")}
    if cut["parameter"] >= MOSTLY:
        full = _cut_share(plan, "parameter", data, every=True) >= MOSTLY
        return "ZeRO-3 (FSDP)" if full else "hybrid-sharded states (HSDP)"
    if cut["optimizer"] >= MOSTLY:
        return "ZeRO-2" if _scatters_gradients(plan, data) else "ZeRO-1"
    return "replicated states"


def _cut_share(plan: Plan, role: str, axes: set[str], every: bool = False) -> float:
    """Share of the bytes of a role whose resting layout is cut over one (or every) axis."""
    tensors = [t for t in plan.tensors if t.role == role]
    total = sum(map(_bytes, tensors))
    test = axes.issubset if every else (lambda cut: bool(axes & cut))
    return sum(_bytes(t) for t in tensors if test(set(cut_axes(t)))) / total if total else 0.0


def cut_axes(tensor: Tensor) -> list[str]:
    """Axes that cut a tensor: "[x·y, -] + owes z" -> x, y."""
    inside = tensor.sharding.partition("[")[2].partition("]")[0]
    return [axis for dim in inside.split(", ") for axis in dim.split("·") if axis not in ("", "-")]


def _bytes(tensor: Tensor) -> float:
    """Of all its copies on all devices that hold different parts."""
    return tensor.local_bytes * prod(tensor.shape) / max(1, prod(tensor.local_shape))


def _scatters_gradients(plan: Plan, axes: set[str]) -> bool:
    sums = {"reduce_scatter": 0.0, "all_reduce": 0.0}
    for item in plan.collectives:
        if item.phase in ("backward", "update") and item.kind in sums and set(item.axes) & axes:
            sums[item.kind] += item.nbytes * item.count
    return sums["reduce_scatter"] > sums["all_reduce"]
