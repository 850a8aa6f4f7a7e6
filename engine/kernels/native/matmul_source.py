"""LLVM text of a product with packed weights: `x_TD @ weight_FD.T`.

Weights lie as `PackedWeight` says: panels of as many outputs as fill the accumulators of a row,
and in a panel, for each word's inputs, a word per output. A chunk of work is one panel. Rows go
through it some at a time, with one accumulator per row and vector of outputs, so that memory is
read once, front to back, for up to that many rows. Of many rows a chunk takes a block, which stays
in a core's cache from panel to panel. Each sum is taken in the order of the inputs
whatever the number of rows: a row's result does not depend on the rows beside it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import llvmlite.binding as llvm

from engine.kernels.native.xla_handler import load_buffer

Output = Literal["float32", "bfloat16", "int32"]
"""What a product gives: int32 of int8 operands, the others of bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """What a kernel is cut to.

    Attributes:
        lanes: 32-bit numbers in a vector register.
        panel_vectors: Registers that hold one row's sums over a panel.
        panel_rows: Rows that go through a panel together.
        has_bfloat16_dot: Whether pairs of bfloat16 are multiplied as they are (AVX512-BF16); else
            they are widened to float32 first, which two shifts do.
        has_int8_dot: Whether there is an instruction for fours of 8 bits (AVX512-VNNI).
    """

    lanes: int
    panel_vectors: int
    panel_rows: int
    has_bfloat16_dot: bool
    has_int8_dot: bool = False

    @property
    def panel_outputs(self) -> int:
        return self.lanes * self.panel_vectors


# Accumulators, a panel's vectors (twice where they are widened) and a row's pair stay in 32 or 16
# registers.
AVX512_BFLOAT16 = InstructionSet(lanes=16, panel_vectors=4, panel_rows=6, has_bfloat16_dot=True)
AVX512 = InstructionSet(lanes=16, panel_vectors=4, panel_rows=5, has_bfloat16_dot=False)
AVX2 = InstructionSet(lanes=8, panel_vectors=2, panel_rows=4, has_bfloat16_dot=False)


# Times the rows that go through a panel together.
_BLOCK_TILES = 20

_SIZES: dict[Output, int] = {"float32": 4, "bfloat16": 2, "int32": 4}
# LLVM's type of a stored element, and its name in that of a function.
_STORED: dict[Output, tuple[str, str]] = {
    "float32": ("float", "f32"),
    "bfloat16": ("i16", "i16"),
    "int32": ("i32", "i32"),
}


def host_instruction_set() -> InstructionSet | None:
    """The best for this machine; None where there is no kernel for it."""
    if not llvm.get_process_triple().startswith("x86_64"):
        return None
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512bw"):
        isa = AVX512_BFLOAT16 if features.get("avx512bf16") else AVX512
        return replace(isa, has_int8_dot=bool(features.get("avx512vnni")))
    if features.get("avx2") and features.get("fma"):
        return AVX2
    return None


def matmul_source(isa: InstructionSet, output: Output) -> str:
    """Text of @count and @chunk over the buffers x [T, D], weight words, layer and result [T, F].

    The words are [L, panels, words, panel outputs] of 32 bits, layer is an int32 scalar. For int32
    x is signed and weights are not, as the instruction has it.
    """
    kernels = "".join(_rows_text(isa, output, rows) for rows in range(1, isa.panel_rows + 1))
    return _declarations(isa) + kernels + _chunk_text(isa, output)


def _declarations(isa: InstructionSet) -> str:
    floats, pairs = f"<{isa.lanes} x float>", f"<{2 * isa.lanes} x bfloat>"
    if isa.has_bfloat16_dot:
        product = f"@llvm.x86.avx512bf16.dpbf16ps.{32 * isa.lanes}({floats}, {pairs}, {pairs})"
    else:
        product = f"@llvm.fma.v{isa.lanes}f32({floats}, {floats}, {floats})"
    words, masks = f"<{isa.lanes} x i32>", f"<{isa.lanes} x i1>"
    return f"""
declare {floats} {product}
declare {words} @llvm.x86.avx512.vpdpbusd.512({words}, {words}, {words})
declare void @llvm.masked.store.v{isa.lanes}i32.p0({words}, ptr, i32, {masks})
declare void @llvm.masked.store.v{isa.lanes}f32.p0({floats}, ptr, i32, {masks})
declare void @llvm.masked.store.v{isa.lanes}i16.p0(<{isa.lanes} x i16>, ptr, i32, {masks})
"""


