"""NVIDIA's machine code as nvdisasm prints it: instructions, and the loop in which a kernel spends its time."""

import re
from dataclasses import dataclass

_LINE = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@(\S+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Products of matrix units: of Hopper, and of what came before.
_PRODUCTS = ("HGMMA", "HMMA")


@dataclass(frozen=True)
class Instruction:
    """One instruction: what it depends on ("!P0", or ""), its name with all modifiers, and its operands."""

    predicate: str
    name: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after another, and the indices of the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    next: tuple[int, ...]


def parse(text: str) -> list[Block]:
    """The blocks of the one kernel that `nvdisasm -c` printed as `text`; the first is the kernel's start."""
    starts: dict[str, int] = {}
    lists: list[list[Instruction]] = [[]]
    for line in text.splitlines():
        if label := _LABEL.match(line):
            if lists[-1]:
                lists.append([])
            starts[label[1]] = len(lists) - 1
        elif found := _LINE.match(line):
            operands = tuple(part.strip() for part in found[3].split(",") if part.strip())
            lists[-1].append(Instruction(found[1] or "", found[2], operands))
            if found[2].startswith(("BRA", "EXIT")):
                lists.append([])
    return [Block(tuple(each), _followers(index, each, starts, len(lists))) for index, each in enumerate(lists)]


def _followers(index: int, block: list[Instruction], starts: dict[str, int], count: int) -> tuple[int, ...]:
    after = (index + 1,) if index + 1 < count else ()
    if not block:
        return after
    last = block[-1]
    always = last.predicate in ("", "PT", "UPT")
    if last.name.startswith("EXIT"):
        return () if always else after
    if last.name.startswith("BRA"):
        target = _TARGET.search(last.operands[-1])
        if target is None:
            raise ValueError(f"a branch without a label: {last}")
        # A branch may also name what it depends on before its target.
        return (starts[target[1]], *(() if always and len(last.operands) == 1 else after))
    return after


def main_loop(blocks: list[Block]) -> list[Instruction] | None:
    """What every iteration executes of the innermost loop with the most matrix work; None if no loop has any."""
    over = _dominators(blocks)
    loops = [loop for loop in _loops(blocks, over) if any(map(_is_product, _all(blocks, loop[1])))]
    inner = [loop for loop in loops if not any(other[1] < loop[1] for other in loops)]
    bodies = []
    for ends, inside in inner:
        bodies.append(_all(blocks, {index for index in inside if all(index in over[end] for end in ends)}))
    return max(bodies, key=lambda body: sum(map(_is_product, body)), default=None)


def _is_product(instruction: Instruction) -> bool:
    return instruction.name.startswith(_PRODUCTS)


def _all(blocks: list[Block], indices: set[int]) -> list[Instruction]:
    return [each for index in sorted(indices) for each in blocks[index].instructions]


def _dominators(blocks: list[Block]) -> list[set[int]]:
    """For each block those, itself included, that every way from a start leads through.

    Starts are the first block, and blocks that only a jump by a table reaches.
    """
    before: list[set[int]] = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        for follower in block.next:
            before[follower].add(index)
    everything = set(range(len(blocks)))
    over = [everything if before[index] and index else {index} for index in everything]
    changed = True
    while changed:
        changed = False
        for index in everything:
            if not before[index] or index == 0:
                continue
            found = {index} | set.intersection(*(over[each] for each in before[index]))
            if found != over[index]:
                over[index], changed = found, True
    return over


def _loops(blocks: list[Block], over: list[set[int]]) -> list[tuple[list[int], set[int]]]:
    """Of each natural loop the blocks that jump back to its start, and all blocks."""
    ends: dict[int, list[int]] = {}
    before: list[set[int]] = [set() for _ in blocks]
    for index, block in enumerate(blocks):
        for follower in block.next:
            before[follower].add(index)
            if follower in over[index]:
                ends.setdefault(follower, []).append(index)
    loops = []
    for start, jumps in ends.items():
        inside, waiting = {start}, list(jumps)
        while waiting:
            index = waiting.pop()
            if index not in inside:
                inside.add(index)
                waiting += before[index]
        loops.append((jumps, inside))
    return loops
