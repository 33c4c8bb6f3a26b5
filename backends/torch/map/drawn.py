"""Random bits by place, as arithmetic on iotas: every part of a dim draws its own (`..drawn`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..drawn import MIX, signed
from .builder import Builder, Value, maps_library


@maps_library("meshwright.bits.default")
def bits(b: Builder, seed: Value, shape: Sequence[int]) -> Value:
    places = b.number(0, "s32")
    for d, n in enumerate(shape):
        row = b.iota((n,), 0, "s32")
        if (stride := signed(prod(shape[d + 1 :]) % 2**32)) != 1:
            row = b.elementwise("mul", row, stride)
        place = b.broadcast(row, shape, (d,))
        places = place if d == 0 else b.elementwise("add", places, place)
    words = b.elementwise("xor", places, _mixed(b, seed))
    return _shifted(b, _mixed(b, words), 1)


def _mixed(b: Builder, words: Value) -> Value:
    for by, factor in MIX:
        words = b.elementwise("xor", words, _shifted(b, words, by))
        words = b.elementwise("mul", words, signed(factor))
    return b.elementwise("xor", words, _shifted(b, words, 16))


def _shifted(b: Builder, words: Value, by: int) -> Value:
    return b.elementwise("shift_right_logical", words, by)
