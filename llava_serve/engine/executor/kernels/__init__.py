"""Kernels of decode steps in Triton, and their twins in plain torch. `selection` says which of the two runs.

Nothing here imports Triton until a kernel is selected on CUDA: only torch's CUDA build brings it.
"""
