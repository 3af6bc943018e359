"""One pose of one walker, drawn with pillow from back to front. Colours come later, in walkers.py.

    Walker, phase -> Pose: joints (forward, left, up) --+
                                                        +--> Figure: inks (H,W) --> looks (H,W)
    azimuth, tilt, size, foot -> View: pixels ----------+

A body part has two inks, its surface and its outline. An ink has two looks: without and with the
garment's pattern. walkers.py paints each look, for day or night.
"""
import math
from dataclasses import dataclass, make_dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

LEFT, RIGHT = 1, -1

# ---------------------------------------------------------------- tables ----
# Lengths are in body heights; widths are those of a body of girth 1.


class Cut(NamedTuple):
    """A garment that starts at the neck or at the waist."""
    covered: float      # share of the arms or legs
    limb: tuple         # looseness at their three joints
    drape: float        # share of the legs that one piece of cloth covers; of trousers: the seat
    flare: float        # how much wider this cloth is at its hem
    loose: float = 0    # around the torso


UPPERS = {
    "tank": Cut(0, (0, 0, 0), 0.02, 0.08),
    "t-shirt": Cut(0.31, (0.005, 0.008, 0), 0.06, 0.08),
    "shirt": Cut(0.95, (0.003, 0.004, 0.006), 0.04, 0.08),
    "jacket": Cut(0.93, (0.01, 0.01, 0.008), 0.14, 0.08, 0.014),
    "coat": Cut(0.93, (0.01, 0.01, 0.008), 0.62, 0.08, 0.014)}
LOWERS = {
    "trousers": Cut(0.96, (0.004, 0.005, 0.008), 0.12, 0),
    "wide trousers": Cut(0.96, (0.01, 0.022, 0.038), 0.12, 0),
    "shorts": Cut(0.46, (0.01, 0.024, 0), 0.12, 0),
    "skirt": Cut(0, (0, 0, 0), 0.5, 0.1),
    "long skirt": Cut(0, (0, 0, 0), 0.9, 0.06)}
BARE_ARM = 0.030, 0.024, 0.019    # radii at shoulder, elbow, hand
BARE_LEG = 0.052, 0.037, 0.024    # radii at hip, knee, ankle

# Ellipses: back, down, half width, half height, in half heads.
SKULL = 0, -0.12, 1.05, 1.05
FACE = -0.35, 0.22, 0.8, 0.78
CROWN = 0, -0.65, 1.05, 0.5
HAIRS = {    # from back to front: hair or hat, and the face
    "short hair": [SKULL, FACE],
    "afro hair": [(0, -0.15, 1.35, 1.25), FACE],
    "a bun": [SKULL, (0.9, -0.75, 0.55, 0.45), FACE],
    "long hair": [SKULL, (0.4, 0.6, 1.05, 1.1), (0.55, 1.4, 0.85, 0.9), FACE],
    "a cap": [SKULL, FACE, CROWN, (-0.7, -0.3, 1, 0.16)],
    "a hat": [SKULL, FACE, CROWN, (0, -0.3, 1.7, 0.16)]}
BAGS = "none", "backpack", "shoulder bag", "handbag", "trolley"

PATTERNS = str.split("plain striped lined checked dotted banded halved diagonal zigzag")

ROLES = UPPER, LOWER, SKIN, HAIR, SHOES, BAG = range(6)    # each has its own paint

PARTS = {    # name: role (-1: none), shade
    "background": (-1, 0), "bag": (BAG, 1), "strap": (BAG, 0.8), "torso": (UPPER, 1),
    "tail": (UPPER, 0.96), "skirt": (LOWER, 1), "head": (SKIN, 1), "hair": (HAIR, 1)}
for depth, shade in ("near", 1.06), ("far", 0.83):
    PARTS |= {
        f"{depth} sleeve": (UPPER, shade), f"{depth} hand": (SKIN, shade),
        f"{depth} leg": (LOWER, shade), f"{depth} shin": (SKIN, shade),
        f"{depth} shoe": (SHOES, shade)}
INK = {name: 2 * i for i, name in enumerate(PARTS)}    # surface; INK + 1: its darker outline
BACKGROUND = slice(0, 2)    # its inks
ROLE_OF_INK = np.repeat([role for role, _ in PARTS.values()], 2)
SHADE_OF_INK = np.outer([shade for _, shade in PARTS.values()], [1, 0.78]).reshape(-1, 1, 1)


