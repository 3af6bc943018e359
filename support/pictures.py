"""Pictures: what a model sees (silhouettes, codes), what it finds (ranked lists), how it learned.

    what SASGL sees of tracklets -> draw_silhouettes    frames, silhouettes, codes, true masks
    Reading of tracklets         -> draw_reading        where LSMRL looks, whose sentences it reads
    Row of queries               -> draw_ranking        green: the right person; red: a wrong one;
                                                        grey: unknown; a bar for each strip
    lines of log.jsonl           -> draw_curves         losses by epoch, Rank-1 by evaluation

Each draw_ function returns a PIL image and runs no model. A code has 16 channels and the eye three,
so its pixels are shown by their three principal components as red, green and blue, of all tracklets
of a sheet together: the same colour is the same code wherever it stands.

Quick question: which tracklets does a sheet show? (Evenly taken ones, chosen before anything is
known of them. A picture of the best ones would show a hope.)

Ours, not the papers': all of it.
"""
import math
from typing import NamedTuple

from support.files import UserError, printable
from support.footage import read_frame

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

BLACK, GRID = (0, 0, 0), (222, 222, 222)
GREEN, RED, GREY = (0, 150, 60), (215, 45, 35), (150, 150, 150)
# One colour per curve, told apart by the colour-blind too as far as a dozen can be.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
           "#787878", "#000000", "#8c564b", "#9467bd", "#bcbd22", "#17828c"]
TEXT_SIZE = 13


def evenly(items, n):
    """n of the items, evenly taken, the first and the last among them; all where there are
    fewer."""
    if not items:
        return []
    places = np.linspace(0, len(items) - 1, n).astype(int)
    return [items[place] for place in np.unique(places)]


