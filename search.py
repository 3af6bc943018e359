"""Who is this? A search in your own footage.

    python search.py --checkpoint RUN --query DIR --gallery DIR --save SAVED
    python search.py --checkpoint RUN --query DIR --gallery SAVED        embeds the queries alone

    --gallery DIR -> find_footage -> embed_tracklets -> (G, parts, dim) -> SAVED/embeddings.npy
                                                               | a block of rows at a time
    --query DIR -> the same -> (Q, parts, dim) -------> distances -> nearest -> ranked lists

DIR holds a folder of frames for each tracklet (support/footage.py). From Python: load_run,
embed_images, see_images and distances can all be imported from here.

Quick question: is the first place the person who was asked for? (Not always: some tracklet is the
nearest even if that person is not in the gallery.)
"""
import os
from pathlib import Path
from types import SimpleNamespace

from data import INFRARED, MODALITIES, VISIBLE, Tracklet
from evaluate import distances, embed_tracklets
from support import pictures
from support.files import UserError, read_json, write_atomic, write_json, write_picture
from support.footage import find_footage, normalise, read_frame
from support.options import Parser, cli, progress, typed
from support.weights import add_run_options, digest, load_run

import numpy as np
import torch

# ----------------------------------------------------------- from Python ----

def embed_images(model, config, tracklets, modality):
    """tracklets: N lists of frames in order; a frame is a path, a PIL image or a uint8 array
    (H, W, 3), RGB, or (H, W), of any size; all of one modality, "visible" or "infrared" ->
    embeddings (N, parts, dim), float32 on the CPU; `distances` compares them. Raises UserError."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r}; expected {' or '.join(MODALITIES)}")
    config = SimpleNamespace(**{**vars(config), "workers": 0})    # images at hand need no process
    tracklets = [Tracklet(tuple(frames), None, None, modality) for frames in tracklets]
    return embed_tracklets(model, tracklets, config)


@torch.inference_mode()
def see_images(model, config, frames):
    """A list of frames as in embed_images -> SASGL's Codes: silhouettes and codes of each."""
    frames = torch.stack([read_frame(frame, config.size) for frame in frames])
    codes, _ = model.eval().sasgl.encode(normalise(frames.to(model.device)))
    return codes


# -------------------------------------------------------------- a search ----

def nearest(query, gallery, top, rows=1024):
    """query (Q, parts, dim), gallery (G, parts, dim), an array in memory or on disk -> distances
    and places (Q, top) of the nearest, ascending; of equal ones the first.

    Only `rows` of the gallery are in memory at a time."""
    best = query.new_empty(len(query), 0)
    places = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    for start in progress(range(0, len(gallery), rows), "searching"):
        block = torch.tensor(gallery[start:start + rows], device=query.device)
        numbers = torch.arange(start, start + len(block), device=query.device)
        best = torch.cat([best, distances(query, block)], dim=1)
        places = torch.cat([places, numbers.expand(len(query), -1)], dim=1)
        best, order = best.sort(dim=1, stable=True)
        best, places = best[:, :top], places.gather(1, order)[:, :top]
    return best, places


def embed_footage(model, config, path, modality, how):
    """-> {name: Tracklet of an unknown person}, embeddings (N, parts, dim). Raises UserError."""
    tracklets = {name: Tracklet(frames, None, None, modality)
                 for name, frames in find_footage(path).items()}
    embeddings = embed_tracklets(model, list(tracklets.values()), config, how["frame_rule"],
                                 how["all_frames"])
    if isinstance(embeddings, dict):
        raise UserError("this method embeds each stream alone; expected one tensor (N, parts, dim) "
                        "for a search: concatenate the streams in embed")
    return tracklets, embeddings


