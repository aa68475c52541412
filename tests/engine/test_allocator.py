"""On a CPU the memory of a step is kept for the next one."""

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest

from varscale.engine import allocator

MIB = 2**20
PR_SET_THP_DISABLE = 41  # linux/prctl.h; or one fault would bring in 512 pages
JOIN = "from varscale.engine.distributed import join, leave; join(); leave()"
LEFT_ALONE = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")


def measured(setup: str, then: str, **variables: str) -> int:
    """What `then` prints in a process of its own, once 256 MiB were written to and freed there ten times."""
    body = f"""
        import ctypes, resource
        {setup}
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes, libc.free.restype = ctypes.c_void_p, [ctypes.c_void_p], None
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        libc.prctl({PR_SET_THP_DISABLE}, 1, 0, 0, 0)

        def use():
            block = libc.malloc({256 * MIB})
            libc.memset(block, 1, {256 * MIB})
            libc.free(block)

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()

        use()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            use()
        {then}
    """
    own = (*allocator.OWN_SETTINGS, "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, "-c", textwrap.dedent(body)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


FAULTS = "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"


def test_a_rank_on_a_cpu_keeps_freed_memory():
    usual = measured("", FAULTS)
    assert measured(JOIN, FAULTS) < 0.05 * usual
    assert measured(JOIN, FAULTS, **LEFT_ALONE) > 0.8 * usual  # a user's own settings count
    assert measured(JOIN, FAULTS, GLIBC_TUNABLES="glibc.rtld.nns=4") < 0.05 * usual  # of malloc, that is


def test_memory_is_given_back_when_asked():
    give_back = "from varscale.engine.allocator import give_back_memory; give_back_memory()"
    freed = f"held = resident(); {give_back}; print(held - resident())"
    assert measured(JOIN, freed) > 200 * MIB
    hold = "held = libc.malloc(100 * 2**20); libc.memset(held, 1, 100 * 2**20); libc.mallopt(-1, -1); libc.free(held)"
    assert measured(JOIN, f"{hold}; {freed}", **LEFT_ALONE) < 50 * MIB


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
    allocator.give_back_memory()
