"""Walkers: synthetic pedestrians, filmed by day in visible light and by night in infrared.

The default dataset, drawn offline from a seed. An identity is a body, a gait and clothes; a camera
is an angle, a place and a lens. Only paint and place depend on the modality:

    walker: body, gait, clothes --+                       paint + place by day    (h, w, 3) .jpg
                                  +--> looks (2h, 2w) --> paint + place by night  (h, w)    .jpg
    camera: angle, size, jitter --+                       any look: mask          (h, w)    .png

`python walkers.py DIR` writes the layout of HITSZ-VCM (docs/data.md):

    DIR/Train/0001/rgb/D3/1.jpg        or Test/: pid 0001, visible (ir: infrared), camera 3, frame 1
    DIR/masks/Train/0001/rgb/D3/1.png  the true silhouette of that frame, 0 or 255
    DIR/info/*.txt                     the lists of HITSZ-VCM
    DIR/sentences.json                 {pid: what the person is and wears, in words}
    DIR/walkers.json                   the numbers that it was made with

Quick question: would a network that learns colours do well here? (By day it would. Across
modalities it would guess: see tests/test_walkers.py.)

Ours, not the papers': all but the layout. A good score shows that the code works, no more: places
are blurred; every walker is alone, whole and centred, and approaches at 25 to 65 degrees.
"""
import json
import math
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from support import pedestrian
from support.files import UserError
from support.footage import normalise, read_frame
from support.options import Parser, add_options, cli, fill, option, progress
from support.pedestrian import HAIR, ROLES, SKIN, Garment, View, Walker, draw_walker

import numpy as np
import torch
from numpy.random import default_rng
from PIL import Image, ImageDraw, ImageFilter

DRAWING = 2    # raise it when the pictures change: folders with older pictures are then refused
SUPERSAMPLING = 2    # people are drawn this many times larger, then averaged
NUMBER = {"infrared": 1, "visible": 2}    # of the modalities in HITSZ-VCM's names (M1) and lists

# Separate random streams: default_rng([seed, stream, ...])
OF_WALKER, OF_PAINT, OF_CAMERA, OF_PLAN, OF_TRACKLET = range(5)
PLACES = str.split("windows bricks hedge fence shutters posters")
# The clothes of people in uniform (--uniform): only their bodies and gaits differ.
UNIFORM = {
    "top": "jacket", "bottom": "trousers", "upper": Garment("banded", 0.12, 0.5, 0.15),
    "lower": Garment("plain", 0.12, 0.5, 0.1), "bag": "none", "hair": "a cap"}


def make_walker(seed, pid, uniform=False):
    """-> the Walker with that number. uniform: dressed in UNIFORM."""
    rng = default_rng([seed, OF_WALKER, pid])

    def one_of(words, probabilities=None):
        return list(words)[rng.choice(len(words), p=probabilities)]

    def garment(plain):
        pattern = one_of(pedestrian.PATTERNS, [plain] + [(1 - plain) / 8] * 8)    # 8 others
        return Garment(pattern, *rng.uniform((0.12, 0.35, 0.06), (0.24, 0.6, 0.2)).tolist())

    # The order matters: each value is the next one of the same stream.
    # Least and most: stature, leg, head, shoulder, hip, girth, depth, arm
    body = rng.uniform((0.945, 0.44, 0.11, 0.085, 0.06, 0.7, 0.055, 0.30),
                       (1.055, 0.53, 0.15, 0.135, 0.105, 1.4, 0.085, 0.36))
    # pace, step, swing, knee, elbow, lean, uneven, bounce, sway
    gait = rng.uniform((0.8, 0.3, 0.1, 0.5, 0.05, -0.03, -0.25, 0, 0),
                       (1.2, 0.55, 0.55, 1.2, 0.55, 0.16, 0.25, 0.012, 0.015))
    walker = Walker(
        *body.tolist(), *gait.tolist(),
        top=one_of(pedestrian.UPPERS), bottom=one_of(pedestrian.LOWERS),
        upper=garment(plain=0.12), lower=garment(plain=0.2),
        bag=one_of(pedestrian.BAGS), bag_side=one_of((pedestrian.RIGHT, pedestrian.LEFT)),
        bag_size=rng.uniform(0.8, 1.3), hair=one_of(pedestrian.HAIRS))
    return replace(walker, **UNIFORM) if uniform else walker


