"""Reads machine code: spills inside loops, and registers overwritten while an asynchronous wgmma may read them.

A wgmma whose left operand lives in registers reads them after the instruction has issued, until a wait retires its
group. Several compilers of recent years reuse those registers too early; neither they nor the hardware report it.
The check follows program order and walks every loop twice, so that an iteration meets the one before it. It knows
no branch but the loop's own, and so can only err by reporting too much.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([^;]+?)\s*;", re.M)
_BRANCH = re.compile(r"BRA\S*\s+(?:.*\s)?`?\(?(?:\.L_\S+|(0x[0-9a-f]+))")
_WGMMA = re.compile(r"[HQI]GMMA\S*\s+R(\d+),\s*(?:R(\d+)|gdesc\S+)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_WRITE = re.compile(r"([A-Z0-9_.]+)\s+(?:U?P\w+,\s*)*R(\d+)\b")
_WRITES_NO_REGISTER = re.compile(r"(ST|LDGSTS|BRA|BAR|RED|ATOMS|[IF]SETP|WARP|SYNCS|UTMA|R2UR|DEPBAR|EXIT|PLOP3)")


class Instruction(NamedTuple):
    address: int
    text: str


class Hazard(NamedTuple):
    """``write`` changes a register that the wgmma at ``reader`` may not have read yet."""

    write: Instruction
    reader: Instruction


def hazards(sass: str) -> list[Hazard]:
    code = _parsed(sass)
    found: dict[tuple[int, int], Hazard] = {}
    open_group: list[tuple[Instruction, set[int]]] = []
    groups: list[list[tuple[Instruction, set[int]]]] = []
    for instruction in _walk(code):
        text = instruction.text
        if wgmma := _WGMMA.match(text):
            left = wgmma.group(2)
            open_group.append((instruction, set(range(int(left), int(left) + 4)) if left else set()))
            if "gsb0" in text:
                groups.append(open_group)
                open_group = []
        elif wait := _WAIT.match(text):
            pending = int(wait.group(1), 16)
            groups = groups[len(groups) - pending :] if pending else []
        else:
            written = _written(text)
            for reader, registers in (member for group in [*groups, open_group] for member in group):
                if written & registers:
                    found[instruction.address, reader.address] = Hazard(instruction, reader)
    return list(found.values())


def innermost_loops(code: list[Instruction], holding: re.Pattern[str]) -> list[tuple[int, int]]:
    """(first, last) instruction of each loop that holds such an instruction and no smaller loop that does."""
    place = {instruction.address: n for n, instruction in enumerate(code)}
    loops = []
    for last, instruction in enumerate(code):
        branch = _BRANCH.match(instruction.text)
        first = place.get(int(branch.group(1), 16)) if branch and branch.group(1) else None
        if first is not None and first <= last and any(holding.match(i.text) for i in code[first : last + 1]):
            loops.append((first, last))
    return [
        (first, last)
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]


def spills_in_loops(sass: str, product: str) -> int:
    """Instructions that move spilled registers inside the innermost loops that multiply.

    A compiler may spill a few registers outside them to fit one more block on a processor; inside, it costs.
    """
    code = _parsed(sass)
    loops = innermost_loops(code, re.compile(product))
    return sum(bool(re.match(r"(LDL|STL)\b", i.text)) for first, last in loops for i in code[first : last + 1])


def _parsed(sass: str) -> list[Instruction]:
    return [Instruction(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]


def _walk(code: list[Instruction]) -> Iterator[Instruction]:
    """Program order, each innermost loop that holds a wgmma twice."""
    again = {last: first for first, last in innermost_loops(code, _WGMMA)}
    for n, instruction in enumerate(code):
        yield instruction
        if n in again:
            yield from code[again[n] : n + 1]


def _written(text: str) -> set[int]:
    match = _WRITE.match(text)
    if not match or _WRITES_NO_REGISTER.match(match.group(1)):
        return set()
    name, first = match.group(1), int(match.group(2))
    wide = 4 if ".M88.4" in name or ".128" in name else 2 if any(s in name for s in (".M88.2", ".64", "WIDE")) else 1
    return set(range(first, first + wide))
