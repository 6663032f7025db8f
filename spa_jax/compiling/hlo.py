"""Counts what a compiled program costs one device, from its HLO text; a loop's body counts as often as it runs.

XLA's own cost analysis counts a body once, which for a backbone of scanned blocks is one block.
"""

import dataclasses
import math
import re
from collections import Counter

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "c64": 64, "c128": 128}
"""Bits of the types whose name does not end in them."""

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "async-start", "async-update", "async-done", "copy-done",
    *(f"{name}-done" for name in COLLECTIVES),
}  # fmt: skip
"""Opcodes of instructions that read and write no memory themselves."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_fast_memory: bool
    """Whether it is in on-chip memory and not in the device's main memory."""

    @property
    def size(self) -> int:
        """Its size in bytes."""
        bits = BITS.get(self.dtype) or int("".join(re.findall(r"\d+", self.dtype)[:1]) or 0)
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: its name within the computation.
        arrays: the arrays of its result.
        opcode: such as `dot` or `fusion`.
        operands: names of the instructions whose results it takes.
        text: the operands as written; for a constant, its value.
        attributes: what follows the operands.
        root: whether its result is the computation's.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of its result, all arrays together."""
        return sum(array.size for array in self.arrays)

    def calls(self) -> list[str]:
        """Returns the names of the computations that it runs."""
        keys = "calls|body|condition|branch_computations|true_computation|false_computation"
        keys += "|to_apply" if self.opcode == "call" else ""
        groups = re.findall(rf"(?:{keys})=(%[\w.-]+|\{{[^}}]*\}})", self.attributes)
        return [name for group in groups for name in re.findall(r"%([\w.-]+)", group)]


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of a program on one device.

    Attributes:
        flops: operations of matrix products and convolutions, where a multiplication and an addition count as two.
            Hand-written kernels, such as those of attention, are opaque and count nothing.
        bytes: approximate bytes read from and written to the main memory.
        collectives: bytes of the arrays that are exchanged between devices, by collective.
        largest_outside: bytes of the largest exchange of each collective outside of all loops.
        unknown_loops: number of loops whose length is neither known before run time nor given; their body counts once.
    """

    flops: int
    bytes: int
    collectives: dict[str, int]
    largest_outside: dict[str, int]
    unknown_loops: int


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """Parses HLO text; returns the entry computation's name, and all computations by name (instructions by name)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
            if header and not line.startswith("HloModule"):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.partition(",")[0] == "}":
            current = None
        elif match := re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line):
            result, rest = _split_balanced(line[match.end() :])
            opcode, _, rest = rest.strip().partition("(")
            operands, attributes = _split_balanced("(" + rest)
            names = tuple(re.findall(r"%([\w.-]+)", operands))
            current[match[2]] = Instruction(
                match[2], _arrays(result), opcode, names, operands, attributes, bool(match[1])
            )
    return entry, computations


