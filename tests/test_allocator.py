"""Memory that a step frees is there for the next one."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
# Prints for how many pages the system had to be asked while tensors were made and freed ten times.
FAULTS = """
import resource

import torch

{begin}
def work():
    for megabytes in (8, 64):
        torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)

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
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a run would be on the GPU")
def test_a_run_on_the_cpu_clears_its_pages_once(tmp_path: Path) -> None:
    # Some, since freed pieces are cut to measure at first; without it the larger tensor has new pages each time.
    assert 4 * faults(START.format(folder=tmp_path)) < faults("")


def test_other_libraries_of_c_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.allocator.ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
