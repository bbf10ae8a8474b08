"""Theoretical occupancy: the share of a multiprocessor's warps that a kernel's registers, shared memory and threads
leave room for (CUDA C++ Programming Guide, table of technical specifications per compute capability)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 1 << 16


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10),
    90: Multiprocessor(64, 32, 228 << 10),
    100: Multiprocessor(64, 32, 228 << 10),
    120: Multiprocessor(48, 24, 100 << 10),
}
# Granularity of what is given out; every block also takes some shared memory for the system.
_REGISTERS_OF_A_WARP, _SHARED_BYTES, _RESERVED_BYTES = 256, 128, 1 << 10


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def occupancy(arch: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Per cent of the warps of ``sm_<arch>``; ``warps`` and ``shared_bytes`` of a block, ``registers`` of a thread."""
    sm = MULTIPROCESSORS[arch]
    by_registers = sm.registers // _padded(max(registers, 1) * 32, _REGISTERS_OF_A_WARP) // warps
    by_shared = sm.shared_bytes // _padded(shared_bytes + _RESERVED_BYTES, _SHARED_BYTES)
    return 100 * warps * min(sm.blocks, sm.warps // warps, by_registers, by_shared) // sm.warps
