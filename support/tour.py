"""One test person's way through a model, in pictures (docs/tour.md).

    python evaluate.py --checkpoint RUN --tour DIR

    frames of the query, of its answer -> Method.seen -> a picture of each row; walker.gif
    embeddings -> distance of each part to the right person and to the nearest other one
               -> a global part before and after PBMGE; ranked lists

The query is the first infrared one with an answer, whatever its result. Change a part of a method,
train again, and compare the pictures.
"""
from support.files import UserError, write_atomic, write_picture
from support.footage import as_pixels
from support.pictures import Chart, Sheet, in_columns, round_numbers, seen_by, write_ranking

import numpy as np
import torch

MOVING = "frames", "silhouette", "denoising code", "appearance code", "shifted", "looks at"
FRAMES = 6    # of a tracklet in a picture

def draw_numbers(title, curves):
    """{words: numbers (n,)} -> PIL image: a curve of each."""
    every = torch.cat(list(curves.values()))
    longest = max(map(len, curves.values()))
    sheet = Sheet(4000, 1400, 52)
    chart = Chart(
        sheet, 304, 2600, title,
        x_ticks=round_numbers(0, longest - 1),
        y_ticks=round_numbers(10 * min(0, every.min()), 10 * every.max()),
        y_label=lambda tenth: f"{tenth / 10:g}")
    for words, numbers in curves.items():
        chart.curve(list(enumerate(10 * numbers)), words)
    return sheet.image.reduce(2)


def write_moving(path, titles, rows, T):
    """rows of n * T pictures, see in_columns -> a GIF of T pictures in motion."""
    images = []
    for t in range(T):
        moment = {name: rows[name][t::T] for name in MOVING if name in rows}
        images.append(in_columns(titles, moment))
    first, *others = images
    how = {"save_all": True, "append_images": others, "duration": 120, "loop": 0}
    write_atomic(path, lambda file: first.save(file, "GIF", **how))


def tour(folder, model, dataset, size, embeddings, found, augment):
    """Draw the way of the first infrared query that has an answer, into a folder.

    size: height and width of the frames; embeddings: of dataset.test; found: (distance, match,
    valid) of the first direction; augment: that of the training. Raises UserError."""
    direction, (queries, gallery) = next(iter(dataset.directions.items()))
    answered = np.flatnonzero((found[1] & found[2]).any(1))
    if not len(answered):
        raise UserError(f"no query of {direction} has an answer; expected one: check --data")
    q = answered[0]
    distance, match, valid = (table[q] for table in found)
    # Numbers of the gallery's tracklets that count, the nearest first.
    order = [g for g in distance.argsort() if valid[g]]
    query = queries[q]
    right = next(gallery[g] for g in order if match[g])
    other = next(gallery[g] for g in order if not match[g])

    def write(name, image):
        write_picture(f"{folder}/{name.replace(' ', '-')}.png", image)

    # Frames, and what the model makes of them.
    pair = [dataset.test[query], dataset.test[right]]
    titles, rows, _ = seen_by(model, dataset, pair, size, FRAMES)
    frames = rows["frames"]    # (2 * FRAMES, 3, H, W)
    infrared_first = torch.tensor([1, 0])
    rng = np.random.default_rng(1)
    changed = augment(frames.unflatten(0, (2, FRAMES)), infrared_first, rng)
    rows["augmented"] = as_pixels(changed).flatten(0, 1)
    for name, row in rows.items():
        write(name, in_columns(titles, {"frames": frames, name: row}))

    # Embeddings: parts by number, then the ranked list.
    curves = {}
    for name, own in model.streams_of(embeddings).items():
        curves[f"{name}: to the right person"] = (own[query] - own[right]).norm(dim=1)
        curves[f"{name}: to another person"] = (own[query] - own[other]).norm(dim=1)
        if own.shape[1] > 1:    # parts: the global one first, refined ones last
            first, last = own[query, [0, -1], :64]
            both = {"global part": first, "refined by PBMGE": last}
            write(f"{name} refined", draw_numbers(f"{name}: numbers of a part", both))
    write("distances", draw_numbers("distance by part: whole body, strips, refined", curves))
    write_ranking(folder, dataset, {direction: found}, size)

    # In motion: the query and the nearest three.
    shown, words = [pair[0]], ["who is it?"]
    for place, g in enumerate(order[:3], 1):
        shown.append(dataset.test[gallery[g]])
        words.append(f"{place}. {'right' if match[g] else 'wrong'}")
    _, rows, _ = seen_by(model, dataset, shown, size, 12)
    write_moving(f"{folder}/walker.gif", words, rows, 12)
