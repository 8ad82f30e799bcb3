"""The figures of a start on this node: waits, GPUs, and the kernel's pressure figures."""
