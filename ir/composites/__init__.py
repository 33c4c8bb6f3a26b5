"""Ops that stand for a part of a graph: attention and cross-entropy as fused kernels run them."""
