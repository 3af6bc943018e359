"""What the top level stands on. A first reading may skip it.

    files.py       errors that a user can act on, writing that loses nothing, a run's folder
    options.py     a dataclass as a command line, progress bars, exit codes
    weights.py     tensors read safely and loaded strictly; where official weights come from
    parallel.py    several processes (torchrun), and one as the simplest case of several
    dinov2.py, clip.py, resnet.py    the three pre-trained networks, tensor for tensor
    footage.py     frames: one picture, a user's own folders, a cache of decoded ones
    ranking.py     distances, CMC, mAP, mINP, re-ranking, the search in a file larger than memory
    pictures.py    silhouettes, ranked lists and curves, drawn with pillow
    export.py      the embedding network for programs without this repository
    priors.py      the demo's small DINOv2 and CLIP, and how they were made
    pedestrian.py  one pose of one walker, drawn

Nothing here imports a file of the top level. Our own imports stand before torch's in every file, so
that this one is read first, for what has to be set before torch is there.
"""
import os

# A thread of torch that waits for work spins, by default: on a busy machine it takes the processor
# from the thread it waits for, and training is ten times slower. A passive thread sleeps instead;
# after a thousand looks, or small networks are a quarter slower on an idle machine (docs/speed.md).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")

# Or each process warns, before its first step, that it found no unused parameter.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
