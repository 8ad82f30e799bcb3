"""What makes packing again worth its while: fewer bytes, or less time where the link is fast."""

from __future__ import annotations

import pytest

from bootseer_slurm.blob.squashfs.compression import Measured
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
    ("link_mb_per_s", "chosen"), [(30, None), (120, None), (290, None), (400, LZ4), (1200, LZ4)]
)
def test_a_fast_link_gets_what_is_unpacked_fast(link_mb_per_s: float, chosen: Start | None) -> None:
    assert best(ZSTD, ZSTD.fetched_bytes, scene(link_mb_per_s)) == chosen


def test_a_slow_link_gets_zstd_again() -> None:
    worked = scene(30, worked_s=0.84)  # as the same start does with lz4
    assert best(LZ4, LZ4.fetched_bytes, worked) == ZSTD


@pytest.mark.parametrize("link_mb_per_s", [270, 290])
def test_near_the_rate_where_both_take_as_long_it_stays(link_mb_per_s: float) -> None:
    assert best(ZSTD, ZSTD.fetched_bytes, scene(link_mb_per_s)) is None
    lz4_now = scene(link_mb_per_s, worked_s=0.84)
    assert best(LZ4, LZ4.fetched_bytes, lz4_now) is None, "though it would be a fifth less bytes"


def test_where_the_link_is_busy_with_a_checkpoint_it_is_the_limit() -> None:
    assert best(ZSTD, ZSTD.fetched_bytes, scene(1000, beside_bytes=4000 * MB)) is None


@pytest.mark.parametrize("link_mb_per_s", [120, 400, 1200])
@pytest.mark.parametrize("worked_s", [6.0, 30.0])
def test_the_order_alone_is_worth_it_where_work_is_the_limit(link_mb_per_s: float, worked_s: float) -> None:
    found = best(Start(500 * MB, "zstd"), 245 * MB, scene(link_mb_per_s, worked_s=worked_s))
    assert found == ZSTD, "lz4 would save 0.56 s, less than a tenth"


def test_a_trifle_of_time_is_not_worth_it() -> None:
    little = scene(1200, content_bytes=70 * MB, worked_s=0.14)
    assert best(Start(25 * MB, "zstd"), 25 * MB, little) is None, "less than 0.1 s"
    assert best(Start(250 * MB, "zstd"), 250 * MB, scene(1200)) is not None


@pytest.mark.parametrize("measured", [{}, {"zstd": MEASURED["zstd"]}])
def test_what_was_not_measured_is_judged_by_bytes(measured: dict[str, Measured]) -> None:
    unknown = scene(0, measured=measured)
    now = Start(345 * MB, "gzip")
    assert best(now, 300 * MB, unknown) == Start(300 * MB, "zstd")
    assert best(now, 340 * MB, unknown) is None
