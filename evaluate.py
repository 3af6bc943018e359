"""Evaluation: every test tracklet embedded once, both directions ranked, CMC, mAP and mINP; or a search in one's own footage.

    python evaluate.py --checkpoint RUN [--data PATH]                    a run of train.py
    python evaluate.py --official DIR --data PATH                        the authors' three files
    python evaluate.py --checkpoint RUN --query DIR --gallery DIR        who of the gallery is this? (a FILE.npz of --save goes too)

    test tracklets -> embed -> (N, parts, dim) --+-- infrared->visible: query x gallery distances -> ranks -> results
                                                 +-- visible->infrared: the same embeddings, roles swapped
    own footage    -> embed -> FILE.npz -> read piece by piece -> the nearest of each query

How embeddings become ranks stands in ranking.py, how pictures are drawn in pictures.py.

Quick question: why is every test tracklet embedded once, though each takes part in both directions? (Its embedding does not
depend on who asks. A loader per direction, as is usual, does the same work twice.)

Ours, not the paper's: the silhouettes' IoU where true masks are at hand; float32 (on CUDA with cuDNN's TF32 convolutions, except
for --official); --rerank, --all-frames and the search in one's own footage.
"""
import argparse
import ctypes
import json
import math
import os
import tempfile
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import lsmrl
import model as dinogrl
from data import (INFRARED, VISIBLE, Dataset, Frames, Tracklet, UserError, cli, frame_indices, ignore_interrupts, load_dataset, normalise, processes,
                  write_atomic)
from footage import read_footage
from pictures import draw_ranking, draw_silhouettes, evenly, samples, silhouette_iou
from ranking import Stored, codes, distances, fingerprint, matches, nearest, rerank, score, write_embeddings
from sasgl import fill, read_tensors

# method: (build(config, classes, pretrained) -> model, its options)
METHODS = {"dinogrl": (dinogrl.build, dinogrl.Options), "lsmrl": (lsmrl.build, lsmrl.Options)}

LONGEST = 20    # ranked tracklets that a picture can hold


# ------------------------------------------------------------------ evaluation ----

def clips(tracklet, T, rule="chunks"):
    """--all-frames: a tracklet of n frames -> ceil(n / T) of T frames each, which together hold every frame. Clip j takes the j-th frame
    of each of T chunks, so that each spans the whole walk, as the clips of training do; clip 0 is the usual one. [ours]"""
    n = len(tracklet.frames)
    return [Tracklet(tuple(tracklet.frames[min(i + j, n - 1)] for i in frame_indices(n, T, rule=rule)), tracklet.pid, tracklet.camera,
                     tracklet.modality) for j in range(math.ceil(n / T))]


@torch.inference_mode()
def embed_tracklets(model, tracklets, config, device, rule="chunks", all_frames=False):
    """Yields each tracklet's embedding (parts, dim), in order, float32 on the CPU; all_frames: the mean over its clips."""
    model.eval()
    parts_of = [clips(t, config.frames, rule) if all_frames else [t] for t in tracklets]
    loader = torch.utils.data.DataLoader(
        Frames([clip for parts in parts_of for clip in parts], size=config.size, T=config.frames, rule=rule),
        batch_size=config.test_batch, num_workers=config.workers, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts, generator=torch.Generator())
    with tqdm(total=len(tracklets), desc="embedding", unit="tracklet", leave=False, disable=processes()[0] > 0) as bar:
        waiting, done = [], 0
        for frames, modality, _ in loader:
            waiting += model.embed(normalise(frames.to(device, non_blocking=True)), modality).cpu()
            while done < len(tracklets) and len(waiting) >= len(parts_of[done]):
                n = len(parts_of[done])
                yield torch.stack(waiting[:n]).mean(0)
                del waiting[:n]
                done += 1
                bar.update()


def stacked(embeddings, N):
    """N embeddings (parts, dim), one after the other -> (N, parts, dim)."""
    result = None
    for i, embedding in enumerate(embeddings):
        result = torch.empty(N, *embedding.shape) if result is None else result
        result[i] = embedding
    return result


def embed_shared(model, tracklets, config, device, **how):
    """embed_tracklets, each process taking its share -> (N, parts, dim) in process 0, None in the others."""
    rank, world = processes()
    shares = [len(share) for share in np.array_split(np.arange(len(tracklets)), world)]
    first = sum(shares[:rank])
    mine = stacked(embed_tracklets(model, tracklets[first:first + shares[rank]], config, device, **how), shares[0])    # the first is the largest
    if world == 1:
        return mine
    mine = mine.to(device)
    everyone = [torch.empty_like(mine) for _ in shares] if rank == 0 else None
    dist.gather(mine, everyone)
    return torch.cat([part[:n] for part, n in zip(everyone, shares)]).cpu() if rank == 0 else None


