"""ATen's operations as those of the graph: a file per family, each registers its overloads in `builder.MAPPED`."""

from . import drawn, elementwise, indexing, normalisation, products, reductions, shape, windows
from .builder import MAPPED, Builder, Value, type_of
from .walk import write

__all__ = [
    "MAPPED", "Builder", "Value", "drawn", "elementwise", "indexing", "normalisation", "products", "reductions",
    "shape", "type_of", "windows", "write",
]  # fmt: skip
