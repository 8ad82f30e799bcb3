"""The process with a job user's rights: what it does is in these modules, and in nothing else."""
