"""Ranking: distances, ranks, CMC, mAP and mINP; re-ranking; the search in a stored gallery.

    query (Q, P, D), gallery (G, P, D) -> distances (Q, G) -> score -> results     for a benchmark
    everyone (N, P, D) -> distances (N, N) -> rerank -> (Q, G) -> score -> results    --rerank
    query (Q, P, D), FILE.npz (StoredGallery) -> nearest -> (Q, top)               for an archive

The distance of two tracklets is the mean over parts of the Euclidean distance. A tie counts
against the query, so that constant embeddings score as badly as they should. AP is the mean of the
precision at each hit: hit-miss-hit is 5/6.

Quick question: why does mINP fall when mAP hardly moves? (It asks how far one must scroll for the
*last* tracklet of the person; one hard tracklet in a hundred spoils it.)

Ours, not the papers': mINP beside CMC and mAP; re-ranking (Zhong et al., CVPR 2017) and the search
as a whole.
"""
import hashlib
import math
import os
import struct
import sys
import warnings
import zipfile
from typing import NamedTuple

from support.files import UserError, in_short
from support.options import Bar

import numpy as np
import torch

RANKS = (1, 5, 10, 20)

# ------------------------------------------------------------- distances ----


def distances(query, gallery, rows=256):
    """query (Q, P, D), gallery (G, P, D) -> (Q, G): mean over the P parts of the Euclidean
    distance.

    In blocks of `rows` queries and one part at a time: beside the result, memory is a few rows x G
    floats. Centred on the gallery's mean first, which changes no distance and saves float32 from
    cancellation."""
    result = torch.zeros(len(query), len(gallery), device=query.device)
    for p, centre in enumerate(gallery.mean(0)):
        gallery_part = gallery[:, p] - centre    # (G, D)
        blocks = zip(query[:, p].split(rows), result.split(rows), strict=True)
        for query_part, block in blocks:    # block: a view, so this adds into result
            block += torch.cdist(query_part - centre, gallery_part)
    return result.div_(query.shape[1])


# ----------------------------------------------------------------- ranks ----


class Labels(NamedTuple):
    """Who the tracklets of a query or a gallery are: integer tensors (N,). camera: None where it
    plays no part."""
    pid: torch.Tensor
    camera: torch.Tensor | None


def as_integers(values):
    """A list of pids or of cameras -> integers (N,), equal where the values are."""
    return torch.from_numpy(np.unique(values, return_inverse=True)[1])


def matches(query, gallery, rows):
    """query, gallery: Labels; rows: indices of queries -> match, valid (len(rows), G) bool: is the
    gallery tracklet the query's person, and does it count?

    The same person before the same camera is too easy, and does not count."""
    match = query.pid[rows][:, None] == gallery.pid
    if query.camera is None:
        return match, torch.ones_like(match)
    same_camera = query.camera[rows][:, None] == gallery.camera
    return match, ~(match & same_camera)


def ranks_of_hits(distance, match, valid):
    """distance (Q, G); match, valid (Q, G) bool, see matches -> ranks (Q, M) of each query's hits,
    ascending, and number (Q,): so many of a row are real, the rest fills it up.

    M: the largest number of a query's matches, at least 1. A hit's rank is 1 + the wrong ones that
    are as near or nearer (a tie counts against the query) + the hits before it. To count them,
    sorted values are enough, without their indices: numpy sorts values ten times as fast on a CPU
    as torch."""
    distance = distance.contiguous()
    if distance.is_cpu:
        everyone = torch.from_numpy(np.sort(distance.numpy(), axis=1))
    else:
        everyone = distance.sort(1).values    # (Q, G)
    M = max(1, int(match.sum(1).max()))
    # own (Q, M): the distances of the query's person, nearest first. hits (Q, M): of those that
    # count. Both are filled up with infinity.
    own, column = torch.where(match, distance, torch.inf).topk(M, largest=False)
    hits = own.masked_fill(~valid.gather(1, column), torch.inf).sort(1).values
    # The wrong ones as near or nearer: all as near or nearer, less the person's own, whether they
    # count or not.
    all_before = torch.searchsorted(everyone, hits, right=True)
    own_before = torch.searchsorted(own, hits, right=True)
    own_rank = torch.arange(1, M + 1, device=distance.device)    # of a hit among the hits
    return all_before - own_before + own_rank, hits.isfinite().sum(1)


