"""What holding a part of a model costs, and what becomes of optimizers: `python -m benchmarks`."""
