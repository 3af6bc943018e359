"""Ranking: from embeddings to distances, ranks, CMC, mAP and mINP; k-reciprocal re-ranking; search in a gallery larger than memory.

    query (Q, P, D), gallery (G, P, D) -> distances (Q, G) -> score -> results        every rank, for a benchmark
                                          distances (N, N) -> rerank -> (Q, G)        the same distances, seen from both sides
    query (Q, P, D), FILE.npz (Stored) -> nearest -> distances, indices (Q, top)      the best alone, for an archive

The distance of two tracklets is the mean over parts of the Euclidean distance. A tie counts against the query, so
constant embeddings score as badly as they should. AP is the mean of the precision at each hit: hit-miss-hit is 5/6.

Quick question: why does mINP fall when mAP hardly moves? (It asks how far one must scroll for the *last* tracklet of
the person; one hard tracklet in a hundred spoils it.)

Ours, not the papers': mINP beside CMC and mAP; re-ranking (Zhong et al., CVPR 2017) and the search as a whole.
"""
import hashlib
import math
import os
import warnings
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, frame_indices


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

    match: the gallery tracklet is the query's person. valid: it counts at all; only one of the query's person may not."""
    # A tie counts against the query: before a hit come all that are as near or nearer, less the person's own, plus the hits before it.
    # So only the values are sorted, no indices: on the CPU numpy does that ten times as fast as torch.
    distance = distance.contiguous()
    everyone = torch.from_numpy(np.sort(distance.numpy(), axis=1)) if distance.is_cpu else distance.sort(1).values
    M = max(1, int(match.sum(1).max()))
    own, column = torch.where(match, distance, torch.inf).topk(M, largest=False)    # (Q, M) ascending, then infinity, which is no hit
    hits = own.masked_fill(~valid.gather(1, column), torch.inf).sort(1).values    # (Q, M) likewise, without the ignored
    wrong_before = torch.searchsorted(everyone, hits, right=True) - torch.searchsorted(own, hits, right=True)
    order = torch.arange(1, M + 1, device=distance.device)
    position = wrong_before + order    # rank of the k-th hit
    real = hits.isfinite()
    K = real.sum(1)    # hits of each query
    ap = (order / position * real).sum(1) / K
    last = position.gather(1, (K - 1).clamp(min=0)[:, None])[:, 0]
    none = torch.where(K > 0, 0.0, torch.nan)
    return position[:, 0] + none, ap + none, K / last + none


def matches(query, gallery, rows):
    """query, gallery: (pid, camera or None) as integer tensors; rows: indices of queries -> match, valid (len(rows), G) bool, see rank."""
    (query_pid, query_camera), (gallery_pid, gallery_camera) = query, gallery
    match = query_pid[rows][:, None] == gallery_pid
    if query_camera is None:
        return match, torch.ones_like(match)
    return match, ~(match & (query_camera[rows][:, None] == gallery_camera))    # same person before the same camera: too easy, ignored


def score(distance_of, query, gallery, block=512):
    """The results of one direction, a block of queries at a time. distance_of(rows) -> (len(rows), G); query and gallery: see matches.
    Raises UserError if nothing can be ranked."""
    Q, G, parts = len(query[0]), len(gallery[0]), []
    for rows in torch.arange(Q).split(block):
        distance = distance_of(rows)
        if not torch.stack(distance.aminmax()).isfinite().all():    # NaN spreads: neither is finite then
            raise UserError("the distances are not finite; the model's embeddings hold NaN or infinity: train with a "
                            "lower --lr or with --precision float32")
        match, valid = (x.to(distance.device) for x in matches(query, gallery, rows))
        parts.append(torch.stack(rank(distance, match, valid)).cpu())
    first, ap, inp = torch.cat(parts, dim=1).double()
    kept = ~first.isnan()
    if not kept.any():
        raise UserError(f"none of {Q} queries has its person in the gallery of {G}; nothing to rank: "
                        "check the dataset with python data.py")
    results = {f"rank-{r}": (first[kept] <= r).double().mean().item() for r in (1, 5, 10, 20)}
    return {**results, "mAP": ap[kept].mean().item(), "mINP": inp[kept].mean().item(),
            "queries": int(kept.sum()), "gallery": G}


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


def rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): distance (N, N) of Q queries, then N - Q gallery tracklets -> (Q, N - Q).

    Who is near to whom, seen from both sides: a tracklet is described by its k-reciprocal neighbours (a softmax of their distances),
    and two are compared by how far these descriptions overlap (Jaccard). Beside the distances only neighbours are kept."""
    N, device = len(distance), distance.device
    farthest = distance.amax(1).clamp(min=1e-6)    # every row in units of its own; the squares of that are what is weighed
    near = distance.topk(min(max(k1 + 1, k2), N), largest=False).indices    # (N, K) ascending
    me = torch.arange(N, device=device)

    def reciprocal(k):
        """-> (N, k): is i among the k nearest of its own a-th nearest?"""
        return (near[:, :k][near[:, :k]] == me[:, None, None]).any(2)

    k, half = min(k1 + 1, N), min(round(k1 / 2) + 1, N)
    mutual, mutual_half = reciprocal(k), reciprocal(half)
    entries = []    # of the descriptions V (N, N): (row, column), sparse
    for rows in me.split(256):
        a = near[rows, :k]    # (b, k)
        member = torch.zeros(len(rows), N, dtype=torch.bool, device=device).scatter_(1, a, mutual[rows])
        theirs, valid = near[a, :half], mutual_half[a]    # (b, k, half): the neighbours of a neighbour
        common = (member.gather(1, theirs.flatten(1)).view_as(theirs) & valid).sum(2)
        joined = (mutual[rows] & (common > 2 / 3 * valid.sum(2)))[:, :, None] & valid    # more than two thirds overlap: they join
        member[joined.nonzero()[:, 0], theirs[joined]] = True
        row, column = member.nonzero(as_tuple=True)
        entries.append((rows[row], column))
    row, column = map(torch.cat, zip(*entries))
    value = torch.exp(-(distance[row, column] / farthest[row]).square())
    value /= torch.zeros(N, device=device).index_add_(0, row, value)[row]
    neighbours = near[:, :k2]    # query expansion: the mean description of the k2 nearest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # torch calls its sparse tensors a beta version
        V = torch.sparse_coo_tensor(torch.stack([row, column]), value, (N, N))
        mean = torch.sparse_coo_tensor(torch.stack([me.repeat_interleave(neighbours.shape[1]), neighbours.flatten()]),
                                       torch.full((neighbours.numel(),), 1 / neighbours.shape[1], device=device), (N, N))
        V = torch.sparse.mm(mean, V).coalesce()

    (row, column), value = V.indices(), V.values()    # row by row, the queries' first
    order = column.argsort(stable=True)
    order = order[row[order] >= Q]    # the gallery's entries, column by column
    holder, held = row[order] - Q, value[order]
    size = column[order].bincount(minlength=N)
    start = size.cumsum(0) - size
    result = torch.empty(Q, N - Q, device=device)
    for first in range(0, Q, 64):    # few queries at a time: their pairs and rows stay in the cache
        last = min(first + 64, Q)
        mine = slice(*torch.searchsorted(row, torch.tensor([first, last], device=device)).tolist())    # their entries
        times = size[column[mine]]
        left = torch.repeat_interleave(times)    # (pairs,): each entry as often as the gallery has entries in its column, ...
        right = torch.arange(len(left), device=device) - (times.cumsum(0) - times - start[column[mine]])[left]    # ... and these
        overlap = torch.zeros(last - first, N - Q, device=device)    # sum of min(V[q], V[g])
        overlap.view(-1).index_add_(0, ((row[mine] - first) * (N - Q))[left] + holder[right], torch.minimum(value[mine][left], held[right]))
        jaccard = 1 - overlap / (2 - overlap)
        result[first:last] = (1 - weight) * jaccard + weight * (distance[first:last, Q:] / farthest[first:last, None]).square()
    return result


