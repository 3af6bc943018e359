"""Who is this? A search in your own footage.

    python search.py --checkpoint RUN --query DIR --gallery DIR

    --gallery DIR -> find_footage -> embed_tracklets -> (G, parts, dim) --+
    --query DIR -> the same -> (Q, parts, dim) ----------------------> distances -> ranked lists

DIR holds a folder of frames for each tracklet. docs/footage.md shows a search from Python.

Quick question: is the first place the person who was asked for? (Not always: some tracklet is the
nearest even if that person is not in the gallery.)
"""
import os
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace

from data import INFRARED, MODALITIES, VISIBLE, Tracklet
from evaluate import distances, embed_tracklets
from support.check import MOST, torn
from support.files import UserError, write_picture
from support.footage import find_footage, normalise, notes_on, read_frames
from support.options import Parser, add_options, cli, fill, option, typed
from support.pictures import BLACK, GREY, Found, draw_ranking
from support.weights import add_run_options, load_run

import torch


@dataclass
class Options:
    query: str = option("", "folder: who is asked for")
    gallery: str = option("", "folder: where to search")
    query_modality: str = option(INFRARED, "of all queries", MODALITIES)
    gallery_modality: str = option(VISIBLE, "of the whole gallery", MODALITIES)
    top: int = option(10, "places in each list")
    figure: str = option("", "FILE.png: draw the first eight places of eight queries")


def embed_images(model, config, tracklets, modality):
    """tracklets: N lists (or generators) of frames in order; a frame is a path, a PIL image or a
    uint8 array (H, W, 3), RGB (OpenCV has BGR), or (H, W), of any size; all of one modality,
    "visible" or "infrared" -> embeddings (N, parts, dim), float32 on the CPU; `distances` compares
    them. Raises UserError."""
    config = SimpleNamespace(**vars(config) | {"workers": 0})    # images at hand need no process
    tracklets = [Tracklet(tuple(frames), None, None, modality) for frames in tracklets]
    if not tracklets or not all(t.frames for t in tracklets):
        raise UserError("no tracklet, or one without frames; expected one or more; leave it out")
    return embed_tracklets(model, tracklets, config)


@torch.inference_mode()
def see_images(model, config, frames):
    """A list of frames as in embed_images -> SASGL's Codes: silhouettes and codes of each."""
    frames = read_frames(frames, config.size).to(model.device)
    codes, _ = model.eval().sasgl.encode(normalise(frames))
    return codes


def readable(found, path):
    """--skip-unreadable: {name: frames} -> the same without the frames that cannot be read."""
    broken = torn([*chain(*found.values())])
    print(f"{len(broken)} frames under {path} cannot be read and are skipped")
    kept = {name: tuple(f for f in frames if f not in broken) for name, frames in found.items()}
    kept = {name: frames for name, frames in kept.items() if frames}
    if not kept:
        raise UserError(f"no readable frames under {path}; extract them again")
    return kept


def embed_footage(model, config, path, modality, is_skipping):
    """-> {name: paths of its frames}, embeddings (N, parts, dim). Raises UserError."""
    found = find_footage(path)
    if list(found) == [os.path.basename(os.path.abspath(path))]:
        print(f"{path} itself holds frames: they are one tracklet; give each tracklet a folder")
    if is_skipping:
        found = readable(found, path)
    frames = [*chain(*found.values())]
    for note in notes_on(frames):
        print(f"note: {path}: {note}")
    tracklets = [Tracklet(frames, None, None, modality) for frames in found.values()]
    return found, embed_tracklets(model, tracklets, config, config.frame_rule or "chunks")


def name_torn(*folders):
    """Raises UserError that names the frames of all these folders that cannot be read, if any."""
    tracklets = chain(*(find_footage(folder).values() for folder in folders))
    broken = torn([*chain(*tracklets)])
    if broken:
        last = (f"{len(broken)} frames cannot be read; extract them again, or remove them, or go "
                "on without them by --skip-unreadable")
        raise UserError("\n".join(list(broken.values())[:MOST] + [last]))


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_options(parser, Options)
    add_run_options(parser)
    parser.add_argument("--skip-unreadable", action="store_true", help="leave broken frames out")
    given = typed(parser)
    options = fill(Options, given)
    if not options.gallery or not options.query:
        raise UserError("nothing to search; expected --gallery and --query; see --help")
    model, config, trained = load_run(given.get("checkpoint", ""), given)
    is_skipping = "skip_unreadable" in given
    try:
        queries, query = embed_footage(model, config, options.query, options.query_modality,
                                       is_skipping)
        others, gallery = embed_footage(model, config, options.gallery, options.gallery_modality,
                                        is_skipping)
    except UserError:    # of one frame
        name_torn(options.query, options.gallery)
        raise
    if trained["dataset"] == "walkers":
        print("trained on walkers, who are drawn: this model knows nothing of real people")
    rows, names, modality = [], list(others), options.query_modality
    nearest, places = distances(query, gallery).sort(stable=True)    # of equal ones the first
    nearest, places = nearest[:, :options.top].tolist(), places[:, :options.top].tolist()
    for name, *ranked in zip(queries, nearest, places, strict=True):
        row = [Found(name, queries[name], BLACK)]
        print(f"{name} ({modality}, {len(queries[name])} frames), "
              f"the nearest of {len(gallery):,}:")
        for distance, place in zip(*ranked, strict=True):
            other = names[place]
            print(f"{len(row):6}{distance:12.4f}  {other}")
            row.append(Found(other, others[other], GREY, distance))
        rows.append(row)
    if options.figure:    # the first eight places of eight queries
        image = draw_ranking([row[:9] for row in rows[:8]], config.size)
        write_picture(options.figure, image)


if __name__ == "__main__":
    cli(main)