def _rows_text(isa: InstructionSet, output: Output, num_rows: int) -> str:
    """Text of @rowsN: N rows through one panel.

    Takes the first row and the bytes to the next, the panel and its number of words, the result
    and the bytes to its next row, and how many of the panel's outputs the result has room for.
    """
    rows, vectors = range(num_rows), range(isa.panel_vectors)
    lanes, words = isa.lanes, f"<{isa.lanes} x i32>"
    sums = words if output == "int32" else f"<{isa.lanes} x float>"
    lines = [
        f"define internal void @rows{num_rows}(ptr noalias readonly %x0, i64 %x_stride, "
        "ptr noalias readonly %panel, i64 %words, ptr noalias %y0, i64 %y_stride, i64 %outputs) {",
        "entry:",
    ]
    for row in rows[1:]:
        for name in "xy":
            before = f"%{name}{row - 1}, i64 %{name}_stride"
            lines.append(f"  %{name}{row} = getelementptr i8, ptr {before}")
    lines += ["  br label %word", "word:", "  %k = phi i64 [0, %entry], [%k.next, %word]"]
    for row in rows:
        for vector in vectors:
            lines.append(
                f"  %sum{row}.{vector} = phi {sums} [zeroinitializer, %entry], "
                f"[%next{row}.{vector}, %word]"
            )
    lines += [
        f"  %row = mul i64 %k, {4 * isa.panel_outputs}",
        "  %row.at = getelementptr i8, ptr %panel, i64 %row",
        "  %x.offset = mul i64 %k, 4",
    ]
    for vector in vectors:
        lines += [
            f"  %w{vector}.at = getelementptr i8, ptr %row.at, i64 {4 * lanes * vector}",
            f"  %w{vector} = load {words}, ptr %w{vector}.at, align 4",
            *_operand(isa, output, f"w{vector}"),
        ]
    for row in rows:
        lines += [
            f"  %x{row}.at = getelementptr i8, ptr %x{row}, i64 %x.offset",
            f"  %x{row}.word = load i32, ptr %x{row}.at, align 2",
            f"  %x{row}.first = insertelement {words} poison, i32 %x{row}.word, i32 0",
            f"  %x{row}.all = shufflevector {words} %x{row}.first, {words} poison, "
            f"{words} zeroinitializer",
            *_operand(isa, output, f"x{row}.all"),
        ]
        for vector in vectors:
            at = f"{row}.{vector}"
            lines += _multiply(isa, output, at, f"x{row}.all", f"w{vector}")
    lines += [
        "  %k.next = add i64 %k, 1",
        "  %is_more = icmp slt i64 %k.next, %words",
        "  br i1 %is_more, label %word, label %round",
        "round:",
    ]
    element, suffix = _STORED[output]
    size = _SIZES[output]
    for row in rows:
        for vector in vectors:
            lines += _rounded(isa, output, f"{row}.{vector}")
            offset = f"i64 {size * lanes * vector}"
            lines.append(f"  %y{row}.{vector} = getelementptr i8, ptr %y{row}, {offset}")
    lines += [
        f"  %is_whole = icmp sge i64 %outputs, {isa.panel_outputs}",
        "  br i1 %is_whole, label %whole, label %part",
        "whole:",
    ]
    results = [f"{row}.{vector}" for row in rows for vector in vectors]
    kind = f"<{lanes} x {element}>"
    lines += [f"  store {kind} %out{at}, ptr %y{at}, align 2" for at in results]
    lines += ["  ret void", "part:", "  %outputs.32 = trunc i64 %outputs to i32"]
    lines += [
        f"  %limit.first = insertelement {words} poison, i32 %outputs.32, i32 0",
        f"  %limit = shufflevector {words} %limit.first, {words} poison, {words} zeroinitializer",
    ]
    for vector in vectors:
        numbers = ", ".join(f"i32 {lanes * vector + lane}" for lane in range(lanes))
        lines.append(f"  %mask{vector} = icmp slt {words} <{numbers}>, %limit")
    for at in results:
        mask = f"<{lanes} x i1> %mask{at.split('.')[1]}"
        call = f"call void @llvm.masked.store.v{lanes}{suffix}.p0"
        lines.append(f"  {call}({kind} %out{at}, ptr %y{at}, i32 2, {mask})")
    lines += ["  ret void", "}", ""]
    return "\n".join(lines)


