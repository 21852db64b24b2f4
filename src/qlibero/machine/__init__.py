"""The machine a process runs on: cores and memory that are really ours, CUDA, and the environment of its processes."""
