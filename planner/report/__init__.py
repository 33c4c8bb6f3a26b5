"""What a search found, written down: plans, their tables, the collectives and instructions they mean."""
