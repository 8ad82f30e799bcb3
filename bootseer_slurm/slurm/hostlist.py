"""Slurm's node lists: "n[1-3,07-09],x" to names and back.

Owns the syntax only; it asks nobody which nodes exist. Pure functions, no threads, no files.
The language is the one of `scontrol show hostnames` (scontrol(1)), without its tolerance for broken input:
a list that is cut off in the middle is an error here, because a report about some of the nodes misleads.
No library: ClusterShell's NodeSet knows no bound, has operators of its own ("!", "&", "/") and refuses
"n[01-3]", which Slurm takes; python-hostlist is under the GPL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from bootseer_slurm.errors import InputError

MAX_NODES = 65_536
_MAX_TEXT = 1 << 20
_MAX_NAME = 255
# Numbers of nodes have few digits; the limit keeps a hostile list from making huge integers.
_MAX_DIGITS = 12

_TEXT = r"[A-Za-z0-9_.-]"
# What stands between the commas outside of brackets. Empty words are left out, as in Slurm.
_WORD = re.compile(r"(?:[^,\[]+|\[[^\]]*(?:\]|$))+")
_PLAIN = re.compile(rf"{_TEXT}+")
_RANGED = re.compile(rf"(?:{_TEXT}*\[[0-9,-]+\])+")
_PART = re.compile(rf"({_TEXT}*)\[([0-9,-]+)\]")
_RANGE = re.compile(rf"([0-9]{{1,{_MAX_DIGITS}}})(?:-([0-9]{{1,{_MAX_DIGITS}}}))?")
_NUMBERED = re.compile(rf"(.*?)([0-9]{{1,{_MAX_DIGITS}}})")


def expand(hostlist: str) -> list[str]:
    """Names of the nodes of a Slurm hostlist, in its order, repetitions included.

    Several brackets in one word give all combinations, the last bracket changing fastest. "" gives no names.
    Raises InputError when the text is no hostlist or has more than 65,536 names.
    """
    if len(hostlist) > _MAX_TEXT:
        raise InputError(f"this nodelist has {len(hostlist)} characters, more than {_MAX_TEXT}")
    names: list[str] = []
    for word in _WORD.findall(hostlist):
        if _PLAIN.fullmatch(word):
            combinations = [word]
        elif _RANGED.fullmatch(word):
            combinations = [""]
            for prefix, ranges in _PART.findall(word):
                numbers = _numbers(ranges, word)
                if len(names) + len(combinations) * len(numbers) > MAX_NODES:
                    raise InputError(f"nodelist {_short(hostlist)} has more than {MAX_NODES} nodes")
                combinations = [head + prefix + number for head in combinations for number in numbers]
                if len(combinations[0]) > _MAX_NAME:
                    break
        else:
            raise InputError(f"{_short(word)} is not a node name or range in a nodelist")
        if len(combinations[-1]) > _MAX_NAME:
            raise InputError(f"node name {_short(combinations[-1])} has more than {_MAX_NAME} characters")
        names += combinations
        if len(names) > MAX_NODES:
            raise InputError(f"nodelist {_short(hostlist)} has more than {MAX_NODES} nodes")
    return names


def fold(names: Iterable[str]) -> str:
    """The shortest common way to write these node names: sorted, without repetitions, "n[1-3],x".

    Only the last number of a name is folded, as slurmctld does. expand(fold(names)) == the sorted names.
    Raises InputError when a name cannot be a node's.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(set(names), key=_order):
        if not _PLAIN.fullmatch(name) or len(name) > _MAX_NAME:
            raise InputError(f"{_short(name)} is not a node name")
        numbered = _NUMBERED.fullmatch(name)
        prefix, number = (numbered[1], numbered[2]) if numbered else (name, "")
        groups.setdefault(prefix, []).append(number)
    return ",".join(word for prefix, numbers in groups.items() for word in _fold_group(prefix, numbers))


def _numbers(ranges: str, word: str) -> list[str]:
    numbers: list[str] = []
    for text in ranges.split(","):
        match = _RANGE.fullmatch(text)
        if not match:
            raise InputError(f"{_short(text)} is not a range in nodelist {_short(word)}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"range {text} in nodelist {_short(word)} runs backwards")
        if len(numbers) + last - first + 1 > MAX_NODES:
            raise InputError(f"nodelist {_short(word)} has more than {MAX_NODES} nodes")
        # Zeros in front of the first number give the width of all: 08-10 is 08, 09, 10.
        numbers += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return numbers


def _fold_group(prefix: str, numbers: list[str]) -> Iterator[str]:
    """Words for one prefix and the numbers behind it; "" is the bare prefix."""
    if "" in numbers:
        yield prefix
    runs: list[list[str]] = []
    for number in numbers:
        if not number:
            continue
        if runs and number == f"{int(runs[-1][-1]) + 1:0{len(runs[-1][0])}d}":
            runs[-1].append(number)
        else:
            runs.append([number])
    if not runs:
        return
    ranges = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    yield f"{prefix}{ranges[0]}" if len(runs) == 1 and len(runs[0]) == 1 else f"{prefix}[{','.join(ranges)}]"


def _order(name: str) -> tuple[str, int, int]:
    numbered = _NUMBERED.fullmatch(name)
    return (numbered[1], int(numbered[2]), len(numbered[2])) if numbered else (name, -1, 0)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
