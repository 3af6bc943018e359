"""Walkers: synthetic pedestrians, by day in visible cameras and by night in infrared ones.

What the code trains and is tested on by default, made offline from a seed. The task is the papers':
find the same person in the other modality, where colour is of no use. An identity is a body, a gait
and clothes; a camera is an angle, a place and a lens; only paint and place know the modality:

    walker: body, gait, clothes --+                       paint + place by day    (h, w, 3) .jpg
                                  +--> looks (2h, 2w) --> paint + place by night  (h, w)    .jpg
    camera: angle, size, jitter --+                       anything at all: mask   (h, w)    .png

What carries across: proportions, gait, cut, pattern, bag, hair. What does not: colours by day and
reflectances by night are independent draws, and so is which of a pattern's tones is the brighter.
`--uniform SHARE` dresses that share of the people alike: of them, body and gait alone carry across.
All else (place, light, angle, size, blur, noise, quality) belongs to the camera or to chance.
`python walkers.py DIR` writes, in the layout of HITSZ-VCM,

    DIR/Train/0001/rgb/D3/1.jpg        pid 0001, visible (ir: infrared), camera 3, frame 1; or Test/
    DIR/masks/Train/0001/rgb/D3/1.png  the true silhouette of that frame, 0 or 255
    DIR/info/train_name.txt            0001M2D3T1F1.jpg: pid, modality, camera, track, frame
    DIR/info/track_train_info.txt      modality start end pid camera; start to end: lines of the
                                       names, 1-based and inclusive
    DIR/info/query_IDX.txt             1-based rows of track_test_info: all the infrared ones
    DIR/sentences.json                 {pid: what the person is and wears, in words}
    DIR/walkers.json                   what it was made with

Quick question: would a network that learns colours do well here? (By day, yes. Across modalities it
would be at chance, as tests/test_walkers.py shows of mean colours and of small pictures.)

Ours, not the papers': all but the layout. A good score here says that the code works, no more:
- places are blurred and of little contrast, so that a small backbone may find silhouettes; but
  people, clothes and places are of any brightness, by day and by night: neither "dark" nor "bright"
  means a person;
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from support import pedestrian
from support.files import UserError, in_short, printable
from support.options import Parser, cli, leave_signals_to_parent, progress, say
from support.pedestrian import HAIR, ROLES, SKIN, Garment, View, Walker, draw_walker

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DRAWING = 2    # to be raised when the pictures change: a folder of older ones is then refused
SUPERSAMPLING = 2    # people are drawn so many times larger, then averaged down

# How HITSZ-VCM spells the modalities: in its names (M1) and lists, and as folders.
NUMBER = {"infrared": 1, "visible": 2}
FOLDER = {"infrared": "ir", "visible": "rgb"}

# Separate random streams: default_rng([seed, stream, ...]).
OF_WALKER, OF_PAINT, OF_CAMERA, OF_PLAN, OF_TRACKLET = range(5)

# What those in uniform wear (--uniform): nothing but body and gait tells them apart.
UNIFORM = {
    "top": "jacket", "bottom": "trousers", "upper": Garment("band", 0.12, 0.5, 0.15),
    "lower": Garment("plain", 0.12, 0.5, 0.1), "bag": "none", "hair": "cap"}

# Argument of make_walkers: option, smallest and largest value, help.
OPTIONS = {
    "train_identities": ("--identities", 1, 8000, "people to train on (96)"),
    "test_identities": ("--test-identities", 1, 1999, "(60)"),
    "tracklets": ("--tracklets", 1, 999, "per identity and modality (4)"),
    "frames": ("--frames", 12, 9999, "per tracklet, at least 12 (12)"),
    "height": ("--height", 32, 2048, "pixels, give or take an eighth per camera (128)"),
    "cameras": ("--cameras", 1, 99, "places, each by day and by night (6)"),
    "uniform": ("--uniform", 0, 1, "share of the people who wear one and the same outfit (0)"),
    "seed": ("--seed", 0, 2 ** 63, "(0)"),
    "workers": ("--workers", 1, 999, "processes (all cores)")}


# ---------------------------------------------------------------- people ----

def make_walker(seed, pid, uniform=False):
    """-> the Walker of that number; in uniform: body and gait are theirs, the clothes everybody's.
    """
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
            period=between(0.12, 0.24), duty=between(0.35, 0.6), level=between(0.06, 0.2))

    # In this order: each line draws from the same stream.
    walker = Walker(
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
    return replace(walker, **UNIFORM) if uniform else walker


def wears_uniform(number, share):
    """Does the number-th person (from 0) wear it, where that share of people do? Evenly spread."""
    return math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)


def make_paint(seed, pid, modality):
    """-> (roles, 2, C) in 0..1, C = 3 if visible, 1 if infrared; the second tone of a role is its
    pattern's. Independent between modalities, and of any brightness in both."""
    rng = np.random.default_rng([seed, OF_PAINT, pid, NUMBER[modality]])
    low, gap, high = 0.05, 0.3, 0.95
    tones = rng.uniform(low, high - gap, (len(ROLES), 2))
    tones[:, 1] = rng.uniform(tones[:, 0] + gap, high)
    # Which of the two is the brighter?
    tones = rng.permuted(tones, axis=1)
    tones[HAIR] = rng.uniform(low, 0.6)
    tones[SKIN] = rng.uniform(0.3, 0.85)
    tones = tones[:, :, None]
    if modality == "infrared":
        return tones
    hue = rng.random((len(ROLES), 2, 1)) + np.array([0, 1 / 3, 2 / 3])
    saturation = rng.uniform(0.2, 1, (len(ROLES), 2, 1))
    colour = 1 - saturation * np.clip(2 - np.abs(6 * (hue % 1) - 3), 0, 1)
    colour[[SKIN, HAIR]] = 0.85, 0.58, 0.42
    return in_colour(tones, colour)


