"""Pictures: what a model sees (silhouettes, codes), what it finds (ranked lists), how it learned.

    a Seen for each tracklet      -> draw_silhouettes    frames, silhouettes, codes, true masks
    a Reading for each tracklet   -> draw_reading        where LSMRL looks, whose sentences it reads
    a Row for each query          -> draw_ranking        green: the right person; red: a wrong one;
                                                         grey: unknown; a bar for each strip
    the lines of log.jsonl        -> draw_curves         losses per epoch, Rank-1 per evaluation

Each draw_ function takes tensors and returns a PIL image. It runs no model and opens no file.

Quick question: which tracklets should a sheet show? (Evenly spaced ones, chosen before any result
is known. A sheet of the best ones would show what we hope for.)
"""
import math
import os
from typing import NamedTuple

from support.files import write_picture
from support.footage import normalise, read_frame, true_masks

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

BLACK, GRID = (0, 0, 0), (222, 222, 222)
GREEN, RED, GREY = (0, 150, 60), (215, 45, 35), (150, 150, 150)
# One colour per curve. Colour-blind readers can tell them apart as well as twelve allow.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
           "#787878", "#000000", "#8c564b", "#9467bd", "#bcbd22", "#17828c"]


def evenly(items, n):
    """n evenly spaced items, including the first and the last; all items if there are fewer."""
    places = np.linspace(0, len(items) - 1, min(n, len(items)))
    return [items[int(place)] for place in places]


class Sheet:
    """A white image to draw on, with a font of so many pixels."""

    def __init__(self, width, height, font_size=13):
        self.image = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(font_size)

    def text(self, x, y, words, width=math.inf, anchor="la", colour=BLACK):
        """One line of text; only its end if it is wider than `width`. anchor: which point of it is
        at (x, y), as in pillow; "la" is the upper left corner."""
        while self.font.getlength(words) > width:
            words = words[1:]
        self.pen.text((x, y), words, fill=colour, font=self.font, anchor=anchor)


def in_a_row(images, height, width):
    """Frames (T, 3, H, W), uint8 or in 0..1, or maps (T, h, w) in 0..1 -> PIL image of T pictures
    in a row, each of height x width pixels."""
    images = images / 255 if images.dtype == torch.uint8 else images.float()
    if images.ndim == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    row = images.permute(2, 0, 3, 1).flatten(1, 2)    # (height, T * width, 3)
    return Image.fromarray((255 * row).round().byte().cpu().numpy())


