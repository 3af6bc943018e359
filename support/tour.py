"""One test person's way through a model, in pictures (docs/tour.md).

    python evaluate.py --checkpoint RUN --tour DIR

    frames of the query, of its answer -> Method.seen -> a picture of each row; walker.gif
    embeddings -> distance of each part to the right person and to the nearest wrong one
               -> a global part before and after PBMGE; ranked lists
"""
from support.files import write_atomic, write_picture
from support.footage import as_pixels
from support.pictures import Chart, Sheet, in_columns, round_numbers, seen_by, write_ranking

import numpy as np
import torch

MOVING = "frames", "silhouette", "denoising code", "appearance code", "shifted", "looks at"
DIRECTION = "infrared->visible"


def draw_numbers(title, curves):
    """{words: numbers (n,)} -> PIL image: a curve of each."""
    every = torch.cat(list(curves.values()))
    sheet = Sheet(4000, 1400, 52)
    places = round_numbers(0, max(map(len, curves.values())) - 1)
    tenths = round_numbers(10 * min(0, every.min()), 10 * every.max())
    chart = Chart(sheet, 304, 2600, title, places, tenths, lambda tenth: f"{tenth / 10:g}")
    for words, numbers in curves.items():
        chart.curve(list(enumerate(10 * numbers)), words)
    return sheet.image.reduce(2)


def write_moving(path, titles, rows, T):
    """rows of n * T pictures, see in_columns -> a GIF of T pictures in motion."""
    moving = {name: rows[name] for name in MOVING if name in rows}
    first, *others = [in_columns(titles, {name: row[t::T] for name, row in moving.items()})
                      for t in range(T)]
    write_atomic(path, lambda file: first.save(file, "GIF", save_all=True, append_images=others,
                                               duration=120, loop=0))


def tour(folder, model, dataset, size, embeddings, found, augment):
    """Draw the first infrared query's way. embeddings: of dataset.test; found: its direction's
    (distance, match, valid); augment: that of the training."""
    distance, match, valid = (table[0] for table in found)
    queries, gallery = dataset.directions[DIRECTION]
    order = [g for g in distance.argsort() if valid[g]]
    right, wrong = (next(g for g in order if match[g] == is_right) for is_right in (True, False))
    query, right, wrong = queries[0], gallery[right], gallery[wrong]

    def write(name, image):
        write_picture(f"{folder}/{name.replace(' ', '-')}.png", image)

    # Frames, and what the model makes of them.
    pair = [dataset.test[query], dataset.test[right]]
    titles, rows, _ = seen_by(model, dataset, pair, size, 6)
    frames = rows["frames"].unflatten(0, (2, -1))
    changed = augment(frames, torch.tensor([1, 0]), np.random.default_rng(1), 1.0)
    for name, row in {"augmented": as_pixels(changed).flatten(0, 1), **rows}.items():
        write(name, in_columns(titles, {"frames": rows["frames"], name: row}))

    # Embeddings: parts by number, then the ranked list.
    apart = {}
    for name, own in model.streams_of(embeddings).items():
        for other, words in (right, "the right person"), (wrong, "another person"):
            apart[f"{name}: to {words}"] = (own[query] - own[other]).norm(dim=1)
        if own.shape[1] > 1:
            write(f"{name} refined", draw_numbers(
                f"{name}: 64 of the numbers of a part", {
                    "global part": own[query, 0, :64], "refined by PBMGE": own[query, -1, :64]}))
    write("distances", draw_numbers("distance by part", apart))
    write_ranking(folder, dataset, {DIRECTION: found}, size)

    # In motion: the query and the nearest three.
    nearest = [dataset.test[gallery[g]] for g in order[:3]]
    words = [f"{i}. {'right' if match[g] else 'wrong'}" for i, g in enumerate(order[:3], 1)]
    _, rows, _ = seen_by(model, dataset, [pair[0], *nearest], size, 12)
    write_moving(f"{folder}/walker.gif", ["who is it?", *words], rows, 12)
