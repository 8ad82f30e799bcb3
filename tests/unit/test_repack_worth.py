"""What makes packing again worth its while: fewer bytes, or less time where the link is fast."""

from __future__ import annotations

import pytest

from bootseer_slurm.blob.compression import Measured
from bootseer_slurm.repack.worth import Scene, Start, best, is_worth_it

MB = 10**6
MEASURED = {"zstd": Measured(0.35, 1e-9), "lz4": Measured(0.45, 0.2e-9)}
ZSTD, LZ4 = Start(245 * MB, "zstd"), Start(315 * MB, "lz4")


def scene(link_mb_per_s: float, **others: object) -> Scene:
    """Half of what the start works is to unpack zstd."""
    usual = {"content_bytes": 700 * MB, "beside_bytes": 80 * MB, "worked_s": 1.4, "measured": MEASURED}
    return Scene(link_bytes_per_s=link_mb_per_s * MB, **usual | others)  # type: ignore[arg-type]


def test_a_tenth_of_the_bytes_and_no_trifle() -> None:
    now, any_link = Start(200 * MB, "zstd"), scene(30)
    assert is_worth_it(now, Start(180 * MB, "zstd"), any_link)
    assert not is_worth_it(now, Start(181 * MB, "zstd"), any_link)
    assert not is_worth_it(Start(20 * MB, "zstd"), Start(16 * MB, "zstd"), any_link), "less than 4 MiB"


@pytest.mark.parametrize(
    ("link_mb_per_s", "chosen", "worth"),
    [(30, ZSTD, False), (120, ZSTD, False), (290, LZ4, False), (400, LZ4, True), (1200, LZ4, True)],
)
def test_a_fast_link_gets_what_is_unpacked_fast(link_mb_per_s: float, chosen: Start, worth: bool) -> None:
    assert best(ZSTD, ZSTD.fetched_bytes, scene(link_mb_per_s)) == chosen
    assert is_worth_it(ZSTD, chosen, scene(link_mb_per_s)) is worth


def test_a_slow_link_gets_zstd_again() -> None:
    worked = scene(30, worked_s=0.84)  # as the same start does with lz4
    assert best(LZ4, LZ4.fetched_bytes, worked) == ZSTD
    assert is_worth_it(LZ4, ZSTD, worked)


@pytest.mark.parametrize("link_mb_per_s", [270, 290])
def test_near_the_rate_where_both_take_as_long_it_stays(link_mb_per_s: float) -> None:
    assert not is_worth_it(ZSTD, LZ4, scene(link_mb_per_s))
    assert not is_worth_it(LZ4, ZSTD, scene(link_mb_per_s, worked_s=0.84)), "though it is a fifth of the bytes"


def test_where_the_link_is_busy_with_a_checkpoint_it_is_the_limit() -> None:
    busy = scene(1000, beside_bytes=4000 * MB)
    assert best(ZSTD, ZSTD.fetched_bytes, busy) == ZSTD
    assert not is_worth_it(ZSTD, LZ4, busy)


def test_a_trifle_of_time_is_not_worth_it() -> None:
    little = scene(1200, content_bytes=70 * MB, worked_s=0.14)
    assert best(Start(25 * MB, "zstd"), 25 * MB, little).compression == "lz4"
    assert not is_worth_it(Start(25 * MB, "zstd"), Start(32 * MB, "lz4"), little), "less than 0.1 s"


@pytest.mark.parametrize("measured", [{}, {"zstd": MEASURED["zstd"]}])
def test_what_was_not_measured_is_judged_by_bytes(measured: dict[str, Measured]) -> None:
    unknown = scene(0, measured=measured)
    now = Start(345 * MB, "gzip")
    assert best(now, 300 * MB, unknown) == Start(300 * MB, "zstd")
    assert is_worth_it(now, Start(300 * MB, "zstd"), unknown)
    assert not is_worth_it(now, Start(340 * MB, "zstd"), unknown)
