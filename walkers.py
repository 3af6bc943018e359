"""Walkers: synthetic pedestrians, by day in visible cameras and by night in infrared ones.

What the code trains and is tested on by default, made offline from a seed. The task is the papers':
find the same person in the other modality, where colour is of no use. An identity is a body, a gait
and clothes; a camera is an angle, a place and a lens; only paint and place know the modality:

    walker: body, gait, clothes --+                       paint + place by day    (h, w, 3) .jpg
                                  +--> looks (2h, 2w) --> paint + place by night  (h, w)    .jpg
    camera: angle, size, jitter --+                       anything at all: mask   (h, w)    .png

What carries across: proportions, gait, cut, pattern, bag, hair. What does not: colours by day and
reflectances by night are independent draws, and so is which of a pattern's tones is the brighter.
All else (place, light, angle, size, blur, noise, quality) belongs to the camera or to chance.
`python walkers.py DIR` writes, in the layout of HITSZ-VCM,

    DIR/Train/0001/rgb/D3/1.jpg        pid 0001, visible (ir: infrared), camera 3, frame 1; or Test/
    DIR/masks/Train/0001/rgb/D3/1.png  the true silhouette of that frame, 0 or 255
    DIR/info/train_name.txt            0001M2D3T1F1.jpg: pid, modality, camera, track, frame
    DIR/info/track_train_info.txt      modality start end pid camera; start to end: lines of the
                                       names, 1-based and inclusive
    DIR/info/query_IDX.txt             1-based rows of track_test_info: all the infrared ones
    DIR/walkers.json                   what it was made with

Quick question: would a network that learns colours do well here? (By day, yes. Across modalities it
would be at chance, as tests/test_walkers.py shows of mean colours and of small pictures.)

Ours, not the papers': all but the layout. A good score here says that the code works, no more:
- people are dark on bright places by day and bright on dark places by night, so that even a random
  backbone finds silhouettes;
- every walker is alone, whole and centred, and comes towards the camera at 25 to 65 degrees: no
  crowd, no occlusion, no back.
"""
import functools
import json
import math
import multiprocessing
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support import pedestrian
from support.files import UserError, in_short, printable
from support.options import Parser, cli, leave_signals_to_parent, progress, say
from support.pedestrian import HAIR, ROLES, SKIN, Garment, View, Walker, draw_walker

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DRAWING = 1    # to be raised when the pictures change: a folder of older ones is then refused
SUPERSAMPLING = 2    # people are drawn so many times larger, then averaged down

# How HITSZ-VCM spells the modalities: in its names (M1) and lists, and as folders.
NUMBER = {"infrared": 1, "visible": 2}
FOLDER = {"infrared": "ir", "visible": "rgb"}

# Separate random streams: default_rng([seed, stream, ...]).
OF_WALKER, OF_PAINT, OF_CAMERA, OF_PLAN, OF_TRACKLET = range(5)

# Argument of make_walkers: option, smallest and largest value, help.
OPTIONS = {
    "train_identities": ("--identities", 1, 8000, "people to train on (96)"),
    "test_identities": ("--test-identities", 1, 1999, "(a third of --identities, at least 24)"),
    "tracklets": ("--tracklets", 1, 999, "per identity and modality (4)"),
    "frames": ("--frames", 12, 9999, "per tracklet, at least 12 (16)"),
    "height": ("--height", 32, 2048, "pixels, give or take an eighth per camera (128)"),
    "cameras": ("--cameras", 1, 99, "places, each by day and by night (6)"),
    "seed": ("--seed", 0, 2 ** 63, "(0)"),
    "workers": ("--workers", 1, 999, "processes (all cores)")}


# ---------------------------------------------------------------- people ----

