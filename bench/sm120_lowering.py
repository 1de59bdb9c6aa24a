"""SM120 lowering on a Hopper card: Triton's sm_120 pipeline, assembled for the card that is there. Tests only.

`install()` before Triton compiles anything. Kernels that need what Hopper lacks, or more shared memory than SM120 has,
are refused instead of run.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

SHARED_LIMIT = 101_376
NO_FUSED_ALL_REDUCE = "--enforce-disable-flashinfer-allreduce-fusion"
"""SGLang has FlashInfer's on a Hopper card at TP 2 and more, and none on SM12x."""
SERVER_FLAGS = ("--moe-runner-backend", "triton", "--disable-prefill-cuda-graph", NO_FUSED_ALL_REDUCE)
"""Of a server with the step on a Hopper card: plain experts for the step to take over, of the target and its draft, and
no graphs of SGLang's prefill."""
DRAFTER_FLAGS = ("--fp8-gemm-backend", "triton")
"""Beside them with DSpark: SGLang's own FP8 products of the drafter are Triton's, not DeepGEMM's."""
SERVER_ENVIRONMENT = {
    "SGLANG_SM120_FORCE": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0", "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0",
    "SGLANG_OPT_DEEPGEMM_HC_PRENORM": "0", "SGLANG_OPT_FP8_WO_A_GEMM": "0",
}  # fmt: skip
"""Beside them; the step calls none of the shapes that DeepGEMM would compile for minutes."""
PREFERRED_CARVEOUT, CARVEOUT_PERCENT = 9, 100 * 100 // 228
"""The driver's name of the attribute; SM120's 100 KiB an SM of Hopper's 228."""
HOPPER_LACKS = re.compile(
    r"kind::\w+|tcgen05|\.e2m1x2|\.ue8m0x2|ldmatrix\S*\.b8|\.tile::gather4|ld\.global\S*\.v8|\.f32x2"
    r"|(?:max|min)(?:\.\w+)*\.f32\s+[^,;]+,[^,;]+,[^,;]+,"
)
SM120_LACKS = re.compile(r"\bwgmma")
PACKED = re.compile(r"^[ \t]*(add|sub|mul|fma)((?:\.\w+)*)\.f32x2\s+([^;]+);", re.MULTILINE)
OF_THREE = re.compile(
    r"^[ \t]*((?:max|min)(?:\.ftz|\.NaN)*\.f32)\s+" + r",".join([r"([^,;]+)"] * 4) + ";", re.MULTILINE
)
"""What SM120 does in one instruction and Hopper, with the same results, in two: arithmetic on two floats in a register,
and the larger or smaller of three. SGLang's kernels of DSpark have both."""


class LoweringError(RuntimeError):
    """A kernel that real SM120 hardware could not run, or that only it could."""


def retarget(ptx: str, shared: int) -> str:
    """PTX of the sm_120a pipeline as PTX for sm_90a, with `PACKED` and `OF_THREE` in two instructions.

    Raises:
        LoweringError: it has an instruction one of the two lacks, or more than SM120's shared memory.
    """
    ptx = OF_THREE.sub(_of_two, PACKED.sub(_apart, ptx))
    if found := SM120_LACKS.search(ptx):
        raise LoweringError(f"{found[0]} is not an SM120 instruction: TRITON_OVERRIDE_ARCH=sm120 did not take effect.")
    if found := HOPPER_LACKS.search(ptx):
        raise LoweringError(f"{found[0]} runs on SM120 only and cannot be emulated on this card.")
    if shared > SHARED_LIMIT:
        raise LoweringError(f"The kernel uses {shared} B of shared memory and SM120 has {SHARED_LIMIT} B a block.")
    return re.sub(r"\.target sm_120[af]?", ".target sm_90a", ptx)


def _apart(found: re.Match[str]) -> str:
    name, rounding, operands = found.groups()
    out, *sources = (operand.strip() for operand in operands.split(","))
    lines = [f".reg .f32 %low<{len(sources)}>, %high<{len(sources)}>;"]
    lines += [f"mov.b64 {{%low{at}, %high{at}}}, {source};" for at, source in enumerate(sources)]
    for half in ("%low", "%high"):
        lines.append(f"{name}{rounding}.f32 {half}0, {', '.join(f'{half}{at}' for at in range(len(sources)))};")
    return "\n".join(("{", *lines, f"mov.b64 {out}, {{%low0, %high0}};", "}"))


def _of_two(found: re.Match[str]) -> str:
    name, out, *sources = (part.strip() for part in found.groups())
    a, b, c = sources
    return "\n".join(("{", ".reg .f32 %first;", f"{name} %first, {a}, {b};", f"{name} {out}, %first, {c};", "}"))


def install(cache: str = ".triton-sm120-on-hopper") -> None:
    """Compile every later kernel of this process, and of the ones it starts with this call, through `retarget`."""
    os.environ["TRITON_OVERRIDE_ARCH"] = "sm120"
    # The normal cache holds other code under the same keys.
    os.environ["TRITON_CACHE_DIR"] = os.path.abspath(cache)
    from triton.backends.nvidia.compiler import CUDABackend

    make_cubin = CUDABackend.make_cubin

    def through_retarget(self: Any, src: str, metadata: dict[str, Any], options: Any, capability: int) -> bytes:
        return make_cubin(self, retarget(src, metadata["shared"]), metadata, options, 90)

    CUDABackend.make_cubin = through_retarget


def limit_shared_memory() -> None:
    """Have every Triton kernel that this process loads from now on run with SM120's shared memory per SM.

    Fewer blocks then share one, as on SM120. The driver takes it as a wish.
    """
    from triton import knobs

    driver = ctypes.CDLL("libcuda.so.1")

    def limit(_module: Any, function: int, *_: Any) -> None:
        if error := driver.cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_CARVEOUT, CARVEOUT_PERCENT):
            raise LoweringError(f"The driver refused a carveout of {CARVEOUT_PERCENT} % with error {error}.")

    knobs.runtime.kernel_load_end_hook = limit
