"""The figures of many starts together."""
