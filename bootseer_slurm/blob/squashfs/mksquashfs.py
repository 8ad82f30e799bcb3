"""The command mksquashfs: the one place that knows its options.

Pure functions; who runs the command is the caller's choice. Imports nothing: some callers may have one thread
only.
"""

from __future__ import annotations

# Level 1 of zstd makes 115 MB of 328 MB of packages in 2.0 s, 3 109 MB in 2.6 s, 6 102 MB in 6.8 s (2 cores).
QUICK_LEVEL, THOROUGH_LEVEL = 3, 9
# Blocks of 256 KiB save 4 % more; but each small read of a job unpacks a whole block, and the images that
# enroot makes have 128 KiB.
_CONTENT = ("-b", "128K", "-no-xattrs")
# Errors are fatal, since a part of an image is worse than none.
_ALWAYS = ("-noappend", "-quiet", "-no-progress", "-exit-on-error", *_CONTENT)
# Its caches take a quarter of the memory else: all that a job's group may have (cgroups.py).
_MEMORY = ("-mem", "512M")
_UNCOMPRESSED = ("-noI", "-noD", "-noF", "-noX")


def compression_options(compression: str, *, quick: bool = False) -> tuple[str, ...]:
    """The options that say how to compress. quick: somebody waits. Raises KeyError."""
    level = str(QUICK_LEVEL if quick else THOROUGH_LEVEL)
    return {
        "zstd": ("-comp", "zstd", "-Xcompression-level", level),
        "lz4": ("-comp", "lz4", "-Xhc"),
    }[compression]


def from_tar(target: str, compression: str, *, quick: bool = False, all_root: bool = False) -> list[str]:
    """The command that makes the squashfs `target` of a tar on its stdin; needs mksquashfs 4.5.

    quick: somebody waits. all_root: all in it becomes root's. Raises KeyError for an unknown compression.
    """
    owners = ("-all-root",) if all_root else ()
    options = (*_ALWAYS, *_MEMORY, *owners, *compression_options(compression, quick=quick))
    return ["mksquashfs", "-", target, "-tar", "-root-mode", "755", *options]


def from_rootfs(rootfs: str, target: str) -> list[str]:
    """The command that makes the squashfs `target` of a folder but its dev/*; all in it becomes root's."""
    options = (*_ALWAYS, *_MEMORY, "-all-root", *compression_options("zstd", quick=True))
    return ["mksquashfs", rootfs, target, *options, "-wildcards", "-e", "dev/*"]


def enroot_options(*, compressed: bool) -> str:
    """The value of ENROOT_SQUASH_OPTIONS with which `enroot import` makes the same content."""
    how = compression_options("zstd", quick=True) if compressed else _UNCOMPRESSED
    return " ".join((*how, *_CONTENT))
