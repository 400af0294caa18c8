"""What samples of processes are taken for."""

import os
import threading
import time

import pytest

from benchmarks.processes import disk_bytes, peak_bytes, processor_seconds, schedule
from benchmarks.sampling import available, counted, kind_of, sampled
from benchmarks.sides.phases import Phases

SYMBOLS = [
    ("at::native::(anonymous namespace)::fused_adam_kernel (libtorch_cpu.so)", "optimizer"),
    ("at::native::AVX2::reduced_float_copy_kernel (libtorch_cpu.so)", "copying"),
    ("__memmove_avx512_unaligned_erms (libc.so.6)", "copying"),
    ("[unknown] (perf-21467.map)", "compute"),
    ("dnnl::impl::cpu::x64::matmul::compute_kernel (libtorch_cpu.so)", "compute"),
    ("at::native::(anonymous namespace)::GeluKernelImpl (libtorch_cpu.so)", "compute"),
    ("[unknown] (libgomp.so.1)", "waiting actively"),
    ("[unknown] (cygrpc.cpython-311-x86_64-linux-gnu.so)", "serialising"),
    ("_PyEval_EvalFrameDefault (libpython3.11.so.1.0)", "Python"),
    ("clear_page_erms ([kernel.kallsyms])", "memory"),
    ("ext4_file_write_iter ([kernel.kallsyms])", "disk"),
    ("tcp_sendmsg ([kernel.kallsyms])", "network"),
    ("finish_task_switch.isra.0 ([kernel.kallsyms])", "switching"),
    ("_int_malloc (libc.so.6)", "malloc"),
    ("something (nobody.knows)", "other"),
]


@pytest.mark.parametrize(("symbol", "kind"), SYMBOLS)
def test_kinds_of_samples(symbol: str, kind: str) -> None:
    assert kind_of(symbol) == kind


def test_lines_of_perf_are_counted_by_process() -> None:
    lines = """\
 21467/21467  ffffffff813a4413 finish_task_switch.isra.0 ([kernel.kallsyms])
 21467/21999      7fc391faee06 _PyObject_Free (/root/lib/libpython3.11.so.1.0)
 21467/21999      7fc391faee09 _PyObject_Free (/root/lib/libpython3.11.so.1.0)
 21284/21763      7f39cc1ec6fe at::native::(anonymous namespace)::fused_adam_kernel (/tmp/x/libtorch_cpu.so)
not a sample
"""
    found = counted(lines)
    assert found[21467] == {
        "_PyObject_Free (libpython3.11.so.1.0)": 2,
        "finish_task_switch.isra.0 ([kernel.kallsyms])": 1,
    }
    assert list(found[21284]) == ["at::native::(anonymous namespace)::fused_adam_kernel (libtorch_cpu.so)"]


@pytest.mark.skipif(not available(), reason="perf is not installed")
def test_a_process_that_computes_is_found_computing() -> None:
    done = threading.Event()
    spinning = threading.Thread(target=lambda: [None for _ in iter(done.is_set, True)])
    try:
        with sampled([os.getpid()]) as samples:
            spinning.start()
            end = time.monotonic() + 30.0
            began = time.process_time()
            while time.process_time() - began < 0.3 and time.monotonic() < end:
                pass
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        done.set()
        spinning.join()
    assert sum(samples.shares(os.getpid()).values()) == pytest.approx(1.0)
    assert "Python" in samples.shares(os.getpid())


def test_what_the_system_tells_of_a_process() -> None:
    assert processor_seconds(os.getpid()) > 0
    assert peak_bytes(os.getpid()) > 1 << 20
    assert disk_bytes(os.getpid()).read >= 0
    own = schedule().running
    assert schedule(os.getpid()).running >= own


def test_phases_add_up_the_clock_and_what_the_thread_ran() -> None:
    phases = Phases()
    for _ in range(2):
        with phases("forward"):
            time.sleep(0.02)
    assert phases.seconds["forward"] >= 0.04
    assert phases.seconds["forward running"] < phases.seconds["forward"]