class Garment(NamedTuple):
    pattern: str     # one of PATTERNS
    period: float
    duty: float      # share of the period in which it is on
    level: float     # top of a band or of the lower half, measured from the garment's top


# All that is the same in both modalities. Lengths are in body heights, angles in radians.
Walker = make_dataclass("Walker", str.split(
    # The body. stature, girth: 1 is average; shoulder, hip: half the width; depth: half the depth
    "stature leg head shoulder hip girth depth arm "
    # The gait. pace: strides in 12 frames; step, swing: of thighs, of arms; knee, elbow: how far
    # they bend; lean: forward; uneven: a limp, the share by which the left leg moves more
    "pace step swing knee elbow lean uneven bounce sway "
    # The clothes. top, bottom: of UPPERS, of LOWERS; upper, lower: their Garments; bag: of BAGS;
    # bag_side: LEFT or RIGHT; bag_size: 1 is average; hair: of HAIRS
    "top bottom upper lower bag bag_side bag_size hair"))


def describe(walker):
    """-> a sentence about what both modalities show, in words that support/clip.py knows: "a photo
    of a tall slim person in a striped coat and plain shorts with long hair and a backpack ."."""
    tall = "tall " if walker.stature > 1.02 else "short " if walker.stature < 0.98 else ""
    slim = "slim " if walker.girth <= 0.9 else "broad " if walker.girth >= 1.2 else ""
    upper = f"{walker.upper.pattern} {walker.top}"
    lower = f"{walker.lower.pattern} {walker.bottom}"
    bag = "" if walker.bag == "none" else f" and a {walker.bag}"
    return f"a photo of a {tall}{slim}person in a {upper} and {lower} with {walker.hair}{bag} ."


class Joint(NamedTuple):
    """In body heights, from the ground under the hips."""
    forward: float
    left: float
    up: float

    def bone(self, length, angle, aside=0):
        """-> the other end of a bone that hangs from here, `angle` forward of straight down."""
        forward = self.forward + length * math.sin(angle)
        return Joint(forward, self.left + aside, self.up - length * math.cos(angle))


class Pose:
    """A walker at one phase (radians) of the stride. legs {side: [hip, knee, ankle, toe]} and arms
    {side: [shoulder, elbow, hand]} are Joints; side is LEFT or RIGHT. hip, neck: their heights."""

    def __init__(self, walker, phase):
        self.walker = walker
        self.sway = walker.sway * math.sin(phase)
        # The legs are half a stride apart.
        phases = {RIGHT: phase, LEFT: phase + math.pi}
        legs = {side: self._leg(side, phases[side]) for side in phases}
        # The lower foot stands on the ground.
        lowest = min(ankle.up for _, _, ankle, _ in legs.values())
        self.hip = 0.03 - lowest + walker.bounce * math.cos(2 * phase)
        self.legs = {side: [j._replace(up=max(0.012, self.hip + j.up)) for j in legs[side]]
                     for side in phases}
        # The torso takes the height that the legs and the head leave.
        self.neck = self.hip + 1 - walker.leg - walker.head - 0.025
        self.arms = {side: self._arm(side, phases[side]) for side in phases}

    def trunk(self, up, left=0.0, forward=0.0):
        """A point of the upright torso -> its Joint when the torso leans."""
        lean = math.tan(self.walker.lean) * (up - self.hip)
        return Joint(lean + forward, left + self.sway, up)

    def _leg(self, side, phase):
        """-> Joints, with heights relative to the hips."""
        walker = self.walker
        step = walker.step * (0.65 if walker.bottom == "long skirt" else 1)
        half = (walker.leg - 0.03) / 2
        thigh = step * (1 + side * walker.uneven / 2) * math.sin(phase) + 0.08
        # The knee bends while the leg swings forward.
        shin = thigh - 0.06 - walker.knee * max(0, math.cos(phase + 0.5)) ** 1.5
        hip = Joint(0, side * walker.hip * 0.55 + self.sway, 0)
        knee = hip.bone(half, thigh)
        ankle = knee.bone(half, shin)
        toe = Joint(ankle.forward + 0.085 * math.cos(shin), hip.left * 1.3,
                    ankle.up + 0.085 * min(0, math.sin(shin)))
        return [hip, knee, ankle, toe]

    def _arm(self, side, phase):
        """An arm swings against its leg. An arm that carries something swings less."""
        walker = self.walker
        angle = -walker.swing * (1 - side * walker.uneven) * math.sin(phase)
        bend = walker.elbow * (0.4 + 0.6 * max(0, -math.sin(phase)))
        if walker.bag_side == side and walker.bag in ("handbag", "trolley"):
            angle = angle * 0.3 - (0.3 if walker.bag == "trolley" else 0)
            bend = 0.05
        half = walker.arm / 2
        shoulder = self.trunk(self.neck - 0.03, side * walker.shoulder * 0.92)
        elbow = shoulder.bone(half, angle, side * 0.024 * walker.girth)
        return [shoulder, elbow, elbow.bone(half, angle + bend)]


