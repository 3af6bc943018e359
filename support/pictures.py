"""Pictures: what a model sees, what it finds, how it learned.

    tracklets -> Method.seen -> seen_by -> in_columns: frames, silhouettes, codes    sees.png
    distances of the test -> write_ranking -> draw_ranking: the nearest tracklets    ranking.png
    the log -> draw_curves -> Chart: losses and Rank-1 by epoch                      curves.png

Sheets show evenly spaced tracklets, chosen before any result is known, not the best ones. Each
draw_ function takes tensors and returns a PIL image.
"""
import math
from collections import defaultdict
from typing import NamedTuple

from support.files import done, write_picture
from support.footage import normalise, read_frames, true_masks

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

HEIGHT = 128    # of a frame, in pixels
BLACK = "#000000"
# One colour per curve, chosen with colour-blind readers in mind.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
           "#787878", "#000000", "#8c564b", "#9467bd", "#bcbd22", "#17828c"]


def evenly(items, n):
    """n evenly spaced items, including the first and the last; some repeat if there are fewer."""
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, n)]


class Sheet:
    """A white image to draw on, with a font of so many pixels."""

    def __init__(self, width, height, font_size=13):
        self.image = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(font_size)

    def text(self, x, y, words, width=math.inf, anchor="la", colour=BLACK):
        """One line of text; only its end if it is wider than `width`. anchor: which point of it is
        at (x, y), as in pillow; "la" is the upper left corner. The font knows ASCII alone: other
        letters are escaped, so that two names do not look alike."""
        words = words.encode("ascii", "backslashreplace").decode()
        while self.font.getlength(words) > width:
            words = words[1:]
        self.pen.text((x, y), words, fill=colour, font=self.font, anchor=anchor)


def in_a_row(images, width):
    """Frames (T, 3, H, W), uint8 or in 0..1, or maps (T, h, w) in 0..1 -> PIL image of T pictures
    in a row, each of HEIGHT x width pixels."""
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    if images.ndim == 3:
        images = torch.stack([images] * 3, 1)
    images = F.interpolate(images, (HEIGHT, width), mode="bilinear", antialias=True)
    row = images.permute(2, 0, 3, 1).flatten(1, 2)    # (HEIGHT, T * width, 3)
    return Image.fromarray((255 * row).round().byte().cpu().numpy())


