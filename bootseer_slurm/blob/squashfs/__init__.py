"""Squashfs, the format of images and snapshots: read without mounting it, and made by mksquashfs."""
