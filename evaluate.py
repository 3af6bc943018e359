"""Evaluation: test tracklets embedded once, both directions ranked, the table.

    python evaluate.py --checkpoint RUN [--data PATH]        a run of train.py, on its data or PATH
    python evaluate.py --checkpoint DIR --data PATH          the authors' three files
    python evaluate.py --checkpoint RUN --tour DIR           one query's way, in pictures

    test tracklets -> embed_tracklets -> (N, parts, dim) --+-- infrared->visible: distances -> score
                                                           +-- visible->infrared: roles swapped
                                                           +-- each stream alone: the same
From Python, and in your own footage: see search.py.

The distance of two tracklets is the mean over parts of the Euclidean distance. A tie counts against
the query, so constant embeddings score as badly as they should. AP is the mean of the precision at
each hit: hit-miss-hit is 5/6.

Quick question: why does mINP fall when mAP hardly moves? (It asks how far one must scroll for the
*last* tracklet of the person: one hard tracklet in a hundred spoils it.)

Ours, not the papers': mINP; the silhouettes' IoU; float32 (with cuDNN's TF32, except for the
authors' files); each stream alone; re-ranking (Zhong et al., CVPR 2017); the equal error.
"""
import os
import time

from data import DIRECTIONS, Frames, augment, load_dataset
from support import parallel, pictures
from support.check import unranked
from support.files import UserError, write_json, write_log
from support.footage import normalise
from support.options import Parser, cli, progress, typed
from support.tour import tour
from support.weights import add_run_options, check_reader, load_run

import numpy as np
import torch

RANKS = 1, 5, 10, 20

# ------------------------------------------------------------- embeddings ----

@torch.inference_mode()
def embed_tracklets(model, tracklets, config, rule="chunks"):
    """N tracklets -> embeddings (N, parts, dim), float32 on the CPU."""
    model.eval()
    T = config.test_frames or config.frames
    loader = torch.utils.data.DataLoader(
        Frames(tracklets, size=config.size, T=T, rule=rule),
        batch_size=config.test_batch,
        num_workers=config.workers,
        pin_memory=model.device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=parallel.ignore_interrupts)
    batches = []
    try:
        for frames, modality, _ in progress(loader, "embedding"):
            frames = normalise(frames.to(model.device, non_blocking=True))
            batches.append(model.embed(frames, modality).float().cpu())
    except torch.cuda.OutOfMemoryError:
        raise UserError("the GPU's memory is full; lower --test-batch") from None
    return torch.cat(batches)


# ------------------------------------------------------ distances, scores ----

def distances(query, gallery):
    """query (Q, P, D), gallery (G, P, D) -> (Q, G): mean over the P parts of the Euclidean
    distance. Centred on the gallery's mean first, which changes no distance and saves float32 from
    cancellation."""
    result = query.new_zeros(len(query), len(gallery))
    for p, centre in enumerate(gallery.mean(0)):
        result += torch.cdist(query[:, p] - centre, gallery[:, p] - centre)
    return result / query.shape[1]