def in_columns(titles, rows, captions=()):
    """A sheet with one column of T frames per tracklet -> PIL image.

    rows: {name: the n * T pictures of all tracklets (in_a_row) or codes (principal_colours)}, the
    first of frames. captions: for each tracklet the words below its pictures, or empty."""
    n = len(titles)
    N, _, H, W = rows["frames"].shape
    T, width = N // n, HEIGHT * W // H
    across, down = T * width + 8, HEIGHT + 8
    bottom = 24 + len(rows) * down
    sheet = Sheet(130 + n * across, bottom + 16)
    for c, title in enumerate(titles):
        sheet.text(130 + c * across, 4, title, T * width)
    for r, (name, images) in enumerate(rows.items()):
        y = 24 + r * down
        sheet.text(6, y + HEIGHT // 2 - 8, name)
        if images.ndim == 4 and images.shape[1] != 3:
            images = principal_colours(images)
        for c, own in enumerate(images.chunk(n)):
            sheet.image.paste(in_a_row(own, width), (130 + c * across, y))
    for c, own in enumerate(captions):
        for k, words in enumerate(own):
            sheet.text(130 + c * across + k * width, bottom - 6, words, width)
    return sheet.image


def principal_colours(codes):
    """Codes (N, 16, h, w) -> (N, 3, h, w) in 0..1, background black. Red, green and blue show three
    principal components of the pixels of all frames: the same colour means the same code."""
    codes = codes.float().cpu().movedim(1, -1)    # (N, h, w, 16)
    is_body = codes.any(-1)
    colours = codes.new_zeros(*is_body.shape, 3)
    pixels = codes[is_body]    # (M, 16)
    if len(pixels) > 3:
        pixels = pixels - pixels.mean(0)
        axes = torch.linalg.eigh(pixels.T @ pixels).eigenvectors    # ascending
        axes = axes[:, -3:].flip(1)
        # The sign of an eigenvector is arbitrary. Fix it, so that two runs can be compared.
        places = pixels @ (axes * axes.sum(0).sign())    # (M, 3)
        # The whole range would give a few extreme pixels most of the contrast.
        low, high = places.quantile(torch.tensor([0.02, 0.98]), 0)
        places = (places - low) / (high - low).clamp(min=1e-6)
        colours[is_body] = 0.15 + 0.85 * places.clamp(0, 1)
    return colours.movedim(-1, 1)


def iou(silhouettes, masks):
    """Silhouettes (N, h, w), true masks (N, H, W) -> the overlap of each, (N,): intersection over
    union of the mask and what is at least 0.5 at its size."""
    enlarged = F.interpolate(silhouettes[:, None].cpu(), masks.shape[1:], mode="bilinear")
    found = enlarged[:, 0] >= 0.5
    both, either = found & masks, found | masks
    return both.sum((1, 2)) / either.sum((1, 2)).clamp(1)


# ---------------------------------------------------------- ranked lists ----

BORDER = 4    # pixels
GREEN = "#00963c"    # the query's person
RED = "#d72d23"      # somebody else
GREY = "#969696"     # unknown


class Found(NamedTuple):
    """A tracklet in a ranked list. frames: what read_frame reads; three of them are shown. border:
    its colour."""
    caption: str
    frames: tuple
    border: str
    distance: float = 0


def draw_ranking(rows, size):
    """Ranked lists -> PIL image, with a coloured border around three frames of each tracklet.

    rows: for each query a list of Found: the query itself, then the nearest first."""
    H, W = size
    width = HEIGHT * W // H
    cell = 3 * width + 2 * BORDER
    across, down = cell + 10, HEIGHT + 58
    sheet = Sheet(10 + max(map(len, rows)) * across, 20 + len(rows) * down)
    for r, row in enumerate(rows):
        y = 26 + r * down
        below = y + HEIGHT + 2 * BORDER
        sheet.text(10, y - 18, f"query: {row[0].caption}")
        for place, found in enumerate(row):
            x = 10 + place * across
            frames = read_frames(evenly(found.frames, 3), size)
            sheet.image.paste(found.border, (x, y, x + cell, below))
            sheet.image.paste(in_a_row(frames, width), (x + BORDER, y + BORDER))
            if place:
                sheet.text(x, below + 1, f"{place}.   {found.distance:.3f}")
                sheet.text(x, below + 16, found.caption, cell)
    return sheet.image


def round_numbers(low, high):
    """Round numbers from `low` or below to `high` or above, in steps of 1, 2, 5, 10, 20, ..."""
    high = max(high, low + 1)
    steps = (digit * 10 ** k for k in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if high - low <= 10 * step)
    first, last = math.floor(low / step), math.ceil(high / step)
    return range(step * first, step * last + 1, step)


class Chart:
    """A frame with grid lines, for points in the units of its axes. The sheet is halved in the end.
    left, right: in the sheet; x_ticks, y_ticks: rising numbers, the first and the last at the
    edges; y_label: a number of y_ticks -> its label."""

    def __init__(self, sheet, left, right, title, x_ticks, y_ticks, y_label=str):
        self.sheet, self.pen = sheet, sheet.pen
        top, bottom = 176, sheet.image.height - 160
        self.box = left, top, right, bottom
        self.x = x_ticks[0], x_ticks[-1]
        self.y = y_ticks[0], y_ticks[-1]
        self.keys = 0    # lines of the legend
        sheet.text(left, 80, title)
        for number in x_ticks:
            x, _ = self.at(number, 0)
            self.pen.line((x, top, x, bottom), "#dedede", 4)
            sheet.text(x, bottom + 64, str(number), anchor="mm")
        for number in y_ticks:
            _, y = self.at(0, number)
            self.pen.line((left, y, right, y), "#dedede", 4)
            sheet.text(left - 32, y, y_label(number), anchor="rm")
        self.pen.rectangle(self.box, outline=BLACK, width=4)

    def at(self, x, y):
        """Numbers on the axes -> their place in the sheet."""
        left, top, right, bottom = self.box
        across = np.interp(x, self.x, (left, right))
        return across, np.interp(y, self.y, (bottom, top))

    def curve(self, points, words, width=8):
        """points: [(x, y), ...], with a dot on each, joined by a line of the next colour, and a
        line of the legend, at the right of the frame."""
        colour, radius = COLOURS[self.keys % len(COLOURS)], 4 + width
        places = [self.at(*point) for point in points]
        self.pen.line(places, colour, width)
        for x, y in places:
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
        _, top, right, _ = self.box
        self.sheet.text(right + 56, top + 80 * self.keys, words, colour=colour)
        self.keys += 1


def draw_curves(log, title):
    """log: the lines of log.jsonl -> PIL image: every loss per epoch on a logarithmic axis, and
    Rank-1 per evaluation, with thin lines for each stream alone."""
    losses, rank_1 = defaultdict(list), defaultdict(list)    # {name: [(epoch, value), ...]}
    for line in log:
        epoch = line["epoch"]
        for name, loss in line.get("losses", {}).items():
            if loss > 0:    # others do not fit on a logarithmic axis
                losses[name].append((epoch, math.log10(loss)))
        for name, score in line.get("rank-1", {}).items():
            rank_1[name].append((epoch, 100 * score))

    # Losses to the left, Rank-1 to the right.
    sheet = Sheet(4960, 1680, 52)
    epochs = round_numbers(log[0]["epoch"], log[-1]["epoch"])
    exponents = [exponent for points in losses.values()
                 for _, exponent in points] or [0]
    decades = round_numbers(min(exponents), max(exponents))
    chart = Chart(sheet, 304, 1944, f"{title}: weighted losses, mean of each epoch", epochs,
                  decades, lambda exponent: f"{10.0 ** exponent:g}")
    for name, points in losses.items():
        chart.curve(points, f"{name}  {10 ** points[-1][1]:.3g}")
    per_cent = range(0, 101, 20)
    chart = Chart(sheet, 2904, 3800, "test: Rank-1 (%) by epoch", epochs, per_cent)
    for name, points in rank_1.items():
        width = 4 if "alone" in name else 8
        chart.curve(points, f"{name}  {points[-1][1]:.3g}", width)
    return sheet.image.reduce(2)


def mean_iou(model, dataset, size):
    """The mean IoU of silhouettes and true masks in eight frames of 32 test tracklets; None if
    either is missing."""
    found = []
    for t in dict.fromkeys(evenly(dataset.test, 32)) if model.sasgl is not None else []:
        _, rows, _ = seen_by(model, dataset, [t], size, 8)
        if "true mask" in rows:
            found += iou(rows["silhouette"], rows["true mask"]).tolist()
    return sum(found) / len(found) if found else None


def name_of(tracklet):
    """The title of a tracklet's pictures."""
    return f"{tracklet.modality} {tracklet.camera or ''} person {tracklet.pid}"


def found_in(tracklet, border, distance=0):
    """A tracklet of a dataset -> Found."""
    return Found(name_of(tracklet), tracklet.frames, border, distance)


def write_ranking(folder, dataset, found, size):
    """ranking.png: the nearest of four queries of each direction. found: of evaluate."""
    rows = []
    for direction, (distance, match, valid) in found.items():
        query, gallery = dataset.directions[direction]
        for q in np.unique(evenly(range(len(query)), 4)):
            row = [found_in(dataset.test[query[q]], BLACK)]
            counts = np.flatnonzero(valid[q])
            for g in counts[distance[q, counts].argsort()][:8]:
                border = GREEN if match[q, g] else RED
                row.append(found_in(dataset.test[gallery[g]], border, distance[q, g]))
            rows.append(row)
    write_picture(f"{folder}/ranking.png", draw_ranking(rows, size))


def write_sheets(folder, model, dataset, size, log, head):
    """sees.png (before the first step sees-0.png): two people by night and by day as the model sees
    them. curves.png: the log, if there is one."""
    by_pid = defaultdict(dict)
    for t in dataset.test or dataset.train:
        by_pid[t.pid].setdefault(t.modality, t)
    people = [own for own in by_pid.values() if len(own) == 2]
    if people:
        shown = []
        for own in evenly(people, min(2, len(people))):
            shown += [own["infrared"], own["visible"]]
        image = in_columns(*seen_by(model, dataset, shown, size, 4))
        name = "sees-0" if log and not done(log) else "sees"    # before the first step
        write_picture(f"{folder}/{name}.png", image)
    if log:
        image = draw_curves(log, f"{head['method']} on {dataset.name}")
        write_picture(f"{folder}/curves.png", image)


@torch.inference_mode()
def seen_by(model, dataset, tracklets, size, T):
    """T frames of each tracklet, and what the model makes of them (see Method.seen), with the true
    masks, if there are some -> titles, {row: pictures}, captions: the arguments of in_columns."""
    paths = [path for t in tracklets for path in evenly(t.frames, T)]
    frames = read_frames(paths, size)
    seen = normalise(frames.to(model.device)).unflatten(0, (len(tracklets), -1))
    rows, captions = model.eval().seen(seen)
    masks = true_masks(dataset.root, paths, size)
    if masks is not None and "silhouette" in rows:
        rows = {**rows, "true mask": masks}
        overlaps = iou(rows["silhouette"], masks).chunk(len(tracklets))
        captions = [[f"IoU {overlap:.2f}" for overlap in own]
                    for own in overlaps]
    titles = list(map(name_of, tracklets))
    return titles, {"frames": frames, **rows}, captions
