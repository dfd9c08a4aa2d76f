"""Reading the text of a compiled TPU program: bytes of its parameters in their tiles, what it copies, what it sends to other chips."""

import math
import re
from dataclasses import dataclass

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "collective-broadcast", "ragged-all-to-all")
# what names a value, wraps others or updates its first operand in place
NOT_MADE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "scatter", "dynamic-update-slice", "optimization-barrier",
}  # fmt: skip
# waits: the bytes belong to the -start; ConcatBitcast is the compiler's view of slices that lie side by side
WAITS = ("-done", "-update")
_TYPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")


@dataclass(frozen=True)
class Array:
    """One array type of a program's text: f32[4220323,128]{1,0:T(8,128)}."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # what stands in the braces

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * ITEM_BYTES.get(self.dtype, 4)

    @property
    def order(self) -> tuple[int, ...]:
        """Dimensions from the fastest to the slowest."""
        order = re.match(r"[\d,]*", self.layout)[0]
        return tuple(int(dim) for dim in order.split(",") if dim) or tuple(reversed(range(len(self.dims))))

    @property
    def on_chip(self) -> bool:
        """In a small memory on the chip: S(1) everywhere, also S(3) on v4."""
        return re.search(r"S\([1-9]\d*\)", self.layout) is not None

    @property
    def padded_bytes(self) -> int:
        """With the fastest dimensions rounded up to whole tiles."""
        tile = re.search(r"T\(([\d,]+)\)", self.layout)
        sizes = [self.dims[dim] for dim in self.order]  # fastest first
        for place, unit in enumerate(reversed([int(part) for part in tile[1].split(",")] if tile else [])):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // unit) * unit
        return math.prod(sizes) * ITEM_BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]{{{self.layout}}}"


@dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: str  # the computation of a fusion
    root: bool
    text: str


@dataclass(frozen=True)
class Made:
    """An instruction that makes an array of a buffer's size."""

    name: str
    op: str
    array: Array


@dataclass(frozen=True)
class Sent:
    """What one chip hands to all collectives of a kind, its own share included.

    count   how often the kind stands in the program
    bytes   by type, "s32", "f32";  padded: all of them in the tiles in which they lie;  tokens: bytes that only keep collectives in order
    """

    count: int
    bytes: dict[str, int]
    padded: int
    tokens: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def arrays(text: str) -> tuple[Array, ...]:
    """All array types in a text, in order."""
    return tuple(Array(dtype, tuple(int(dim) for dim in dims.split(",") if dim), layout or "") for dtype, dims, layout in _TYPE.findall(text))


def parameters(program: str) -> tuple[Array, ...]:
    """Of the whole program, from its first line."""
    layouts = re.search(r"entry_computation_layout=\{\((.*?)\)->", program.split("\n", 1)[0])
    return arrays(layouts[1])


def donated(program: str) -> set[int]:
    """Numbers of the parameters whose memory an output takes over."""
    return {int(number) for number in re.findall(r"\((\d+), \{\}, (?:may|must)-alias\)", program.split("\n", 1)[0])}


def computations(program: str) -> dict[str, dict[str, Instruction]]:
    """Computation name -> instruction name -> instruction."""
    found: dict[str, dict[str, Instruction]] = {}
    inside: dict[str, Instruction] = {}
    for line in program.splitlines():
        head = re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line)
        if head:
            inside = found.setdefault(head[1], {})
            continue
        match = _INSTRUCTION.match(line)
        if match:
            root, name, types, op, rest = match.groups()
            called = re.search(r"calls=%([\w.-]+)", rest)
            operands = tuple(re.findall(r"%([\w.-]+)", rest.split("), ", 1)[0]))
            inside[name] = Instruction(name, op, arrays(types), operands, called[1] if called else "", bool(root), line)
    return found


def table_sized(program: str, sizes: set[int], limit: int) -> tuple[list[Made], int]:
    """What a program makes that has a buffer's number of elements, or at least `limit` of them, outside of the buffers themselves.

    sizes  numbers of elements that the tables' buffers have
    Returns what it makes in the chip's large memory, and the bytes that it moves from there into on-chip memory and back.
    """
    parts = computations(program)
    fused = {instruction.called for part in parts.values() for instruction in part.values() if instruction.op == "fusion"}
    made, moved = [], 0

    def large(array: Array) -> bool:
        return array.elements in sizes or array.elements >= limit

    for name, part in parts.items():
        if name in fused:
            continue
        for instruction in part.values():
            if instruction.op.endswith(WAITS) or instruction.op in NOT_MADE or "ConcatBitcast" in instruction.text:
                continue
            sources = [array for operand in instruction.operands if operand in part for array in part[operand].results]
            if instruction.op in ("copy-start", "slice-start", "async-start", "copy"):
                # copy-start's own types are target, source; slice-start's are (sources), target
                target = instruction.results[1 if instruction.op in ("slice-start", "async-start") and len(instruction.results) > 1 else 0]
                source = sources[0] if sources else target
                if (large(source) or large(target)) and target.on_chip != source.on_chip:
                    moved += target.bytes
                    continue
                results = (target,)
            elif instruction.op == "fusion":
                results = _made_by_fusion(parts, instruction)
            else:
                results = instruction.results
            made += [Made(instruction.name, instruction.op, array) for array in results if large(array) and not array.on_chip]
    return made, moved


def _made_by_fusion(parts: dict[str, dict[str, Instruction]], fusion: Instruction) -> tuple[Array, ...]:
    """The results of a fusion less those that it updates in place. Fusions nest."""
    part = parts[fusion.called]
    root = next(instruction for instruction in part.values() if instruction.root)
    sources = [part[name] for name in root.operands] if root.op == "tuple" else [root]
    made = []
    for source, array in zip(sources, fusion.results, strict=True):
        while source.op in ("bitcast", "get-tuple-element"):
            source = part[source.operands[0]]
        if source.op == "fusion" and len(source.results) == 1:
            made += _made_by_fusion(parts, source)
        elif source.op not in NOT_MADE:
            made.append(array)
    return tuple(made)


def collectives(program: str) -> dict[str, Sent]:
    """By kind. One that starts in one instruction and ends in another counts once, and so does one inside a loop."""
    found: dict[str, Sent] = {}
    for part in computations(program).values():
        for instruction in part.values():
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            handed = [array for operand in instruction.operands if operand in part for array in part[operand].results]
            sent = found.setdefault(kind, Sent(0, {}, 0, 0))
            by_type = dict(sent.bytes)
            # torch_xla chains collectives by a number that an all-reduce sums beside its values
            values = [array for array in handed if array.dims or len(handed) == 1]
            for array in values:
                by_type[array.dtype] = by_type.get(array.dtype, 0) + array.bytes
            tokens = sum(array.bytes for array in handed) - sum(array.bytes for array in values)
            padded = sum(array.padded_bytes for array in values)
            found[kind] = Sent(sent.count + 1, by_type, sent.padded + padded, sent.tokens + tokens)
    return found
