"""Triton kernels, one file per operator family with the file names of ops/."""