def elided(text, width, font):
    """The text, or its end after an ellipsis, so that it fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


class Sheet:
    """A white image, written on in black."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(TEXT_SIZE)

    def text(self, x, y, words, width=math.inf):
        """Words whose upper left corner is (x, y), in at most `width` pixels."""
        words = printable(words)    # a font has no line breaks, and no bytes that are no text
        words = elided(words, width, self.font)
        self.pen.text((x, y), words, fill="black", font=self.font)

    def frame(self, x, y, path, size):
        """A file's picture, as large as `size` (H, W), with its upper left corner at (x, y)."""
        H, W = size
        try:
            pixels = read_frame(path or "", size)
        except UserError:    # a gallery kept in a file may outlive its frames
            self.pen.rectangle((x, y, x + W - 1, y + H - 1), fill="white")
            self.text(x + 4, y + H // 2, "no file")
            return
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        self.image.paste(image, (x, y))


# ----------------------------------------------------------- silhouettes ----


def principal_axes(pixels):
    """(M, 16) -> the three axes along which they differ most, (16, 3), the longest first."""
    pixels = pixels - pixels.mean(0)
    scatter = pixels.t() @ pixels
    axes = torch.linalg.eigh(scatter).eigenvectors[:, -3:].flip(1)
    # An axis has no direction of its own: choose one, so that runs can be compared.
    return axes * axes.sum(0).sign()


def principal_colours(codes):
    """Codes of several tracklets, (T, 16, h, w) each -> the same in three colours, (T, 3, h, w) in
    0..1, the background black."""
    codes = [code.float().cpu().permute(0, 2, 3, 1) for code in codes]    # (T, h, w, 16)
    bodies = [code.abs().sum(-1) > 0 for code in codes]
    colours = [code.new_zeros(*code.shape[:3], 3) for code in codes]
    pixels = torch.cat([code[body] for code, body in zip(codes, bodies, strict=True)])    # (M, 16)
    if len(pixels) > 3:
        centre, axes = pixels.mean(0), principal_axes(pixels)
        # Between these two lie nearly all: a few odd pixels would leave no contrast to the others.
        nearly_all = torch.tensor([0.02, 0.98])
        low, high = ((pixels - centre) @ axes).quantile(nearly_all, dim=0)
        extent = (high - low).clamp(min=1e-6)
        for code, body, colour in zip(codes, bodies, colours, strict=True):
            place = ((code[body] - centre) @ axes - low) / extent
            colour[body] = 0.15 + 0.85 * place.clamp(0, 1)
    return [colour.permute(0, 3, 1, 2) for colour in colours]


def side_by_side(images, height, width):
    """(T, h, w) or (T, 3, h, w) in 0..1 -> PIL image of T pictures in a row, each height x
    width."""
    images = images.float().cpu()
    if images.ndim == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    images = images.clamp(0, 1).permute(2, 0, 3, 1)    # (H, T, W, 3)
    row = images.reshape(height, -1, 3) * 255
    return Image.fromarray(row.round().byte().numpy())


def rows_of(columns):
    """See draw_silhouettes -> {name of a row: the images of each column, for side_by_side, or None
    where a column has none}."""
    denoising = [column.denoising for column in columns]
    appearance = [column.appearance for column in columns]
    masks = [column.masks for column in columns]
    rows = {"frames": [column.frames / 255 for column in columns],
            "body probability": [column.body for column in columns],
            "silhouette": [column.silhouette for column in columns],
            "denoising code": principal_colours(denoising),
            "appearance code": principal_colours(appearance)}
    if any(mask is not None for mask in masks):
        rows["true mask"] = masks
    return rows


def draw_silhouettes(columns, height=128):
    """A column per tracklet: its frames, the body probability, the silhouette, the denoising and
    the appearance code, and the true mask with its IoU where there is one.

    columns: objects with title (str), frames uint8 (T, 3, H, W), body (T, h, w) in 0..1, silhouette
    (T, h, w), denoising and appearance (T, 16, h, w), masks bool (T, H, W) or None, iou (T,) or
    None; T, H and W are the same in all."""
    rows = rows_of(columns)
    T, _, H, W = columns[0].frames.shape
    left, top, gap = 130, 24, 8
    foot = 16 if "true mask" in rows else 0    # for the IoU
    width = height * W // H
    column_width = T * width + gap
    row_height = height + gap
    bottom = top + len(rows) * row_height + foot
    sheet = Sheet(left + len(columns) * column_width, bottom)
    for r, (name, images_of) in enumerate(rows.items()):
        y = top + r * row_height
        sheet.text(6, y + height // 2 - 8, name)
        for c, images in enumerate(images_of):
            if images is not None:
                strip = side_by_side(images, height, width)
                sheet.image.paste(strip, (left + c * column_width, y))
    for c, column in enumerate(columns):
        x = left + c * column_width
        sheet.text(x, 4, column.title, width=T * width)
        if column.iou is not None:
            mean = column.iou.mean().item()
            sheet.text(x, bottom - 22, f"IoU {mean:.2f}")
    return sheet.image


# ------------------------------------------------------- what LSMRL reads ----


class Reading(NamedTuple):
    """A tracklet as LSMRL reads it. frames: uint8 (T, 3, H, W); look: where each frame's token
    looks, (T, h, w), or None; sentences: those it reads most, of (caption, a frame's path or
    None)."""
    title: str
    frames: torch.Tensor
    look: torch.Tensor | None
    sentences: list


def draw_reading(columns, height=128):
    """A column per tracklet: its frames, lit where their tokens look, and the people whose
    sentences it reads most. columns: of Reading, of the same T, H and W."""
    T, _, H, W = columns[0].frames.shape
    left, top = 110, 24
    gap, foot = 8, 20
    width = height * W // H
    column_width = T * width + 2 * gap
    sheet = Sheet(left + len(columns) * column_width, top + 3 * (height + gap) + foot)
    for row, name in enumerate(("frames", "looks at", "reads most of")):
        sheet.text(6, top + row * (height + gap) + height // 2 - 8, name)
    for c, column in enumerate(columns):
        x = left + c * column_width
        y = top
        sheet.text(x, 4, column.title, width=T * width)
        frames = column.frames.cpu() / 255
        sheet.image.paste(side_by_side(frames, height, width), (x, y))
        y += height + gap
        if column.look is not None:
            lit = frames * light_of(column.look, (H, W))
            sheet.image.paste(side_by_side(lit, height, width), (x, y))
        y += height + gap
        for caption, path in column.sentences[:T]:
            sheet.frame(x, y, path, (height, width))
            sheet.text(x, y + height + 2, caption, width=width)
            x += width
    return sheet.image


def light_of(look, size):
    """Shares of the patches (T, h, w) -> how bright each pixel is to be, (T, 1, H, W), the patch
    that is looked at most 1."""
    look = look.float().cpu()[:, None]
    brightest = look.amax((2, 3), keepdim=True)
    look = F.interpolate(look / brightest, size, mode="bilinear", align_corners=False)
    return 0.15 + 0.85 * look


# ---------------------------------------------------------- ranked lists ----


class Found(NamedTuple):
    """A tracklet in a ranked list. frames: paths; right: is it the query's person? None: unknown.
    strips: {stream: the distance of each strip, from top to bottom}, drawn as bars."""
    caption: str
    frames: list
    distance: float
    right: bool | None
    strips: dict = {}


class Row(NamedTuple):
    """A query and what was found for it. frames: paths; ranked: of Found, the nearest first."""
    title: str
    frames: list
    ranked: list


class RankingSheet(Sheet):
    """See draw_ranking. A cell: some frames of a tracklet in a coloured frame, words below, a bar
    for each strip of each of its streams at the right."""
    BORDER, PAD, TITLE, LINE, BELOW, BARS = 4, 10, 18, 15, 58, 24    # pixels

    def __init__(self, rows, columns, size, height, shown, streams):
        H, W = size
        self.streams = streams
        self.height, self.width = height, height * W // H    # of a frame
        self.shown = shown    # frames in a cell
        self.cell_height = height + 2 * self.BORDER
        self.cell_width = shown * self.width + 2 * self.BORDER
        self.row_height = self.cell_height + self.BELOW
        self.column_width = self.cell_width + self.PAD + self.BARS * len(streams)
        legend = self.LINE + self.PAD if streams else 0
        super().__init__(2 * self.PAD + columns * self.column_width,
                         self.PAD + rows * self.row_height + legend)
        if streams:
            words = f"bars: how far apart in each strip of the body ({', '.join(streams)})"
            self.text(self.PAD, self.image.height - legend, words + "; short: alike")

    def title(self, row, words):
        self.text(self.PAD, self.PAD + row * self.row_height, words)

    def cell(self, row, column, frames, colour, *lines):
        """Column 0 is the query's, a little apart."""
        x = self.PAD + column * self.column_width
        if column > 0:
            x += self.PAD
        y = self.PAD + row * self.row_height + self.TITLE
        right, bottom = x + self.cell_width, y + self.cell_height
        self.pen.rectangle((x, y, right - 1, bottom - 1), fill=colour)
        for k, frame in enumerate(evenly(frames, self.shown)):
            self.frame(x + self.BORDER + k * self.width, y + self.BORDER, frame,
                       (self.height, self.width))
        for k, words in enumerate(lines):
            self.text(x, bottom + 2 + k * self.LINE, words, width=self.cell_width)

    def bars(self, row, column, strips, longest):
        """At the right of a cell, a bar for each strip. strips: see Found; longest: {stream: the
        distance whose bar has the full length}."""
        left = 2 * self.PAD + column * self.column_width + self.cell_width + 2
        top = self.PAD + row * self.row_height + self.TITLE + self.BORDER
        for name, distances in strips.items():
            tall = self.height / len(distances)
            y = top
            for distance in distances.tolist():
                right = left + (self.BARS - 4) * distance / longest[name]
                bottom = max(y, y + tall - 2)    # very many strips leave no gap
                self.pen.rectangle((left, y, right, bottom), fill=self.streams[name])
                y += tall
            left += self.BARS


def draw_ranking(rows, size, height=112, shown=3):
    """rows: of Row; size: (H, W) whose shape the frames get. A row: the query, then its ranked
    tracklets, `shown` frames of each, in a green, red or grey frame, and bars for the strips."""
    rows = [Row(title, frames, [Found(*found) for found in ranked])    # plain tuples are as good
            for title, frames, ranked in rows]
    longest = max((len(row.ranked) for row in rows), default=0)
    # Which streams have bars, in which colours, and the longest bar of each.
    every = [found.strips for row in rows for found in row.ranked]
    names = dict.fromkeys(name for strips in every for name in strips)
    streams = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    sheet = RankingSheet(len(rows), 1 + longest, size, height, shown, streams)
    longest_bars = {name: max(strips[name].max().item() for strips in every if strips) or 1
                    for name in names}    # 0 where all are the query itself
    colours = {True: GREEN, False: RED, None: GREY}
    for r, row in enumerate(rows):
        sheet.title(r, row.title)
        sheet.cell(r, 0, row.frames, BLACK, "query")
        for place, found in enumerate(row.ranked, start=1):
            words = f"{place}.   {found.distance:.3f}"
            colour = colours[found.right]
            sheet.cell(r, place, found.frames, colour, words, found.caption)
            sheet.bars(r, place, found.strips, longest_bars)
    return sheet.image


# ---------------------------------------------------------------- curves ----

# Lines are drawn four times as large and halved: smooth, and twice the screen's resolution.
SCALE = 4
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 10 ** 6)    # epochs between two ticks


class Panel:
    """Axes with labels, ticks and a grid, in units of the values; lines with a legend at the right.

    box: (left, top, right, bottom) in the sheet. log: whether the values are logarithmic. All
    places here are in pixels before scaling."""

    def __init__(self, sheet, box, epochs, low, high, log):
        self.sheet, self.pen = sheet, ImageDraw.Draw(sheet)
        self.box = self.left, self.top, self.right, self.bottom = box
        self.last_epoch = max(epochs, 2)
        self.low, self.high, self.log = low, high, log
        if log:    # whole decades
            self.low = math.floor(math.log10(low))
            self.high = math.ceil(math.log10(high))
        self.high = max(self.high, self.low + 1)
        self.lines = 0    # that are drawn

    def x_of(self, epoch):
        share = (epoch - 1) / (self.last_epoch - 1)
        return self.left + (self.right - self.left) * share

    def y_of(self, value):
        if self.log:
            value = math.log10(value)
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share

    def stroke(self, places, colour, width=1):
        """A line through places (x, y)."""
        scaled = [(SCALE * x, SCALE * y) for x, y in places]
        self.pen.line(scaled, fill=colour, width=SCALE * width, joint="curve")

    def dot(self, x, y, colour, radius=3):
        edges = x - radius, y - radius, x + radius, y + radius
        self.pen.ellipse([SCALE * edge for edge in edges], fill=colour)

    def text(self, x, y, words, anchor, size=TEXT_SIZE):
        font = ImageFont.load_default(SCALE * size)
        self.pen.text((SCALE * x, SCALE * y), words, fill="black", font=font, anchor=anchor)

    def draw_axes(self, title, y_label):
        middle = (self.left + self.right) / 2
        self.text(middle, self.top - 14, printable(title), "mm", size=15)
        self.text(middle, self.bottom + 38, "epoch", "mm")
        self._draw_upright(y_label)
        self._draw_values()
        self._draw_epochs()
        edges = [SCALE * edge for edge in self.box]
        self.pen.rectangle(edges, outline="black", width=SCALE)

    def _draw_upright(self, y_label):
        """The label of the values: drawn as any, then turned."""
        width, height = SCALE * 240, SCALE * 20
        label = Image.new("RGB", (width, height), "white")
        font = ImageFont.load_default(SCALE * TEXT_SIZE)
        centre = width // 2, height // 2
        ImageDraw.Draw(label).text(centre, y_label, fill="black", font=font, anchor="mm")
        middle = (self.top + self.bottom) / 2
        place = SCALE * (self.left - 64), SCALE * int(middle - 120)
        self.sheet.paste(label.rotate(90, expand=True), place)

    def _draw_values(self):
        """The grid and its numbers."""
        ticks = np.linspace(self.low, self.high, 6)
        if self.log:
            ticks = [10.0 ** k for k in range(self.low, self.high + 1)]
        for value in ticks:
            y = self.y_of(value)
            self.stroke([(self.left, y), (self.right, y)], GRID)
            self.text(self.left - 8, y, f"{value:g}", "rm")

    def _draw_epochs(self):
        step = next(step for step in STEPS if self.last_epoch / step <= 10)
        for epoch in dict.fromkeys([1, *range(step, self.last_epoch + 1, step)]):
            x = self.x_of(epoch)
            self.stroke([(x, self.bottom), (x, self.bottom + 5)], BLACK)
            self.text(x, self.bottom + 16, f"{epoch}", "mm")

    def line(self, name, points, thin=False):
        """points: [(epoch, value), ...]. The legend shows the last value. thin: for what is but a
        part of the line before."""
        colour = COLOURS[self.lines % len(COLOURS)]
        places = [(self.x_of(epoch), self.y_of(value)) for epoch, value in points]
        self.stroke(places, colour, width=1 if thin else 2)
        for x, y in places:
            self.dot(x, y, colour, radius=2 if thin else 3)
        last_value = points[-1][1]
        x = self.right + 14
        y = self.top + 10 + 20 * self.lines
        self.stroke([(x, y), (x + 18, y)], colour, width=2 if thin else 3)
        self.text(x + 24, y, f"{name}  {last_value:.3g}", "lm")
        self.lines += 1


def curves(log, key):
    """Lines of a log, each with {name: value} under `key` or nothing -> {name: [(epoch, value),
    ...]}, the names in the order in which they first come."""
    found = {}
    for line in log:
        for name, value in line.get(key, {}).items():
            found.setdefault(name, []).append((line["epoch"], value))
    return found


def curves_alone(log, direction):
    """Rank-1 of each stream alone in a direction -> {stream: [(epoch, share), ...]}."""
    shares = []
    for line in log:
        streams = line.get("streams", {}).items()
        alone = {name: record["rank-1"][direction] for name, record in streams}
        shares.append({"epoch": line["epoch"], "rank-1": alone})
    return curves(shares, "rank-1")


def in_per_cent(points):
    return [(epoch, 100 * share) for epoch, share in points]


def positive(losses):
    """Curves without what no logarithmic axis can show."""
    kept = {}
    for name, points in losses.items():
        points = [(epoch, value) for epoch, value in points if 0 < value < math.inf]
        if points:
            kept[name] = points
    return kept


def draw_curves(log, title):
    """log: the lines of log.jsonl as dicts -> every loss by epoch (logarithmic) and, where it was
    evaluated, Rank-1 in per cent, thin that of each stream alone. A line without "losses" or
    "streams" adds none: older runs have such lines."""
    losses = positive(curves(log, "losses"))
    values = [value for points in losses.values() for _, value in points]
    lowest, highest = min(values, default=1), max(values, default=1)
    epochs = log[-1]["epoch"]
    height = max(420, 100 + 20 * len(losses))
    top, bottom = 44, height - 62
    sheet = Image.new("RGB", (SCALE * 1240, SCALE * height), "white")

    box = 76, top, 486, bottom
    panel = Panel(sheet, box, epochs, lowest, highest, log=True)
    panel.draw_axes(f"{title}: losses", "weighted loss, mean of the epoch")
    for name, points in losses.items():
        panel.line(name, points)

    box = 776, top, 1030, bottom
    panel = Panel(sheet, box, epochs, 0, 100, log=False)
    panel.draw_axes("test", "Rank-1 (%)")
    for direction, points in curves(log, "rank-1").items():
        panel.line(direction, in_per_cent(points))
        for stream, points_alone in curves_alone(log, direction).items():
            panel.line(f"  {stream} alone", in_per_cent(points_alone), thin=True)
    return sheet.reduce(SCALE // 2)
