"""Tiny HITSZ-VCM and BUPTCampus folders on disk, valid datasets by default, with the liberties that
the real ones take; and folders of one's own.

    write_hitsz(root)                      4 training identities, 6 test identities
    write_hitsz(root, layout="flat", digits=(1, 1, 1, 1))      1M2D3T1F1.jpg -> 1/rgb/D3/1.jpg
    write_hitsz(root, train=tracks((5, 9), each=6) + [("visible", 5, 12, 11)])
                                           the last: a track under 12 frames, seen by camera 12
    write_buptcampus(root, train=pairs(range(1, 9), frames=3))
                                           8 training identities, 4 aligned pairs each
    write_own(root, own("train", (1, 2)) | own("query", ["ann"], camera="D1/"))

A picture is a coarse colour pattern of its identity (grey and drawn anew for infrared) with a
little noise, one JPEG per frame: a few training steps on it run, what they learn means nothing.
About 1,000 files and half a second per dataset.
"""
import json
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

# Of HITSZ-VCM, where M1 = infrared and M2 = visible:
FOLDER = {"infrared": "ir", "visible": "rgb"}
# Of BUPTCampus:
CAMERAS = ("LS3", "G25", "CQ1", "W4", "TSG1", "TSG2")
MODE = {"infrared": "IR", "visible": "RGB"}


