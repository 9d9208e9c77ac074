"""Compiled Triton kernels executed on a CPU: a machine for PTX, its instruction set, and its traps.

`parser` reads the text that Triton's compiler writes, `instructions` says what each instruction form computes (with the
floating-point arithmetic in `arithmetic`), `memory` holds the memories and checks every access, `machine` executes all
threads of many programs at once in numpy, and `launch` makes Triton's own launches run there.

What the machine does not show: what ptxas makes of the PTX, the exact bits of the approximate functions, the driver,
streams, and speed.
"""
