"""Reads disassembled machine code: instructions, basic blocks, natural loops, and what a trip of the hot loop issues.

Work is what multiply-add, MUFU and tensor instructions do. The hot loop is, of the loops that have such and no other loop with such inside,
the one with the most (a loop that only waits does not count). Where a kernel has several, the one that is meant can be told by its source,
only the work of those lines counts then, or by a function that counts the work of a loop. All instructions of the loop count, also those
that a branch within it may skip: each takes an issue slot, and a predicated one does so even where it has no effect.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

CLASSES = ("fma", "tensor", "mufu", "shared", "global", "local", "shuffle", "barrier", "other")
MEMBERS = {
    "fma": r"(FFMA|FMUL|FADD)(2|32I)?",
    "tensor": r"(H|I|D|B|Q|O)G?MMA|UTC\w*MMA",
    "mufu": "MUFU",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|UBLKCP",
    "global": r"LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|LD|ST|UTMA\w+",
    "local": "LDL|STL",
    "shuffle": "SHFL|REDUX|CREDUX",
    "barrier": "BAR|DEPBAR|LDGDEPBAR|MEMBAR|WARPSYNC|SYNCS|ARRIVES|FENCE",
}
PATTERNS = {name: re.compile(pattern) for name, pattern in MEMBERS.items()}
SECTION = re.compile(r"^\.text\.(\S+):", re.M)
TOKEN = re.compile(
    r'//## File "(?P<file>[^"]*)", line (?P<number>\d+)|^\s*(?P<label>[.$][\w$.]+):|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<words>[^;]*);',
    re.M,
)
BRANCH_TARGETS = re.compile(r'"BRANCH_TARGETS (\S+)"')
PREDICATE = re.compile(r"@!?U?P[T\d]+\s+")
ENDS = {"EXIT", "RET", "BPT", "RTT"}  # nothing follows; where they are predicated, the next instruction does


@dataclass(frozen=True)
class Instruction:
    """``targets`` are the addresses that it may jump to; ``falls`` says whether the next one may follow."""

    address: int
    opcode: str  # with its modifiers: "FFMA.FTZ"
    targets: tuple[int, ...]
    falls: bool
    line: str = ""  # of the source: "scores.py:95"

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        return next((name for name, pattern in PATTERNS.items() if pattern.fullmatch(self.base)), "other")

    @property
    def lanes(self) -> int:
        """FP32 results per thread: packed instructions have two."""
        return 0 if self.kind != "fma" else 2 if self.base.endswith("2") else 1


Source = Collection[str] | Callable[[Iterable[Instruction]], int] | None  # lines as instructions name them, or what counts the work


def parse(text: str, name: str | None = None) -> list[Instruction]:
    """The instructions of function ``name`` (or of the only one) in what ``nvdisasm -c -g`` prints."""
    sections = SECTION.split(text)
    functions = dict(zip(sections[1::2], sections[2::2], strict=True)) or {"": text}
    if name is None and len(functions) > 1:
        raise ValueError(f"functions {', '.join(functions)}: which?")
    body = functions[name] if name in functions else next(iter(functions.values()))
    found: list[tuple[int, str, str]] = []
    places: dict[str, int] = {}
    line, labels = "", []
    for match in TOKEN.finditer(body):
        if match["number"]:
            line = f"{match['file'].rsplit('/', 1)[-1]}:{match['number']}"
        elif match["label"]:
            labels.append(match["label"])
        else:
            address = int(match["address"], 16)
            places |= dict.fromkeys(labels, address)
            labels = []
            found.append((address, match["words"].strip(), line))
    return [instruction(*item, places) for item in found]


def instruction(address: int, words: str, line: str, places: dict[str, int]) -> Instruction:
    predicate = PREDICATE.match(words)
    opcode, _, operands = words[predicate.end() if predicate else 0 :].partition(" ")
    base = opcode.split(".")[0]
    conditional = predicate is not None or bool(re.match(r"!?U?P\d", operands.strip()))
    if base in ("BRX", "JMX", "BRXU"):
        listed = BRANCH_TARGETS.search(operands)
        if listed is None:
            raise ValueError(f"{words} at {address:#x}: the targets of an indirect branch are not known")
        return Instruction(address, opcode, tuple(places[label] for label in listed[1].split(",")), predicate is not None, line)
    call = opcode.startswith("CALL.REL.NOINC")  # may come back; but ptxas also leaves loops this way for good
    label = re.search(r"\((\S+)\)", operands)
    if call and (label is None or label[1] not in places):  # a function of the compiler's, in another section
        return Instruction(address, opcode, (), True, line)
    if base in ("BRA", "JMP") or call:
        if label is None or label[1] not in places:
            raise ValueError(f"{words} at {address:#x} goes nowhere")
        return Instruction(address, opcode, (places[label[1]],), conditional or call, line)
    return Instruction(address, opcode, (), base not in ENDS or conditional, line)


@dataclass(frozen=True)
class Block:
    """Instructions ``first`` to ``last`` of the program, always run one after another; ``next`` are the blocks that may follow."""

    first: int
    last: int
    next: tuple[int, ...]


def blocks(program: Sequence[Instruction]) -> list[Block]:
    place = {item.address: number for number, item in enumerate(program)}
    starts = {0}
    for number, item in enumerate(program):
        starts.update(place[target] for target in item.targets)
        if item.targets or not item.falls:
            starts.add(number + 1)
    order = sorted(start for start in starts if start < len(program))
    index = {start: number for number, start in enumerate(order)}
    found = []
    for number, first in enumerate(order):
        last = order[number + 1] - 1 if number + 1 < len(order) else len(program) - 1
        item = program[last]
        after = [index[place[target]] for target in item.targets]
        if item.falls and number + 1 < len(order):
            after.append(number + 1)
        found.append(Block(first, last, tuple(after)))
    return found


def dominators(graph: Sequence[Block]) -> list[set[int]]:
    """The blocks that every way from the entry to a block passes; none for blocks that are never reached."""
    reached, waiting = {0}, [0]
    while waiting:
        for after in graph[waiting.pop()].next:
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    before: list[list[int]] = [[] for _ in graph]
    for number in reached:
        for after in graph[number].next:
            before[after].append(number)
    found = [set(reached) if number in reached else set() for number in range(len(graph))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            new = {number} | set.intersection(*(found[earlier] for earlier in before[number]))
            changed |= new != found[number]
            found[number] = new
    return found


def loops(program: Sequence[Instruction]) -> list[list[Instruction]]:
    """Natural loops, outermost first: the blocks from which a branch back to a block that dominates it is reached without leaving it."""
    graph = blocks(program)
    above = dominators(graph)
    bodies: dict[int, set[int]] = {}
    for tail, block in enumerate(graph):
        for head in block.next:
            if head not in above[tail]:
                continue
            body = bodies.setdefault(head, {head})
            waiting = [tail]
            while waiting:
                number = waiting.pop()
                if number not in body:
                    body.add(number)
                    waiting += [earlier for earlier, other in enumerate(graph) if number in other.next and above[earlier]]
    ordered = sorted(bodies.values(), key=len, reverse=True)
    return [[program[i] for number in sorted(body) for i in range(graph[number].first, graph[number].last + 1)] for body in ordered]


def hot_loop(program: Sequence[Instruction], source: Source = None) -> list[Instruction] | None:
    """See above. None if no loop has any work."""
    found = [set(body) for body in loops(program) if work(body, source)]
    innermost = [body for body in found if not any(other < body for other in found)]
    return sorted(max(innermost, key=lambda body: work(body, source)), key=lambda item: item.address) if innermost else None


def work(body: Iterable[Instruction], source: Source) -> int:
    if callable(source):
        return source(body)
    return sum(item.kind in ("fma", "mufu", "tensor") and (source is None or item.line in source) for item in body)


def reciprocals_alone(body: Iterable[Instruction]) -> int:
    """As work: how many a loop has that has no exponential."""
    special = [item.opcode for item in body if item.kind == "mufu"]
    return 0 if any(".EX2" in opcode for opcode in special) else sum(".RCP" in opcode for opcode in special)


@dataclass(frozen=True)
class Issue:
    """What one warp issues in a trip, by class, and its FP32 results per thread."""

    slots: dict[str, int]
    fp32: int

    @property
    def total(self) -> int:
        return sum(self.slots.values())


def issue(body: Sequence[Instruction]) -> Issue:
    counted = Counter(item.kind for item in body)
    return Issue({name: counted[name] for name in CLASSES}, sum(item.lanes for item in body))
