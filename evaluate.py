"""Evaluation: test tracklets embedded once, both directions ranked, the table.

    python evaluate.py --checkpoint RUN [--data PATH]        a run of train.py, there or elsewhere
    python evaluate.py --official DIR --data PATH            the authors' three files

    test tracklets -> embed_tracklets -> (N, parts, dim) --+-- infrared->visible: distances -> score
                                                           +-- visible->infrared: roles swapped
                                                           +-- each stream alone: the same
From Python: load_run, embed_images, see_images, distances.

The distance of two tracklets is the mean over parts of the Euclidean distance. A tie counts against
the query, so constant embeddings score as badly as they should. AP is the mean of the precision at
each hit: hit-miss-hit is 5/6.

Quick question: why does mINP fall when mAP hardly moves? (It asks how far one must scroll for the
*last* tracklet of the person: one hard tracklet in a hundred spoils it.)

Ours, not the papers': mINP; the silhouettes' IoU where there are true masks; float32 (with cuDNN's
TF32, but for --official); each stream alone; re-ranking (Zhong et al., CVPR 2017); --all-frames.
"""
import math
import os
import time
from types import SimpleNamespace

from data import DIRECTIONS, MODALITIES, Frames, Tracklet, chunks, load_dataset
from support import parallel, pictures
from support.files import UserError, write_json, write_log, write_picture
from support.footage import normalise, read_frame, true_masks
from support.options import Parser, add_options, cli, early, fill, load_method, progress, typed
from support.weights import method_of, read_checkpoint, rebuild

import numpy as np
import torch

RANKS = 1, 5, 10, 20

# ------------------------------------------------------------- embeddings ----

def per_stream(function, *embeddings):
    """function(tensors), or {stream: function(tensors of that stream)} for a method whose embed
    gives {stream: tensor}."""
    if not isinstance(embeddings[0], dict):
        return function(*embeddings)
    return {name: function(*(e[name] for e in embeddings)) for name in embeddings[0]}


def clips(tracklet, T):
    """--all-frames: a tracklet of n frames -> ceil(n / T) tracklets of T frames, which together
    hold every frame. Clip j takes the j-th frame of each of T chunks: it spans the whole walk."""
    n = len(tracklet.frames)
    return [Tracklet(tuple(tracklet.frames[min(start + j, n - 1)] for start in chunks(n, T)),
                     tracklet.pid, tracklet.camera, tracklet.modality)
            for j in range(math.ceil(n / T))]


@torch.inference_mode()
def embed_tracklets(model, tracklets, config, rule="chunks", all_frames=False, silhouettes=None):
    """N tracklets -> embeddings (N, parts, dim), float32 on the CPU; all_frames: the mean over
    clips. silhouettes: a list to which SASGL's (B * T, h, w) of each batch are appended."""
    model.eval()
    device, T = device_of(model), config.test_frames or config.frames
    clips_of = [clips(t, T) if all_frames else [t] for t in tracklets]
    owner = torch.tensor([i for i, own in enumerate(clips_of) for _ in own])    # of each clip
    loader = torch.utils.data.DataLoader(
        Frames(sum(clips_of, []), size=config.size, T=T, rule=rule), batch_size=config.test_batch,
        num_workers=config.workers, pin_memory=device.type == "cuda",
        worker_init_fn=parallel.ignore_interrupts, generator=torch.Generator())
    watched = [] if silhouettes is None or model.sasgl is None else [model.sasgl]
    hooks = [sasgl.register_forward_hook(
        lambda module, given, output: silhouettes.append(output[1].silhouette.cpu()))
        for sasgl in watched]
    batches = []
    for frames, modality, _ in progress(loader, "embedding"):
        embedding = model.embed(normalise(frames.to(device, non_blocking=True)), modality)
        batches.append(per_stream(lambda x: x.float().cpu(), embedding))
    for hook in hooks:
        hook.remove()

    def mean_over_clips(*batches):
        of_clips = torch.cat(batches)
        total = torch.zeros(len(tracklets), *of_clips.shape[1:]).index_add_(0, owner, of_clips)
        return total / owner.bincount()[:, None, None]

    return per_stream(mean_over_clips, *batches)


def device_of(model):
    return next(model.parameters()).device


# ------------------------------------------------------ distances, scores ----

