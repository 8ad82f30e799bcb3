"""Blobs: immutable bytes, described by a manifest, cached block by block on the node."""
