"""The attention as Triton kernels, for NVIDIA GPUs; triton itself is imported only when a kernel is wanted.

Tensors keep the package's layout [B, T, H, D]. Inside, Z is batch rows times key heads and G the query heads of each;
scores, maxima and log-sum-exp of the kernels are powers of two.
"""