def evaluate(model, dataset, config, device, *, reranked=False, all_frames=False, top=0):
    """-> the results of both directions with the silhouettes' IoU (results.json without its head), the embeddings, and for
    draw_ranking the `top` nearest of four queries of each direction, evenly taken. In all processes but the first: None."""
    embeddings = embed_shared(model, dataset.test, config, device, rule=dataset.test_frames, all_frames=all_frames)
    if embeddings is None:
        return None, None, None
    pid, camera = codes([t.pid for t in dataset.test])[0], codes([t.camera for t in dataset.test])[0]
    results, lists, words = {}, [], label({"rerank": reranked, "all_frames": all_frames})
    for direction, (query, gallery) in dataset.directions.items():
        query, gallery = torch.tensor(query), torch.tensor(gallery)
        gallery_parts = embeddings[gallery].to(device)
        if reranked:
            everyone = torch.cat([embeddings[query].to(device), gallery_parts])
            distance = rerank(distances(everyone, everyone), len(query))
            del everyone
        distance_of = lambda rows: distance[rows.to(device)] if reranked else distances(embeddings[query[rows]].to(device), gallery_parts)
        sides = [(pid[side], camera[side] if dataset.ignore_same_camera else None) for side in (query, gallery)]
        results[direction] = score(distance_of, *sides)
        for row in evenly(range(len(query)), 4) if top else []:
            rows = torch.tensor([row])
            q, found = dataset.test[query[row]], distance_of(rows)[0].cpu().masked_fill(~matches(*sides, rows)[1][0], torch.inf)
            ranked = [(f"{t.camera}, person {t.pid}", t.frames, d, t.pid == q.pid)
                      for d, t in ((found[g].item(), dataset.test[gallery[g]]) for g in found.argsort(stable=True)[:min(top, LONGEST)]) if d < math.inf]
            lists.append((f"{direction}{f', {words}' * bool(words)}: {q.camera}, person {q.pid}", q.frames, ranked))
    return {"directions": results, "silhouette_iou": silhouette_iou(model, dataset, config, device)}, embeddings, lists


def setting(config, all_frames):
    """What an embedding was made of, in words."""
    return f"all frames, {config.frames} at a time" if all_frames else f"{config.frames} frames of each tracklet"


def label(options):
    """Results of --rerank and --all-frames are no plain ones, and say so."""
    return ", ".join(words for key, words in (("rerank", "re-ranked (k-reciprocal)"), ("all_frames", "all frames")) if options.get(key))


