"""Evaluation: every test tracklet embedded once, both directions ranked, CMC, mAP and mINP; tables and pictures.

    python evaluate.py --checkpoint RUN [--data PATH]          a run of train.py
    python evaluate.py --official DIR --data PATH              the authors' three files

    test tracklets -> embed -> (N, parts, dim) --+-- infrared->visible: query x gallery distances -> ranks -> results
                                                 +-- visible->infrared: the same embeddings, roles swapped

The distance of two tracklets is the mean over parts of the Euclidean distance. A tie counts against the query, so
constant embeddings score as badly as they should. AP is the mean of the precision at each hit: hit-miss-hit is 5/6.

Quick question: why does mINP fall when mAP hardly moves? (It asks how far one must scroll for the *last* tracklet of
the person; one hard tracklet in a hundred spoils it.)

Ours, not the paper's: mINP beside CMC and mAP; the silhouettes' IoU where true masks are at hand; float32 (on CUDA with
cuDNN's TF32 convolutions, except for --official).
"""
import argparse
import json
import os
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import lsmrl
import model as dinogrl
from data import INFRARED, VISIBLE, Frames, UserError, cli, ignore_interrupts, load_dataset, normalise, read_frame
from sasgl import choose_body, fill, read_tensors

# method: (build(config, classes, pretrained) -> model, its options)
METHODS = {"dinogrl": (dinogrl.build, dinogrl.Options), "lsmrl": (lsmrl.build, lsmrl.Options)}


# ------------------------------------------------------------ distances, ranks ----

def distances(query, gallery, rows=256):
    """query (Q, P, D), gallery (G, P, D) -> (Q, G): mean over the P parts of the Euclidean distance.

    In blocks of `rows` queries and one part at a time: beside the result, memory is a few rows x G floats. Centred on
    the gallery's mean first, which changes no distance and saves float32 from cancellation."""
    result = torch.zeros(len(query), len(gallery), device=query.device)
    for p, centre in enumerate(gallery.mean(0)):
        g = gallery[:, p] - centre
        for q, block in zip(query[:, p].split(rows), result.split(rows)):
            block += torch.cdist(q - centre, g)
    return result / query.shape[1]


def rank(distance, match, valid):
    """distance (Q, G), match and valid (Q, G) bool -> rank of the first hit, AP, INP, each (Q,); NaN without a match.

    match: the gallery tracklet is the query's person. valid: it counts at all. No row is sorted: for each hit it is
    enough to count the wrong ones that are as near or nearer."""
    match, wrong = match & valid, ~match & valid
    K = match.sum(1)    # hits of each query
    hits = distance.masked_fill(~match, torch.inf).topk(max(1, int(K.max())), largest=False).values    # (Q, K) ascending
    # A wrong tracklet at distance d comes before every hit at d or farther (ties count against the query), so it is
    # enough to know how many hits are strictly nearer than d, and to sum up from the left.
    nearer_hits = torch.searchsorted(hits, distance.contiguous())    # (Q, G) in 0..K
    wrong_before = torch.zeros(len(distance), hits.shape[1] + 1, device=distance.device)
    wrong_before = wrong_before.scatter_add_(1, nearer_hits, wrong.float()).cumsum(1)[:, :-1]    # (Q, K)
    order = torch.arange(1, hits.shape[1] + 1, device=distance.device)
    position = wrong_before + order    # rank of the k-th hit
    real = order <= K[:, None]
    ap = (order / position * real).sum(1) / K
    last = position.gather(1, (K - 1).clamp(min=0)[:, None])[:, 0]
    none = torch.where(K > 0, 0.0, torch.nan)
    return position[:, 0] + none, ap + none, K / last + none