def make_walker(seed, pid):
    """-> the Walker of that number."""
    rng = np.random.default_rng([seed, OF_WALKER, pid])

    def between(low, high):
        return float(rng.uniform(low, high))

    def one_of(words, probabilities=None):
        return words[rng.choice(len(words), p=probabilities)]

    def garment(plain):
        others = len(pedestrian.PATTERNS) - 1
        probabilities = [plain] + [(1 - plain) / others] * others
        return Garment(
            pattern=one_of(pedestrian.PATTERNS, probabilities),
            period=between(0.08, 0.16), duty=between(0.35, 0.6), level=between(0.06, 0.2))

    # In this order: each line draws from the same stream.
    return Walker(
        stature=between(0.945, 1.055), leg=between(0.44, 0.53), head=between(0.11, 0.15),
        shoulder=between(0.085, 0.135), hip=between(0.06, 0.105), girth=between(0.7, 1.4),
        depth=between(0.055, 0.085), arm=between(0.30, 0.36),
        pace=2 * math.pi * between(0.8, 1.2) / 12, step=between(0.3, 0.55),
        swing=between(0.1, 0.55), knee=between(0.5, 1.2), elbow=between(0.05, 0.55),
        lean=between(-0.03, 0.16), uneven=between(-0.25, 0.25), bounce=between(0, 0.012),
        sway=between(0, 0.015),
        top=one_of(list(pedestrian.UPPERS)), bottom=one_of(list(pedestrian.LOWERS)),
        upper=garment(plain=0.12), lower=garment(plain=0.2),
        bag=one_of(pedestrian.BAGS),
        bag_side=one_of((pedestrian.RIGHT, pedestrian.LEFT)), bag_size=between(0.8, 1.3),
        hair=one_of(list(pedestrian.HAIRS)))


def make_paint(seed, pid, modality):
    """-> (roles, 2, C) in 0..1, C = 3 if visible, 1 if infrared; the second tone of a role is its
    pattern's. Independent between modalities."""
    rng = np.random.default_rng([seed, OF_PAINT, pid, NUMBER[modality]])
    low, gap, high = (0.04, 0.18, 0.39) if modality == "visible" else (0.52, 0.22, 0.98)
    tones = rng.uniform(low, high - gap, (len(ROLES), 2))
    tones[:, 1] = rng.uniform(tones[:, 0] + gap, high)
    # Which of the two is the brighter?
    tones = rng.permuted(tones, axis=1)
    tones[HAIR] = rng.uniform(low, low + 0.15)
    tones[SKIN] = rng.uniform(high - 0.2, high)
    tones = tones[:, :, None]
    if modality == "infrared":
        return tones
    hue = rng.random((len(ROLES), 2, 1)) + np.array([0, 1 / 3, 2 / 3])
    saturation = rng.uniform(0.5, 1, (len(ROLES), 2, 1))
    colour = 1 - saturation * np.clip(2 - np.abs(6 * (hue % 1) - 3), 0, 1)
    colour[[SKIN, HAIR]] = 0.85, 0.58, 0.42
    # To the wanted tone: darker by scaling, lighter by mixing with white.
    grey = colour @ np.array([[0.299], [0.587], [0.114]])
    darker = colour * tones / grey
    lighter = 1 - (1 - colour) * (1 - tones) / (1 - grey + 1e-9)
    return np.where(grey > tones, darker, lighter)


# --------------------------------------------------------------- cameras ----

@dataclass
class Camera:
    """A lens and the place that it looks at."""
    place: dict       # modality -> (h, 2w, C) in 0..1: twice as wide as a frame, to pan over
    azimuth: float    # radians from frontal at which people come
    tilt: float       # pixels down per pixel nearer
    zoom: float       # average body height, in frame heights
    light: dict       # modality -> (C,)
    blur: float       # pixels
    noise: float      # of 0..1
    quality: int      # of JPEG


