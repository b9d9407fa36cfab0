"""Proofs on programs, before training. `README.md` beside this file explains how they are made."""
