"""The original's evaluation: its question files in, its answer files out, and the scores of five benchmarks.

Only `protocol` loads a model; the rest imports no torch.
"""
