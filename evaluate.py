"""Evaluation: test tracklets embedded once, both directions ranked; or a search in one's own
footage.

    python evaluate.py --checkpoint RUN [--data PATH]                a run of train.py
    python evaluate.py --official DIR --data PATH                    the authors' three files
    python evaluate.py --checkpoint RUN --query DIR --gallery DIR    who of the gallery is this?

    test tracklets -> embed -> (N, parts, dim) --+-- infrared->visible: distances, ranks, results
                                                 +-- visible->infrared: the same, roles swapped
                                                 +-- each stream of the method alone: the same
    own footage: gallery -> embed -> FILE.npz, read piece by piece --+-- the nearest of each query
                 queries -> embed -> (Q, parts, dim) ----------------+

How embeddings become ranks stands in support/ranking.py, how pictures are drawn in
support/pictures.py.

Quick question: why is every test tracklet embedded once, though each takes part in both directions?
(Its embedding does not depend on who asks. A loader per direction does the same work twice.)

Ours, not the paper's: the silhouettes' IoU where true masks are at hand; float32 (on CUDA with
cuDNN's TF32 convolutions, except for --official); each stream alone; --rerank, --all-frames, the
search.
"""
import math
import os
import time
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from data import (
    DIRECTIONS,
    FRAME_RULES,
    INFRARED,
    MODALITIES,
    NO_READER,
    VISIBLE,
    Dataset,
    Frames,
    Tracklet,
    check_reader,
    chosen_rule,
    chunks,
    is_walkers,
    load_datasets,
    normalise,
)
from support.export import export
from support.files import (
    UserError,
    check_writable,
    in_short,
    printable,
    write_atomic,
    write_json,
    write_picture,
)
from support.footage import file_of, find_footage, ignore_interrupts, is_mask, read_frame
from support.options import (
    Bar,
    Parser,
    add_options,
    as_typed,
    check_ranges,
    cli,
    given_options,
    load_method,
    option,
    say,
    stored_config,
    tell,
)
from support.parallel import collect_in_first, join, leave, processes
from support.pictures import (
    Found,
    Reading,
    Row,
    draw_ranking,
    draw_reading,
    draw_silhouettes,
    evenly,
)
from support.ranking import (
    Labels,
    StoredGallery,
    as_integers,
    distances,
    fingerprint,
    matches,
    nearest,
    rerank,
    score,
    write_gallery,
)
from support.weights import read_checkpoint, rebuild

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

LONGEST = 20    # ranked tracklets that a picture can hold
MOST_ROWS = 50    # queries in a picture of a search


@dataclass
class EvaluationOptions:
    """The choices of a run that an evaluation needs too; train.Config adds the others."""
    data: tuple = option(
        (), "HITSZ-VCM, BUPTCampus, or train/ query/ gallery/ of your own; train.py takes several, "
        "and tests on the first that can be; without it walkers, which it draws under runs/",
        group="data", each=str)
    reader: str = option(
        NO_READER, "FILE.py:FUNCTION of your own that reads --data: path -> Dataset", group="data")
    size: tuple = option(
        (256, 128), "height and width of the frames; the maps' rows are cut into strips",
        least=1, most=4096, group="data")
    frames: int = option(
        6, "frames per tracklet; more helps a little and costs in proportion",
        least=1, most=1024, group="data")
    test_frames: int = option(
        0, "frames per tracklet in the test; more cost little there; 0: as many as in training",
        least=0, most=1024, group="data")
    frame_rule: str = option(
        "", f"which frames: {', '.join(FRAME_RULES)}; none: as the dataset's protocol has it",
        group="data")
    workers: int = option(
        min(8, os.cpu_count() or 1),
        "loader processes; raise it if the GPU waits; 0 reads in the main process, best for tiny "
        "images on a CPU", least=0, most=256, group="data")
    test_batch: int = option(
        32, "tracklets at a time in evaluation; lower it if memory runs out",
        least=1, most=4096, group="data")
    device: str = option("", "cuda, cuda:1, cpu; default: cuda if there is one", group="run")
    trained_on = "", (), ()    # no option: the training set's name, folders and classes


def frames_in_test(config):
    return config.test_frames or config.frames


# ------------------------------------------------------------- embeddings ----

def clips(tracklet, T):
    """--all-frames: a tracklet of n frames -> ceil(n / T) of T frames each, which together hold
    every frame, whatever the --frame-rule: 13 frames, T = 6 -> 3 clips. Clip j takes the j-th frame
    of each of T chunks, so that each spans the whole walk. [ours]"""
    n = len(tracklet.frames)
    starts = chunks(n, T)
    made = []
    for j in range(math.ceil(n / T)):
        frames = tuple(tracklet.frames[min(start + j, n - 1)] for start in starts)
        made.append(Tracklet(frames, tracklet.pid, tracklet.camera, tracklet.modality))
    return made


