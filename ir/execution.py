"""How a plan is executed, as far as it may be chosen: how attention and losses run, which communication runs beside.

What nobody chooses is the backend's `ExecutionModel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .composites.attention_op import AttentionKind
from .composites.losses import LossKind
from .errors import PlanError, did_you_mean
from .execution_model import Backend, execution_model

OverlapKind = Literal["parameters", "gradients", "tensor", "stages"]
OVERLAPS: tuple[OverlapKind, ...] = get_args(OverlapKind)
WITHIN: tuple[OverlapKind, ...] = (
    "parameters",
    "gradients",
    "tensor",
)  # of a stage, or of a step without stages
MEANT = {
    "parameters": "gathers of weights",
    "gradients": "reductions of gradients",
    "tensor": "exchanges within layers",
    "stages": "sends between stages",
}


USUAL: tuple[OverlapKind, ...] = ("parameters", "gradients", "stages")


@dataclass(frozen=True)
class Execution:
    """What is chosen of a plan's execution: `Execution("fused", ("parameters",))` prints
    `attention fused; gathers of weights run beside computation, all else waits`.

    `overlap` names kinds of communication that may hide behind computation, in the order of `OVERLAPS`. `loss` tells
    how cross-entropy runs; with all logits in memory, as steps write it, it goes without saying.
    """

    attention: AttentionKind = "plain"
    overlap: tuple[OverlapKind, ...] = ()
    loss: LossKind = "plain"

    def __str__(self) -> str:
        loss = "" if self.loss == "plain" else f", loss {self.loss}"
        return f"attention {self.attention}{loss}; {self.beside}"

    @property
    def within(self) -> tuple[OverlapKind, ...]:
        """What may hide within a stage, or within a step without stages."""
        return tuple(kind for kind in self.overlap if kind in WITHIN)

    @property
    def beside(self) -> str:
        """What runs beside computation, in words."""
        if not self.overlap:
            return "no overlap of communication with compute is assumed"
        named = ", ".join(MEANT[kind] for kind in self.overlap)
        rest = "" if set(WITHIN) <= set(self.overlap) else ", all else waits"
        return f"{named} run beside computation{rest}"


def usual_execution(kinds: Iterable[str], backend: Backend = "xla") -> Execution:
    """What is assumed of a backend's runtime unless said otherwise, by the kinds of a cluster's devices.

    A scheduler that overlaps moves what does not wait for a layer beside it: gathers of weights, reductions of
    gradients, and sends. Exchanges within layers wait for products and products for them; they hide where these are cut
    in chunks, which XLA does for some only, so they are not counted on.
    """
    models = [execution_model(kind, backend) for kind in kinds]
    fused = all(model.fuses_attention for model in models)
    return Execution(
        "fused" if fused else "plain", USUAL if all(model.overlaps for model in models) else ()
    )


def parse_attention(
    text: str, known: Sequence[AttentionKind] = get_args(AttentionKind)
) -> AttentionKind:
    """How attention runs, by name.

    Raises:
        PlanError: none of the known names.
    """
    for name in known:
        if name == text:
            return name
    fix = did_you_mean(text, known)
    raise PlanError(f"attention cannot be `{text!s:.60}`.", where="attention", fix=fix)


def parse_loss(text: str) -> LossKind:
    """How cross-entropy runs, by name.

    Raises:
        PlanError: none of the known names.
    """
    known: tuple[LossKind, ...] = get_args(LossKind)
    for name in known:
        if name == text:
            return name
    fix = did_you_mean(text, known)
    raise PlanError(f"loss cannot be `{text!s:.60}`.", where="loss", fix=fix)


def parse_overlap(
    given: str | Iterable[object], known: tuple[OverlapKind, ...] = OVERLAPS
) -> tuple[OverlapKind, ...]:
    """Kinds of communication by name, in the order of `OVERLAPS`: `none`, `all`, or names joined by `,` or `+`.

    Raises:
        PlanError: what is none of the known names.
    """
    words = given.replace("+", ",").split(",") if isinstance(given, str) else [*given]
    names = {word.strip() if isinstance(word, str) else word for word in words} - {""}
    if "none" in names and len(names) > 1:
        others = ", ".join(sorted(str(name) for name in names - {"none"}))
        raise PlanError(
            f"overlap cannot be none and {others:.60} at once.", where="overlap", fix="one of them"
        )
    names -= {"none"}
    if "all" in names:
        names |= {*known}
    for name in words:
        name = name.strip() if isinstance(name, str) else name
        if name not in (*known, "", "none", "all"):
            fix = did_you_mean(str(name), (*known, "all", "none"))
            if name in OVERLAPS:
                fix = f"{name} with a pipeline alone, --pp; or leave it out"
            raise PlanError(f"overlap cannot be `{name!s:.60}`.", where="overlap", fix=fix)
    return tuple(kind for kind in OVERLAPS if kind in names)
