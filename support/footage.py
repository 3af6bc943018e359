"""Frames from image files: one picture, and folders of frames."""
import functools
import os
import re
import warnings
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from support.files import UserError, in_short

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps

PATH = str, os.PathLike
warnings.filterwarnings("ignore", module="PIL")    # about metadata: pixels count

# "walk.gif#3": picture 3, counted from 0, of an animated file.
ANIMATED = re.compile(r"(.+\.(?:gif|tiff?|webp|apng|avifs?))#(\d+)\Z", re.IGNORECASE | re.DOTALL)
# In what pillow says of a file: colours of 16 bits, of which it keeps 8; PPM's largest value.
DEEP_COLOUR = re.compile(r";16|'RGB', \d{4}")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])    # ImageNet's


def upright(image):
    """A copy, turned as its orientation tag says, if that can be read."""
    image = image.copy()
    with suppress(Exception):    # other tags may be broken
        ImageOps.exif_transpose(image, in_place=True)
    return image


def picture(image, size):
    """An open image -> uint8 (3, H, W), upright, resized bilinearly. Gray pictures deeper than 8
    bits, as thermal cameras write them, are stretched between the first and the last percentile of
    their finite values: a broken pixel does not count."""
    H, W = size
    is_gray = image.mode.startswith(("I", "F"))    # I, F, I;16 and its byte orders
    if not is_gray and DEEP_COLOUR.search(str(getattr(image, "tile", ""))):
        raise ValueError("it has colours of up to 16 bits: convert it to 8 bits, or to gray")
    image = upright(image)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if is_gray:
        deep = np.asarray(image, np.float32)
        low, high = np.percentile(deep[np.isfinite(deep)], (1, 99))
        deep = (deep - low) * (255 / max(high - low, 1e-6))
        image = Image.fromarray(np.nan_to_num(deep).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB").resize((W, H), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.moveaxis(np.asarray(image), 2, 0).copy())


@contextmanager
def opened(frame):
    """The open image of a path, an array or an image. Raises UserError for whatever fails in it."""
    is_path = isinstance(frame, PATH)
    try:
        image = Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame
        ImageFile.LOAD_TRUNCATED_IMAGES = True    # metadata may be torn, ...
        with Image.open(frame) if is_path else nullcontext(image) as image:
            ImageFile.LOAD_TRUNCATED_IMAGES = False    # ... pixels may not
            yield image
    except Exception as error:    # pillow raises a dozen types for a bad file
        name = frame if is_path else f"a frame of type {type(frame).__name__}"
        raise UserError(f"{name} cannot be read as an image ({in_short(error)}); extract or "
                        "download it again; python data.py PATH lists all in a dataset") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False    # also if it could not even be opened


def pages(image):
    """The numbers of an open file's pictures, without a TIFF's previews, an MPO's second view."""
    numbers = []
    for n in range(1 if image.format == "MPO" else getattr(image, "n_frames", 1)):
        if image.format == "TIFF":
            image.seek(n)
        if not getattr(image, "tag_v2", {}).get(254, 0) & 1:    # the tag of reduced pages
            numbers.append(n)
    return numbers or [0]


@functools.lru_cache(1)
def animation(path, size):
    """{number: picture} of an animated file: each builds on the one before."""
    found = {}
    with opened(path) as image:
        for n in pages(image):
            image.seek(n)
            found[n] = picture(image, size)
    return found


def file_of(frame):
    """The file that holds a frame: walk.gif for walk.gif#3."""
    return ANIMATED.sub(r"\1", os.fspath(frame))


def read_frame(frame, size):
    """A path, a PIL image or a uint8 array (H, W, 3), RGB (OpenCV has BGR), or (H, W) -> uint8
    (3, H, W), see picture. Raises UserError that names an unreadable file."""
    is_path = isinstance(frame, PATH)
    if is_path and (animated := ANIMATED.fullmatch(os.fspath(frame))):
        file, number = animated.groups()
        return animation(file, tuple(size))[int(number)]
    with opened(frame) as image:
        if is_path:
            first, *others = pages(image)
            if others:
                raise ValueError(f"it holds {1 + len(others)} pictures: name it .apng, .gif, .webp "
                                 "or .tiff and list its folder again")
            image.seek(first)
        return picture(image, size)


def read_frames(frames, size):
    """T frames as in read_frame -> uint8 (T, 3, H, W)."""
    return torch.stack([read_frame(frame, size) for frame in frames])


def notes_on(frames):
    """Paths of frames -> [a warning] if most of a sample are whole camera pictures, else []."""
    some, wide = frames[::len(frames) // 9 + 1], 0
    for frame in some:
        with suppress(UserError), opened(file_of(frame)) as image:
            width, height = upright(image).size
            wide += width > height
    return ["the frames are wider than high; expected crops of one person, twice as high as wide"
            ] if 2 * wide > len(some) else []


def true_masks(root, frames, size):
    """The true silhouettes, bool (T, H, W), of a dataset with masks/ (walkers have), or None."""
    masks = [Path(root, "masks", os.path.relpath(frame, root)).with_suffix(".png")
             for frame in frames]
    there = all(map(os.path.isfile, masks))
    return read_frames(masks, size)[:, 0] > 127 if there else None


@functools.cache
def sent(constant, device):
    """A constant tensor on a device. It is sent once: a copy from the CPU waits for the GPU."""
    with torch.inference_mode(False):
        return constant.to(device)


def normalise(frames, channels=slice(None)):
    """uint8 (..., C, H, W) -> float32, mean 0, deviation 1. channels: which of red, green, blue."""
    mean, std = (sent(x, frames.device)[channels, None, None] for x in (MEAN, STD))
    return (frames / 255).sub_(mean).div_(std)


def as_pixels(frames):
    """The inverse of normalise: float32 (..., 3, H, W) -> in 0..1."""
    mean, std = (sent(x, frames.device)[:, None, None] for x in (MEAN, STD))
    return frames * std + mean


def natural(path):
    """Sort key: frame2 before frame10, and im.png before im2.png: endings come last."""
    def key(text):
        words = re.split("([0-9]+)", text.lower())
        return [int(word) if i % 2 else word for i, word in enumerate(words)]

    return [list(map(key, os.path.splitext(name))) for name in path.split("/")], path


def is_readable(file):
    """Whether pillow opens files of this extension. It recognises MPEG, but cannot open it."""
    kind = Image.registered_extensions().get(os.path.splitext(file)[1].lower())
    return kind in Image.OPEN and kind != "MPEG"


def frames_of_file(file):
    """An image file -> its frames: itself, or FILE#0, FILE#1, ... of an animated one."""
    if not ANIMATED.fullmatch(f"{file}#0"):
        return [file]
    numbers = [0]
    with suppress(UserError), opened(file) as image:    # it will be named when it is read
        numbers = pages(image)
        if len(numbers) == 1:
            return [file]
    return [f"{file}#{n}" for n in numbers]


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
                file = os.path.join(folder, name)
                frames = frames_of_file(file)
                found[Path(folder, "" if frames == [file] else name)] += frames
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
