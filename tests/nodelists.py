"""Lists of nodes whose names have nothing in common."""

from __future__ import annotations


def nodelist_of(count: int, *, size_bytes: int = 0) -> str:
    """A list of so many names, which nothing can fold. size_bytes: of the whole; longer names make up for it."""
    names = [f"x{number:05d}{chr(97 + number % 26)}-hall" for number in range(count)]
    missing = max(0, size_bytes - len(",".join(names)))
    return ",".join(f"{name}{'y' * ((missing + number) // count)}" for number, name in enumerate(names))