def _operand(isa: InstructionSet, output: Output, name: str) -> list[str]:
    """Make of %name, a vector of words, what `_multiply` takes."""
    words = f"<{isa.lanes} x i32>"
    if output == "int32":
        return []
    if isa.has_bfloat16_dot:
        return [f"  %{name}.pairs = bitcast {words} %{name} to <{2 * isa.lanes} x bfloat>"]
    floats, numbers = f"<{isa.lanes} x float>", range(isa.lanes)
    shift = ", ".join("i32 16" for _ in numbers)
    high = ", ".join("i32 -65536" for _ in numbers)
    return [
        f"  %{name}.even.bits = shl {words} %{name}, <{shift}>",
        f"  %{name}.even = bitcast {words} %{name}.even.bits to {floats}",
        f"  %{name}.odd.bits = and {words} %{name}, <{high}>",
        f"  %{name}.odd = bitcast {words} %{name}.odd.bits to {floats}",
    ]


def _multiply(isa: InstructionSet, output: Output, at: str, x: str, weight: str) -> list[str]:
    """%next... = %sum... + the products of the words' inputs."""
    floats, words = f"<{isa.lanes} x float>", f"<{isa.lanes} x i32>"
    if output == "int32":
        return [
            f"  %next{at} = call {words} @llvm.x86.avx512.vpdpbusd.512"
            f"({words} %sum{at}, {words} %{weight}, {words} %{x})"
        ]
    if isa.has_bfloat16_dot:
        pairs = f"<{2 * isa.lanes} x bfloat>"
        return [
            f"  %next{at} = call {floats} @llvm.x86.avx512bf16.dpbf16ps.{32 * isa.lanes}"
            f"({floats} %sum{at}, {pairs} %{x}.pairs, {pairs} %{weight}.pairs)"
        ]
    fma = f"call {floats} @llvm.fma.v{isa.lanes}f32"
    return [
        f"  %half{at} = {fma}({floats} %{x}.even, {floats} %{weight}.even, {floats} %sum{at})",
        f"  %next{at} = {fma}({floats} %{x}.odd, {floats} %{weight}.odd, {floats} %half{at})",
    ]


def _rounded(isa: InstructionSet, output: Output, at: str) -> list[str]:
    """%out... = %next..., rounded to the nearest bfloat16, ties to even, where that is wanted."""
    if output == "int32":
        return [f"  %out{at} = or <{isa.lanes} x i32> %next{at}, zeroinitializer"]
    lanes, floats, words = isa.lanes, f"<{isa.lanes} x float>", f"<{isa.lanes} x i32>"
    halves = f"<{lanes} x i16>"
    if output == "float32":
        return [f"  %out{at} = fadd {floats} %next{at}, {_splat('float -0.0', lanes)}"]
    if isa.has_bfloat16_dot:
        return [
            f"  %out{at}.rounded = fptrunc {floats} %next{at} to <{lanes} x bfloat>",
            f"  %out{at} = bitcast <{lanes} x bfloat> %out{at}.rounded to {halves}",
        ]
    return [
        f"  %out{at}.bits = bitcast {floats} %next{at} to {words}",
        f"  %out{at}.high = lshr {words} %out{at}.bits, {_splat('i32 16', lanes)}",
        f"  %out{at}.odd = and {words} %out{at}.high, {_splat('i32 1', lanes)}",
        f"  %out{at}.up = add {words} %out{at}.odd, {_splat('i32 32767', lanes)}",
        f"  %out{at}.sum = add {words} %out{at}.bits, %out{at}.up",
        f"  %out{at}.shifted = lshr {words} %out{at}.sum, {_splat('i32 16', lanes)}",
        f"  %out{at}.is_nan = fcmp uno {floats} %next{at}, zeroinitializer",
        f"  %out{at}.kept = select <{lanes} x i1> %out{at}.is_nan, "
        f"{words} {_splat('i32 32704', lanes)}, {words} %out{at}.shifted",
        f"  %out{at} = trunc {words} %out{at}.kept to {halves}",
    ]