def make_paint(seed, pid, modality):
    """-> (roles, 2, C) in 0..1, C = 3 if visible, 1 if infrared. The second tone of a role is that
    of its pattern. The modalities are independent, and neither dark nor bright means "person"."""
    rng = default_rng([seed, OF_PAINT, pid, NUMBER[modality]])
    # The two tones are at least 0.3 apart, and either may be the brighter one.
    tones = rng.uniform(0.05, 0.95 - 0.3, (len(ROLES), 2, 1))
    tones[:, 1] = rng.uniform(tones[:, 0] + 0.3, 0.95)
    tones = rng.permuted(tones, axis=1)
    tones[HAIR] = rng.uniform(0.05, 0.6)
    tones[SKIN] = rng.uniform(0.3, 0.85)
    if modality == "infrared":
        return tones
    hue = rng.random(tones.shape) + [0, 1 / 3, 2 / 3]
    saturation = rng.uniform(0.2, 1, tones.shape)
    colour = 1 - saturation * np.clip(2 - np.abs(6 * (hue % 1) - 3), 0, 1)
    colour[[SKIN, HAIR]] = 0.85, 0.58, 0.42
    return in_colour(tones, colour)


def in_colour(tones, colour):
    """tones (..., 1), colour (..., 3) -> that colour, scaled or mixed with white to those tones."""
    grey = colour @ [[0.299], [0.587], [0.114]]
    darker = colour * tones / grey
    lighter = 1 - (1 - colour) * (1 - tones) / (1 - grey + 1e-9)
    return np.where(grey > tones, darker, lighter)


# ----------------------------------------------- cameras, what they film ----

@cache    # a place takes long to draw
class Camera:
    """Number `number` of 1 to `cameras`: a lens and the place in front of it."""

    def __init__(self, seed, number, cameras, height):
        # The angles are evenly spread over 25 to 65 degrees, the kinds of places over the cameras.
        order = default_rng([seed, OF_CAMERA])
        turn, kind = (order.permutation(cameras)[number - 1] for _ in range(2))
        self.azimuth = math.radians(25 + 40 * (turn + 0.5) / cameras)    # from frontal
        rng = default_rng([seed, OF_CAMERA, number])
        h = 2 * round(height * rng.uniform(0.875, 1.125) / 2)
        self.place = draw_place(rng, h, PLACES[kind % len(PLACES)])
        self.tilt = rng.uniform(0.06, 0.14)    # pixels down per pixel nearer
        self.zoom = rng.uniform(0.84, 0.86)    # average body height, in frame heights
        self.light = {"visible": rng.uniform(0.88, 1.0) * rng.uniform(0.96, 1.04, 3),
                      "infrared": rng.uniform(0.93, 1.0, 1)}
        self.blur = rng.uniform(0.2, 0.6)    # pixels
        self.noise = rng.uniform(0.008, 0.02)    # of 0..1
        self.quality = int(rng.integers(85, 96))    # of the JPEG files


def draw_place(rng, h, kind):
    """-> {modality: (h, h, C) in 0..1}: twice as wide as a frame, to pan over."""
    brightness, horizon = draw_brightness(rng, h, kind)
    place = {}
    for modality in "visible", "infrared":
        # The night has other reflectances: half of the places are inverted.
        if modality == "infrared" and rng.random() < 0.5:
            brightness = 1 - brightness
        contrast = rng.uniform(0.1, 0.3)
        place[modality] = rng.uniform(0.05, 0.95 - contrast) + contrast * brightness[:, :, None]
    wall, ground = rng.uniform(0.6, 1, (2, 3))
    tint = np.where(np.arange(h)[:, None, None] < horizon, wall, ground)
    place["visible"] = in_colour(place["visible"], tint / tint.max(2, keepdims=True))
    # An infrared lamp lights the middle.
    place["infrared"] *= 1 - 0.5 * np.linspace(-1, 1, h)[:, None, None] ** 2 * rng.uniform(0.3, 1)
    return place


