"""Frames from image files: one picture, and folders of frames.

    frame.png, or walk.gif#3 -> read_frame -> uint8 (3, H, W)
    DIR/camera 1/007/1.png ... 24.png, DIR/camera 2/walk.gif
        -> find_footage -> {"camera 1/007": 24 paths, "camera 2/walk.gif": ...}

Quick question: why are loose frames beside folders of frames refused? (They may be previews, or one
picture each of many people. A refused folder is mended; a wrong tracklet is never noticed.)
"""
import functools
import os
import re

from support.files import UserError, in_short

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence

# "walk.gif#3": picture 3, counted from 0, of an animated file.
ANIMATED = re.compile(r"(.+\.(?:gif|tiff?|webp|apng|avifs?))#(\d+)", re.IGNORECASE | re.DOTALL)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])    # ImageNet's

# ------------------------------------------------------------- one frame ----

def picture(image, size):
    """An open image -> uint8 (3, H, W), upright, resized bilinearly. Pictures deeper than 8 bits,
    as thermal cameras write them, are stretched from their darkest to their brightest value."""
    H, W = size
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):    # I, F, I;16 and its byte orders
        deep = np.nan_to_num(np.asarray(image, np.float32))
        scale = 255 / max(np.ptp(deep), 1e-6)
        image = Image.fromarray(((deep - deep.min()) * scale).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")    # or pillow warns
    if image.mode != "RGB":    # pillow would make a copy
        image = image.convert("RGB")
    if image.size != (W, H):
        image = image.resize((W, H), Image.Resampling.BILINEAR)
    # Each row its red, its green, its blue: quicker to sort than pixels.
    rows = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8).reshape(H, 3, W)
    return torch.from_numpy(rows.swapaxes(0, 1).copy())


def file_of(frame):
    """The file that holds a frame: walk.gif for walk.gif#3."""
    animated = ANIMATED.fullmatch(frame)
    return animated[1] if animated else frame


@functools.lru_cache(maxsize=1)
def animation(path, size, modified):
    """All pictures of an animated file as frames: each builds on the one before, so reading one
    alone costs as much. modified: when the file was; a later file of that name is read again."""
    with Image.open(path) as image:
        return [picture(page.copy(), size) for page in ImageSequence.Iterator(image)]


def read_frame(frame, size):
    """A path, a PIL image or a uint8 array (H, W, 3), RGB, or (H, W) -> uint8 (3, H, W), see
    picture. Raises UserError that names an unreadable file."""
    if isinstance(frame, np.ndarray):
        frame = Image.fromarray(frame)
    if isinstance(frame, Image.Image):
        return picture(frame.copy(), size)    # the caller's stays as it is
    frame = os.fspath(frame)
    animated = ANIMATED.fullmatch(frame)
    try:
        if animated:
            file, number = animated.groups()
            return animation(file, tuple(size), os.path.getmtime(file))[int(number)]
        with Image.open(frame) as image:
            return picture(image, size)
    except Exception as error:    # pillow raises a dozen types for a bad file
        raise UserError(f"{frame} cannot be read as an image ({in_short(error)}); download it "
                        "again, or see python data.py for all such files") from None


def true_masks(root, frames, size):
    """The true silhouettes of frames, bool (T, H, W), if the dataset at root has masks/ (walkers
    do); otherwise None."""
    names = [os.path.splitext(os.path.relpath(frame, root))[0] + ".png" for frame in frames]
    paths = [os.path.join(root, "masks", name) for name in names]
    if not all(map(os.path.isfile, paths)):
        return None
    return torch.stack([read_frame(path, size)[0] > 127 for path in paths])


def normalise(frames, channels=slice(None)):
    """uint8 (..., C, H, W) -> float32, mean 0, deviation 1. channels: which of red, green, blue."""
    mean, std = (x[channels, None, None].to(frames.device) for x in (MEAN, STD))
    return (frames / 255).sub_(mean).div_(std)


# ------------------------------------------------------ folders of frames ----

def natural(name):
    """Sort key: frame2 before frame10."""
    words = re.split("([0-9]+)", name.lower())
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


@functools.cache
def readable_extensions():
    """Those of the formats that pillow opens. MPEG it only recognises."""
    formats = Image.registered_extensions()
    return {extension for extension, name in formats.items()
            if name in Image.OPEN and name != "MPEG"}


def is_readable(file):
    return os.path.splitext(file)[1].lower() in readable_extensions()


def frames_of_file(file):
    """An image file -> its frames: itself, or FILE#0, FILE#1, ... of an animated one."""
    if not ANIMATED.fullmatch(f"{file}#0"):
        return [file]
    try:
        with Image.open(file) as image:
            pictures = getattr(image, "n_frames", 1)
    except Exception as error:
        raise UserError(f"{file} cannot be read as an image ({in_short(error)}); export it again "
                        "or remove it") from None
    return [file] if pictures == 1 else [f"{file}#{n}" for n in range(pictures)]


def find_footage(path):
    """Folders of frames -> {name of a tracklet: paths of its frames}, both in natural order.

    path: a folder with a folder of frames for each tracklet, at any depth (names are relative to
    it), or one folder of frames. An animated file is a tracklet too. Hidden files are left out.
    Raises UserError."""
    path = os.path.normpath(path)
    if not os.path.isdir(path):
        raise UserError(f"no folder {path}; expected a folder of frames for each tracklet; check "
                        "the path")
    found = {}    # path of a folder or of an animated file -> its frames
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=natural)
        files = [f for f in files if is_readable(f) and not f.startswith(".")]
        for file in sorted(files, key=natural):
            file = os.path.join(folder, file)
            frames = frames_of_file(file)
            found.setdefault(folder if frames == [file] else file, []).extend(frames)
    if not found:
        raise UserError(f"no frames under {path}; expected a folder of images for each tracklet; "
                        "from a video, extract the frames first")
    for place in found:
        above = os.path.dirname(place)
        while len(above) >= len(path) and above not in found:
            above = os.path.dirname(above)
        if above in found:
            raise UserError(f"{above} holds loose frames beside folders of frames; expected one or "
                            "the other; move them into a folder of their own")

    def name(place):
        inside = os.path.relpath(place, path).replace(os.sep, "/")
        return os.path.basename(os.path.abspath(path)) if place == path else inside

    named = {name(place): tuple(frames) for place, frames in found.items()}
    return {key: named[key] for key in sorted(named, key=natural)}
