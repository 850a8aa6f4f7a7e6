"""LLVM text of a product with packed weights: `x_TD @ weight_FD.T`, or that of each expert's rows.

Weights lie as `PackedWeight` says: panels of as many outputs as fill the accumulators of a row,
and in a panel, for each word's inputs, a word per output. A chunk of work is one panel. Rows go
through it some at a time, with one accumulator per row and vector of outputs, so that memory is
read once, front to back, for up to that many rows. Of many rows a chunk takes a block, which stays
in a core's cache from panel to panel. Each sum is taken in the order of the inputs whatever the
number of rows: a row's result does not depend on the rows beside it.
"""

from typing import Literal

from engine.kernels.native.arithmetic import (
    InstructionSet,
    Sums,
    add_products,
    declarations,
    operand,
    to_bfloat16,
)
from engine.kernels.native.llvm_text import Function, Value, vector
from engine.kernels.native.xla_handler import load_buffer

Output = Literal["float32", "bfloat16", "int32"]
"""What a product gives: int32 of int8 operands, the others of bfloat16."""

_SIZES: dict[Output, int] = {"float32": 4, "bfloat16": 2, "int32": 4}
# LLVM's type of a stored element, and its name in that of a function.
_STORED: dict[Output, tuple[str, str]] = {
    "float32": ("float", "f32"),
    "bfloat16": ("i16", "i16"),
    "int32": ("i32", "i32"),
}
# Rows in a block, as a multiple of those that go through a panel together.
_BLOCK_TILES = 20


def matmul_source(isa: InstructionSet, output: Output) -> str:
    """Text of @count and @chunk over the buffers x [T, D], weight words, layer and result [T, F].

    The words are [L, panels, words, panel outputs] of 32 bits, layer is an int32 scalar. For int32
    x is signed and weights are not, as the instruction has it.
    """
    return declarations(isa) + _kernels(isa, output) + _chunks(isa, output)


def grouped_matmul_source(isa: InstructionSet, output: Output) -> str:
    """As `matmul_source`, with rows of x that belong to experts, in their order.

    Before the result stands a buffer int32 [E + 1]: where each expert's rows begin, and where the
    last one's end. The words are [L * E, ...]. Rows behind the last expert's are not written, and
    the weights of an expert without rows are not read.
    """
    return declarations(isa) + _kernels(isa, output) + _grouped_chunks(isa, output)


def _kernels(isa: InstructionSet, output: Output) -> str:
    return "".join(_rows(isa, output, rows) for rows in range(1, isa.panel_rows + 1))


def _rows(isa: InstructionSet, output: Output, num_rows: int) -> str:
    """@rowsN: N rows through one panel.

    Takes the first row and the bytes to the next, the panel and its number of words, the result
    and the bytes to its next row, and how many of the panel's outputs the result has room for.
    """
    f = Function(
        f"void @rows{num_rows}(ptr noalias readonly %x, i64 %x_stride, "
        "ptr noalias readonly %panel, i64 %words, ptr noalias %y, i64 %y_stride, i64 %outputs)"
    )
    sums: Sums = "int32" if output == "int32" else "float32"
    kind = isa.words if output == "int32" else isa.floats
    vectors, rows = range(isa.panel_vectors), range(num_rows)
    x_rows, y_rows = ["%x"], ["%y"]
    for _ in rows[1:]:
        x_rows.append(f.at(x_rows[-1], "%x_stride"))
        y_rows.append(f.at(y_rows[-1], "%y_stride"))
    loop = f.loop(0, "%words", carried=[(kind, "zeroinitializer")] * (num_rows * len(vectors)))
    words = f.at("%panel", f.mul(loop.index, 4 * isa.panel_outputs))
    weights = [
        operand(f, isa, sums, f.load(isa.words, words, 4 * isa.lanes * number))
        for number in vectors
    ]
    offset = f.mul(loop.index, 4)
    totals = []
    for row in rows:
        word = f.load("i32", x_rows[row], offset, align=1)
        x = operand(f, isa, sums, f.broadcast("i32", word, isa.lanes))
        for number in vectors:
            before = loop.values[row * len(vectors) + number]
            totals.append(add_products(f, isa, sums, before, weights[number], x))
    results = loop.end(*totals)
    if output == "bfloat16":
        results = [to_bfloat16(f, isa, result) for result in results]
    _store_rows(f, isa, output, results, y_rows)
    return f.text()


