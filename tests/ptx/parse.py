"""PTX text to a Kernel: parameters with offsets, memory layout, registers, and instructions that know their source lines."""

import re
from dataclasses import dataclass, field
from typing import TypeAlias

from .findings import PTXError
from .values import GLOBAL_WINDOW, WIDTH, integer


@dataclass(frozen=True)
class Register:
    name: str
    type: str


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A variable or a parameter; ``address`` counts from the start of its state space (of the generic space for global ones)."""

    name: str
    space: str
    address: int


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Negated:
    operand: Register


@dataclass(frozen=True)
class Pair:
    """``first|second``, the two results of setp, shfl and match."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Vector:
    items: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


Operand: TypeAlias = Register | Special | Immediate | Symbol | Label | Negated | Pair | Vector | Address


@dataclass(frozen=True)
class Instruction:
    """``predicate`` guards it (with ``negated``: where it is false); ``parts`` are the opcode's words, the first one apart."""

    text: str
    line: str
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | None = None
    negated: bool = False

    @property
    def type(self) -> str:
        return self.parts[-1] if self.parts else ""


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    size: int


@dataclass
class Layout:
    """Variables of one state space, packed in order of declaration."""

    space: str
    base: int = 0
    size: int = 0
    symbols: dict[str, Symbol] = field(default_factory=dict)
    initial: dict[int, bytes] = field(default_factory=dict)

    def place(self, name: str, size: int, align: int, initial: bytes = b"") -> None:
        offset = -(-self.size // align) * align
        self.symbols[name] = Symbol(name, self.space, self.base + offset)
        self.size = offset + size
        if initial:
            self.initial[offset] = initial


@dataclass(eq=False)
class Kernel:
    """``dynamic`` names the shared array whose size the launch gives; it lies behind the static ones. Not changed once it is made."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    parameter_bytes: int = 0
    layouts: dict[str, Layout] = field(default_factory=dict)
    dynamic: str = ""
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    required_threads: tuple[int, ...] = ()


VARIABLE = re.compile(
    r"^(?P<linkage>(?:\.(?:extern|visible|weak|common)\s+)*)\.(?P<space>shared|global|const|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.v(?P<vector>[248])\s+)?\.(?P<type>\w+)\s+(?P<name>[$\w]+)\s*(?P<extent>\[\d*\])?\s*(?:=\s*(?P<initial>.*))?$",
    re.S,
)
ENTRY = re.compile(r"\.entry\s+(?P<name>[$\w]+)\s*(?:\((?P<parameters>[^)]*)\))?(?P<directives>[^{;]*)\{")
PARAMETER = re.compile(
    r"^\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr.*\s)?(?P<name>[$\w]+)(?:\[(?P<extent>\d+)\])?$", re.S
)
STATEMENT = re.compile(
    r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<file>\.file\s[^\n]*)|(?P<label>[$\w]+)\s*:(?!:)|(?P<open>\{)|(?P<close>\})|(?P<statement>[^;]*?);)",
    re.S,
)
SPECIAL = re.compile(
    r"%(?:n?tid|n?ctaid|cluster_n?ctarank|laneid|n?warpid|n?smid|lanemask_\w+|clock\w*|globaltimer\w*|gridid|\w+_smem_size|envreg\d+|pm\d)(?:\.[xyzw])?$"
)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel ``name`` of a PTX module, or its only one."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    entries = [entry for entry in ENTRY.finditer(text) if name in (None, entry["name"])]
    if len(entries) != 1:
        raise PTXError(f"{len(entries)} kernels named {name!r}" if name else f"{len(entries)} kernels; name one")
    entry = entries[0]
    kernel = Kernel(entry["name"], layouts={space: Layout(space) for space in ("shared", "local", "param")})
    kernel.layouts["global"] = kernel.layouts["const"] = Layout("global", GLOBAL_WINDOW)
    required = re.search(r"\.reqntid\s+([\d\s,]+)", entry["directives"])
    kernel.required_threads = tuple(int(extent) for extent in required[1].split(",")) if required else ()
    _parameters(kernel, entry["parameters"] or "")
    for declaration in re.finditer(
        r"^\s*((?:\.(?:extern|visible|weak|common)\s+)*\.(?:shared|global|const)\s[^;]*);", _outside_bodies(text), re.M
    ):
        _variable(kernel, declaration[1].strip())
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    _Body(kernel, files).read(text, entry.end())
    if kernel.dynamic:
        shared = kernel.layouts["shared"]
        shared.place(kernel.dynamic, 0, 16)
        kernel.instructions = [_moved(instruction, shared.symbols[kernel.dynamic]) for instruction in kernel.instructions]
    return kernel


def _outside_bodies(text: str) -> str:
    """The module without what is between the braces of functions, in which variables are local; initialisers stay."""
    depth = 0
    kept: list[str] = []
    for piece in re.split(r"([{}])", text):
        initialiser = piece == "{" and "".join(kept[-1:]).rstrip().endswith("=")
        if piece == "{" and (depth or not initialiser):
            depth += 1
        elif piece == "}" and depth:
            depth -= 1
            kept.append(";\n")
        elif not depth:
            kept.append(piece)
    return "".join(kept)


def _parameters(kernel: Kernel, text: str) -> None:
    for part in filter(None, split(text)):
        match = PARAMETER.match(part)
        if match is None:
            raise PTXError(f"not a parameter: {part}")
        width = WIDTH[match["type"]]
        size = width * int(match["extent"] or 1)
        layout = kernel.layouts["param"]
        layout.place(match["name"], size, int(match["align"] or width))
        kernel.parameters.append(Parameter(match["name"], match["type"], layout.symbols[match["name"]].address, size))
    kernel.parameter_bytes = kernel.layouts["param"].size


def _variable(kernel: Kernel, text: str) -> None:
    match = VARIABLE.match(text)
    if match is None:
        raise PTXError(f"not a variable: {text}")
    width = WIDTH[match["type"]] * int(match["vector"] or 1)
    extent = match["extent"]
    if ("extern" in match["linkage"] and match["space"] == "shared") or extent == "[]":
        kernel.dynamic = match["name"]
        kernel.layouts["shared"].symbols[match["name"]] = Symbol(match["name"], "shared", 0)
        return
    size = width * int(extent[1:-1] if extent else 1)
    initial = b""
    if match["space"] in ("global", "const"):
        items = [integer(item) for item in split((match["initial"] or "0").strip("{} \n"))]
        initial = b"".join((item & ((1 << 8 * width) - 1)).to_bytes(width, "little") for item in items).ljust(size, b"\0")
    kernel.layouts[match["space"]].place(match["name"], size, int(match["align"] or width), initial)


def split(text: str) -> list[str]:
    """Operands between the commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts] if text.strip() else []


