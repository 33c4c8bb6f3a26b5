"""Ops on torch against the same ops on jax, whole and cut along every factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from meshwright.backends.torch.dtypes import torch_dtype  # noqa: E402
from meshwright.backends.torch.emit import EMITTERS, emitter  # noqa: E402
from meshwright.backends.torch.shard import Part, View  # noqa: E402
from meshwright.ir.errors import LoweringError  # noqa: E402
from meshwright.ir.graph import Op  # noqa: E402
from meshwright.ir.rules.rule import Factor, Rule  # noqa: E402

from .op_samples import FAMILIES, Sample, family  # noqa: E402
from .test_rules import WAYS, Ways, check, combine, cut_operands, host, places  # noqa: E402

# What torch has no type or function for, or nobody trains with
LEFT_OUT = {
    "clz", "population_count", "mulhi", "eq_to", "le_to", "lt_to", "select_and_gather_add", "approx_top_k",
    "user_kernel",
    "fft", "geqp3", "geqrf", "cholesky", "eig", "eigh", "hessenberg", "householder_product", "lu", "qr", "schur", "svd",
    "tridiagonal", "triangular_solve", "tridiagonal_solve", "lu_pivots_to_permutation", "symmetric_product",
    "random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32", "random_clone",
    "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap",
}  # fmt: skip


def given(value: Any) -> Any:
    """An array of jax's as a tensor."""
    array = np.asarray(value)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


def back(value: Any) -> np.ndarray:
    return (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()


def has_words(sample: Sample) -> bool:
    """Unsigned words, for which torch has hardly a function."""
    return any(kind.dtype in ("u16", "u32", "u64", "key") for kind in sample.types.values())


def run(sample: Sample, operands: Any, cuts: dict[int, Part]) -> list[np.ndarray]:
    dtypes = tuple(torch_dtype(sample.types[v].dtype) for v in sample.op.outputs)
    found = emitter(sample.op, View(sample.rule, cuts, dtypes))([given(each) for each in operands])
    assert [each.dtype for each in found] == list(dtypes)
    return [back(each) for each in found]


@pytest.mark.parametrize("ways_of", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ops_give_what_they_give_on_jax_however_they_are_cut(
    name: str, ways_of: Callable[[Rule], Iterator[Ways]]
):
    met = set[str]()
    for one in family(name):
        if one.op.kind in LEFT_OUT or has_words(one):
            continue
        met.add(one.op.kind)
        wanted = [host(result) for result in one.run(one.operands)]
        before = [given(each).clone() for each in one.operands]
        check(one, run(one, one.operands, {}), wanted, "whole")
        assert all(
            torch.equal(a.nan_to_num(), given(b).nan_to_num())
            for a, b in zip(before, one.operands, strict=True)
        )
        for ways in ways_of(one.rule):
            shards = {
                place: run(
                    one, cut_operands(one, dict(_parts(ways, place))), dict(_parts(ways, place))
                )
                for place in places(ways)
            }
            got = [combine(one.rule, ways, shards, r) for r in range(len(wanted))]
            check(one, got, wanted, f"(factor, parts) {ways}")
    assert met or name == "linalg"


def _parts(ways: Any, place: Any) -> list[tuple[int, Part]]:
    return [(factor, Part(i, n)) for (factor, n), i in zip(ways, place, strict=True)]


def test_every_kind_has_a_place_or_is_left_out():
    kinds = {one.op.kind for name in FAMILIES for one in family(name)}
    assert kinds - LEFT_OUT <= EMITTERS.keys()
    assert not LEFT_OUT & EMITTERS.keys()


def test_rows_of_a_microbatch_are_its_runs_of_neighbours():
    """Twelve rows over 2 devices and 3 microbatches, in one group and in two."""
    rule = Rule((Factor(12),), (), (((0,),),))
    for groups in (1, 2):
        met = [
            View(rule, {0: Part(device, 2, moment, 3, groups)}, ()).positions((0,)).tolist()
            for moment in range(3) for device in range(2)
        ]  # fmt: skip
        assert sorted(row for rows in met for row in rows) == list(range(12))
    assert met[0] == [0, 1] and met[1] == [6, 7] and met[2] == [2, 3]


def test_an_op_that_torch_has_not_is_refused_by_name():
    with pytest.raises(LoweringError, match="`fft` cannot run on torch yet"):
        emitter(Op("fft", (), (), where="step.py:3"), View(Rule((), (), ()), {}, ()))
