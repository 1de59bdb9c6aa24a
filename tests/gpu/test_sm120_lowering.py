"""The lowering refuses what it cannot emulate."""

from __future__ import annotations

import ctypes
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import triton

import bench
from sglang_sm120.ops._linear_triton import _many_rows_tma
from sglang_sm120.parity import calls_of, triton_result
from sm120_lowering import SHARED_LIMIT, LoweringError, limit_shared_memory, retarget

PTX = ".version 8.7\n.target sm_120a\nmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {};\n"


@pytest.mark.needs_no_gpu
def test_target_is_replaced_and_the_rest_kept() -> None:
    assert retarget(PTX, SHARED_LIMIT) == PTX.replace("sm_120a", "sm_90a")


@pytest.mark.needs_no_gpu
@pytest.mark.parametrize(
    "instruction",
    ["wgmma.mma_async.sync", "mma.sync.kind::mxf8f6f4.m16n8k32", "cvt.rn.f16x2.e2m1x2", "tcgen05.mma", "@%p add.f32x2"],
)
def test_foreign_instructions_are_refused(instruction: str) -> None:
    with pytest.raises(LoweringError, match=r"SM120"):
        retarget(PTX + instruction + ";\n", 0)


PACKED = """
.version 8.7
.target sm_120a
.address_size 64
.visible .entry packed(.param .u64 at) {
	.reg .b64 %rd<5>;
	.reg .f32 %f<5>;
	ld.param.u64 %rd0, [at];
	ld.global.v2.b64 {%rd1, %rd2}, [%rd0];
	INSTRUCTION;
	st.global.b64 [%rd0], %rd3;
	st.global.f32 [%rd0], %f3;
	ret;
}
"""


@pytest.mark.needs_no_gpu
@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32x2 \t%rd3, %rd1, %rd2", ["add.f32 %low0, %low0, %low1;", "add.f32 %high0, %high0, %high1;"]),
        ("sub.rn.ftz.f32x2 %rd3, %rd1, %rd2", ["sub.rn.ftz.f32 %low0, %low0, %low1;"]),
        ("fma.rn.f32x2 %rd3, %rd1, %rd2, %rd1", ["fma.rn.f32 %high0, %high0, %high1, %high2;"]),
        ("max.NaN.f32 \t%f3, %f0, %f1, %f3", ["max.NaN.f32 %first, %f0, %f1;", "max.NaN.f32 %f3, %first, %f3;"]),
        ("min.f32 %f3, %f0, 0f00000000, %f2", ["min.f32 %first, %f0, 0f00000000;", "min.f32 %f3, %first, %f2;"]),
        ("max.f32 %f3, %f0, %f1", ["\tmax.f32 %f3, %f0, %f1;"]),
    ],
)
def test_what_hopper_does_in_two_instructions(instruction: str, expected: list[str], tmp_path: Path) -> None:
    """The assembler takes the result for the card; a register that is read last may be the one written."""
    found = retarget(PACKED.replace("INSTRUCTION", instruction), 0)
    assert all(line in found.splitlines() for line in expected)
    (tmp_path / "packed.ptx").write_text(found)
    assembler = triton.knobs.nvidia.ptxas_blackwell.path
    command = [assembler, "--gpu-name=sm_90a", "packed.ptx", "-o", "packed.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.needs_no_gpu
def test_too_much_shared_memory_is_refused() -> None:
    with pytest.raises(LoweringError, match=f"{SHARED_LIMIT + 1} B .* {SHARED_LIMIT} B"):
        retarget(PTX, SHARED_LIMIT + 1)


@pytest.mark.needs_no_gpu
def test_sm120_s_shared_memory_is_asked_of_a_hopper_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr("sys.argv", ["bench.py", "--shared-memory", "sm120"])
    assert bench.main() == 2
    assert "a card, needed a Hopper card" in capsys.readouterr().err


def test_an_sm_holds_what_one_of_sm120_would(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Two blocks of 64 KiB by their registers and Hopper's shared memory, one by SM120's."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("on this card there is nothing to emulate")
    call = next(calls_of("fp8_linear", 2, 64, 2048, seed))

    def blocks() -> int:
        # Loaded anew, and for this test alone.
        monkeypatch.setattr(_many_rows_tma, "device_caches", defaultdict(_many_rows_tma.create_binder))
        triton_result(call)
        (kernel,) = _many_rows_tma.device_caches[torch.cuda.current_device()][0].values()
        assert 65_536 <= kernel.metadata.shared <= SHARED_LIMIT
        count, shared = ctypes.c_int(), ctypes.c_size_t(kernel.metadata.shared)
        threads, function = 32 * kernel.metadata.num_warps, ctypes.c_void_p(kernel.function)
        driver = ctypes.CDLL("libcuda.so.1")
        assert not driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(count), function, threads, shared)
        return count.value

    monkeypatch.setattr(triton.knobs.runtime, "kernel_load_end_hook", None)
    assert blocks() == 2
    limit_shared_memory()
    assert blocks() == 1
