"""Scripts on top of revlib's public API, each `python -m research.NAME`: train, compare, parity, report, and others."""