def distances(query, gallery, rows=256):
    """query (Q, P, D), gallery (G, P, D) -> (Q, G): mean over the P parts of the Euclidean
    distance; of {stream: tensor}, over the parts of all streams.

    One part and `rows` queries at a time: memory beside the result is small. Centred on the
    gallery's mean first, which changes no distance and saves float32 from cancellation."""
    if isinstance(query, dict):
        parts = {name: gallery[name].shape[1] for name in gallery}
        return sum(n * distances(query[name], gallery[name])
                   for name, n in parts.items()) / sum(parts.values())
    result = torch.zeros(len(query), len(gallery), device=query.device)
    for p, centre in enumerate(gallery.mean(0)):
        gallery_part = gallery[:, p] - centre    # (G, D)
        for query_part, block in zip(query[:, p].split(rows), result.split(rows), strict=True):
            block += torch.cdist(query_part - centre, gallery_part)    # a view: adds into result
    return result.div_(query.shape[1])


def score(distance, match, valid):
    """distance, match, valid (Q, G): how far, the same person?, does it count? -> {"rank-1": ...,
    "mAP", "mINP", "queries", "gallery"}, fractions of 1. Queries without an answer that counts are
    left out. Raises UserError."""
    if not np.isfinite(distance).all():
        raise UserError("the distances are not finite: the embeddings hold NaN or infinity; train "
                        "with a lower --lr or with --precision float32")
    answered = (match & valid).any(1)
    first, AP, INP = np.concatenate([
        ranked(distance[rows], match[rows], valid[rows])
        for rows in np.array_split(np.flatnonzero(answered), 1 + len(distance) // 256)], axis=1)
    results = {f"rank-{r}": (first <= r).mean() for r in RANKS if r <= distance.shape[1]}
    results |= {"mAP": AP.mean(), "mINP": INP.mean()}
    return {name: float(value) for name, value in results.items()} | {
        "queries": int(answered.sum()), "gallery": distance.shape[1]}


def ranked(distance, match, valid):
    """-> rank of the first hit, average precision, inverse negative penalty: (3, Q)."""
    order = np.lexsort((match, distance))    # by distance; of equal ones the wrong ones first
    hit = np.take_along_axis(match & valid, order, 1)
    rank = np.take_along_axis(valid, order, 1).cumsum(1)    # among those that count
    hits = hit.cumsum(1)
    number = hits[:, -1]
    AP = np.where(hit, hits / np.maximum(rank, 1), 0).sum(1) / number
    first = np.where(hit, rank, rank.max() + 1).min(1)
    last = np.where(hit, rank, 0).max(1)
    return np.stack([first, AP, number / last])


def rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017), which uses the whole gallery: distance
    (N, N) of Q queries, then N - Q gallery tracklets -> (Q, N - Q). Memory: five times N * N
    floats."""
    N = len(distance)
    d = (distance / np.maximum(distance.max(1, keepdims=True), 1e-6)) ** 2
    nearest = distance.argsort(1, kind="stable")[:, :max(k1 + 1, k2)]

    def reciprocal(i, k):
        """R(i, k): of i and its k nearest those that have i among theirs."""
        forward = nearest[i, :k + 1]
        return forward[(nearest[forward, :k + 1] == i).any(1)]

    V = np.zeros((N, N), np.float32)    # how much each one belongs to i's neighbourhood R*
    for i in range(N):
        R = reciprocal(i, k1)
        halves = [reciprocal(j, round(k1 / 2)) for j in R]
        joining = [half for half in halves if len(np.intersect1d(half, R)) > 2 / 3 * len(half)]
        wide = np.unique(np.concatenate([R, *joining]))
        V[i, wide] = np.exp(-d[i, wide])
    V /= V.sum(1, keepdims=True)
    V = np.stack([V[nearest[i, :k2]].mean(0) for i in range(N)])    # local query expansion
    result = np.empty((Q, N - Q), np.float32)
    for q in range(Q):    # the Jaccard distance; rows of V sum to 1
        near = np.flatnonzero(V[q])
        minima = np.minimum(V[q, near], V[Q:, near]).sum(1)
        result[q] = (1 - weight) * (1 - minima / (2 - minima)) + weight * d[q, Q:]
    return result


# ------------------------------------------------------------- evaluation ----

def distance_of(dataset, direction, embeddings, device, reranked=False):
    """-> the distances (Q, G) of one direction, numpy."""
    query, gallery = dataset.directions[direction]
    if reranked:
        everyone = per_stream(lambda x: x[query + gallery].to(device), embeddings)
        return rerank(distances(everyone, everyone).cpu().numpy(), len(query))
    query = per_stream(lambda x: x[query].to(device), embeddings)
    gallery = per_stream(lambda x: x[gallery].to(device), embeddings)
    return distances(query, gallery).cpu().numpy()


def labels_of(dataset, direction):
    """-> match, valid (Q, G): the same person?, does it count? The same person before the same
    camera is too easy: it does not count in HITSZ-VCM."""
    query, gallery = dataset.directions[direction]
    pid, camera = (np.unique([str(getattr(t, name)) for t in dataset.test], return_inverse=True)[1]
                   for name in ("pid", "camera"))
    match = pid[query][:, None] == pid[gallery]
    same_camera = camera[query][:, None] == camera[gallery]
    return match, ~(match & same_camera & dataset.ignore_same_camera)


def ious_of(silhouettes, dataset, tracklets, config, rule, number=32):
    """The overlap (IoU) of silhouette and true mask in each frame of some of the tracklets."""
    T = config.test_frames or config.frames
    frames = Frames(tracklets, size=config.size, T=T, rule=rule)
    silhouettes = torch.cat(silhouettes).unflatten(0, (-1, T))    # (N, T, h, w)
    for i in pictures.evenly(range(len(tracklets)), number):
        masks = true_masks(dataset.root, frames.paths(i), config.size)
        yield from pictures.iou(silhouettes[i], masks).tolist()


def evaluate(model, dataset, config, rerank=False, all_frames=False):
    """-> results (of both directions, of each stream alone, the silhouettes' IoU), {direction:
    distances (Q, G)}, embeddings; in all processes but the first None."""
    rank, world = parallel.processes()
    parallel.take_buffers_of_first(model)    # all evaluate with the batch norms of process 0
    rule = config.frame_rule or dataset.frame_rule
    share = np.array_split(np.arange(len(dataset.test)), world)[rank]
    mine, silhouettes = [dataset.test[i] for i in share] or dataset.test[:1], []
    embeddings = embed_tracklets(model, mine, config, rule, all_frames, silhouettes)
    has_masks = silhouettes and os.path.isdir(os.path.join(dataset.root, "masks"))
    ious = [*ious_of(silhouettes, dataset, mine, config, rule)] if has_masks and not all_frames else []
    collected = parallel.collect((per_stream(lambda x: x[:len(share)], embeddings), ious))
    if collected is None:
        return None
    embeddings = per_stream(lambda *x: torch.cat(x), *(own for own, _ in collected))
    ious = sum((own for _, own in collected), [])

    def scores(embeddings):
        found = {d: distance_of(dataset, d, embeddings, device_of(model), rerank)
                 for d in DIRECTIONS}
        return {d: score(found[d], *labels_of(dataset, d)) for d in DIRECTIONS}, found

    whole, found = scores(embeddings)
    results = {"directions": whole,
               "streams": {name: scores(own)[0] for name, own in model.streams_of(embeddings).items()},
               "silhouette_iou": sum(ious) / len(ious) if ious else None}
    return results, found, embeddings


def table(results):
    """Results -> the table as text, in per cent: a row for each direction, below it one for each
    stream alone. Ranks beyond a gallery have no column."""
    directions = results["directions"]
    names = [name for name in (*(f"rank-{r}" for r in RANKS), "mAP", "mINP")
             if all(name in r for r in directions.values())]
    special = [name for name in ("rerank", "all_frames") if results.get(name)]
    if "trained_on" in results:
        special.append(f"trained on {results['trained_on']}, tested on {results['dataset']}")
    lines = ["; ".join(special)] if special else []
    lines.append(" " * 20 + "".join(f"{name:>9}" for name in (*names, "queries", "gallery")))

    def row(title, r):
        return f"{title:20}" + "".join(f"{100 * r[name]:9.2f}" for name in names)

    for direction, r in directions.items():
        lines.append(row(direction, r) + f"{r['queries']:9,}{r['gallery']:9,}")
        lines += [row(f"  {name} alone", own[direction]) for name, own in results["streams"].items()]
    if results["silhouette_iou"] is not None:
        lines.append(f"silhouette IoU against the true masks: {results['silhouette_iou']:.3f}")
    return "\n".join(lines)


def person_of(tracklet):
    return f"{tracklet.camera or ''} person {tracklet.pid}".strip()


def some_frames(tracklet, size, number=3):
    return torch.stack([read_frame(f, size) for f in pictures.evenly(tracklet.frames, number)])


def sheet(model, dataset, config, is_home):
    """Two test people by night and by day, as the model sees them -> PIL image, or None. is_home:
    was the model trained on this dataset?"""
    by_pid, rule = {}, config.frame_rule or dataset.frame_rule
    for t in dataset.test or dataset.train:
        by_pid.setdefault(t.pid, {}).setdefault(t.modality, t)
    people = pictures.evenly([own for own in by_pid.values() if len(own) == 2], 2)
    shown = [own[modality] for own in people for modality in ("infrared", "visible")]
    frames_of = Frames(shown, size=config.size, T=4, rule=rule)
    columns = [(f"{t.modality} {person_of(t)}", frames_of[i][0],
                true_masks(dataset.root, frames_of.paths(i), config.size))
               for i, t in enumerate(shown)]

    def face_of(label):
        if not is_home:
            return f"identity {label}", None
        pid = dataset.classes[label]
        t = next(t for t in dataset.train if t.pid == pid and t.modality == "visible")
        return pid, read_frame(t.frames[len(t.frames) // 2], config.size)

    return pictures.sheet_of(model, columns, face_of) if shown else None


def ranked_lists(model, dataset, found, embeddings, size, top=8):
    """What was found for four queries of each direction -> PIL image."""
    rows = []
    for direction, distance in found.items():
        query, gallery = dataset.directions[direction]
        _, valid = labels_of(dataset, direction)
        for q in pictures.evenly(range(len(query)), 4):
            asked, hits = dataset.test[query[q]], []
            nearest = np.where(valid[q], distance[q], np.inf).argsort(kind="stable")[:top]
            for g in nearest[valid[q, nearest]]:
                t = dataset.test[gallery[g]]
                strips = model.strips_of(per_stream(
                    lambda x, a=query[q], b=gallery[g]: (x[a] - x[b]).norm(dim=1), embeddings))
                hits.append(pictures.Found(person_of(t), some_frames(t, size), distance[q, g],
                                           t.pid == asked.pid, strips))
            title = f"{direction}: {person_of(asked)}"
            rows.append(pictures.Row(title, some_frames(asked, size), hits))
    return pictures.draw_ranking(rows)


def report(model, dataset, config, folder, log=(), head=None, **how):
    """Evaluate and print the table; write results.json and the pictures into `folder` unless it is
    "". log: the run's, whose last line gets Rank-1 and mAP; head: more for results.json; how: of
    evaluate."""
    start, head = time.time(), head or {}
    found = evaluate(model, dataset, config, **how) if dataset.test else None
    if parallel.processes()[0] == 0:
        drawn = {"sees": sheet(model, dataset, config, "trained_on" not in head)}
        if found:
            results, ranked, embeddings = found
            seconds = sum(line["seconds"] for line in log) + time.time() - start
            results = {**head, "dataset": dataset.name, **results, "seconds": round(seconds, 1)}
            print("\n" + table(results) + "\n", flush=True)
            drawn["ranking"] = ranked_lists(model, dataset, ranked, embeddings, config.size)
            if folder:
                write_json(os.path.join(folder, "results.json"), results)
            if log:
                log[-1] |= for_the_log(results)
        if log:
            drawn["curves"] = pictures.draw_curves(log, f"{head['method']} on {dataset.name}")
            write_log(folder, log)
        for name, picture in drawn.items():
            if folder and picture:
                write_picture(os.path.join(folder, name + ".png"), picture)
    parallel.wait_for_all()


def for_the_log(results):
    """What log.jsonl keeps: {"rank-1": {direction: share}, "mAP": ..., "streams": {stream: ...}}."""
    def brief(directions):
        return {key: {d: r[key] for d, r in directions.items()} for key in ("rank-1", "mAP")}

    streams = {name: brief(own) for name, own in results["streams"].items()}
    return {**brief(results["directions"]), "streams": streams}


# ------------------------------------------------------------- from Python ----

def load_run(path, method="", given=None):
    """A run's folder or checkpoint -> model in eval mode, its config (a namespace), its checkpoint.
    method: FILE.py:CLASS for a method of your own; given: {option: value} to override. Raises
    UserError."""
    checkpoint, given = read_checkpoint(path), given or {}
    method = load_method(method_of(checkpoint, method))
    options = fill(method.Options, checkpoint["options"] | given)
    config = SimpleNamespace(**checkpoint["config"])
    model = rebuild(method, options, config.size, checkpoint, path).eval()
    vars(config).update({name: given[name] for name in vars(config) if name in given})
    return model, config, checkpoint


def load_authors_files(folder):
    """The authors' three files -> model in eval mode, its config."""
    from model import DinoGRL, Options    # only here: LSMRL needs no DinoGRL
    from support.dinov2 import load_dinov2
    from support.official import load_official

    class Empty(DinoGRL):
        def prior(self):    # best_shape.pth holds DINOv2 too
            return load_dinov2(self.options.dinov2, pretrained=False)

    torch.backends.cudnn.allow_tf32 = False    # their embeddings to float32's last digits
    size = 256, 128
    config = SimpleNamespace(data="", reader="", size=size, frames=6, test_frames=0, frame_rule="",
                             workers=min(8, os.cpu_count()), test_batch=32, device="")
    model = load_official(folder, lambda classes: Empty(Options(), classes, size, pretrained=False))
    return model, config


def tracklets_of(tracklets, modality):
    """Lists of frames -> Tracklets of unknown people. Raises UserError."""
    if modality not in MODALITIES or not all(len(frames) for frames in tracklets):
        raise UserError(f"modality {modality!r} or a tracklet without frames; expected "
                        f"{' or '.join(MODALITIES)}, and lists of frames")
    return [Tracklet(tuple(frames), None, None, modality) for frames in tracklets]


def embed_images(model, config, tracklets, modality):
    """tracklets: N lists of frames in order; a frame is a path, a PIL image or a uint8 array
    (H, W, 3), RGB, or (H, W), of any size; all of one modality, "visible" or "infrared" ->
    embeddings (N, parts, dim), float32 on the CPU; `distances` compares them. Raises UserError."""
    config = SimpleNamespace(**{**vars(config), "workers": 0})    # images at hand need no process
    return embed_tracklets(model, tracklets_of(tracklets, modality), config)


@torch.inference_mode()
def see_images(model, config, frames):
    """A list of frames as in embed_images -> SASGL's Codes: silhouettes and codes of each."""
    frames = torch.stack([read_frame(frame, config.size) for frame in frames])
    codes, _ = model.eval().sasgl.encode(normalise(frames.to(device_of(model))))
    return codes


# ------------------------------------------------------------ command line ----

def add_overrides(parser, checkpoint):
    """Options that take the place of the run's own values."""
    group = parser.add_argument_group("in place of the run's own values (train.py --help)")
    for name in ("data", "reader", "frame-rule", "device"):
        group.add_argument(f"--{name}", metavar="NAME")
    for name in ("frames", "test-frames", "workers", "test-batch"):
        group.add_argument(f"--{name}", metavar="N", type=int)
    if checkpoint:
        method = load_method(method_of(checkpoint, early(None, "method")["method"]))
        add_options(parser, method.Options, checkpoint["options"])


def check_reader(config, given):
    """Your own reader is run only where the command line names it. Raises UserError."""
    if config.reader and "reader" not in given:
        raise UserError(f"the run's --reader {config.reader} is your own code; expected --reader "
                        'FILE.py:FUNCTION, or --reader "" for a dataset that needs none')


def main():
    first = early(None, "checkpoint")
    checkpoint = read_checkpoint(first["checkpoint"]) if first["checkpoint"] else None
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", metavar="RUN", help="a run's folder, or its last.pt")
    parser.add_argument("--official", metavar="DIR", help="the folder of the authors' files")
    parser.add_argument("--method", metavar="FILE.py:CLASS", help="of the run, if it is your own")
    parser.add_argument("--out", metavar="DIR", help="write results.json and pictures there")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking")
    parser.add_argument("--all-frames", action="store_true", help="every frame: slower, a little "
                        "better")
    add_overrides(parser, checkpoint)
    given = typed(parser)
    device = parallel.join(given.get("device", ""))
    if bool(checkpoint) == bool(given.get("official")):
        raise UserError("expected one of --checkpoint RUN and --official DIR; see --help")
    if checkpoint:
        model, config, checkpoint = load_run(given["checkpoint"], given.get("method", ""), given)
        check_reader(config, given)
    else:
        model, config = load_authors_files(given["official"])
        vars(config).update({name: given[name] for name in vars(config) if name in given})
    how = {name: True for name in ("rerank", "all_frames") if name in given}
    dataset = load_dataset(config.data or os.path.join("runs", "walkers"), config.reader)
    if not dataset.test:
        raise UserError(f"nothing to test on in {config.data}; expected query/ and gallery/, or a "
                        "benchmark: name one by --data")
    head = {"method": checkpoint["method"] if checkpoint else "dinogrl", **how}
    if checkpoint and checkpoint["dataset"] != dataset.name:
        head["trained_on"] = checkpoint["dataset"]
    report(model.to(device), dataset, config, given.get("out", ""), head=head, **how)
    parallel.leave()


if __name__ == "__main__":
    cli(main)