def draw_brightness(rng, h, kind):
    """-> the brightness (h, h) in 0..1 of a wall behind a ground, and the row of the horizon."""
    def tone():
        return int(rng.integers(256))

    def length(least, most):
        return h * rng.uniform(least, most)

    horizon, thin = int(length(0.55, 0.75)), 1 + h // 100
    wall, ground = (np.linspace(*rng.uniform(0, 1, 2), h) for _ in range(2))
    rows = np.where(np.arange(h) < horizon, wall, ground)
    image = Image.fromarray(np.repeat(np.uint8(255 * rows)[:, None], h, axis=1))
    pen = ImageDraw.Draw(image)
    match kind:
        case "windows":
            across, down, fill = length(0.15, 0.35), length(0.18, 0.35), tone()
            for x in np.arange(rng.uniform(0, across), h, across):
                for y in np.arange(length(0.02, 0.1), horizon - 0.6 * down, down):
                    pen.rectangle([x, y, x + 0.6 * across, y + 0.65 * down], fill=fill)
        case "bricks":
            size, joint = length(0.05, 0.1), tone()
            for row, y in enumerate(np.arange(0, horizon, size)):
                pen.line([0, y, h, y], fill=joint, width=thin)
                for x in np.arange(size * (row % 2), h, 2 * size):
                    pen.line([x, y, x, y + size], fill=joint, width=thin)
        case "hedge":
            leaf = length(0.02, 0.06)
            for x, y in rng.uniform(0, (h, horizon), (300, 2)):
                pen.ellipse([x - leaf, y - leaf, x + leaf, y + leaf], fill=tone())
        case "fence":
            apart, fill, top = length(0.06, 0.16), tone(), length(0, 0.3)
            for x in np.arange(rng.uniform(0, apart), h, apart):
                pen.rectangle([x, top, x + 0.4 * apart, horizon], fill=fill)
            pen.rectangle([0, top + 0.1 * h, h, top + 0.12 * h], fill=fill)
        case "shutters":
            apart, fill = length(0.04, 0.12), tone()
            for y in np.arange(0, horizon, apart):
                pen.rectangle([0, y, h, y + 0.5 * apart], fill=fill)
        case "posters":
            for _ in range(12):
                x, y = rng.uniform(-0.1, 1, 2) * (h, horizon)
                width, height = rng.uniform(0.08, 0.35, 2) * h
                pen.rectangle([x, y, x + width, min(y + height, horizon)], fill=tone())
    # Poles and trunks
    least, most = (0, -0.3, 0.01, 0), (1, 0.3, 0.05, 0.1)
    for x, y, thick, below in rng.uniform(least, most, (rng.integers(4), 4)):
        pen.rectangle([x * h, y * h, (x + thick) * h, horizon + below * h], fill=tone())
    # Kerbs and joints of the pavement
    for y in horizon + (h - horizon) * np.linspace(0.1, 1, rng.integers(1, 6)) ** 1.5:
        pen.line([0, y, h, y + length(-0.02, 0.02)], fill=tone(), width=thin)
    # A lens that is focused on people blurs what is behind them.
    blurred = image.filter(ImageFilter.GaussianBlur(h / 40))
    return np.asarray(blurred, np.float32) / 255, horizon


def paint_looks(paint, light):
    """paint (roles, 2, C), light (C,) -> (looks, C + 1) uint8: the colour and the opacity of each
    look that draw_walker returns."""
    shade = paint[pedestrian.ROLE_OF_INK] * pedestrian.SHADE_OF_INK
    colour = 255 * np.clip(shade * light, 0, 1)
    table = np.uint8(np.insert(colour, len(light), 255, axis=2))
    table[pedestrian.BACKGROUND] = 0
    return table.reshape(-1, len(light) + 1)


