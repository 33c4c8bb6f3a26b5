"""What things cost: seconds of ops and collectives on one cluster; `model.py` is what the planner sees."""
