"""Floating-point operations of every op, and which ops nobody can count.

product             2 per combination of its factors; of a grouped one (`ragged_dot`), 2 per row of
                    the operand that is dealt out, contracted element and column
convolution         2 per result element and kernel element
decompositions      Golub & Van Loan, Matrix Computations, 4th ed., tables 3.2, 4.2, 5.5, 7.7, 8.3, 8.6
fft                 5 n log2 n for n points (Cooley & Tukey; the count that FFTW's benchmarks use)
a kernel by hand    what it says of itself: `pallas_call(cost_estimate=...)`, `mw.kernel(flop=...)`
a composite         its products
others              one per result element
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import log2, prod

from ...ir.composites.bodies import body_of
from ...ir.graph import Op, TensorType
from ...ir.ops import COMPOSITES, CONTRACTIONS, DECOMPOSITIONS
from ...ir.rules import rule_of, vocabulary
from ...ir.rules.rule import Rule

KNOWN = vocabulary()
SQUARE = {
    "cholesky": 1 / 3,
    "eigh": 9.0,
    "eig": 25.0,
    "schur": 25.0,
    "hessenberg": 10 / 3,
    "tridiagonal": 4 / 3,
}
TALL = frozenset({"lu", "qr", "geqrf", "geqp3", "householder_product", "svd"})


def flop(op: Op, rule: Rule, types: Mapping[int, TensorType]) -> float:
    """Floating-point operations of one op on whole tensors; see the module's docstring."""
    if op.kind == "dot_general" and not rule.opaque:
        return 2.0 * prod(factor.size for factor in rule.factors)
    if op.kind == "ragged_dot_general":
        return 2.0 * types[op.inputs[0]].size * _columns(op, types)
    if op.kind == "conv_general_dilated":
        return 2.0 * _convolution_terms(op, types)
    if op.kind in DECOMPOSITIONS:
        return _decomposition(op, types)
    if op.kind in COMPOSITES:
        return _products_within(op.text("body"))
    told = told_cost(op)
    return told[0] if told else float(sum(types[v].size for v in op.outputs))


def told_cost(op: Op) -> tuple[float, float] | None:
    """FLOP and bytes moved, where the kernel's author wrote them down."""
    stated = op.has("flop") and op.has("nbytes")
    return (op.real("flop"), op.real("nbytes")) if stated else None


def is_counted(op: Op) -> bool:
    """Whether anything is known of what one run of an op takes."""
    return (
        op.kind in KNOWN
        or op.kind in DECOMPOSITIONS
        or bool(op.regions)
        or told_cost(op) is not None
    )


@lru_cache(maxsize=256)
def _products_within(body: str) -> float:
    graph = body_of(body)
    return sum(
        flop(op, rule_of(op, graph.types), graph.types)
        for op in graph.ops
        if op.kind in CONTRACTIONS
    )


def _columns(op: Op, types: Mapping[int, TensorType]) -> int:
    """Columns of a grouped product: dims of its second operand that the first has no part in."""
    shared = {
        d
        for name in ("rhs_contracting", "rhs_batch", "rhs_group_dimensions")
        for d in op.integers(name)
    }
    return prod(size for d, size in enumerate(types[op.inputs[1]].shape) if d not in shared)


def _convolution_terms(op: Op, types: Mapping[int, TensorType]) -> float:
    """Output elements times kernel elements per output feature, less what dilation skips."""
    kernel, result = types[op.inputs[1]], types[op.outputs[0]]
    out_feature = kernel.shape[op.integers("rhs_spec")[0]]
    return result.size * kernel.size / out_feature / prod(op.integers("lhs_dilation"))


def _decomposition(op: Op, types: Mapping[int, TensorType]) -> float:
    first = types[op.inputs[0]]
    if op.kind == "fft":
        points = prod(op.integers("fft_lengths"))
        return 5.0 * max(first.size, types[op.outputs[0]].size) * log2(max(points, 2))
    rows, columns = first.shape[-2:] if first.rank > 1 else (first.size, 1)
    many, short = prod(first.shape[:-2]), min(rows, columns)
    if op.kind == "triangular_solve":
        return float(types[op.inputs[1]].size * rows)
    if op.kind in SQUARE:
        return SQUARE[op.kind] * many * rows**3
    if op.kind == "svd":
        return many * (4.0 * rows * columns * max(rows, columns) + 22.0 * short**3)
    return many * (1 if op.kind == "lu" else 2) * (rows * columns - short**2 / 3) * short
