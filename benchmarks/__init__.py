"""What counts, compares and times: baselines, benchmarks, machine code, and the GPU check."""
