"""The blocks of blobs that this node has: on disk, in use, and read through."""
