"""What ops of each kind may say of themselves: one table of attributes, in words of no framework.

An attribute that has nothing to say is left out. Kinds that are not in the vocabulary (`ops.py`) may say anything.

Sources: the names of StableHLO where it has the attribute, of XLA where only it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from .attrs import Attr, integer_rows
from .ops import COMPOSITES, KINDS

Sort = Literal["flag", "integer", "integers", "rows", "real", "number", "text", "names", "any"]

SORTS: Mapping[Sort, tuple[str, Callable[[Attr], bool]]] = {
    "flag": ("truth value", lambda value: isinstance(value, bool)),
    "integer": ("whole number", lambda value: _is_integer(value)),
    "integers": ("tuple of whole numbers", lambda value: _is_tuple(value, _is_integer)),
    "rows": ("tuple of tuples of whole numbers", lambda value: integer_rows(value) is not None),
    "real": ("real number", lambda value: isinstance(value, float)),
    "number": ("number", lambda value: _is_integer(value) or isinstance(value, float)),
    "text": ("text", lambda value: isinstance(value, str)),
    "names": ("tuple of texts", lambda value: _is_tuple(value, lambda v: isinstance(v, str))),
    "any": ("attribute", lambda value: True),
}

# name -> its sort, and what it holds; the same for every kind that has it.
HOLDS: Mapping[str, tuple[Sort, str]] = {
    # dims and sizes
    "axes": ("integers", "dims that are reduced"),
    "axis": ("integer", "the dim along which it runs"),
    "base_dilation": ("integers", "by dim, 1 + the gaps between elements of the operand"),
    "broadcast_dimensions": ("integers", "by dim of the operand, that of the result"),
    "dimension": ("integer", "the dim along which it runs"),
    "dimensions": ("integers", "dims that go or turn around; of a reshape, their order before it"),
    "fft_lengths": ("integers", "sizes of the transformed dims, the last ones"),
    "limit_indices": ("integers", "by dim, the end"),
    "new_sizes": ("integers", "the shape of the result"),
    "padding": ("rows", "by dim, what is added before and after"),
    "padding_config": ("rows", "by dim, what is added before, after and between"),
    "permutation": ("integers", "by dim of the result, that of the operand"),
    "permutation_size": ("integer", "elements of a permutation"),
    "reduction_dimension": ("integer", "the dim along which the largest are taken"),
    "reps": ("integers", "by dim, how often it is repeated"),
    "shape": ("integers", "the shape of the result"),
    "sizes": ("integers", "of the parts; of a fused operation, of the free dims"),
    "slice_sizes": ("integers", "by dim, the size of what is taken"),
    "start_indices": ("integers", "by dim, the begin"),
    "strides": ("integers", "by dim, 1 + the elements left out between two; 1 if not said"),
    "window_dilation": ("integers", "by dim, 1 + the gaps between elements of a window"),
    "window_dimensions": ("integers", "by dim, the size of a window"),
    "window_strides": ("integers", "by dim, the step from window to window"),
    # products
    "batch_group_count": ("integer", "groups of the batch of a convolution"),
    "feature_group_count": ("integer", "groups of the features of a convolution"),
    "lhs_batch": ("integers", "dims of the left operand that run beside dims of the right one"),
    "lhs_contracting": ("integers", "dims of the left operand that are summed"),
    "lhs_dilation": ("integers", "by place, 1 + the gaps between elements of the images"),
    "lhs_ragged_dimensions": ("integers", "the dim of the left operand that groups share"),
    "lhs_spec": ("integers", "dims of the images: batch, feature, places"),
    "out_spec": ("integers", "dims of the result: batch, feature, places"),
    "precision": (
        "any",
        "of products: a level, one for each operand, or an algorithm, bf16_bf16_f32",
    ),
    "rhs_batch": ("integers", "as of the left operand"),
    "rhs_contracting": ("integers", "as of the left operand"),
    "rhs_dilation": ("integers", "by place, 1 + the gaps between elements of the kernel"),
    "rhs_group_dimensions": ("integers", "the dim of the right operand that counts groups"),
    "rhs_spec": ("integers", "dims of the kernel: feature of the result, of the images, places"),
    # element types and rounding
    "accuracy": ("any", "the worst that will do: `highest`, or (absolute, relative, last places)"),
    "bit_width": ("integer", "of each random number"),
    "dtype": ("text", "the element type of the result"),
    "exponent_bits": ("integer", "of what is rounded to"),
    "index_dtype": ("text", "the element type of the result"),
    "input_dtype": ("text", "the element type of the operand"),
    "mantissa_bits": ("integer", "of what is rounded to"),
    "new_dtype": ("text", "the element type of the result"),
    "out_dtype": ("text", "the element type of the result, where products are summed"),
    "rounding_method": ("text", "of halves: `away_from_zero` or `to_nearest_even`"),
    # look-ups, updates, order
    "aggregate_to_topk": ("flag", "whether candidates are cut down to the largest"),
    "collapsed_slice_dims": ("integers", "dims of the operand that the result has not"),
    "fill_value": ("number", "what is found where an index is out of range"),
    "indices_are_sorted": ("flag", "whether they are known to be"),
    "inserted_window_dims": ("integers", "dims of the operand that updates have not"),
    "is_max_k": ("flag", "whether the largest are taken, or the least"),
    "is_stable": ("flag", "whether equals keep their order"),
    "k": ("integer", "how many are taken"),
    "mode": ("text", "an index out of range: `clip`, `fill_or_drop`, `promise_in_bounds`"),
    "num_keys": ("integer", "operands that are compared"),
    "offset_dims": ("integers", "dims of the result that come from slices"),
    "operand_batching_dims": (
        "integers",
        "dims of the operand that run beside dims of the indices",
    ),
    "recall_target": ("real", "the share of the largest that is to be found"),
    "reduction_input_size_override": ("integer", "the size that recall is of; -1: the operand's"),
    "scatter_dims_to_operand_dims": (
        "integers",
        "by column of the indices, the dim that it counts",
    ),
    "scatter_indices_batching_dims": ("integers", "those dims of the indices"),
    "select": ("text", "how an element of a window is chosen: `ge` or `le`"),
    "start_index_map": ("integers", "by column of the indices, the dim that it counts"),
    "start_indices_batching_dims": ("integers", "those dims of the indices"),
    "unique_indices": ("flag", "whether no two are the same"),
    "update": ("text", "digest of the program that makes the new elements of the old ones"),
    "update_window_dims": ("integers", "dims of the updates that are slices of the operand"),
    # other numbers
    "alpha": ("real", "the factor of the product"),
    "beta": ("real", "the factor of what is added"),
    "name": ("text", "what the user calls the value"),
    "reverse": ("flag", "whether it runs from the end"),
    "y": ("integer", "the exponent"),
    # matrices
    "algorithm": ("text", "which one is asked for"),
    "compute_left_eigenvectors": ("flag", "whether they are results"),
    "compute_right_eigenvectors": ("flag", "whether they are results"),
    "compute_schur_vectors": ("flag", "whether they are results"),
    "compute_uv": ("flag", "whether singular vectors are results"),
    "conjugate_a": ("flag", "of the matrix"),
    "enable_eigvec_derivs": ("flag", "whether eigenvectors may be differentiated"),
    "fft_type": ("text", "`fft`, `ifft`, `rfft` or `irfft`"),
    "full_matrices": ("flag", "whether factors are square"),
    "implementation": ("text", "which one is asked for"),
    "left_side": ("flag", "whether the matrix is on the left"),
    "lower": ("flag", "whether the lower triangle is read"),
    "perturb_singular": ("flag", "whether small pivots are moved away from 0"),
    "pivoting": ("flag", "whether columns are exchanged"),
    "select_callable": ("any", "which eigenvalues come first"),
    "sort_eig_vals": ("flag", "whether some come first"),
    "sort_eigenvalues": ("flag", "whether they rise"),
    "subset_by_index": ("integers", "which are results"),
    "transpose_a": ("flag", "of the matrix"),
    "unit_diagonal": ("flag", "whether the diagonal is 1"),
    "use_magma": ("flag", "whether that library is asked for"),
    # random numbers
    "drawn": ("text", "on what numbers depend: `by_place`, `by_key`, `whole` (`rules/random.py`)"),
    "impl": ("text", "the generator: `threefry2x32`, `rbg`, ..."),
    "log_space": ("flag", "whether the log is drawn"),
    "partitionable": ("flag", "whether places alone are hashed"),
    # loops and branches
    "dearest": ("integer", "the branch with most work (`analysis/branches.py`)"),
    "length": ("integer", "turns"),
    "num_carry": ("integer", "values handed from turn to turn"),
    "num_consts": ("integer", "operands that are the same in every turn"),
    "unroll": ("integer", "turns that compilers are asked to write out"),
    # what passes add
    "by": ("text", "`mul` or `div`"),
    "microbatches": ("integer", "how many"),
    # fused operations (`rules/composite.py`, `composites/`)
    "blocks": ("integer", "of keys, that `spans` count"),
    "body": ("text", "the graph that it stands for"),
    "complete": ("integers", "results that are the same on devices that share the vocabulary"),
    "delta": ("integers", "operands that the backward pass sums beforehand"),
    "given": ("integer", "operands that the forward pass kept"),
    "joined": ("integer", "maxima and sums of parts that are brought together"),
    "kept": ("integer", "results that the backward pass is given"),
    "keys": ("integer", "the size of the dim of keys"),
    "linear": ("rows", "groups of operands in which it is linear"),
    "operands": ("any", "by dim of each operand, what it is cut by: free dims, or names"),
    "results": ("any", "by dim of each result, what it is cut by: free dims, or names"),
    "ring": ("integer", "the free dim of queries along which keys may go round"),
    "round": ("flag", "whether they do where queries are cut"),
    "rows": ("integer", "the free dim that `spans` are by"),
    "spans": ("rows", "by block of rows, the first key block that it reads and the end"),
    "vocabulary": ("integer", "the free dim that is the vocabulary"),
    # kernels by hand
    "cut": ("names", "dims that devices may share"),
    "flop": ("number", "FLOP of a run"),
    "function": ("text", "the name of what computes it"),
    "nbytes": ("number", "bytes read and written by a run"),
    "program": ("text", "digest of what computes it"),
}

_WINDOWS = "padding window_dimensions window_strides"
_DILATED = f"{_WINDOWS} base_dilation window_dilation"
_ORDER = "indices_are_sorted mode operand_batching_dims unique_indices"
_PAIRS = "lhs_batch lhs_contracting out_dtype precision rhs_batch rhs_contracting"

# Kinds, and the attributes that they may have; kinds that are missing have none.
_ROWS: tuple[tuple[str, str], ...] = (
    ("cbrt cos exp exp2 expm1 log log1p log2 logistic rsqrt sin sqrt tan tanh", "accuracy"),
    ("add div mul sub", "out_dtype"),
    ("integer_pow", "y"),
    ("round", "rounding_method"),
    ("conj", "input_dtype"),
    ("name", "name"),
    ("convert_element_type bitcast_convert_type", "new_dtype"),
    ("reduce_precision", "exponent_bits mantissa_bits"),
    ("scaled", "by"),
    ("averaged estimated", "microbatches"),
    ("reshape", "dimensions new_sizes"),
    ("squeeze rev", "dimensions"),
    ("broadcast_in_dim", "broadcast_dimensions shape"),
    ("transpose", "permutation"),
    ("slice", "limit_indices start_indices strides"),
    ("split", "axis sizes"),
    ("stack unstack", "axis"),
    ("concatenate", "dimension"),
    ("dynamic_slice", "slice_sizes"),
    ("pad", "padding_config"),
    ("tile", "reps"),
    ("iota", "dimension dtype shape"),
    ("dot_general", _PAIRS),
    ("ragged_dot_general", f"{_PAIRS} lhs_ragged_dimensions rhs_group_dimensions"),
    (
        "conv_general_dilated",
        "batch_group_count feature_group_count lhs_dilation lhs_spec out_dtype out_spec padding precision "
        "rhs_dilation rhs_spec window_strides",
    ),
    ("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor", "axes"),
    ("argmax argmin", "axes index_dtype"),
    ("cumlogsumexp cummax cummin cumprod cumsum", "axis reverse"),
    ("reduce_window_max reduce_window_min reduce_window_sum", _DILATED),
    ("select_and_scatter_add", f"{_WINDOWS} select"),
    ("select_and_gather_add", f"{_DILATED} select"),
    (
        "gather",
        f"{_ORDER} collapsed_slice_dims fill_value offset_dims slice_sizes start_index_map start_indices_batching_dims",
    ),
    (
        "scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub",
        f"{_ORDER} inserted_window_dims scatter_dims_to_operand_dims scatter_indices_batching_dims update_window_dims",
    ),
    ("scatter", "update"),
    ("sort", "dimension is_stable num_keys"),
    ("top_k", "axis k"),
    (
        "approx_top_k",
        "aggregate_to_topk is_max_k k recall_target reduction_dimension reduction_input_size_override",
    ),
    ("eig", "compute_left_eigenvectors compute_right_eigenvectors enable_eigvec_derivs implementation"),
    ("eigh", "algorithm lower sort_eigenvalues subset_by_index"),
    ("geqp3", "use_magma"),
    ("qr", "full_matrices pivoting use_magma"),
    ("schur", "compute_schur_vectors select_callable sort_eig_vals"),
    ("svd", "algorithm compute_uv full_matrices subset_by_index"),
    ("triangular_solve", "conjugate_a left_side lower transpose_a unit_diagonal"),
    ("tridiagonal", "lower"),
    ("tridiagonal_solve", "perturb_singular"),
    ("fft", "fft_lengths fft_type"),
    ("lu_pivots_to_permutation", "permutation_size"),
    ("symmetric_product", "alpha beta"),
    ("random_bits", "bit_width shape"),
    ("random_split rng_uniform", "shape"),
    ("random_gamma", "log_space"),
    ("random_bits random_fold_in random_gamma random_split", "drawn partitionable"),
    ("random_seed random_wrap", "impl"),
    ("rng_bit_generator", "algorithm dtype shape"),
    ("scan", "length num_carry num_consts reverse unroll"),
    ("while", "num_carry num_consts"),
    ("cond", "dearest"),
    (
        " ".join(COMPOSITES),
        "blocks body complete delta given joined kept keys linear operands results ring round rows sizes spans "
        "vocabulary",
    ),
    ("user_kernel", "cut flop function nbytes operands program results"),
)  # fmt: skip


def _table() -> dict[str, frozenset[str]]:
    found = {kind: frozenset[str]() for kind in KINDS}
    for kinds, names in _ROWS:
        assert {*names.split()} <= HOLDS.keys(), names
        for kind in kinds.split():
            found[kind] |= {*names.split()}
    return found


ATTRIBUTES: Mapping[str, frozenset[str]] = _table()


def unfit(kind: str, name: str, value: Attr) -> str | None:
    """What is wrong with an attribute of an op, if something is."""
    if type(value) is float:
        return f"`{name}` is a bare float, which equals numbers of other types"
    if kind not in ATTRIBUTES:
        return None
    if name not in ATTRIBUTES[kind]:
        known = ", ".join(sorted(ATTRIBUTES[kind])) or "none"
        return f"`{kind}` has no attribute `{name}`; it has {known}"
    words, fits = SORTS[HOLDS[name][0]]
    return None if fits(value) else f"`{name}` is no {words}"


def _is_integer(value: Attr) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tuple(value: Attr, of: Callable[[Attr], bool]) -> bool:
    return isinstance(value, tuple) and all(map(of, value))
