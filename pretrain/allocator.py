"""What becomes of memory that a step has used."""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next allocation; for steps on the CPU.

    glibc gives large tensors back to the system when they are freed, and in the next step the system has to clear every
    page of them again: 9 to 16 % of a small step's time (benchmarks/step.py's sizes). A step needs as much as the one
    before, so what is kept is what the process had at its peak. GPUs have torch's own allocator, which keeps it anyway.

    Returns:
        whether there is a glibc to tell; other allocators stay as they are.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; and Windows, where None names no library
        return False
    return bool(tell(M_TRIM_THRESHOLD, NEVER)) and bool(tell(M_MMAP_MAX, 0))
