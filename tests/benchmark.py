"""How fast the parts are: `python tests/benchmark.py` prints a table, each part against a plain reference in the same run.

    python tests/benchmark.py               the sizes of the paper and of HITSZ-VCM; eighteen minutes on two cores, 8 GB of disk
    python tests/benchmark.py --quick       small ones, under a minute

On CUDA where there is one. Times are medians after a first run that does not count. The training step, the embedding and the silhouettes
are measured in processes of their own, for their memory's sake; there "plain" is the same model with literal_look of test_sasgl.py, every
Linear as torch has it, maps as NCHW, batch norms on their own, memory handed back to the system, and float16 on CUDA.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data    # noqa: E402
import evaluate    # noqa: E402
import model as dinogrl    # noqa: E402
import ranking    # noqa: E402
import sasgl    # noqa: E402
import train    # noqa: E402
from data import INFRARED, VISIBLE, Cache, Frames, Tracklet, augment, erased_box, frame_indices    # noqa: E402
from pbmge import PBMGE    # noqa: E402
from ranking import Stored, distances, metrics, nearest, rerank, write_embeddings    # noqa: E402
from test_pbmge import literal_pbmge    # noqa: E402
from test_sasgl import literal_look    # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def medians(*functions, runs=3, warm=False):
    """In turns, so that a machine's slow minute slows them all. warm: the first runs, which do not count, are done."""
    for function in () if warm else functions:
        function()
    return [sorted(times)[runs // 2] for times in zip(*([seconds_of(function) for function in functions] for _ in range(runs)))]


def median(function, **options):
    return medians(function, **options)[0]


def peak(forget=False):
    """Largest memory so far, MB: on CUDA of the tensors there; of this process on Linux, elsewhere not known (nan). forget: from now on."""
    if DEVICE.type == "cuda":
        if forget:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    process = Path("/proc/self")    # getrusage's ru_maxrss starts at the parent's, and forgets nothing
    if not process.exists():
        return float("nan")
    if forget:
        (process / "clear_refs").write_text("5")
    return int((process / "status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def print_row(part, work, seconds, reference="", ratio=""):
    print(f"{part:13}{work:76}{seconds:>10}{reference:>20}{ratio:>8}", flush=True)


def note(words):
    print(f"{'':13}{words}", flush=True)


def compare(part, work, ours, usual, same, runs=3):
    """Both once, to see that they agree; then the medians and their ratio."""
    same(ours(), usual())
    fast, slow = (median(f, runs=runs, warm=True) for f in (ours, usual))    # in turns, ours would pay for the memory that the other one frees
    print_row(part, work, f"{fast:.3g} s", f"plain {slow:.3g} s", f"{slow / fast:.1f} x")


def growth(what, times):
    """Seconds of three works, each twice the one before."""
    note(f"{what} doubled twice: {times[1] / times[0]:.2f} and {times[2] / times[1]:.2f} times the time")


def fusion(B, D=256, strips=(1, 2, 4, 8, 16)):
    """PBMGE forward and backward against the paper's formulas; then how its cost grows with the channels."""
    torch.manual_seed(0)

    def make(dim):
        return PBMGE(dim=dim, strips=strips).to(DEVICE), *(torch.randn(B, sum(strips), dim, device=DEVICE, requires_grad=True) for _ in range(2))

    def step(form, module, gait, appearance):
        gait.grad = None
        sum(x.square().sum() for x in form(module, gait, appearance)).backward()
        return gait.grad
    made = make(D)
    compare("PBMGE", f"forward + backward, batch {B}, {D} channels, {sum(strips)} parts", lambda: step(PBMGE.__call__, *made), lambda: step(literal_pbmge, *made),
            lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3))
    growth("channels", [median(partial(step, PBMGE.__call__, *make(D * k))) for k in (1, 2, 4)])


def usual_metrics(distance, query_pid, gallery_pid, query_camera, gallery_camera):
    """As it is usually written: one argsort, a loop over the queries, and a list of the precision at every rank."""
    order = np.argsort(distance, axis=1)
    ranks, aps, inps = [], [], []
    for q in range(len(distance)):
        kept = order[q][(gallery_pid[order[q]] != query_pid[q]) | (gallery_camera[order[q]] != query_camera[q])]
        match = gallery_pid[kept] == query_pid[q]
        if match.any():
            found = match.cumsum()
            precision = np.array([n / (i + 1.0) for i, n in enumerate(found)])
            ranks.append(np.argmax(match) + 1)
            aps.append((precision * match).sum() / match.sum())
            inps.append(match.sum() / (np.where(match)[0][-1] + 1.0))
    return {"rank-1": np.mean(np.array(ranks) == 1), "mAP": np.mean(aps), "mINP": np.mean(inps)}


def scoring(Q, G, identities):
    rng = np.random.default_rng(0)
    arguments = [rng.integers(identities, size=Q), rng.integers(identities, size=G), rng.integers(12, size=Q), rng.integers(12, size=G)]
    distance = torch.from_numpy(rng.random((Q, G), dtype=np.float32))
    on_device = distance.to(DEVICE)

    def same(ours, usual):
        assert all(abs(ours[name] - value) < 1e-5 for name, value in usual.items()), (ours, usual)
    compare("metrics", f"{Q:,} x {G:,} distances, {identities} identities", lambda: metrics(on_device, *arguments), lambda: usual_metrics(distance.numpy(), *arguments), same, runs=1)
    growth("gallery", [median(partial(metrics, on_device[:, :g], arguments[0], arguments[1][:g], arguments[2], arguments[3][:g])) for g in (G // 4, G // 2, G)])


def usual_distances(query, gallery):
    total = torch.zeros(len(query), len(gallery), device=query.device)
    for p in range(query.shape[1]):
        q, g = query[:, p], gallery[:, p]
        squares = (q ** 2).sum(1)[:, None] + (g ** 2).sum(1) - 2 * q @ g.t()
        total = total + squares.clamp(min=1e-12).sqrt()
    return total / query.shape[1]


def distance_matrix(Q, G, P=70, D=256):
    query, gallery = (torch.randn(n, P, D, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (Q, G))
    before = peak(forget=True)
    distances(query, gallery)
    extra = peak() - before - Q * G * 4 / 2 ** 20
    compare("distances", f"{Q:,} x {G:,}, {P} parts x {D}; beside the result {max(extra, 0):.0f} MB", lambda: distances(query, gallery),
            lambda: usual_distances(query, gallery), lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3), runs=1)
    growth("gallery", [median(partial(distances, query[:Q // 4], gallery[:g])) for g in (G // 4, G // 2, G)])


def search(G, P, D, name):
    """Searches in G tracklets of a file and in half of them; the cost of 100,000."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "gallery.npz")
        tracklets = [Tracklet((f"camera{i % 12}/{i:07}/1.jpg",), -1, "", "visible") for i in range(G)]
        with open(path, "wb") as file:
            write_embeddings(file, [f"camera{i % 12}/{i:07}" for i in range(G)], tracklets, (torch.randn(P, D, generator=generator) for _ in range(G)),
                             SimpleNamespace(state_dict=dict), "random numbers")
        stored, rows = Stored(path), max(1, 2 ** 24 // (P * D))
        piece = lambda start, stop: torch.from_numpy(stored.rows("embedding", start, stop)).to(DEVICE)
        for Q in 1, 100:
            query = torch.randn(Q, P, D, generator=generator).to(DEVICE)
            peak(forget=True)
            half, before = median(lambda: nearest(query, piece, G // 2, 10, rows)), peak()
            whole = median(lambda: nearest(query, piece, G, 10, rows))
            print_row("search", f"{Q} quer{'y' if Q == 1 else 'ies'} in {G:,} tracklets of {P} x {D} ({name})", f"{whole:.2f} s", f"half of it {half:.2f} s", "")
            note(f"{whole * 1e5 / G:.1f} s per 100,000, {whole * 1e6 / G:.0f} s per 1,000,000; file {os.path.getsize(path) / 1e9:.1f} GB, memory {peak():.0f} MB, "
                 f"{peak() - before:.0f} of them for the second half")


def usual_rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking as it is usually written: the whole matrix sorted, a loop over the tracklets, a dense V."""
    original = (distance ** 2 / (distance ** 2).max(0)).T
    N, rank = len(original), np.argsort(original, axis=1)
    reciprocal = lambda i, k: rank[i, :k + 1][np.where(rank[rank[i, :k + 1], :k + 1] == i)[0]]
    V = np.zeros_like(original)
    for i in range(N):
        neighbours = reciprocal(i, k1)
        joined = neighbours
        for candidate in neighbours:
            theirs = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(np.intersect1d(theirs, neighbours)) > 2 / 3 * len(theirs):
                joined = np.append(joined, theirs)
        joined = np.unique(joined)
        V[i, joined] = np.exp(-original[i, joined]) / np.exp(-original[i, joined]).sum()
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
    generator = torch.Generator().manual_seed(0)
    people = torch.randn((Q + G) // 12 + 1, 2, 64, generator=generator)    # about twelve tracklets of each, as in HITSZ-VCM
    parts = people[torch.randint(len(people), (Q + G,), generator=generator)] + 0.7 * torch.randn(Q + G, 2, 64, generator=generator)
    distance = distances(parts, parts).to(DEVICE)
    ours, usual = lambda: rerank(distance, Q), lambda: torch.from_numpy(usual_rerank(distance.cpu().numpy(), Q)).to(DEVICE)
    if reference:
        compare("re-ranking", f"{Q:,} x {G:,}", ours, usual, lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-4))
        growth("queries and gallery", [median(lambda: rerank(distance[:n, :n], n // 2)) for n in ((Q + G) // 4, (Q + G) // 2, Q + G)])
    else:
        before = peak(forget=True)
        print_row("re-ranking", f"{Q:,} x {G:,}", f"{median(ours):.2f} s")
        note(f"memory +{peak() - before:.0f} MB over the distances' {distance.numel() * 4 / 2 ** 20:.0f} MB")


# ------------------------------------------------------------------------ loader ----

class PlainFrames(torch.utils.data.Dataset):
    """Tracklets as they are usually loaded: each frame opened, transformed and made a float tensor on its own, in the worker."""

    def __init__(self, tracklets, size, T):
        self.tracklets, self.size, self.T = tracklets, size, T

    def __getitem__(self, key):
        index, seed = key
        rng, frames, (H, W), pad = np.random.default_rng(seed), [], self.size, 10
        tracklet = self.tracklets[index]
        for i in frame_indices(len(tracklet.frames), self.T, rng):
            image = Image.open(tracklet.frames[i]).convert("RGB").resize((W, H), Image.Resampling.BILINEAR)
            padded = Image.new("RGB", (W + 2 * pad, H + 2 * pad))
            padded.paste(image, (pad, pad))
            x, y = rng.integers(2 * pad + 1, size=2).tolist()
            image = padded.crop((x, y, x + W, y + H))
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            frame = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
            frame = (frame - torch.tensor((0.485, 0.456, 0.406))[:, None, None]) / torch.tensor((0.229, 0.224, 0.225))[:, None, None]
            box = erased_box(H, W, rng) if rng.random() < 0.5 else None
            if box:
                frame[:, box[0]:box[0] + box[2], box[1]:box[1] + box[3]] = torch.tensor((0.4914, 0.4822, 0.4465))[:, None, None]
            channel = rng.integers(6)
            frames.append(frame[channel:channel + 1].repeat(3, 1, 1) if channel < 3 else frame)
        return torch.stack(frames), int(tracklet.modality == INFRARED), index


def loading(batches, tracklets=64, T=6, size=(256, 128)):
    """Augmented batches of 32 tracklets ready on the device: plain, ours, ours with --cache."""
    evaluate.keep_memory()
    rng, workers = np.random.default_rng(0), min(8, os.cpu_count()) if DEVICE.type == "cuda" else 0    # a CPU that trains has no core to spare
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for t in range(tracklets):
            names = [os.path.join(folder, f"{t}-{i}.jpg") for i in range(16)]
            for name in names:
                rough = Image.fromarray(rng.integers(256, size=(32, 16, 3), dtype=np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
                rough.save(name, quality=90)
            made.append(Tracklet(tuple(names), t, "D1", (VISIBLE, INFRARED)[t % 2]))
        cache = Cache(os.path.join(folder, "cache"), made, size=size, root=folder)
        keys = [[(int(t), int(s)) for t, s in zip(rng.integers(tracklets, size=32), rng.integers(2 ** 31, size=32))] for _ in range(batches)]

        def passing(dataset, finish):
            loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=workers, persistent_workers=workers > 0, pin_memory=DEVICE.type == "cuda")

            def run():
                for step, (frames, modality, _) in enumerate(loader):
                    finish(frames.to(DEVICE, non_blocking=True), modality, step)
            return run
        ours = lambda frames, modality, step: augment(frames, modality, np.random.default_rng(step))
        plain, *times = medians(passing(PlainFrames(made, size, T), lambda *_: None), *(passing(Frames(made, size=size, T=T, cache=c), ours) for c in (None, cache)), runs=5)
        frames = 32 * T * batches
        for work, seconds in zip((f"{T}-frame tracklets of {size[0]}x{size[1]} JPEGs, augmented; {workers} workers",
                                  f"the same with --cache ({os.path.getsize(cache.path) / 2 ** 20:.0f} MB for {cache.shape[0]:,} frames)"), times):
            print_row("loader", work, f"{frames / seconds:.0f} fps", f"plain {frames / plain:.0f} fps", f"{plain / seconds:.1f} x")


# ----------------------------------------------------- the network, in its own process ----

def plain_model(net):
    """The same model as one would write it first."""
    sasgl_, nchw = net.sasgl, lambda module, inputs: tuple(x.contiguous() for x in inputs)
    sasgl_.look = partial(literal_look, sasgl_)
    for module in net.modules():
        if isinstance(module, sasgl.Linear):
            module.__class__ = torch.nn.Linear
    for module in (net.visible_stem, net.infrared_stem, sasgl_.gait_net):
        module.register_forward_pre_hook(nchw)
    dinogrl.conv_norm = sasgl.conv_norm = lambda x, conv, bn: bn(conv(x))


def child(parts, variant, tracklets, frames, precision):
    """-> {part: seconds, FLOP, peak memory in MB} of what one process measures, the parts one after the other."""
    if variant != "plain" and parts != "memory":
        evaluate.keep_memory()
    torch.manual_seed(0)
    B, N = tracklets, tracklets * frames
    net = dinogrl.DinoGRL(classes=500, dinov2=sasgl.load_dinov2("dinov2_vits14", pretrained=False)).to(DEVICE)
    if variant == "plain":
        plain_model(net)
    if variant == "recomputed":
        train.recompute(net)
    autocast = partial(torch.autocast, DEVICE.type, getattr(torch, precision), enabled=precision != "float32")
    x = torch.randn(B, frames, 3, 256, 128, device=DEVICE)
    modality, label = torch.arange(B) // (B // 2), (torch.arange(B) % (B // 2)).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "float16")

    def step(optimizer):
        optimizer.zero_grad()
        train.forward_backward(net.train(), x, modality, label, 2 if variant == "chunks" else 1, autocast, scaler.scale)
        scaler.step(optimizer)
        scaler.update()

    @torch.no_grad()
    def embedding():
        with autocast():
            net.eval().embed(x, modality)

    def silhouettes(layers):
        with patch.object(net.sasgl.dinov2, "get_intermediate_layers", lambda *_, **__: layers), autocast():
            view = net.train().sasgl.look(x.flatten(0, 1))
            loss = sum(view.losses.values()) + view.appearance.square().mean()
        loss.backward()
        return view.silhouette

    results = {}
    for part in parts.split(","):
        result = results[part] = {}
        peak(forget=True)
        if part == "embedding":
            work = embedding
        elif part == "silhouettes":    # DINOv2 sees a body: about a third of the frame is foreground
            y, across = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 16), indexing="ij")
            body = ((across / 0.55) ** 2 + (y / 0.85) ** 2 < 1).float().reshape(1, 512, 1).to(DEVICE)
            layers = [torch.randn(N, 512, 384, device=DEVICE) + 3 * body * torch.randn(384, device=DEVICE) for _ in range(4)]
            towards = (layers[-1] * body).mean((0, 1))
            net.sasgl.mask_branch.down_sampling.weight.data = torch.stack([2 * towards, -2 * towards])
            work = partial(silhouettes, layers)
            result["foreground"] = work().bool().float().mean().item()
            if DEVICE.type == "cuda" and variant != "plain":
                torch.cuda.set_sync_debug_mode("error")
                work()
                torch.cuda.set_sync_debug_mode("default")
        else:
            work = partial(step, torch.optim.Adam([p for p in net.parameters() if p.requires_grad], fused=DEVICE.type == "cuda" and variant != "plain"))
        with FlopCounterMode(display=False) as counter:
            work()
        if part == "memory":
            work()    # only now Adam's moments lie beside the activations
        else:
            result.update(flop=counter.get_total_flops(), seconds=median(work, warm=True))
        result["peak"] = peak()
    return results


@lru_cache
def in_child(*arguments, **environment):
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


@lru_cache
def matrix_rate(dtype):
    """FLOP/s of the fastest product of two 2,048 x 2,048 matrices (CUDA: 8,192) that a Linear can call, the best of twenty: what there is to reach."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    x, module = torch.randn(1, n, n, device=DEVICE, dtype=dtype), sasgl.Linear(n, n, device=DEVICE, dtype=dtype)
    with torch.inference_mode():
        return 2 * n ** 3 / min(seconds_of(f) for _ in range(20) for f in (lambda: module(x), lambda: F.linear(x, module.weight, module.bias)))


OPTIONS = {"recomputed": ", --checkpoint-activations on", "chunks": ", --accumulate 2"}    # of a variant


def network(part, words, tracklets, frames, variants=("ours",), growing=(), beside=""):
    """variants: of ours, each compared with plain; "bfloat16" in one is its precision. beside: all parts that one process measures."""
    measured = lambda *arguments: in_child(beside or part, *arguments)[part]
    own, plain_precision = ("bfloat16", "float16") if DEVICE.type == "cuda" and part != "embedding" else ("float32", "float32")
    plain = measured("plain", tracklets, frames, plain_precision)
    N = tracklets * frames
    for variant in variants:
        precision = "bfloat16" if "bfloat16" in variant else own
        r = measured(variant, tracklets, frames, precision)
        print_row(part, f"{words}{OPTIONS.get(variant, '')}, {tracklets} tracklets of {frames} frames, {precision}", f"{r['seconds']:.3g} s",
                  f"plain {plain['seconds']:.3g} s", f"{plain['seconds'] / r['seconds']:.2f} x")
        rate = matrix_rate(getattr(torch, precision))
        note(f"{N / r['seconds']:.1f} frames/s, {r['flop'] / 1e12:.3g} TFLOP at {r['flop'] / r['seconds'] / 1e12:.3g} TFLOP/s, {r['flop'] / r['seconds'] / rate:.0%} of a matrix "
             f"product's {rate / 1e12:.3g}; peak {r['peak'] / 1024:.1f} GB (plain {plain['peak'] / 1024:.1f} GB, {plain['flop'] / 1e12:.3g} TFLOP)"
             + (f"; foreground {r['foreground']:.0%}" if "foreground" in r else ""))
    if growing:
        growth(f"{growing[0]} tracklets", [measured("ours", n, frames, own)["seconds"] for n in growing])


def memory(few, many, frames=6):
    """Training memory: the peak of a bfloat16 step at two batches, on a CPU of the whole process: what each tracklet takes, and what is left.
    (--accumulate N divides the former by N.)"""
    for variant in "ours", "recomputed":
        peaks = [in_child("memory", variant, n, frames, "bfloat16", MALLOC_MMAP_THRESHOLD_="65536")["memory"]["peak"] / 1024 for n in (few, many)]    # freed is given back
        each = (peaks[1] - peaks[0]) / (many - few)
        fixed = peaks[0] - few * each
        print_row("memory", f"of a step, bfloat16, {frames} frames a tracklet{OPTIONS.get(variant, '')}", f"{each:.2f} GB", "each tracklet")
        note(f"and {fixed:.1f} GB; the largest batch for " + ", ".join(f"{gpu} GB: {max(0, int((0.95 * gpu - fixed) / each))}" for gpu in (12, 24, 80)) + " tracklets")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, under a minute")
    parser.add_argument("--child", nargs=5, metavar=("PARTS", "VARIANT", "TRACKLETS", "FRAMES", "PRECISION"), help="used by the benchmark itself")
    args = parser.parse_args()
    if args.child:
        parts, variant, tracklets, frames, precision = args.child
        print(json.dumps(child(parts, variant, int(tracklets), int(frames), precision)))
        sys.exit()
    small = 10 if args.quick else 1
    data.tqdm = ranking.tqdm = lambda *arguments, **options: tqdm(*arguments, **{**options, "disable": True})
    print(f"torch {torch.__version__}, {DEVICE if DEVICE.type == 'cpu' else torch.cuda.get_device_name()}, {torch.get_num_threads()} threads")
    print_row("part", "work", "time", "reference", "ratio")
    search(100_000 // small, 1, 1280, "LSMRL")
    search(100_000 // small // min(small, 4), 70, 256, "DinoGRL")
    distance_matrix(5159 // min(small, 3), 5643 // min(small, 3))    # much less, and starting two threads is what one would time
    scoring(5159 // small, 5643 // small, 427)
    reranking(2000 // small, 2000 // small)
    if small == 1:
        reranking(5159, 5643, reference=False)    # HITSZ-VCM's size
    fusion(2 if args.quick else 32)
    loading(10 // min(small, 5))
    B, T = (2, 1) if args.quick else (32, 6) if DEVICE.type == "cuda" else (4, 6)    # a step of 32 takes a CPU of two cores a minute and 28 GB
    variants = ["ours", *["ours-bfloat16"] * (DEVICE.type == "cpu"), "recomputed", "chunks"]
    network_ = partial(network, frames=T, beside="embedding,silhouettes,step" if args.quick else "")
    network_("silhouettes", "SASGL without DINOv2 and gait net, step", B if args.quick else 32)
    network_("step", "paper preset", B, variants=variants[:1] if args.quick else variants, growing=() if args.quick else (B // 2, B, 2 * B))
    network_("embedding", "paper preset", B)    # evaluate.py knows float32 alone
    if not args.quick and peak() == peak():    # known here, no nan
        memory(2, 4)