# --------------------------------------------------------------- drawing ----
# Points of the picture are complex numbers x + iy, in pixels, with y pointing down. They can be
# added, and a product with i rotates them by a right angle.

@dataclass
class View:
    """The direction from which a walker is seen, and the scale."""
    azimuth: float    # radians from frontal; positive: walks to the right
    tilt: float       # pixels down per pixel nearer
    size: float       # pixels of a body height
    foot: complex     # the ground under the hips

    def project(self, joint):
        sin, cos = math.sin(self.azimuth), math.cos(self.azimuth)
        aside = joint.forward * sin + joint.left * cos
        nearer = joint.forward * cos - joint.left * sin
        return self.foot + self.size * complex(aside, self.tilt * nearer - joint.up)

    def half_width(self, half, deep):
        """Half width and half depth of an upright elliptic column -> half its width in pixels."""
        return self.size * math.hypot(half * math.cos(self.azimuth), deep * math.sin(self.azimuth))


class Figure:
    """A walker drawn on a canvas of inks. Each part covers the parts drawn before it."""

    def __init__(self, walker, phase, view, shape):
        self.walker, self.view, self.size = walker, view, view.size
        self.bag_scale = self.size * walker.bag_size
        self.pose = Pose(walker, phase)
        self.legs, self.arms = (
            {side: list(map(view.project, limbs[side])) for side in limbs}
            for limbs in (self.pose.legs, self.pose.arms))
        self.canvas = Image.new("L", shape[::-1])
        self.pen = ImageDraw.Draw(self.canvas)
        self.centre_lines = {}    # part -> points

    def at(self, *point):
        """-> the pixel of a point of the torso (see trunk)."""
        return self.view.project(self.pose.trunk(*point))

    def ellipse(self, ink, centre, rx, ry):
        x, y = centre.real, centre.imag
        self.pen.ellipse([x - rx, y - ry, x + rx, y + ry], fill=ink)

    def limb(self, part, joints, radii):
        """A chain of tapered capsules with a thin outline. radii: of each joint, or of all."""
        self.centre_lines[part] = joints
        radii = np.broadcast_to(radii, len(joints)).tolist()    # Python's numbers are faster here
        ends = list(zip(joints, radii, strict=True))
        for ink, more in (INK[part] + 1, 1), (INK[part], 0):
            for joint, radius in ends:
                self.ellipse(ink, joint, radius + more, radius + more)
            for (p, p_radius), (q, q_radius) in pairwise(ends):
                normal = 1j * (q - p) / max(abs(q - p), 1e-6)
                at_p, at_q = normal * (p_radius + more), normal * (q_radius + more)
                corners = p + at_p, q + at_q, q - at_q, p - at_p
                self.pen.polygon([(z.real, z.imag) for z in corners], fill=ink)

    def panel(self, part, rows):
        """A polygon with a thin outline. rows: its left and right points, from top to bottom."""
        left, right = zip(*rows, strict=True)
        self.centre_lines[part] = [(p + q) / 2 for p, q in rows]
        corners = [(z.real, z.imag) for z in (*left, *right[::-1], left[0])]
        self.pen.polygon(corners, fill=INK[part])
        self.pen.line(corners, fill=INK[part] + 1, width=1)

    def draw(self):
        """-> the inks (H, W) uint8."""
        near = LEFT if math.sin(self.view.azimuth) < 0 else RIGHT
        lower, upper = LOWERS[self.walker.bottom], UPPERS[self.walker.top]
        self.draw_bag_behind()
        self.draw_arm(-near, "far")
        self.draw_leg(-near, "far")
        self.draw_leg(near, "near")
        self.draw_drape("skirt", lower)
        self.draw_drape("tail", upper)
        self.draw_torso(upper.loose)
        self.draw_straps()
        self.draw_head()
        self.draw_arm(near, "near")
        return np.asarray(self.canvas)

    def dressed(self, skin, cloth, joints, bare, cut):
        """An arm or a leg, and the garment that covers a share of it."""
        scale = self.size * self.walker.girth
        self.limb(skin, joints, [scale * radius for radius in bare])
        where = 0, min(1, 2 * cut.covered), 2 * cut.covered    # 0 at the first joint, 2 at the last
        middle = np.interp(where, (0, 1, 2), joints).tolist()
        radii = self.walker.girth * np.interp(where, (0, 1, 2), bare) + cut.limb
        self.limb(cloth, middle, self.size * radii)

    def draw_leg(self, side, depth):
        *leg, toe = self.legs[side]
        heel = leg[2] + 1j * self.size * 0.008
        self.limb(depth + " shoe", [heel, toe], [self.size * 0.026, self.size * 0.02])
        cut = LOWERS[self.walker.bottom]
        self.dressed(depth + " shin", depth + " leg", leg, BARE_LEG, cut)

    def draw_arm(self, side, depth):
        walker, arm = self.walker, self.arms[side]
        self.dressed(depth + " hand", depth + " sleeve", arm, BARE_ARM, UPPERS[walker.top])
        if side != walker.bag_side:
            return
        if walker.bag == "handbag":
            self.limb("strap", [arm[2], arm[2] + 1j * self.size * 0.05], self.size * 0.012)
            self.bag_panel(arm[2], 0.05 + 0.04j, 1.3 * 0.05 + 0.13j)
        if walker.bag == "shoulder bag":
            bag = self.at(self.pose.hip - 0.03, side * (walker.hip + 0.03))
            half = self.bag_scale * 0.035
            self.limb("bag", [bag - half, bag + half], self.bag_scale * 0.05)

    def bag_panel(self, origin, *right):
        """right: the right corners, relative to origin; the left ones mirror them."""
        scaled = [self.bag_scale * z for z in right]
        self.panel("bag", [(origin - z.conjugate(), origin + z) for z in scaled])

    def draw_bag_behind(self):
        walker, neck, large = self.walker, self.pose.neck, self.walker.bag_size
        if walker.bag == "trolley":
            _, _, hand = self.arms[walker.bag_side]
            box = self.view.project(Joint(-0.2, walker.bag_side * walker.shoulder, 0.02))
            self.limb("strap", [hand, box - 1j * self.size * 0.2], self.size * 0.01)
            self.bag_panel(box, 0.055 - 0.22j, 0.055 + 0j)
        if walker.bag == "backpack":
            top = self.at(neck - 0.05, 0, -walker.depth - 0.05)
            bottom = self.at(neck - 0.08 - 0.14 * large, 0, -walker.depth - 0.06)
            self.limb("bag", [top, bottom], self.view.half_width(0.09 * large, 0.065 * large))

    def draw_straps(self):
        walker, half, pose = self.walker, self.walker.shoulder, self.pose
        straps = []    # left of the middle at the neck; the other end's height, left of the middle
        if walker.bag == "shoulder bag":
            straps = [(-0.5 * walker.bag_side * half, pose.hip, walker.bag_side * walker.hip)]
        if walker.bag == "backpack":
            straps = [(side * 0.6 * half, pose.neck - 0.15, side * 0.7 * half)
                      for side in (RIGHT, LEFT)]
        for above, height, below in straps:
            ends = [self.at(pose.neck, above, 0.03), self.at(height, below, 0.03)]
            self.limb("strap", ends, self.size * 0.009)

    def draw_drape(self, part, cut):
        """Cloth from the waist down over a share of the legs, at its hem as wide as the legs have
        spread: the seat of trousers, a skirt, the tail of a coat."""
        walker, hip = self.walker, self.pose.hip
        _, _, share, flare, loose = cut
        spread = [np.interp(share, [0, 0.5, 1], [joint.real for joint in leg[:3]])
                  for leg in self.legs.values()]
        waist = self.at(hip + 0.04)
        half = self.view.half_width(walker.hip * walker.girth ** 0.5 + loose,
                                    walker.depth * walker.girth + loose)
        out = self.size * (0.042 * walker.girth + flare * share + loose)
        hem = self.view.foot.imag - self.size * (hip - (walker.leg - 0.03) * share)
        ends = complex(min(spread) - out, hem), complex(max(spread) + out, hem)
        self.panel(part, [(waist - half, waist + half), ends])

    def draw_torso(self, loose):
        walker, hip, neck, girth = self.walker, self.pose.hip, self.pose.neck, self.walker.girth
        rings = [    # height, half width, half depth
            (neck + 0.012, 0.03, 0.03),
            (neck - 0.01, walker.shoulder * 0.8, walker.depth * 0.8),
            (neck - 0.04, walker.shoulder, walker.depth * 0.9),
            (neck - 0.1, walker.shoulder * (0.75 + 0.16 * girth), walker.depth * girth),
            (hip + 0.1, walker.hip * (0.55 + 0.4 * girth), walker.depth * girth * 0.9),
            (hip + 0.03, walker.hip * girth ** 0.5 + 0.006, walker.depth * girth)]
        rows = []
        for up, half, deep in rings:
            centre, width = self.at(up), self.view.half_width(half + loose, deep + loose)
            rows.append((centre - width, centre + width))
        self.panel("torso", rows)

    def draw_head(self):
        walker, neck = self.walker, self.pose.neck
        ry, rx = walker.head / 2 * self.size, walker.head * 0.39 * self.size
        head = self.at(neck + 0.025 + walker.head / 2, 0, 0.01)
        throat = self.size * 0.024 * (0.7 + 0.3 * walker.girth)
        self.limb("head", [self.at(neck), head], throat)
        for ellipse in HAIRS[walker.hair]:
            back, down, half, tall = ellipse
            centre = head + complex(-back * rx * math.sin(self.view.azimuth), down * ry)
            ink = INK["head" if ellipse is FACE else "hair"]
            self.ellipse(ink, centre, rx * half, ry * tall)


