"""Random bits. Where a number depends on its key and place alone, a shard draws its part.

Threefry hashes (key, place), the place counted over the whole shape (jax's default since 0.5,
`jax_threefry_partitionable`; Salmon et al., SC 2011). Other generators run on from a state, in ways that
differ by platform, so what one key makes is whole there: drawn everywhere, then cut.
"""

from __future__ import annotations

from .elementwise import elementwise
from .factors import Factors, OpCall, require, rule_for
from .rule import Rule

# Of these the backend says in `drawn` what a number depends on: "by_place" its key and place, "by_key" all that
# its key makes, "whole" all keys of a batch (XLA's generators under vmap).
DRAWN = frozenset({"random_bits", "random_split", "random_fold_in", "random_gamma"})


@rule_for("random_bits", "random_split")
def drawn(call: OpCall) -> Rule:
    """keys [k] -> [k, n]: n is parallel where each number depends on its place alone."""
    keys, result = call.operands[0].shape, call.results[0].shape
    require(keys == result[: len(keys)])
    factors, how = Factors(), call.attrs.get("drawn", "whole")
    shared = factors.wholes(keys) if how == "whole" else factors.like(keys)
    tail = result[len(keys) :]
    made = factors.like(tail) if how == "by_place" else factors.wholes(tail)
    return factors.rule([shared], [shared + made])


@rule_for("random_fold_in", "random_gamma")
def one_per_key(call: OpCall) -> Rule:
    if call.attrs.get("drawn", "whole") == "whole":
        return whole(call)
    return elementwise(call)


@rule_for("random_wrap", "random_unwrap")
def per_key(call: OpCall) -> Rule:
    """Leading dims, one per key dim, are shared; the words that a key is made of are whole."""
    operand, result = call.operands[0].shape, call.results[0].shape
    keys = min(len(operand), len(result))
    require(operand[:keys] == result[:keys])
    factors = Factors()
    shared = factors.like(operand[:keys])
    tails = [factors.wholes(shape[keys:]) for shape in (operand, result)]
    return factors.rule([shared + tails[0]], [shared + tails[1]])


@rule_for("random_seed", "random_clone", "threefry2x32")
def per_element(call: OpCall) -> Rule:
    return elementwise(call)


@rule_for("rng_bit_generator", "rng_uniform")
def whole(call: OpCall) -> Rule:
    factors = Factors()
    operands = [factors.wholes(kind.shape) for kind in call.operands]
    return factors.rule(operands, [factors.wholes(kind.shape) for kind in call.results])
