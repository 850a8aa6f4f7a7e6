"""Which vector instructions a processor has, and the few operations that kernels are made of.

Numbers come in words of 32 bits: two of bfloat16, the first in the low half, or four of 8 bits.
"""

import struct
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import llvmlite.binding as llvm

from engine.kernels.native.llvm_text import Function, Value, splat, vector

Sums = Literal["float32", "int32"]
"""What products are summed to: float32 those of bfloat16, int32 those of 8 bits."""


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

    @property
    def floats(self) -> str:
        return vector("float", self.lanes)

    @property
    def words(self) -> str:
        return vector("i32", self.lanes)


# Sums, a panel's vectors (twice where they are widened) and a row's word stay in 32 or 16
# registers.
AVX512_BFLOAT16 = InstructionSet(lanes=16, panel_vectors=4, panel_rows=6, has_bfloat16_dot=True)
AVX512 = InstructionSet(lanes=16, panel_vectors=4, panel_rows=5, has_bfloat16_dot=False)
AVX2 = InstructionSet(lanes=8, panel_vectors=2, panel_rows=4, has_bfloat16_dot=False)


@cache
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


def declarations(isa: InstructionSet) -> str:
    """LLVM's own functions that kernels call."""
    floats, words, masks = isa.floats, isa.words, vector("i1", isa.lanes)
    pairs = vector("bfloat", 2 * isa.lanes)
    lanes = isa.lanes
    text = f"""
declare i64 @llvm.smax.i64(i64, i64)
declare {floats} @llvm.fma.v{lanes}f32({floats}, {floats}, {floats})
declare {floats} @llvm.roundeven.v{lanes}f32({floats})
declare {floats} @llvm.maxnum.v{lanes}f32({floats}, {floats})
declare float @llvm.maxnum.f32(float, float)
declare float @llvm.vector.reduce.fmax.v{lanes}f32({floats})
declare float @llvm.vector.reduce.fadd.v{lanes}f32(float, {floats})
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.masked.store.v{lanes}i32.p0({words}, ptr, i32, {masks})
declare void @llvm.masked.store.v{lanes}f32.p0({floats}, ptr, i32, {masks})
declare void @llvm.masked.store.v{lanes}i16.p0({vector("i16", lanes)}, ptr, i32, {masks})
"""
    if isa.has_bfloat16_dot:
        name = f"@llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
        text += f"declare {floats} {name}({floats}, {pairs}, {pairs})\n"
    if isa.has_int8_dot:
        name = f"@llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        text += f"declare {words} {name}({words}, {words}, {words})\n"
    return text


@dataclass(frozen=True, slots=True)
class Operand:
    """A vector of words as `add_products` takes it: as it is, or widened to float32."""

    parts: tuple[Value, ...]


def operand(f: Function, isa: InstructionSet, sums: Sums, words: Value) -> Operand:
    if sums == "int32":
        return Operand((words,))
    if isa.has_bfloat16_dot:
        return Operand((f.op(f"bitcast {isa.words} {words} to {vector('bfloat', 2 * isa.lanes)}"),))
    first = f.op(f"shl {isa.words} {words}, {splat('i32', 16, isa.lanes)}")
    second = f.op(f"and {isa.words} {words}, {splat('i32', -65536, isa.lanes)}")
    return Operand(
        tuple(f.op(f"bitcast {isa.words} {bits} to {isa.floats}") for bits in (first, second))
    )


