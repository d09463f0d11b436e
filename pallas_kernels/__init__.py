"""Kernels: arrays in, arrays out. One op a file; each names its reference, its checks and its targets."""
