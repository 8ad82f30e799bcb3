"""What Slurm says: node lists and accounting."""
