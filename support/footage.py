"""Frames from image files: one picture, and folders of frames."""
import functools
import os
import re
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

from support.files import UserError, in_short

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence

# "walk.gif#3": picture 3, counted from 0, of an animated file.
ANIMATED = re.compile(r"(.+\.(?:gif|tiff?|webp|apng|avifs?))#(\d+)\Z", re.IGNORECASE | re.DOTALL)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])    # ImageNet's

# ------------------------------------------------------------- one frame ----

def picture(image, size):
    """An open image -> uint8 (3, H, W), upright, resized bilinearly. Pictures deeper than 8 bits,
    as thermal cameras write them, are stretched from their darkest to their brightest value."""
    H, W = size
    image = ImageOps.exif_transpose(image)    # a copy
    if image.mode.startswith(("I", "F")):    # I, F, I;16 and its byte orders
        deep = np.nan_to_num(np.asarray(image, np.float32))
        deep = (deep - deep.min()) * (255 / max(np.ptp(deep), 1e-6))
        image = Image.fromarray(deep.astype(np.uint8))
    image = image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.moveaxis(np.asarray(image), 2, 0).copy())


@contextmanager
def opened(file):
    """The open image; whatever fails while it is read is a UserError that names the file."""
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:    # pillow raises a dozen types for a bad file
        raise UserError(f"{file} cannot be read as an image ({in_short(error)}); download it "
                        "again, or see python data.py for all such files") from None


@functools.lru_cache(1)
def animation(path, size):
    """All pictures of an animated file: each builds on the one before."""
    with opened(path) as image:
        return [picture(page, size) for page in ImageSequence.Iterator(image)]


def file_of(frame):
    """The file that holds a frame: walk.gif for walk.gif#3."""
    return ANIMATED.sub(r"\1", os.fspath(frame))


def read_frame(frame, size):
    """A path, a PIL image or a uint8 array (H, W, 3), RGB, or (H, W) -> uint8 (3, H, W), see
    picture. Raises UserError that names an unreadable file."""
    if isinstance(frame, np.ndarray):
        frame = Image.fromarray(frame)
    if isinstance(frame, Image.Image):
        return picture(frame, size)
    if animated := ANIMATED.fullmatch(os.fspath(frame)):
        file, number = animated.groups()
        return animation(file, tuple(size))[int(number)]
    with opened(frame) as image:
        return picture(image, size)


def read_frames(frames, size):
    """T frames as in read_frame -> uint8 (T, 3, H, W)."""
    return torch.stack([read_frame(frame, size) for frame in frames])


def true_masks(root, frames, size):
    """The true silhouettes, bool (T, H, W), of a dataset with masks/ (walkers have), or None."""
    masks = [Path(root, "masks", os.path.relpath(frame, root)).with_suffix(".png")
             for frame in frames]
    there = all(map(os.path.isfile, masks))
    return read_frames(masks, size)[:, 0] > 127 if there else None


def normalise(frames, channels=slice(None)):
    """uint8 (..., C, H, W) -> float32, mean 0, deviation 1. channels: which of red, green, blue."""
    mean, std = (x[channels, None, None].to(frames.device) for x in (MEAN, STD))
    return (frames / 255).sub_(mean).div_(std)


def natural(name):
    """Sort key: frame2 before frame10."""
    words = re.split("([0-9]+)", name.lower())
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


def is_readable(file):
    """Whether pillow opens files of this extension. MPEG it only recognises."""
    kind = Image.registered_extensions().get(os.path.splitext(file)[1].lower())
    return kind in Image.OPEN and kind != "MPEG"


def frames_of_file(file):
    """An image file -> its frames: itself, or FILE#0, FILE#1, ... of an animated one."""
    if not ANIMATED.fullmatch(f"{file}#0"):
        return [file]
    with opened(file) as image:
        pictures = getattr(image, "n_frames", 1)
    return [file] if pictures == 1 else [f"{file}#{n}" for n in range(pictures)]


def find_footage(path):
    """Folders of frames -> {name of a tracklet: paths of its frames}, both in natural order. A
    tracklet is path, or a folder of images below it, or an animated file. Raises UserError."""
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise UserError(f"no folder {path}; expected folders of frames; check the path")
    found = defaultdict(list)    # a folder or an animated file -> its frames
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(files, key=natural):
            if is_readable(name) and not name.startswith("."):
                frames = frames_of_file(os.path.join(folder, name))
                found[Path(folder, name if len(frames) > 1 else "")] += frames
    if not found:
        raise UserError(f"no frames under {path}; expected a folder of images for each tracklet; "
                        "from a video, extract the frames first")
    for place in found:
        if above := found.keys() & set(place.parents):
            raise UserError(f"{min(above)} holds loose frames beside folders of frames; expected "
                            "one or the other; move them into a folder of their own")
    named = {place.relative_to(path).as_posix(): tuple(found[place]) for place in found}
    if "." in named:    # the folder itself
        return {path.name: named["."]}
    return {name: named[name] for name in sorted(named, key=natural)}
