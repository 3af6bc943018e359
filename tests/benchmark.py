"""How fast the parts are: `python tests/benchmark.py` prints a table, each part against a plain reference in the same run.

    python tests/benchmark.py               at HITSZ-VCM's size, search in 100,000 tracklets; some minutes, 8 GB of disk
    python tests/benchmark.py --quick       a tenth of it, under a minute

PBMGE, the metrics, the distances, re-ranking and search so far. Times are medians of three runs, on CUDA where there is one. The
gallery of the search lies in a file made for it and removed again.
"""
import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Tracklet    # noqa: E402
from pbmge import PBMGE    # noqa: E402
from ranking import Stored, distances, metrics, nearest, rerank, write_embeddings    # noqa: E402
from test_pbmge import literal_pbmge    # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def median(function, runs=3):
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[runs // 2]


def peak():
    """Largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_row(part, work, seconds, reference="", ratio=""):
    print(f"{part:12}{work:64}{seconds:>10}{reference:>24}{ratio:>8}", flush=True)


def compare(part, work, ours, usual, same, runs=3):
    """Both once, to see that they agree; then the medians and their ratio."""
    same(ours(), usual())
    fast, slow = median(ours, runs), median(usual, runs)
    print_row(part, work, f"{fast:.3g} s", f"usual code {slow:.3g} s", f"{slow / fast:.1f} x")


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
    grown = []
    for k in 1, 2, 4:
        made = make(D * k)
        grown.append(median(lambda: step(PBMGE.__call__, *made)))
    print(f"{'':12}channels doubled twice: {grown[1] / grown[0]:.2f} and {grown[2] / grown[1]:.2f} times the time")


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
    compare("metrics", f"{Q:,} x {G:,} distances, {identities} identities", lambda: metrics(on_device, *arguments), lambda: usual_metrics(distance.numpy(), *arguments), same)


def usual_distances(query, gallery):
    total = torch.zeros(len(query), len(gallery), device=query.device)
    for p in range(query.shape[1]):
        q, g = query[:, p], gallery[:, p]
        squares = (q ** 2).sum(1)[:, None] + (g ** 2).sum(1) - 2 * q @ g.t()
        total = total + squares.clamp(min=1e-12).sqrt()
    return total / query.shape[1]


def distance_matrix(Q, G, P=70, D=256):
    query, gallery = (torch.randn(n, P, D, generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (Q, G))
    before = peak()
    distances(query, gallery)
    extra = peak() - before - Q * G * 4 / 2 ** 20
    compare("distances", f"{Q:,} x {G:,}, {P} parts x {D}; beside the result {max(extra, 0):.0f} MB", lambda: distances(query, gallery),
            lambda: usual_distances(query, gallery), lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3), runs=1)


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
            half, before = median(lambda: nearest(query, piece, G // 2, 10, rows)), peak()
            whole = median(lambda: nearest(query, piece, G, 10, rows))
            print_row("search", f"{Q} quer{'y' if Q == 1 else 'ies'} in {G:,} tracklets of {P} x {D} ({name})", f"{whole:.2f} s", f"half of it {half:.2f} s", "")
            print(f"{'':12}{whole * 1e5 / G:.1f} s per 100,000, {whole * 1e6 / G:.0f} s per 1,000,000; file {os.path.getsize(path) / 1e9:.1f} GB, memory {peak():.0f} MB, "
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
    distance, before = distances(parts, parts).to(DEVICE), peak()
    ours, usual = lambda: rerank(distance, Q), lambda: torch.from_numpy(usual_rerank(distance.cpu().numpy(), Q)).to(DEVICE)
    if reference:
        compare("re-ranking", f"{Q:,} x {G:,}", ours, usual, lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-4))
    else:
        print_row("re-ranking", f"{Q:,} x {G:,}", f"{median(ours):.2f} s")
        print(f"{'':12}memory +{peak() - before:.0f} MB over the distances' {distance.numel() * 4 / 2 ** 20:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, under a minute")
    small = 10 if parser.parse_args().quick else 1
    sys.stderr = open(os.devnull, "w", encoding="utf-8")    # progress bars
    print(f"torch {torch.__version__}, {DEVICE if DEVICE.type == 'cpu' else torch.cuda.get_device_name()}, {torch.get_num_threads()} threads")
    print_row("part", "work", "time", "reference", "ratio")
    search(100_000 // small, 1, 1280, "LSMRL")    # first: the memory it states is the largest so far
    search(100_000 // small, 70, 256, "DinoGRL")
    distance_matrix(5159 // small, 5643 // small)
    scoring(5159 // small, 5643 // small, 427)
    reranking(2000 // small, 2000 // small)
    if small == 1:
        reranking(5159, 5643, reference=False)    # HITSZ-VCM's size
    fusion(32)
