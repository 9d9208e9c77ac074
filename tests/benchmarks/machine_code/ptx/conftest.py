from __future__ import annotations

import numpy as np
import pytest

from denim.benchmarks.machine_code.ptx.machine import Machine
from denim.benchmarks.machine_code.ptx.memory import Buffer
from denim.benchmarks.machine_code.ptx.parser import parse

MODULE = """
.version 8.8
.target sm_90a
.address_size 64
{variables}
.visible .entry handwritten(
	.param .u64 .ptr .global .align 1 handwritten_param_0,
	.param .u64 .ptr .global .align 1 handwritten_param_1,
	.param .u32 handwritten_param_2
)
.reqntid {threads}
{{
	.reg .pred 	%p<16>;
	.reg .b16 	%rs<16>;
	.reg .b32 	%r<64>;
	.reg .b64 	%rd<16>;
	.loc	1 7 0
	ld.param.b64 	%rd1, [handwritten_param_0];
	ld.param.b64 	%rd2, [handwritten_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
{body}
	ret;
}}
	.file	1 "/somewhere/source.py"
"""


@pytest.fixture
def execute():
    """execute(body, ...): a kernel written by hand, on buffers x = 0, 1, 2, ... and y = 0 of 32-bit words; gives y.

    The body finds the thread in %r1, the addresses of the buffers in %rd1 and %rd2, and those of the thread's own word
    in %rd4 and %rd5.
    """

    def run(body, *, words=256, threads=64, grid=(1,), shared=0, programs=None, parameter=0, variables="", **options):
        x, y = np.arange(words, dtype=np.uint32), np.zeros(words, np.uint32)
        kernel = parse(MODULE.format(body=body, threads=threads, variables=variables))
        parameters = [*(a.ctypes.data.to_bytes(8, "little") for a in (x, y)), parameter.to_bytes(4, "little")]
        buffers = [Buffer(a.ctypes.data, a.nbytes, name) for a, name in ((x, "x"), (y, "y"))]
        machine = Machine(kernel, grid, parameters, buffers, shared, **options)
        machine.run(programs)
        run.machine = machine
        return y

    return run
