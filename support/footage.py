"""Frames from image files: one picture, a user's own folders of them, a cache of decoded ones.

    frame.png, or walk.gif#3 -> read_frame -> uint8 (3, H, W)
    DIR/camera 1/007/frame1.png ... frame24.png, DIR/camera 2/walk.gif
        -> find_footage -> {"camera 1/007": 24 paths, "camera 2/walk.gif": ..., ...}
    training frames -> FrameCache, one file -> read(paths) -> uint8 (T, 3, H, W)

`python evaluate.py --query DIR --gallery DIR` reads a user's own frames, of which nobody knows
whose they are. Only regular files are opened: a pipe would be waited for, for ever.

Quick question: why are loose frames beside folders of frames refused, when one could take them for
one more tracklet? (They may as well be previews, or one picture each of many people. A wrong
tracklet is found by nobody; a refused folder is mended.)

Ours, not the papers': all of it.
"""
import functools
import hashlib
import json
import os
import re
import signal
import stat
import zlib
from collections import deque

from support.files import UserError, in_short, printable, write_atomic
from support.options import Bar

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence

# "walk.gif#3": the picture of that number, from 0, of an animated file.
ANIMATED = re.compile(r"(.+\.(?:gif|tiff?|webp|apng|avifs?))#(\d+)", re.IGNORECASE | re.DOTALL)
MOST_PIXELS = 2 ** 30    # of an animated file in all: they are decoded together
MOST_PICTURES = 2 ** 15

# ------------------------------------------------------------- one frame ----


def open_image(path):
    """A regular file as an image that is not decoded yet. Raises OSError for any other."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("neither a file nor a link to one")
    return Image.open(path)


def picture(image, size):
    """An open image -> uint8 (3, H, W), upright, resized bilinearly.

    Deeper ones than 8 bits, as thermal cameras write them, are stretched from their darkest to
    their brightest value."""
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
    """The file in which a frame lies: walk.gif of walk.gif#3."""
    animated = ANIMATED.fullmatch(frame)
    return animated[1] if animated else frame


def check_pixels(path, pictures, pixels):
    """Raises UserError if an animated file holds more than can be decoded together."""
    if pictures > MOST_PICTURES or pixels > MOST_PIXELS:
        raise UserError(f"{path} holds {pictures:,} pictures and {pixels:,} pixels in all; "
                        f"expected at most {MOST_PICTURES:,} and {MOST_PIXELS:,}; extract its "
                        "frames into a folder first")


def number_of_pictures(path, image):
    """Of an open image, none of which is decoded for it. Raises UserError if they are too many."""
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1:
        check_pixels(path, pictures, pictures * image.width * image.height)
    return pictures


@functools.lru_cache(maxsize=1)
def animation(path, size, modified):
    """All pictures of an animated file as frames: each builds on the one before, so reading one
    alone costs as much. modified: when the file was; another of that name is read anew."""
    frames, pixels = [], 0
    with open_image(path) as image:
        pictures = number_of_pictures(path, image)
        for page in ImageSequence.Iterator(image):
            # The pages of a TIFF have a size each: the first says nothing of the others.
            pixels += page.width * page.height
            check_pixels(path, pictures, pixels)
            frames.append(picture(page.copy(), size))
    return frames


def read_frame(path, size):
    """One frame -> uint8 (3, H, W), see picture. path: a PIL image will do too. Raises UserError
    that names an unreadable file."""
    if isinstance(path, Image.Image):
        return picture(path.copy(), size)    # the caller's stays as it is
    animated = ANIMATED.fullmatch(path)
    try:
        if animated:
            file, number = animated.groups()
            return animation(file, tuple(size), os.path.getmtime(file))[int(number)]
        with open_image(path) as image:
            return picture(image, size)
    except UserError:
        raise
    except Exception as error:    # pillow raises a dozen types for a bad file
        raise UserError(f"{path} cannot be read as an image ({in_short(error)}); download it "
                        "again, or see python data.py for all such files") from None


# ----------------------------------------------------- a user's own frames ----


def natural(name):
    """Sort key: frame2 before frame10."""
    words = re.split("([0-9]+)", name.lower())
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


def readable_extensions():
    """Those of the formats that pillow opens. MPEG it only recognises."""
    formats = Image.registered_extensions()
    return {extension for extension, name in formats.items()
            if name in Image.OPEN and name != "MPEG"}


def contains(folder, other):
    """Two real paths: is the other folder this one, or one in it?"""
    return os.path.join(other, "").startswith(os.path.join(folder, ""))


