"""Pictures: what the model sees (silhouettes, codes), what it finds (ranked lists), how it learned (curves). Drawn with pillow.

    tracklets -> look_at -> View -> draw_silhouettes         frames, body probability, silhouette, both codes, true mask with IoU
    queries with their ranked tracklets -> draw_ranking      green frame: the right person; red: a wrong one; grey: nobody knows
    log.jsonl -> draw_curves                                 losses by epoch, Rank-1 by evaluation

Each draw_ function returns a PIL image; evaluate.write_picture puts it on the disk. A code has 16 channels and the eye three, so its
pixels are shown by their three principal components as red, green and blue, of all tracklets of a sheet together: the same colour
is the same code wherever it stands.

Quick question: which tracklets does a sheet show? (Evenly taken ones, chosen before anything is known of them. A picture of the
best ones would show a hope.)

Ours, not the paper's: all of it.
"""
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import ANIMATED, INFRARED, VISIBLE, Frames, UserError, normalise, read_frame
from sasgl import choose_body

GREEN, RED, GREY = (0, 150, 60), (215, 45, 35), (150, 150, 150)
# One colour per curve, told apart by the colour-blind too as far as a dozen can be.
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (120, 120, 120), (0, 0, 0),
           (140, 86, 75), (148, 103, 189), (188, 189, 34), (23, 130, 140)]