def in_colour(tones, colour):
    """tones (..., 1), colour (..., 3) -> that colour with those tones: darker by scaling, lighter
    by mixing with white."""
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
    # The angles spread evenly over 25 to 65 degrees, and the kinds of places over the cameras.
    order = np.random.default_rng([seed, OF_CAMERA])
    turn = order.permutation(cameras)[number - 1]
    kind = order.permutation(cameras)[number - 1] % len(PLACES)
    azimuth = math.radians(25 + 40 * (turn + 0.5) / cameras)
    rng = np.random.default_rng([seed, OF_CAMERA, number])
    h = 2 * round(height * rng.uniform(0.875, 1.125) / 2)
    brightness, horizon = draw_place(rng, h, h, PLACES[kind])
    # By night another lamp, and other reflectances: half of the places are inverted.
    by_day = exposed(rng, brightness)
    by_night = exposed(rng, 1 - brightness if rng.random() < 0.5 else brightness)
    wall, ground = rng.uniform(0.6, 1, (2, 3))
    tint = np.where(np.arange(h)[:, None, None] < horizon, wall, ground)
    by_day = in_colour(by_day[:, :, None], tint / tint.max(2, keepdims=True))
    # An infrared lamp lights the middle.
    lamp = 1 - 0.5 * np.linspace(-1, 1, h)[:, None] ** 2 * rng.uniform(0.3, 1)
    by_night = (by_night * lamp)[:, :, None]
    return Camera(
        place={"visible": by_day.astype(np.float32), "infrared": by_night.astype(np.float32)},
        azimuth=azimuth, tilt=rng.uniform(0.06, 0.14), zoom=rng.uniform(0.84, 0.86),
        light={"visible": rng.uniform(0.88, 1.0) * rng.uniform(0.96, 1.04, 3),
               "infrared": rng.uniform(0.93, 1.0, 1)},
        blur=rng.uniform(0.2, 0.6), noise=rng.uniform(0.008, 0.02),
        quality=int(rng.integers(85, 96)))


def exposed(rng, brightness):
    """brightness in 0..1 -> as an hour of the day shows it: less contrast, any brightness."""
    contrast = rng.uniform(0.1, 0.3)
    return rng.uniform(0.05, 0.95 - contrast) + contrast * brightness


# What stands behind people. Each is drawn with a pen on the wall of a place that is h high, down
# to the horizon; tone() is any brightness.

def draw_windows(pen, rng, tone, h, horizon):
    across, down = h * rng.uniform(0.15, 0.35), h * rng.uniform(0.18, 0.35)
    fill = tone()
    for x in np.arange(rng.uniform(0, across), h, across):
        for y in np.arange(rng.uniform(0.02, 0.1) * h, horizon - 0.6 * down, down):
            pen.rectangle([x, y, x + 0.6 * across, y + 0.65 * down], fill=fill)


