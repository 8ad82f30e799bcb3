"""What a start touched: recording, the file, the plan made of several, and what a class asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import threading
import time
from typing import Any

import pytest

from bootseer_slurm.artifacts.table import Quota
from bootseer_slurm.blob.jobclass import (
    RECORD_LIMIT_BYTES,
    REMEMBERED_LIMIT,
    Remembered,
    decode_record,
    encode_record,
    job_class,
)
from bootseer_slurm.blob.trace import (
    MAGIC,
    MAX_TOUCHES,
    NODES,
    STARTS,
    Plan,
    Recorder,
    Trace,
    decode,
    decode_plan,
    merge,
    surplus,
    trace_name,
)
from bootseer_slurm.errors import InputError, IntegrityError
from bootseer_slurm.shares import NodeShares, Share

NOW_NS = 1_800_000_000 * 10**9
DAY_NS = 24 * 3600 * 10**9
BLOCK_BYTES = 256 * 1024
UID = os.geteuid()


def made(job: int, *blocks: int, node: str = "n1", partial: bool = False, **values: Any) -> Trace:
    """A trace that touches these blocks, one every 10 ms."""
    touches = tuple((block, 10 * place) for place, block in enumerate(blocks))
    age_ns = values.pop("age_ns", (100 - job) * 10**9)
    trace = Trace("b" * 64, node, job, 0, NOW_NS - age_ns, 1000, BLOCK_BYTES, partial, "mark", touches)
    return dataclasses.replace(trace, **values)


def plan(*traces: Trace) -> Plan:
    return merge(traces, blocks=1000, block_bytes=BLOCK_BYTES, now_ns=NOW_NS)


# Recording


def test_the_clock_of_a_trace_stands_still_while_a_reader_waits() -> None:
    waited_s = 0.0
    recorder = Recorder(100, begin_s=time.monotonic() - 10, waited_s=lambda: waited_s)
    recorder.touch(1, 1)  # at 10 s, to mount it
    recorder._begin_s -= 5
    waited_s = 2.0
    recorder.touch(2, 2)  # the start's first read, at 15 s
    recorder._begin_s -= 5
    waited_s = 5.0
    recorder.touch(3, 3)  # at 20 s, of which 3 s were waited
    began_ms = recorder.touches[1][1]
    assert [(block, round(at_ms, -2)) for block, at_ms in recorder.touches_since(began_ms)] == [
        *((1, 0), (2, 0), (3, 2000))
    ]
    assert recorder.touches_since(10**6) == ((1, 0), (2, 0), (3, 0))


def test_first_touches_are_recorded_in_order_with_their_times() -> None:
    recorder = Recorder(100, begin_s=time.monotonic() - 2)
    recorder.touch(7, 8)
    recorder.touch(3, 3)
    recorder.touch(6, 9)
    assert [block for block, _ in recorder.touches] == [7, 8, 3, 6, 9]
    assert all(2000 <= at_ms < 3000 for _, at_ms in recorder.touches)
    assert recorder.count == 5


def test_what_was_touched_before_is_not_new() -> None:
    recorder = Recorder(10, begin_s=time.monotonic())
    assert recorder.last_s == 0
    recorder.touch(0, 9)
    last_s = recorder.last_s
    time.sleep(0.01)
    recorder.touch(2, 5)
    assert recorder.last_s == last_s > 0 and recorder.count == 10


def test_threads_record_each_block_once_and_in_order() -> None:
    recorder = Recorder(4000, begin_s=time.monotonic())

    def touch(seed: int) -> None:
        order = list(range(3990))
        random.Random(seed).shuffle(order)
        for block in order:
            recorder.touch(block, block + 7)

    threads = [threading.Thread(target=touch, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(block for block, _ in recorder.touches) == list(range(3997))
    times = [at_ms for _, at_ms in recorder.touches]
    assert times == sorted(times)


def test_a_touch_of_nothing_new_costs_next_to_nothing() -> None:
    recorder = Recorder(30_000, begin_s=time.monotonic())
    recorder.touch(0, 29_999)
    best_s = 1.0
    for _ in range(5):
        start_s = time.perf_counter()
        for block in range(20_000):
            recorder.touch(block, block + 3)
        best_s = min(best_s, (time.perf_counter() - start_s) / 20_000)
    assert best_s < 5e-6, "a read is served in some 20 µs"


def test_a_start_that_reads_everything_does_not_fill_the_memory() -> None:
    recorder = Recorder(MAX_TOUCHES + 10, begin_s=time.monotonic())
    recorder.touch(0, MAX_TOUCHES + 9)
    assert recorder.count == MAX_TOUCHES
    touches = tuple(recorder.touches)
    assert decode(made(1, touches=touches).encode()).touches == touches


# The file


def test_a_trace_comes_back_as_it_was() -> None:
    for trace in (
        made(1, 5, 2, 9),
        made(2, partial=True, ended="quiet"),
        made(3, touches=((2**32 - 1, 2**32 - 1),)),
    ):
        assert decode(trace.encode()) == trace


def test_damage_anywhere_is_found() -> None:
    content = made(1, *range(50)).encode()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        with pytest.raises(IntegrityError):
            decode(bytes(damaged))
    for size in range(len(content)):
        with pytest.raises(IntegrityError):
            decode(content[:size])


def signed(header: object, numbers: bytes = b"", magic: bytes = MAGIC) -> bytes:
    """What a hostile user writes: anything, with a digest that agrees."""
    line = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = magic + line + b"\n" + numbers
    return content + hashlib.sha256(content).digest()


HEADER = {
    "blob": "b",
    "node": "n",
    "job": 1,
    "restart": 0,
    "made_ns": 1,
    "blocks": 1,
    "block_bytes": 1,
    "partial": False,
    "ended": "mark",
    "count": 0,
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100_000,
        signed(HEADER, magic=b"bstrace\x02"),
        signed([]),
        signed(7),
        signed(b"[" * 2000),
        signed(b"\xff\xfe"),
        signed(b" " * 5000),
        *(signed({key: value for key, value in HEADER.items() if key != left_out}) for left_out in HEADER),
        signed(HEADER | {"count": 1}),
        signed(HEADER | {"count": -1}),
        signed(HEADER | {"count": 2**62}),
        signed(HEADER | {"count": 0.0}),
        signed(HEADER | {"count": True}, bytes(8)),
        signed(HEADER, bytes(3)),
        signed(HEADER | {"count": 2}, bytes(16)),
        signed(HEADER | {"job": -1}),
        signed(HEADER | {"job": 2**70}),
        signed(HEADER | {"job": "1"}),
        signed(HEADER | {"made_ns": True}),
        signed(HEADER | {"node": "n" * 300}),
        signed(HEADER | {"partial": 0}),
        signed(HEADER | {"ended": ["mark"]}),
        signed(HEADER | {"ended": "later"}),
    ],
)
def test_what_is_no_trace_is_an_integrity_error(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode(content)
    with pytest.raises(IntegrityError):
        decode_plan(content, blocks=10)


def test_unknown_keys_of_a_later_agent_do_no_harm() -> None:
    assert decode(signed(HEADER | {"hint": "x"})).touches == ()


def test_a_plan_goes_to_the_agent_and_names_only_blocks_that_there_are() -> None:
    made_plan = Plan((5, 2), (0, 17), 3)
    assert decode_plan(made_plan.encode(), blocks=6) == made_plan
    with pytest.raises(IntegrityError, match="does not have"):
        decode_plan(made_plan.encode(), blocks=5)
    with pytest.raises(IntegrityError, match="starts"):
        decode_plan(Plan((), (), 99).encode(), blocks=5)


# The plan


def test_nothing_known_gives_an_empty_plan() -> None:
    assert plan() == Plan()


def test_traces_without_touches_give_a_plan_that_knows_so() -> None:
    assert plan(made(1)) == Plan(full_starts=1)
    assert plan(made(1), made(2), made(3, 7)) == Plan(full_starts=3)
    assert decode_plan(plan(made(1)).encode(), blocks=1000) == Plan(full_starts=1)


def test_blocks_in_at_least_half_of_the_full_traces_by_median_touch() -> None:
    merged = plan(made(1, 1, 2, 3), made(2, 3, 1, 4), made(3, 1, 3, 5), made(4, 1, 5, 3))
    assert merged.blocks == (1, 3, 5), "5 is in half of them, 2 and 4 in fewer"
    assert merged.times_ms == (0, 15, 15)
    assert merged.full_starts == 4


def test_the_median_is_not_moved_by_one_late_start() -> None:
    late = made(3, touches=((1, 90_000), (2, 0)))
    assert plan(made(1, 1, 2), made(2, 1, 2), late).blocks == (1, 2)


def test_nodes_of_one_start_count_together() -> None:
    traces = [made(1, 1, 2, node="n1"), made(1, 1, 3, node="n2")]
    merged = plan(*traces)
    assert merged.full_starts == 1
    assert sorted(merged.blocks) == [1, 2, 3], "each is in half of the traces"


def test_only_the_last_starts_count_with_all_their_nodes() -> None:
    old = [made(job, 900) for job in range(1, 4)]
    new = [made(job, 7, node=node) for job in range(10, 10 + STARTS) for node in ("n1", "n2")]
    merged = plan(*new, *old)
    assert merged.blocks == (7,) and merged.full_starts == STARTS


def test_a_partial_trace_never_counts_against_a_block() -> None:
    full = [made(1, 1, 2), made(2, 1, 2)]
    warm = [made(job, 1, partial=True) for job in range(3, 11)]
    merged = plan(*full, *warm)
    assert merged.blocks == (1, 2) and merged.full_starts == 2


def test_many_partial_starts_do_not_push_the_full_ones_out() -> None:
    merged = plan(made(1, 1, 2), *(made(job, 1, partial=True) for job in range(2, 40)))
    assert merged.blocks == (1, 2)


def test_a_partial_trace_adds_what_at_least_half_of_all_saw() -> None:
    full = [made(1, 1), made(2, 1)]
    assert plan(*full, made(3, 8, partial=True), made(4, 8, partial=True)).blocks == (1, 8)
    assert plan(*full, made(3, 8, partial=True)).blocks == (1,), "one of three is less than half"


def test_partial_traces_alone_give_a_plan() -> None:
    merged = plan(made(1, 4, 5, partial=True), made(2, 4, partial=True))
    assert merged.blocks == (4, 5) and merged.full_starts == 0


def test_old_traces_and_those_of_other_blocks_are_left_out() -> None:
    merged = plan(
        made(1, 1, age_ns=31 * DAY_NS), made(2, 2, block_bytes=65536), made(3, 3, age_ns=29 * DAY_NS)
    )
    assert merged.blocks == (3,) and merged.full_starts == 1


def test_blocks_that_the_blob_does_not_have_are_left_out() -> None:
    assert plan(made(1, 999, 1000, 2**32 - 1)).blocks == (999,)


def test_the_newest_starts_are_kept_of_full_and_of_partial_traces() -> None:
    names = [trace_name(made(job, 1, node=f"n{node}", partial=partial))
             for job in range(1, 13) for partial in (False, True) for node in range(2)]  # fmt: skip
    kept = [name for name in names if name not in surplus(names)]
    assert {name.split(".")[0] for name in kept} == {str(job) for job in range(5, 13)}
    assert len(kept) == STARTS * 2 * 2


def test_of_a_start_with_many_nodes_few_traces_are_kept() -> None:
    names = [f"7.0.node{number}" for number in range(100)]
    assert len(surplus(names)) == 100 - NODES
    assert surplus(names[:NODES]) == [] and surplus([]) == []
    assert surplus(["garbage", "7.0.n", "..", "7"]) == [], "what is no trace is read, and then left out"


# Job classes


def test_a_class_is_of_one_user_account_and_name() -> None:
    classes = {
        job_class(*each)
        for each in ((1, "a", "b"), (2, "a", "b"), (1, "ab", ""), (1, "", "ab"), (1, "a", "c"))
    }
    assert len(classes) == 5
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in classes)
    assert job_class(1, "a", "b") == job_class(1, "a", "b")


def test_wishes_come_back_as_they_were() -> None:
    wishes = [
        Remembered("image", "/img/ü x.sqsh", 20001),
        Remembered("checkpoint", "s3://bucket/model"),
        Remembered("environment", "/home/a/venv", 0),
    ]
    assert decode_record(encode_record(wishes)) == wishes
    assert decode_record(encode_record([])) == []


def test_a_record_is_bounded_whatever_was_asked_for() -> None:
    many = [Remembered("image", f"/img/{number}") for number in range(50)]
    assert decode_record(encode_record(many)) == many[:REMEMBERED_LIMIT]
    long = [Remembered("image", "/" + "ü" * 1000 + str(number)) for number in range(16)]
    content = encode_record([*long, Remembered("image", "/short")])
    assert len(content) <= RECORD_LIMIT_BYTES
    wishes = decode_record(content)
    assert wishes and set(wishes) <= {*long, Remembered("image", "/short")}
    assert len(json.dumps(wishes)) < 60_000, "fits a reply of the user's process"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[" * 10_000,
        b"[]",
        b"7",
        b'{"version": 1}',
        b'{"version": 3, "made_ns": 1, "wishes": []}',
        b'{"version": 2, "made_ns": 1, "wishes": [["image", "/x", "root"]]}',
        b'{"version": 2, "made_ns": 1, "wishes": [["image", "/x", -1]]}',
        b'{"version": 2, "made_ns": 1, "wishes": [["image", "/x", true]]}',
        b'{"version": 2, "made_ns": 1, "wishes": [["image", "/x", 1, 2]]}',
        b'{"version": 1, "made_ns": "1", "wishes": []}',
        b'{"version": 1, "made_ns": 1, "wishes": {"a": 1}}',
        b'{"version": 1, "made_ns": 1, "wishes": 7}',
        b'{"version": 1, "made_ns": 1, "wishes": [7]}',
        b'{"version": 1, "made_ns": 1, "wishes": [["image"]]}',
        b'{"version": 1, "made_ns": 1, "wishes": [[["image"], "/x"]]}',
        b'{"version": 1, "made_ns": 1, "wishes": []' + b" " * RECORD_LIMIT_BYTES + b"}",
    ],
)
def test_a_hostile_record_is_an_integrity_error_or_empty(content: bytes) -> None:
    try:
        assert decode_record(content) == []
    except IntegrityError:
        pass


def test_what_no_request_may_ask_for_is_left_out() -> None:
    wishes = [
        ["image", "relative.sqsh"],
        ["image", "/a\nb"],
        ["image", "/\ud800"],
        ["image", "/" + "x" * 5000],
        ["environment", "s3://bucket/x"],
        ["module", "/x"],
        ["image", 7],
        ["image", ""],
        ["image", "/good"],
    ]
    record = {"version": 1, "made_ns": 1, "wishes": wishes}
    assert decode_record(json.dumps(record).encode()) == [Remembered("image", "/good")]


def test_a_trace_of_a_file_of_quite_another_size_says_nothing() -> None:
    """A checkpoint's file is another one at each start, and nothing of it is brought but its plan."""
    for blocks, is_used in ((700, False), (905, True), (1000, True), (1100, True), (1500, False)):
        assert bool(plan(made(1, 5, blocks=blocks)).blocks) is is_used, blocks
    small = made(1, 0, blocks=1)
    assert merge([small], blocks=2, block_bytes=BLOCK_BYTES, now_ns=NOW_NS).blocks == (0,)
    assert merge([small], blocks=3, block_bytes=BLOCK_BYTES, now_ns=NOW_NS) == Plan()


def test_what_the_last_start_did_not_read_is_not_brought_again() -> None:
    read, unread = (made(job, 5, 9) for job in (1, 2)), made(3)
    assert plan(*read, unread) == Plan(full_starts=3)
    assert plan(unread, made(4, 5)).blocks == (5,), "until one reads it again"
    nodes = (made(3, node="n1"), made(3, 7, node="n2"))
    assert plan(*nodes).blocks == (7,), "on one of two nodes it was read"


def test_the_plans_of_one_job_are_bounded() -> None:
    quota = Quota(NodeShares(*(Share("memory", 2**40) for _ in range(3))), 7)
    for _ in range(8):
        quota.allow_plan(MAX_TOUCHES)
    for _ in range(2):
        with pytest.raises(InputError, match="plans of this job"):
            quota.allow_plan(1)
    quota.allow_plan(0)
