"""Random bits: the bits of one key are drawn whole on every device, then cut.

A generator's counter runs over the whole shape, so a shard can't draw its part
alone without changing the user's numbers. Dims of a batch of keys are parallel.
"""

from __future__ import annotations

from ..rule import Rule
from .elementwise import elementwise
from .factors import Call, Factors, require, rule_for


@rule_for("random_bits", "random_split", "random_wrap", "random_unwrap")
def per_key(call: Call) -> Rule:
    """Leading dims, one per key dim, are shared; what each key makes or is made of is whole."""
    operand, result = call.operands[0].shape, call.results[0].shape
    keys = min(len(operand), len(result))
    require(operand[:keys] == result[:keys])
    factors = Factors()
    shared = factors.like(operand[:keys])
    tails = [factors.wholes(shape[keys:]) for shape in (operand, result)]
    return factors.rule([shared + tails[0]], [shared + tails[1]])


@rule_for("random_seed", "random_fold_in", "random_clone", "threefry2x32")
def per_element(call: Call) -> Rule:
    return elementwise(call)


@rule_for("rng_bit_generator", "rng_uniform", "random_gamma")
def whole(call: Call) -> Rule:
    factors = Factors()
    operands = [factors.wholes(kind.shape) for kind in call.operands]
    return factors.rule(operands, [factors.wholes(kind.shape) for kind in call.results])