def scores_of_ranks(ranks, number):
    """ranks (Q, M) of each query's hits, number (Q,): how many of a row are real -> rank of the
    first hit, AP and INP, (3, Q); NaN for a query without a hit."""
    order = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    is_hit = order <= number[:, None]
    precision = order / ranks * is_hit    # at each hit
    last = ranks.gather(1, (number - 1).clamp(min=0)[:, None])[:, 0]
    scores = torch.stack([ranks[:, 0], precision.sum(1) / number, number / last])
    return scores.masked_fill(number == 0, torch.nan)


def score(distance_of, query, gallery, block=512):
    """The results of one direction, a block of queries at a time: {"rank-1": ..., "mAP", "mINP",
    "queries", "gallery"}, fractions of 1. rank-r only if the gallery has r tracklets.

    distance_of(rows) -> (len(rows), G); query, gallery: Labels. "queries" counts those whose
    person is in the gallery; the others are left out. Raises UserError if nothing can be
    ranked."""
    Q, G = len(query.pid), len(gallery.pid)
    blocks = []
    for rows in torch.arange(Q).split(block):
        distance = distance_of(rows)
        # The smallest and the largest: if one distance is NaN, both are.
        if not torch.stack(distance.aminmax()).isfinite().all():
            raise UserError("the distances are not finite; the model's embeddings hold NaN or "
                            "infinity: train with a lower --lr or with --precision float32")
        match, valid = matches(query, gallery, rows)
        ranks, number = ranks_of_hits(distance, match.to(distance.device),
                                      valid.to(distance.device))
        blocks.append(scores_of_ranks(ranks, number).cpu())
    first, ap, inp = torch.cat(blocks, dim=1).double()    # (Q,) each
    kept = ~first.isnan()
    if not kept.any():
        raise UserError(f"none of {Q} queries has its person in the gallery of {G}; nothing to "
                        "rank: check the dataset with python data.py")
    results = {f"rank-{r}": (first[kept] <= r).double().mean().item() for r in RANKS if r <= G}
    results |= {"mAP": ap[kept].mean().item(), "mINP": inp[kept].mean().item()}
    return results | {"queries": int(kept.sum()), "gallery": G}


# ------------------------------------------------------------ re-ranking ----


def rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017): distance (N, N) of Q queries, then N - Q
    gallery tracklets -> (Q, N - Q).

    Who is near to whom, seen from both sides: a tracklet is described by its k-reciprocal
    neighbours, weighted by their distances, and two are compared by how far these descriptions
    overlap. Memory beside the distances: the result, V (sparse) and a few neighbours of each.
    The names are the paper's; N, Q and G are sizes."""
    N = len(distance)
    farthest = distance.amax(1).clamp(min=1e-6)    # each row is divided by its own largest
    needed = min(max(k1 + 1, k2), N)
    neighbours = distance.topk(needed, largest=False).indices    # (N, needed), the nearest first
    row, column = expanded_sets(neighbours, k1)
    V = gaussian_weights(distance, farthest, row, column)
    V = local_query_expansion(V, neighbours[:, :k2])
    result = jaccard_distances(V, Q)
    for rows in torch.arange(Q, device=distance.device).split(256):
        original = (distance[rows, Q:] / farthest[rows, None]).square()
        result[rows] = (1 - weight) * result[rows] + weight * original
    return result


def are_reciprocal(neighbours, k):
    """neighbours (N, K): each one's nearest -> (N, k) bool, [i, a]: is i among the k nearest of its
    a-th neighbour? The paper's R(i, k) are the neighbours of i of whom this is true."""
    nearest_k = neighbours[:, :k]
    theirs = nearest_k[nearest_k]    # (N, k, k): of i, of its a-th neighbour, the k nearest
    me = torch.arange(len(neighbours), device=neighbours.device)
    return (theirs == me[:, None, None]).any(2)


