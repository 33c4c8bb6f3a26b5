"""meshwright: an automatic parallelization compiler for training steps."""