def draw_bricks(pen, rng, tone, h, horizon):
    size, joint = h * rng.uniform(0.05, 0.1), tone()
    for row, y in enumerate(np.arange(0, horizon, size)):
        pen.line([0, y, h, y], fill=joint, width=1 + h // 100)
        for x in np.arange(size * (row % 2), h, 2 * size):
            pen.line([x, y, x, y + size], fill=joint, width=1 + h // 100)


def draw_hedge(pen, rng, tone, h, horizon):
    leaf = h * rng.uniform(0.02, 0.06)
    for x, y in rng.uniform(0, (h, horizon), (300, 2)):
        pen.ellipse([x - leaf, y - leaf, x + leaf, y + leaf], fill=tone())


def draw_fence(pen, rng, tone, h, horizon):
    apart, fill = h * rng.uniform(0.06, 0.16), tone()
    top = h * rng.uniform(0, 0.3)
    for x in np.arange(rng.uniform(0, apart), h, apart):
        pen.rectangle([x, top, x + 0.4 * apart, horizon], fill=fill)
    pen.rectangle([0, top + 0.1 * h, h, top + 0.12 * h], fill=fill)


def draw_shutters(pen, rng, tone, h, horizon):
    apart, fill = h * rng.uniform(0.04, 0.12), tone()
    for y in np.arange(0, horizon, apart):
        pen.rectangle([0, y, h, y + 0.5 * apart], fill=fill)


def draw_posters(pen, rng, tone, h, horizon):
    for _ in range(12):
        x, y = rng.uniform(-0.1, 1, 2) * (h, horizon)
        width, height = rng.uniform(0.08, 0.35, 2) * h
        pen.rectangle([x, y, x + width, min(y + height, horizon)], fill=tone())


PLACES = draw_windows, draw_bricks, draw_hedge, draw_fence, draw_shutters, draw_posters


def draw_place(rng, h, w, draw_wall):
    """-> (h, w) brightness in 0..1 of a wall behind a ground, and the row of the horizon."""
    def tone():
        return int(rng.integers(256))

    horizon = int(h * rng.uniform(0.55, 0.75))
    wall, ground = (np.linspace(*rng.uniform(0, 1, 2), h) for _ in range(2))
    rows = np.where(np.arange(h) < horizon, wall, ground)
    image = Image.fromarray(np.repeat(np.uint8(255 * rows)[:, None], w, axis=1))
    pen = ImageDraw.Draw(image)
    draw_wall(pen, rng, tone, h, horizon)

    # Poles and trunks
    poles = rng.integers(0, 4)
    for x, y, thick, below in rng.uniform((0, -0.3, 0.01, 0), (w / h, 0.3, 0.05, 0.1), (poles, 4)):
        pen.rectangle([x * h, y * h, (x + thick) * h, horizon + below * h], fill=tone())

    # Kerbs and joints of the pavement
    joints = rng.integers(1, 6)
    for y in horizon + (h - horizon) * np.linspace(0.1, 1, joints) ** 1.5:
        end = y + rng.uniform(-0.02, 0.02) * h
        pen.line([0, y, w, end], fill=tone(), width=1 + h // 100)
    # A lens that looks at people blurs what is behind them.
    image = image.filter(ImageFilter.GaussianBlur(h / 40))
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


def split_of(made, pid):
    """-> Train or Test, and the person's number there, from 0. made: what walkers.json holds."""
    train = made["train_identities"]
    return ("Train", pid - 1) if pid <= train else ("Test", pid - 1 - train)


def is_uniform(made, pid):
    _, number = split_of(made, pid)
    return wears_uniform(number, made["uniform"])


def walker_of(made, pid):
    return make_walker(made["seed"], pid, is_uniform(made, pid))


def write_walker(folder, made, pid):
    """Draws one identity by day and by night, and writes it -> its Rows. made: what walkers.json
    holds."""
    seed, frames, cameras = made["seed"], made["frames"], made["cameras"]
    split, _ = split_of(made, pid)
    uniform = is_uniform(made, pid)
    walker, rows = walker_of(made, pid), []
    plan = np.random.default_rng([seed, OF_PLAN, pid])
    for modality in "infrared", "visible":
        paint = make_paint(seed, 0 if uniform else pid, modality)    # nobody else is number 0
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
    sentences = {pid: pedestrian.describe(walker_of(made, pid)) for pid in pids}
    (folder / "sentences.json").write_text(json.dumps(sentences, indent=1) + "\n")
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


def make_walkers(root, *, train_identities=96, test_identities=60, tracklets=4, frames=12,
                 height=128, cameras=6, uniform=0.0, seed=0, workers=None):
    """Writes the folder described above, unless it is there already -> was it written? Beside root
    first: a killed run leaves .NAME.making-PID, and nothing else.

    tracklets: per identity and modality; height: pixels, give or take an eighth per camera;
    workers: processes, default all cores. Raises UserError."""
    numbers = {"train_identities": train_identities, "test_identities": test_identities,
               "tracklets": tracklets, "frames": frames, "height": height, "cameras": cameras,
               "uniform": uniform, "seed": seed}
    made = {"drawing": DRAWING, **numbers}
    if workers is not None:
        numbers["workers"] = workers
    for name, value in numbers.items():
        option, least, most, _ = OPTIONS[name]
        if not least <= value <= most:
            raise UserError(f"{option} {value}; expected {least} to {most}; give another value")
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
        kind, metavar = (float, "SHARE") if name == "uniform" else (int, "N")
        parser.add_argument(option, dest=name, type=kind, metavar=metavar, help=text)
    given = vars(parser.parse_args())
    root = given.pop("root")
    if not make_walkers(root, **given):
        say(f"{printable(root)}: these walkers are there already")


if __name__ == "__main__":
    cli(main)
