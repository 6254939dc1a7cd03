"""Triton kernels and their launchers, one module per op; installed as `titok_fast.kernels`."""
