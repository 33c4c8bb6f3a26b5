"""Positions and masks that models count out: written as numbers and iotas, and worth what torch says."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.ir.passes.dead import drop_dead_ops  # noqa: E402

from .test_torch_map import graph_of, with_gradients  # noqa: E402

T = 8


def kinds(function: Callable[..., Any], *args: Any) -> list[str]:
    """The ops that are left; the results are torch's."""
    graph, arrays = graph_of(lambda *given: [function(*given)], args)
    [found] = replay(graph, arrays, args)
    assert torch.equal(found, function(*args))
    return sorted(op.kind for op in drop_dead_ops(graph).ops)


def packed_segments(_: Any) -> Any:
    """Numbers of documents in a row, as positions that start again tell them."""
    positions = torch.arange(T).expand(3, T)
    before = torch.cat([positions[:, :1] - 1, positions[:, :-1]], 1)
    return (positions - before != 1).cumsum(1)


def test_what_is_the_same_everywhere_is_one_number():
    assert kinds(packed_segments, torch.zeros(1)) == ["broadcast_in_dim"]


def test_a_mask_that_is_true_everywhere_is_left_out():
    def masked(a: Any) -> Any:
        segments = packed_segments(a)
        return (a > 0) & (segments[:, :, None] == segments[:, None, :])[0, 0]

    assert kinds(masked, torch.linspace(-1, 1, T)) == ["gt"]


def test_a_look_up_by_counted_places_is_a_slice():
    def looked_up(mask: Any) -> Any:
        rows, columns = torch.arange(3)[:, None, None, None], torch.arange(T)
        return mask[rows, columns[None, None, None, :]]

    assert kinds(looked_up, torch.ones(3, T).bool()) == ["broadcast_in_dim"]
    assert kinds(lambda a: a[torch.arange(2, 5)], torch.ones(T, 2)) == ["slice"]
    some = kinds(lambda a: a[1, torch.arange(4), 2:], torch.ones(3, T, 5))
    assert set(some) == {"slice", "squeeze"}


def test_embeddings_of_counted_positions_are_rows_and_so_is_their_gradient():
    def embedded(table: Any) -> Any:
        return F.embedding(torch.arange(2, 6).expand(3, 4), table)

    table = torch.randn(T, 5, generator=torch.Generator().manual_seed(0))
    both = with_gradients(embedded, (table,))
    graph, arrays = graph_of(both, (table,))
    for found, wanted in zip(replay(graph, arrays, (table,)), both(table), strict=True):
        torch.testing.assert_close(found, wanted)
    assert not {"gather", "scatter-add"} & {op.kind for op in graph.ops}


def test_places_outside_of_a_tensor_are_no_slice():
    graph, _ = graph_of(lambda a: [a[torch.arange(4) * 2]], (torch.ones(T, 2),))
    assert "gather" in [op.kind for op in graph.ops]


STEPS: tuple[Callable[[Any, Any, int], Any], ...] = (
    lambda a, b, n: a + n,
    lambda a, b, n: a - b,
    lambda a, b, n: a * n,
    lambda a, b, n: torch.where(a > n, a, b),
    lambda a, b, n: torch.where((a == b) | (a < n), a, b),
    lambda a, b, n: ((a >= b) & (a != n)).long() + b,
    lambda a, b, n: a.cumsum(n % 2) - b,
    lambda a, b, n: (~(a <= b)).long().cumsum(n % 2) + a,
    lambda a, b, n: torch.cat([a[:, :n], b[:, n:]], 1),
    lambda a, b, n: torch.cat([a[:, :1] - 1, a[:, :-1]], 1),
    lambda a, b, n: torch.stack([a, b])[n % 2],
    lambda a, b, n: a[:, ::2].repeat_interleave(2, 1),
    lambda a, b, n: a.amax(n % 2, keepdim=True) + b,
    lambda a, b, n: a.reshape(2, 2, 4).transpose(0, 1).reshape(4, 4),
    lambda a, b, n: a[torch.arange(4)[:, None], torch.arange(4) * (n % 2)],
    lambda a, b, n: a.T,
)


def test_whatever_is_counted_is_worth_what_torch_says():
    """Random ways from iotas; a result may depend on an input, so that not all of it counts."""
    for seed in range(60):
        drawn = random.Random(seed)
        plan = [(drawn.choice(STEPS), drawn.randint(-1, 3)) for _ in range(6)]

        def way(given: Any, plan: Any = plan, mixed: bool = seed % 3 == 0) -> Any:
            a, b = torch.arange(4).expand(4, 4), torch.arange(4)[:, None].expand(4, 4)
            if mixed:
                b = b + given
            for step, n in plan:
                a, b = step(a, b, n), a
            return a

        kinds(way, torch.tensor([[3], [1], [4], [1]]))
