"""Scripts on top of revlib's public API: `python -m research.train`, `python -m research.compare`."""
