"""Memory that a step frees is there for the next one."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.allocator import M_MMAP_MAX, M_TRIM_THRESHOLD, OWN, keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
# Prints for how many pages the system had to be asked while tensors were made and freed ten times.
FAULTS = """
import ctypes
import resource

import torch

{begin}
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the system's setting

def work():
    for megabytes in (8, 64):
        torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)

for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
START = """
from pathlib import Path

from pretrain.start import start_accelerator
from tests.tiny import tiny_config

start_accelerator(tiny_config(Path("{folder}")))
"""


def faults(begin: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(begin=begin)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))},
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a run would be on the GPU")
def test_a_run_on_the_cpu_clears_its_pages_once(tmp_path: Path) -> None:
    # Some, since freed pieces are cut to measure at first; without it the larger tensor has new pages each time.
    assert 4 * faults(START.format(folder=tmp_path)) < faults("")


class Library:
    """Of C; notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.told.append((parameter, value))
        return 1


def test_a_fork_gives_back_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library, children = Library(), list[Callable[[], object]]()
    monkeypatch.setattr("pretrain.allocator.ctypes.CDLL", lambda name: library)

    def register(after_in_child: Callable[[], object]) -> None:
        children.append(after_in_child)

    monkeypatch.setattr("os.register_at_fork", register)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    keep_freed_memory()
    own, told = [child() for child in children], library.told
    assert len(own) == 1
    assert [parameter for parameter, _ in told] == [M_TRIM_THRESHOLD, M_MMAP_MAX, *OWN]
    assert dict(told) == OWN


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_the_environment_has_the_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr("pretrain.allocator.ctypes.CDLL", lambda name: library)
    monkeypatch.setenv(name, "1")
    keep_freed_memory()
    assert library.told == []


def test_other_libraries_of_c_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    children = list[object]()
    monkeypatch.setattr("pretrain.allocator.ctypes.CDLL", lambda name: object())
    monkeypatch.setattr("os.register_at_fork", lambda **hooks: children.append(hooks))
    keep_freed_memory()
    assert children == []
