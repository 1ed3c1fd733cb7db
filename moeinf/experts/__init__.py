"""Computing: the operator and its backends for the CPU and for CUDA."""
