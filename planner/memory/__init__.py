"""Bytes on one device at every moment of a step: what is stored, how long, where."""
