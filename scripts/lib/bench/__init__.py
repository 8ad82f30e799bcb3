"""The benchmarks: a module per name that `scripts/bench` knows, and their parts (cpu_arms is of cpu)."""
