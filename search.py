"""Who is this? A search in your own footage.

    python search.py --checkpoint RUN --query DIR --gallery DIR --save SAVED
    python search.py --checkpoint RUN --query DIR --gallery SAVED        embeds the queries alone

    --gallery DIR -> find_footage -> embed_tracklets -> (G, parts, dim) -> SAVED/embeddings.npy
                                                          |  a block of rows at a time
    --query DIR -> the same -> (Q, parts, dim) -> distances -> the nearest so far -> ranked lists

DIR holds a folder of frames for each tracklet (support/footage.py). Nobody's name is needed: the
answer is a ranked list of the gallery's tracklets for each query.

Quick question: does the first place show the person who was asked for? (Not always. Some tracklet
is the nearest even if the person is not in the gallery. Look at the frames before you believe it.)
"""
import os
from pathlib import Path

from data import INFRARED, MODALITIES, VISIBLE, Tracklet
from evaluate import distances, embed_tracklets, load_run, some_frames
from support import parallel, pictures
from support.files import UserError, read_json, write_atomic, write_json, write_picture
from support.footage import find_footage
from support.options import Parser, add_options, cli, early, load_method, progress, typed
from support.weights import digest, method_of, read_checkpoint

import numpy as np
import torch


def nearest(query, gallery, top, rows=1024):
    """query (Q, parts, dim), gallery (G, parts, dim), an array in memory or on disk -> distances
    and places (Q, top) of the nearest, ascending; of equal ones the first.

    Only `rows` of the gallery are in memory at a time."""
    best = query.new_empty(len(query), 0)
    places = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    for start in progress(range(0, len(gallery), rows), "searching"):
        block = torch.tensor(gallery[start:start + rows], device=query.device)
        in_block = torch.arange(start, start + len(block), device=query.device)
        best = torch.cat([best, distances(query, block)], dim=1)
        places = torch.cat([places, in_block.expand(len(query), -1)], dim=1)
        best, order = best.sort(dim=1, stable=True)
        best, places = best[:, :top], places.gather(1, order[:, :top])
    return best, places


def own_footage(path, modality):
    """-> {name: Tracklet}."""
    return {name: Tracklet(frames, None, None, modality)
            for name, frames in find_footage(path).items()}


def embed(model, config, tracklets, all_frames):
    """{name: Tracklet} -> (N, parts, dim). Raises UserError."""
    rule = config.frame_rule or "chunks"
    embeddings = embed_tracklets(model, list(tracklets.values()), config, rule, all_frames)
    if isinstance(embeddings, dict):
        raise UserError("this method embeds each stream alone; search.py expects one tensor (N, "
                        "parts, dim): concatenate the streams in embed")
    return embeddings


def save(folder, embeddings, about):
    # embeddings.npy makes the folder a saved gallery, so it comes last.
    write_json(os.path.join(folder, "names.json"), about)
    path = os.path.join(folder, "embeddings.npy")
    write_atomic(path, lambda file: np.save(file, embeddings))
    print(f"{len(embeddings):,} tracklets embedded in {folder}")


def open_saved(folder, how):
    """-> embeddings (G, parts, dim), on disk; the contents of names.json. how: {name: value} that
    must be those of the queries. Raises UserError."""
    about = read_json(os.path.join(folder, "names.json"))
    for name, value in how.items():
        if about[name] != value:
            raise UserError(f"{folder} was embedded with {name} {about[name]}; expected {value}, "
                            "as the queries are: embed the gallery again")
    return np.load(os.path.join(folder, "embeddings.npy"), mmap_mode="r"), about


def draw(queries, lists, query, gallery, about, model, size, rows=8, top=8):
    """The first `top` places of the first `rows` queries -> PIL image. lists: [[(distance, place),
    ...], ...]"""
    drawn = []
    for (name, tracklet), ranked, q in zip(queries.items(), lists[:rows], query, strict=False):
        found = []
        for distance, place in ranked[:top]:
            shown = Tracklet(about["shown"][place], None, None, about["modality"])
            parts = (q.cpu() - torch.tensor(gallery[place])).norm(dim=1)
            found.append(pictures.Found(about["names"][place], some_frames(shown, size), distance,
                                        None, model.strips_of(parts)))
        title = f"{tracklet.modality} {name}"
        drawn.append(pictures.Row(title, some_frames(tracklet, size), found))
    return pictures.draw_ranking(drawn)


def is_walkers(path):
    """Does this footage lie in a folder of walkers?"""
    path = Path(path).resolve()
    return any((folder / "walkers.json").is_file() for folder in (path, *path.parents))


def parser_for(checkpoint):
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--checkpoint", metavar="RUN", help="a run's folder, or its last.pt")
    add("--query", metavar="DIR", help="who is asked for; without it --save only embeds")
    add("--gallery", metavar="DIR", help="where to search: footage, or a folder made by --save")
    add("--save", metavar="DIR", help="keep the gallery's embeddings for later searches")
    add("--query-modality", choices=MODALITIES, default=INFRARED, help=f"default: {INFRARED}")
    add("--gallery-modality", choices=MODALITIES, default=VISIBLE, help=f"default: {VISIBLE}")
    add("--top", metavar="N", type=int, default=10, help="places in each list (10)")
    add("--all-frames", action="store_true", default=False, help="embed every frame: slower, a "
        "little better")
    add("--frames", metavar="N", type=int, help="per tracklet; default: as in the run's test")
    add("--workers", metavar="N", type=int, help="loader processes")
    add("--device", metavar="NAME", default="", help="cuda, cuda:1, cpu")
    add("--json", metavar="FILE", help="write the ranked lists there")
    add("--figure", metavar="FILE.png", help="draw the first ranked lists")
    add("--method", metavar="FILE.py:CLASS", default="", help="of the run, if it is your own")
    if checkpoint:
        method = load_method(method_of(checkpoint, early(None, "method")["method"]))
        add_options(parser, method.Options, checkpoint["options"])
    return parser


def main():
    path = early(None, "checkpoint")["checkpoint"]
    checkpoint = read_checkpoint(path) if path else None
    given = typed(parser_for(checkpoint))
    if not (checkpoint and "gallery" in given and given.keys() & {"query", "save"}):
        raise UserError("nothing to search; expected --checkpoint RUN, --gallery DIR, and --query "
                        "DIR or --save DIR; see --help")
    ...


if __name__ == "__main__":
    cli(main)