@torch.inference_mode()
def embed_tracklets(model, tracklets, config, device, rule="chunks", all_frames=False):
    """Yields each tracklet's embedding (parts, dim), in order, float32 on the CPU; all_frames: the
    mean over its clips."""
    model.eval()
    T = frames_in_test(config)
    clips_of = [clips(t, T) if all_frames else [t] for t in tracklets]
    # A clip has T frames, and any rule takes T of T: all of them.
    frames_of_clips = Frames([clip for group in clips_of for clip in group], size=config.size,
                             T=T, rule=rule)
    loader = torch.utils.data.DataLoader(
        frames_of_clips, batch_size=config.test_batch, num_workers=config.workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupts,
        generator=torch.Generator())
    waiting, done = [], 0
    with Bar("embedding", len(tracklets), hidden=processes()[0] > 0) as bar:
        for frames, modality, _ in loader:
            frames = normalise(frames.to(device, non_blocking=True))
            waiting.extend(model.embed(frames, modality).cpu())
            # A batch may end between the clips of a tracklet: these wait for the next batch.
            while done < len(tracklets) and len(waiting) >= len(clips_of[done]):
                number = len(clips_of[done])
                yield torch.stack(waiting[:number]).mean(0)
                del waiting[:number]
                done += 1
                bar.update()


def stacked(embeddings, N):
    """Something that yields N embeddings (parts, dim) -> one tensor (N, parts, dim)."""
    result = None    # torch.stack(list(embeddings)) would hold all of them twice
    for i, embedding in enumerate(embeddings):
        if result is None:
            result = torch.empty(N, *embedding.shape)
        result[i] = embedding
    return result


def embed_shared(model, tracklets, config, device, **how):
    """embed_tracklets, each process taking its share -> (N, parts, dim) in process 0, None in the
    others."""
    rank, world = processes()
    shares = np.array_split(np.arange(len(tracklets)), world)
    # With more processes than tracklets, an empty share embeds the first one for nothing.
    mine = [tracklets[i] for i in shares[rank]] or tracklets[:1]
    # The first share is never shorter than another. All processes send as many rows as it has; what
    # is no tracklet's is cut off below.
    longest = len(shares[0])
    rows = stacked(embed_tracklets(model, mine, config, device, **how), longest)
    collected = collect_in_first(rows, device)
    if collected is None:
        return None
    parts = [part[:len(share)] for part, share in zip(collected, shares, strict=True)]
    return torch.cat(parts).cpu()


def image_of(frame):
    """A PIL image, a uint8 array (H, W, 3) or (H, W), or a path -> PIL image or path, as Frames
    reads them. Raises UserError."""
    if isinstance(frame, (str, os.PathLike)):
        return os.fspath(frame)
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and (
            frame.ndim == 2 or frame.ndim == 3 and frame.shape[2] == 3):
        return Image.fromarray(frame)
    if not isinstance(frame, Image.Image):
        shape = f" of {frame.dtype}, {frame.shape}" if isinstance(frame, np.ndarray) else ""
        raise UserError(f"a frame is {type(frame).__name__}{shape}; expected a PIL image, a uint8 "
                        "array (H, W, 3) or (H, W), or a path")
    return frame


def is_list(frames):
    """Of frames, and no frame itself: an array's rows would be taken for pictures, letters for
    paths."""
    is_frame = isinstance(frames, (str, os.PathLike, Image.Image))
    return not is_frame and (not isinstance(frames, np.ndarray) or frames.ndim == 4)


def embed_images(model, config, tracklets, modality):
    """From Python: embeds tracklets of one modality, "visible" or "infrared".

    model, config: of load_run or load_authors_files. tracklets: N lists of frames in order; a frame
    is a PIL image, a uint8 array (H, W, 3) or (H, W), or a path, of any size, and is left as it is.
    -> (N, parts, dim), float32 on the CPU; support.ranking.distances compares two of them. Computes
    where the model is. Raises UserError for what is none of this."""
    if modality not in MODALITIES:
        raise UserError(f"modality {modality!r}; expected {' or '.join(MODALITIES)}")
    if not tracklets or not all(is_list(frames) and len(frames) for frames in tracklets):
        raise UserError("no tracklet, one without frames, or a frame in the place of one; expected "
                        "a list of lists of frames")
    made = [Tracklet(tuple(map(image_of, frames)), -1, "", modality) for frames in tracklets]
    config = replace(config, workers=0)    # images at hand need no loader process
    device = next(model.parameters()).device
    rule = config.frame_rule or "chunks"
    return torch.stack(list(embed_tracklets(model, made, config, device, rule)))


# -------------------------------------------------------------- evaluation ----

