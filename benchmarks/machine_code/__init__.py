"""What compiled kernels are made of, and what they do: builds without a GPU, counts, budgets, execution on a CPU."""

from denim.benchmarks.machine_code.ptx.launch import run_on_cpu

__all__ = ["run_on_cpu"]
