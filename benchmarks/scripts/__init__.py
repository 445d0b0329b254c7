"""Ten small training scripts of different shapes, in which `attribution_scripts.py` plants faults."""
