"""The intra-operator problem: how every op of one program is laid out on one mesh, and what that costs."""
