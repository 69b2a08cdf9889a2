"""Vector quantizers: one contract (contract.py), one file a family, one nearest-code search (search.py)."""
