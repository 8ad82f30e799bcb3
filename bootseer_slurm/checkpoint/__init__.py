"""Checkpoints: striped files on any store, read and written in parallel."""