def _split_balanced(text: str) -> tuple[str, str]:
    """Splits after the first space outside of all brackets, or after a leading parenthesis."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and (character == " " or (text[0] == "(" and character == ")")):
            return text[: index + 1], text[index + 1 :]
    return text, ""


def _arrays(result: str) -> tuple[Array, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", result)
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), "S(1)" in layout)
        for dtype, dims, layout in found
    )


def cost(text: str, inner_trips: int | None = None) -> Cost:
    """Counts the cost of a compiled program.

    Args:
        text: of `compiled.as_text()`.
        inner_trips: how often a loop within another one runs whose length is known only at run time.
    """
    entry, computations = parse(text)
    runs, looped, fused, unknown = _count_runs(entry, computations, inner_trips)
    flops = moved = 0
    collectives: Counter[str] = Counter()
    counted: set[str] = set()
    outside: dict[str, int] = {}
    for name, count in runs.items():
        body = computations[name]
        for instruction in body.values():
            flops += count * _flops(instruction, body)
            kind = _collective(instruction)
            if kind and _is_first_part(instruction, counted):
                size = _exchanged_bytes(instruction, body)
                collectives[kind] += count * size
                if name not in looped:
                    outside[kind] = max(outside.get(kind, 0), size)
            if name not in fused:
                moved += count * _moved_bytes(instruction, body, computations)
    return Cost(flops, moved, dict(collectives), outside, unknown)


def _count_runs(
    entry: str, computations: dict[str, Computation], inner_trips: int | None
) -> tuple[Counter[str], set[str], set[str], int]:
    """Returns how often each computation runs, which run in a loop or are fused, and the number of unknown loops."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for instruction in computations[name].values():
                for called in instruction.calls():
                    visit(called)
            order.append(name)

    visit(entry)
    runs: Counter[str] = Counter({entry: 1})
    looped: set[str] = set()
    fused: set[str] = set()
    unknown = 0
    for name in reversed(order):
        for instruction in computations[name].values():
            trips = _trip_count(instruction, computations[name], computations) if instruction.opcode == "while" else 1
            if trips is None and name in looped:
                trips = inner_trips
            unknown += trips is None
            for called in instruction.calls():
                runs[called] += runs[name] * (1 if trips is None else trips)
                if name in looped or instruction.opcode == "while":
                    looped.add(called)
                if name in fused or instruction.opcode == "fusion":
                    fused.add(called)
    return runs, looped, fused, unknown


