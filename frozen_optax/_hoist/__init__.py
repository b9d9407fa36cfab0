"""Hoisting: what frozen parameters and data determine is computed once, not at each step."""
