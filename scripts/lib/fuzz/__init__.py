"""Fuzzing: hostile bytes for every parser that reads what a user, a store, a registry or the kernel says."""