@functools.lru_cache(maxsize=99)
def make_camera(seed, number, cameras, height):
    """-> the Camera of that number; numbers start at 1."""
    # The angles spread evenly over 25 to 65 degrees.
    turn = np.random.default_rng([seed, OF_CAMERA]).permutation(cameras)[number - 1]
    azimuth = math.radians(25 + 40 * (turn + 0.5) / cameras)
    rng = np.random.default_rng([seed, OF_CAMERA, number])
    h = 2 * round(height * rng.uniform(0.875, 1.125) / 2)
    brightness, horizon = draw_place(rng, h, h)
    wall, ground = rng.uniform(0.92, 1.06, 3), rng.uniform(0.94, 1.05, 3)
    tint = np.where(np.arange(h)[:, None, None] < horizon, wall, ground)
    by_day = np.clip((0.64 + 0.3 * brightness)[:, :, None] * tint, 0.62, 0.95)
    # An infrared lamp lights the middle.
    lamp = 1 - 0.5 * np.linspace(-1, 1, h)[:, None] ** 2 * rng.uniform(0.3, 1)
    by_night = np.clip(0.03 + 0.19 * brightness * lamp, 0.02, 0.22)[:, :, None]
    return Camera(
        place={"visible": by_day.astype(np.float32), "infrared": by_night.astype(np.float32)},
        azimuth=azimuth, tilt=rng.uniform(0.06, 0.14), zoom=rng.uniform(0.722, 0.743),
        light={"visible": rng.uniform(0.88, 1.0) * rng.uniform(0.96, 1.04, 3),
               "infrared": rng.uniform(0.93, 1.0, 1)},
        blur=rng.uniform(0.2, 0.6), noise=rng.uniform(0.008, 0.02),
        quality=int(rng.integers(85, 96)))


