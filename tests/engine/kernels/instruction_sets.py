"""Which of the kernels' instruction sets can be tried on this machine."""

import llvmlite.binding as llvm

from engine.kernels.native.arithmetic import AVX2, AVX512, AVX512_BFLOAT16, InstructionSet


def is_available(isa: InstructionSet) -> bool:
    features = llvm.get_host_cpu_features()
    needed = {AVX512_BFLOAT16: "avx512bf16", AVX512: "avx512bw", AVX2: "fma"}
    return bool(features.get(needed[isa]))