def score(distance_of, query, gallery, block=1024):
    """The results of one direction, a block of queries at a time. distance_of(rows) -> (len(rows), G); query and gallery:
    (pid, camera or None) as integer tensors. Raises UserError if nothing can be ranked."""
    (query_pid, query_camera), (gallery_pid, gallery_camera) = query, gallery
    parts = []
    for rows in torch.arange(len(query_pid)).split(block):
        distance = distance_of(rows)
        if not distance.isfinite().all():
            raise UserError("the distances are not finite; the model's embeddings hold NaN or infinity: train with a "
                            "lower --lr or with --precision float32")
        match = (query_pid[rows][:, None] == gallery_pid).to(distance.device)
        valid = torch.ones_like(match)
        if query_camera is not None:    # same person before the same camera: too easy, ignored
            valid = ~(match & (query_camera[rows][:, None] == gallery_camera).to(match.device))
        parts.append(torch.stack(rank(distance, match, valid)).cpu())
    first, ap, inp = torch.cat(parts, dim=1).double()
    kept = ~first.isnan()
    if not kept.any():
        raise UserError(f"none of {len(first)} queries has its person in the gallery of {len(gallery_pid)}; nothing to rank: "
                        "check the dataset with python data.py")
    results = {f"rank-{r}": (first[kept] <= r).double().mean().item() for r in (1, 5, 10, 20)}
    return {**results, "mAP": ap[kept].mean().item(), "mINP": inp[kept].mean().item(),
            "queries": int(kept.sum()), "gallery": len(gallery_pid)}


def codes(*sequences):
    """Sequences of pids or cameras -> integer tensors, equal where the values are."""
    unique, inverse = np.unique(np.concatenate([np.asarray(s) for s in sequences]), return_inverse=True)
    return torch.from_numpy(inverse).split([len(s) for s in sequences])


def metrics(distance, query_pid, gallery_pid, query_camera=None, gallery_camera=None):
    """distance (Q, G) -> {"rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP", "queries", "gallery"}, fractions of 1.

    queries: those with their person in the gallery; the others are left out. With cameras given, gallery tracklets of
    the query's pid and camera are ignored. Raises UserError if nothing can be ranked."""
    pids = codes(query_pid, gallery_pid)
    cameras = codes(query_camera, gallery_camera) if query_camera is not None else (None, None)
    return score(lambda rows: distance[rows], *zip(pids, cameras))


# ------------------------------------------------------------------ evaluation ----

@torch.inference_mode()
def embed_tracklets(model, dataset, config, device):
    """Embeds every test tracklet once, in order -> (N, parts, dim) float32 on the CPU."""
    model.eval()
    loader = torch.utils.data.DataLoader(
        Frames(dataset.test, size=config.size, T=config.frames, rule=dataset.test_frames),
        batch_size=config.test_batch, num_workers=config.workers, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts, generator=torch.Generator())
    embeddings = None
    with tqdm(total=len(dataset.test), desc="embedding", unit="tracklet", leave=False) as bar:
        for frames, modality, index in loader:
            parts = model.embed(normalise(frames.to(device, non_blocking=True)), modality.to(device)).cpu()
            if embeddings is None:
                embeddings = torch.empty(len(dataset.test), *parts.shape[1:])
            embeddings[index] = parts
            bar.update(len(index))
    return embeddings


def evaluate(model, dataset, config, device):
    """-> the results of both directions with the silhouettes' IoU (results.json without its head), the embeddings."""
    embeddings = embed_tracklets(model, dataset, config, device)
    pid, camera = codes([t.pid for t in dataset.test])[0], codes([t.camera for t in dataset.test])[0]
    results = {}
    for direction, (query, gallery) in dataset.directions.items():
        query = torch.tensor(query)
        gallery_parts = embeddings[gallery].to(device)
        cameras = (camera[query], camera[gallery]) if dataset.ignore_same_camera else (None, None)
        results[direction] = score(lambda rows: distances(embeddings[query[rows]].to(device), gallery_parts),
                                   (pid[query], cameras[0]), (pid[gallery], cameras[1]))
    return {"directions": results, "silhouette_iou": silhouette_iou(model, dataset, config, device)}, embeddings