def score(distance, match, valid):
    """distance, match, valid (Q, G): how far, the same person?, does it count? -> {"rank-1": ...,
    "mAP", "mINP", "queries", "gallery"}, fractions of 1. Queries without an answer that counts are
    left out. Raises UserError."""
    if not np.isfinite(distance).all():
        raise UserError("the embeddings hold NaN or infinity; train with a lower --lr or with "
                        "--precision float32")
    answered = np.flatnonzero((match & valid).any(1))
    blocks = np.array_split(answered, 1 + len(answered) // 256)    # memory stays small
    scores = [ranked(distance[rows], match[rows], valid[rows]) for rows in blocks]
    first, AP, INP = np.concatenate(scores, axis=1)
    G = distance.shape[1]
    ranks = {f"rank-{r}": float((first <= r).mean()) for r in RANKS if r <= G}
    return {**ranks, "mAP": float(AP.mean()), "mINP": float(INP.mean()),
            "queries": len(answered), "gallery": G}


def ranked(distance, match, valid):
    """-> rank of the first hit, average precision, inverse negative penalty: (3, Q)."""
    # By distance; of equal distances the wrong person first.
    order = np.lexsort((match, distance))
    hit = np.take_along_axis(match & valid, order, 1)
    rank = np.take_along_axis(valid, order, 1).cumsum(1)    # among those that count
    hits = hit.cumsum(1)
    number = hits[:, -1]
    AP = np.where(hit, hits / np.maximum(rank, 1), 0).sum(1) / number
    first = np.where(hit, rank, rank.max() + 1).min(1)
    last = np.where(hit, rank, 0).max(1)
    return np.stack([first, AP, number / last])


def equal_error(distance, match, valid):
    """"Is it the same person?" As in score -> {"distance", "rate"}: at this distance, the share of
    other people's pairs that are nearer equals that of the person's own pairs that are farther."""
    own, others = (np.sort(distance[pairs & valid]) for pairs in (match, ~match))
    rejected = 1 - np.arange(1, len(own) + 1) / len(own)
    accepted = np.searchsorted(others, own, side="right") / max(1, len(others))
    place = np.argmax(accepted >= rejected)
    return {"distance": float(own[place]), "rate": float(accepted[place])}


def rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017), which uses the whole gallery: distance
    (N, N) of Q queries, then N - Q gallery tracklets -> (Q, N - Q). Memory: five times N * N
    floats."""
    N = len(distance)
    # Each row is divided by its own largest distance.
    farthest = distance.max(1, keepdims=True)
    d = (distance / np.maximum(farthest, 1e-6)) ** 2
    nearest = distance.argsort(1, kind="stable")[:, :max(k1 + 1, k2)].copy()

    def reciprocal(i, k):
        """R(i, k): those of i and its k nearest that have i among their own k nearest."""
        forward = nearest[i, :k + 1]
        return forward[(nearest[forward, :k + 1] == i).any(1)]

    # V[i, j]: how much does j belong to the neighbourhood of i, R*(i, k1)?
    V = np.zeros((N, N), np.float32)
    for i in range(N):
        R = reciprocal(i, k1)
        members = [R]
        for j in R:
            half = reciprocal(j, round(k1 / 2))
            if len(np.intersect1d(half, R)) > 2 / 3 * len(half):
                members.append(half)
        members = np.unique(np.concatenate(members))
        V[i, members] = np.exp(-d[i, members])
    V /= V.sum(1, keepdims=True)
    # Local query expansion: the mean over the k2 nearest.
    V = np.stack([V[own].mean(0) for own in nearest[:, :k2]])

    # The Jaccard distance of two rows of V, each of which sums to 1.
    result = np.empty((Q, N - Q), np.float32)
    for q in range(Q):
        near = np.flatnonzero(V[q])
        minima = np.minimum(V[q, near], V[Q:, near]).sum(1)
        jaccard = 1 - minima / (2 - minima)
        result[q] = (1 - weight) * jaccard + weight * d[q, Q:]
    return result


# ------------------------------------------------------------- evaluation ----

def distance_of(dataset, direction, embeddings, device, reranked=False):
    """-> the distances (Q, G) of one direction, numpy."""
    query, gallery = (embeddings[side].to(device) for side in dataset.directions[direction])
    if not reranked:
        return distances(query, gallery).cpu().numpy()
    everyone = torch.cat([query, gallery])
    return rerank(distances(everyone, everyone).cpu().numpy(), len(query))


def labels_of(dataset, direction):
    """-> match, valid (Q, G): the same person?, does it count? The same person before the same
    camera is too easy: it does not count in HITSZ-VCM."""
    query, gallery = dataset.directions[direction]
    pid = np.array([str(t.pid) for t in dataset.test])
    camera = np.array([str(t.camera) for t in dataset.test])
    match = pid[query][:, None] == pid[gallery]
    same_camera = camera[query][:, None] == camera[gallery]
    return match, ~(match & same_camera & dataset.ignore_same_camera)


def embed_test(model, dataset, config):
    rule = config.frame_rule or dataset.frame_rule
    return embed_tracklets(model, dataset.test, config, rule)


def evaluate(model, dataset, config, rerank=False):
    """-> results (of both directions, of each stream alone, the silhouettes' IoU), {direction:
    (distance, match, valid)}."""
    embeddings = embed_test(model, dataset, config)

    # Both directions, by the whole embedding and by each stream alone.
    found, directions, errors, streams = {}, {}, {}, {}
    lost = unranked(dataset)
    for d in [d for d in DIRECTIONS if d not in lost]:
        labels = labels_of(dataset, d)
        found[d] = distance_of(dataset, d, embeddings, model.device, rerank), *labels
        directions[d], errors[d] = score(*found[d]), equal_error(*found[d])
        for name, own in model.streams_of(embeddings).items():
            distance = distance_of(dataset, d, own, model.device, rerank)
            streams.setdefault(name, {})[d] = score(distance, *labels)
    results = {"directions": directions, "streams": streams, "equal_error": errors,
               "silhouette_iou": pictures.mean_iou(model, dataset, config.size)}
    return results, found


def table(results):
    """Results -> the table as text, in per cent: a row for each direction, below it one for each
    stream alone. Ranks beyond a gallery have no column."""
    whole, streams = results["directions"], results["streams"]
    first, *others = whole.values()
    # Last: queries, gallery, numbers
    names = [name for name in first if all(name in other for other in others)]
    lines = [" " * 20 + "".join(f"{name:>9}" for name in names)]

    def row(title, r):
        return f"{title:20}" + "".join(f"{100 * r[name]:9.2f}" for name in names[:-2])

    for direction, r in whole.items():
        lines.append(row(direction, r) + f"{r['queries']:9,}{r['gallery']:9,}")
        lines += [row(f"  {name} alone", own[direction]) for name, own in streams.items()]
    if results["silhouette_iou"] is not None:
        lines.append(f"silhouette IoU against the true masks: {results['silhouette_iou']:.3f}")
    errors = "; ".join(f"{d} {100 * e['rate']:.1f} % at the distance {e['distance']:.3f}"
                       for d, e in results["equal_error"].items())
    lines.append(f"equal error, for these cameras alone: {errors}")
    return "\n".join(lines)


def report(model, dataset, config, folder, head, log=(), **how):
    """Evaluate and print the table; write results.json and pictures into `folder` unless it is "".
    log: the run's, whose last line gets Rank-1; head: more for results.json; how: of evaluate. Of
    several processes the first does it."""
    if parallel.processes()[0] > 0:
        parallel.wait_for_all()
        return
    start = time.time()
    if dataset.test:
        results, ranked = evaluate(model, dataset, config, **how)
        seconds = sum(line["seconds"] for line in log) + time.time() - start
        results = {**head, "dataset": dataset.name, **results, "seconds": round(seconds, 1)}
        print(f"\n{table(results)}\n", flush=True)
        if folder:
            write_json(os.path.join(folder, "results.json"), results)
            pictures.write_ranking(folder, dataset, ranked, config.size)
        if log:
            log[-1]["rank-1"] = rank_1_of(results)
    if folder:
        pictures.write_sheets(folder, model, dataset, config.size, log, head)
        if log:
            write_log(folder, log)
    parallel.wait_for_all()


def rank_1_of(results):
    """-> {direction, or "direction, stream alone": Rank-1}, for the log and its curves."""
    found = {d: r["rank-1"] for d, r in results["directions"].items()}
    for name, own in results["streams"].items():
        found |= {f"{d}, {name} alone": r["rank-1"] for d, r in own.items()}
    return found


def main():
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", metavar="DIR", help="write results.json and pictures there")
    parser.add_argument("--tour", metavar="DIR", help="draw one query's way through the model")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking")
    add_run_options(parser)    # --checkpoint, --data, --test-frames, ...
    given = typed(parser)    # only what was typed
    model, config, trained = load_run(given.get("checkpoint", ""), given)
    check_reader(config, given)
    dataset = load_dataset(config.data or os.path.join("runs", "walkers"), config.reader)
    if not dataset.test:
        raise UserError(f"nothing to test on in {config.data}; expected query/ and gallery/, or a "
                        "benchmark: name one by --data")
    how = {"rerank": True} if "rerank" in given else {}
    head = {"method": trained["method"], **how}
    if trained["dataset"] not in ("", dataset.name):
        head["trained_on"] = trained["dataset"]
        parallel.say(f"trained on {trained['dataset']}, tested on {dataset.name}")
    if "tour" in given:
        embeddings = embed_test(model, dataset, config)
        distance = distance_of(dataset, DIRECTIONS[0], embeddings, model.device)
        found = distance, *labels_of(dataset, DIRECTIONS[0])
        tour(given["tour"], model, dataset, config.size, embeddings, found,
             model.augment or augment)
    else:
        report(model, dataset, config, given.get("out", ""), head, **how)
    parallel.leave()


if __name__ == "__main__":
    cli(main)
