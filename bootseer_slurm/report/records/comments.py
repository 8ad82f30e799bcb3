"""AdminComment in accounting: the line that says what a job's start cost, and writing many of them.

A comment that does not begin with COMMENT_PREFIX is somebody else's and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bootseer_slurm.report.records.done import Comment, Done
from bootseer_slurm.report.records.row import Row
from bootseer_slurm.report.startup.stages import STAGES
from bootseer_slurm.slurm.jobs import admin_comments
from bootseer_slurm.slurm.sacctmgr import set_admin_comments

COMMENT_PREFIX = "bootseer: "
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Written:
    """How many comments accounting has now, were left alone as somebody else's, and were given up."""

    there: int
    foreign: int
    given_up: int


def comment_of(row: Row) -> str:
    """The line for AdminComment, such as "bootseer: start 43s of 1h02m, 12 gpu-min, image 20s".

    In small letters, for sacctmgr makes them small anyway.
    """
    waited_s, elapsed_s = row["start_to_training_s"], row["elapsed_s"]
    if waited_s is None:
        return f"{COMMENT_PREFIX}start not marked, ran {_short(elapsed_s)}"
    parts = [f"start {_short(waited_s)} of {_short(elapsed_s)}"]
    if row["lost_gpu_s"] is not None:
        parts.append(f"{row['lost_gpu_s'] / 60:.0f} gpu-min")
    elif row["lost_cpu_s"] is not None:
        parts.append(f"{row['lost_cpu_s'] / 60:.0f} cpu-min")
    known = [(row[f"{stage}_s"], stage) for stage in STAGES if row[f"{stage}_s"] is not None]
    if known:
        longest_s, stage = max(known)
        parts.append(f"{stage} {_short(longest_s)}")
    return COMMENT_PREFIX + ", ".join(parts)


def write_comments(done: Done, comments: Sequence[Comment]) -> Written:
    """Write these comments where nobody else wrote one, see that accounting has them, and note that.

    Raises AccountingError.
    """
    before = admin_comments(each.job for each in comments)
    ours = {each.job: before.get(each.job, "") for each in comments}
    foreign = {job for job, text in ours.items() if text and not text.startswith(COMMENT_PREFIX)}
    to_write = {
        each.shown_id: each.text
        for each in comments
        if each.job not in foreign and ours[each.job] != each.text
    }
    if to_write:
        set_admin_comments(to_write)
        ours = admin_comments(each.job for each in comments)
    there = {each.job for each in comments if ours.get(each.job) == each.text}
    given_up = {each.job for each in comments if each.tries + 1 >= _TRIES} - there - foreign
    over = there | foreign | given_up
    done.end_tries(over=over, again={each.job for each in comments} - over)
    return Written(len(there), len(foreign), len(given_up))


def _short(duration_s: float) -> str:
    """Seconds in a few characters: "43s", "5m20s", "1h02m"."""
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
