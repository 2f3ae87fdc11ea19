"""Certified decisions: the cascade of proofs, median smoothing, and the way to complete verifiers and back."""
