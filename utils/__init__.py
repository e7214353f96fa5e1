"""The rooms that `train.py`, `inference.py` and the generators are built from."""
