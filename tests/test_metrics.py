"""evaluate.py, distances and metrics: golden values by hand, parity with a plain loop, and what must change nothing.

"Defect n" is the n-th of the list of what existing evaluators get wrong: 1 samples dropped, 2 fixed sizes and batches of one,
6 trapezoid average precision and lucky ties, 7 `cmc[19]` on small galleries and ragged rows, 8 features extracted twice.
"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import UserError, load_dataset, normalise, read_frame
from evaluate import evaluate
from ranking import distances, metrics
from layouts import tracks, write_hitsz

SCORES = ("rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP")
NAN, INF = math.nan, math.inf


def one_query(ranking, **cameras):
    """A query of identity 1 and a gallery given in order of distance, e.g. "101" for hit, miss, hit."""
    return metrics(torch.arange(len(ranking)).float()[None], [1], [1 if hit == "1" else 2 for hit in ranking], **cameras)


def plain_metrics(distance, query_pid, gallery_pid, query_camera=None, gallery_camera=None):
    """The definition, one query at a time: rank by distance, wrong ones first among equals, the ignored left out."""
    found, ranks = [], (1, 5, 10, 20)
    for q, row in enumerate(distance.tolist()):
        ranking = sorted((d, gallery_pid[g] == query_pid[q]) for g, d in enumerate(row) if query_camera is None
                         or (gallery_pid[g], gallery_camera[g]) != (query_pid[q], query_camera[q]))
        hits = [place for place, (_, match) in enumerate(ranking, start=1) if match]
        if hits:
            found.append([hits[0] <= r for r in ranks] + [np.mean([n / place for n, place in enumerate(hits, start=1)]),
                                                          len(hits) / hits[-1]])
    return {**dict(zip(SCORES, np.mean(found, axis=0))), "queries": len(found), "gallery": distance.shape[1]}


def crowd(seed, queries=37, gallery=61, pids=9, levels=25):
    """Random distances on few levels, so with many ties, pids and cameras -> arguments of metrics; pid 99 has no match."""
    rng = np.random.default_rng(seed)
    distance = torch.as_tensor(rng.integers(0, levels, (queries, gallery)) / 8, dtype=torch.float32)
    query_pid = rng.integers(1, pids, queries).tolist()
    query_pid[5] = 99
    cameras = [[f"D{camera}" for camera in rng.integers(1, 4, n)] for n in (queries, gallery)]
    return [distance, query_pid, rng.integers(1, pids, gallery).tolist(), *cameras]


# ---------------------------------------------------------------------------------------------------- by hand

@pytest.mark.parametrize("ranking, rank1, rank5, AP, INP", [
    ("101", 1, 1, 5 / 6, 2 / 3),                             # trapezoids would give 0.79 (defect 6)
    ("1", 1, 1, 1, 1), ("01", 0, 1, 1 / 2, 1 / 2), ("110", 1, 1, 1, 1), ("000001", 0, 0, 1 / 6, 1 / 6),
    ("0110", 0, 1, (1 / 2 + 2 / 3) / 2, 2 / 3), ("10001", 1, 1, (1 + 2 / 5) / 2, 2 / 5)])
def test_one_query_by_hand(ranking, rank1, rank5, AP, INP):
    """Average precision is the mean of precision at each hit; galleries of 1 to 6 have a rank-20 (defect 7)."""
    result = one_query(ranking)
    assert set(result) == {*SCORES, "queries", "gallery"}
    assert [result[k] for k in SCORES] == pytest.approx([rank1, rank5, 1, 1, AP, INP], abs=1e-6)
    assert (result["queries"], result["gallery"]) == (1, len(ranking))


@pytest.mark.parametrize("place, reached", [(1, "1111"), (2, "0111"), (5, "0111"), (6, "0011"), (10, "0011"), (11, "0001"),
                                            (20, "0001"), (21, "0000")])
def test_rank_k_counts_the_first_k(place, reached):
    """The hit at place k counts for rank-k and not for rank-(k-1)."""
    result = one_query("0" * (place - 1) + "1" + "0" * 5)
    assert [result[k] for k in SCORES[:4]] == [float(c) for c in reached]


def test_tie_counts_against_the_query():
    """Defect 6: wrong, right at equal distance is a miss whichever stands first; so is a tie further down."""
    for gallery_pid in [1, 2], [2, 1]:
        result = metrics(torch.ones(1, 2), [1], gallery_pid)
        assert (result["rank-1"], result["mAP"], result["mINP"]) == (0, 0.5, 0.5)
    for gallery_pid in [1, 2, 1, 3], [1, 1, 3, 2], [1, 3, 2, 1]:
        result = metrics(torch.tensor([[0.0, 0.5, 0.5, 0.5]]), [1], gallery_pid)
        assert (result["rank-1"], result["mAP"], result["mINP"]) == pytest.approx((1, (1 + 2 / 4) / 2, 2 / 4))
    assert metrics(torch.ones(1, 3), [1], [1, 1, 1])["mAP"] == 1                # a tie among matches harms no one


def test_same_identity_and_camera_is_ignored():
    """Such an item is neither hit nor miss; the same camera alone, or the same identity alone, is not ignored."""
    ignored = one_query("1101", query_camera=["D1"], gallery_camera=["D1", "D2", "D1", "D3"])
    assert [ignored[k] for k in ("rank-1", "mAP", "mINP")] == pytest.approx([1, 5 / 6, 2 / 3])
    ignored = one_query("101", query_camera=["D1"], gallery_camera=["D1", "D1", "D2"])
    assert [ignored[k] for k in ("rank-1", "mAP", "mINP", "gallery")] == pytest.approx([0, 1 / 2, 1 / 2, 3])
    assert one_query("101")["mAP"] == pytest.approx(5 / 6)


def test_queries_without_a_match_are_left_out_and_counted_so():
    """Query 2 has no match at all, query 3 only an ignored one: the means are over query 1."""
    result = metrics(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]), [1, 9, 2], [2, 1], ["D1", "D1", "D2"], ["D2", "D2"])
    assert [result[k] for k in ("rank-1", "rank-5", "mAP", "mINP", "queries", "gallery")] == [0, 1, 0.5, 0.5, 1, 2]
    with pytest.raises(UserError):
        metrics(torch.rand(2, 3), [1, 2], [3, 4, 5])
    with pytest.raises(UserError):
        metrics(torch.rand(1, 2), [1], [1, 2], ["D1"], ["D1", "D1"])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_distances_are_refused(value):
    """One is enough, wherever it is: a diverged model gets an error and no score."""
    for place in (0, 0), (2, 3):
        distance = torch.rand(3, 4)
        distance[place] = value
        with pytest.raises(UserError):
            metrics(distance, [1, 2, 3], [1, 2, 3, 4])


# ------------------------------------------------------------------------------------------ parity, invariance

@pytest.mark.parametrize("seed, sizes", [(0, {}), (1, dict(levels=2)), (2, dict(levels=10**6)), (3, dict(gallery=7, pids=3)),
                                         (4, dict(queries=6, gallery=1, pids=2)), (5, dict(queries=150, gallery=400, pids=40)),
                                         (6, dict(queries=2100, gallery=20))])
@pytest.mark.parametrize("ignore", [False, True])
def test_equals_the_plain_loop(seed, sizes, ignore):
    """Ties, ignored items (so rows of unequal length, defect 7), queries without a match, any size (defect 2)."""
    arguments = crowd(seed, **sizes)
    if not ignore:
        arguments = arguments[:3]
    elif sizes.get("gallery") == 1:
        arguments[4] = ["D9"]                                # else its one item is ignored for some and nothing is left
    assert metrics(*arguments) == pytest.approx(plain_metrics(*arguments), abs=1e-6)


def test_order_of_gallery_and_queries_changes_nothing():
    """With ties in every row, for five shuffles of both."""
    distance, query_pid, gallery_pid, query_camera, gallery_camera = crowd(0)
    expected = metrics(distance, query_pid, gallery_pid, query_camera, gallery_camera)
    assert 0 < expected["mAP"] < 1
    for seed in range(5):
        q, g = (np.random.default_rng(seed).permutation(n) for n in distance.shape)
        pick = lambda values, order: [values[i] for i in order]
        assert metrics(distance[q][:, g], pick(query_pid, q), pick(gallery_pid, g), pick(query_camera, q),
                       pick(gallery_camera, g)) == pytest.approx(expected, abs=1e-6)


def test_any_sequences_and_no_side_effects():
    """Lists, tuples, arrays and tensors of pids and cameras, numbers or names; the distances stay as they were."""
    arguments = crowd(0)
    expected, before = metrics(*arguments), arguments[0].clone()
    numbers = [[int(camera[1:]) for camera in cameras] for cameras in arguments[3:]]
    for kind in tuple, np.array, torch.tensor:
        assert metrics(arguments[0], *map(kind, arguments[1:3]), *map(kind, numbers)) == expected
    assert metrics(arguments[0], *map(np.array, arguments[1:])) == expected
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize("sizes", [(5, 30), (37, 61), (300, 700)])
def test_constant_features_score_as_badly_as_possible(sizes):
    """Defect 6, from features to scores: every wrong item ranks before every right one, in any order of the gallery."""
    queries, gallery = sizes
    features = torch.linspace(-1.7, 2.3, 2 * 24).view(1, 2, 24)
    distance = distances(features.repeat(queries, 1, 1), features.repeat(gallery, 1, 1))
    gallery_pid = sorted(i % 5 for i in range(gallery))                     # the matches of identity 0 come first
    result, n = metrics(distance, [0] * queries, gallery_pid), gallery_pid.count(0)
    assert result["rank-1"] == 0 and result["mINP"] == pytest.approx(n / gallery)
    assert result["mAP"] == pytest.approx(np.mean([k / (gallery - n + k) for k in range(1, n + 1)]), abs=1e-6)


# --------------------------------------------------------------------------------------------------- distances

def features(n, parts, dim, seed):
    return torch.randn(n, parts, dim, generator=torch.Generator().manual_seed(seed))


def test_distance_by_hand():
    """Mean over parts of the Euclidean distance: (5 + 13) / 2, not the distance of the concatenation."""
    query, gallery = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [5.0, 12.0]], [[0.0, 0.0], [0.0, 1.0]]])
    assert distances(query, gallery).tolist() == [[9.0, 0.5]]


@pytest.mark.parametrize("Q, G, P, D", [(1, 1, 1, 1), (1, 26, 3, 8), (30, 1, 2, 5), (26, 40, 70, 4), (700, 900, 2, 8),
                                         (3, 2000, 5, 4)])
def test_distances_equal_a_plain_loop(Q, G, P, D):
    """Any sizes (defect 2), whatever is computed at a time; the two arguments stay as they were."""
    query, gallery = features(Q, P, D, 0), features(G, P, D, 1)
    copies = query.clone(), gallery.clone()
    found = distances(query, gallery)
    expected = sum(((query[:, None, p].double() - gallery[None, :, p].double()) ** 2).sum(-1).sqrt() for p in range(P)) / P
    assert found.shape == (Q, G) and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(query, copies[0]) and torch.equal(gallery, copies[1])


@pytest.mark.parametrize("n", [1, 7, 25])
def test_identical_features_are_at_distance_0(n):
    """Exactly 0 for few rows, and far rows stay far; features of usual size."""
    same = features(n, 3, 256, 0) * 5 + 2
    found = distances(same, same.clone())
    assert (found.diagonal() == 0).all() and (found[~torch.eye(n, dtype=torch.bool)] > 10).all()


@pytest.mark.parametrize("Q, G", [(20, 22), (150, 260)])
def test_a_shift_of_all_features_changes_nothing(Q, G):
    """|a|^2 + |b|^2 - 2ab loses its digits when features lie far from 0; ours must not."""
    query, gallery = features(Q, 2, 64, 0), features(G, 2, 64, 1)
    shift = 30 * features(1, 2, 64, 2)
    assert torch.allclose(distances(query + shift, gallery + shift), distances(query, gallery), rtol=1e-4, atol=0)


def test_close_neighbours_keep_their_order():
    """Among 300 rows, copies moved by 0.01 and by 0.02 are found first and second."""
    query = features(300, 2, 64, 0)
    step = torch.nn.functional.normalize(features(300, 2, 64, 1), dim=-1)
    found = distances(query, torch.cat([query + 0.02 * step, query + 0.01 * step]))
    nearest = found.topk(2, largest=False).indices
    assert torch.equal(nearest, torch.stack([torch.arange(300) + 300, torch.arange(300)], dim=1))


# -------------------------------------------------------------------------------------------------- evaluation

class Averages(torch.nn.Module):
    """A model whose embedding is known: mean and deviation of each channel, (B, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def embed(self, frames, modality):
        self.seen += modality.tolist()
        return torch.stack([frames.mean((1, 3, 4)), frames.std((1, 3, 4))], dim=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load_dataset(write_hitsz(root, train=tracks((1,), each=1), test=tracks((21, 22, 23, 24, 25))))


@pytest.mark.parametrize("batch", [8, 13, 64])
def test_each_tracklet_is_embedded_once_for_both_directions(small, batch):
    """Defects 1, 2 and 8: 40 tracklets in batches of 8 (none left over), of 13 (a last one of one), of 64 (all at once)."""
    model, config = Averages(), SimpleNamespace(size=(32, 16), frames=2, test_batch=batch, workers=0)
    results, embeddings, _ = evaluate(model, small, config, torch.device("cpu"))
    assert model.seen == [int(t.modality == "infrared") for t in small.test]
    frames = torch.stack([torch.stack([read_frame(t.frames[i], (32, 16)) for i in (0, 6)]) for t in small.test])
    expected = Averages().embed(normalise(frames), torch.zeros(40))
    assert torch.allclose(embeddings, expected, atol=1e-5)
    for direction, parts in small.directions.items():
        pids, cameras = ([[getattr(small.test[i], name) for i in part] for part in parts] for name in ("pid", "camera"))
        distance = sum((expected[parts[0], p][:, None] - expected[parts[1], p][None]).norm(dim=-1) for p in (0, 1)) / 2
        assert results["directions"][direction] == pytest.approx(plain_metrics(distance, *pids, *cameras), abs=1e-6)
