"""What the chapters stand on. A first reading may skip it.

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

Nothing here imports a chapter. In each file our own imports come before torch's: this file has
settings that must be there before torch is imported.
"""
import ctypes
import os

# By default a waiting thread of torch spins. On a busy machine it takes the processor from the
# thread that it waits for: training gets ten times slower. A passive one sleeps, after a thousand
# looks (docs/speed.md).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")


def keep_memory():
    """Ask glibc to keep freed memory for the next step. Returning 100 MB to the system and asking
    for them again costs a CPU a quarter of its time. Other C libraries are left as they are."""
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2 ** 31 - 1)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)
        libc.mallopt(top_pad, 2 ** 28)
    except (OSError, AttributeError, TypeError):
        pass


keep_memory()