def open_gallery(model, config, given, how):
    """--gallery -> embeddings (G, parts, dim), a numpy array, and what names.json holds: how they
    were embedded, and for each name some frames to show. Raises UserError."""
    folder, modality = given["gallery"], given["gallery_modality"]
    if os.path.isfile(os.path.join(folder, "embeddings.npy")):
        about = read_json(os.path.join(folder, "names.json"))
        for name, value in how.items():
            if about[name] != value:
                raise UserError(f"{folder} was embedded with {name} {about[name]}; expected "
                                f"{value}, as for the queries: embed the gallery again")
        return np.load(os.path.join(folder, "embeddings.npy"), mmap_mode="r"), about
    tracklets, embeddings = embed_footage(model, config, folder, modality, how)
    shown = {name: [os.path.abspath(frame) for frame in pictures.evenly(t.frames, 3)]
             for name, t in tracklets.items()}
    about = {"names": list(tracklets), "modality": modality, **how, "shown": shown}
    if "save" in given:
        write_json(os.path.join(given["save"], "names.json"), about)
        # The last file, because it makes the folder a saved gallery.
        path = os.path.join(given["save"], "embeddings.npy")
        write_atomic(path, lambda file: np.save(file, embeddings.numpy()))
        print(f"{len(embeddings):,} tracklets embedded in {given['save']}")
    return embeddings.numpy(), about


def draw(found, queries, shown, size):
    """The first eight places of the first eight queries -> PIL image."""
    rows = []
    for answer in found[:8]:
        hits = [pictures.Found(hit["tracklet"], pictures.frames_for(shown[hit["tracklet"]], size),
                               hit["distance"], right=None) for hit in answer["ranked"][:8]]
        frames = pictures.frames_for(queries[answer["query"]].frames, size)
        rows.append(pictures.Row(answer["query"], frames, hits))
    return pictures.draw_ranking(rows)


def read_command_line():
    """-> {option: value}. Raises UserError."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--query", metavar="DIR", help="who is asked for; without it --save only embeds")
    add("--gallery", metavar="DIR", help="where to search: footage, or a folder made by --save")
    add("--save", metavar="DIR", help="keep the gallery's embeddings for later searches")
    add("--query-modality", choices=MODALITIES, default=INFRARED, help=f"default: {INFRARED}")
    add("--gallery-modality", choices=MODALITIES, default=VISIBLE, help=f"default: {VISIBLE}")
    add("--top", metavar="N", type=int, default=10, help="places in each list; default: 10")
    add("--json", metavar="FILE", help="write the ranked lists there")
    add("--figure", metavar="FILE.png", help="draw the first eight places of eight queries")
    add_run_options(parser)
    given = typed(parser)
    if "gallery" not in given or not given.keys() & {"query", "save"}:
        raise UserError("nothing to search; expected --checkpoint RUN, --gallery DIR, and --query "
                        "DIR or --save DIR; see --help")
    return given


def main():
    given = read_command_line()
    model, config, trained = load_run(given.get("checkpoint", ""), given)
    how = {"model": digest(model), "frames": config.test_frames or config.frames,
           "frame_rule": config.frame_rule or "chunks", "all_frames": "all_frames" in given}
    if "query" in given:    # first: the shorter wait if something is wrong
        queries, query = embed_footage(model, config, given["query"], given["query_modality"], how)
    gallery, about = open_gallery(model, config, given, how)
    if "query" not in given:
        return
    folders = Path(given["query"]).resolve().parents
    if trained["dataset"] == "walkers" and not any((f / "walkers.json").exists() for f in folders):
        print("trained on walkers, who are drawn: this model knows nothing of real people")

    found = []
    distances_and_places = nearest(query.to(model.device), gallery, given["top"])
    for (name, t), *row in zip(queries.items(), *distances_and_places, strict=True):
        ranked = [{"tracklet": about["names"][place], "distance": distance.item()}
                  for distance, place in zip(*row, strict=True)]
        found.append({"query": name, "modality": t.modality, "frames": len(t.frames),
                      "ranked": ranked})
        print(f"{name} ({t.modality}, {len(t.frames)} frames), the nearest of {len(gallery):,}:")
        for number, hit in enumerate(ranked, 1):
            print(f"{number:6}{hit['distance']:12.4f}  {hit['tracklet']}")
    if "json" in given:
        write_json(given["json"], {"gallery": len(gallery), "queries": found})
    if "figure" in given:
        write_picture(given["figure"], draw(found, queries, about["shown"], config.size))


if __name__ == "__main__":
    cli(main)
