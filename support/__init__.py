"""What the chapters stand on. A first reading may skip it. Nothing here imports a chapter.

    method.py      what train.py and evaluate.py ask of a method
    files.py       errors for users, atomic writing, the folder of a run
    options.py     a dataclass as a command line, methods and readers by name, exit codes
    footage.py     frames from image files, folders of frames
    check.py       every problem of a dataset
    weights.py     tensors read safely, loaded strictly; checkpoints
    official.py    the authors' three files, BigGait's mask branch
    dinov2.py, clip.py, resnet.py    the three pre-trained networks, tensor for tensor
    parallel.py    several processes (torchrun)
    pictures.py    silhouettes, ranked lists, what LSMRL reads, curves
    pedestrian.py  one pose of one walker, drawn
    priors.py      the demo's small DINOv2 and CLIP, and how they were made
"""
import contextlib
import ctypes
import os

# These settings must come before torch, so each file imports our own modules first. A waiting
# thread of torch spins by default, which slows a busy machine ten times; a passive one sleeps.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")

# Let glibc keep freed memory for the next step: that saves a CPU a quarter of its time.
with contextlib.suppress(OSError, AttributeError, TypeError):    # other C libraries
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2 ** 31 - 1)
    libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
    libc.mallopt(M_TOP_PAD, 2 ** 28)