def _moved(instruction: Instruction, symbol: Symbol) -> Instruction:
    """The instruction with the final address of the dynamic shared array, which is known only after all static ones."""

    def move(operand: Operand) -> Operand:
        if isinstance(operand, Symbol) and operand.name == symbol.name:
            return symbol
        return Address(move(operand.base), operand.offset) if isinstance(operand, Address) else operand

    operands = tuple(move(operand) for operand in instruction.operands)
    return instruction if operands == instruction.operands else Instruction(**{**vars(instruction), "operands": operands})


class _Body:
    """Reads the statements of one kernel. Registers declared in an inner block get a name of their own."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files, self.line = kernel, files, ""
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0

    def read(self, text: str, start: int) -> None:
        place = start
        while self.scopes:
            match = STATEMENT.match(text, place)
            if match is None:
                raise PTXError(f"kernel {self.kernel.name} does not end")
            place = match.end()
            if match["loc"]:
                file, line = match["loc"].split()[1:3]
                path = self.files.get(file, f"file {file}")
                if line == "0" and self.line:  # made by the compiler: it belongs to what stands around it
                    continue
                self.line = f"{path.rsplit('/', 1)[-1]}:{line}"
            elif match["label"]:
                self.kernel.labels[match["label"]] = len(self.kernel.instructions)
            elif match["open"]:
                self.opened += 1
                self.scopes.append({})
            elif match["close"]:
                self.scopes.pop()
            elif match["statement"]:
                self.statement(" ".join(match["statement"].split()))

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
        elif VARIABLE.match(text):
            _variable(self.kernel, text)
        elif text and not text.startswith("."):
            self.kernel.instructions.append(self.instruction(text))

    def declare(self, text: str) -> None:
        type_, names = re.sub(r"^\.reg\s*", "", text).lstrip(".").split(None, 1)
        for name in split(names):
            family = re.match(r"(.*)<(\d+)>$", name)
            for member in [f"{family[1]}{index}" for index in range(int(family[2]))] if family else [name]:
                inner = len(self.scopes) > 1
                unique = f"{member}@{self.opened}" if inner else member
                self.scopes[-1][member] = unique
                self.kernel.registers[unique] = type_

    def instruction(self, text: str) -> Instruction:
        match = re.match(r"(?:@(!?)\s*(%?[$\w]+)\s+)?([\w.:]+)\s*(.*)$", text)
        if match is None:
            raise PTXError(f"not an instruction: {text}")
        predicate = self.register(match[2]) if match[2] else None
        opcode, *parts = re.sub(r"::(?=cta|cluster)", "_", match[3]).split(".")
        parts = ["shared" if part == "shared_cta" else part for part in parts]
        operands = tuple(self.operand(part) for part in split(match[4]))
        return Instruction(text, self.line, opcode, tuple(parts), operands, predicate, match[1] == "!")

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return Register(scope[name], self.kernel.registers[scope[name]])
        return None

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in split(text.strip("{} "))))
        if text.startswith("["):
            match = re.match(r"\[\s*([^\s+]+?)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
            if match is None:
                raise PTXError(f"not an address: {text}")
            return Address(self.operand(match[1]), integer(match[2] or "0"))
        if text.startswith("!"):
            register = self.register(text[1:].strip())
            if register is not None:
                return Negated(register)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        register = self.register(text)
        if register is not None:
            return register
        if text == "_":
            return Register("_", "b64")
        for layout in self.kernel.layouts.values():
            if text in layout.symbols:
                return layout.symbols[text]
        if text == "WARP_SZ":
            return Immediate("32")
        if SPECIAL.match(text):
            return Special(text)
        if re.match(r"[-+]?[\d.]", text):
            return Immediate(text)
        if re.match(r"[$\w]+$|\(.*\)$", text):
            return Label(text)
        raise PTXError(f"not an operand: {text}")