def evenly(items, n):
    """n of the items, evenly taken, the first and the last among them; all where there are fewer."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, n).astype(int))] if items else []


def samples(tracklets, each=2):
    """`each` tracklets of either modality, visible ones first: what a sheet shows."""
    return [t for modality in (VISIBLE, INFRARED) for t in evenly([t for t in tracklets if t.modality == modality], each)]


# ------------------------------------------------------------------ silhouettes ----

def true_mask(root, frame, size):
    """The true silhouette of a frame, bool (H, W), where the dataset at `root` has masks/ (walkers do); else None."""
    path = os.path.join(root, "masks", os.path.splitext(os.path.relpath(frame, root))[0] + ".png")
    return read_frame(path, size)[0] > 127 if os.path.isfile(path) else None


@torch.inference_mode()
def look_at(model, dataset, tracklets, config, device):
    """Yields for each tracklet: frames uint8 (T,3,H,W), View, true masks bool (T,H,W) or None, their IoU (T,) or None.

    IoU: intersection over union of silhouette (>= 0.5, at the frames' size) and true mask."""
    model.eval()
    frames_of = Frames(tracklets, size=config.size, T=config.frames, rule=dataset.test_frames)
    for i in range(len(tracklets)):
        frames, iou = frames_of[i][0], None
        view = model.sasgl.look(normalise(frames.to(device)))
        masks = [true_mask(dataset.root, path, config.size) for path in frames_of.paths(i)]
        masks = None if any(m is None for m in masks) else torch.stack(masks)
        if masks is not None:
            seen = F.interpolate(view.silhouette[:, None], config.size, mode="bilinear", align_corners=False)[:, 0].cpu() >= 0.5
            iou = (seen & masks).sum((1, 2)) / (seen | masks).sum((1, 2)).clamp(min=1)
        yield frames, view, masks, iou


def silhouette_iou(model, dataset, config, device, tracklets=32):
    """Mean IoU of silhouette and true mask over the frames of `tracklets` test tracklets evenly taken; None without masks or
    without silhouettes."""
    if getattr(model, "sasgl", None) is None or not os.path.isdir(os.path.join(dataset.root, "masks")):
        return None
    ious = [iou for *_, iou in look_at(model, dataset, evenly(dataset.test, tracklets), config, device) if iou is not None]
    return torch.cat(ious).mean().item() if ious else None


def principal_colours(codes):
    """Codes of several tracklets, (T, 16, h, w) each -> the same in three colours, (T, 3, h, w) in 0..1, the background black."""
    codes = [code.float().cpu().permute(0, 2, 3, 1) for code in codes]
    body = [code.abs().sum(-1) > 0 for code in codes]
    pixels = torch.cat([code[there] for code, there in zip(codes, body)])    # (M, 16)
    colours = [code.new_zeros(*code.shape[:3], 3) for code in codes]
    if len(pixels) > 3:
        centre = pixels.mean(0)
        axes = torch.linalg.eigh((pixels - centre).t() @ (pixels - centre)).eigenvectors[:, -3:].flip(1)    # the largest three
        axes = axes * axes.sum(0).sign()    # an axis has no direction of its own: choose one, so that runs can be compared
        low, high = ((pixels - centre) @ axes).quantile(torch.tensor([0.02, 0.98]), dim=0)
        for code, there, colour in zip(codes, body, colours):
            colour[there] = 0.15 + 0.85 * (((code[there] - centre) @ axes - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return [colour.permute(0, 3, 1, 2) for colour in colours]


def draw_silhouettes(model, dataset, tracklets, config, device, height=128):
    """A column per tracklet: its frames, the body probability, the silhouette, the denoising and the appearance code, and the true
    mask with its IoU where there is one."""
    seen = list(look_at(model, dataset, tracklets, config, device))
    codes = [principal_colours([getattr(view, name) for _, view, *_ in seen]) for name in ("denoising", "appearance")]
    names = ["frames", "body probability", "silhouette", "denoising code", "appearance code"] + ["true mask"] * any(masks is not None for _, _, masks, _ in seen)
    width, left, top, gap = height * config.size[1] // config.size[0], 130, 24, 8
    column_width = config.frames * width + gap
    sheet = Image.new("RGB", (left + len(seen) * column_width, top + len(names) * (height + gap) + 16 * (len(names) > 5)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for r, name in enumerate(names):
        draw.text((6, top + r * (height + gap) + height // 2 - 8), name, fill="black", font=font)
    for c, (t, (frames, view, masks, iou)) in enumerate(zip(tracklets, seen)):
        x = left + c * column_width
        animated = ANIMATED.fullmatch(t.frames[0])
        own = os.path.basename(animated[1] if animated else os.path.dirname(t.frames[0]))
        who = f"{t.camera}, person {t.pid}" if t.pid >= 0 else own
        draw.text((x, 4), elided(f"{t.modality} {who}", column_width - gap, font), fill="black", font=font)
        for r, images in enumerate((frames / 255, choose_body(view.mask), view.silhouette, codes[0][c], codes[1][c], masks)):
            if images is not None:
                images = images.float().cpu() if images.ndim == 4 else images.float().cpu()[:, None].expand(-1, 3, -1, -1)
                images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False).clamp(0, 1)
                row = (images.permute(2, 0, 3, 1).reshape(height, -1, 3) * 255).byte().numpy()    # T frames side by side
                sheet.paste(Image.fromarray(row), (x, top + r * (height + gap)))
        if iou is not None:
            draw.text((x, sheet.height - 22), f"IoU {iou.mean().item():.2f}", fill="black", font=font)
    return sheet


# ----------------------------------------------------------------- ranked lists ----

def elided(text, width, font):
    """The text, or its end after an ellipsis, so that it fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text


def draw_ranking(rows, size, height=112, shown=3):
    """rows: (title, frames of the query, [(caption, frames, distance, right or None), ...]), frames being paths; size: (H, W) whose
    shape the frames get. A row: the query, then its ranked tracklets, `shown` frames of each, in a green, red or grey frame."""
    width, border, pad, font = height * size[1] // size[0], 4, 10, ImageFont.load_default(size=13)
    cell_width, row_height = shown * width + 2 * border + pad, height + 2 * border + 58
    sheet = Image.new("RGB", (pad + cell_width * (1 + max((len(ranked) for *_, ranked in rows), default=0)) + pad, pad + row_height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)

    def cell(x, y, frames, colour, *lines):
        draw.rectangle((x, y, x + cell_width - pad - 1, y + height + 2 * border - 1), fill=colour)
        for k, frame in enumerate(evenly(frames, shown)):
            place = x + border + k * width, y + border
            try:
                sheet.paste(Image.fromarray(read_frame(frame, (height, width)).permute(1, 2, 0).numpy()), place)
            except UserError:    # a gallery kept in a file may outlive its frames
                draw.rectangle((*place, place[0] + width - 1, place[1] + height - 1), fill="white")
                draw.text((place[0] + 4, place[1] + height // 2), "no file", fill="black", font=font)
        for k, line in enumerate(lines):
            draw.text((x, y + height + 2 * border + 2 + 15 * k), elided(line, cell_width - pad, font), fill="black", font=font)

    for r, (title, query, ranked) in enumerate(rows):
        y = pad + r * row_height
        draw.text((pad, y), title, fill="black", font=font)
        cell(pad, y + 18, query, (0, 0, 0), "query")
        for k, (caption, frames, distance, right) in enumerate(ranked):
            cell(pad + 10 + cell_width * (k + 1), y + 18, frames, {True: GREEN, False: RED, None: GREY}[right], f"{k + 1}.   {distance:.3f}", caption)
    return sheet


# ----------------------------------------------------------------------- curves ----

SCALE = 4    # lines are drawn four times as large and halved: smooth, and twice the screen's resolution, for print


class Panel:
    """Axes with labels, ticks and a grid, in units of the values; lines with a legend at the right."""

    def __init__(self, sheet, box, title, y_label, epochs, low, high, log):
        draw = ImageDraw.Draw(sheet)
        self.draw, self.box, self.log, self.last, self.lines = draw, box, log, max(epochs, 2), 0
        self.low, self.high = (math.floor(math.log10(low)), math.ceil(math.log10(high))) if log else (low, high)
        self.high = max(self.high, self.low + 1)
        x0, y0, x1, y1 = box
        self.text((x0 + x1) / 2, y0 - 14, title, "mm", 15)
        self.text((x0 + x1) / 2, y1 + 38, "epoch", "mm")
        label = Image.new("RGB", (SCALE * 240, SCALE * 20), "white")
        ImageDraw.Draw(label).text((SCALE * 120, SCALE * 10), y_label, fill="black", font=ImageFont.load_default(SCALE * 13), anchor="mm")
        sheet.paste(label.rotate(90, expand=True), (SCALE * (x0 - 64), SCALE * int((y0 + y1) / 2 - 120)))
        ticks = [10.0 ** k for k in range(self.low, self.high + 1)] if log else np.linspace(low, high, 6)
        for value in ticks:
            y = self.at(1, value)[1]
            draw.line((SCALE * x0, y, SCALE * x1, y), fill=(222, 222, 222), width=SCALE)
            self.text(x0 - 8, y / SCALE, f"{value:g}", "rm")
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10 ** 6) if self.last / s <= 10)
        for epoch in dict.fromkeys([1, *range(step, self.last + 1, step)]):
            x = self.at(epoch, ticks[0])[0]
            draw.line((x, SCALE * y1, x, SCALE * (y1 + 5)), fill="black", width=SCALE)
            self.text(x / SCALE, y1 + 16, f"{epoch}", "mm")
        draw.rectangle([SCALE * v for v in box], outline="black", width=SCALE)

    def text(self, x, y, words, anchor, size=13):
        self.draw.text((SCALE * x, SCALE * y), words, fill="black", font=ImageFont.load_default(SCALE * size), anchor=anchor)

    def at(self, epoch, value):
        x0, y0, x1, y1 = self.box
        value = math.log10(value) if self.log else value
        return (SCALE * (x0 + (x1 - x0) * (epoch - 1) / (self.last - 1)), SCALE * (y1 - (y1 - y0) * (value - self.low) / (self.high - self.low)))

    def line(self, name, points):
        """points: [(epoch, value), ...]. The legend shows the last value."""
        colour, y = COLOURS[self.lines % len(COLOURS)], self.box[1] + 10 + 20 * self.lines
        places = [self.at(*point) for point in points]
        self.draw.line(places, fill=colour, width=SCALE * 2, joint="curve")
        for x, y_dot in places:
            self.draw.ellipse((x - SCALE * 3, y_dot - SCALE * 3, x + SCALE * 3, y_dot + SCALE * 3), fill=colour)
        x = SCALE * (self.box[2] + 14)
        self.draw.line((x, SCALE * y, x + SCALE * 18, SCALE * y), fill=colour, width=SCALE * 3)
        self.text(self.box[2] + 38, y, f"{name}  {points[-1][1]:.3g}", "lm")
        self.lines += 1


def draw_curves(log, title):
    """log: the lines of log.jsonl as dicts -> every loss by epoch (logarithmic) and, where it was evaluated, Rank-1 in per cent."""
    losses = {name: [(line["epoch"], line[name]) for line in log if line.get(name, 0) > 0]    # a logarithm's axis has no 0
              for name in dict.fromkeys(name for line in log for name in line) if name not in ("epoch", "lr", "seconds", "rank-1", "mAP") and not name.startswith("accuracy")}
    losses = {name: points for name, points in losses.items() if points}
    sheet = Image.new("RGB", (SCALE * 1240, SCALE * max(420, 100 + 20 * len(losses))), "white")
    bottom, epochs = sheet.height // SCALE - 62, log[-1]["epoch"]
    values = [value for points in losses.values() for _, value in points] or [1]
    panel = Panel(sheet, (76, 44, 486, bottom), f"{title}: losses", "weighted loss, mean of the epoch", epochs, min(values), max(values), True)
    for name, points in losses.items():
        panel.line(name, points)
    panel = Panel(sheet, (776, 44, 1030, bottom), "test", "Rank-1 (%)", epochs, 0, 100, False)
    for direction in dict.fromkeys(d for line in log for d in line.get("rank-1", {})):
        panel.line(direction, [(line["epoch"], 100 * line["rank-1"][direction]) for line in log if direction in line.get("rank-1", {})])
    return sheet.reduce(SCALE // 2)