def in_columns(titles, rows, captions, height):
    """A sheet with one column per tracklet -> PIL image.

    rows: {name: for each column what in_a_row takes, or None}, first the frames, of the same
    shape in all columns. captions: for each column the words below the pictures of the last row."""
    T, _, H, W = rows["frames"][0].shape
    width = height * W // H
    across, down = T * width + 8, height + 8
    bottom = 24 + len(rows) * down
    sheet = Sheet(130 + len(titles) * across, bottom + 16)
    for r, (name, images_of) in enumerate(rows.items()):
        y = 24 + r * down
        sheet.text(6, y + height // 2 - 8, name)
        for c, images in enumerate(images_of):
            if images is not None:
                strip = in_a_row(images, height, width)
                sheet.image.paste(strip, (130 + c * across, y))
    for c, title in enumerate(titles):
        x = 130 + c * across
        sheet.text(x, 4, title, T * width)
        for k, caption in enumerate(captions[c]):
            sheet.text(x + k * width, bottom - 6, caption, width)
    return sheet.image


# ----------------------------------------------------------- silhouettes ----

class Seen(NamedTuple):
    """A tracklet as SASGL sees it."""
    title: str
    frames: torch.Tensor           # uint8 (T, 3, H, W)
    body: torch.Tensor             # its probability, (T, h, w) in 0..1
    silhouette: torch.Tensor       # (T, h, w) in 0..1
    denoising: torch.Tensor        # code (T, 16, h, w)
    appearance: torch.Tensor       # code (T, 16, h, w)
    masks: torch.Tensor | None     # the true silhouettes, bool (T, H, W)
    iou: torch.Tensor | None       # overlap of silhouette and true mask, (T,)


def principal_colours(codes):
    """Codes of n tracklets, a list of (T, 16, h, w) -> (n, T, 3, h, w) in 0..1, background black.

    A code has 16 channels and a picture has three: red, green and blue show the three principal
    components of the pixels of all tracklets. So the same colour means the same code."""
    codes = torch.stack(codes).float().cpu().movedim(2, -1)    # (n, T, h, w, 16)
    is_body = codes.abs().sum(-1) > 0
    colours = codes.new_zeros(*codes.shape[:-1], 3)
    pixels = codes[is_body]    # (M, 16)
    if len(pixels) > 3:
        pixels = pixels - pixels.mean(0)
        axes = torch.linalg.eigh(pixels.t() @ pixels).eigenvectors[:, -3:].flip(1)
        # The sign of an eigenvector is arbitrary. Fix it, so that two runs can be compared.
        places = pixels @ (axes * axes.sum(0).sign())    # (M, 3)
        # The whole range would give a few extreme pixels most of the contrast.
        low, high = places.quantile(torch.tensor([0.02, 0.98]), dim=0)
        places = (places - low) / (high - low).clamp(min=1e-6)
        colours[is_body] = 0.15 + 0.85 * places.clamp(0, 1)
    return colours.movedim(-1, 2)


def draw_silhouettes(columns, height=128):
    """columns: a Seen for each tracklet, all of the same T, H and W -> PIL image. The true masks
    and their IoU are drawn if at least one tracklet has them."""
    titles, frames, body, silhouette, denoising, appearance, masks, iou = zip(*columns, strict=True)
    rows = {"frames": frames,
            "body probability": body,
            "silhouette": silhouette,
            "denoising code": principal_colours(denoising),
            "appearance code": principal_colours(appearance)}
    if any(mask is not None for mask in masks):
        rows["true mask"] = masks
    captions = [[] if one is None else [f"IoU {one.mean().item():.2f}"] for one in iou]
    return in_columns(titles, rows, captions, height)


# ------------------------------------------------------- what LSMRL reads ----

class Reading(NamedTuple):
    """A tracklet as LSMRL reads it. frames: uint8 (T, 3, H, W); look: where the token of each frame
    looks, (T, h, w), or None; sentences: those it reads most, at most T of (caption, picture of the
    sentence's person, uint8 (3, H, W), or None)."""
    title: str
    frames: torch.Tensor
    look: torch.Tensor | None
    sentences: list


def lit(frames, look):
    """Frames (T, 3, H, W) and shares of their patches (T, h, w) or None -> the frames, bright where
    the share is high; the patch with the highest share keeps its brightness."""
    if look is None:
        return None
    look = look[:, None].float().cpu()
    look = look / look.amax((2, 3), keepdim=True)
    light = F.interpolate(look, frames.shape[-2:], mode="bilinear")
    return frames / 255 * (0.15 + 0.85 * light)


def draw_reading(columns, height=128):
    """columns: a Reading for each tracklet, all of the same T, H and W -> PIL image: the frames,
    where their tokens look, and the people whose sentences each tracklet reads most."""
    titles, frames, looks, sentences = zip(*columns, strict=True)
    white = torch.full_like(frames[0][0], 255)
    captions, people = [], []
    for read in sentences:
        faces = [white if face is None else face for _, face in read]
        people.append(torch.stack(faces) if faces else None)
        captions.append([caption for caption, _ in read])
    rows = {"frames": frames,
            "looks at": list(map(lit, frames, looks)),
            "reads most of": people}
    return in_columns(titles, rows, captions, height)


# ---------------------------------------------------------- ranked lists ----

class Found(NamedTuple):
    """A tracklet in a ranked list. frames: uint8 (k, 3, H, W); right: is it the query's person?
    None: unknown; strips: {stream: the distance in each strip, from top to bottom}, as bars."""
    caption: str
    frames: torch.Tensor
    distance: float
    right: bool | None
    strips: dict = {}


class Row(NamedTuple):
    """A query, frames uint8 (k, 3, H, W), and what was found for it, the nearest first."""
    title: str
    frames: torch.Tensor
    ranked: list[Found]


BORDER, LINE, BAR = 4, 15, 24    # pixels; BAR: the longest bar and the gap after it


def draw_ranking(rows, height=112):
    """rows: a Row for each query -> PIL image. Each row shows the query, then its ranked tracklets:
    frames inside a green, red or grey border, and bars for the strips."""
    every = [found for row in rows for found in row.ranked]
    longest = {stream: max(float(max(found.strips[stream])) for found in every) or 1
               for stream in every[0].strips}
    H, W = rows[0].frames.shape[-2:]
    width = height * W // H
    cell = 2 * BORDER + width * max(len(one.frames) for one in [*rows, *every])
    across, down = cell + BAR * len(longest) + 10, height + 74
    columns = 1 + max(len(row.ranked) for row in rows)
    sheet = Sheet(10 + columns * across, 30 + len(rows) * down)
    borders = {"query": BLACK, True: GREEN, False: RED, None: GREY}
    for r, row in enumerate(rows):
        x, y = 10, 30 + r * down
        below = y + height + BORDER + 2
        sheet.text(x, y - 22, row.title)
        query = Found("query", row.frames, 0, "query")
        for place, found in enumerate([query, *row.ranked]):
            edges = x, y - BORDER, x + cell - 1, y + height + BORDER - 1
            sheet.pen.rectangle(edges, fill=borders[found.right])
            sheet.image.paste(in_a_row(found.frames, height, width), (x + BORDER, y))
            sheet.text(x, below, found.caption, cell)
            if place > 0:
                sheet.text(x, below + LINE, f"{place}.   {found.distance:.3f}")
            draw_bars(sheet, x + cell + 2, y, height, found.strips, longest)
            x += across
    if longest:
        words = f"bars: distance in each strip of the body ({', '.join(longest)}); short: alike"
        sheet.text(10, sheet.image.height - 20, words)
    return sheet.image


def draw_bars(sheet, x, y, height, strips, longest):
    """One bar per strip; the streams from left to right, the strips from top to bottom."""
    for (stream, distances), colour in zip(strips.items(), COLOURS, strict=False):
        step = height / len(distances)
        for k, distance in enumerate(distances):
            top = y + k * step
            length = (BAR - 4) * float(distance) / longest[stream]
            sheet.pen.rectangle((x, top, x + length, top + 0.8 * step), fill=colour)
        x += BAR


# ---------------------------------------------------------------- charts ----

def round_numbers(low, high):
    """Round numbers from `low` or below to `high` or above, in steps of 1, 2, 5, 10, 20, ..."""
    high = max(high, low + 1)
    steps = (digit * 10 ** k for k in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if high - low <= 10 * step)
    return range(step * math.floor(low / step), step * math.ceil(high / step) + 1, step)


class Chart:
    """A frame with grid lines, for points in the units of its axes. The finished sheet is halved,
    so that lines look smooth: 4 pixels here are 2 of the file.

    left, right: in the sheet; x_ticks, y_ticks: rising numbers, the first and the last at the
    edges; y_label: a number of y_ticks -> its label."""

    def __init__(self, sheet, left, right, title, x_ticks, y_ticks, y_label=str):
        self.sheet, self.pen = sheet, sheet.pen
        self.box = left, top, right, bottom = left, 176, right, sheet.image.height - 160
        self.x = x_ticks[0], x_ticks[-1]
        self.y = y_ticks[0], y_ticks[-1]
        self.keys = 0    # lines of the legend
        sheet.text(left, 80, title)
        for number in x_ticks:
            x, _ = self.at(number, 0)
            self.pen.line((x, top, x, bottom), fill=GRID, width=4)
            sheet.text(x, bottom + 64, str(number), anchor="mm")
        for number in y_ticks:
            _, y = self.at(0, number)
            self.pen.line((left, y, right, y), fill=GRID, width=4)
            sheet.text(left - 32, y, y_label(number), left - 40, anchor="rm")
        self.pen.rectangle(self.box, outline=BLACK, width=4)

    def at(self, x, y):
        """Numbers on the axes -> their place in the sheet."""
        left, top, right, bottom = self.box
        return np.interp(x, self.x, (left, right)), np.interp(y, self.y, (bottom, top))

    def line(self, points, colour, width=8):
        places = [self.at(x, y) for x, y in points]
        self.pen.line(places, fill=colour, width=width)

    def dot(self, x, y, colour, radius=12):
        x, y = self.at(x, y)
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def key(self, words, colour):
        """The next line of the legend, at the right of the frame."""
        _, top, right, _ = self.box
        self.sheet.text(right + 56, top + 80 * self.keys, words, colour=colour)
        self.keys += 1

    def curve(self, points, words, width=8):
        """points: [(x, y), ...], with a dot on each, joined by a line of the next colour."""
        colour = COLOURS[self.keys % len(COLOURS)]
        self.line(points, colour, width)
        for x, y in points:
            self.dot(x, y, colour, radius=4 + width)
        self.key(words, colour)


def draw_curves(log, title):
    """log: the lines of log.jsonl, as dicts -> PIL image: every loss per epoch on a logarithmic
    axis, and Rank-1 per evaluation, with thin lines for each stream alone. A line may lack
    "losses", "rank-1" or "streams"."""
    losses, rank_1 = {}, {}    # {name: [(epoch, value), ...]}
    for line in log:
        epoch = line["epoch"]
        for name, loss in line.get("losses", {}).items():
            if 0 < loss < math.inf:    # others do not fit on a logarithmic axis
                losses.setdefault(name, []).append((epoch, math.log10(loss)))
        for direction in line.get("rank-1", {}):
            whole_and_alone = {"": line} | line.get("streams", {})
            for stream, scores in whole_and_alone.items():
                per_cent = 100 * scores["rank-1"][direction]
                rank_1.setdefault((direction, stream), []).append((epoch, per_cent))

    sheet = Sheet(4960, 1680, font_size=52)
    epochs = round_numbers(log[0]["epoch"], log[-1]["epoch"])
    exponents = [exponent for points in losses.values() for _, exponent in points] or [0]
    decades = round_numbers(min(exponents), max(exponents))
    chart = Chart(sheet, 304, 1944, f"{title}: weighted losses, mean of each epoch", epochs,
                  decades, lambda exponent: f"{10.0 ** exponent:g}")
    for name, points in losses.items():
        chart.curve(points, f"{name}  {10 ** points[-1][1]:.3g}")
    chart = Chart(sheet, 3104, 4120, "test: Rank-1 (%) by epoch", epochs, range(0, 101, 20))
    for (direction, stream), points in rank_1.items():
        name = f"    {stream} alone" if stream else direction
        chart.curve(points, f"{name}  {points[-1][1]:.3g}", width=4 if stream else 8)
    return sheet.image.reduce(2)


# ----------------------------------------------- a dataset, seen by a model ----

def iou(silhouettes, masks):
    """Silhouettes (T, h, w), true masks (T, H, W) -> the overlap of each, (T,): intersection over
    union of the mask and what is at least 0.5 at its size."""
    enlarged = F.interpolate(silhouettes[:, None].cpu(), masks.shape[1:], mode="bilinear")
    found = enlarged[:, 0] >= 0.5
    either = (found | masks).sum((1, 2))
    return (found & masks).sum((1, 2)) / either.clamp(min=1)


def ious(silhouettes, frames_of, root):
    """The overlap in each frame of 32 tracklets; none without root/masks. silhouettes: N of (T, h,
    w); frames_of: the Frames that they were found in."""
    found = []
    for i in evenly(range(len(silhouettes)), 32):
        masks = true_masks(root, frames_of.paths(i), frames_of.size)
        if masks is not None:
            found += iou(silhouettes[i], masks).tolist()
    return found


def person_of(tracklet):
    return f"{tracklet.camera or ''} person {tracklet.pid}".strip()


def frames_for(frames, size, number=3):
    """Paths of frames -> uint8 (number, 3, H, W), evenly taken."""
    return torch.stack([read_frame(frame, size) for frame in evenly(frames, number)])


def write_ranking(folder, model, dataset, found, embeddings, size):
    """ranking.png: the nearest of four queries of each direction. found: of evaluate."""
    rows = []
    for direction, (distance, match, valid) in found.items():
        query, gallery = dataset.directions[direction]
        for q in evenly(range(len(query)), 4):
            asked, hits = dataset.test[query[q]], []
            for g in np.where(valid[q], distance[q], np.inf).argsort()[:min(8, valid[q].sum())]:
                t, strips = dataset.test[gallery[g]], {}
                if torch.is_tensor(embeddings):
                    apart = embeddings[query[q]] - embeddings[gallery[g]]    # (parts, dim)
                    strips = model.strips_of(apart.norm(dim=1))
                hits.append(Found(person_of(t), frames_for(t.frames, size), distance[q, g],
                                  bool(match[q, g]), strips))
            title = f"{direction}: {person_of(asked)}"
            rows.append(Row(title, frames_for(asked.frames, size), hits))
    write_picture(os.path.join(folder, "ranking.png"), draw_ranking(rows))


@torch.inference_mode()
def write_sheets(folder, model, dataset, size, log, head):
    """sees.png: two people by night and by day as the model sees them (silhouettes and codes) or
    reads them (LSMRL). curves.png: the log, if there is one."""
    model.eval()
    is_home, by_pid = "trained_on" not in head, {}
    for t in dataset.test or dataset.train:
        by_pid.setdefault(t.pid, {}).setdefault(t.modality, t)
    people = evenly([own for own in by_pid.values() if len(own) == 2], 2)
    seen, readings = [], []
    for t in (own[modality] for own in people for modality in ("infrared", "visible")):
        title, frames = f"{t.modality} {person_of(t)}", frames_for(t.frames, size, 4)
        normalised = normalise(frames.to(model.device))
        if model.sasgl is not None:
            codes, _ = model.sasgl.encode(normalised)
            masks = true_masks(dataset.root, evenly(t.frames, 4), size)
            overlap = None if masks is None else iou(codes.silhouette, masks)
            seen.append(Seen(title, frames, *codes[1:], masks, overlap))
        elif (reading := model.reading(normalised[None])) is not None:
            look, reads = (None if x is None else x[0] for x in reading)
            most = [] if reads is None else reads.topk(min(4, len(reads))).indices.tolist()
            sentences = [(f"{reads[label]:.1%} {label}", None) for label in most]
            if is_home:
                sentences = [sentence_of(dataset, label, reads[label], size) for label in most]
            readings.append(Reading(title, frames, look, sentences))
    if seen or readings:
        image = draw_silhouettes(seen) if seen else draw_reading(readings)
        write_picture(os.path.join(folder, "sees.png"), image)
    if log:
        image = draw_curves(log, f"{head['method']} on {dataset.name}")
        write_picture(os.path.join(folder, "curves.png"), image)


def sentence_of(dataset, label, share, size):
    """-> how much is read of a training identity's sentence, in words; a frame of that person."""
    pid = dataset.classes[label]
    t = next(t for t in dataset.train if t.pid == pid and t.modality == "visible")
    return f"{share:.1%} {pid}", read_frame(t.frames[len(t.frames) // 2], size)