def table(results):
    """Results -> the table as text, in per cent."""
    figures = "rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP"
    special = label(results)
    lines = [f"{special}:"] * bool(special) + [f"{'':20}" + "".join(f"{k:>9}" for k in (*figures, "queries", "gallery"))]
    for direction, r in results["directions"].items():
        lines.append(f"{direction:20}" + "".join(f"{100 * r[k]:9.2f}" for k in figures) + f"{r['queries']:9,}{r['gallery']:9,}")
    if results.get("silhouette_iou") is not None:
        lines.append(f"silhouette IoU against the true masks: {results['silhouette_iou']:.3f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- search ----

def search(args, model, config, device):
    """--query and --gallery (args.kept: it is a FILE.npz): prints the ranked list of each query -> what --json writes, without its head.
    Raises UserError."""
    queries = read_footage(args.query, args.query_modality) if args.query else {}
    embed = lambda tracklets: embed_tracklets(model, list(tracklets.values()), config, device, all_frames=args.all_frames)
    how = setting(config, args.all_frames)
    with tempfile.TemporaryDirectory() as scratch:
        file = args.gallery if args.kept else args.save or os.path.join(scratch, "gallery.npz")
        if not args.kept:
            gallery = read_footage(args.gallery, args.gallery_modality or VISIBLE)
            write_atomic(file, lambda open_file: write_embeddings(open_file, list(gallery), list(gallery.values()), embed(gallery), model, how))
        stored = Stored(file)
        if args.kept and stored.model != fingerprint(model):
            raise UserError(f"{file} was embedded by another model; expected the one of {args.checkpoint or args.official}: embed the gallery again")
        if stored.setting != how:
            raise UserError(f"{file} was embedded from {stored.setting}, the queries from {how}; expected the same: see --frames and --all-frames")
        if args.save:
            print(f"{stored.shape[0]:,} tracklets embedded in {args.save}")
        if not queries:
            return None
        rows = max(1, 2 ** 24 // math.prod(stored.shape[1:]))    # 64 MB of float32
        piece = lambda start, stop: torch.from_numpy(stored.rows("embedding", start, stop)).to(device)
        results = nearest(stacked(embed(queries), len(queries)).to(device), piece, stored.shape[0], args.top, rows)
        found, lists = [], []
        print(f"{label(vars(args))}:\n" * args.all_frames, end="")
        for (name, t), distance, index in zip(queries.items(), *(x.tolist() for x in results)):
            print(f"{name} ({t.modality}, {len(t.frames)} frame{'s' * (len(t.frames) > 1)}), the nearest of {stored.shape[0]:,}:")
            ranked = [(d, *(stored.rows(column, g, g + 1)[0].tolist() for column in ("name", "modality", "shown"))) for d, g in zip(distance, index)]
            for r, (d, other, modality, _) in enumerate(ranked, 1):
                print(f"{r:6}{d:12.4f}  {modality:10}{other}")
            found.append({"query": name, "modality": t.modality, "frames": len(t.frames),
                          "ranked": [{"tracklet": other, "modality": modality, "distance": d} for d, other, modality, _ in ranked]})
            lists.append((f"{name}, {t.modality}", t.frames, [(other, shown, d, None) for d, other, _, shown in ranked[:LONGEST]]))
    if args.figure:
        write_picture(args.figure, draw_ranking(lists[:50], config.size))    # more would be no picture
        if len(lists) > 50 or args.top > LONGEST:
            print(f"{args.figure} shows at most 50 queries and {LONGEST} tracklets for each")
    if args.silhouettes:
        write_picture(args.silhouettes, draw_silhouettes(model, Dataset("footage", args.query), evenly(list(queries.values()), 4), config, device))
    return {"gallery": stored.shape[0], "queries": found}


# ------------------------------------------------------------------------ files ----

def write_json(path, value):
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_picture(path, picture):
    write_atomic(path, lambda file: picture.save(file, format="PNG"))


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
    """"" (CUDA if there is one), cuda, cuda:1, cpu -> torch.device; under torchrun each process's own, and the processes join.
    Raises UserError if it cannot be used."""
    together = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if together and name.startswith("cuda"):
        if name != "cuda" or int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise UserError(f"--device {name} and {os.environ['LOCAL_WORLD_SIZE']} processes on {torch.cuda.device_count()} GPUs; expected --device cuda and "
                            "a GPU for each: lower --nproc_per_node")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used ({str(error).splitlines()[0][:80]}); expected cuda, cuda:1, ... or cpu") from None
    if together and processes()[1] == 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))    # one may download or make a cache meanwhile
    return device


