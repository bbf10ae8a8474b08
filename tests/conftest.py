"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN, so that an output element that a kernel forgets to write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pydensecrf() -> ModuleType:
    return pytest.importorskip(
        "pydensecrf.densecrf",
        reason="pydensecrf is not installed (requirements/peers.txt); its recorded outputs are used",
    )


@pytest.fixture
def two_densecrf_threads() -> Iterator[None]:
    """deeplab_kernels.densecrf has a thread pool of its own."""
    densecrf = pytest.importorskip("deeplab_kernels.densecrf")
    before = densecrf.get_num_threads()
    densecrf.set_num_threads(2)
    yield
    densecrf.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("DEEPLAB_KERNELS_TEST_BIG") != "1":
        skip = pytest.mark.skip(reason="needs several GB of memory: set DEEPLAB_KERNELS_TEST_BIG=1")
        for item in items:
            if item.get_closest_marker("big"):
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "big: needs several GB of memory; runs only with DEEPLAB_KERNELS_TEST_BIG=1")
