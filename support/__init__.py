"""What the chapters use (README, Files). Skip it in a first reading. It imports no chapter."""
import contextlib
import ctypes
import os

# These settings must come before torch, so each file imports our own modules first. A waiting
# thread of torch spins by default, which slows a busy machine ten times; a passive one sleeps.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")

# On a GPU, blocks of memory that change their size from step to step grow instead of piling up.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# Let glibc keep freed memory for the next step: that saves a CPU a quarter of its time.
with contextlib.suppress(OSError, AttributeError, TypeError):    # other C libraries
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2 ** 31 - 1)
    libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
    libc.mallopt(M_TOP_PAD, 2 ** 28)