class Direction:
    """One direction of a dataset: its queries against its gallery."""

    def __init__(self, name, dataset, embeddings, device, reranked=False):
        query, gallery = dataset.directions[name]
        self.name, self.dataset, self.device = name, dataset, device
        self.query, self.gallery = torch.tensor(query), torch.tensor(gallery)
        self.query_parts = embeddings[self.query]
        self.gallery_parts = embeddings[self.gallery].to(device)
        pid = as_integers([t.pid for t in dataset.test])
        camera = as_integers([t.camera for t in dataset.test])
        self.labels = []
        for side in (self.query, self.gallery):
            its_camera = camera[side] if dataset.ignore_same_camera else None
            self.labels.append(Labels(pid[side], its_camera))
        self.reranked_distance = None    # or (Q, G)
        if reranked:
            everyone = torch.cat([self.query_parts.to(device), self.gallery_parts])
            self.reranked_distance = rerank(distances(everyone, everyone), len(query))

    def distance(self, rows):
        """rows: indices of queries -> (len(rows), G)."""
        if self.reranked_distance is not None:
            return self.reranked_distance[rows.to(self.device)]
        return distances(self.query_parts[rows].to(self.device), self.gallery_parts)

    def score(self):
        return score(self.distance, *self.labels)

    def ranked(self, row, top):
        """-> the query's tracklet, and the `top` nearest as (distance, tracklet, distance of each
        part (P,)), without those that the protocol ignores."""
        rows = torch.tensor([row])
        _, valid = matches(*self.labels, rows)
        distance = self.distance(rows)[0].cpu().masked_fill(~valid[0], torch.inf)
        found = []
        for place in distance.argsort(stable=True)[:top].tolist():
            if distance[place] < math.inf:
                tracklet = self.dataset.test[self.gallery[place]]
                parts = self.gallery_parts[place].cpu() - self.query_parts[row]    # (P, D)
                found.append((distance[place].item(), tracklet, parts.norm(dim=1)))
        return self.dataset.test[self.query[row]], found


def evaluate(model, dataset, config, device, *, reranked=False, all_frames=False):
    """-> results, embeddings (N, parts, dim) and both Directions; in all processes but the first
    (None, None, None).

    results: those of both directions, those of each stream alone, and the silhouettes' IoU. In
    results.json method, dataset, seconds and what was special are added. reranked: the streams are
    re-ranked too."""
    rule = chosen_rule(config, dataset)
    embeddings = embed_shared(model, dataset.test, config, device, rule=rule, all_frames=all_frames)
    if embeddings is None:
        return None, None, None

    def directions_of(embeddings):
        return [Direction(name, dataset, embeddings, device, reranked) for name in DIRECTIONS]

    def scores(directions):
        return {direction.name: direction.score() for direction in directions}

    directions = directions_of(embeddings)
    # A method need not have streams, nor name them.
    streams = model.streams_of(embeddings) if hasattr(model, "streams_of") else {}
    alone = {name: scores(directions_of(own)) for name, own in streams.items()}
    results = {"directions": scores(directions), "streams": alone,
               "silhouette_iou": silhouette_iou(model, dataset, config, device)}
    return results, embeddings, directions


def strips_of(model, distance):
    """The distance of each part (P,) -> for draw_ranking, {stream: that of each of its strips};
    empty for a method that names no strips."""
    return model.strips_of(distance) if hasattr(model, "strips_of") else {}


def ranked_lists(model, directions, top, words):
    """Rows for draw_ranking: four queries of each direction, evenly taken. words: added to the
    title, such as ", all frames"."""
    lists = []
    for direction in directions:
        for row in evenly(range(len(direction.query)), 4):
            query, found = direction.ranked(row, min(top, LONGEST))
            ranked = [Found(person_of(t), t.frames, distance, t.pid == query.pid,
                            strips_of(model, parts)) for distance, t, parts in found]
            title = f"{direction.name}{words}: {person_of(query)}"
            lists.append(Row(title, query.frames, ranked))
    return lists


def training_note(dataset, config):
    """-> {"trained_on": ...}, for results, where a run was trained elsewhere: on a dataset of
    another name, or of the same name in another folder; else {}. Older runs do not know their
    name."""
    name, folders, _ = config.trained_on
    is_there = os.path.realpath(config.data[0]) in map(os.path.realpath, folders)
    if not name or (name == dataset.name and is_there):
        return {}
    where = f" in {as_typed(folders)}" if name == dataset.name else ""
    return {"trained_on": name + where}


def speciality(rerank=False, all_frames=False):
    """The label of results of --rerank or --all-frames, which are no plain ones; else ""."""
    words = []
    if rerank:
        words.append("re-ranked (k-reciprocal)")
    if all_frames:
        words.append("all frames")
    return ", ".join(words)