def _store_rows(
    f: Function, isa: InstructionSet, output: Output, results: list[Value], y_rows: list[Value]
) -> None:
    """Store the rows' results: all of the panel's outputs, or the first %outputs of them."""
    lanes, size = isa.lanes, _SIZES[output]
    element, suffix = _STORED[output]
    kind, masks = vector(element, lanes), vector("i1", lanes)
    places = [(row, number) for row in y_rows for number in range(isa.panel_vectors)]
    whole, part = f.new_label(), f.new_label()
    f.branch_if(f.op(f"icmp sge i64 %outputs, {isa.panel_outputs}"), whole, part)
    f.start(whole)
    for (row, number), result in zip(places, results, strict=True):
        f.store(kind, result, row, size * lanes * number, align=2)
    f.do("ret void")
    f.start(part)
    limit = f.broadcast("i32", f.op("trunc i64 %outputs to i32"), lanes)
    exist = []
    for number in range(isa.panel_vectors):
        numbers = ", ".join(f"i32 {lanes * number + lane}" for lane in range(lanes))
        exist.append(f.op(f"icmp slt {isa.words} <{numbers}>, {limit}"))
    for (row, number), result in zip(places, results, strict=True):
        at = f.at(row, size * lanes * number)
        f.do(
            f"call void @llvm.masked.store.v{lanes}{suffix}.p0({kind} {result}, ptr {at}, i32 2, "
            f"{masks} {exist[number]})"
        )
    f.do("ret void")


def _chunks(isa: InstructionSet, output: Output) -> str:
    block = isa.panel_rows * _BLOCK_TILES
    count = Function("i64 @count(ptr %buffers)")
    count.do(load_buffer("x", 0, 1))
    count.do(load_buffer("words", 1, 2))
    blocks = count.div(count.add("%x.0", block - 1), block)
    count.do(f"ret i64 {count.mul(blocks, '%words.1')}")

    f = Function("void @chunk(ptr %buffers, i64 %index)")
    f.do(load_buffer("x", 0, 2))
    f.do(load_buffer("words", 1, 3))
    f.do(load_buffer("layer", 2, 0))
    f.do(load_buffer("y", 3, 2))
    layer = f.op(f"sext i32 {f.load('i32', '%layer')} to i64")
    first_row = f.mul(f.div("%index", "%words.1"), block)
    some_rows = f.smaller(f.sub("%x.0", first_row), block)
    _through_panel(f, isa, output, layer, first_row, some_rows)
    return count.text() + f.text()


def _grouped_chunks(isa: InstructionSet, output: Output) -> str:
    """A chunk is one panel of one expert, and all of its rows."""
    count = Function("i64 @count(ptr %buffers)")
    count.do(load_buffer("words", 1, 2))
    count.do(load_buffer("starts", 3, 1))
    count.do(f"ret i64 {count.mul(count.sub('%starts.0', 1), '%words.1')}")

    f = Function("void @chunk(ptr %buffers, i64 %index)")
    f.do(load_buffer("x", 0, 2))
    f.do(load_buffer("words", 1, 3))
    f.do(load_buffer("layer", 2, 0))
    f.do(load_buffer("starts", 3, 1))
    f.do(load_buffer("y", 4, 2))
    layer = f.op(f"sext i32 {f.load('i32', '%layer')} to i64")
    expert = f.div("%index", "%words.1")
    matrix = f.add(f.mul(layer, f.sub("%starts.0", 1)), expert)
    bounds = f.at("%starts", f.mul(expert, 4))
    first_row, stop = (
        f.op(f"sext i32 {f.load('i32', bounds, offset)} to i64") for offset in (0, 4)
    )
    _through_panel(f, isa, output, matrix, first_row, f.sub(stop, first_row))
    return count.text() + f.text()


def _through_panel(
    f: Function,
    isa: InstructionSet,
    output: Output,
    matrix: Value,
    first_row: Value,
    num_rows: Value,
) -> None:
    """Send some rows through the panel of a matrix that %index names, and return."""
    panel_number = f.rem("%index", "%words.1")
    place = f.add(f.mul(matrix, "%words.1"), panel_number)
    panel = f.at("%words", f.mul(place, f.mul("%words.2", 4 * isa.panel_outputs)))
    x_stride = f.mul("%x.1", 1 if output == "int32" else 2)
    y_stride = f.mul("%y.1", _SIZES[output])
    first_output = f.mul(panel_number, isa.panel_outputs)
    outputs = f.sub("%y.1", first_output)
    y_panel = f.at("%y", f.mul(first_output, _SIZES[output]))

    def call(rows: int, row: Value) -> None:
        x, y = f.at("%x", f.mul(row, x_stride)), f.at(y_panel, f.mul(row, y_stride))
        f.do(
            f"call void @rows{rows}(ptr {x}, i64 {x_stride}, ptr {panel}, i64 %words.2, "
            f"ptr {y}, i64 {y_stride}, i64 {outputs})"
        )

    f.for_groups(first_row, num_rows, isa.panel_rows, call)
    f.do("ret void")