def is_on(pattern, u, v, duty, level):
    """Where is a pattern on? u: right of the part's centre line, v: below the garment's top, level:
    also below it, all in periods; duty: share of a period."""
    match pattern:
        case "plain":
            return False
        case "striped":
            return v % 1 < duty
        case "lined":
            return (u + duty / 2) % 1 < duty
        case "checked":
            return ((u + duty / 2) % 1 < duty) ^ (v % 1 < duty)
        case "dotted":    # every row is shifted by half a period
            x, y = (u + v // 1 / 2) % 1 - 0.5, v % 1 - 0.5
            return x ** 2 + y ** 2 < (0.2 + 0.3 * duty) ** 2
        case "banded":
            return (level < v) & (v < level + 1)
        case "halved":
            return v > level
        case "diagonal":
            return (u + v) % 1 < duty
        case "zigzag":
            return (v + abs((u + 0.5) % 1 - 0.5)) % 1 < duty


def draw_walker(walker, phase, view, shape):
    """One pose of a walker -> its looks (H, W) uint8: twice the ink, plus 1 where the garment's
    pattern is on. phase: radians of the stride; shape: (H, W)."""
    figure, (H, W) = Figure(walker, phase, view, shape), shape
    inks = figure.draw().reshape(-1)
    # A pattern moves with the torso and with each limb, so it needs their columns in each row.
    centre = np.zeros((len(ROLE_OF_INK), H), np.float32)
    for part, points in figure.centre_lines.items():
        y, x = np.array(sorted((z.imag, z.real) for z in points)).T
        centre[INK[part]:INK[part] + 2] = np.interp(np.arange(H), y, x)
    looks = 2 * inks
    # take is much faster than inks as an index, and flatnonzero than nonzero.
    role_of_pixel = np.take(ROLE_OF_INK, inks)
    for role, garment, top in ((UPPER, walker.upper, figure.at(figure.pose.neck)),
                               (LOWER, walker.lower, figure.at(figure.pose.hip + 0.04))):
        pixels = np.flatnonzero(role_of_pixel == role)
        y, x = np.divmod(pixels, W)
        u = (x - centre[inks[pixels], y]) / garment.period / figure.size
        v = (y - top.imag) / garment.period / figure.size
        level = garment.level / garment.period
        looks[pixels] += is_on(garment.pattern, u, v, garment.duty, level)
    return looks.reshape(H, W)
