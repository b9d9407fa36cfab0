"""Figures, printed: `python -m benchmarks.claims`."""