def expanded_sets(neighbours, k1):
    """neighbours (N, K) -> the paper's R*(i, k1) of all i, as pairs (2, E): i, and a member of its
    R*.

    R*(i) is R(i, k1) and every R(j, k1/2), j in R(i, k1), for which
    |R(i, k1) & R(j, k1/2)| > 2/3 |R(j, k1/2)|. Everyone is their own nearest: hence k1 + 1."""
    N, device = len(neighbours), neighbours.device
    k, half = min(k1 + 1, N), min(round(k1 / 2) + 1, N)
    in_R, in_R_half = are_reciprocal(neighbours, k), are_reciprocal(neighbours, half)
    pairs = []
    for rows in torch.arange(N, device=device).split(256):
        # R(i, k1) as a row of N: is_member[i, j].
        mine = neighbours[rows, :k]    # (b, k): the candidates j
        is_member = torch.zeros(len(rows), N, dtype=torch.bool, device=device)
        is_member.scatter_(1, mine, in_R[rows])
        # The k1/2 nearest of each candidate j, and which of them are in R(j, k1/2).
        theirs, is_theirs = neighbours[mine, :half], in_R_half[mine]    # (b, k, half)
        # |R(i, k1) & R(j, k1/2)| > 2/3 |R(j, k1/2)|
        is_common = is_member.gather(1, theirs.flatten(1)).view_as(theirs) & is_theirs
        overlaps = is_common.sum(2) > 2 / 3 * is_theirs.sum(2)    # (b, k)
        # R*(i): such an R(j, k1/2) joins, if j is in R(i, k1).
        joins = (in_R[rows] & overlaps)[:, :, None] & is_theirs
        is_member[joins.nonzero()[:, 0], theirs[joins]] = True
        row, column = is_member.nonzero(as_tuple=True)
        pairs.append(torch.stack([rows[row], column]))
    return torch.cat(pairs, dim=1)


def sparse(row, column, value, N):
    """V[row, column] = value, all else 0 -> (N, N), sparse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # torch calls its sparse tensors a beta version
        return torch.sparse_coo_tensor(torch.stack([row, column]), value, (N, N))


def gaussian_weights(distance, farthest, row, column):
    """The Gaussian kernel of the squared distances to the members of R*, each row's sum 1: V (N,
    N)."""
    value = torch.exp(-(distance[row, column] / farthest[row]).square())
    total = torch.zeros_like(farthest).index_add_(0, row, value)
    return sparse(row, column, value / total[row], len(distance))


def local_query_expansion(V, neighbours):
    """V (N, N) sparse, neighbours (N, k2) -> each row becomes the mean of its k2 nearest rows."""
    N, k2 = neighbours.shape
    row = torch.arange(N, device=V.device).repeat_interleave(k2)
    share = torch.full((N * k2,), 1 / k2, device=V.device)
    mean = sparse(row, neighbours.flatten(), share, N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse.mm(mean, V).coalesce()


def ranges(start, size):
    """start (n,), size (n,) -> size[0] numbers from start[0] on, then size[1] from start[1] on, ...
    [5, 0], [2, 3] -> 5 6 0 1 2."""
    # Range i begins at place cumsum - size of the result: 0 1 2 3 4 is shifted by 5 5 -2 -2 -2.
    shift = start - (size.cumsum(0) - size)
    return torch.arange(int(size.sum()), device=size.device) + shift.repeat_interleave(size)


def jaccard_distances(V, Q):
    """V (N, N) sparse, coalesced -> (Q, N - Q): 1 - sum of min(V[q], V[g]) / sum of max(V[q],
    V[g]).

    The rows of V sum to 1, so the maxima and the minima sum to 2 together. A minimum is above 0
    only in a column where both rows have an entry: so each entry of a query is compared with the
    gallery's entries of its column, and with nothing else."""
    N, G = len(V), len(V) - Q
    (row, column), value = V.indices(), V.values()    # (E,) each, row by row, the queries' first
    # The gallery's entries, column by column: `size` of them in a column, from `start` on.
    by_column = column.argsort(stable=True)
    by_column = by_column[row[by_column] >= Q]
    gallery_row, gallery_value = row[by_column] - Q, value[by_column]
    size = column[by_column].bincount(minlength=N)
    start = size.cumsum(0) - size
    result = torch.empty(Q, G, device=V.device)
    for first in range(0, Q, 64):    # few queries at a time: they stay in the processor's cache
        last = min(first + 64, Q)
        begin, end = torch.searchsorted(row, torch.tensor([first, last], device=V.device)).tolist()
        mine = column[begin:end]
        # (pairs,): each entry of the block with each of the gallery's entries of its column.
        # (Of sizes alone repeat_interleave gives 0 size[0] times, 1 size[1] times, ...)
        query_entry = begin + torch.repeat_interleave(size[mine])
        gallery_entry = ranges(start[mine], size[mine])
        smaller = torch.minimum(value[query_entry], gallery_value[gallery_entry])
        flat_index = (row[query_entry] - first) * G + gallery_row[gallery_entry]
        minima = torch.zeros(last - first, G, device=V.device)
        minima.view(-1).index_add_(0, flat_index, smaller)
        result[first:last] = 1 - minima / (2 - minima)
    return result


