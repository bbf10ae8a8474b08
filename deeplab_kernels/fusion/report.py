"""What ``fuse`` says about every depthwise convolution of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .._text import table


@dataclass(frozen=True)
class Entry:
    """One depthwise convolution.

    name: of the convolution in the model; channels: (in, out); kernel, stride, rate: (vertical, horizontal).
    fused: the children of one parent that run as one operator, such as ("conv_dw", "bn1", "act"); empty if skipped.
    pointwise: those that join them in inference, where the whole block as one operator is faster
    (:func:`ops.atrous_separable_conv2d`), such as ("conv_pw", "bn2").
    activation: what the depthwise half of that operator ends with, "relu", "relu6" or None.
    scope: where it runs on a CPU.
    reason: why it was skipped, or why nothing more was fused with it; may be empty.
    """

    name: str
    channels: tuple[int, int]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    rate: tuple[int, ...]
    fused: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    activation: str | None = None
    scope: str = ""
    reason: str = ""

    def _row(self) -> list[str]:
        into, out = self.channels
        kernel, channels = "x".join(map(str, self.kernel)), str(into) if into == out else f"{into} -> {out}"
        shape = [self.name or "(the model)", kernel, channels, _axes(self.stride), _axes(self.rate)]
        if not self.fused:
            return [*shape, self.reason]
        return [
            *shape,
            " + ".join(self.fused),
            self.activation or "",
            " + ".join(self.pointwise),
            self.scope,
            self.reason,
        ]


def _axes(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


_SHAPE = ["name", "kernel", "channels", "stride", "rate"]


@dataclass(frozen=True)
class FusionReport:
    """Result of :func:`deeplab_kernels.fuse`; ``print`` shows it as tables."""

    fused: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = len(self.fused) + len(self.skipped)
        if not total:
            return "deeplab_kernels.fuse: the model has no depthwise convolution"
        lines = [f"deeplab_kernels.fuse: {len(self.fused)} of {total} depthwise convolutions fused"]
        if self.fused:
            head = [*_SHAPE, "one operator", "activation", "in inference with", "where on a CPU", "not further because"]
            lines += ["", *table([head, *(entry._row() for entry in self.fused)])]
        if self.skipped:
            lines += ["", "not fused", *table([[*_SHAPE, "because it"], *(entry._row() for entry in self.skipped)])]
        return "\n".join(lines)