def add_products(
    f: Function, isa: InstructionSet, sums: Sums, total: Value, weight: Operand, x: Operand
) -> Value:
    """total + the products of the words' numbers, lane by lane. Of 8 bits only x has signs."""
    if sums == "int32":
        name = f"@llvm.x86.avx512.vpdpbusd.{32 * isa.lanes}"
        return f.op(
            f"call {isa.words} {name}({isa.words} {total}, {isa.words} {weight.parts[0]}, "
            f"{isa.words} {x.parts[0]})"
        )
    if isa.has_bfloat16_dot:
        pairs = vector("bfloat", 2 * isa.lanes)
        name = f"@llvm.x86.avx512bf16.dpbf16ps.{32 * isa.lanes}"
        return f.op(
            f"call {isa.floats} {name}({isa.floats} {total}, {pairs} {x.parts[0]}, "
            f"{pairs} {weight.parts[0]})"
        )
    for left, right in zip(x.parts, weight.parts, strict=True):
        total = fma(f, isa, left, right, total)
    return total


def fma(f: Function, isa: InstructionSet, left: Value, right: Value, addend: Value) -> Value:
    kind = isa.floats
    return f.op(
        f"call {kind} @llvm.fma.v{isa.lanes}f32({kind} {left}, {kind} {right}, {kind} {addend})"
    )


def to_bfloat16(f: Function, isa: InstructionSet, values: Value) -> Value:
    """Round a vector of float32 to the nearest bfloat16, ties to even: its bits, i16."""
    lanes, floats, words = isa.lanes, isa.floats, isa.words
    halves = vector("i16", lanes)
    if isa.has_bfloat16_dot:
        rounded = f.op(f"fptrunc {floats} {values} to {vector('bfloat', lanes)}")
        return f.op(f"bitcast {vector('bfloat', lanes)} {rounded} to {halves}")
    bits = f.op(f"bitcast {floats} {values} to {words}")
    high = f.op(f"lshr {words} {bits}, {splat('i32', 16, lanes)}")
    odd = f.op(f"and {words} {high}, {splat('i32', 1, lanes)}")
    up = f.op(f"add {words} {odd}, {splat('i32', 32767, lanes)}")
    carried = f.op(f"add {words} {bits}, {up}")
    shifted = f.op(f"lshr {words} {carried}, {splat('i32', 16, lanes)}")
    is_nan = f.op(f"fcmp uno {floats} {values}, zeroinitializer")
    kept = f.op(
        f"select {vector('i1', lanes)} {is_nan}, {words} {splat('i32', 0x7FC0, lanes)}, "
        f"{words} {shifted}"
    )
    return f.op(f"trunc {words} {kept} to {halves}")


# 2^f = sum of (f ln 2)^n / n!; the eighth term is below float32's precision for |f| <= 1/2.
_EXP2_TERMS = (
    1.0,
    0.6931471805599453,
    0.2402265069591007,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.0001540353039338161,
    0.000015252733804059841,
)


def exp2(f: Function, isa: InstructionSet, x: Value) -> Value:
    """2^x, lane by lane, for x up to 0; what is below 2^-126 comes out as that."""
    lanes, floats, words = isa.lanes, isa.floats, isa.words
    lowest = splat("float", "-126.0", lanes)
    x = f.op(f"call {floats} @llvm.maxnum.v{lanes}f32({floats} {x}, {floats} {lowest})")
    whole = f.op(f"call {floats} @llvm.roundeven.v{lanes}f32({floats} {x})")
    part = f.op(f"fsub {floats} {x}, {whole}")
    result = _float_splat(_EXP2_TERMS[-1], lanes)
    for term in reversed(_EXP2_TERMS[:-1]):
        result = fma(f, isa, result, part, _float_splat(term, lanes))
    exponent = f.op(f"fptosi {floats} {whole} to {words}")
    shifted = f.op(f"shl {words} {exponent}, {splat('i32', 23, lanes)}")
    bits = f.op(f"bitcast {floats} {result} to {words}")
    return f.op(f"bitcast {words} {f.op(f'add {words} {bits}, {shifted}')} to {floats}")


def _float_splat(value: float, lanes: int) -> Value:
    return splat("float", float_constant(value), lanes)


def float_constant(value: float) -> Value:
    """A float32 as LLVM writes it: the bits of the same number as a double."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"
