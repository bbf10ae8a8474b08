"""Modules on top of the operators."""

__all__: list[str] = []
