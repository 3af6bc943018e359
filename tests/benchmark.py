"""How fast the parts are on this machine: each against a plain reference in the same run.

    python tests/benchmark.py            the sizes of the paper and of HITSZ-VCM
    python tests/benchmark.py --quick    a tenth of the work, or less

Times are medians of three runs after one that does not count. On CUDA, where there is one, they are
taken by events, and the training step has a row for each precision, with its share of the TFLOP/s
that a plain product reaches. Not yet run on a GPU: docs/speed.md says what is expected there. On a
CPU all is float32: without AVX-512 a step in bfloat16 takes minutes.
"""
# ruff: noqa: E402    the path to our own modules comes before them
import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import ERASED, MODALITIES, Frames, IdentitySampler, Tracklet, augment, chunks, erased_box
from evaluate import RANKS, distances, rerank, score
from lsmrl import LSMRL
from model import DinoGRL
from pbmge import PBMGE
from support.dinov2 import load_dinov2
from support.footage import normalise
from support.options import fill
from test_pbmge import literal_pbmge
from train import Config
from walkers import sample

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
MB, GB = 2 ** 20, 2 ** 30

# --------------------------------------------------------------- measuring ----

def timed(function, device):
    """-> the seconds of one call; on CUDA by events, which wait for the kernels."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def seconds_of(function):
    """The median of three calls. The caller has made one before."""
    return median(timed(function, DEVICE) for _ in range(3))


def print_row(part, work, ours, plain="", ratio=""):
    print(f"{part:16}{work:50}{ours:>16}{plain:>16}{ratio:>9}", flush=True)


def compare(part, work, ours, plain, frames=0):
    """A row of two functions, which must return the same numbers. frames: how many a call takes,
    for frames/s in place of seconds."""
    torch.testing.assert_close(ours(), plain(), rtol=1e-3, atol=1e-3)
    # Not in turns, or ours would pay for the memory that the other one frees.
    fast, slow = seconds_of(ours), seconds_of(plain)
    shown = [f"{frames / seconds:.4g} frames/s" if frames else f"{seconds:.3g} s"
             for seconds in (fast, slow)]
    print_row(part, work, *shown, f"{slow / fast:.2f} x")

# --------------------------------------------------------- PBMGE, ranking ----

def fusion(B, D=256, strips=(1, 2, 4, 8, 16)):
    """PBMGE forward and backward, against the paper's formulas."""
    torch.manual_seed(0)
    parts = [torch.randn(B, sum(strips), D, device=DEVICE, requires_grad=True) for _ in range(2)]
    pbmge = PBMGE(dim=D, strips=strips).to(DEVICE)

    def gradients(form):
        total = sum(refined.square().sum() for refined in form(*parts))
        return torch.autograd.grad(total, [*parts, *pbmge.parameters()])

    compare("PBMGE", f"forward + backward, batch {B}, {D} channels",
            partial(gradients, pbmge), partial(gradients, partial(literal_pbmge, pbmge)))


def plain_score(distance, match, valid):
    """As it is usually written: an argsort, and a loop over the queries."""
    found = []
    for q, order in enumerate(distance.argsort(1)):
        hits = match[q, order[valid[q, order]]]
        if hits.any():
            places = np.flatnonzero(hits) + 1
            AP = np.mean(np.arange(1, len(places) + 1) / places)
            found.append([places[0], AP, len(places) / places[-1]])
    first, AP, INP = np.transpose(found)
    return {f"rank-{r}": np.mean(first <= r) for r in RANKS} | {
        "mAP": AP.mean(), "mINP": INP.mean(), "queries": len(found), "gallery": match.shape[1]}


def ranking(Q, G):
    """Q queries, G gallery tracklets of 427 people before 12 cameras."""
    rng = np.random.default_rng(0)
    match, same_camera = (rng.integers(n, size=(Q, 1)) == rng.integers(n, size=G)
                          for n in (427, 12))
    given = rng.random((Q, G), dtype=np.float32), match, ~(match & same_camera)
    compare("CMC, mAP, mINP", f"{Q:,} x {G:,} distances",
            partial(score, *given), partial(plain_score, *given))


