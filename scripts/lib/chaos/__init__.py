"""A day of bad luck: random jobs while agents, stores, links, disks and clocks fail (docs/chaos.md).

inputs    what jobs start from, and the digests that their bytes must have
jobs      random jobs: submitted, disturbed, and what their tasks read (read_inputs.py runs in them)
faults    one row for each fault: what fails, and how it is mended
findings  what must be true at the end, and what was not
"""