def list_folder(folder):
    """-> paths of its files and of its folders, in natural order, the hidden ones left out. Raises
    UserError."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
        folders = [entry.path for entry in entries if entry.is_dir()]
        files = [entry.path for entry in entries if not entry.is_dir()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({in_short(error)}); check its permissions, or "
                        "remove it") from None
    return sorted(files, key=natural), sorted(folders, key=natural)


def folders_under(path):
    """Yields a folder and each one in it, at any depth, as (its path, paths of its files).

    Links are followed, but not upwards, and after all else: so each folder comes once, however many
    links lead to it, and by its own name if it has one here. Raises UserError."""
    top = os.path.realpath(path)
    waiting, visited = deque([path]), set()
    while waiting:
        folder = waiting.popleft()
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        files, folders = list_folder(folder)
        yield folder, files
        own = [inner for inner in folders if not os.path.islink(inner)]
        waiting.extendleft(reversed(own))
        for inner in folders:
            target = os.path.realpath(inner)
            leads_up = contains(target, top) or contains(target, real)
            if os.path.islink(inner) and not leads_up:
                waiting.append(inner)


def frames_of_file(file):
    """An image file -> paths of its frames: itself, or FILE#0, FILE#1, ... of an animated one.
    Raises UserError."""
    if not ANIMATED.fullmatch(f"{file}#0"):
        return [file]
    try:
        with open_image(file) as image:
            pictures = number_of_pictures(file, image)
    except UserError:
        raise
    except Exception as error:    # pillow raises a dozen types for a bad file
        raise UserError(f"{file} cannot be read as an image ({in_short(error)}); export it again "
                        "or remove it") from None
    return [file] if pictures == 1 else [f"{file}#{n}" for n in range(pictures)]


def check_no_loose_frames(found, path):
    """Raises UserError if a folder that holds frames has other tracklets somewhere below."""
    for frames in found.values():
        folder = os.path.dirname(frames[0])
        while len(folder) > len(path):
            folder = os.path.dirname(folder)
            if folder in found:
                raise UserError(f"{folder} holds {len(found[folder])} loose frames beside folders "
                                "of frames; expected one or the other; move them into a folder of "
                                "their own")


def find_footage(path):
    """A user's own footage -> {name of a tracklet: paths of its frames}, both in natural order.

    path: a folder with a folder of frames per tracklet, at any depth (the names are relative to
    it), or a folder of frames. An animated GIF, WebP, APNG or AVIF or a TIFF of several pages,
    there or given itself, is a tracklet too. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"no folder {path}; expected a folder of frames per tracklet; check the "
                        "path")
    path = os.path.normpath(path)
    is_folder = os.path.isdir(path)
    folders = folders_under(path) if is_folder else [(path, [path])]
    readable = readable_extensions()
    found, ignored = {}, set()    # path of a folder or an animated file -> its frames
    for folder, files in folders:
        for file in files:
            name = os.path.basename(file)
            extension = os.path.splitext(name)[1].lower()
            if extension not in readable:
                ignored.add(extension or name)
                continue
            frames = frames_of_file(file)
            place = folder if frames == [file] else file
            found.setdefault(place, []).extend(frames)
    check_no_loose_frames(found, path)
    if not found:
        only = f" (only {' '.join(sorted(ignored)[:5])} files)" if ignored else ""
        raise UserError(f"no frames under {path}{only}; expected a folder of images per tracklet; "
                        "of a video, extract the frames first")
    named = {}
    for place, frames in found.items():
        name = os.path.relpath(place, path).replace(os.sep, "/")
        if place == path:
            name = os.path.basename(os.path.abspath(path))
        named[name] = tuple(frames)
    return {name: named[name] for name in sorted(named, key=natural)}


def is_mask(frame):
    """Is the picture of two colours at most, as a mask is? False for one that cannot be read:
    whoever reads it will say so."""
    try:
        with open_image(file_of(frame)) as image:
            if image.mode.startswith(("I", "F")):    # deeper than 8 bits: convert clips them
                return len(np.unique(np.asarray(image))) <= 2
            return image.convert("L").getcolors(2) is not None
    except Exception:    # pillow raises a dozen types for a bad file
        return False


# ------------------------------------------------------- a cache of frames ----