def draw_tracklet(rng, walker, paint, camera, modality, frames):
    """Yields a frame and its mask, PIL images (h, w), for each moment of a walk."""
    table = paint_looks(paint, camera.light[modality] * rng.uniform(0.97, 1.0))
    place = camera.place[modality].astype(np.float32)
    h, w = len(place), len(place) // 2
    H, W = SUPERSAMPLING * h, SUPERSAMPLING * w
    # People walk to the right or to the left.
    azimuth = rng.choice((-1, 1)) * (camera.azimuth + rng.uniform(-0.07, 0.07))
    phase, zoom, x, y = rng.uniform((0, 0.985, 0.47, 0.488), (2 * math.pi, 1.015, 0.53, 0.502))
    pace = 2 * math.pi * walker.pace / 12    # radians from frame to frame
    pan = rng.uniform(0, w) + np.arange(frames) * math.copysign(rng.uniform(0, 0.02), azimuth) * w
    for i, left in enumerate(np.clip(pan, 0, w).astype(int)):
        # A detector's boxes jitter.
        dx, dy, dz = rng.uniform(-1, 1, 3) * (0.01, 0.004, 0.006)
        size = H * camera.zoom * zoom * (1 + dz) * walker.stature
        view = View(azimuth, camera.tilt, size, complex(W * (x + dx), H * (y + dy) + size / 2))
        looks = draw_walker(walker, phase + i * pace, view, (H, W))
        # take is much faster than table[looks].
        person = Image.fromarray(np.take(table, looks, axis=0)).reduce(SUPERSAMPLING)
        person = np.asarray(person, np.float32) / 255    # (h, w, C + 1)
        colour, opacity = person[..., :-1], person[..., -1:]
        frame = colour + (1 - opacity) * place[:, left:left + w]
        frame += camera.noise * rng.standard_normal(frame.shape, np.float32)
        frame = Image.fromarray(np.uint8(255 * np.clip(frame, 0, 1)).squeeze())
        mask = Image.fromarray(np.uint8(255 * (opacity[..., 0] > 0.5)))
        yield frame.filter(ImageFilter.GaussianBlur(camera.blur)), mask


# ---------------------------------------------------------------- folder ----

@dataclass
class Options:
    train_identities: int = option(96, "people to train on")
    test_identities: int = option(60, "people to test on")
    tracklets: int = option(4, "per person and modality")
    frames: int = option(12, "per tracklet, at least 12")
    height: int = option(128, "pixels, varied by an eighth between cameras")
    cameras: int = option(6, "places, each by day and by night")
    uniform: float = option(0.0, "share of the people who are dressed alike")
    seed: int = option(0, "another seed draws other people and places")


def write_walker(folder, o, pid):
    """Draw one person by day and by night and write the pictures -> (pid, sentence), and (number of
    the modality, pid, camera, names of the frames) of each tracklet. o: Options."""
    is_train = pid <= o.train_identities
    split, nth = ("Train", pid) if is_train else ("Test", pid - o.train_identities)
    # The people in uniform are spread evenly.
    is_dressed = (nth * o.uniform + 1e-9) % 1 < o.uniform
    walker, written = make_walker(o.seed, pid, is_dressed), []
    plan = default_rng([o.seed, OF_PLAN, pid])
    for modality, short in ("infrared", "ir"), ("visible", "rgb"):
        code = NUMBER[modality]
        paint = make_paint(o.seed, 0 if is_dressed else pid, modality)    # 0 is the uniform's paint
        # Each tracklet has another camera as long as there are cameras left.
        rounds = [plan.permutation(o.cameras) + 1 for _ in range(0, o.tracklets, o.cameras)]
        chosen = sorted(np.concatenate(rounds)[:o.tracklets].tolist())
        for track, number in enumerate(chosen):
            camera = Camera(o.seed, number, o.cameras, o.height)
            rng = default_rng([o.seed, OF_TRACKLET, pid, code, track])
            place, names = f"{split}/{pid:04d}/{short}/D{number}", []
            pictures, masks = folder / place, folder / "masks" / place
            for parent in pictures, masks:
                parent.mkdir(parents=True, exist_ok=True)
            # Paths do not name the track: the second one of a camera continues the frame numbers.
            first = chosen[:track].count(number) * o.frames + 1
            walk = draw_tracklet(rng, walker, paint, camera, modality, o.frames)
            for i, (frame, mask) in enumerate(walk, first):
                frame.save(pictures / f"{i}.jpg", quality=camera.quality)
                mask.save(masks / f"{i}.png", compress_level=1)
                names.append(f"{pid:04d}M{code}D{number}T{track + 1}F{i}.jpg\n")
            written.append((code, pid, number, names))
    return (pid, pedestrian.describe(walker)), written


