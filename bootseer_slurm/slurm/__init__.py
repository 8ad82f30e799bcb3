"""Slurm's own data: node lists and accounting."""