def ignore_interrupts(worker):
    """For loader processes: Ctrl-C goes to the whole group, but what to do about it is for the main
    process to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def relative(path, root):
    """The path as seen from root; itself where no way leads there, as to another drive."""
    try:
        return os.path.relpath(path, root)
    except ValueError:
        return path


class FrameFiles(torch.utils.data.Dataset):
    """[index] -> frame uint8 (3, H, W)."""

    def __init__(self, frames, size):
        self.frames, self.size = frames, size

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return read_frame(self.frames[index], self.size)


def state_of_files(files):
    """Paths -> {path: (bytes, time of its last change in ns)}. Folder by folder: half a million
    single look-ups would take minutes on NFS."""
    wanted, states = set(files), {}
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                if path in wanted:
                    state = entry.stat()
                    states[path] = state.st_size, state.st_mtime_ns
    return states


def read_at(file, count, offset):
    """`count` bytes of an open file from `offset` on, or fewer where it ends."""
    if hasattr(os, "pread"):    # moves no position, which forked processes share
        return os.pread(file.fileno(), count, offset)
    file.seek(offset)
    return file.read(count)


class FrameCache:
    """--cache: frames, resized to size (H, W), in one file, which is made where there is none.

    64 hex digits that name the frames (their paths below root, their bytes and times of change, H
    and W), then uint8 (N, 3, H, W), then a CRC-32 of each frame. Read, and not mapped into memory:
    where a mapped file is cut short, the system ends the process. A process checks a frame when it
    first reads it. Raises UserError for a file that is another's or damaged."""
    NAME = 64    # bytes
    CHECKSUM = np.dtype("<u4")

    def __init__(self, path, frames, *, size, root, workers=0):
        frames = list(dict.fromkeys(frames))
        self.path, self.shape = path, (3, *size)
        self.frame_bytes = 3 * size[0] * size[1]
        self.row = {frame: i for i, frame in enumerate(frames)}
        self.name = self._name_of(frames, root)
        self.file = self.checksums = self.verified = None
        if not os.path.lexists(path):
            write_atomic(path, lambda file: self._write(file, workers))
        self._open()

    def __getstate__(self):
        """For processes that are spawned: each opens the file for itself."""
        return {**self.__dict__, "file": None}

    def _name_of(self, frames, root):
        """64 hex digits that no other frames have, nor these when one of them changes."""
        files = [file_of(frame) for frame in frames]
        try:
            states = state_of_files(files)
            named = [(relative(frame, root), *states[file])
                     for frame, file in zip(frames, files, strict=True)]
        except (OSError, KeyError) as error:
            raise UserError(f"the training frames changed while --cache was made ({error}); start "
                            "again") from None
        H, W = self.shape[1:]
        return hashlib.sha256(json.dumps([[H, W], *named]).encode()).hexdigest().encode()

    def _write(self, file, workers):
        file.write(self.name)
        frames = FrameFiles(list(self.row), self.shape[1:])
        # A generator of its own: making a cache leaves the run's random numbers alone.
        loader = torch.utils.data.DataLoader(frames, batch_size=64, num_workers=workers,
                                             worker_init_fn=ignore_interrupts,
                                             generator=torch.Generator())
        checksums = []
        with Bar(f"cache {printable(self.path)}", len(frames), keep=True) as bar:
            for batch in loader:
                for frame in batch.numpy():
                    file.write(frame)
                    checksums.append(zlib.crc32(frame))
                bar.update(len(batch))
        file.write(np.array(checksums, self.CHECKSUM).tobytes())

    def _open(self):
        N = len(self.row)
        end_of_frames = self.NAME + N * self.frame_bytes
        expected = end_of_frames + N * self.CHECKSUM.itemsize
        try:
            if not os.path.isfile(self.path):
                raise OSError("neither a file nor a link to one")
            self.file = open(self.path, "rb", buffering=0)    # noqa: SIM115 - for the cache's life
            fits = os.fstat(self.file.fileno()).st_size == expected
            name = read_at(self.file, self.NAME, 0)
            checksums = read_at(self.file, expected - end_of_frames, end_of_frames)
        except OSError as error:
            raise UserError(f"--cache {self.path} cannot be read ({in_short(error)}); expected a "
                            "file, or a name that is free") from None
        if not fits or name != self.name or len(checksums) != expected - end_of_frames:
            H, W = self.shape[1:]
            raise UserError(f"--cache {self.path} holds other frames, or another --size, or is cut "
                            f"short; expected the {N:,} training frames at {H}x{W} as they are "
                            "now: name another file, or remove this one")
        self.checksums = np.frombuffer(checksums, self.CHECKSUM)
        self.verified = bytearray(N)    # 1 for each frame that was found whole

    def read(self, paths):
        """T paths -> uint8 (T, 3, H, W)."""
        if self.file is None:
            self._open()
        frames = np.empty((len(paths), self.frame_bytes), np.uint8)
        for t, path in enumerate(paths):
            frames[t] = np.frombuffer(self._read_row(self.row[path]), np.uint8)
        return torch.from_numpy(frames.reshape(-1, *self.shape))

    def _read_row(self, row):
        """The bytes of a frame."""
        try:
            frame = read_at(self.file, self.frame_bytes, self.NAME + row * self.frame_bytes)
        except OSError as error:
            raise self._damage(in_short(error)) from None
        if len(frame) != self.frame_bytes:
            raise self._damage("it was cut short")
        if not self.verified[row]:
            if zlib.crc32(frame) != self.checksums[row]:
                raise self._damage(f"frame {row + 1:,} is not what was written")
            self.verified[row] = 1
        return frame

    def _damage(self, what):
        return UserError(f"--cache {self.path} is damaged ({what}); expected it as it was made: "
                         "remove it, and it is made again")
