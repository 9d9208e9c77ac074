"""The kernels built for GPUs that are not here, and what their machine code consists of."""
