"""Tiny datasets on disk, in the layouts that data.py reads.

    write_hitsz(root)    4 people to train on, 6 to test on, in HITSZ-VCM's layout
    write_hitsz(root, train=tracks((5, 9), each=6) + [("visible", 5, 12, 11)])
                         the last: 11 frames of person 5, seen by camera 12
    write_bupt(root)     the same people in BUPTCampus' layout, and an auxiliary set
    write_own(root, own("train", (1, 2)) | own("query", ["ann"], camera="D1/"))

A picture is a coarse pattern of its person, gray and another one in infrared, with a little noise:
training steps run on it, but what is learned means nothing.
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
    """-> the bytes of a JPEG. size: height and width."""
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
    splits = {"train": train or tracks((1, 2, 3, 4)), "test": test or tracks(range(21, 27))}
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

def pairs(pids, each=4, frames=3):
    """-> [(pid, camera, tracklet, frames)] for write_bupt: of each person `each` RGB/IR pairs."""
    cameras = ("LS3", "G25", "CQ1", "W4", "TSG1", "TSG2")
    return [(pid, cameras[i], "1", frames) for pid in pids for i in range(each)]


def write_bupt(root, train=None, auxiliary=None, test=None):
    """-> root, as a Path. gallery.txt holds all test tracklets; query.txt the first of each person,
    RGB and IR by turns."""
    root, paths = Path(root), {}
    train = train or pairs((1, 2, 3, 4))
    auxiliary = auxiliary or pairs((11, 12), each=2)
    test = test or pairs(range(21, 27))
    for row in [*train, *auxiliary, *test]:
        write_pair(root / "DATA", paths, *row)

    def lines(rows, mode="RGB/IR"):
        return [f"{pid} {mode} {camera} {tracklet}" for pid, camera, tracklet, _ in rows]

    firsts = [row for i, row in enumerate(test) if row[0] not in {r[0] for r in test[:i]}]
    lists = {"train": lines(train), "train_auxiliary": lines(auxiliary),
             "query": lines(firsts[::2], "RGB") + lines(firsts[1::2], "IR"),
             "gallery": lines(test, "RGB") + lines(test, "IR")}
    for name, rows in lists.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "data_paths.json").write_text(json.dumps(paths))
    return root


def write_pair(images, paths, pid, camera, tracklet, frames):
    """The frames of a row of `pairs`, and its entries of data_paths.json."""
    for modality, mode in ("visible", "RGB"), ("infrared", "IR"):
        folder = f"{pid}/{mode}/{camera}"
        (images / folder).mkdir(parents=True, exist_ok=True)
        files = [f"{folder}/{pid}_{mode}_{camera}_{tracklet}_{8500 + i}.jpg" for i in range(frames)]
        for i, file in enumerate(files):
            (images / file).write_bytes(picture(pid, modality, camera, (tracklet, i)))
        of_camera = paths.setdefault(str(pid), {}).setdefault(mode, {}).setdefault(camera, {})
        of_camera[tracklet] = files


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
