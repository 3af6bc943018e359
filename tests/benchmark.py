"""How fast the parts are: `python tests/benchmark.py` prints a table, each part against a plain
reference in the same run.

    python tests/benchmark.py            the sizes of the paper and of HITSZ-VCM; some twenty
                                         minutes on two cores, 8 GB of disk
    python tests/benchmark.py --quick    small ones, a minute or two

On CUDA where there is one. Times are medians after a first run that does not count. The training
step and the embedding are measured in processes of their own, for their memory's sake; there
"plain" is the same model with every Linear as torch has it, maps as NCHW, memory handed back to the
system, and on CUDA float16 and an optimizer that is not fused.
"""
# ruff: noqa: E402    the path to our own modules comes before them
import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from functools import lru_cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from data import FRAME_RULES, INFRARED, VISIBLE, Frames, Tracklet, augment, erased_box
from model import DinoGRL, Options
from pbmge import PBMGE
from support.dinov2 import TokenLinear
from support.footage import FrameCache
from support.options import keep_memory
from support.ranking import StoredGallery, distances, nearest, rerank, write_gallery
from test_metrics import metrics
from test_pbmge import literal_pbmge

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MB, GB = 2 ** 20, 2 ** 30
close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------- measuring ----

def seconds_of(function):
    """One call, on CUDA by events."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def median(function, runs=3, warm=False):
    """warm: the first run, which does not count, is done."""
    if not warm:
        function()
    return sorted(seconds_of(function) for _ in range(runs))[runs // 2]


def peak(forget=False):
    """Largest memory so far, MB: on CUDA of the tensors there; of this process on Linux, elsewhere
    not known (nan). forget: from now on."""
    if DEVICE.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MB
    # getrusage's ru_maxrss starts at the parent's, and forgets nothing.
    process = Path("/proc/self")
    if not process.exists():
        return float("nan")
    if forget:
        (process / "clear_refs").write_text("5")
    status = (process / "status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def extra_memory(function):
    """-> MB that function() needs at its worst beside what is there."""
    before = peak(forget=True)
    function()
    return max(0, peak() - before)


def print_row(part, work, seconds, reference="", ratio=""):
    print(f"{part:12}{work:66}{seconds:>10}{reference:>18}{ratio:>8}", flush=True)


def note(words):
    print(f"{'':12}{words}", flush=True)


def compare(part, work, ours, usual, same, runs=3):
    """Both once, to see that they agree; then the medians and their ratio."""
    same(ours(), usual())
    # In turns, ours would pay for the memory that the other one frees.
    fast = median(ours, runs, warm=True)
    slow = median(usual, runs, warm=True)
    print_row(part, work, f"{fast:.3g} s", f"plain {slow:.3g} s", f"{slow / fast:.1f} x")


def growth(what, works):
    """works: three, each twice as large as the one before."""
    small, middle, large = map(median, works)
    note(f"{what} doubled twice: {middle / small:.2f} and {large / middle:.2f} times the time")


# ------------------------------------------------------------------- PBMGE ----

def fusion_step(form, module, gait, appearance):
    """Forward and backward -> a gradient."""
    gait.grad = None
    sum(x.square().sum() for x in form(module, gait, appearance)).backward()
    return gait.grad


def fusion(B, D=256, strips=(1, 2, 4, 8, 16)):
    """PBMGE against the paper's formulas; then how its cost grows with the channels."""
    torch.manual_seed(0)
    parts = sum(strips)

    def make(dim):
        both = (torch.randn(B, parts, dim, device=DEVICE, requires_grad=True) for _ in range(2))
        return PBMGE(dim=dim, strips=strips).to(DEVICE), *both

    made = make(D)
    work = f"forward + backward, batch {B}, {D} channels, {parts} parts"
    ours = partial(fusion_step, PBMGE.__call__, *made)
    usual = partial(fusion_step, literal_pbmge, *made)
    compare("PBMGE", work, ours, usual, close)
    growth("channels", [partial(fusion_step, PBMGE.__call__, *make(D * k)) for k in (1, 2, 4)])


