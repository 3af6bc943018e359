"""Walkers: synthetic pedestrians, seen by day in visible cameras and by night in infrared ones, written as HITSZ-VCM.

What the code trains and is tested on by default, made offline from a seed. The task is the paper's: find the same person in the
other modality, where colour is of no use. An identity is a body, a gait and clothes; a camera is an angle, a place and a lens.
A person is drawn back to front into a map of part numbers; a pixel's part, and whether the garment's pattern is on there, pick
the paint, and only paint and place know the modality:

    walker: body, gait, clothes  --+                                            paint + place by day    (h, w, 3) .jpg
                                   +--> parts (2h, 2w), pattern (2h, 2w) --+--> paint + place by night  (h, w)    .jpg
    camera: angle, scale, jitter --+                                       +--> any part at all: mask   (h, w)    .png

What carries across: proportions, gait, cut, pattern geometry, bag, hair. What does not: colours by day and reflectances by night
are independent draws, and so is which of a pattern's two tones is the brighter. All else (place, light, angle, scale, blur,
noise, frame size, JPEG quality) belongs to the camera or to chance. `python walkers.py DIR` writes

    DIR/Train/0001/rgb/D3/1.jpg          pid 0001, visible (ir: infrared), camera 3, frame 1; test identities under Test/
    DIR/masks/Train/0001/rgb/D3/1.png    the true silhouette of that frame, 0 or 255
    DIR/info/train_name.txt              0001M2D3T1F1.jpg: pid, modality (1 infrared, 2 visible), camera, track, frame
    DIR/info/track_train_info.txt        modality start end pid camera; start..end: 1-based inclusive lines of the names
    DIR/info/query_IDX.txt               1-based rows of track_test_info that are queries: all the infrared ones
    DIR/walkers.json                     what it was made with

Ours, not the paper's: all of it; only the layout is that of HITSZ-VCM. A good score here says that the code works, no more:
- people are dark on bright places by day and bright on dark places by night, so that even a random backbone finds silhouettes;
- every walker is alone, whole and centred, and comes towards the camera at 25 to 65 degrees: no crowd, no occlusion, no back.
"""
import argparse
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from data import UserError, cli

DRAWING = 1          # raise it when the pictures change, so that a folder of older ones is not taken for current
SS = 2               # supersampling: people are drawn at SS times the frame's size, then averaged down
INFRARED, VISIBLE, FOLDER = 1, 2, {1: "ir", 2: "rgb"}
WALKER, PAINT, CAMERA, PLAN, TRACKLET = range(5)  # separate random streams: default_rng([seed, stream, ...])

BARE_ARM, BARE_LEG = (0.030, 0.024, 0.019), (0.052, 0.037, 0.024)    # radii at the joints, in body heights at girth 1
UPPERS = {           # share of the arm that is covered, looseness at the joints, looseness of the torso, tail: share of the legs
    "tank": (0, (0, 0, 0), 0, 0.02), "t-shirt": (0.31, (0.005, 0.008, 0), 0, 0.06), "long sleeves": (0.95, (0.003, 0.004, 0.006), 0, 0.04),
    "jacket": (0.93, (0.01, 0.01, 0.008), 0.014, 0.14), "coat": (0.93, (0.01, 0.01, 0.008), 0.014, 0.62)}
LOWERS = {           # share of the leg that is covered, looseness at the joints, skirt: share of the legs, flare
    "trousers": (0.96, (0.004, 0.005, 0.008), 0.12, 0), "wide trousers": (0.96, (0.01, 0.022, 0.038), 0.12, 0),
    "shorts": (0.46, (0.01, 0.024, 0), 0.12, 0), "skirt": (0, (0, 0, 0), 0.5, 0.1), "long skirt": (0, (0, 0, 0), 0.9, 0.06)}
