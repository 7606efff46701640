"""What becomes of memory that a step has used."""

import ctypes
import os

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
# What glibc comes to by itself where large pieces are freed.
OWN = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for its next allocation; for steps on the CPU.

    glibc gives large tensors back to the system when they are freed, and in the next step the system has to clear every
    page of them again (benchmarks/step.py --system shows what that costs). GPUs have torch's own allocator, which keeps
    it anyway. Processes forked from this one, such as those that read data, give it back as before. Nothing is done
    where the environment says how malloc shall work, or on other C libraries (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(M_TRIM_THRESHOLD, -1)  # never
    mallopt(M_MMAP_MAX, 0)
    os.register_at_fork(after_in_child=lambda: [mallopt(name, value) for name, value in OWN.items()])
