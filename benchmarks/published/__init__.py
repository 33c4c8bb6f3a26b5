"""Published training runs read as jobs, a file per publisher; `fidelity.py` prices them."""
