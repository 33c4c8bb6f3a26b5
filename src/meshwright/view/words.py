"""A plan in the field's words: data, tensor, sequence and expert parallel, ZeRO, FSDP.

The planner knows none of these names; it cuts factors. They are read off its
decisions here: what each axis cuts in the products, and where the states lie.
"""

from __future__ import annotations

from math import prod

from ..ir.plan import EXACT, AxisUse, Plan, Proof
from .states import MOSTLY, states

SHOWN = 5e-4  # the least gap that one digit of a percentage shows


def words(plan: Plan) -> tuple[str, ...]:
    """One phrase per form of parallelism found, the largest part first."""
    stages, lie = (
        _stages(plan),
        states(plan, {use.axis for use in plan.uses if duty(use) == "data"}),
    )
    told = f"fullest rank: {lie}" if stages and lie else lie
    found = [_pipeline(plan), *(stages or _axes(plan, plan.uses)), told]
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


def claim(proof: Proof) -> str:
    """How good the plan is proven to be."""
    return f"within {share(proof.gap)} of optimal" if proof.status == "within_gap" else proof.status


def enough(proof: Proof) -> str:
    """At which gap the search was to end."""
    return "" if proof.good_enough is None else f" ({100 * proof.good_enough:g}% is good enough)"


def share(gap: float) -> str:
    """In percent; none only where the gap counts as none."""
    return f"{gap:.1%}" if gap >= SHOWN or gap <= EXACT else f"{100 * gap:.1g}%"


def ended(proof: Proof) -> str:
    """Why the search did not go on."""
    told = {"end": "all was looked at", "estimate": "only the most promising were solved"}
    return told.get(proof.stopped_by, f"stopped by {proof.stopped_by}")


def lasted(proof: Proof, word: str) -> str:
    """How long the search took; plans that were read from a file do not say it."""
    return "" if proof.seconds is None else f"{word} {proof.seconds:.1f} s"


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


def unlike(plan: Plan) -> dict[tuple[AxisUse, ...], list[int]]:
    """The stages by what their axes do; none where all do the same."""
    found: dict[tuple[AxisUse, ...], list[int]] = {}
    for number, stage in enumerate(plan.pipeline.stages if plan.pipeline else ()):
        found.setdefault(stage.uses, []).append(number)
    return found if len(found) > 1 else {}


def _stages(plan: Plan) -> list[str]:
    found = unlike(plan)
    return [
        f"{_numbered(numbers)}: {', '.join(_axes(plan, uses))}" for uses, numbers in found.items()
    ]


def _numbered(stages: list[int]) -> str:
    """[0, 1, 2, 5] -> "stages 0-2, 5"."""
    starts = [n for n in stages if n - 1 not in stages]
    ends = [n for n in stages if n + 1 not in stages]
    spans = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    return f"stage{'s' * (len(stages) > 1)} {', '.join(spans)}"


def _axes(plan: Plan, uses: tuple[AxisUse, ...]) -> list[str]:
    found = []
    for name in ("data", "tensor", "expert", "sequence", "mixed", "idle"):
        mine = [use for use in uses if duty(use) == name]
        if not mine:
            continue
        ways, axes = prod(use.size for use in mine), "·".join(use.axis for use in mine)
        if name == "idle":
            found.append(
                f"all {ways} devices along {axes} do the same work" if ways > 1 else _alone(plan)
            )
        elif name == "mixed":
            found.append(f"mixed parallel {ways} over {axes}")
        else:
            found.append(f"{name} parallel {ways} over {axes}")
        if (
            name == "tensor"
            and uses == plan.uses
            and _scatters_activations(plan, set(axes.split("·")))
        ):
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