def table(results):
    """Results -> the table as text, in per cent: a row for each direction, below it one for each
    stream alone. Ranks beyond a gallery have no column."""
    directions, streams = results["directions"], results.get("streams", {})
    names = ("rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP")
    names = [name for name in names if all(name in r for r in directions.values())]
    special = speciality(results.get("rerank", False), results.get("all_frames", False))
    lines = [f"{special}:"] if special else []
    if "trained_on" in results:
        words = f"trained on {results['trained_on']}, tested on {results['dataset']}"
        lines.insert(0, printable(in_short(words, 300)))
    heads = "".join(f"{name:>9}" for name in (*names, "queries", "gallery"))
    lines.append(f"{'':20}{heads}")

    def row(title, r):
        return f"{title:20}" + "".join(f"{100 * r[name]:9.2f}" for name in names)

    for direction, r in directions.items():
        lines.append(f"{row(direction, r)}{r['queries']:9,}{r['gallery']:9,}")
        for stream, alone in streams.items():
            lines.append(row(f"  {stream} alone", alone[direction]))
    if results.get("silhouette_iou") is not None:
        lines.append(f"silhouette IoU against the true masks: {results['silhouette_iou']:.3f}")
    return "\n".join(lines)


# -------------------------------------------------------------- silhouettes ----

class Seen(NamedTuple):
    """A tracklet as SASGL sees it, for draw_silhouettes: frames uint8 (T,3,H,W), body and
    silhouette (T,h,w), codes (T,16,h,w), true masks bool (T,H,W) or None, their IoU (T,) or
    None."""
    title: str
    frames: torch.Tensor
    body: torch.Tensor
    silhouette: torch.Tensor
    denoising: torch.Tensor
    appearance: torch.Tensor
    masks: torch.Tensor | None
    iou: torch.Tensor | None


def true_mask(root, frame, size):
    """The true silhouette of a frame, bool (H, W), where the dataset at `root` has masks/ (walkers
    do); else None."""
    name = os.path.splitext(os.path.relpath(frame, root))[0] + ".png"
    path = os.path.join(root, "masks", name)
    return read_frame(path, size)[0] > 127 if os.path.isfile(path) else None


def person_of(tracklet):
    """"D3, person 7", or "person 7" where the camera is not known."""
    camera = f"{tracklet.camera}, " if tracklet.camera else ""
    return f"{camera}person {tracklet.pid}"


def title_of(tracklet):
    """"infrared D3, person 7"; of footage, whose person nobody knows (-1), its folder or file."""
    who = person_of(tracklet)
    if tracklet.pid == -1:
        frame = tracklet.frames[0]
        file = file_of(frame)
        whole = os.path.dirname(frame) if file == frame else file    # walk.gif of walk.gif#0
        who = os.path.basename(whole)
    return f"{tracklet.modality} {who}"


@torch.inference_mode()
def look_at(model, dataset, tracklets, config, device):
    """Yields a Seen for each tracklet. IoU: intersection over union of silhouette (>= 0.5, at the
    frames' size) and true mask."""
    model.eval()
    rule = chosen_rule(config, dataset)
    frames_of_tracklets = Frames(tracklets, size=config.size, T=config.frames, rule=rule)
    for i, tracklet in enumerate(tracklets):
        frames, _, _ = frames_of_tracklets[i]
        paths = frames_of_tracklets.paths(i)
        codes = model.sasgl.encode(normalise(frames.to(device)))
        masks = [true_mask(dataset.root, path, config.size) for path in paths]
        masks = None if any(mask is None for mask in masks) else torch.stack(masks)
        iou = None
        if masks is not None:
            silhouette = F.interpolate(codes.silhouette[:, None], config.size, mode="bilinear",
                                       align_corners=False)
            found = silhouette[:, 0].cpu() >= 0.5
            both, either = (found & masks).sum((1, 2)), (found | masks).sum((1, 2))
            iou = both / either.clamp(min=1)
        yield Seen(title_of(tracklet), frames, codes.body, codes.silhouette, codes.denoising,
                   codes.appearance, masks, iou)


def has_silhouettes(model):
    return getattr(model, "sasgl", None) is not None


def silhouette_iou(model, dataset, config, device, tracklets=32):
    """Mean IoU of silhouette and true mask over the frames of `tracklets` test tracklets evenly
    taken; None without masks or without silhouettes."""
    if not has_silhouettes(model) or not os.path.isdir(os.path.join(dataset.root, "masks")):
        return None
    seen = look_at(model, dataset, evenly(dataset.test, tracklets), config, device)
    ious = [one.iou for one in seen if one.iou is not None]
    return torch.cat(ious).mean().item() if ious else None


def silhouette_sheet(model, dataset, config, device, each=2):
    """What the model sees in `each` test tracklets of either modality, or of training where there
    are none -> a PIL image."""
    chosen = []
    seen = dataset.test or dataset.train
    for modality in MODALITIES:
        chosen += evenly([t for t in seen if t.modality == modality], each)
    return draw_silhouettes(list(look_at(model, dataset, chosen, config, device)))