# ---------------------------------------------------------------- search ----


def nearest(query, piece, G, top, rows=1024):
    """query (Q, P, D) -> distances and indices (Q, top) of its nearest among G gallery tracklets,
    ascending; of equal ones the lower index first.

    piece(start, stop) -> gallery[start:stop], at most `rows` at a time: memory does not grow with
    G. Raises UserError for a distance that is not finite."""
    best = query.new_empty(len(query), 0)
    index = torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    with Bar("searching", G, hidden=rows >= G) as bar:
        for start in range(0, G, rows):
            stop = min(start + rows, G)
            distance = distances(query, piece(start, stop))
            if not distance.isfinite().all():
                raise UserError(f"a distance to the gallery's tracklets {start}..{stop - 1} is not "
                                "finite; expected finite embeddings: embed them again with a sound "
                                "checkpoint")
            number = torch.arange(start, stop, device=index.device).expand(len(query), -1)
            best, order = torch.cat([best, distance], dim=1).sort(dim=1, stable=True)
            index = torch.cat([index, number], dim=1).gather(1, order)
            best, index = best[:, :top], index[:, :top]
            bar.update(stop - start)
    return best, index


# -------------------------------------------------------------- FILE.npz ----

EMBEDDING = np.dtype("<f4")
# numpy's names of the types: "<U" text, "<i", "<u", "|i", "|u" whole numbers.
TEXT, WHOLE_NUMBERS = ("<U",), ("<i", "<u", "|i", "|u")
# name: (how its type's name begins, number of axes after the first).
COLUMNS = {"name": (TEXT, 0), "pid": (TEXT + WHOLE_NUMBERS, 0), "camera": (TEXT, 0),
           "modality": (TEXT, 0), "frame": (TEXT, 0), "shown": (TEXT, 1)}
HEADS = ("model", "setting")
LONGEST_TEXT = 2 ** 16    # characters; a path has 4,096 at most, or 32,767 on Windows


class StoredArray(NamedTuple):
    """An array as it lies in a file: its numbers from `offset` on, one row after the other."""
    dtype: np.dtype
    shape: tuple
    offset: int

    @property
    def row_bytes(self):
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def locate(file, entry):
    """An open FILE.npz and an entry of its zip -> StoredArray. Raises ValueError unless the entry
    lies whole in the file and the array ends where the entry ends; other errors where there is no
    array."""
    file.seek(entry.header_offset)
    # The entry's header: 30 bytes, then a name and an extra field. The last 4 bytes are the lengths
    # of these two.
    header = file.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:])
    begin = entry.header_offset + len(header) + name_length + extra_length
    end = begin + entry.file_size
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{entry.filename} is compressed")
    if end > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{entry.filename} is cut short")
    file.seek(begin)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{entry.filename} has another version")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    array = StoredArray(dtype, shape, file.tell())
    if fortran_order or dtype.hasobject or not shape or min(shape) < 1:
        raise ValueError(f"{entry.filename} is {dtype} {shape}")
    if array.offset + shape[0] * array.row_bytes != end:
        raise ValueError(f"{entry.filename} has another size than its header says")
    return array


def check_array(name, array, N):
    """Raises ValueError unless it is what write_gallery writes under that name for N tracklets."""
    kinds, more_axes = COLUMNS.get(name, (TEXT, 0))
    rows = N if name in COLUMNS else 1
    fits = array.shape[0] == rows and len(array.shape) == 1 + more_axes
    if not fits or not array.dtype.str.startswith(kinds):
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    if not 0 < array.dtype.itemsize <= 4 * LONGEST_TEXT:
        raise ValueError(f"{name} is text of {array.dtype.itemsize // 4:,} characters")


