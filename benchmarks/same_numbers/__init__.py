"""Fixed small runs of everything that is public, each reduced to SHA-256 digests; see `benchmarks/same_numbers.py`."""
