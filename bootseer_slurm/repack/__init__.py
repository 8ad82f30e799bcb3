"""Packing again what a start touched first: so that the next start's plan is one contiguous read."""