def draw_place(rng, h, w):
    """-> (h, w) brightness in 0..1 of a wall with windows and poles above a ground, and the row of
    the horizon."""
    horizon = int(h * rng.uniform(0.55, 0.75))
    wall = np.linspace(*rng.uniform(0.4, 1, 2), h)
    ground = np.linspace(*rng.uniform(0, 0.8, 2), h)
    rows = np.where(np.arange(h) < horizon, wall, ground)
    image = Image.fromarray(np.repeat(np.uint8(255 * rows)[:, None], w, axis=1))
    pen = ImageDraw.Draw(image)

    # Windows, or panels
    across, down = h * rng.uniform(0.15, 0.35), h * rng.uniform(0.18, 0.35)
    fill = int(rng.integers(256))
    for x in np.arange(rng.uniform(0, across), w, across):
        for y in np.arange(rng.uniform(0.02, 0.1) * h, horizon - 0.6 * down, down):
            pen.rectangle([x, y, x + 0.6 * across, y + 0.65 * down], fill=fill)

    # Poles and trunks
    poles = rng.integers(1, 5)
    least, most = (0, -0.3, 0.01, 0, 0), (w / h, 0.3, 0.05, 0.1, 255 / h)
    for x, y, thick, below, fill in rng.uniform(least, most, (poles, 5)) * h:
        pen.rectangle([x, y, x + thick, horizon + below], fill=int(fill))

    # Kerbs and joints of the pavement
    joints = rng.integers(1, 6)
    for y in horizon + (h - horizon) * np.linspace(0.1, 1, joints) ** 1.5:
        end = y + rng.uniform(-0.02, 0.02) * h
        pen.line([0, y, w, end], fill=int(rng.integers(256)), width=1 + h // 100)
    image = image.filter(ImageFilter.GaussianBlur(h / 100))
    return np.asarray(image, np.float32) / 255, horizon


# ------------------------------------------------------------- tracklets ----

def paint_looks(paint, light):
    """paint (roles, 2, C), light (C,) -> (looks, C + 1) uint8: the paint and the opacity of each
    look that draw_walker gives."""
    C, roles = len(light), pedestrian.ROLE_OF_INK
    shade = pedestrian.SHADE_OF_INK[:, None, None]
    table = np.full((len(roles), 2, C + 1), 255, np.uint8)
    table[..., :C] = 255 * np.clip(paint[roles] * shade * light, 0, 1)
    table[pedestrian.BACKGROUND] = 0
    return table.reshape(-1, C + 1)


def photograph(looks, table, place, camera, rng):
    """looks (2h, 2w), place (h, w, C) -> the frame and its mask, PIL images (h, w)."""
    C = place.shape[2]
    # take is much faster than table[looks].
    person = Image.fromarray(np.take(table, looks, axis=0)).reduce(SUPERSAMPLING)
    person = np.asarray(person, np.float32) / 255    # (h, w, C + 1)
    colour, opacity = person[..., :C], person[..., C:]
    frame = colour + (1 - opacity) * place
    noise = camera.noise * rng.standard_normal(frame.shape, np.float32)
    frame = np.uint8(255 * np.clip(frame + noise, 0, 1))
    frame = Image.fromarray(frame.squeeze()).filter(ImageFilter.GaussianBlur(camera.blur))
    mask = Image.fromarray(np.uint8(255 * (opacity[..., 0] > 0.5)))
    return frame, mask


def draw_tracklet(rng, walker, paint, camera, modality, frames):
    """Yields (frame, mask), PIL images (h, w), for each frame of a walk in front of a camera."""
    light, place = camera.light[modality] * rng.uniform(0.97, 1.0), camera.place[modality]
    h, w = place.shape[0], place.shape[1] // 2
    H, W = SUPERSAMPLING * h, SUPERSAMPLING * w
    table = paint_looks(paint, light)
    # To the right or to the left
    azimuth = rng.choice((-1, 1)) * (camera.azimuth + rng.uniform(-0.07, 0.07))
    least, most = (0, 0.985, 0.47, 0.488), (2 * math.pi, 1.015, 0.53, 0.502)
    phase, zoom, x, y = rng.uniform(least, most)
    pan = rng.uniform(0, w) + np.arange(frames) * math.copysign(rng.uniform(0, 0.02), azimuth) * w
    pan = np.clip(pan, 0, w).astype(int)
    for i, left in enumerate(pan):
        # The jitter of a detector's box
        dx, dy, dz = rng.uniform(-1, 1, 3) * (0.01, 0.004, 0.006)
        size = H * camera.zoom * zoom * (1 + dz) * walker.stature
        foot = W * (x + dx), H * (y + dy) + size / 2
        view = View(azimuth, camera.tilt, size, foot)
        looks = draw_walker(walker, phase + i * walker.pace, view, (H, W))
        yield photograph(looks, table, place[:, left:left + w], camera, rng)


class Row(NamedTuple):
    """A tracklet that has been written."""
    pid: int
    modality: str
    camera: int
    track: int
    first: int     # number of its first frame
    frames: int


def write_walker(folder, made, pid):
    """Draws one identity by day and by night, and writes it -> its Rows. made: what walkers.json
    holds."""
    seed, frames, cameras = made["seed"], made["frames"], made["cameras"]
    split = "Train" if pid <= made["train_identities"] else "Test"
    walker, rows = make_walker(seed, pid), []
    plan = np.random.default_rng([seed, OF_PLAN, pid])
    for modality in "infrared", "visible":
        paint = make_paint(seed, pid, modality)
        # Each tracklet in another camera while cameras last; independently in the two modalities.
        rounds = [plan.permutation(cameras) + 1 for _ in range(0, made["tracklets"], cameras)]
        numbers = sorted(np.concatenate(rounds)[:made["tracklets"]].tolist())
        for track, number in enumerate(numbers):
            camera = make_camera(seed, number, cameras, made["height"])
            rng = np.random.default_rng([seed, OF_TRACKLET, pid, NUMBER[modality], track])
            pictures = draw_tracklet(rng, walker, paint, camera, modality, frames)
            # Frame numbers go on in a camera's next tracklet: paths do not name the track.
            first = numbers[:track].count(number) * frames + 1
            place = Path(split, f"{pid:04d}", FOLDER[modality], f"D{number}")
            for parent in folder, folder / "masks":
                (parent / place).mkdir(parents=True, exist_ok=True)
            for i, (frame, mask) in enumerate(pictures, first):
                frame.save(folder / place / f"{i}.jpg", quality=camera.quality)
                mask.save(folder / "masks" / place / f"{i}.png", compress_level=1)
            rows.append(Row(pid, modality, number, track + 1, first, frames))
    return rows


# ---------------------------------------------------------------- folder ----

def write_info(folder, split, rows):
    """The lists of one split, in info/."""
    names, tracks, queries = [], [], []
    for i, row in enumerate(rows, 1):
        number = NUMBER[row.modality]
        start, end = len(names) + 1, len(names) + row.frames
        tracks.append(f"{number} {start} {end} {row.pid} {row.camera}\n")
        track = f"{row.pid:04d}M{number}D{row.camera}T{row.track}"
        names += [f"{track}F{row.first + j}.jpg\n" for j in range(row.frames)]
        if row.modality == "infrared":
            queries.append(str(i))
    (folder / "info" / f"{split}_name.txt").write_text("".join(names))
    (folder / "info" / f"track_{split}_info.txt").write_text("".join(tracks))
    if split == "test":
        (folder / "info" / "query_IDX.txt").write_text(" ".join(queries) + "\n")


def draw_folder(folder, made, workers):
    """Draws all that `made` says in a folder that is not there yet, with so many processes (None:
    all cores)."""
    (folder / "info").mkdir(parents=True)
    train = made["train_identities"]
    pids = range(1, train + made["test_identities"] + 1)
    write = functools.partial(write_walker, folder, made)
    processes = min(workers or os.cpu_count(), len(pids))
    with multiprocessing.Pool(processes, leave_signals_to_parent) as pool:
        written = list(progress(pool.imap(write, pids), "walkers", len(pids)))
    write_info(folder, "train", sum(written[:train], []))
    write_info(folder, "test", sum(written[train:], []))
    (folder / "walkers.json").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")


def are_there(root, made):
    """Does `root` hold the walkers that are wanted? False where it is not there, or is empty.
    Raises UserError where it is something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = dict(json.loads((root / "walkers.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{root} is something else (no walkers.json); expected walkers or nothing; "
                        "give another DIR") from None
    differ = [key for key in made if found.get(key) != made[key]]
    if differ:
        has = " ".join(f"{key}={found.get(key)}" for key in differ)
        wanted = " ".join(f"{key}={made[key]}" for key in differ)
        raise UserError(f"{root} has walkers with {has}; expected {wanted}; delete that folder or "
                        "give another DIR")
    return True


def draw_at(root, made, workers):
    """Draws beside `root`, and moves it there when it is whole -> False if somebody else has put
    the same there meanwhile."""
    making = root.with_name(f".{root.name}.making-{os.getpid()}")
    # Only a killed process of our number has left it: it cannot be alive.
    shutil.rmtree(making, ignore_errors=True)
    try:
        draw_folder(making, made, workers)
        # An empty folder is in the way of a rename on Windows.
        with suppress(OSError):
            root.rmdir()
        try:
            os.replace(making, root)
        except OSError:
            if not are_there(root, made):
                raise
            return False
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return True


def make_walkers(root, *, train_identities=96, test_identities=32, tracklets=4, frames=16,
                 height=128, cameras=6, seed=0, workers=None):
    """Writes the folder described above, unless it is there already -> was it written? Beside root
    first: a killed run leaves .NAME.making-PID, and nothing else.

    tracklets: per identity and modality; height: pixels, give or take an eighth per camera;
    workers: processes, default all cores. Raises UserError."""
    numbers = {"train_identities": train_identities, "test_identities": test_identities,
               "tracklets": tracklets, "frames": frames, "height": height, "cameras": cameras,
               "seed": seed}
    made = {"drawing": DRAWING, **numbers}
    if workers is not None:
        numbers["workers"] = workers
    for name, value in numbers.items():
        _, least, most, _ = OPTIONS[name]
        if not least <= value <= most:
            raise UserError(f"{name}={value}; expected {least} to {most}; give another value")
    start = time.perf_counter()
    place = Path(os.path.abspath(root))
    try:
        if are_there(place, made) or not draw_at(place, made, workers):
            return False
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror or in_short(error)}; give a DIR "
                        "that can be written, on a disk with room") from None
    seconds = time.perf_counter() - start
    identities = train_identities + test_identities
    drawn = identities * 2 * tracklets
    total = drawn * frames
    say(f"{printable(root)}: {identities} identities, {drawn} tracklets, {total} frames in "
        f"{seconds:.1f} s, {total / seconds:.0f} frames/s")
    return True


def main():
    parser = Parser(description="Draws walking people, visible and infrared, as HITSZ-VCM.")
    parser.add_argument("root", metavar="DIR", help="the folder to make")
    for name, (option, _, _, text) in OPTIONS.items():
        parser.add_argument(option, dest=name, type=int, metavar="N", help=text)
    given = vars(parser.parse_args())
    if "train_identities" in given:
        given.setdefault("test_identities", max(24, given["train_identities"] // 3))
    root = given.pop("root")
    if not make_walkers(root, **given):
        say(f"{printable(root)}: these walkers are there already")


if __name__ == "__main__":
    cli(main)