def table(results):
    """Results -> the table as text, in per cent."""
    figures = "rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP"
    lines = [f"{'':20}" + "".join(f"{k:>9}" for k in (*figures, "queries", "gallery"))]
    for direction, r in results["directions"].items():
        lines.append(f"{direction:20}" + "".join(f"{100 * r[k]:9.2f}" for k in figures) + f"{r['queries']:9,}{r['gallery']:9,}")
    if results.get("silhouette_iou") is not None:
        lines.append(f"silhouette IoU against the true masks: {results['silhouette_iou']:.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------ silhouettes ----

def true_mask(dataset, frame, size):
    """The true silhouette of a frame, bool (H, W), where the dataset has masks/ (walkers do); else None."""
    path = os.path.join(dataset.root, "masks", os.path.splitext(os.path.relpath(frame, dataset.root))[0] + ".png")
    return read_frame(path, size)[0] > 127 if os.path.isfile(path) else None


@torch.inference_mode()
def look_at(model, dataset, tracklets, config, device):
    """Yields for each tracklet: frames uint8 (T,3,H,W), View, true masks bool (T,H,W) or None."""
    model.eval()
    frames_of = Frames(tracklets, size=config.size, T=config.frames, rule=dataset.test_frames)
    for i in range(len(tracklets)):
        frames = frames_of[i][0]
        masks = [true_mask(dataset, path, config.size) for path in frames_of.paths(i)]
        masks = None if any(m is None for m in masks) else torch.stack(masks)
        yield frames, model.sasgl.look(normalise(frames.to(device))), masks


def silhouette_iou(model, dataset, config, device, tracklets=32):
    """Mean intersection over union of silhouette (>= 0.5, at the frames' size) and true mask, over the frames of
    `tracklets` test tracklets evenly taken; None without masks or without silhouettes."""
    if getattr(model, "sasgl", None) is None or not os.path.isdir(os.path.join(dataset.root, "masks")):
        return None
    some = [dataset.test[i] for i in np.unique(np.linspace(0, len(dataset.test) - 1, tracklets).astype(int))]
    ious = []
    for _, view, masks in look_at(model, dataset, some, config, device):
        if masks is None:
            continue
        seen = F.interpolate(view.silhouette[:, None], config.size, mode="bilinear", align_corners=False)[:, 0].cpu() >= 0.5
        ious.append((seen & masks).sum((1, 2)) / (seen | masks).sum((1, 2)).clamp(min=1))
    return torch.cat(ious).mean().item() if ious else None


def draw_silhouettes(path, model, dataset, config, device, each=2, height=128):
    """Writes a picture, a column per tracklet (`each` test tracklets of both modalities): its frames, the body
    probability, the silhouette, and the true mask where there is one."""
    some = [t for m in (VISIBLE, INFRARED)
            for t in [t for t in dataset.test if t.modality == m][::max(1, len(dataset.test) // (2 * each))][:each]]
    columns = []
    for frames, view, masks in look_at(model, dataset, some, config, device):
        columns.append({"frames": frames / 255, "body probability": choose_body(view.mask), "silhouette": view.silhouette}
                       | ({} if masks is None else {"true mask": masks}))
    width, left, top, gap = height * config.size[1] // config.size[0], 124, 24, 8
    column_width = config.frames * width + gap
    sheet = Image.new("RGB", (left + len(some) * column_width, top + len(columns[0]) * (height + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for c, (t, column) in enumerate(zip(some, columns)):
        x = left + c * column_width
        draw.text((x, 4), f"{t.modality}, person {t.pid}, camera {t.camera}", fill="black", font=font)
        for r, (name, images) in enumerate(column.items()):
            y = top + r * (height + gap)
            draw.text((6, y + height // 2 - 8), name, fill="black", font=font)
            images = images.float().cpu() if images.ndim == 4 else images.float().cpu()[:, None].expand(-1, 3, -1, -1)
            images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False).clamp(0, 1)
            row = (images.permute(2, 0, 3, 1).reshape(height, -1, 3) * 255).byte().numpy()    # T frames side by side
            sheet.paste(Image.fromarray(row), (x, y))
    write_atomic(path, lambda file: sheet.save(file, format="PNG"))


# ------------------------------------------------------------------------ files ----

def write_atomic(path, write):
    """write(file) to a temporary name beside `path`, then os.replace: a reader sees the old file or the new, whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch.save raises RuntimeError on a full disk
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())[:120]}); what stood there before is untouched: "
                        "free some space or choose another folder") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_checkpoint(path):
    """A run's folder, or its last.pt -> the checkpoint dict. Raises UserError for anything that is none."""
    path = os.path.join(path, "last.pt") if os.path.isdir(path) else path
    checkpoint = read_tensors(path)
    keys = {"model", "config", "classes", "method", "epoch"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of train.py; expected a dict with {', '.join(sorted(keys))}; the authors' "
                        "files go by --official DIR")
    if not isinstance(checkpoint["method"], str) or checkpoint["method"] not in METHODS:
        raise UserError(f"{path} is a run of the method {checkpoint['method']!r}, not known here; expected one of "
                        f"{', '.join(METHODS)}: start from the script that adds it")
    return checkpoint


def load_run(path):
    """A run's folder or checkpoint -> model in eval mode, its config, its method."""
    checkpoint = read_checkpoint(path)
    try:
        config = SimpleNamespace(**checkpoint["config"])
        height, width = config.size
        if not all(type(n) is int and n >= 0 for n in (height - 1, width - 1, config.frames - 1, config.test_batch - 1, config.workers)):
            raise ValueError("size, frames, test_batch or workers")
        os.fspath(config.data)
        model = METHODS[checkpoint["method"]][0](config, len(checkpoint["classes"]), pretrained=False)
    except UserError:
        raise
    except Exception as error:    # whatever a network may say of such numbers
        raise UserError(f"{path} has no usable config ({type(error).__name__}: {' '.join(str(error).split())[:120]}); expected a checkpoint of "
                        "this version of train.py") from None
    fill(model, checkpoint["model"], path)
    return model.eval(), config, checkpoint["method"]


def choose_device(name):
    """"" (CUDA if there is one), cuda, cuda:1, cpu -> torch.device. Raises UserError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0][:80]}); expected cuda, cuda:1, ... or cpu") from None
    return device


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="RUN", help="a run's folder, or its last.pt")
    which.add_argument("--official", metavar="DIR", help="the folder of the authors' best_model.pth, best_model2.pth, best_shape.pth")
    parser.add_argument("--data", metavar="PATH", help="the dataset; default: the one the run was trained on")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--save", metavar="FILE.npz", help="write embedding (N, parts, dim), pid, camera, modality, first frame")
    parser.add_argument("--test-batch", type=int, help="tracklets at a time; lower it if memory runs out")
    parser.add_argument("--workers", type=int, help="loader processes; about the number of cores")
    parser.add_argument("--frames", type=int, help="frames per tracklet; default the run's, 6 for --official; fewer: faster, worse")
    parser.add_argument("--device", default="", help="cuda, cuda:1, cpu; default: cuda if there is one")
    args = parser.parse_args()
    if args.official and not args.data:
        parser.error("--official needs --data PATH")
    for path in filter(None, (args.json, args.save)):    # before the work, not after
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"no folder {os.path.dirname(path)} for {path}; make it first")
    start, device = time.time(), choose_device(args.device)
    if args.official:
        torch.backends.cudnn.allow_tf32 = False    # the authors' embeddings to float32's last digits
        method, model = "dinogrl", dinogrl.load_official(args.official)
        config = SimpleNamespace(data=args.data, size=(256, 128), frames=6, test_batch=16, workers=min(8, os.cpu_count()))
    else:
        model, config, method = load_run(args.checkpoint)
    for name, least in (("test_batch", 1), ("workers", 0), ("frames", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least {least}")
        setattr(config, name, getattr(config, name) if value is None else value)
    dataset = load_dataset(args.data or config.data)
    results, embeddings = evaluate(model.to(device), dataset, config, device)
    results = {"method": method, "dataset": dataset.name, **results, "seconds": round(time.time() - start, 1)}
    print(table(results))
    if args.json:
        write_json(args.json, results)
    if args.save:
        arrays = {"embedding": embeddings.numpy(), "pid": np.array([t.pid for t in dataset.test]),
                  "camera": np.array([t.camera for t in dataset.test]),
                  "modality": np.array([t.modality for t in dataset.test]),
                  "frame": np.array([t.frames[0] for t in dataset.test])}
        write_atomic(args.save, lambda file: np.savez(file, **arrays))


if __name__ == "__main__":
    cli(main)
