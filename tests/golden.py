"""Formula-filled weight files: the names and shapes of the real ones, contents that any machine can
make again. (GAP.p, which nothing reads, is 3 in the formula's own description.)"""
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def official_keys():
    """{file: {key: shape}} of the authors' three checkpoint files."""
    return json.loads((HERE / "official_checkpoint_keys.json").read_text())


def gain_of(key, shape):
    """How large a weight's numbers are."""
    if key.startswith("enhance_"):
        return 0.05
    fan_in = shape[1] if key.endswith("fc_bin") else np.prod(shape[1:])
    gain = np.sqrt(2 / fan_in)
    return gain / 2 if ".resnet_conv." in key else gain


def formula(key, shape, seed=60):
    """The tensor that the formula gives for a key of that shape."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    random = np.random.RandomState(zlib.crc32(f"{seed}/{key}".encode()))
    x = random.standard_normal(shape).astype(np.float32)
    is_scale = key.endswith("gamma") or (len(shape) == 1 and key.endswith("weight"))
    is_small = len(shape) == 1 or key.endswith(("cls_token", "pos_embed", "mask_token"))
    if key.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif key.endswith("running_mean"):
        x = 0.1 * x
    elif is_scale:
        x = 1 + 0.1 * x
    elif is_small:
        x = 0.1 * x
    else:
        x = x * gain_of(key, shape)
    return torch.from_numpy(np.asarray(x, dtype=np.float32).reshape(shape))


def write_official(folder):
    """Write the three files. Nobody reads the 170 MB of gcn_*: one number stands for each."""
    for name, shapes in official_keys().items():
        def fill(key, shapes=shapes):
            return torch.zeros(1) if ".gcn_" in key else formula(key, shapes[key])
        with ThreadPoolExecutor() as pool:    # 110 million random numbers
            tensors = dict(zip(shapes, pool.map(fill, shapes), strict=True))
        torch.save(tensors, Path(folder) / name)
