"""The figures of one start: stages, transfers, stragglers, problems, and the verdict."""