SKULL, FACE = (0, -0.12, 1.05, 1.05), [(-0.35, 0.22, 0.8, 0.78)]     # ellipses: back, down, half width, half height, in half heads
HAIRS = {            # hair behind the face, the face, hair or hat over it
    "short": ([SKULL], FACE, []), "afro": ([(0, -0.15, 1.35, 1.25)], FACE, []), "bun": ([SKULL, (0.9, -0.75, 0.55, 0.45)], FACE, []),
    "long": ([SKULL, (0.4, 0.6, 1.05, 1.1), (0.55, 1.4, 0.85, 0.9)], FACE, []),
    "cap": ([SKULL], FACE, [(0, -0.65, 1.05, 0.5), (-0.7, -0.3, 1, 0.16)]),
    "hat": ([SKULL], FACE, [(0, -0.65, 1.05, 0.5), (0, -0.3, 1.7, 0.16)])}
BAGS = "none", "backpack", "shoulder bag", "handbag", "trolley"
PATTERNS = {         # u right of the part's centre line, v below the garment's top, l a level, all in periods; d the duty cycle
    "plain": lambda u, v, d, l: np.zeros(u.shape, bool),
    "across": lambda u, v, d, l: v % 1 < d,
    "down": lambda u, v, d, l: (u + d / 2) % 1 < d,
    "checks": lambda u, v, d, l: ((u + d / 2) % 1 < d) ^ (v % 1 < d),
    "dots": lambda u, v, d, l: ((u + v // 1 / 2) % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < (0.2 + 0.3 * d) ** 2,
    "band": lambda u, v, d, l: (l < v) & (v < l + 1),
    "halves": lambda u, v, d, l: v > l,
    "diagonal": lambda u, v, d, l: (u + v) % 1 < d,
    "zigzag": lambda u, v, d, l: (v + abs((u + 0.5) % 1 - 0.5)) % 1 < d}

ROLES = UPPER, LOWER, SKIN, HAIR, SHOES, BAG = range(6)          # what has a paint of its own
PARTS = {"background": (-1, 0), "bag": (BAG, 1), "strap": (BAG, 0.8), "torso": (UPPER, 1), "tail": (UPPER, 0.96), "skirt": (LOWER, 1),
         "head": (SKIN, 1), "hair": (HAIR, 1),                   # name: (role, shade)
         **{f"{depth} {name}": (role, shade) for depth, shade in (("near", 1.06), ("far", 0.83)) for name, role in (
             ("sleeve", UPPER), ("hand", SKIN), ("leg", LOWER), ("shin", SKIN), ("shoe", SHOES))}}
NUMBER = {name: i for i, name in enumerate(PARTS)}
OWNER = np.repeat([role for role, _ in PARTS.values()], 2)       # canvas value = 2 * part + (1 if on the part's outline)
SHADE = np.outer([shade for _, shade in PARTS.values()], [1, 0.78]).reshape(-1)


def make_walker(seed, pid):
    """-> everything that a person is in both modalities. Lengths in units of the body's height, angles in radians."""
    rng = np.random.default_rng([seed, WALKER, pid])
    u = lambda low, high: float(rng.uniform(low, high))
    pick = lambda words, p=None: words[rng.choice(len(words), p=p)]
    garment = lambda plain: SimpleNamespace(pattern=pick(list(PATTERNS), [plain] + [(1 - plain) / 8] * 8),
                                            period=u(0.08, 0.16), duty=u(0.35, 0.6), level=u(0.06, 0.2))
    return SimpleNamespace(
        stature=u(0.945, 1.055), leg=u(0.44, 0.53), head=u(0.11, 0.15), shoulder=u(0.085, 0.135), hip=u(0.06, 0.105),
        girth=u(0.7, 1.4), depth=u(0.055, 0.085), arm=u(0.30, 0.36),
        pace=2 * math.pi * u(0.8, 1.2) / 12, step=u(0.3, 0.55), swing=u(0.1, 0.55), knee=u(0.5, 1.2), elbow=u(0.05, 0.55),
        lean=u(-0.03, 0.16), uneven=u(-0.25, 0.25), bounce=u(0, 0.012), sway=u(0, 0.015),
        top=pick(list(UPPERS)), bottom=pick(list(LOWERS)), upper=garment(0.12), lower=garment(0.2),
        bag=pick(BAGS), bag_side=pick((-1, 1)), bag_size=u(0.8, 1.3), hair=pick(list(HAIRS)))


def make_paint(seed, pid, modality):
    """-> (roles, 2 tones, 3 or 1 channels) in 0..1; the second tone is the pattern's. Independent between modalities."""
    rng = np.random.default_rng([seed, PAINT, pid, modality])
    low, gap, high = (0.04, 0.18, 0.39) if modality == VISIBLE else (0.52, 0.22, 0.98)
    tones = rng.uniform(low, high - gap, (len(ROLES), 2))
    tones[:, 1] = rng.uniform(tones[:, 0] + gap, high)
    tones = rng.permuted(tones, axis=1)                                              # which of the two is the brighter
    tones[HAIR], tones[SKIN] = rng.uniform(low, low + 0.15), rng.uniform(high - 0.2, high)
    if modality == INFRARED:
        return tones[:, :, None]
    hue = rng.random((len(ROLES), 2, 1)) + np.array([0, 1 / 3, 2 / 3])
    colour = 1 - rng.uniform(0.5, 1, (len(ROLES), 2, 1)) * np.clip(2 - np.abs(6 * (hue % 1) - 3), 0, 1)
    colour[[SKIN, HAIR]] = 0.85, 0.58, 0.42
    grey = colour @ np.array([[0.299], [0.587], [0.114]])
    tones = tones[:, :, None]                # reach the wanted luminance: darken by scaling, lighten by mixing with white
    return np.where(grey > tones, colour * tones / grey, 1 - (1 - colour) * (1 - tones) / (1 - grey + 1e-9))


@functools.lru_cache(maxsize=99)
def make_camera(seed, number, cameras, height):
    """-> one lens and one place, (h, 2w, 3) by day and (h, 2w, 1) by night, in 0..1; camera numbers start at 1."""
    turn = np.random.default_rng([seed, CAMERA]).permutation(cameras)[number - 1]    # the angles spread over 25..65 degrees
    rng = np.random.default_rng([seed, CAMERA, number])
    h = 2 * round(height * rng.uniform(0.875, 1.125) / 2)
    brightness, horizon = draw_place(rng, h, h)
    tint = np.where(np.arange(h)[:, None, None] < horizon, rng.uniform(0.92, 1.06, 3), rng.uniform(0.94, 1.05, 3))
    lamp = 1 - 0.5 * np.linspace(-1, 1, h)[:, None] ** 2 * rng.uniform(0.3, 1)       # the infrared lamp lights the middle
    return SimpleNamespace(
        place={VISIBLE: np.clip((0.64 + 0.3 * brightness)[:, :, None] * tint, 0.62, 0.95).astype(np.float32),
               INFRARED: np.clip(0.03 + 0.19 * brightness * lamp, 0.02, 0.22)[:, :, None].astype(np.float32)},
        azimuth=math.radians(25 + 40 * (turn + 0.5) / cameras), tilt=rng.uniform(0.06, 0.14), zoom=rng.uniform(0.722, 0.743),
        light={VISIBLE: rng.uniform(0.88, 1.0) * rng.uniform(0.96, 1.04, 3), INFRARED: rng.uniform(0.93, 1.0, 1)},
        blur=rng.uniform(0.2, 0.6), noise=rng.uniform(0.008, 0.02), quality=int(rng.integers(85, 96)))


def draw_place(rng, h, w):
    """-> ((h, w) brightness in 0..1 of a wall with windows and poles above a ground, row of the horizon)."""
    horizon = int(h * rng.uniform(0.55, 0.75))
    rows = np.where(np.arange(h) < horizon, np.linspace(*rng.uniform(0.4, 1, 2), h), np.linspace(*rng.uniform(0, 0.8, 2), h))
    image = Image.fromarray(np.repeat(np.uint8(255 * rows)[:, None], w, axis=1))
    pen = ImageDraw.Draw(image)
    across, down, fill = h * rng.uniform(0.15, 0.35), h * rng.uniform(0.18, 0.35), int(rng.integers(256))     # windows, or panels
    for x in np.arange(rng.uniform(0, across), w, across):
        for y in np.arange(rng.uniform(0.02, 0.1) * h, horizon - 0.6 * down, down):
            pen.rectangle([x, y, x + 0.6 * across, y + 0.65 * down], fill=fill)
    for x, y, thick, below, fill in rng.uniform((0, -0.3, 0.01, 0, 0), (w / h, 0.3, 0.05, 0.1, 255 / h), (rng.integers(1, 5), 5)) * h:
        pen.rectangle([x, y, x + thick, horizon + below], fill=int(fill))            # poles and trunks
    for y in horizon + (h - horizon) * np.linspace(0.1, 1, rng.integers(1, 6)) ** 1.5:   # kerbs and joints of the pavement
        pen.line([0, y, w, y + rng.uniform(-0.02, 0.02) * h], fill=int(rng.integers(256)), width=1 + h // 100)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(h / 100)), np.float32) / 255, horizon


def skeleton(k, phase):
    """The walker k at a phase (radians) of the stride -> legs {side: [hip, knee, ankle, toe]}, arms {side: [shoulder, elbow, hand]},
    heights of hip and neck, and trunk(up, left, forward) for points of the leaning torso. Points are (forward, left, up) in body
    heights from the ground under the hips; side is -1 (right) or 1 (left)."""
    legs, arms, sway = {}, {}, k.sway * math.sin(phase)
    turns = {-1: phase, 1: phase + math.pi}                                          # the legs are half a stride apart
    step, half = k.step * (0.65 if k.bottom == "long skirt" else 1), (k.leg - 0.03) / 2
    for side, turn in turns.items():
        thigh = step * (1 + side * k.uneven / 2) * math.sin(turn) + 0.08
        shin = thigh - 0.06 - k.knee * max(0, math.cos(turn + 0.5)) ** 1.5           # the knee bends as the leg comes forward
        knee, s = (half * math.sin(thigh), -half * math.cos(thigh)), side * k.hip * 0.55 + sway
        ankle = knee[0] + half * math.sin(shin), knee[1] - half * math.cos(shin)     # forward of the hips, and above them
        legs[side] = [(0, s, 0), (knee[0], s, knee[1]), (ankle[0], s, ankle[1]),
                      (ankle[0] + 0.085 * math.cos(shin), s * 1.3, ankle[1] + 0.085 * min(0, math.sin(shin)))]
    hip = 0.03 - min(leg[2][2] for leg in legs.values()) + k.bounce * math.cos(2 * phase)       # the lower foot stands
    legs = {side: [(f, s, max(0.012, hip + up)) for f, s, up in leg] for side, leg in legs.items()}
    neck = hip + 1 - k.leg - k.head - 0.025                                          # the torso is what legs and head leave
    trunk = lambda up, left=0.0, forward=0.0: (math.tan(k.lean) * (up - hip) + forward, left + sway, up)
    for side, turn in turns.items():                                                 # an arm swings against its leg
        f, s, up = trunk(neck - 0.03, side * k.shoulder * 0.92)
        arm, bend, half = -k.swing * (1 - side * k.uneven) * math.sin(turn), k.elbow * (0.4 + 0.6 * max(0, -math.sin(turn))), k.arm / 2
        if k.bag_side == side and k.bag in ("handbag", "trolley"):                   # but little with something in the hand
            arm, bend = arm * 0.3 - (0.3 if k.bag == "trolley" else 0), 0.05
        elbow = f + half * math.sin(arm), s + side * 0.024 * k.girth, up - half * math.cos(arm)
        arms[side] = [(f, s, up), elbow, (elbow[0] + half * math.sin(arm + bend), elbow[1], elbow[2] - half * math.cos(arm + bend))]
    return legs, arms, hip, neck, trunk


def draw_walker(k, phase, azimuth, tilt, size, foot, shape):
    """One pose of the walker k. phase: radians of the stride; azimuth: radians from frontal, positive = walks to the right;
    tilt: pixels down per pixel nearer; size: pixels per body height; foot: (x, y) pixels of the ground under the hips;
    shape: (H, W) of the canvas -> canvas (H, W) uint8 with 2 * part + outline, bit (H, W) uint8 with the patterns."""
    canvas = Image.new("L", shape[::-1])
    pen = ImageDraw.Draw(canvas)
    legs, arms, hip, neck, trunk = skeleton(k, phase)
    sin, cos, g, b = math.sin(azimuth), math.cos(azimuth), k.girth, k.bag_size
    project = lambda f, s, up: complex(foot[0] + size * (f * sin + s * cos), foot[1] - size * (up - tilt * (f * cos - s * sin)))
    at = lambda *where: project(*trunk(*where))                                      # -> pixels, as a complex number x + iy
    wide = lambda half, deep: size * math.hypot(half * cos, deep * sin)              # half width of an upright ellipse
    legs, arms = ({side: [project(*p) for p in points] for side, points in limbs.items()} for limbs in (legs, arms))
    near = 1 if sin < 0 else -1                                                      # who walks right shows us the right side
    lines = {}                                                                       # part -> points of its centre line
    ellipse = lambda value, c, rx, ry: pen.ellipse([c.real - rx, c.imag - ry, c.real + rx, c.imag + ry], fill=value)

    def limb(part, joints, radii):
        """A chain of tapered capsules with a thin outline."""
        lines[part] = joints
        for value, more in ((2 * NUMBER[part] + 1, 1), (2 * NUMBER[part], 0)):
            for c, r in zip(joints, radii):
                ellipse(value, c, r + more, r + more)
            for p, q, r, t in zip(joints, joints[1:], radii, radii[1:]):
                n = 1j * (q - p) / max(abs(q - p), 1e-6)                             # the unit normal: a quarter turn
                r, t = n * (r + more), n * (t + more)
                pen.polygon([(z.real, z.imag) for z in (p + r, q + t, q - t, p - r)], fill=value)

    def panel(part, left, right):
        """The polygon between two edges, both from the top down, with a thin outline."""
        lines[part] = [(p + q) / 2 for p, q in zip(left, right)]
        corners = [(z.real, z.imag) for z in (*left, *right[::-1], left[0])]
        pen.polygon(corners, fill=2 * NUMBER[part])
        pen.line(corners, fill=2 * NUMBER[part] + 1, width=1)

    def dressed(skin, cloth, joints, bare, share, loose):
        """An arm or a leg, and the garment over a share of it."""
        limb(skin, joints, [size * g * r for r in bare])
        where = 0, min(1, 2 * share), 2 * share
        limb(cloth, np.interp(where, (0, 1, 2), joints).tolist(), size * (g * np.interp(where, (0, 1, 2), bare) + loose))

    def draw_arm(side, depth):
        dressed(depth + " hand", depth + " sleeve", arms[side], BARE_ARM, *UPPERS[k.top][:2])
        if side == k.bag_side and k.bag == "handbag":
            hand = arms[side][2]
            limb("strap", [hand, hand + 1j * size * 0.05], [size * 0.012] * 2)
            panel("bag", *([hand + size * b * z for z in (x + 0.04j, 1.3 * x + 0.13j)] for x in (-0.05, 0.05)))
        if side == k.bag_side and k.bag == "shoulder bag":
            bag = at(hip - 0.03, side * (k.hip + 0.03))
            limb("bag", [bag - size * b * 0.035, bag + size * b * 0.035], [size * b * 0.05] * 2)

    def drape(part, share, flare, loose=0.0):
        """Cloth from the waist down a share of the legs, as wide there as the legs have spread: seat, skirt, tail of a coat."""
        spread = [np.interp(share, [0, 0.5, 1], [z.real for z in points[:3]]) for points in legs.values()]
        top, half, out = at(hip + 0.04), wide(k.hip * g ** 0.5 + loose, k.depth * g + loose), size * (0.042 * g + flare * share + loose)
        low = foot[1] - size * (hip - (k.leg - 0.03) * share)
        panel(part, [top - half, complex(min(spread) - out, low)], [top + half, complex(max(spread) + out, low)])

    # Back to front. First what is carried behind, then the far arm, the legs, the torso, the head, and the near arm.
    if k.bag == "trolley":
        box = project(-0.2, k.bag_side * k.shoulder, 0.02)
        limb("strap", [arms[k.bag_side][2], box - 1j * size * 0.2], [size * 0.01] * 2)
        panel("bag", *([box + size * b * z for z in (x - 0.22j, x)] for x in (-0.055, 0.055)))
    if k.bag == "backpack":
        limb("bag", [at(neck - 0.05, 0, -k.depth - 0.05), at(neck - 0.08 - 0.14 * b, 0, -k.depth - 0.06)], [wide(0.09 * b, 0.065 * b)] * 2)
    draw_arm(-near, "far")
    for side, depth in (-near, "far"), (near, "near"):
        limb(depth + " shoe", [legs[side][2] + 1j * size * 0.008, legs[side][3]], [size * 0.026, size * 0.02])
        dressed(depth + " shin", depth + " leg", legs[side][:3], BARE_LEG, *LOWERS[k.bottom][:2])
    drape("skirt", *LOWERS[k.bottom][2:])
    loose, tail = UPPERS[k.top][2:]
    drape("tail", tail, 0.08, loose)
    ring = [(at(up), wide(half + loose, deep + loose)) for up, half, deep in (
        (neck + 0.012, 0.03, 0.03), (neck - 0.01, k.shoulder * 0.8, k.depth * 0.8), (neck - 0.04, k.shoulder, k.depth * 0.9),
        (neck - 0.1, k.shoulder * (0.75 + 0.16 * g), k.depth * g), (hip + 0.1, k.hip * (0.55 + 0.4 * g), k.depth * g * 0.9),
        (hip + 0.03, k.hip * g ** 0.5 + 0.006, k.depth * g))]
    panel("torso", [z - half for z, half in ring], [z + half for z, half in ring])
    straps = {"shoulder bag": [(-0.5 * k.bag_side * k.shoulder, hip, k.bag_side * k.hip)],
              "backpack": [(side * 0.6 * k.shoulder, neck - 0.15, side * 0.7 * k.shoulder) for side in (-1, 1)]}
    for left, low, end in straps.get(k.bag, ()):
        limb("strap", [at(neck, left, 0.03), at(low, end, 0.03)], [size * 0.009] * 2)
    ry, rx, head = k.head / 2 * size, k.head * 0.39 * size, at(neck + 0.025 + k.head / 2, 0, 0.01)
    limb("head", [at(neck), head], [size * 0.024 * (0.7 + 0.3 * g)] * 2)
    for part, blobs in zip(("hair", "head", "hair"), HAIRS[k.hair]):
        for back, down, half, tall in blobs:
            ellipse(2 * NUMBER[part], head + complex(-back * rx * sin, down * ry), rx * half, ry * tall)
    draw_arm(near, "near")

    # The patterns: in the garment's own coordinates, so that they move with the torso and with each limb.
    canvas, bit, axis = np.asarray(canvas), np.zeros(shape, np.uint8), np.zeros((len(PARTS), shape[0]), np.float32)
    for part, joints in lines.items():                                               # the column of its centre line, per row
        y, x = zip(*sorted((z.imag, z.real) for z in joints))
        axis[NUMBER[part]] = np.interp(np.arange(shape[0]), y, x)
    for role, garment, top in ((UPPER, k.upper, at(neck)), (LOWER, k.lower, at(hip + 0.04))):
        y, x = np.nonzero(OWNER[canvas] == role)
        u, v = (x - axis[canvas[y, x] // 2, y]) / garment.period / size, (y - top.imag) / garment.period / size
        bit[y, x] = PATTERNS[garment.pattern](u, v, garment.duty, garment.level / garment.period)
    return canvas, bit


def draw_tracklet(seed, pid, modality, track, frames, camera, walker, paint):
    """Yields (frame, mask), PIL images (h, w), for each frame of one walk in front of one camera."""
    rng = np.random.default_rng([seed, TRACKLET, pid, modality, track])
    light, place = camera.light[modality] * rng.uniform(0.97, 1.0), camera.place[modality]       # (C,), (h, 2w, C)
    h, w, C = place.shape[0], place.shape[1] // 2, place.shape[2]
    table = np.full((len(OWNER), 2, C + 1), 255, np.uint8)                           # canvas value, pattern bit -> paint, opacity
    table[..., :C] = 255 * np.clip(paint[OWNER] * SHADE[:, None, None] * light, 0, 1)
    table[:2] = 0                                                                    # the background: no paint, not opaque
    azimuth = rng.choice((-1, 1)) * (camera.azimuth + rng.uniform(-0.07, 0.07))      # to the right or to the left
    phase, zoom, x, y = rng.uniform((0, 0.985, 0.47, 0.488), (2 * math.pi, 1.015, 0.53, 0.502))
    pan = np.clip(rng.uniform(0, w) + np.arange(frames) * math.copysign(rng.uniform(0, 0.02), azimuth) * w, 0, w).astype(int)
    for i in range(frames):
        dx, dy, dz = rng.uniform(-1, 1, 3) * (0.01, 0.004, 0.006)                    # the jitter of the detector's box
        size = SS * h * camera.zoom * zoom * (1 + dz) * walker.stature
        foot = SS * w * (x + dx), SS * h * (y + dy) + size / 2
        canvas, bit = draw_walker(walker, phase + i * walker.pace, azimuth, camera.tilt, size, foot, (SS * h, SS * w))
        person = np.asarray(Image.fromarray(table[canvas, bit]).reduce(SS), np.float32) / 255    # (h, w, C + 1)
        frame = person[..., :C] + (1 - person[..., C:]) * place[:, pan[i]:pan[i] + w]
        frame = np.uint8(255 * np.clip(frame + camera.noise * rng.standard_normal(frame.shape, np.float32), 0, 1))
        frame = Image.fromarray(frame.squeeze()).filter(ImageFilter.GaussianBlur(camera.blur))
        yield frame, Image.fromarray(np.uint8(255 * (person[..., C] > 0.5)))


def write_walker(task):
    """(folder, parameters, split, pid) -> [(pid, modality, camera, track, first frame, frames)], one row per tracklet written."""
    folder, made, split, pid = task
    seed, frames, cameras = made["seed"], made["frames"], made["cameras"]
    walker, rows, plan = make_walker(seed, pid), [], np.random.default_rng([seed, PLAN, pid])
    for modality in (INFRARED, VISIBLE):
        paint = make_paint(seed, pid, modality)
        # Each tracklet in another camera while cameras last; the two modalities draw theirs independently.
        rounds = [plan.permutation(cameras) + 1 for _ in range(0, made["tracklets"], cameras)]
        numbers = sorted(np.concatenate(rounds)[:made["tracklets"]].tolist())
        for track, number in enumerate(numbers):
            camera = make_camera(seed, number, cameras, made["height"])
            first = numbers[:track].count(number) * frames + 1                       # numbers go on: the path has no track
            place = Path(split, f"{pid:04d}", FOLDER[modality], f"D{number}")
            for parent in (folder, folder / "masks"):
                (parent / place).mkdir(parents=True, exist_ok=True)
            for i, (frame, mask) in enumerate(draw_tracklet(seed, pid, modality, track, frames, camera, walker, paint), first):
                frame.save(folder / place / f"{i}.jpg", quality=camera.quality)
                mask.save(folder / "masks" / place / f"{i}.png", compress_level=1)
            rows.append((pid, modality, number, track + 1, first, frames))
    return rows


def write_info(folder, split, rows):
    """rows of write_walker -> the lists of one split, in info/."""
    names, tracks = [], []
    for pid, modality, camera, track, first, frames in rows:
        tracks.append(f"{modality} {len(names) + 1} {len(names) + frames} {pid} {camera}\n")
        names += [f"{pid:04d}M{modality}D{camera}T{track}F{first + i}.jpg\n" for i in range(frames)]
    (folder / f"info/{split}_name.txt").write_text("".join(names))
    (folder / f"info/track_{split}_info.txt").write_text("".join(tracks))
    if split == "test":
        (folder / "info/query_IDX.txt").write_text(" ".join(str(i) for i, row in enumerate(tracks, 1) if row.startswith("1 ")) + "\n")


def make_walkers(root, *, train_identities=96, test_identities=32, tracklets=4, frames=16, height=128, cameras=6, seed=0, workers=None):
    """Writes the folder described above, unless it is there already, beside root first: only a killed run leaves a .NAME.making-*.
    tracklets: per identity and modality; height: pixels, give or take an eighth per camera; workers: processes, default all cores."""
    made = dict(drawing=DRAWING, train_identities=train_identities, test_identities=test_identities, tracklets=tracklets,
                frames=frames, height=height, cameras=cameras, seed=seed)
    workers = os.cpu_count() if workers is None else workers
    for name, low, high in (("train_identities", 1, 8000), ("test_identities", 1, 1999), ("tracklets", 1, 999), ("frames", 12, 9999),
                            ("height", 32, 2048), ("cameras", 1, 99), ("seed", 0, 2 ** 63), ("workers", 1, 999)):
        value = made.get(name, workers)
        if not low <= value <= high:
            raise UserError(f"{name}={value}; expected {low} to {high}; give another value")
    root = Path(root).absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        try:
            found = dict(json.loads((root / "walkers.json").read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{root} is something else (no walkers.json); expected walkers or nothing; give another DIR") from None
        other = [key for key in made if found.get(key) != made[key]]
        if not other:
            return
        found, wanted = (" ".join(f"{key}={those.get(key)}" for key in other) for those in (found, made))
        raise UserError(f"{root} has walkers with {found}; expected {wanted}; delete that folder or give another DIR")
    start = time.perf_counter()
    making = root.with_name(f".{root.name}.making-{os.getpid()}")
    tasks = [(making, made, "Train" if i < train_identities else "Test", i + 1) for i in range(train_identities + test_identities)]
    try:
        (making / "info").mkdir(parents=True)
        with multiprocessing.Pool(min(workers, len(tasks)), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            rows = list(tqdm(pool.imap(write_walker, tasks), "walkers", len(tasks), unit="walker", leave=False, disable=None))
        write_info(making, "train", sum(rows[:train_identities], []))
        write_info(making, "test", sum(rows[train_identities:], []))
        (making / "walkers.json").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        if root.is_dir():
            root.rmdir()                                                             # empty, or it was refused above
        os.replace(making, root)
    except OSError as error:
        raise UserError(f"cannot write {root}: {error.strerror or error}; give a DIR that can be written, on a disk with room") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    seconds, total = time.perf_counter() - start, len(tasks) * 2 * tracklets * frames
    print(f"{root}: {len(tasks)} identities, {total // frames} tracklets, {total} frames in {seconds:.1f} s, {total / seconds:.0f} frames/s")


def main():
    parser = argparse.ArgumentParser(description="Draws walking people, visible and infrared, and writes them as HITSZ-VCM.")
    parser.add_argument("root", metavar="DIR", help="the folder to make")
    for name, default, text in (
            ("identities", 96, "for training, default 96"), ("test-identities", None, "default a third of --identities, at least 24"),
            ("tracklets", 4, "per identity and modality, default 4"), ("frames", 16, "per tracklet, at least 12, default 16"),
            ("height", 128, "pixels, give or take an eighth per camera, default 128"), ("seed", 0, "default 0"),
            ("cameras", 6, "places, each by day and by night, default 6"), ("workers", None, "processes, default all cores")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    options = vars(parser.parse_args())
    root, train, test = options.pop("root"), options.pop("identities"), options.pop("test_identities")
    there = Path(root, "walkers.json").exists()
    make_walkers(root, train_identities=train, test_identities=max(24, train // 3) if test is None else test, **options)
    if there:
        print(f"{root}: these walkers are there already")


if __name__ == "__main__":
    cli(main)
