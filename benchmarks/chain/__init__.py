"""One training task of the chain a file; `benchmarks/chain_tasks.py` runs them."""