def keep_memory():
    """Asks glibc to keep freed memory for the next step or batch: handing 100 MB back and forth costs a CPU a quarter of its time."""
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((-3, 2 ** 31 - 1), (-1, 2 ** 31 - 1), (-2, 2 ** 28)):    # mmap threshold, trim threshold, top pad
            libc.mallopt(parameter, value)
    except (OSError, AttributeError, TypeError):    # another C library: only slower
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="RUN", help="a run's folder, or its last.pt")
    which.add_argument("--official", metavar="DIR", help="the folder of the authors' best_model.pth, best_model2.pth, best_shape.pth")
    parser.add_argument("--data", metavar="PATH", help="the dataset; default: the one the run was trained on")
    parser.add_argument("--query", metavar="DIR", help="search: whom to look for; a folder of frames per tracklet, or one such folder")
    parser.add_argument("--gallery", metavar="DIR|FILE.npz", help="search: where to look; the same, or what --save has kept of it")
    parser.add_argument("--query-modality", choices=(VISIBLE, INFRARED), default=INFRARED, help="default infrared")
    parser.add_argument("--gallery-modality", choices=(VISIBLE, INFRARED), help="default visible; a FILE.npz knows its own")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="length of the ranked lists in search and --figure")
    parser.add_argument("--rerank", action="store_true", help="k-reciprocal re-ranking: better figures from a closed gallery, labelled as such")
    parser.add_argument("--all-frames", action="store_true", help="every frame, in clips that are averaged: slower, a little better")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--save", metavar="FILE.npz", help="keep the embeddings (search: the gallery's), to be used as --gallery")
    parser.add_argument("--figure", metavar="FILE.png", help="draw ranked lists: green frame the right person, red a wrong one")
    parser.add_argument("--silhouettes", metavar="FILE.png", help="draw what the model sees (DinoGRL)")
    parser.add_argument("--test-batch", type=int, help="tracklets at a time; lower it if memory runs out")
    parser.add_argument("--workers", type=int, help="loader processes; about the number of cores")
    parser.add_argument("--frames", type=int, help="frames per tracklet; default the run's, 6 for --official; fewer: faster, worse")
    parser.add_argument("--device", default="", help="cuda, cuda:1, cpu; default: cuda if there is one")
    args = parser.parse_args()
    if args.gallery == "" or args.query == "":
        parser.error("--query or --gallery is empty; name a folder: is a shell variable unset?")
    outputs = {"save": ".npz", "json": ".json", "figure": ".png", "silhouettes": ".png"}
    for option, kind in outputs.items():    # before the work, not after
        path = getattr(args, option)
        if path is not None and not path.lower().endswith(kind):    # so that none can take the place of a frame, a checkpoint or another output
            parser.error(f"--{option} {path or 'is empty'}; expected a name that ends in {kind}")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"no folder {os.path.dirname(path)} for {path}; make it first")
        if path and os.path.lexists(path) and not os.path.isfile(path):
            parser.error(f"--{option} {path} is no file; choose another name")
    if args.figure and args.silhouettes and os.path.realpath(args.figure) == os.path.realpath(args.silhouettes):
        parser.error(f"--figure and --silhouettes are both {args.figure}; choose two names")
    args.kept = bool(args.gallery) and os.path.isfile(args.gallery) and args.gallery.lower().endswith(".npz")
    if (args.query or args.gallery) and (args.data or args.rerank):
        parser.error("--data and --rerank are for a benchmark, whose gallery is closed; drop them, or --query and --gallery")
    if args.query and not args.gallery:
        parser.error("--query needs --gallery: where to look")
    if args.gallery:
        if args.kept and (args.gallery_modality or args.save):
            parser.error(f"{args.gallery} is embedded already and knows its modality; drop --gallery-modality and --save")
        if not args.query and (not args.save or args.json or args.figure or args.silhouettes):
            parser.error("--gallery alone only embeds: give --save FILE.npz for it, or --query DIR to search")
    elif args.official and not args.data:
        parser.error("--official needs --data PATH")
    keep_memory()
    start, device = time.time(), choose_device(args.device)
    if args.official:
        torch.backends.cudnn.allow_tf32 = False    # the authors' embeddings to float32's last digits
        method, model = "dinogrl", dinogrl.load_official(args.official)
        config = SimpleNamespace(data=args.data, size=(256, 128), frames=6, test_batch=16, workers=min(8, os.cpu_count()))
    else:
        model, config, method = load_run(args.checkpoint)
    for name, least in (("test_batch", 1), ("workers", 0), ("frames", 1), ("top", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least {least}")
        setattr(config, name, getattr(config, name) if value is None else value)
    if args.silhouettes and getattr(model, "sasgl", None) is None:
        raise UserError(f"--silhouettes; this {method} has none; expected a DinoGRL with its gait stream")
    model.to(device)
    special = {name: True for name in ("rerank", "all_frames") if getattr(args, name)}
    if args.gallery:
        if processes()[1] > 1:
            raise UserError("a search runs in one process; start it by python, not by torchrun")
        results = search(args, model, config, device)
        if args.json:
            write_json(args.json, {"method": method, **special, **results, "seconds": round(time.time() - start, 1)})
        return
    dataset = load_dataset(args.data or config.data)
    results, embeddings, lists = evaluate(model, dataset, config, device, reranked=args.rerank, all_frames=args.all_frames,
                                          top=args.top if args.figure else 0)
    if processes()[0]:
        return
    results = {"method": method, "dataset": dataset.name, **special, **results, "seconds": round(time.time() - start, 1)}
    print(table(results))
    if args.json:
        write_json(args.json, results)
    if args.save:
        names = [os.path.relpath(t.frames[0], dataset.root) for t in dataset.test]
        write_atomic(args.save, lambda file: write_embeddings(file, names, dataset.test, embeddings, model, setting(config, args.all_frames)))
    if args.figure:
        write_picture(args.figure, draw_ranking(lists, config.size))
    if args.silhouettes:
        write_picture(args.silhouettes, draw_silhouettes(model, dataset, samples(dataset.test), config, device))


if __name__ == "__main__":
    cli(main)
