"""Footage: a user's own frames, of which nobody knows whose they are, as tracklets to search for and to search in.

    DIR/camera 1/007/frame1.png ... frame24.png -> {"camera 1/007": Tracklet of 24 frames, "camera 2/walk.gif": ..., ...}

`python evaluate.py --query DIR --gallery DIR` reads them. The benchmarks, with their lists, are data.py's.

Quick question: why are loose frames beside folders of frames refused, when one could take them for one more tracklet? (They may
as well be previews, or one picture each of many people. A wrong tracklet is found by nobody; a refused folder is mended.)

Ours, not the paper's: all of it.
"""
import os
import re

from PIL import Image

from data import ANIMATED, Tracklet, UserError


def natural(name):
    """Sort key: frame2 before frame10."""
    return [int(word) if i % 2 else word for i, word in enumerate(re.split("([0-9]+)", name.lower()))], name


def read_footage(path, modality):
    """A user's own footage -> {name: Tracklet} in natural order; pid -1, camera "".

    path: a folder with a folder of frames per tracklet, at any depth (the names are relative to it), or a folder of frames. An
    animated GIF, WebP, APNG or AVIF or a TIFF of several pages, there or given itself, is a tracklet too. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"no folder {path}; expected a folder of frames per tracklet; check the path")
    path = os.path.normpath(path)
    readable = {extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN and name != "MPEG"}    # which pillow only recognises
    found, ignored = {}, set()    # found: path of folder or animated file -> its frames
    is_folder = os.path.isdir(path)

    def unreadable(error):    # os.walk would leave the folder out in silence
        raise error

    def leads_back(link, folder):
        """Does a link in this folder lead to it, or to what is above it on the way here?"""
        target = os.path.join(os.path.realpath(link), "")
        while not os.path.join(os.path.realpath(folder), "").startswith(target):
            if folder == path:
                return False
            folder = os.path.dirname(folder)
        return True

    whole = os.walk(path, onerror=unreadable, followlinks=True) if is_folder else [(os.path.dirname(path), [], [os.path.basename(path)])]
    for folder, folders, files in whole:
        inner = {name: os.path.join(folder, name) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, place in inner.items() if not (os.path.islink(place) and leads_back(place, folder))]
        for name in sorted(files, key=natural):
            file, extension = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if name.startswith(".") or extension not in readable:
                ignored.add(extension or name)
                continue
            pictures = 1
            if ANIMATED.fullmatch(name + "#0"):
                try:
                    with Image.open(file) as image:
                        pictures = getattr(image, "n_frames", 1)
                except Exception as error:    # pillow raises a dozen types for a bad file
                    raise UserError(f"{file} cannot be read as an image ({' '.join(str(error).split())[:120]}); export it again or remove it") from None
            if pictures > 1:
                found[file] = [f"{file}#{n}" for n in range(pictures)]
            else:
                found.setdefault(folder if is_folder else file, []).append(file)
    for frames in found.values():
        folder = os.path.dirname(frames[0])
        while len(folder) > len(path):
            folder = os.path.dirname(folder)
            if folder in found:
                raise UserError(f"{folder} holds {len(found[folder])} loose frames beside folders of frames; expected one or the other; move "
                                "them into a folder of their own")
    if not found:
        raise UserError(f"no frames under {path}" + f" (only {' '.join(sorted(ignored)[:5])} files)" * bool(ignored) + "; expected a folder of "
                        "images per tracklet; of a video, extract the frames first")
    tracklets = {}
    for place, frames in found.items():
        name = os.path.basename(os.path.abspath(path)) if place == path else os.path.relpath(place, path).replace(os.sep, "/")
        tracklets[name] = Tracklet(tuple(frames), -1, "", modality)
    return {name: tracklets[name] for name in sorted(tracklets, key=natural)}
