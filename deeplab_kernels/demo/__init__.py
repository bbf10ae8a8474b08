"""What ``python -m deeplab_kernels demo`` does: train, segment, compare, and write a report."""