def _splat(value: str, lanes: int) -> str:
    return "<" + ", ".join([value] * lanes) + ">"


def _chunk_text(isa: InstructionSet, output: Output) -> str:
    size, x_size = _SIZES[output], 1 if output == "int32" else 2
    most = isa.panel_rows
    block = most * _BLOCK_TILES
    cases = " ".join(f"i64 {rows}, label %last{rows}" for rows in range(1, most))
    last = "".join(
        f"""
last{rows}:
  call void @rows{rows}(ptr %x.last, i64 %x.stride, ptr %panel, i64 %words.2, ptr %y.last,
    i64 %y.stride, i64 %outputs)
  ret void"""
        for rows in range(1, most)
    )
    return f"""
define internal i64 @count(ptr %buffers) {{
{load_buffer("x", 0, 1)}
{load_buffer("words", 1, 2)}
  %up = add i64 %x.0, {block - 1}
  %blocks = udiv i64 %up, {block}
  %chunks = mul i64 %blocks, %words.1
  ret i64 %chunks
}}

define internal void @chunk(ptr %buffers, i64 %index) {{
entry:
{load_buffer("x", 0, 2)}
{load_buffer("words", 1, 3)}
{load_buffer("layer", 2, 0)}
{load_buffer("y", 3, 2)}
  %layer.32 = load i32, ptr %layer
  %layer.64 = sext i32 %layer.32 to i64
  %layer.first = mul i64 %layer.64, %words.1
  %block = udiv i64 %index, %words.1
  %panel.index = urem i64 %index, %words.1
  %panel.number = add i64 %layer.first, %panel.index
  %panel.bytes = mul i64 %words.2, {4 * isa.panel_outputs}
  %panel.offset = mul i64 %panel.number, %panel.bytes
  %panel = getelementptr i8, ptr %words, i64 %panel.offset
  %x.stride = mul i64 %x.1, {x_size}
  %y.stride = mul i64 %y.1, {size}
  %first = mul i64 %panel.index, {isa.panel_outputs}
  %outputs = sub i64 %y.1, %first
  %y.offset = mul i64 %first, {size}
  %y.panel = getelementptr i8, ptr %y, i64 %y.offset
  %start = mul i64 %block, {block}
  %stop.block = add i64 %start, {block}
  %stop = call i64 @llvm.smin.i64(i64 %stop.block, i64 %x.0)
  %rest.from = sub i64 %stop, %start
  %rest = urem i64 %rest.from, {most}
  %whole = sub i64 %stop, %rest
  br label %rows
rows:
  %row = phi i64 [%start, %entry], [%row.next, %some]
  %is_more = icmp slt i64 %row, %whole
  %x.row = mul i64 %row, %x.stride
  %x.last = getelementptr i8, ptr %x, i64 %x.row
  %y.row = mul i64 %row, %y.stride
  %y.last = getelementptr i8, ptr %y.panel, i64 %y.row
  br i1 %is_more, label %some, label %last
some:
  call void @rows{most}(ptr %x.last, i64 %x.stride, ptr %panel, i64 %words.2, ptr %y.last,
    i64 %y.stride, i64 %outputs)
  %row.next = add i64 %row, {most}
  br label %rows
last:
  switch i64 %rest, label %end [ {cases} ]
{last}
end:
  ret void
}}
"""
