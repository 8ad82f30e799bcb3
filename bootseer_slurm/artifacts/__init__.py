"""The images, environments and checkpoints of a job on this node: resolved, opened, shown to its steps."""