@torch.inference_mode()
def reading_sheet(model, dataset, config, device, people=2):
    """LSMRL: where some test people's tokens look, and whose sentences they read most, by night
    and by day -> a PIL image."""
    model.eval()
    by_pid = {}
    for tracklet in dataset.test:
        by_pid.setdefault(tracklet.pid, {}).setdefault(tracklet.modality, tracklet)
    both = [found for found in by_pid.values() if len(found) == len(MODALITIES)]
    chosen = [found[m] for found in evenly(both, people) for m in (INFRARED, VISIBLE)]
    # Pictures of training identities, for their sentences: at hand where the test set lies in the
    # folder that was trained on.
    _, _, classes = config.trained_on
    is_there = dataset.classes == list(classes) and not training_note(dataset, config)
    faces = {t.pid: t.frames[len(t.frames) // 2] for t in dataset.train
             if t.modality == VISIBLE and is_there}
    frames_of = Frames(chosen, size=config.size, T=4, rule=chosen_rule(config, dataset))
    columns = []
    for i, tracklet in enumerate(chosen):
        frames = frames_of[i][0]
        look, reads = model.reading(normalise(frames[None].to(device)))
        sentences = []
        if reads is not None:
            for share, label in zip(*reads[0].topk(min(4, reads.shape[1])), strict=True):
                pid = classes[label]
                sentences.append((f"{share:.1%} {pid}", faces.get(pid)))
        own_look = None if look is None else look[0]
        columns.append(Reading(title_of(tracklet), frames, own_look, sentences))
    return draw_reading(columns)


# ------------------------------------------------------------------ search ----

def setting_of(config, all_frames):
    """What an embedding was made of, in words."""
    if all_frames:
        return f"all frames, {frames_in_test(config)} at a time"
    rule = f" ({config.frame_rule})" if config.frame_rule else ""
    return f"{frames_in_test(config)} frames of each tracklet{rule}"


def own_tracklets(path, modality):
    """A user's own footage -> {name: Tracklet}; nobody knows whose they are."""
    found = find_footage(path)
    masks = [name for name, frames in found.items() if is_mask(frames[0])]
    if masks:
        tell(f"{len(masks)} of the {len(found)} folders under {printable(path)} begin with a "
             f"picture of two colours alone, such as {printable(masks[0])}: if they hold masks, "
             "move them away; they are taken for people")
    return {name: Tracklet(frames, -1, "", modality) for name, frames in found.items()}


def is_drawn(path):
    """Does the footage lie in a folder of walkers?"""
    path = Path(path).resolve()
    return any(is_walkers(folder) for folder in (path, *path.parents))


def embed_footage(tracklets, args, model, config, device):
    """{name: Tracklet} -> yields each one's embedding (parts, dim)."""
    rule = chosen_rule(config, Dataset("footage", ""))    # which has the usual rule
    return embed_tracklets(model, list(tracklets.values()), config, device, rule, args.all_frames)


def save_embeddings(path, names, tracklets, embeddings, model, setting):
    """Writes a FILE.npz, atomically. embeddings: see write_gallery."""
    shown = [[os.path.abspath(t.frames[i]) for i in chunks(len(t.frames), 4)] for t in tracklets]
    columns = {"name": names, "pid": [t.pid for t in tracklets],
               "camera": [t.camera for t in tracklets], "modality": [t.modality for t in tracklets],
               "frame": [t.frames[0] for t in tracklets], "shown": shown,
               "model": [fingerprint(model)], "setting": [setting]}
    write_atomic(path, lambda file: write_gallery(file, columns, embeddings))


def open_gallery(args, model, config, device, scratch):
    """--gallery -> StoredGallery: the FILE.npz itself, or a folder embedded into --save or into the
    scratch folder. Raises UserError for one that another model or setting has made."""
    setting = setting_of(config, args.all_frames)
    path = args.gallery
    if not args.gallery_is_file:
        path = args.save or os.path.join(scratch, "gallery.npz")
        gallery = own_tracklets(args.gallery, args.gallery_modality or VISIBLE)
        embeddings = embed_footage(gallery, args, model, config, device)
        save_embeddings(path, list(gallery), list(gallery.values()), embeddings, model, setting)
    stored = StoredGallery(path)
    if args.gallery_is_file and stored.model != fingerprint(model):
        raise UserError(f"{path} was embedded by another model; expected the one of "
                        f"{args.checkpoint or args.official}: embed the gallery again")
    if stored.setting != setting:
        raise UserError(f"{path} was embedded from {stored.setting}, the queries from {setting}; "
                        "expected the same: see --frames and --all-frames")
    return stored


def search(args, model, config, device):
    """--query and --gallery: prints the ranked list of each query -> for --json, where main
    adds method, rerank or all_frames, and seconds; None without --query. Raises UserError."""
    queries = own_tracklets(args.query, args.query_modality) if args.query else {}
    with TemporaryDirectory() as scratch:
        stored = open_gallery(args, model, config, device, scratch)
        if args.save:
            say(f"{stored.shape[0]:,} tracklets embedded in {printable(args.save)}")
        if not queries:    # the gallery was only to be saved: see check_search
            return None
        ranked = nearest_of(queries, stored, args, model, config, device)
        if config.trained_on[0] == "walkers" and not is_drawn(args.query):
            say("trained on walkers, who are drawn: of real people this model knows nothing")
        if args.all_frames:
            say(f"{speciality(all_frames=True)}:")
        for name, tracklet in queries.items():
            print_list(name, tracklet, ranked[name], stored.shape[0])
    if args.figure:
        draw_search(args, queries, ranked, config)
    if args.silhouettes:
        footage = Dataset("footage", args.query)    # true masks: in masks/ of that folder, if any
        chosen = evenly(list(queries.values()), 4)
        sheet = draw_silhouettes(list(look_at(model, footage, chosen, config, device)))
        write_picture(args.silhouettes, sheet)
    found = [{"query": name, "modality": t.modality, "frames": len(t.frames),
              "ranked": [{"tracklet": hit.name, "modality": hit.modality, "distance": hit.distance}
                         for hit in ranked[name]]} for name, t in queries.items()]
    return {"gallery": stored.shape[0], "queries": found}


class Hit(NamedTuple):
    """A gallery tracklet in a ranked list. shown: paths of some of its frames; strips: see
    strips_of."""
    name: str
    modality: str
    distance: float
    shown: list
    strips: dict


def nearest_of(queries, stored, args, model, config, device):
    """{name: Tracklet} -> {name: its Hits, the nearest first}; the gallery is read in pieces."""
    query = stacked(embed_footage(queries, args, model, config, device), len(queries)).to(device)
    N, parts, dim = stored.shape
    stored.check_like(*query.shape[1:])
    rows = max(1, 2 ** 24 // (parts * dim))    # 64 MB of float32

    def piece(start, stop):
        return torch.from_numpy(stored.rows("embedding", start, stop)).to(device)

    distance, index = nearest(query, piece, N, args.top, rows)
    ranked = {name: [] for name in queries}
    for q, name in enumerate(queries):
        for value, row in zip(distance[q].tolist(), index[q].tolist(), strict=True):
            found, modality, shown = (stored.rows(column, row, row + 1)[0].tolist()
                                      for column in ("name", "modality", "shown"))
            strips = {}
            if args.figure:    # nobody else asks
                parts = (query[q] - piece(row, row + 1)[0]).cpu().norm(dim=1)    # (P,)
                strips = strips_of(model, parts)
            ranked[name].append(Hit(found, modality, value, shown, strips))
    return ranked


def print_list(name, tracklet, hits, gallery):
    number = len(tracklet.frames)
    frames = f"{number} frame{'s' if number > 1 else ''}"
    say(f"{printable(name)} ({tracklet.modality}, {frames}), the nearest of {gallery:,}:")
    for place, hit in enumerate(hits, 1):
        modality = printable(hit.modality)
        say(f"{place:6}{hit.distance:12.4f}  {modality:10}{printable(hit.name)}")


def draw_search(args, queries, ranked, config):
    lists = []
    for name, tracklet in list(queries.items())[:MOST_ROWS]:
        hits = [Found(hit.name, hit.shown, hit.distance, None, hit.strips)
                for hit in ranked[name][:LONGEST]]
        lists.append(Row(f"{name}, {tracklet.modality}", tracklet.frames, hits))
    write_picture(args.figure, draw_ranking(lists, config.size))
    if len(queries) > MOST_ROWS or args.top > LONGEST:
        say(f"{printable(args.figure)} shows at most {MOST_ROWS} queries and {LONGEST} tracklets "
            "for each")


# ------------------------------------------------------------- a run's model ----

def method_of(checkpoint, given, path):
    """The name of a checkpoint's method. A method of one's own is code: it is never taken from what
    a file says, but from --method alone. Raises UserError."""
    stored = checkpoint["method"]
    same_class = given.rpartition(":")[2] == stored.rpartition(":")[2]    # its file may have moved
    if given and not same_class:
        raise UserError(f"--method {given}: {path} is a run of {stored}; drop it, or name that "
                        "method")
    if ":" in stored and not given:
        raise UserError(f"{path} is a run of the method {stored}, which is code of your own; "
                        "expected --method FILE.py:CLASS, so that it is run because you say so")
    return given or stored


def joined(options, common):
    """A method's Options and the common ones -> one dataclass of both. Where both have an option,
    the method's default counts."""
    return make_dataclass("Config", [], bases=(options, common))


def load_run(path, method=""):
    """A run's folder or checkpoint -> model in eval mode, its config, its method's name. method:
    FILE.py:CLASS for a method of one's own. Raises UserError."""
    checkpoint = read_checkpoint(path)
    name = method_of(checkpoint, method, path)
    method_class = load_method(name)
    config_class = joined(method_class.Options, EvaluationOptions)
    config = stored_config(config_class, checkpoint["config"], path)
    config.trained_on = checkpoint["dataset"], config.data, checkpoint["classes"]
    return rebuild(method_class, config, checkpoint, path).eval(), config, name


def load_authors_files(folder):
    """The authors' three files -> model in eval mode, its config, its method's name."""
    from model import Options, load_official  # only here: LSMRL needs no DinoGRL
    torch.backends.cudnn.allow_tf32 = False    # their embeddings to float32's last digits
    return load_official(folder), joined(Options, EvaluationOptions)(), "dinogrl"


# -------------------------------------------------------------- command line ----

def command_line():
    """-> the arguments, and what they override of the run's configuration."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    which = parser.add_argument_group("model")
    which.add_argument("--checkpoint", metavar="RUN", help="a run's folder, or its last.pt")
    which.add_argument("--official", metavar="DIR", help="the folder of the authors' "
                       "best_model.pth, best_model2.pth, best_shape.pth")
    which.add_argument("--method", metavar="FILE.py:CLASS",
                       help="the run's method, where it is one of your own")
    footage = parser.add_argument_group("search")
    footage.add_argument("--query", metavar="DIR", help="whom to look for; a folder of frames per "
                         "tracklet, or one such folder")
    footage.add_argument("--gallery", metavar="DIR|FILE.npz",
                         help="where to look; the same, or what --save has kept of it")
    footage.add_argument("--query-modality", choices=MODALITIES, help="default infrared")
    footage.add_argument("--gallery-modality", choices=MODALITIES,
                         help="default visible; a FILE.npz knows its own")
    how = parser.add_argument_group("ranking")
    how.add_argument("--top", type=int, metavar="K", help="length of the ranked lists (10)")
    how.add_argument("--rerank", action="store_true",
                     help="k-reciprocal re-ranking: uses the whole gallery, labelled as such")
    how.add_argument("--all-frames", action="store_true",
                     help="every frame, in clips that are averaged: slower, a little better")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the results there")
    output.add_argument("--save", metavar="FILE.npz", help="keep the embeddings (search: the "
                        "gallery's), to be used as --gallery")
    output.add_argument("--figure", metavar="FILE.png",
                        help="draw ranked lists: green frame the right person, red a wrong one")
    output.add_argument("--silhouettes", metavar="FILE.png",
                        help="draw what the model sees (DinoGRL)")
    output.add_argument("--reading", metavar="FILE.png", help="draw where the model looks, and "
                        "whose sentences it reads (LSMRL)")
    output.add_argument("--export", metavar="FILE.pt2", help="write the embedding network by "
                        "torch.export, and do nothing else")
    # All in one place: by itself, Parser leaves out what was not typed.
    parser.set_defaults(checkpoint="", official="", method="", query=None, gallery=None,
                        query_modality=INFRARED, gallery_modality=None, top=10, rerank=False,
                        all_frames=False, json=None, save=None, figure=None, silhouettes=None,
                        reading=None, export=None)
    add_options(parser, EvaluationOptions, {})
    args = parser.parse_args()
    names = {f.name for f in fields(EvaluationOptions)}
    overrides = {name: value for name, value in given_options(args).items() if name in names}
    args.gallery_is_file = bool(args.gallery) and os.path.isfile(args.gallery)
    args.gallery_is_file = args.gallery_is_file and args.gallery.lower().endswith(".npz")
    return args, overrides


def check_arguments(args, overrides):
    """Raises UserError for what cannot be asked for, before anything is read."""
    if bool(args.checkpoint) == bool(args.official):
        raise UserError("expected one of --checkpoint RUN and --official DIR; see --help")
    data = overrides.get("data", ("one",))    # not typed: a stand-in that passes both checks
    if "" in (args.gallery, args.query, *data) or not data:
        raise UserError("--query, --gallery or --data is empty; name a folder: is a shell variable "
                        "unset?")
    if len(data) > 1:
        raise UserError(f"--data {' '.join(data)}; expected one folder to test on, the others in "
                        "runs of their own")
    if not 1 <= args.top <= 10 ** 6:
        raise UserError(f"--top {args.top}; expected 1 to 1000000")
    others = args.json, args.save, args.figure, args.silhouettes, args.reading
    if args.export and any((*others, args.query, args.gallery, args.rerank, args.all_frames)):
        raise UserError("--export writes the network and does nothing else; drop the other options")
    is_benchmark = "data" in overrides or args.rerank or args.reading
    if is_benchmark and (args.query or args.gallery):
        raise UserError("--data, --rerank and --reading are for a benchmark, whose gallery is "
                        "closed; drop them, or --query and --gallery")
    if args.gallery:
        check_search(args)
    elif args.query:
        raise UserError("--query needs --gallery: where to look")
    elif args.official and "data" not in overrides and not args.export:
        raise UserError("--official needs --data PATH")


def check_search(args):
    """Raises UserError for a --gallery that does not go with the other arguments."""
    if args.gallery_is_file and (args.gallery_modality or args.save):
        raise UserError(f"{args.gallery} is embedded already and knows its modality; drop "
                        "--gallery-modality and --save")
    only_embeds = args.save and not (args.json or args.figure or args.silhouettes)
    if not args.query and not only_embeds:
        raise UserError("--gallery alone only embeds: give --save FILE.npz for it, or --query DIR "
                        "to search")


def check_outputs(args):
    """Raises UserError for a file that could not be written: before the work, not after it."""
    kinds = {"save": ".npz", "json": ".json", "figure": ".png", "silhouettes": ".png",
             "reading": ".png", "export": ".pt2"}
    taken = {}
    for name, kind in kinds.items():
        path = getattr(args, name)
        if path is None:
            continue
        # So that none can overwrite a frame or a checkpoint.
        if not path.lower().endswith(kind):
            raise UserError(f"--{name} {path or 'is empty'}; expected a name that ends in {kind}")
        check_writable(path)
        real = os.path.realpath(path)
        if real in taken:    # nor one of them another
            raise UserError(f"--{taken[real]} and --{name} are both {path}; choose two names")
        taken[real] = name


def main():
    args, overrides = command_line()
    check_arguments(args, overrides)
    check_outputs(args)
    start = time.time()
    device = join(overrides.get("device", ""))
    if args.official:
        model, config, method = load_authors_files(args.official)
    else:
        model, config, method = load_run(args.checkpoint, args.method)
    if not args.gallery and not args.export:
        check_reader(overrides, config.reader, args.checkpoint)
    if "frames" in overrides:    # it counts here, unless --test-frames was typed too
        overrides.setdefault("test_frames", 0)
    for name, value in overrides.items():
        setattr(config, name, value)
    check_ranges(config)
    config.check()
    if args.silhouettes and not has_silhouettes(model):
        raise UserError(f"--silhouettes; this {method} has none; expected a DinoGRL with its gait "
                        "stream")
    if args.reading and not hasattr(model, "reading"):
        raise UserError(f"--reading; this {method} reads no sentences; expected LSMRL")
    if (args.export or args.gallery) and processes()[1] > 1:
        raise UserError("a search and an export run in one process; start it by python, not by "
                        "torchrun")
    if args.export:
        export(model, frames_in_test(config), config.size, args.export)
        T, size = frames_in_test(config), as_typed(config.size)
        say(f"{printable(args.export)}: embeds {T} frames of {size}; see support/export.py")
        return
    model.to(device)
    special = {name: True for name in ("rerank", "all_frames") if getattr(args, name)}
    head = {"method": method, **special}
    if args.gallery:
        results = search(args, model, config, device)
        if args.json:
            write_json(args.json, {**head, **results, "seconds": round(time.time() - start, 1)})
        return
    report(args, model, config, device, head, start)
    leave()


def report(args, model, config, device, head, start):
    """Evaluates on a benchmark; writes what was asked for and prints the table."""
    # A checkpoint need not say.
    config.data = config.data or (os.path.join("runs", "walkers"),)
    dataset = load_datasets(config.data, reader=config.reader)
    if not dataset.test:
        raise UserError(f"nothing to test on in {as_typed(config.data)}; expected query/ and "
                        "gallery/, or a benchmark: name one by --data")
    results, embeddings, directions = evaluate(model, dataset, config, device, reranked=args.rerank,
                                               all_frames=args.all_frames)
    if results is None:    # process 0 does the rest
        return
    results = {**head, "dataset": dataset.name, **training_note(dataset, config), **results,
               "seconds": round(time.time() - start, 1)}
    if args.json:
        write_json(args.json, results)
    if args.save:
        names = [os.path.relpath(t.frames[0], dataset.root) for t in dataset.test]
        save_embeddings(args.save, names, dataset.test, embeddings, model,
                        setting_of(config, args.all_frames))
    if args.figure:
        special = speciality(args.rerank, args.all_frames)
        lists = ranked_lists(model, directions, args.top, f", {special}" if special else "")
        write_picture(args.figure, draw_ranking(lists, config.size))
    if args.silhouettes:
        write_picture(args.silhouettes, silhouette_sheet(model, dataset, config, device))
    if args.reading:
        write_picture(args.reading, reading_sheet(model, dataset, config, device))
    say(table(results))


if __name__ == "__main__":
    cli(main)
