"""How fast the parts are: `python tests/benchmark.py` prints a table, each part against a plain reference in the same run.

    python tests/benchmark.py               search in 100,000 tracklets, re-ranking of 2,000 x 2,000 against the usual code; minutes, 8 GB of disk
    python tests/benchmark.py --quick       a tenth of it, under a minute

Times are medians of three runs, on CUDA where there is one. The gallery of the search lies in a file made for it and removed again.
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
from ranking import Stored, distances, nearest, rerank, write_embeddings    # noqa: E402

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
    ours = median(lambda: rerank(distance, Q))
    memory = peak() - before
    words = "", ""
    if reference:
        start = time.perf_counter()
        expected = usual_rerank(distance.cpu().numpy(), Q)
        usual = time.perf_counter() - start
        assert np.allclose(expected, rerank(distance, Q).cpu().numpy(), atol=1e-4), "re-ranking differs from the usual code"
        words = f"usual code {usual:.1f} s", f"{usual / ours:.0f} x"
    print_row("re-ranking", f"{Q:,} x {G:,}, memory +{memory:.0f} MB over the distances' {distance.numel() * 4 / 2 ** 20:.0f} MB", f"{ours:.2f} s", *words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, under a minute")
    small = 10 if parser.parse_args().quick else 1
    sys.stderr = open(os.devnull, "w", encoding="utf-8")    # progress bars
    print(f"torch {torch.__version__}, {DEVICE if DEVICE.type == 'cpu' else torch.cuda.get_device_name()}, {torch.get_num_threads()} threads")
    print_row("part", "work", "time", "reference", "ratio")
    search(100_000 // small, 1, 1280, "LSMRL")
    search(100_000 // small, 70, 256, "DinoGRL")
    reranking(2000 // small, 2000 // small)
    if small == 1:
        reranking(5159, 5643, reference=False)    # HITSZ-VCM's size