def reranking(N):
    """Half of N tracklets are queries. A dozen of each person, as in HITSZ-VCM."""
    torch.manual_seed(0)
    people = torch.randn(N // 12 + 1, 2, 64)
    parts = people[torch.randint(len(people), (N,))] + 0.7 * torch.randn(N, 2, 64)
    distance = distances(parts, parts).numpy()
    tracemalloc.start()
    rerank(distance, N // 2)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = seconds_of(partial(rerank, distance, N // 2))
    work = f"{N // 2:,} x {N // 2:,}; takes {memory / MB:.0f} MB"
    print_row("re-ranking", work, f"{seconds:.3g} s")

# ------------------------------------------------------------------ loader ----

class PlainFrames(Frames):
    """As it is usually written: each frame opened, transformed and made a float tensor alone."""

    def __getitem__(self, key):
        rng, tracklet = np.random.default_rng(key[1]), self.tracklets[key[0]]
        drawn = chunks(len(tracklet.frames), self.T, rng)
        frames = torch.stack([self.transformed(tracklet.frames[i], rng) for i in drawn])
        return frames, MODALITIES.index(tracklet.modality), key[0]

    def transformed(self, path, rng, pad=10):
        H, W = self.size
        image = Image.open(path).convert("RGB").resize((W, H), Image.Resampling.BILINEAR)
        x, y = rng.integers(2 * pad + 1, size=2).tolist()
        image = ImageOps.expand(image, pad).crop((x, y, x + W, y + H))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        frame = normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        box = erased_box(H, W, rng) if rng.random() < 0.5 else None
        if box:
            top, left, h, w = box
            frame[:, top:top + h, left:left + w] = ERASED[:, None, None]
        channel = rng.integers(6)
        return frame[channel].expand(3, H, W) if channel < 3 else frame


def write_tracklets(folder, people, size, rng):
    """Eight tracklets of each person: JPEGs, as smooth as photographs are."""
    made = []
    for t in range(8 * people):
        frames = [os.path.join(folder, f"{t}-{i}.jpg") for i in range(12)]
        for frame in frames:
            rough = Image.fromarray(rng.integers(256, size=(32, 16, 3), dtype=np.uint8))
            rough.resize(size[::-1], Image.Resampling.BICUBIC).save(frame, quality=90)
        made.append(Tracklet(tuple(frames), t // 8, "D1", MODALITIES[t % 2]))
    return made


def loading(batches, T=6, size=(256, 128)):
    """Batches of 4 identities x 4 tracklets, augmented and on the device."""
    workers = min(8, os.cpu_count()) if IS_CUDA else 0    # a CPU has no core to spare
    rng = np.random.default_rng(0)

    def load(dataset, finish):
        sampler = IdentitySampler(dataset.tracklets, P=4, K=4, steps=batches, seed=0)
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=IS_CUDA)

        def read():
            for frames, modality, _ in loader:
                finish(frames.to(DEVICE, non_blocking=True), modality, rng)
        return read

    with tempfile.TemporaryDirectory() as folder:
        tracklets = write_tracklets(folder, 8, size, rng)
        compare("loader", f"{T} frames of {size[0]}x{size[1]}, augmented; {workers} workers",
                load(Frames(tracklets, size=size, T=T), augment),
                load(PlainFrames(tracklets, size=size, T=T), lambda *batch: None),
                frames=32 * T * batches)

# -------------------------------------------------------- networks, memory ----

class Untrained(DinoGRL):
    """Without a download: DINOv2 is not trained, and chance decides what the silhouettes are."""

    def prior(self):
        return load_dinov2(self.options.dinov2, pretrained=False)


def paper(method, tracklets, T):
    """-> the network of a method's paper preset, random frames, modality, label."""
    torch.manual_seed(0)
    size = fill(Config, method.recipe).size
    model = method(method.Options(), 500, size, pretrained=False).to(DEVICE)
    frames = torch.randn(tracklets, T, 3, *size, device=DEVICE)
    modality = torch.arange(tracklets) // (tracklets // 2)
    return model, frames, modality, torch.arange(tracklets // 2).repeat(2)


def written_plainly(model):
    """A copy with PBMGE as the paper has it, and maps as NCHW."""
    model = copy.deepcopy(model)
    model.pbmge.forward = partial(literal_pbmge, model.pbmge)
    appearance = model.streams["appearance"]
    for module in (appearance.visible_stem, appearance.infrared_stem, model.sasgl.gait_net):
        module.register_forward_pre_hook(lambda _, maps: tuple(x.contiguous() for x in maps))
    return model


def step_of(model, frames, modality, label, precision="float32"):
    """-> a function that takes a training step. The rate is 0: all steps see the same."""
    model.to(DEVICE).train()
    frames, label = frames.to(DEVICE), label.to(DEVICE)
    optimizer = torch.optim.Adam(model.parameter_groups(), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "float16")
    dtype = getattr(torch, precision)

    def step():
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            losses, _ = model(frames, modality, label)
        optimizer.zero_grad()
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


class Kernels(TorchDispatchMode):
    """Counts operations that compute something: on a GPU, each starts a kernel or more."""
    number = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.number += not operation.is_view
        return operation(*args, **kwargs or {})


def product(precision, n=8192 if IS_CUDA else 2048):
    """-> FLOP/s of a plain product."""
    a = torch.randn(n, n, device=DEVICE, dtype=getattr(torch, precision))
    a @ a
    return 2 * n ** 3 / seconds_of(lambda: a @ a)


def waits(step):
    """-> how often the CPU waits for the GPU in a step, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return len(found)


def steps(method, tracklets, T, precisions):
    """Steps of a method's paper preset: frames/s, TFLOP/s, operations, on CUDA waits. On an H200
    DinoGRL's, in bfloat16, is expected to reach 1,150 to 1,300 frames/s."""
    model, *batch = paper(method, tracklets, T)
    for precision in precisions:
        step = step_of(model, *batch, precision)
        step()
        with FlopCounterMode(display=False) as flops, Kernels() as kernels:
            step()
        seconds = seconds_of(step)
        rate = flops.get_total_flops() / seconds
        share = rate / product(precision)
        work = f"{method.__name__}, paper's preset, {tracklets} x {T}, {precision}"
        print_row("training step", work, f"{tracklets * T / seconds:.4g} frames/s",
                  f"{rate / 1e12:.3g} TFLOP/s", f"{share:.0%}")
        print_row("", "operations of it (3,425 expected of DinoGRL)", f"{kernels.number:,}")
        if IS_CUDA:
            print_row("", "waits of it (1 expected)", waits(step))


def network(tracklets, T, precisions):
    """The paper's preset, against itself as one would write it first."""
    model, *batch = paper(Untrained, tracklets, T)
    plain, N = written_plainly(model), tracklets * T

    @torch.inference_mode()
    def embed(model):
        model.eval().embed(*batch[:2])

    compare("embedding", f"paper's preset, {tracklets} x {T} frames",
            partial(embed, model), partial(embed, plain), N)
    for precision in precisions:
        compare("training step", f"the same, {precision}",
                step_of(model, *batch, precision), step_of(plain, *batch, precision), N)


def small_step(method, steps):
    """Steps of a small preset, on walkers."""
    config = fill(Config, method.recipe | method.small)
    frames, modality, label = sample(config.identities, config.frames)
    model = method(fill(method.Options, method.small), config.people, config.size)
    step = step_of(model, normalise(frames), modality, label)
    step()
    seconds = seconds_of(lambda: [step() for _ in range(steps)]) / steps
    print_row("training step", f"{method.__name__}'s small preset",
              f"{frames.shape[:2].numel() / seconds:.4g} frames/s")


def peak_of_steps(tracklets, T, precision):
    """-> bytes at most in two steps (Adam's moments come with the first); on a CPU, of all."""
    model, *batch = paper(Untrained, tracklets, T)
    step = step_of(model, *batch, precision)
    step()
    step()
    if IS_CUDA:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def memory(B, T, precision):
    """In a process of its own, whose peak is that of the step."""
    setting = json.dumps([B, T, precision])
    peak = int(subprocess.check_output([sys.executable, __file__, "--peak", setting]))
    print_row("peak memory", f"step of {B} x {T} frames, {precision}", f"{peak / GB:.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--peak", help=argparse.SUPPRESS)    # how `memory` calls this file
    asked = parser.parse_args()
    if asked.peak:
        print(peak_of_steps(*json.loads(asked.peak)))
        return
    quick, where = asked.quick, torch.cuda.get_device_name() if IS_CUDA else "cpu"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    print_row("part", "work", "ours", "plain", "ratio")
    B, T = 32 if IS_CUDA else 4, 1 if quick else 6
    precisions = ["float32", "float16", "bfloat16"][:3 if IS_CUDA else 1]
    memory(B, T, precisions[-1])    # first: a process starts at the ru_maxrss of its parent
    fusion(4 if quick else 32)
    ranking(*((800, 900) if quick else (5159, 5643)))    # HITSZ-VCM's size
    reranking(500 if quick else 2000)
    loading(2 if quick else 10)
    network(B, T, precisions)
    for method in Untrained, LSMRL:
        steps(method, B, T, precisions)
    for method in DinoGRL, LSMRL:
        small_step(method, 2 if quick else 10)


if __name__ == "__main__":
    main()
