"""Every kind of op, and what can be said of it without looking at one: one table, no framework.

    mul            elementwise; linear in either operand
    reshape        forwarding, alias, view; linear
    dot_general    kernel, contraction, summing; linear in either operand

`attribute_table.py` says which attributes a kind has. How an op's dims belong together is told by its rule (`rules/`),
which also depends on attributes and types. A kind that is not listed is opaque: nothing is known of it, so it has no
trait.

    elementwise     an element of the result is made of those at its place; parameters know nothing of shapes
    transcendental  elementwise, a series per element: many multiplications
    division        elementwise, divides or takes roots: some multiplications
    exponential     a power of a fixed base
    addition        two operands are added, in either order
    forwarding      one operand, all elements of which are handed on, at most rounded, repeated or at other places
    alias           a result is its operand in memory as it is, under another shape
    view            a result is (part of) its operand in memory, with other strides: run by itself it moves nothing
    movement        elements are written to other places, unchanged
    kernel          runs by itself, reads and writes memory: compilers do not fuse it into what is around it
    contraction     products, summed over shared dims: the FLOP of a step
    reduction       dims are dropped: one result for many elements
    summing         adds up many elements, so that rounding depends on the order
    choosing        elements are picked by comparing them: rounding may turn a choice
    indexed         reads or writes where indices say
    decomposition   of matrices into factors, and what solves by them, or of signals
    random          makes or turns keys and random numbers
    composite       stands for a graph of its own, which it carries; `attention` or `loss` says of which kind
    control_flow    runs regions: loops and branches

Sources: MLIR's traits (Elementwise, Commutative), StableHLO's names of kinds, XLA's notions of a bitcast and of an
expensive op (`instruction_fusion.cc`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Literal, get_args

Trait = Literal[
    "elementwise", "transcendental", "division", "exponential", "addition", "forwarding", "alias", "view", "movement",
    "kernel", "contraction", "reduction", "summing", "choosing", "indexed", "decomposition", "random", "composite",
    "attention", "loss", "control_flow",
]  # fmt: skip
# Groups of operands. In those of one group together an op is linear, the others held: f(a + b) = f(a) + f(b).
Linear = tuple[tuple[int | EllipsisType, ...], ...]
NONE: Linear = ()
FIRST: Linear = ((0,),)
EITHER: Linear = ((0,), (1,))
ALL: Linear = ((0, ...),)


@dataclass(frozen=True, slots=True)
class OpKind:
    """One kind of op; `(1, ...)` in `linear` are all operands from the second on."""

    name: str
    traits: frozenset[Trait]
    linear: Linear


# Names of kinds, their traits, and in which operands they are linear.
_ROWS: tuple[tuple[str, str, Linear], ...] = (
    # element by element
    ("abs ceil clz floor integer_pow is_finite not one_minus_square", "elementwise", NONE),
    ("population_count round sign square", "elementwise", NONE),
    ("and eq eq_to ge gt le le_to lt lt_to max min mulhi ne nextafter or", "elementwise", NONE),
    ("shift_left shift_right_arithmetic shift_right_logical xor clamp", "elementwise", NONE),
    ("acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e", "elementwise transcendental", NONE),
    ("cos cosh digamma erf erf_inv erfc expm1 lgamma log log1p log2", "elementwise transcendental", NONE),
    ("log_sum_exp logistic pow sin sinh tan tanh", "elementwise transcendental", NONE),
    ("exp exp2", "elementwise transcendental exponential", NONE),
    ("cbrt rem rsqrt sqrt", "elementwise division", NONE),
    ("div", "elementwise division", FIRST),
    ("mul", "elementwise", EITHER),
    ("add add_any", "elementwise addition", ALL),
    ("sub complex", "elementwise", ALL),
    ("averaged conj estimated imag neg real scaled", "elementwise", FIRST),
    ("select_n", "elementwise", ((1, ...),)),
    ("convert_element_type name reduce_precision stop_gradient", "elementwise forwarding", FIRST),
    ("copy", "elementwise forwarding movement", FIRST),
    # the same elements in another shape or place
    ("reshape squeeze", "forwarding alias view", FIRST),
    ("broadcast_in_dim transpose", "forwarding view", FIRST),
    ("rev slice split unstack", "view", FIRST),
    ("optimization_barrier", "alias view", ALL),
    ("concatenate", "movement", ALL),
    ("dynamic_slice", "movement", FIRST),
    ("dynamic_update_slice", "movement kernel", ((0, 1),)),
    ("pad", "", ((0, 1),)),
    ("stack", "", ALL),
    ("tile", "", FIRST),
    ("bitcast_convert_type iota", "", NONE),
    # many elements into one
    ("dot_general conv_general_dilated ragged_dot_general", "kernel contraction summing", EITHER),
    ("reduce_sum", "reduction summing", FIRST),
    ("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_xor", "reduction", NONE),
    ("argmax argmin", "reduction choosing", NONE),
    ("cumsum reduce_window_sum", "kernel summing", FIRST),
    ("cumlogsumexp", "kernel summing", NONE),
    ("cummax cummin cumprod reduce_window_max reduce_window_min", "kernel", NONE),
    ("select_and_scatter_add", "kernel summing", FIRST),
    ("select_and_gather_add", "kernel", FIRST),
    # by index, by order
    ("gather", "kernel indexed", FIRST),
    ("scatter", "kernel indexed", ((0, 2),)),
    ("scatter-add scatter-sub", "kernel indexed summing", ((0, 2),)),
    ("scatter-mul", "kernel indexed", FIRST),
    ("scatter-max scatter-min", "kernel indexed", NONE),
    ("sort top_k approx_top_k", "kernel choosing", NONE),
    # matrices
    ("cholesky eig eigh geqp3 geqrf hessenberg householder_product lu", "kernel decomposition", NONE),
    ("qr schur svd tridiagonal", "kernel decomposition", NONE),
    ("triangular_solve", "kernel decomposition", ((1,),)),
    ("fft", "kernel decomposition", FIRST),
    ("lu_pivots_to_permutation symmetric_product", "kernel", NONE),
    ("tridiagonal_solve", "kernel", ((3,),)),
    # random numbers
    ("random_bits random_gamma rng_bit_generator rng_uniform threefry2x32", "kernel random", NONE),
    ("random_clone random_fold_in random_seed random_split random_unwrap random_wrap", "random", NONE),
    # what carries a graph, or is written by hand
    ("attention attention_grad", "kernel composite attention", NONE),
    ("cross_entropy cross_entropy_grad cross_entropy_and_grad", "kernel composite loss", NONE),
    ("user_kernel", "kernel", NONE),
    ("scan while cond", "control_flow", NONE),
)  # fmt: skip


def _table() -> dict[str, OpKind]:
    found: dict[str, OpKind] = {}
    for names, traits, linear in _ROWS:
        for name in names.split():
            assert name not in found, name
            assert {*traits.split()} <= {*get_args(Trait)}, traits
            found[name] = OpKind(name, frozenset(traits.split()), linear)  # type: ignore[arg-type]
    return found


KINDS: Mapping[str, OpKind] = _table()


def having(trait: Trait) -> frozenset[str]:
    """The kinds with a trait."""
    return frozenset(name for name, kind in KINDS.items() if trait in kind.traits)


def linear_in(kind: str, operands: int) -> tuple[tuple[int, ...], ...]:
    """Groups of operands in which an op with so many of them is linear; none where nothing is known."""
    groups = KINDS[kind].linear if kind in KINDS else NONE
    return tuple(tuple(_numbers(group, operands)) for group in groups)


def _numbers(group: tuple[int | EllipsisType, ...], operands: int) -> Iterable[int]:
    numbers = [each for each in group if isinstance(each, int)]
    return range(numbers[0], operands) if ... in group else numbers


ELEMENTWISE = having("elementwise")
TRANSCENDENTAL = having("transcendental")
DIVISION = having("division")
EXPONENTIAL = having("exponential")
ADDITION = having("addition")
FORWARDING = having("forwarding")
ALIASES = having("alias")
VIEWS = having("view")
MOVEMENT = having("movement")
KERNELS = having("kernel")
CONTRACTIONS = having("contraction")
REDUCTIONS = having("reduction")
SUMMING = having("summing")
CHOOSING = having("choosing")
INDEXED = having("indexed")
DECOMPOSITIONS = having("decomposition")
RANDOM = having("random")
COMPOSITES = having("composite")
ATTENTION = having("attention")
LOSSES = having("loss")
CONTROL_FLOW = having("control_flow")