def nearest(query, piece, G, top, rows=1024):
    """query (Q, P, D) -> distances and indices (Q, top) of its nearest among G gallery tracklets, ascending; of equal ones the lower
    index first. piece(start, stop) -> gallery[start:stop], at most `rows` at a time: memory does not grow with G."""
    best, index = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    for start in tqdm(range(0, G, rows), desc="searching", leave=False, disable=G <= rows):
        stop = min(start + rows, G)
        distance = distances(query, piece(start, stop))
        if not distance.isfinite().all():
            raise UserError(f"a distance to the gallery's tracklets {start}..{stop - 1} is not finite; expected finite embeddings: embed "
                            "them again with a sound checkpoint")
        best, order = torch.cat([best, distance], dim=1).sort(dim=1, stable=True)
        index = torch.cat([index, torch.arange(start, stop, device=index.device).expand(len(query), -1)], dim=1).gather(1, order)
        best, index = best[:, :top], index[:, :top]
    return best, index


# ---------------------------------------------------------------- FILE.npz ----

class Stored:
    """A FILE.npz of --save, read a piece at a time: np.load would read an array whole, and a large gallery's are larger than memory.

    .arrays: {name: (dtype, shape, offset in the file)}. Raises UserError for any other file."""

    def __init__(self, path):
        self.path, self.arrays = path, {}
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    file.seek(entry.header_offset + 26)    # the local header ends in name and extra field; their lengths stand here
                    lengths = np.frombuffer(file.read(4), "<u2")
                    file.seek(entry.header_offset + 30 + int(lengths.sum()))
                    version = np.lib.format.read_magic(file)
                    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, fortran, dtype = header(file)
                    end = file.tell() + math.prod(shape) * dtype.itemsize
                    if entry.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject or end > os.path.getsize(path):
                        raise ValueError("compressed, cut short or of Python objects")
                    self.arrays[entry.filename.removesuffix(".npy")] = dtype, shape, file.tell()
            self.dtype, self.shape, _ = self.arrays["embedding"]
            sizes = {self.arrays[name][1][0] for name in ("embedding", "name", "modality", "frame", "shown")}
            if len(self.shape) != 3 or self.dtype != np.float32 or len(sizes) != 1 or 0 in self.shape:
                raise ValueError(f"embedding {self.dtype} {self.shape}")
            self.model, self.setting = (str(self.rows(name, 0, 1)[0]) for name in ("model", "setting"))
        except (OSError, ValueError, KeyError, IndexError, EOFError, NotImplementedError, SyntaxError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no gallery ({type(error).__name__}: {' '.join(str(error).split())[:80]}); expected a FILE.npz of "
                            "evaluate.py --save; make it again") from None

    def rows(self, name, start, stop):
        """Rows start..stop of an array, mapped and copied: what is not asked for is never in memory."""
        dtype, shape, offset = self.arrays[name]
        stride = math.prod(shape[1:]) * dtype.itemsize
        return np.array(np.memmap(self.path, dtype, "r", offset + start * stride, (stop - start, *shape[1:])))


def fingerprint(model):
    """-> 64 hex digits, the same for the same tensors: distances between the embeddings of two models mean nothing."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_embeddings(file, names, tracklets, embeddings, model, setting):
    """N tracklets with their names, their embeddings (parts, dim) one after the other -> an open FILE.npz; one at a time is in memory.
    embedding (N, parts, dim), name, pid, camera, modality, frame (the first), shown (four, for pictures), model (fingerprint), setting
    (what the embeddings were made of, in words)."""
    columns = {"name": names, "pid": [t.pid for t in tracklets], "camera": [t.camera for t in tracklets],
               "modality": [t.modality for t in tracklets], "frame": [t.frames[0] for t in tracklets], "model": [fingerprint(model)], "setting": [setting],
               "shown": [[os.path.abspath(t.frames[i]) for i in frame_indices(len(t.frames), 4)] for t in tracklets]}
    with zipfile.ZipFile(file, "w") as archive:    # stored, not compressed: Stored reads it in place
        with archive.open("embedding.npy", "w", force_zip64=True) as member:
            for i, embedding in enumerate(embeddings):
                if i == 0:
                    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (len(tracklets), *embedding.shape)})
                member.write(embedding.numpy().astype("<f4").tobytes())
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.array(column), allow_pickle=False)
