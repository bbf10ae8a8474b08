"""deeplab_kernels.densecrf under threads and in processes of its own; its thread pool (csrc/numpy/thread_pool.cpp) by
itself, under ThreadSanitizer and AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from _densecrf import model
from _processes import run_python

import deeplab_kernels.densecrf as dcrf

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("two_densecrf_threads")


# The pool.


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_thread_pool(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [str(ROOT / "tests" / "core" / "thread_pool.cpp"), str(ROOT / "csrc" / "numpy" / "thread_pool.cpp")]
    program = tmp_path / "thread_pool"
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True, timeout=120)
    # ThreadSanitizer does not follow a process with threads into its child.
    arguments = [] if sanitizer == "thread" else ["--fork"]
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# The package.


def test_results_do_not_depend_on_threads() -> None:
    results = []
    for threads in (1, 2, 3, 8):
        dcrf.set_num_threads(threads)
        assert dcrf.get_num_threads() == threads
        d = model((61, 67), 5)
        q = d.inference(4)
        results.append((q, d.klDivergence(q)))
    for q, divergence in results[1:]:
        np.testing.assert_array_equal(q, results[0][0])
        assert divergence == results[0][1]


def test_two_threads_infer_at_once() -> None:
    shared = model((61, 67), 5)
    expected = shared.inference(5)
    wrong: list[int] = []

    def work(number: int) -> None:
        for own in (model((61, 67), 5), shared):
            q, tmp1, tmp2 = own.startInference()
            for _ in range(5):
                own.stepInference(q, tmp1, tmp2)
            if not (np.array_equal(own.inference(5), expected) and np.allclose(q, expected, atol=1e-6)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_gil_is_released() -> None:
    d = model((127, 133), 9)
    done = threading.Event()

    def work() -> None:
        d.inference(40)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    ticks = 0
    while not done.is_set():
        ticks += 1
        time.sleep(0.001)
    thread.join()
    assert ticks > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes() -> None:
    # In a process without torch, whose threads warn about forks.
    code = (
        "import os, signal, numpy as np, deeplab_kernels.densecrf as dcrf\n"
        "import densecrf_cases as models\n"
        "dcrf.set_num_threads(3)\n"
        "case = models.cases()['31 x 33']\n"
        "expected = case(dcrf)['q']\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(50)\n"
        "    os._exit(0 if np.array_equal(case(dcrf)['q'], expected) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        "assert np.array_equal(case(dcrf)['q'], expected)\n"
    )
    run_python(code)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "import deeplab_kernels.densecrf as dcrf\n"
        "from deeplab_kernels.densecrf import eigen\n"
        "from deeplab_kernels.densecrf.utils import unary_from_softmax\n"
        "d = dcrf.DenseCRF2D(4, 3, 2); d.addPairwiseGaussian(3, 3); d.inference(2)\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code) == "False\n"


def test_number_of_threads_from_the_environment() -> None:
    code = "import deeplab_kernels.densecrf as dcrf; print(dcrf.get_num_threads())"
    assert run_python(code, DEEPLAB_KERNELS_NUM_THREADS="3") == "3\n"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert run_python(code, DEEPLAB_KERNELS_NUM_THREADS="") == f"{cores}\n"
    with pytest.raises(AssertionError, match="DEEPLAB_KERNELS_NUM_THREADS must be 1 to 1024, got 'many'"):
        run_python(code, DEEPLAB_KERNELS_NUM_THREADS="many")
