"""Published pipeline partitions and their inputs: each anchor's objective, our plan under it, one evaluator for all."""
