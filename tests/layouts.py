"""Tiny datasets on disk, in the layouts that data.py reads.

    write_hitsz(root)    persons 1 and 2 to train on, 21 and 22 to test on, in HITSZ-VCM's layout
    write_hitsz(root, train=tracks((5, 9), each=6) + [("visible", 5, 12, 11)])
                         the last: 11 frames of person 5, seen by camera 12
    write_bupt(root)     the same people in BUPTCampus' layout, and person 11, auxiliary
    write_own(root, own("train", (1, 2)) | own("query", ["ann"], camera="D1/"))
"""
import functools
import json
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image


@functools.cache
def picture(pid, modality, camera, number, size=(32, 16)):
    """-> the bytes of a JPEG: a coarse pattern of the person, another in infrared, and noise."""
    infrared = modality == "infrared"
    coarse = np.random.default_rng([pid, infrared]).integers(40, 215, (4, 2, 1 if infrared else 3))
    noise = np.random.default_rng(crc32(f"{pid} {modality} {camera} {number}".encode()))
    pixels = coarse.repeat(8, 0).repeat(8, 1)    # (32, 16, channels)
    pixels = pixels + noise.integers(-30, 31) + noise.integers(-9, 10, pixels.shape)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if infrared else pixels)
    buffer = BytesIO()
    image.resize(size[::-1], Image.Resampling.NEAREST).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ------------------------------------------------------------- HITSZ-VCM ----

def tracks(pids, each=4, frames=12, cameras=(1, 2, 3, 4)):
    """-> [(modality, pid, camera, frames)] for write_hitsz: of each person `each` infrared tracks,
    then `each` visible ones."""
    return [(modality, pid, cameras[i % len(cameras)], frames)
            for pid in pids for modality in ("infrared", "visible") for i in range(each)]


def write_hitsz(root, layout="standard", train=None, test=None, digits=(4, 1, 1, 1)):
    """-> root, as a Path. Every infrared test track is a query.

    layout    "standard": Train/ Test/ info/ | "doubled": Train/Train/ Test/Test/ info/ | "beside":
              identity folders beside info/ | "flat": identity folders and txt files
    train, test    rows of the info files, see `tracks`
    digits    the least number of digits of identity, camera, track and file name
    """
    root = Path(root)
    splits = {"train": train or tracks((1, 2), each=1), "test": test or tracks((21, 22), each=2)}
    info = root if layout == "flat" else root / "info"
    info.mkdir(parents=True, exist_ok=True)
    depth = {"standard": 1, "doubled": 2}.get(layout, 0)
    for split, rows in splits.items():
        write_split(root.joinpath(*[split.capitalize()] * depth), info, split, rows, digits)
    queries = [str(n) for n, row in enumerate(splits["test"], 1) if row[0] == "infrared"]
    (info / "query_IDX.txt").write_text(" ".join(queries) + "\n")
    return root


def write_split(images, info, split, rows, digits):
    """The frames and the two lists of a split. The track is not in a frame's path, so the frames of
    a split are numbered through, in the order of the rows."""
    names, lines = [], []
    for track, (modality, pid, camera, frames) in enumerate(rows, 1):
        letter, short = {"infrared": (1, "ir"), "visible": (2, "rgb")}[modality]
        lines.append(f"{letter} {len(names) + 1} {len(names) + frames} {pid} {camera}")
        identity, D = f"{pid:0{digits[0]}d}", f"D{camera:0{digits[1]}d}"
        folder = images / identity / short / D
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(frames):
            file = f"{len(names) + 1:0{digits[3]}d}.jpg"
            (folder / file).write_bytes(picture(pid, modality, camera, len(names)))
            names.append(f"{identity}M{letter}{D}T{track:0{digits[2]}d}F{file}")
    (info / f"{split}_name.txt").write_text("\n".join(names) + "\n")
    (info / f"track_{split}_info.txt").write_text("\n".join(lines) + "\n")


def hitsz_rows(tracklets):
    """What was read, in the form of `tracks`."""
    return [(t.modality, t.pid, int(t.camera[1:]), len(t.frames)) for t in tracklets]


# ------------------------------------------------------------ BUPTCampus ----

def write_bupt(root):
    """-> root, as a Path. Of each person two RGB/IR pairs, of 3 frames. gallery.txt holds all test
    tracklets; query.txt an RGB one of person 21 and an IR one of person 22."""
    root, paths = Path(root), {}
    train, auxiliary, test = ([(pid, camera) for pid in pids for camera in ("LS3", "G25")]
                              for pids in ((1, 2), (11,), (21, 22)))
    for pid, camera in [*train, *auxiliary, *test]:
        for modality, mode in ("visible", "RGB"), ("infrared", "IR"):
            folder = f"{pid}/{mode}/{camera}"
            files = [f"{folder}/{pid}_{mode}_{camera}_1_{n}.jpg" for n in (8500, 8505, 8510)]
            (root / "DATA" / folder).mkdir(parents=True, exist_ok=True)
            for file in files:
                (root / "DATA" / file).write_bytes(picture(pid, modality, camera, file))
            paths.setdefault(pid, {}).setdefault(mode, {})[camera] = {"1": files}

    def lines(rows, mode="RGB/IR"):
        return [f"{pid} {mode} {camera} 1" for pid, camera in rows]

    lists = {"train": lines(train), "train_auxiliary": lines(auxiliary),
             "query": lines(test[:1], "RGB") + lines(test[2:3], "IR"),
             "gallery": lines(test, "RGB") + lines(test, "IR")}
    for name, rows in lists.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "data_paths.json").write_text(json.dumps(paths))
    return root


def bupt_rows(tracklets):
    """What was read, sorted, in the form of query.txt, by the names of the frames."""
    return sorted(" ".join(Path(t.frames[0]).stem.split("_")[:4]) for t in tracklets)


# ------------------------------------------------------ your own folders ----

def own(split, pids, camera="", each=2, frames=2, modalities=("visible", "infrared")):
    """-> {folder of a track: number of frames} for write_own."""
    return {f"{split}/{pid}/{modality}/{camera}walk{i}": frames
            for pid in pids for modality in modalities for i in range(1, each + 1)}


def write_own(root, places):
    """-> root, as a Path. places: {folder below root: number of frames}, see `own`."""
    for place, frames in places.items():
        folder = Path(root, place)
        folder.mkdir(parents=True, exist_ok=True)
        _, pid, modality, *_ = place.split("/")
        modality = "infrared" if modality.lower() in ("infrared", "ir") else "visible"
        for number in range(1, frames + 1):
            content = picture(crc32(pid.encode()), modality, place, number)
            (folder / f"{number}.jpg").write_bytes(content)
    return Path(root)