class StoredGallery:
    """FILE.npz of evaluate.py --save, read a piece at a time: np.load would read an array whole,
    and a large gallery's are larger than memory.

    .shape: (N, parts, dim) of the embeddings; .model: see fingerprint; .setting: what they were
    made of, in words. Whatever the file says is checked before it is believed. Raises UserError
    for any other file."""

    def __init__(self, path):
        self.path = path
        if not os.path.isfile(path):    # a pipe would be waited for, for ever
            raise self._refusal("no file")
        try:
            self.arrays = self._locate_all()
            self.shape = self.arrays["embedding"].shape
        except Exception as error:    # zipfile and numpy raise a dozen types for a crafted file
            raise self._refusal(f"{type(error).__name__}: {in_short(error, 80)}") from None
        self.model, self.setting = (self.rows(name, 0, 1).item() for name in HEADS)

    def _locate_all(self):
        """-> {name: StoredArray}. Raises errors of a dozen types."""
        with open(self.path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            found = sorted(entry.filename for entry in entries)
            expected = sorted(f"{name}.npy" for name in ("embedding", *COLUMNS, *HEADS))
            if found != expected:
                raise ValueError(f"it holds {' '.join(found)}")
            with warnings.catch_warnings():
                warnings.simplefilter("error")    # numpy would mend a header, and say so
                located = [locate(file, entry) for entry in entries]
        names = [entry.filename.removesuffix(".npy") for entry in entries]
        arrays = dict(zip(names, located, strict=True))
        embedding = arrays["embedding"]
        if embedding.dtype != EMBEDDING or len(embedding.shape) != 3:
            raise ValueError(f"embedding is {embedding.dtype} {embedding.shape}")
        for name in (*COLUMNS, *HEADS):
            check_array(name, arrays[name], N=embedding.shape[0])
        return arrays

    def _refusal(self, reason):
        return UserError(f"{self.path} holds no gallery ({reason}); expected a FILE.npz of "
                         "evaluate.py --save; make it again")

    def check_like(self, parts, dim):
        """Raises UserError unless its embeddings are (parts, dim), as those of the queries."""
        if self.shape[1:] != (parts, dim):
            raise self._refusal(f"embeddings {self.shape[1:]}, the queries' are {(parts, dim)}")

    def rows(self, name, start, stop):
        """Rows start..stop of an array, read from the file: what is not asked for is never in
        memory. Raises UserError where the file has become shorter, or a text is none."""
        array = self.arrays[name]
        shape = (stop - start, *array.shape[1:])
        count, offset = math.prod(shape), array.offset + start * array.row_bytes
        try:
            values = np.fromfile(self.path, array.dtype, count, offset=offset)
            if array.dtype.kind == "U" and values.view("<u4").max() > sys.maxunicode:
                raise ValueError("numbers that are no characters")
            return values.reshape(shape)
        except (OSError, ValueError) as error:
            raise self._refusal(f"{name}: {in_short(error, 80)}") from None


def write_gallery(file, columns, embeddings):
    """Writes a FILE.npz into an open binary file.

    columns: {"name", "pid", "camera", "modality", "frame" (the first), "shown" (some, for
    pictures): lists with an item for each tracklet; "model", "setting": lists of one item}.
    embeddings: yields each tracklet's (parts, dim); one at a time is in memory."""
    N = len(columns["name"])
    with zipfile.ZipFile(file, "w") as archive:    # stored, not compressed: it is read in place
        with archive.open("embedding.npy", "w", force_zip64=True) as member:
            for i, embedding in enumerate(embeddings):
                if i == 0:
                    header = {"descr": EMBEDDING.str, "fortran_order": False,
                              "shape": (N, *embedding.shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(embedding.numpy().astype(EMBEDDING).tobytes())
        for name, column in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.array(column), allow_pickle=False)


def fingerprint(model):
    """-> 64 hex digits, the same for the same tensors: has this model made the gallery? Distances
    between the embeddings of two models mean nothing."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