def _trip_count(loop: Instruction, body: Computation, computations: dict[str, Computation]) -> int | None:
    """Returns how often a loop runs: as the compiler noted, or from its counter's start, step and bound; else None."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    names = dict(re.findall(r"(body|condition)=%([\w.-]+)", loop.attributes))
    condition, turn = computations[names["condition"]], computations[names["body"]]
    test = next(instruction for instruction in condition.values() if instruction.root)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = condition[test.operands[0]], _constant_value(condition[test.operands[1]], condition)
    index = re.match(r", index=(\d+)", counter.attributes)
    if bound is None or not index:
        return None
    given = body[loop.operands[0]]
    start = _constant_value(body[given.operands[int(index[1])]], body) if given.opcode == "tuple" else None
    turned = next(instruction for instruction in turn.values() if instruction.root)
    following = _uncopied(turn[turned.operands[int(index[1])]], turn)
    steps = [_constant_value(turn[name], turn) for name in following.operands] if following.opcode == "add" else []
    step = next((step for step in steps if step), None)
    return None if start is None or step is None else -(-(bound - start) // step)


def _uncopied(instruction: Instruction, body: Computation) -> Instruction:
    while instruction.opcode == "copy":
        instruction = body[instruction.operands[0]]
    return instruction


def _constant_value(instruction: Instruction, body: Computation) -> int | None:
    instruction = _uncopied(instruction, body)
    value = re.match(r"\(?(-?\d+)\)?", instruction.text) if instruction.opcode == "constant" else None
    return int(value[1]) if value else None


def _flops(instruction: Instruction, body: Computation) -> int:
    if instruction.opcode == "convolution":
        return 2 * _convolution_products(instruction, body)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    if instruction.opcode == "custom-call":  # a library's product
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', instruction.attributes)
    elif instruction.opcode != "dot":
        contracted = None
    if contracted is None:
        return 0
    left = body[instruction.operands[0]].arrays[0].shape
    return (
        2 * math.prod(instruction.arrays[0].shape) * math.prod(left[int(i)] for i in re.findall(r"\d+", contracted[1]))
    )


def _convolution_products(instruction: Instruction, body: Computation) -> int:
    """Counts a convolution's multiplications outside of padding: on a TPU a batched product is one, mostly padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left, right = (body[name].arrays[0].shape for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", found[1])) if found else {}
    spatial = [label for label in labels[3] if label.isdigit()]

    def per_axis(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    total = out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for axis, (stride, pad, inner, outer) in enumerate(
        zip(per_axis("stride", "1"), per_axis("pad", "0_0"), per_axis("lhs_dilate", "1"), per_axis("rhs_dilate", "1"))
    ):
        label = str(axis)
        size_out, size_in = out[labels[3].index(label)], left[labels[1].index(label)]
        size_window, before = right[labels[2].index(label)], int(pad.split("_")[0])
        total *= sum(
            0 <= at < (size_in - 1) * int(inner) + 1 and at % int(inner) == 0
            for o in range(size_out)
            for w in range(size_window)
            for at in [o * int(stride) - before + w * int(outer)]
        )
    return total


def _collective(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _is_first_part(instruction: Instruction, counted: set[str]) -> bool:
    """Says whether it is the first instruction of an exchange, which the compiler may spread over several."""
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    if channel is None:
        return True
    fresh = channel[1] not in counted
    counted.add(channel[1])
    return fresh


def _exchanged_bytes(instruction: Instruction, body: Computation) -> int:
    given = sum(body[name].size for name in instruction.operands)
    if not instruction.opcode.startswith("all-gather"):
        return given
    return instruction.size - given if instruction.opcode.endswith("-start") else instruction.size


def _main_memory_bytes(instruction: Instruction) -> int:
    return sum(array.size for array in instruction.arrays if not array.in_fast_memory)


def _moved_bytes(instruction: Instruction, body: Computation, computations: dict[str, Computation]) -> int:
    """Counts bytes read and written in main memory; where only a slice is touched, those of the slice."""
    opcode = instruction.opcode
    if opcode in MOVES_NOTHING:
        return 0
    operands = [body[name] for name in instruction.operands if name in body]
    if opcode == "copy-start":
        return _main_memory_bytes(operands[0]) * (1 if instruction.arrays[0].in_fast_memory else 2)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main_memory_bytes(instruction)
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _main_memory_bytes(operands[1 if opcode == "dynamic-update-slice" else -1])
    if opcode != "fusion":
        return _main_memory_bytes(instruction) + sum(map(_main_memory_bytes, operands))
    inner = computations[instruction.calls()[0]]
    # What an exchange spread over several instructions only passes through is counted as exchanged.
    passing = {array for i in inner.values() if _collective(i) for array in (*i.arrays, *inner[i.operands[0]].arrays)}
    results = sum(array.size for array in instruction.arrays if not array.in_fast_memory and array not in passing)
    total = in_place = 0
    for parameter in inner.values():
        array = parameter.arrays[0] if parameter.opcode == "parameter" and parameter.arrays else None
        if array is not None and not array.in_fast_memory and array not in passing:
            touched, kept = _touched_bytes(parameter, inner, computations)
            total, in_place = total + touched, in_place + kept
    return total + max(results - in_place, 0)


def _is_view(instruction: Instruction, computations: dict[str, Computation]) -> bool:
    """Says whether it is a fusion within a fusion that only reorders an array's tiles: its users read no more than they
    would of the array itself."""
    if instruction.opcode != "fusion":
        return False
    return {inner.opcode for inner in computations[instruction.calls()[0]].values()} == {"parameter", "copy"}


def _touched_bytes(parameter: Instruction, inner: Computation, computations: dict[str, Computation]) -> tuple[int, int]:
    """Counts the bytes of a fusion's parameter that are read, and those that its result keeps in place."""
    names = {parameter.name}  # and the names of its other views
    touched = kept = 0
    for user in inner.values():
        at = [index for index, name in enumerate(user.operands) if name in names]
        if not at:
            continue
        if user.opcode == "bitcast" or _is_view(user, computations):
            names.add(user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and at == [0]:
            touched += user.size
        elif user.opcode in ("dynamic-update-slice", "scatter") and at == [0]:
            update = inner[user.operands[1 if user.opcode == "dynamic-update-slice" else -1]].size
            touched, kept = touched + update, kept + parameter.size - update
        elif user.opcode == "fusion":
            called = computations[user.calls()[0]]
            order = [i for i in called.values() if i.opcode == "parameter"]
            for index in at:
                position = next(i for i in order if i.text == f"({index})")
                more, stay = _touched_bytes(position, called, computations)
                touched, kept = touched + more, kept + stay
        else:
            return parameter.size, 0
    return touched, kept