def write_info(info, split, tracklets):
    """Write the lists of one split. tracklets: what write_walker returns."""
    lines, tracks = [], []
    for code, pid, camera, names in tracklets:
        first = len(lines) + 1
        lines += names
        tracks.append(f"{code} {first} {len(lines)} {pid} {camera}\n")
    (info / f"{split}_name.txt").write_text("".join(lines))
    (info / f"track_{split}_info.txt").write_text("".join(tracks))
    if split == "test":    # the queries are the infrared tracklets
        rows = [str(row) for row, track in enumerate(tracks, 1) if track.startswith("1")]
        (info / "query_IDX.txt").write_text(" ".join(rows) + "\n")


def make_walkers(root, workers=None, **chosen):
    """Write the folder described above, unless it is there already. chosen: see Options. Raises
    UserError."""
    o = Options(**chosen)
    if o.frames < 12:
        raise UserError(f"frames {o.frames}; expected 12 or more: readers drop shorter tracklets")
    made = {"drawing": DRAWING, **vars(o)}
    root = Path(root).absolute()
    # The folder gets its name when it is whole.
    making = root.with_name(f".{root.name}.making-{os.getpid()}")
    try:
        if not root.exists():
            (making / "info").mkdir(parents=True)
            pids = range(1, 1 + o.train_identities + o.test_identities)
            # Only the main process reacts to Ctrl-C.
            ignored = signal.SIGINT, signal.SIG_IGN
            with multiprocessing.Pool(workers, signal.signal, ignored) as pool:
                people = pool.imap(partial(write_walker, making, o), pids)
                sentences, walks = zip(*progress(people, "walkers", len(pids)), strict=True)
            write_info(making / "info", "train", sum(walks[:o.train_identities], []))
            write_info(making / "info", "test", sum(walks[o.train_identities:], []))
            for name, value in ("sentences", dict(sentences)), ("walkers", made):
                (making / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
            os.replace(making, root)
            print(f"{root}: {o.train_identities} people to train on, "
                  f"{o.test_identities} to test on")
    except OSError as error:
        if not root.exists():    # or another process was quicker
            raise UserError(f"{root} cannot be written ({error}); give another DIR") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    file = root / "walkers.json"
    if not file.is_file() or json.loads(file.read_text()) != made:
        raise UserError(f"{root} holds something else than {made}; delete it, or give another DIR")


def drawn(people):
    """The default walkers, with so many people to train on, drawn if they are not there -> path."""
    path = "runs/walkers" if people == 96 else f"runs/walkers-{people}"
    make_walkers(path, train_identities=people)
    return path


def sample(people, T):
    """Some walkers for the chapters' demos -> uint8 frames (2 * people, T, 3, 128, 64), those by
    day first, their modality and label (2 * people,)."""
    frames = []
    for modality in "visible", "infrared":
        for pid in range(1, people + 1):
            camera, rng = Camera(0, pid % 6 + 1, 6, 128), default_rng(pid)
            paint = make_paint(0, pid, modality)
            walk = draw_tracklet(rng, make_walker(0, pid), paint, camera, modality, T)
            frames.append(torch.stack([read_frame(frame, (128, 64)) for frame, _ in walk]))
    modality = torch.arange(2).repeat_interleave(people)
    return torch.stack(frames), modality, torch.arange(people).repeat(2)


def show_losses(method):
    """Print the losses of a method's small preset, untrained, on a few walkers."""
    torch.manual_seed(1)
    model = method(fill(method.Options, method.small), classes=4, size=(128, 64))
    frames, modality, label = sample(people=4, T=3)
    losses, _ = model(normalise(frames), modality, label)
    for name, loss in losses.items():
        print(f"{name:20} {loss.item():8.4f}")


def main():
    parser = Parser(description="Draw walking people, visible and infrared, in HITSZ-VCM's layout.")
    parser.usage = "%(prog)s DIR [options]"
    parser.add_argument("root", metavar="DIR", help="the folder to make")
    add_options(parser, Options)
    make_walkers(**vars(parser.parse_args()))


if __name__ == "__main__":
    cli(main)
