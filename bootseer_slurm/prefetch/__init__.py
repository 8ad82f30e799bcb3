"""The prefetch of one job: what it brings, in which order, and how much memory that may fill."""