# ----------------------------------------------------------------- ranking ----

def usual_metrics(distance, query_pid, gallery_pid, query_camera, gallery_camera):
    """As it is usually written: one argsort, a loop over the queries, and a list of the precision
    at every rank."""
    order = np.argsort(distance, axis=1)
    ranks, aps, inps = [], [], []
    for q in range(len(distance)):
        is_other = gallery_pid[order[q]] != query_pid[q]
        kept = order[q][is_other | (gallery_camera[order[q]] != query_camera[q])]
        match = gallery_pid[kept] == query_pid[q]
        if match.any():
            found = match.cumsum()
            precision = np.array([n / (i + 1.0) for i, n in enumerate(found)])
            ranks.append(np.argmax(match) + 1)
            aps.append((precision * match).sum() / match.sum())
            inps.append(match.sum() / (np.where(match)[0][-1] + 1.0))
    return {"rank-1": np.mean(np.array(ranks) == 1), "mAP": np.mean(aps), "mINP": np.mean(inps)}


def same_metrics(ours, usual):
    for name, value in usual.items():
        assert abs(ours[name] - value) < 1e-5, (name, ours, usual)


def scoring(Q, G, identities):
    rng = np.random.default_rng(0)
    query_pid, gallery_pid = (rng.integers(identities, size=n) for n in (Q, G))
    query_camera, gallery_camera = (rng.integers(12, size=n) for n in (Q, G))
    distance = torch.from_numpy(rng.random((Q, G), dtype=np.float32))
    on_device = distance.to(DEVICE)

    def ours(g=G):
        return metrics(on_device[:, :g], query_pid, gallery_pid[:g], query_camera,
                       gallery_camera[:g])

    def usual():
        return usual_metrics(distance.numpy(), query_pid, gallery_pid, query_camera,
                             gallery_camera)

    work = f"{Q:,} x {G:,} distances, {identities} identities"
    compare("metrics", work, ours, usual, same_metrics, runs=1)
    growth("gallery", [partial(ours, g) for g in (G // 4, G // 2, G)])


def usual_distances(query, gallery):
    total = torch.zeros(len(query), len(gallery), device=query.device)
    for p in range(query.shape[1]):
        q, g = query[:, p], gallery[:, p]
        squares = (q ** 2).sum(1)[:, None] + (g ** 2).sum(1) - 2 * q @ g.t()
        total = total + squares.clamp(min=1e-12).sqrt()
    return total / query.shape[1]


def random_embeddings(N, P, D):
    generator = torch.Generator().manual_seed(N)
    return torch.randn(N, P, D, generator=generator).to(DEVICE)


def distance_matrix(Q, G, P=70, D=256):
    query, gallery = random_embeddings(Q, P, D), random_embeddings(G, P, D)
    ours = partial(distances, query, gallery)
    extra = max(0, extra_memory(ours) - Q * G * 4 / MB)
    work = f"{Q:,} x {G:,}, {P} parts x {D}; {extra:.0f} MB beside the result"
    compare("distances", work, ours, partial(usual_distances, query, gallery), close, runs=1)
    few = query[:Q // 4]
    growth("gallery", [partial(distances, few, gallery[:g]) for g in (G // 4, G // 2, G)])


def usual_rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking as it is usually written: the whole matrix sorted, a loop over the
    tracklets, a dense V."""
    original = (distance ** 2 / (distance ** 2).max(0)).T
    N, rank = len(original), np.argsort(original, axis=1)

    def reciprocal(i, k):
        near = rank[i, :k + 1]
        return near[np.where(rank[near, :k + 1] == i)[0]]

    V = np.zeros_like(original)
    for i in range(N):
        neighbours = reciprocal(i, k1)
        joined = neighbours
        for candidate in neighbours:
            theirs = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(np.intersect1d(theirs, neighbours)) > 2 / 3 * len(theirs):
                joined = np.append(joined, theirs)
        joined = np.unique(joined)
        near = np.exp(-original[i, joined])
        V[i, joined] = near / near.sum()
    V = np.stack([V[rank[i, :k2]].mean(0) for i in range(N)])
    holders = [np.where(V[:, i] != 0)[0] for i in range(N)]
    final = np.zeros((Q, N), np.float32)
    for i in range(Q):
        overlap = np.zeros(N, np.float32)
        for j in np.where(V[i] != 0)[0]:
            overlap[holders[j]] += np.minimum(V[i, j], V[holders[j], j])
        final[i] = (1 - weight) * (1 - overlap / (2 - overlap)) + weight * original[i]
    return final[:, Q:]


def reranking(Q, G, reference=True):
    N, generator = Q + G, torch.Generator().manual_seed(0)
    # About twelve tracklets of each person, as in HITSZ-VCM.
    people = torch.randn(N // 12 + 1, 2, 64, generator=generator)
    person = torch.randint(len(people), (N,), generator=generator)
    parts = people[person] + 0.7 * torch.randn(N, 2, 64, generator=generator)
    distance = distances(parts, parts).to(DEVICE)

    def ours(n=N, q=Q):
        return rerank(distance[:n, :n], q)

    def usual():
        return torch.from_numpy(usual_rerank(distance.cpu().numpy(), Q)).to(DEVICE)

    work = f"{Q:,} x {G:,}"
    if reference:
        same = partial(torch.testing.assert_close, rtol=0, atol=1e-4)
        compare("re-ranking", work, ours, usual, same)
        growth("queries and gallery", [partial(ours, n, n // 2) for n in (N // 4, N // 2, N)])
        return
    extra = extra_memory(ours)
    print_row("re-ranking", work, f"{median(ours, warm=True):.2f} s")
    note(f"memory +{extra:.0f} MB over the distances' {distance.numel() * 4 / MB:.0f} MB")


# ------------------------------------------------------------------ search ----

def write_random_gallery(path, G, P, D, generator):
    names = [f"camera{i % 12}/{i:07}" for i in range(G)]
    frames = [f"{name}/1.jpg" for name in names]
    columns = {"name": names, "pid": [-1] * G, "camera": [""] * G, "modality": [VISIBLE] * G,
               "frame": frames, "shown": [[frame] * 4 for frame in frames],
               "model": ["0" * 64], "setting": ["random numbers"]}
    embeddings = (torch.randn(P, D, generator=generator) for _ in range(G))
    with open(path, "wb") as file:
        write_gallery(file, columns, embeddings)


def search(G, P, D, name):
    """Searches in G tracklets of a file and in half of them; the cost of 100,000."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "gallery.npz")
        write_random_gallery(path, G, P, D, generator)
        stored, rows = StoredGallery(path), max(1, 2 ** 24 // (P * D))

        def piece(start, stop):
            return torch.from_numpy(stored.rows("embedding", start, stop)).to(DEVICE)

        for Q, queries in (1, "1 query"), (100, "100 queries"):
            query = torch.randn(Q, P, D, generator=generator).to(DEVICE)
            peak(forget=True)
            half = median(partial(nearest, query, piece, G // 2, 10, rows))
            before = peak()
            whole = median(partial(nearest, query, piece, G, 10, rows))
            work = f"{queries} in {G:,} tracklets of {P} x {D} ({name})"
            print_row("search", work, f"{whole:.2f} s", f"half of it {half:.2f} s")
            each = whole / G
            note(f"{each * 1e5:.1f} s per 100,000, {each * 1e6:.0f} s per 1,000,000; "
                 f"file {os.path.getsize(path) / 1e9:.1f} GB, memory {peak():.0f} MB, "
                 f"{peak() - before:.0f} of them for the second half")


# ------------------------------------------------------------------ loader ----

class PlainFrames(torch.utils.data.Dataset):
    """Tracklets as they are usually loaded: each frame opened, transformed and made a float tensor
    on its own, in the worker."""
    MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    FILL = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    PAD = 10

    def __init__(self, tracklets, size, T):
        self.tracklets, self.size, self.T = tracklets, size, T

    def __getitem__(self, key):
        index, seed = key
        tracklet, rng = self.tracklets[index], np.random.default_rng(seed)
        chosen = FRAME_RULES["chunks"](len(tracklet.frames), self.T, rng)
        frames = [self.transformed(tracklet.frames[i], rng) for i in chosen]
        return torch.stack(frames), int(tracklet.modality == INFRARED), index

    def transformed(self, path, rng):
        H, W = self.size
        image = Image.open(path).convert("RGB").resize((W, H), Image.Resampling.BILINEAR)
        padded = Image.new("RGB", (W + 2 * self.PAD, H + 2 * self.PAD))
        padded.paste(image, (self.PAD, self.PAD))
        x, y = rng.integers(2 * self.PAD + 1, size=2).tolist()
        image = padded.crop((x, y, x + W, y + H))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        frame = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        frame = (frame - self.MEAN) / self.STD
        box = erased_box(H, W, rng) if rng.random() < 0.5 else None
        if box:
            top, left, h, w = box
            frame[:, top:top + h, left:left + w] = self.FILL
        channel = rng.integers(6)
        return frame[channel:channel + 1].repeat(3, 1, 1) if channel < 3 else frame


def write_tracklets(folder, number, size, rng):
    """JPEGs, as smooth as photographs are."""
    H, W = size
    made = []
    for t in range(number):
        frames = [os.path.join(folder, f"{t}-{i}.jpg") for i in range(16)]
        for frame in frames:
            rough = Image.fromarray(rng.integers(256, size=(32, 16, 3), dtype=np.uint8))
            rough.resize((W, H), Image.Resampling.BICUBIC).save(frame, quality=90)
        made.append(Tracklet(tuple(frames), t, "D1", (VISIBLE, INFRARED)[t % 2]))
    return made


def pass_over(loader, finish):
    """Every batch of a loader, ready on the device."""
    for step, (frames, modality, _) in enumerate(loader):
        finish(frames.to(DEVICE, non_blocking=True), modality, step)


def finish_ours(frames, modality, step):
    return augment(frames, modality, np.random.default_rng(step))


def finish_plain(frames, modality, step):
    return frames


def loading(batches, tracklets=64, T=6, size=(256, 128), B=32):
    """Augmented batches ready on the device: plain, ours, ours with --cache."""
    keep_memory()
    rng, is_cuda = np.random.default_rng(0), DEVICE.type == "cuda"
    workers = min(8, os.cpu_count()) if is_cuda else 0    # a CPU that trains has no core to spare
    keys = []
    for _ in range(batches):
        drawn, seeds = rng.integers(tracklets, size=B), rng.integers(2 ** 31, size=B)
        keys.append(list(zip(drawn.tolist(), seeds.tolist(), strict=True)))

    def frames_per_second(dataset, finish):
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=workers,
                                             persistent_workers=workers > 0, pin_memory=is_cuda)
        return B * T * batches / median(partial(pass_over, loader, finish), runs=5)

    with tempfile.TemporaryDirectory() as folder:
        made = write_tracklets(folder, tracklets, size, rng)
        paths = [frame for tracklet in made for frame in tracklet.frames]
        with redirect_stderr(io.StringIO()):    # its progress
            cache = FrameCache(os.path.join(folder, "cache"), paths, size=size, root=folder)
        plain = frames_per_second(PlainFrames(made, size, T), finish_plain)
        each = f"{T}-frame tracklets of {size[0]}x{size[1]} JPEGs, augmented; {workers} workers"
        megabytes = os.path.getsize(cache.path) / MB
        with_cache = f"the same with --cache ({megabytes:.0f} MB for {len(paths):,} frames)"
        for work, its_cache in (each, None), (with_cache, cache):
            ours = frames_per_second(Frames(made, size=size, T=T, cache=its_cache), finish_ours)
            print_row("loader", work, f"{ours:.0f} fps", f"plain {plain:.0f} fps",
                      f"{ours / plain:.1f} x")


# ----------------------------------------- the network, in its own process ----

def make_plain(net):
    """The same model as one would write it first."""
    def nchw(module, inputs):
        return tuple(x.contiguous() for x in inputs)

    for module in net.modules():
        if isinstance(module, TokenLinear):
            module.__class__ = torch.nn.Linear
    for module in (net.visible_stem, net.infrared_stem, net.sasgl.gait_net):
        module.register_forward_pre_hook(nchw)


class Network:
    """The paper's preset on random frames. variant: ours, plain or recomputed."""

    def __init__(self, variant, tracklets, frames, precision):
        torch.manual_seed(0)
        self.variant, half = variant, tracklets // 2
        self.net = DinoGRL(Options(), 500, pretrained=False).to(DEVICE)
        if variant == "plain":
            make_plain(self.net)
        if variant == "recomputed":
            train.recompute_activations(self.net)
        self.autocast = partial(torch.autocast, DEVICE.type, getattr(torch, precision),
                                enabled=precision != "float32")
        self.frames = torch.randn(tracklets, frames, 3, 256, 128, device=DEVICE)
        self.modality = torch.arange(tracklets) // half
        self.label = (torch.arange(tracklets) % half).to(DEVICE)
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "float16")

    def optimizer(self):
        is_fused = DEVICE.type == "cuda" and self.variant != "plain"
        return torch.optim.Adam(self.net.parameter_groups()[0]["params"], fused=is_fused)

    def step(self, optimizer):
        with self.autocast():
            losses, _ = self.net.train()(self.frames, self.modality, self.label)
        optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    @torch.no_grad()
    def embedding(self):
        with self.autocast():
            self.net.eval().embed(self.frames, self.modality)


def child(parts, variant, tracklets, frames, precision):
    """-> {part: seconds, FLOP, peak memory in MB} of what one process measures, the parts one after
    the other."""
    if variant != "plain" and parts != "memory":
        keep_memory()
    network, results = Network(variant, tracklets, frames, precision), {}
    for part in parts.split(","):
        peak(forget=True)
        work = network.embedding
        if part != "embedding":
            work = partial(network.step, network.optimizer())
        with FlopCounterMode(display=False) as counter:
            work()
        result = results[part] = {"flop": counter.get_total_flops()}
        if part == "memory":
            work()    # only now Adam's moments lie beside the activations
        else:
            result["seconds"] = median(work, warm=True)
        result["peak"] = peak()
    return results


@lru_cache
def in_child(*arguments, **environment):
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True,
                            env={**os.environ, **environment})
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


@lru_cache
def matrix_rate(precision):
    """FLOP/s of the fastest product of two 2,048 x 2,048 matrices (CUDA: 8,192) that a Linear can
    call, the best of twenty: what there is to reach."""
    n, dtype = 8192 if DEVICE.type == "cuda" else 2048, getattr(torch, precision)
    x = torch.randn(1, n, n, device=DEVICE, dtype=dtype)
    module = TokenLinear(n, n, device=DEVICE, dtype=dtype)
    ways = partial(module, x), partial(F.linear, x, module.weight, module.bias)
    with torch.inference_mode():
        best = min(seconds_of(way) for _ in range(20) for way in ways)
    return 2 * n ** 3 / best


OPTIONS = {"recomputed": ", --checkpoint-activations on"}    # of a variant


def describe(ours, plain, frames, precision):
    """What a row of the network has beside its seconds."""
    rate, best = ours["flop"] / ours["seconds"], matrix_rate(precision)
    note(f"{frames / ours['seconds']:.1f} frames/s, {ours['flop'] / 1e12:.3g} TFLOP at "
         f"{rate / 1e12:.3g} TFLOP/s, {rate / best:.0%} of a matrix product's {best / 1e12:.3g}; "
         f"peak {ours['peak'] / 1024:.1f} GB (plain {plain['peak'] / 1024:.1f} GB)")


def network_rows(part, tracklets, frames, variants, beside=""):
    """variants: pairs of a variant and its precision, each compared with plain. beside: all parts
    that one process measures, if these are more."""
    is_half = DEVICE.type == "cuda" and part != "embedding"
    of_plain = "float16" if is_half else "float32"
    parts = beside or part
    plain = in_child(parts, "plain", tracklets, frames, of_plain)[part]
    for variant, precision in variants:
        ours = in_child(parts, variant, tracklets, frames, precision)[part]
        work = f"{tracklets} tracklets of {frames} frames, {precision}{OPTIONS.get(variant, '')}"
        print_row(part, work, f"{ours['seconds']:.3g} s", f"plain {plain['seconds']:.3g} s",
                  f"{plain['seconds'] / ours['seconds']:.2f} x")
        describe(ours, plain, tracklets * frames, precision)


def step_growth(tracklets, frames, precision):
    """tracklets: three numbers, each twice the one before."""
    few, some, many = (in_child("step", "ours", n, frames, precision)["step"]["seconds"]
                       for n in tracklets)
    note(f"{tracklets[0]} tracklets doubled twice: {some / few:.2f} and {many / some:.2f} times "
         "the time")


def memory(few, many, frames=6):
    """Training memory: the peak of a bfloat16 step at two batches, on a CPU of the whole process:
    what each tracklet takes, and what is left."""
    for variant in "ours", "recomputed":
        peaks = []
        for tracklets in few, many:
            # What is freed is given back.
            measured = in_child("memory", variant, tracklets, frames, "bfloat16",
                                MALLOC_MMAP_THRESHOLD_="65536")
            peaks.append(measured["memory"]["peak"] / 1024)
        each = (peaks[1] - peaks[0]) / (many - few)
        fixed = peaks[0] - few * each
        work = f"of a step, bfloat16, {frames} frames a tracklet{OPTIONS.get(variant, '')}"
        print_row("memory", work, f"{each:.2f} GB", "each tracklet")
        largest = {gpu: max(0, int((0.95 * gpu - fixed) / each)) for gpu in (12, 24, 80)}
        words = ", ".join(f"{gpu} GB: {tracklets}" for gpu, tracklets in largest.items())
        note(f"and {fixed:.1f} GB; the largest batch for {words} tracklets")


# --------------------------------------------------------------------- main ----

def quick():
    search(10_000, 1, 1280, "LSMRL")
    search(2_500, 70, 256, "DinoGRL")
    # Much less, and starting two threads is what one would time.
    distance_matrix(1719, 1881)
    scoring(515, 564, 427)
    reranking(200, 200)
    fusion(2)
    loading(2)
    precision = "bfloat16" if DEVICE.type == "cuda" else "float32"
    network_rows("step", 2, 1, [("ours", precision)], beside="embedding,step")
    network_rows("embedding", 2, 1, [("ours", precision)], beside="embedding,step")


def whole():
    search(100_000, 1, 1280, "LSMRL")
    search(100_000, 70, 256, "DinoGRL")
    distance_matrix(5159, 5643)    # HITSZ-VCM's size
    scoring(5159, 5643, 427)
    reranking(2000, 2000)
    reranking(5159, 5643, reference=False)
    fusion(32)
    loading(10)
    variants = [("ours", "bfloat16"), ("recomputed", "bfloat16")]
    B, T, precision = 32, 6, "bfloat16"
    if DEVICE.type == "cpu":    # a step of 32 takes two cores a minute and 28 GB
        B, precision = 4, "float32"
        variants = [("ours", "float32"), ("ours", "bfloat16"), ("recomputed", "float32")]
    network_rows("step", B, T, variants)
    step_growth((B // 2, B, 2 * B), T, precision)
    network_rows("embedding", B, T, [("ours", "float32")])    # evaluate.py knows float32 alone
    if peak() == peak():    # known here, no nan
        memory(2, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--child", nargs=5, help="used by the benchmark itself",
                        metavar=("PARTS", "VARIANT", "TRACKLETS", "FRAMES", "PRECISION"))
    args = parser.parse_args()
    if args.child:
        parts, variant, tracklets, frames, precision = args.child
        print(json.dumps(child(parts, variant, int(tracklets), int(frames), precision)))
        return
    where = "cpu" if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    print_row("part", "work", "time", "reference", "ratio")
    if args.quick:
        quick()
    else:
        whole()


if __name__ == "__main__":
    main()
