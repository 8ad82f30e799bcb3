"""A node as a reader and as a parent: whom it asks, when it leaves, when it reads the store, whom it sends to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bootseer_slurm.peers.directory import First, Moved, Parent
from bootseer_slurm.peers.fetch import (
    FIRST_ANSWER_S,
    SILENCE_S,
    TOO_DEEP,
    AskDirectory,
    AskParent,
    Cause,
    Loss,
    ReadStore,
    Viewpoint,
)
from bootseer_slurm.peers.groups import Chunk, Ring
from bootseer_slurm.peers.liveness import REFUSED_S, SILENT_S, Liveness, Pace
from bootseer_slurm.peers.policy import STREAMS, WINDOW, Action, CallSlow, Policy, in_order
from bootseer_slurm.peers.slots import SLOTS, STALLED_S
from bootseer_slurm.peers.uploads import LEAF_S, Get, Held, Reply, Uploads

NODE = 99  # not on the ring: it asks others
RING = Ring(0, tuple(range(8)))
ABOVE = Ring(1, tuple(range(20, 28)))
CHUNK = Chunk("blob", 0)
OWNERS = list(RING.owners(CHUNK))
MIB = 2**20
SMALL = "small"  # a blob with chunks of 1 MiB


def chunks(count: int) -> list[Chunk]:
    return [Chunk("blob", number) for number in range(count)]


def reader(*rings: Ring) -> tuple[Policy, Viewpoint]:
    here = Viewpoint(NODE, rings or (RING,))
    here.liveness.heard(50)  # its JOIN was answered
    return Policy(here), here


def only(actions: Sequence[Action]) -> Action:
    (action,) = actions
    return action


def asked(action: Action) -> int:
    assert isinstance(action, AskDirectory)
    return action.to


def getting(policy: Policy, parent: int, now_s: float = 0.0) -> None:
    """CHUNK is under way, and the directory has named this parent."""
    owner = asked(only(policy.prefetch([CHUNK], now_s)))
    action = only(policy.answered(CHUNK, owner, Parent(parent), now_s))
    assert action == AskParent(parent, Get(CHUNK, NODE))


def cause(action: Action) -> Cause:
    assert isinstance(action, ReadStore)
    return action.cause


def test_the_first_reads_the_store() -> None:
    policy, _ = reader()
    assert asked(only(policy.prefetch([CHUNK], 0.0))) == OWNERS[0]
    assert cause(only(policy.answered(CHUNK, OWNERS[0], First(), 0.001))) is Cause.FIRST


def test_the_first_of_a_group_asks_the_ring_above() -> None:
    policy, _ = reader(RING, ABOVE)
    policy.prefetch([CHUNK], 0.0)
    above = only(policy.answered(CHUNK, OWNERS[0], First(), 0.001))
    assert isinstance(above, AskDirectory) and above.level == 1 and above.to == next(ABOVE.owners(CHUNK))
    assert cause(only(policy.answered(CHUNK, above.to, First(), 0.002))) is Cause.FIRST


def test_a_directory_that_refuses_is_absent_for_a_second() -> None:
    policy, here = reader()
    policy.prefetch([CHUNK], 0.0)
    assert asked(only(policy.failed(CHUNK, OWNERS[0], Loss.REFUSED, 0.001))) == OWNERS[1]
    assert here.liveness.is_absent(OWNERS[0], REFUSED_S)
    assert not here.liveness.is_absent(OWNERS[0], REFUSED_S + 0.01)


def test_a_silent_directory_is_missing_for_ten_seconds_and_reported() -> None:
    policy, here = reader()
    policy.prefetch([CHUNK], 0.0)
    assert policy.overdue(FIRST_ANSWER_S - 0.01) == []
    ask = only(policy.overdue(FIRST_ANSWER_S))
    assert isinstance(ask, AskDirectory) and ask.to == OWNERS[1] and ask.want.missing == (OWNERS[0],)
    assert here.liveness.is_absent(OWNERS[0], SILENT_S)
    here.liveness.heard(OWNERS[0])
    assert not here.liveness.is_absent(OWNERS[0], SILENT_S), "its answer came late"


def test_a_list_that_moved_is_asked_for_at_its_owner() -> None:
    policy, here = reader()
    policy.prefetch([CHUNK], 0.0)
    policy.failed(CHUNK, OWNERS[0], Loss.REFUSED, 0.001)
    assert asked(only(policy.answered(CHUNK, OWNERS[1], Moved(OWNERS[0]), 0.002))) == OWNERS[0]
    # Somebody has heard it, so it has started; now it refuses, so it is gone.
    ask = only(policy.failed(CHUNK, OWNERS[0], Loss.REFUSED, 0.003))
    assert isinstance(ask, AskDirectory) and ask.to == OWNERS[1] and ask.want.missing == (OWNERS[0],)
    assert here.liveness.is_missing(OWNERS[0], 2.0)


def test_directories_that_send_one_in_a_circle_are_left() -> None:
    policy, here = reader()
    policy.prefetch([CHUNK], 0.0)
    assert asked(only(policy.failed(CHUNK, OWNERS[0], Loss.REFUSED, 0.0))) == OWNERS[1]
    assert asked(only(policy.failed(CHUNK, OWNERS[1], Loss.REFUSED, 0.0))) == OWNERS[2]
    assert asked(only(policy.answered(CHUNK, OWNERS[2], Moved(OWNERS[1]), 0.0))) == OWNERS[1]
    # A list moves to an earlier owner only.
    assert asked(only(policy.answered(CHUNK, OWNERS[1], Moved(OWNERS[2]), 0.0))) == OWNERS[2]
    assert here.liveness.is_missing(OWNERS[1], 0.1)


def test_a_directory_that_names_a_node_of_no_ring_is_left() -> None:
    policy, here = reader()
    policy.prefetch([CHUNK], 0.0)
    assert asked(only(policy.answered(CHUNK, OWNERS[0], Moved(2**32 - 1), 0.0))) == OWNERS[1]
    assert here.liveness.is_missing(OWNERS[0], 0.1)


def test_where_no_directory_has_started_a_prefetch_looks_again_for_a_while() -> None:
    policy, _ = reader()
    actions, now_s = policy.prefetch([CHUNK], 0.0), 0.0
    while now_s < 0.5 and not (actions and isinstance(actions[0], ReadStore)):
        if actions:
            actions = policy.failed(CHUNK, asked(only(actions)), Loss.REFUSED, now_s)
        else:
            now_s += 0.05
            actions = policy.overdue(now_s)
    assert cause(only(actions)) is Cause.NO_DIRECTORY and 0.1 <= now_s <= 0.15


def test_demand_does_not_wait_for_a_directory_to_start() -> None:
    policy, _ = reader()
    actions = policy.demand(CHUNK, 0.0)
    for _ in RING.members:
        actions = policy.failed(CHUNK, asked(only(actions)), Loss.REFUSED, 0.001)
    assert cause(only(actions)) is Cause.NO_DIRECTORY


def test_a_parent_that_says_pending_is_waited_for() -> None:
    policy, _ = reader()
    getting(policy, parent=5)
    for tenth in range(1, 50):
        policy.pending(CHUNK, 5, hops=2, now_s=tenth / 10)
        assert policy.overdue(tenth / 10 + 0.05) == []
    assert policy.hops(CHUNK, 4.9) == 3
    ask = only(policy.overdue(4.9 + SILENCE_S))
    assert isinstance(ask, AskDirectory) and ask.want.lost == (5,) and ask.want.missing == (5,)


def test_a_parent_that_says_nothing_at_all_is_left_sooner() -> None:
    policy, _ = reader()
    getting(policy, parent=5)
    assert policy.overdue(FIRST_ANSWER_S - 0.01) == []
    assert isinstance(only(policy.overdue(FIRST_ANSWER_S)), AskDirectory)


def test_nodes_that_wait_for_one_another_do_not_do_so_for_ever() -> None:
    """In a circle PENDING comes back with more hops each time."""
    policy, here = reader()
    getting(policy, parent=5)
    now_s, hops = 0.0, 1
    while not policy.overdue(now_s):
        now_s += 0.1
        if left := policy.pending(CHUNK, 5, hops, now_s):
            break
        hops = (policy.hops(CHUNK, now_s) or hops) + 1
        assert now_s < 5
    ask = only(left)
    assert isinstance(ask, AskDirectory) and ask.want.lost == (5,)
    assert ask.want.missing == () and not here.liveness.is_missing(5, now_s), "it lives"
    assert policy.hops(CHUNK, now_s + 1) is None


@pytest.mark.parametrize(("demand", "most_s"), [(False, 10.1), (True, 3.1)])
def test_signs_of_life_move_no_end_of_the_whole(demand: bool, most_s: float) -> None:
    policy, _ = reader()
    getting(policy, parent=5)
    if demand:
        policy.demand(CHUNK, 0.0)
    now_s, actions = 0.0, []
    while not actions:
        now_s += 0.1
        assert now_s < most_s
        policy.pending(CHUNK, 5, 0, now_s)
        actions = policy.overdue(now_s)
    assert cause(only(actions)) is Cause.LOST_TIME and now_s > most_s - 0.3


def test_a_slow_store_gives_peers_more_time() -> None:
    policy, here = reader()
    first = asked(only(policy.prefetch([CHUNK], 0.0)))
    policy.answered(CHUNK, first, First(), 0.0)
    policy.received(CHUNK, None, 0.0, 5.0)
    assert here.patience_s(demand=True) == 20.0


def test_a_read_of_the_store_that_hangs_holds_nobody() -> None:
    policy, _ = reader()
    policy.answered(CHUNK, asked(only(policy.prefetch([CHUNK], 0.0))), First(), 0.0)
    assert policy.hops(CHUNK, 9.9) == 0 and policy.hops(CHUNK, 10.1) == TOO_DEEP
    child, here = reader()
    getting(child, parent=5)
    ask = only(child.pending(CHUNK, 5, TOO_DEEP, 0.1))
    assert isinstance(ask, AskDirectory) and ask.want.lost == (5,) and not here.liveness.is_missing(5, 0.1)


def test_a_busy_parent_is_no_fault_and_may_be_named_again_as_the_only_one() -> None:
    policy, here = reader()
    getting(policy, parent=5)
    ask = only(policy.failed(CHUNK, 5, Loss.BUSY, 0.01))
    assert isinstance(ask, AskDirectory) and ask.want.busy == (5,) and ask.want.lost == ()
    assert not here.liveness.is_absent(5, 0.01)
    again = only(policy.answered(CHUNK, ask.to, Parent(5, only=True), 0.02))
    assert again == AskParent(5, Get(CHUNK, NODE, only=True))
    ask = only(policy.failed(CHUNK, 5, Loss.BUSY, 0.03))
    assert isinstance(ask, AskDirectory) and ask.want.lost == (5,)


def test_after_three_parents_the_store() -> None:
    policy, _ = reader()
    getting(policy, parent=5)
    for lost, following in ((5, 6), (6, 7)):
        owner = asked(only(policy.failed(CHUNK, lost, Loss.LACK, 0.01)))
        policy.answered(CHUNK, owner, Parent(following), 0.01)
    assert cause(only(policy.failed(CHUNK, 7, Loss.LACK, 0.02))) is Cause.LOST_PARENTS


@pytest.mark.parametrize(("demand", "most_s"), [(False, 1.2), (True, 0.7)])
def test_after_a_time_in_vain_the_store(demand: bool, most_s: float) -> None:
    policy, _ = reader(Ring(0, tuple(range(80))))
    actions = policy.demand(CHUNK, 0.0) if demand else policy.prefetch([CHUNK], 0.0)
    now_s = 0.0
    while not any(isinstance(action, ReadStore) for action in actions):
        now_s += 0.05
        actions = policy.overdue(now_s)
        assert now_s < most_s, "a job waits no longer for peers"
    assert cause(actions[-1]) is Cause.LOST_TIME


def test_wrong_bytes_ban_a_node_for_the_job() -> None:
    policy, here = reader()
    getting(policy, parent=5)
    assert cause(only(policy.failed(CHUNK, 5, Loss.WRONG_DIGEST, 0.1))) is Cause.WRONG_DIGEST
    here.liveness.heard(5)
    assert here.liveness.is_missing(5, 1e6)
    ask = only(policy.prefetch([Chunk("blob", 1)], 0.2))
    assert isinstance(ask, AskDirectory) and ask.want.missing == (5,)


def test_behind_a_firewall_a_node_reads_the_store_after_one_silence() -> None:
    here = Viewpoint(NODE, (RING,))
    policy = Policy(here)
    policy.prefetch(chunks(64), 0.0)
    actions = policy.overdue(FIRST_ANSWER_S)
    reads = [action for action in actions if isinstance(action, ReadStore)]
    assert len(reads) >= STREAMS - 2, "one or two had to be silent first"
    number, now_s = 0, FIRST_ANSWER_S
    waits = 0
    while reads:
        policy.pending(reads[0].chunk, 0, 0, now_s)
        number += 1
        actions = policy.received(reads.pop(0).chunk, None, 0.01, now_s)
        reads += [action for action in actions if isinstance(action, ReadStore)]
        if not reads and number < 64:
            now_s, waits = now_s + FIRST_ANSWER_S, waits + 1
            reads = [action for action in policy.overdue(now_s) if isinstance(action, ReadStore)]
    assert number == 64 and now_s <= 0.5 and waits <= 1, "no fuse, and no more than half a second lost"


def test_peers_that_vanish_all_at_once_are_asked_no_more_until_their_time() -> None:
    liveness = Liveness()
    for node in range(8):
        liveness.heard(node)
    for node in range(4):
        liveness.silent(node, 1.0)
    assert not liveness.is_cut_off(1.9) and liveness.is_cut_off(2.0)
    assert not liveness.is_cut_off(1.0 + SILENT_S), "they are tried again"
    liveness.heard(7)
    for node in range(3):
        liveness.silent(node, 3.0)
    assert not liveness.is_cut_off(5.0), "one was heard, and three were silent since"


@pytest.mark.parametrize("cut_off", [False, True])
def test_no_fuse_where_there_are_no_peers(cut_off: bool) -> None:
    policy, here = reader(RING, Ring(1, (50, 51)))
    policy.prefetch(chunks(200), 0.0)
    for node in range(8):
        here.liveness.silent(node, 0.0)
    now_s, reads = 2.0 if cut_off else 0.2, 0
    for _ in range(30):
        actions = policy.overdue(now_s)
        while actions:
            if isinstance(action := actions.pop(), ReadStore):
                reads += 1
                actions += policy.received(action.chunk, None, 0.01, now_s)
        now_s += 0.0 if cut_off else 0.1
    assert reads > 100, "a second's pause would halve them"


def test_the_prefetch_has_eight_chunks_under_way_and_demand_goes_beside_them() -> None:
    policy, _ = reader()
    assert len(policy.prefetch(chunks(64), 0.0)) == STREAMS
    assert len(policy.demand(Chunk("blob", 60), 0.0)) == 1
    assert policy.demand(Chunk("blob", 60), 0.0) == []
    assert len(policy.received(Chunk("blob", 3), None, 0.01, 0.1)) == 1
    assert policy.received(Chunk("blob", 3), None, 0.01, 0.1) == []
    assert policy.received(Chunk("blob", 60), None, 0.01, 0.1) == []


def test_somebody_who_waits_for_a_chunk_under_way_hurries_its_parent() -> None:
    policy, _ = reader()
    getting(policy, parent=5)
    assert only(policy.demand(CHUNK, 0.1)) == AskParent(5, Get(CHUNK, NODE, demand=True))


def test_a_chunk_that_is_here_is_not_prefetched() -> None:
    policy, _ = reader()
    policy.demand(CHUNK, 0.0)
    policy.received(CHUNK, None, 0.01, 0.1)
    assert policy.prefetch([CHUNK], 0.2) == []


def test_the_fuse_pauses_the_prefetch_and_no_demand() -> None:
    policy, _ = reader()
    plan = chunks(200)
    under_way = [
        action.want.chunk for action in policy.prefetch(plan, 0.0) if isinstance(action, AskDirectory)
    ]
    received = 0
    while under_way:
        chunk = under_way.pop(0)
        liar = 100 + chunk.number
        policy.answered(chunk, next(RING.owners(chunk)), Parent(liar), 0.1)
        policy.failed(chunk, liar, Loss.WRONG_DIGEST, 0.1)
        following = policy.received(chunk, None, 0.01, 0.1)
        received += 1
        under_way += [action.want.chunk for action in following if isinstance(action, AskDirectory)]
        under_way = list(dict.fromkeys(under_way))
    assert 16 <= received < 40
    assert policy.overdue(0.5) == []
    assert len(policy.demand(plan[-1], 0.5)) == 1
    assert len(policy.overdue(1.2)) >= STREAMS


def test_a_dead_directory_s_lists_are_told_to_its_heir() -> None:
    policy, here = reader()
    getting(policy, parent=5)
    here.liveness.heard(OWNERS[0])
    policy.received(CHUNK, 5, 0.01, 0.1)
    here.liveness.refused(OWNERS[0], 0.2)
    told = only(policy.overdue(0.25))
    assert isinstance(told, AskDirectory) and told.to == OWNERS[1]
    assert told.want.has and told.want.missing == (OWNERS[0],)
    here.liveness.heard(OWNERS[0])
    moved = only(policy.answered(CHUNK, OWNERS[1], Moved(OWNERS[0]), 0.3, has=True))
    assert isinstance(moved, AskDirectory) and moved.to == OWNERS[0] and moved.want.has
    again = policy.answered(CHUNK, OWNERS[0], Moved(OWNERS[1]), 0.3, has=True)
    assert again == [], "no list moves away from its first owner"
    assert policy.answered(CHUNK, OWNERS[0], First(), 0.3, has=True) == []


def test_a_question_that_was_never_answered_takes_no_other_question_s_answer() -> None:
    policy, here = reader()
    actions = policy.prefetch([CHUNK], 0.0)
    policy.answered(CHUNK, asked(only(actions)), First(), 0.0)
    here.liveness.heard(OWNERS[0])
    here.liveness.refused(OWNERS[0], 0.2)
    told = only(policy.overdue(0.25))
    assert asked(told) == OWNERS[1]
    policy.failed(CHUNK, NODE, Loss.STORE, 0.3)
    owner = asked(only(policy.demand(CHUNK, 0.3)))
    assert owner == OWNERS[1]
    assert policy.answered(CHUNK, owner, First(), 0.31, has=True) == []
    assert only(policy.answered(CHUNK, owner, Parent(5), 0.32)) == AskParent(5, Get(CHUNK, NODE, demand=True))


def test_a_banned_directory_s_lists_are_told_to_its_heir() -> None:
    policy, _ = reader()
    getting(policy, parent=5)
    policy.received(CHUNK, 5, 0.01, 0.1)
    other = Chunk("blob", 1)
    owner = asked(only(policy.prefetch([other], 0.1)))
    policy.answered(other, owner, Parent(OWNERS[0]), 0.1)
    policy.failed(other, OWNERS[0], Loss.WRONG_DIGEST, 0.1)
    told = [action for action in policy.overdue(0.15) if isinstance(action, AskDirectory)]
    assert [
        (action.to, action.want.chunk, action.want.has) for action in told if action.want.chunk == CHUNK
    ] == [(OWNERS[1], CHUNK, True)]


def test_a_parent_that_is_slow_twice_in_a_row_is_told_so() -> None:
    policy, _ = reader()
    for number, chunk in enumerate(chunks(12)):
        policy.demand(chunk, 0.0)
        slow = number in (8, 10, 11)
        actions = policy.received(chunk, 5 if slow else 6, 0.1 if slow else 0.01, 0.1)
        # 8 is one strike; 10 the second, as 9 came from another.
        assert (CallSlow(5) in actions) is (number >= 10)


def test_the_order_is_that_of_the_plan_in_windows_of_16() -> None:
    plan = chunks(40)
    for nodes in (3, 16, 1000):
        for node in (0, 1, 2):
            order = in_order(plan, node, nodes)
            assert sorted(order) == plan
            for begin in range(0, 40, WINDOW):
                assert sorted(order[begin : begin + WINDOW]) == plan[begin : begin + WINDOW]
    assert [in_order(plan, node, 3)[0].number for node in range(3)] == [0, 5, 10]
    assert [in_order(plan, node, 1000)[0].number for node in (0, 1, 15, 16)] == [0, 1, 15, 0]


def test_a_blob_that_is_closed_makes_room_for_another() -> None:
    policy, _ = reader()
    policy.prefetch(chunks(20), 0.0)
    policy.demand(chunks(20)[0], 0.0)
    actions = policy.prefetch([Chunk(SMALL, number) for number in range(9)], 0.0)
    assert actions == [], "eight others are under way"
    began = [each.want.chunk for each in policy.closed("blob", 0.1) if isinstance(each, AskDirectory)]
    assert began == [Chunk(SMALL, number) for number in range(STREAMS)]
    assert policy.overdue(0.1) == [] and policy.hops(CHUNK, 0.1) is None
    assert policy.answered(CHUNK, OWNERS[0], First(), 0.1) == []


@pytest.mark.parametrize("is_closed", [True, False])
def test_what_this_node_does_not_have_any_more_is_got_again(is_closed: bool) -> None:
    policy, _ = reader()
    policy.demand(CHUNK, 0.0)
    policy.received(CHUNK, None, 0.0, 0.1)
    assert policy.prefetch([CHUNK], 0.2) == []
    if is_closed:
        policy.closed(CHUNK.blob, 0.3)
    else:
        policy.failed(CHUNK, NODE, Loss.STORE, 0.3)
    assert policy.prefetch([CHUNK], 0.4)


def uploads(bytes_per_s: float = 1e9) -> Uploads:
    return Uploads(bytes_per_s, lambda chunk: MIB if chunk.blob == SMALL else 4 * MIB)


def test_a_node_that_waits_for_a_chunk_gets_it_when_it_is_here() -> None:
    sends = uploads()
    assert sends.asked(Get(CHUNK, 1), Held.COMING) is Reply.QUEUED
    assert sends.begin(0.0) is None and [get.reader for get in sends.waiting()] == [1]
    assert sends.arrived(CHUNK) == []
    assert sends.begin(0.1) == Get(CHUNK, 1) and sends.waiting() == []


def test_what_is_not_coming_is_lacked() -> None:
    sends = uploads()
    assert sends.asked(Get(CHUNK, 1), Held.LACKS) is Reply.LACK
    sends.asked(Get(CHUNK, 2), Held.COMING)
    assert sends.lost(lambda chunk: chunk == CHUNK) == [Get(CHUNK, 2)]
    assert sends.lost(lambda chunk: chunk == CHUNK) == []


def test_of_a_blob_that_is_closed_nothing_more_is_sent() -> None:
    sends = uploads()
    other = Chunk(SMALL, 0)
    for number in range(2):
        for held in (Held.COMING, Held.HERE):
            sends.asked(Get(Chunk("blob", number * 2 + (held is Held.HERE)), number), held)
    sends.asked(Get(other, 5), Held.HERE)
    sent = sends.begin(0.0)
    lost = sends.lost(lambda chunk: chunk.blob == "blob")
    assert sent and sent not in lost and len(lost) == 3
    assert sends.waiting() == [Get(other, 5)] and sends.slots.taken == 1


def test_a_queue_of_more_than_50_ms_is_busy_but_for_demand_and_who_has_no_other() -> None:
    sends = uploads(1e9)  # 12 chunks of 4 MiB take 50 ms
    replies = [sends.asked(Get(CHUNK, reader), Held.HERE) for reader in range(13)]
    assert replies[:12] == [Reply.QUEUED] * 12 and replies[12] is Reply.BUSY
    assert not sends.serves(0.0)
    assert sends.asked(Get(CHUNK, 13, demand=True), Held.HERE) is Reply.QUEUED
    assert sends.asked(Get(CHUNK, 14, only=True), Held.HERE) is Reply.QUEUED
    first = sends.begin(0.0)
    assert first and first.reader == 13, "demand goes first"


def test_the_queue_is_of_bytes_where_chunks_are_of_several_sizes() -> None:
    sends = uploads(1e9)  # 50 ms are 11 chunks of 4 MiB and 3 of 1 MiB
    sizes = [CHUNK] * 11 + [Chunk(SMALL, 0)] * 4
    replies = [sends.asked(Get(chunk, reader), Held.HERE) for reader, chunk in enumerate(sizes)]
    assert replies == [Reply.QUEUED] * 15 and not sends.serves(0.0)
    assert sends.asked(Get(Chunk(SMALL, 0), 99), Held.HERE) is Reply.BUSY
    small = uploads(1e9)
    replies = [small.asked(Get(Chunk(SMALL, 0), reader), Held.HERE) for reader in range(49)]
    assert replies == [Reply.QUEUED] * 48 + [Reply.BUSY], "not a quarter of that"
    while small.begin(0.0):
        pass
    small.left(0)
    assert small.asked(Get(Chunk(SMALL, 0), 99), Held.HERE) is Reply.QUEUED, "what is under way counts too"


def test_the_rate_is_of_bytes_where_chunks_are_of_several_sizes() -> None:
    sends = uploads(1e8)
    for number in range(40):
        chunk = Chunk(SMALL if number % 2 else "blob", number)
        sends.asked(Get(chunk, 1), Held.HERE)
        assert sends.begin(number)
        sends.slots.ended(1, number + (0.05 if number % 2 else 0.2))
    assert sends.slots.bytes_per_s == pytest.approx(20 * MIB, rel=0.01)


def test_those_that_waited_are_sent_elsewhere_when_too_much_is_here_at_once() -> None:
    sends = uploads(1e8)  # one chunk takes 42 ms
    for reader in range(4):
        assert sends.asked(Get(CHUNK, reader), Held.COMING) is Reply.QUEUED
    assert sends.arrived(CHUNK) == [2, 3]


def test_eight_are_sent_at_once() -> None:
    sends = uploads(1e12)
    for reader in range(20):
        sends.asked(Get(CHUNK, reader), Held.HERE)
    assert sum(sends.begin(0.0) is not None for _ in range(20)) == SLOTS
    sends.slots.ended(0, 0.1)
    assert sends.begin(0.1) and not sends.begin(0.1)


def test_one_node_has_two_of_the_slots_and_its_end_frees_them() -> None:
    sends = uploads(1e12)
    for number in range(6):
        sends.asked(Get(Chunk("blob", number), 1), Held.HERE)
    sends.asked(Get(CHUNK, 2), Held.HERE)
    assert [get.reader for get in iter(lambda: sends.begin(0.0), None)] == [1, 1, 2]
    sends.left(1)
    assert sends.slots.taken == 1 and sends.waiting() == []


def test_who_takes_nothing_is_left_after_a_while() -> None:
    sends = uploads(1e12)
    for reader in range(4):
        for chunk in chunks(3):
            sends.asked(Get(chunk, reader), Held.HERE)
    while sends.begin(0.0):
        pass
    assert sends.slots.stalled(STALLED_S - 0.1) == [] and not sends.slots.is_stuck(0.5)
    sends.slots.moved(3, 4.0)
    assert not sends.slots.is_stuck(4.5) and sends.slots.is_stuck(5.0)
    assert sends.slots.stalled(STALLED_S) == [0, 1, 2]


def test_a_chunk_that_is_on_its_way_is_not_sent_again_in_a_hurry() -> None:
    sends = uploads()
    sends.asked(Get(CHUNK, 1), Held.HERE)
    assert sends.begin(0.0)
    assert sends.asked(Get(CHUNK, 1, demand=True), Held.HERE) is Reply.QUEUED
    assert sends.begin(0.0) is None and sends.waiting() == []


def test_ends_that_come_at_once_are_no_rate() -> None:
    sends = uploads(1e8)
    for burst in range(20):
        begin_s = burst / 10
        for reader in range(4):
            sends.asked(Get(CHUNK, reader, demand=True), Held.HERE)
            sends.begin(begin_s)
        for reader in range(4):
            sends.slots.ended(reader, begin_s + 0.1 + reader * 1e-6)
    assert sends.slots.bytes_per_s == pytest.approx(4 * 4 * MIB / 0.1, rel=0.1)


def test_nobody_waits_for_more_than_64_chunks_here() -> None:
    sends = uploads()
    replies = [sends.asked(Get(chunk, 1), Held.COMING) for chunk in chunks(65)]
    assert replies == [Reply.QUEUED] * 64 + [Reply.BUSY]
    assert sends.asked(Get(CHUNK, 2), Held.COMING) is Reply.QUEUED


def test_a_slow_link_is_noticed() -> None:
    sends = uploads(1e9)
    for number in range(10):
        sends.asked(Get(CHUNK, 1), Held.HERE)
        sends.begin(number)
        sends.slots.ended(1, number + 0.4)
    sends.asked(Get(CHUNK, 1), Held.HERE)
    assert sends.serves(20)
    sends.asked(Get(CHUNK, 2), Held.HERE)
    assert not sends.serves(20), "two chunks would take 0.8 s"


def test_whom_two_children_call_slow_serves_nobody_for_a_while() -> None:
    sends = uploads()
    sends.called_slow(1, 0.0)
    sends.called_slow(1, 0.0)
    assert sends.serves(0.0)
    sends.called_slow(2, 0.0)
    assert not sends.serves(LEAF_S - 0.1) and sends.serves(LEAF_S)


def test_a_node_whose_connection_ended_waits_for_nothing() -> None:
    sends = uploads()
    sends.asked(Get(CHUNK, 1), Held.COMING)
    sends.asked(Get(CHUNK, 2), Held.HERE)
    sends.asked(Get(CHUNK, 1, demand=True), Held.HERE)
    sends.left(1)
    assert sends.arrived(CHUNK) == []
    assert sends.begin(0.0) == Get(CHUNK, 2) and sends.begin(0.0) is None


def test_a_turn_of_the_process_makes_no_node_slow() -> None:
    pace = Pace()
    assert not any(pace.is_slow(1, dur_s) for dur_s in [0.0] * 20 + [0.005] * 5)
    assert pace.is_slow(1, 0.02) is False and pace.is_slow(1, 0.02) is True


def test_a_few_slow_chunks_are_not_judged_before_there_is_a_median() -> None:
    pace = Pace()
    assert not any(pace.is_slow(1, dur_s) for dur_s in (0.01, 1.0, 1.0, 1.0))
