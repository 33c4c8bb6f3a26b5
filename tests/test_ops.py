"""The table of kinds: whole, without contradictions, and true of what the ops compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import combinations
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.backends.xla import emit
from meshwright.ir import ops
from meshwright.ir.analysis import masks, refusals
from meshwright.ir.composites import bodies
from meshwright.ir.passes import narrow
from meshwright.ir.rules import random, user_kernel, vocabulary
from meshwright.planner.cost import flop

from .op_samples import FAMILIES, PRIMITIVES, Sample, family
from .test_rules import host, same, summand, tolerance


@cache
def samples() -> Mapping[str, list[Sample]]:
    """By kind."""
    found = defaultdict[str, list[Sample]](list)
    for name in FAMILIES:
        for one in family(name):
            found[one.op.kind].append(one)
    return found


def of(kinds: frozenset[str]) -> Iterator[tuple[str, Sample]]:
    """Samples of these kinds, of each kind at least one where this jax has it."""
    for kind in sorted(kinds & PRIMITIVES.keys()):
        assert samples()[kind], f"no sample of {kind}"
        yield from ((kind, one) for one in samples()[kind])


def is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


# The table is whole


def test_the_table_has_the_kinds_that_have_rules_and_those_that_run_regions():
    assert ops.KINDS.keys() - ops.CONTROL_FLOW == vocabulary()
    assert {"scan", "while", "cond"} == ops.CONTROL_FLOW


@pytest.mark.parametrize(
    "named",
    [
        emit._EMITTERS, narrow._WRITERS, masks._ELEMENTWISE, refusals.STATISTICS, refusals.BY_PLACE, random.DRAWN,
        flop.SQUARE, flop.TALL, {user_kernel.KIND},
        {bodies.FORWARD, bodies.BACKWARD, bodies.LOSS, bodies.LOSS_GRAD, bodies.BOTH},
    ],
)  # fmt: skip
def test_no_list_names_a_kind_that_the_table_lacks(named: Any):
    assert set(named) <= ops.KINDS.keys()


def test_every_decomposition_has_a_count_of_its_operations():
    assert {*flop.SQUARE, *flop.TALL, "triangular_solve", "fft"} == ops.DECOMPOSITIONS


def test_composites_are_those_that_have_bodies():
    assert {bodies.FORWARD, bodies.BACKWARD} == ops.ATTENTION
    assert {bodies.LOSS, bodies.LOSS_GRAD, bodies.BOTH} == ops.LOSSES


def test_of_an_unknown_kind_nothing_is_said():
    assert ops.linear_in("pallas_call", 2) == ()
    assert "pallas_call" not in ops.KINDS


# Traits agree with each other

WITHIN = [
    (ops.TRANSCENDENTAL | ops.DIVISION | ops.ADDITION, ops.ELEMENTWISE),
    (ops.EXPONENTIAL, ops.TRANSCENDENTAL),
    (ops.ALIASES, ops.VIEWS),
    (ops.CONTRACTIONS, ops.KERNELS & ops.SUMMING),
    (ops.COMPOSITES | ops.DECOMPOSITIONS | ops.INDEXED, ops.KERNELS),
    (ops.ATTENTION | ops.LOSSES, ops.COMPOSITES),
]


@pytest.mark.parametrize("narrower, wider", WITHIN)
def test_what_has_one_trait_has_the_other(narrower: frozenset[str], wider: frozenset[str]):
    assert narrower <= wider


APART = {
    "elementwise": ops.ELEMENTWISE,
    "view": ops.VIEWS,
    "reduction": ops.REDUCTIONS,
    "kernel": ops.KERNELS,
    "control flow": ops.CONTROL_FLOW,
}


@pytest.mark.parametrize("one, other", combinations(APART, 2))
def test_no_kind_is_both(one: str, other: str):
    assert not APART[one] & APART[other]


def test_what_is_linear_in_one_group_is_not_linear_in_a_larger_one():
    for kind in ops.KINDS:
        groups = [set(group) for group in ops.linear_in(kind, 3)]
        assert all(not a & b for a, b in combinations(groups, 2)), kind


def test_contractions_are_linear_in_either_operand():
    assert {ops.KINDS[kind].linear for kind in ops.CONTRACTIONS} == {ops.EITHER}


# Traits are true of what ops compute


def test_elementwise_dims_are_all_parallel():
    for kind, one in of(ops.ELEMENTWISE):
        assert {factor.kind for factor in one.rule.factors} <= {"parallel"}, kind
        assert len(set(one.rule.results)) == 1, kind


def test_reductions_drop_dims():
    for kind, one in of(ops.REDUCTIONS):
        assert one.types[one.op.outputs[0]].rank < one.types[one.op.inputs[0]].rank, kind


def test_addition_adds_in_either_order():
    for _, one in of(ops.ADDITION):
        a, b = one.operands
        same(host(one.run([a, b])[0]), host(a) + host(b))
        same(host(one.run([b, a])[0]), host(one.run([a, b])[0]))


def test_forwarding_hands_every_element_on():
    for kind, one in of(ops.FORWARDING):
        given, made = one.operands[0], one.run(one.operands)[0]
        if is_float(given) == is_float(made):
            loose = 1e-2 if kind in ("convert_element_type", "reduce_precision") else 0.0
            assert all_among(host(made), host(given), loose), kind
            assert all_among(host(given), host(made), loose), kind


def all_among(some: Any, others: Any, loose: float) -> bool:
    close = np.isclose(some.reshape(-1, 1), others.ravel(), loose, loose / 100, equal_nan=True)
    return bool(close.any(1).all())


def test_an_alias_is_its_operand_in_memory():
    """Where a reshape does not transpose first."""
    for _, one in of(ops.ALIASES):
        if one.op.kind != "reshape" or not one.op.has("dimensions"):
            for given, made in zip(one.operands, one.run(one.operands), strict=True):
                np.testing.assert_array_equal(host(given).ravel(), host(made).ravel())


def test_views_and_movement_make_no_numbers():
    for kind, one in of(ops.VIEWS | ops.MOVEMENT):
        given = np.concatenate([host(value).ravel() for value in one.operands])
        assert all(all_among(host(made), given, 0.0) for made in one.run(one.operands)), kind


def linear_numerically(one: Sample, group: tuple[int, ...]) -> bool:
    """Whether f(a + b) = f(a) + f(b) on random numbers, other operands held."""
    for seed in range(3, 7):
        parts = [summand(one, group, seed), summand(one, group, seed + 1)]
        total = [a + b if k in group else a for k, (a, b) in enumerate(zip(*parts, strict=True))]
        halves = [map(host, one.run(part)) for part in parts]
        try:
            for whole, a, b in zip(map(host, one.run(total)), *halves, strict=True):
                assert np.isfinite(whole).all()
                same(a + b, whole, tolerance(one))
        except AssertionError:
            return False
    return True


# The next float to a number is all but that number; what a kernel by hand computes is its author's word.
ALSO_LINEAR = {"nextafter", "user_kernel"}
LINEAR = sorted(ops.KINDS.keys() & {k for k in PRIMITIVES if ops.linear_in(k, 3)})


@pytest.mark.parametrize("kind", LINEAR)
def test_what_is_called_linear_is(kind: str):
    """On real numbers. Look-ups that fill with a number are not (`rules/indexing.py`)."""
    for one in samples()[kind]:
        groups = (
            ()
            if kind == "gather" and not one.rule.linear
            else ops.linear_in(kind, len(one.operands))
        )
        for group in groups:
            if all(map(is_float, [*(one.operands[k] for k in group), *one.run(one.operands)])):
                assert linear_numerically(one, group), (kind, group)


def test_what_is_not_called_linear_is_not():
    """So that no kind is forgotten; `ALSO_LINEAR` are."""
    for kind in sorted(vocabulary() & PRIMITIVES.keys() - ALSO_LINEAR):
        for one in samples()[kind]:
            said = {k for group in ops.linear_in(kind, len(one.operands)) for k in group}
            for k in range(len(one.operands)) if all_real(one) else ():
                assert k in said or not linear_numerically(one, (k,)), (kind, k)


def all_real(one: Sample) -> bool:
    """Whether it takes and makes real numbers, all of them finite."""
    return all(
        is_float(v) and np.isfinite(host(v)).all() for v in [*one.operands, *one.run(one.operands)]
    )


def test_rules_claim_no_more_than_the_table_says():
    """Less where numbers are no sums of parts (truth values, bytes), or a look-up fills with a number."""
    for kind in sorted(vocabulary() & PRIMITIVES.keys()):
        for one in samples()[kind]:
            assert {*one.rule.linear} <= {*ops.linear_in(kind, len(one.operands))}, kind


FAMILIES_OF_KINDS = {
    "scatter": "indexed",
    "cum": "kernel",
    "reduce_window_": "kernel",
    "arg": "choosing",
    "random_": "random",
    "rng_": "random",
    "attention": "attention",
    "cross_entropy": "loss",
}


@pytest.mark.parametrize("start, trait", FAMILIES_OF_KINDS.items())
def test_kinds_that_are_named_alike_share_a_trait(start: str, trait: str):
    for name, kind in ops.KINDS.items():
        assert not name.startswith(start) or trait in kind.traits, name
