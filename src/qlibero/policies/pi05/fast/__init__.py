"""pi0.5 made fast: CUDA graphs, fused Triton kernels, compiled CPU code. Each has a plain torch counterpart."""