def picture(pid, modality, camera, number, size):
    """-> the bytes of one JPEG, size = (height, width); infrared ones have a single channel, as
    files in the wild may."""
    height, width = size
    infrared = modality == "infrared"
    channels = 1 if infrared else 3
    coarse = np.random.default_rng([pid, infrared]).integers(40, 215, (4, 2, channels))
    pixels = coarse.repeat(-(-height // 4), 0).repeat(-(-width // 2), 1)[:height, :width]
    noise = np.random.default_rng([pid, infrared, sum(str(camera).encode()), number])
    pixels = pixels + noise.integers(-30, 31) + noise.integers(-9, 10, pixels.shape)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels[..., 0] if infrared else pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tracks(pids, each=4, frames=12, cameras=(1, 2, 3, 4)):
    """-> [(modality, pid, camera, frames)] for write_hitsz: per identity `each` infrared tracks,
    then `each` visible ones."""
    return [(modality, pid, cameras[i % len(cameras)], frames)
            for pid in pids for modality in ("infrared", "visible") for i in range(each)]


def write_hitsz(root, layout="standard", train=None, test=None, digits=(4, 1, 1, 1), size=(32, 16),
                one_line=True):
    """Write HITSZ-VCM under `root` and return it as a Path.

    layout    "standard": Train/ Test/ info/ | "doubled": Train/Train/ Test/Test/ info/ | "beside":
              identity folders beside info/ | "flat": identity folders and txt files
    train, test    lists of (modality, pid, camera, frames), one per row of the info file, in that
                   order (see `tracks`)
    digits    least number of digits of identity, camera D, track T and file name F: zero-padded
    one_line  query_IDX.txt as one long line (as released) or one number per line; it lists every
              infrared test row
    """
    root = Path(root)
    splits = {"train": tracks((1, 2, 3, 4)) if train is None else train,
              "test": tracks((21, 22, 23, 24, 25, 26)) if test is None else test}
    info = root if layout == "flat" else root / "info"
    info.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        depth = {"standard": 1, "doubled": 2}.get(layout, 0)
        images = root.joinpath(*[split.capitalize()] * depth)
        names, info_rows = write_tracks(images, rows, digits, size)
        (info / f"{split}_name.txt").write_text("\n".join(names) + "\n")
        (info / f"track_{split}_info.txt").write_text("\n".join(info_rows) + "\n")
    queries = [str(i) for i, row in enumerate(splits["test"], start=1) if row[0] == "infrared"]
    (info / "query_IDX.txt").write_text((" " if one_line else "\n").join(queries) + "\n")
    return root


def write_tracks(images, rows, digits, size):
    """Writes the frames of a split -> the lines of its names file and of its info file."""
    names, info_rows, track_of, file_of = [], [], Counter(), Counter()
    for modality, pid, camera, frames in rows:
        where = modality, pid, camera
        track_of[where] += 1
        letter = 1 if modality == "infrared" else 2
        info_rows.append(f"{letter} {len(names) + 1} {len(names) + frames} {pid} {camera}")
        identity, D = f"{pid:0{digits[0]}d}", f"D{camera:0{digits[1]}d}"
        T = f"T{track_of[where]:0{digits[2]}d}"
        folder = images / identity / FOLDER[modality] / D
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(frames):
            file_of[where] += 1    # T is not in the path: numbers run on from track to track
            F = f"{file_of[where]:0{digits[3]}d}"
            names.append(f"{identity}M{letter}{D}{T}F{F}.jpg")
            content = picture(pid, modality, camera, file_of[where], size)
            (folder / f"{F}.jpg").write_bytes(content)
    return names, info_rows


def hitsz_rows(tracklets):
    """What a loader read, in the form of `tracks`."""
    return [(t.modality, t.pid, int(t.camera[1:]), len(t.frames)) for t in tracklets]


def pairs(pids, each=4, frames=12, cameras=CAMERAS):
    """-> [(pid, camera, tracklet, frames)] for write_buptcampus: `each` aligned RGB/IR pairs per
    identity."""
    return [(pid, cameras[i % len(cameras)], str(i // len(cameras) + 1), frames)
            for pid in pids for i in range(each)]


def write_buptcampus(root, train=None, auxiliary=None, test=None, apart=False, size=(32, 16)):
    """Write BUPTCampus under `root` and return it as a Path; images lie in root/DATA.

    train, auxiliary, test    lists of (pid, camera, tracklet, frames), see `pairs`; every one
                              exists as RGB and as IR
    apart     gallery.txt holds all test tracklets of both modalities, query.txt the first pair of
              each identity, in RGB and IR by turns; with `apart` the queries are left out of
              gallery.txt
    """
    root = Path(root)
    train = pairs((1, 2, 3, 4)) if train is None else train
    auxiliary = pairs((11, 12), each=2) if auxiliary is None else auxiliary
    test = pairs((21, 22, 23, 24, 25, 26)) if test is None else test
    paths, first = {}, {}
    for row in [*train, *auxiliary, *test]:
        write_pair(root / "DATA", paths, row, size)
    for pid, camera, tracklet, _ in test:
        first.setdefault(pid, (camera, tracklet))
    query = [f"{pid} {('RGB', 'IR')[i % 2]} {camera} {tracklet}"
             for i, (pid, (camera, tracklet)) in enumerate(first.items())]
    gallery = [f"{pid} {mode} {camera} {tracklet}"
               for mode in ("RGB", "IR") for pid, camera, tracklet, _ in test]
    if apart:
        gallery = [row for row in gallery if row not in query]
    lists = {"train": aligned(train), "train_auxiliary": aligned(auxiliary), "query": query,
             "gallery": gallery}
    for name, rows in lists.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "data_paths.json").write_text(json.dumps(paths))
    return root


def write_pair(images, paths, row, size):
    """Writes the frames of one row of `pairs` and adds them to data_paths.json's contents."""
    pid, camera, tracklet, frames = row
    for modality, mode in MODE.items():
        files = [f"{pid}/{mode}/{camera}/{pid}_{mode}_{camera}_{tracklet}_{8500 + 5 * i}.jpg"
                 for i in range(frames)]
        (images / str(pid) / mode / camera).mkdir(parents=True, exist_ok=True)
        for i, file in enumerate(files):
            number = 100 * int(tracklet) + i
            (images / file).write_bytes(picture(pid, modality, camera, number, size))
        cameras = paths.setdefault(str(pid), {}).setdefault(mode, {})
        cameras.setdefault(camera, {})[tracklet] = files


def aligned(rows):
    """Rows of `pairs` as lines of train.txt."""
    return [f"{pid} RGB/IR {camera} {tracklet}" for pid, camera, tracklet, _ in rows]


def bupt_rows(tracklets):
    """What a loader read, sorted, in the form of query.txt and gallery.txt; the names say
    pid_mode_camera_tracklet_number."""
    found = [sorted({" ".join(Path(frame).stem.split("_")[:4]) for frame in t.frames})
             for t in tracklets]
    for t, rows in zip(tracklets, found, strict=True):
        head = f"{t.pid} {MODE[t.modality]} {t.camera} "
        assert len(rows) == 1 and rows[0].startswith(head), (t, rows)
    return sorted(rows[0] for rows in found)


def own(split, pids, camera="", each=2, frames=2, modalities=("visible", "infrared")):
    """-> {folder of a track: number of frames} for write_own."""
    return {f"{split}/{pid}/{modality}/{camera}walk{i}": frames
            for pid in pids for modality in modalities for i in range(1, each + 1)}


def write_own(root, tracks, size=(32, 16)):
    """Write folders of one's own under `root` and return it as a Path. tracks: {folder below root:
    number of frames}, see `own`."""
    for place, frames in tracks.items():
        folder = Path(root, place)
        folder.mkdir(parents=True, exist_ok=True)
        _, pid, modality, *_ = place.split("/")
        modality = "infrared" if modality in ("infrared", "ir") else "visible"
        for number in range(1, frames + 1):
            content = picture(crc32(pid.encode()), modality, 1, number, size)
            (folder / f"{number}.jpg").write_bytes(content)
    return Path(root)


def clone(source, target):
    """A cheap copy with list files to damage: those are copied, folders of images are symbolic
    links (as users have them)."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_file():
            shutil.copyfile(entry, target / entry.name)
        elif entry.name == "info":
            shutil.copytree(entry, target / "info")
        else:
            (target / entry.name).symlink_to(entry, target_is_directory=True)
    return target
