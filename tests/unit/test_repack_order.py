"""The order of touch, and what a plan of it costs."""

from __future__ import annotations

from bootseer_slurm.blob.manifest import BLOCK_BYTES, Layout
from bootseer_slurm.blob.squashfs.files import Extent, Squashfs, StoredFile
from bootseer_slurm.blob.trace import Plan
from bootseer_slurm.repack.order import (
    HotFile,
    blocks_bytes,
    content_bytes,
    hot_extents,
    hot_files,
    in_order_of_touch,
    plan_touches,
)

SHARED = Extent(3 * BLOCK_BYTES, 5000)  # a fragment
IMAGE = Squashfs(
    131072,
    {
        "cold": StoredFile(131072, (Extent(9 * BLOCK_BYTES, 10),)),
        "late": StoredFile(131072, (Extent(BLOCK_BYTES - 1, 2),)),  # in two blocks
        "half": StoredFile(131072, (Extent(2 * BLOCK_BYTES - 1, 2),)),  # in two, of which one was touched
        "early": StoredFile(300, (SHARED,), in_fragment=True),
        "beside": StoredFile(400, (SHARED,), in_fragment=True),
        "hole": StoredFile(131072, (Extent(0, 0),)),
        "sparse": StoredFile(131072 * 5, tuple(Extent((4 + n) * BLOCK_BYTES, 9) for n in range(5))),
        "large": StoredFile(131072 + 5, (Extent(100, 9), SHARED), in_fragment=True),
    },
    "zstd",
)
LAYOUT = Layout(10 * BLOCK_BYTES)


def hot() -> list[HotFile]:
    plan = Plan((3, 1, 0, 4, 7), (5, 40, 60, 70, 80), 1)
    return hot_files(IMAGE, plan, LAYOUT, lambda path, file: path == "early")


def test_a_block_of_a_file_is_hot_when_all_of_it_was_touched_and_a_fragments_when_it_was_read() -> None:
    assert hot() == [
        HotFile("early", 5, (0,), False),
        HotFile("late", 40, (0,), False),
        HotFile("large", 60, (0,), False),
        HotFile("sparse", 70, (0, 3), True),
    ]


def test_content_counts_as_it_is_unpacked() -> None:
    assert content_bytes(IMAGE, hot()) == 300 + 131072 + 131072 + 2 * 131072
    assert content_bytes(IMAGE, [HotFile("large", 0, (0, 1, 2), False)]) == 131072 + 5


def test_only_of_fragments_that_were_touched_it_is_asked() -> None:
    asked: list[str] = []
    hot_files(IMAGE, Plan((9, 0), (1, 2), 1), LAYOUT, lambda path, file: asked.append(path) is None)
    assert asked == []
    hot_files(IMAGE, Plan((3,), (1,), 1), LAYOUT, lambda path, file: asked.append(path) is None)
    assert asked == ["early", "beside", "large"]


def test_a_shared_fragment_counts_once_and_at_its_first_touch() -> None:
    both = [HotFile("early", 5, (0,), False), HotFile("beside", 9, (0,), False)]
    assert hot_extents(IMAGE, both) == {SHARED: 5}
    assert hot_extents(IMAGE, [HotFile("hole", 1, (0,), False), HotFile("early", 5, (7,), False)]) == {}


def test_the_plan_has_the_tables_and_then_each_block_at_its_first_touch() -> None:
    touches = plan_touches(hot_extents(IMAGE, hot()), LAYOUT, [(0, 96), (9 * BLOCK_BYTES + 5, 100)])
    assert touches == ((0, 0), (9, 0), (3, 5), (1, 40), (4, 70), (7, 70))
    assert blocks_bytes(LAYOUT, (block for block, _ in touches)) == 6 * BLOCK_BYTES
    assert blocks_bytes(Layout(9 * BLOCK_BYTES + 7), (8, 9)) == BLOCK_BYTES + 7


def test_hot_files_are_packed_first_and_sparse_ones_behind_them() -> None:
    tree = dict.fromkeys(("", "cold", "sparse", "late", "early"), 0)
    files = [
        HotFile("sparse", 1, (0,), True),
        *(HotFile(name, 2, (0,), False) for name in ("early", "late", "gone")),
    ]
    assert list(in_order_of_touch(tree, files)) == ["early", "late", "sparse", "", "cold"]
