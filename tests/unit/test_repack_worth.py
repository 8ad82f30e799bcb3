"""What makes packing again worth its while: fewer bytes, or less time where the link is fast."""

from __future__ import annotations

import pytest

from bootseer_slurm.blob.compression import Measured
from bootseer_slurm.repack.worth import Start, is_worth_it

MB = 10**6
MEASURED = {"zstd": Measured(0.35, 1e-9), "lz4": Measured(0.45, 0.2e-9)}


def worth_it(now: Start, new: Start, link_bytes_per_s: float = 30 * MB, **more: object) -> bool:
    known = {"measured": MEASURED, "content_bytes": 700 * MB} | more
    return is_worth_it(now, new, link_bytes_per_s=link_bytes_per_s, **known)  # type: ignore[arg-type]


def test_a_tenth_of_the_bytes_and_no_trifle() -> None:
    now = Start(200 * MB, "zstd")
    assert worth_it(now, Start(180 * MB, "zstd"))
    assert not worth_it(now, Start(181 * MB, "zstd"))
    assert not worth_it(Start(20 * MB, "zstd"), Start(16 * MB, "zstd"), 1000 * MB), "less than 4 MiB"


@pytest.mark.parametrize(("link_mb_per_s", "worth"), [(30, False), (120, False), (400, True), (1200, True)])
def test_time_to_unpack_counts_where_the_link_is_fast(link_mb_per_s: int, worth: bool) -> None:
    zstd, lz4 = Start(245 * MB, "zstd"), Start(310 * MB, "lz4")
    assert worth_it(zstd, lz4, link_mb_per_s * MB) is worth
    assert not worth_it(zstd, lz4, link_mb_per_s * MB, content_bytes=50 * MB), "less than 0.1 s"


@pytest.mark.parametrize("link_mb_per_s", [80, 116, 150])
def test_near_the_rate_where_both_take_as_long_it_stays(link_mb_per_s: int) -> None:
    zstd, lz4 = Start(245 * MB, "zstd"), Start(310 * MB, "lz4")
    assert not worth_it(zstd, lz4, link_mb_per_s * MB)
    assert not worth_it(lz4, zstd, link_mb_per_s * MB), "though it is a fifth of the bytes"


def test_a_slow_link_has_zstd_again() -> None:
    assert worth_it(Start(310 * MB, "lz4"), Start(245 * MB, "zstd"), 30 * MB)


@pytest.mark.parametrize("measured", [{}, {"zstd": MEASURED["zstd"]}])
def test_what_was_not_measured_is_judged_by_bytes(measured: dict[str, Measured]) -> None:
    assert not worth_it(Start(245 * MB, "gzip"), Start(310 * MB, "lz4"), 1200 * MB, measured=measured)
    assert worth_it(Start(345 * MB, "gzip"), Start(310 * MB, "lz4"), 0.0, measured=measured)
