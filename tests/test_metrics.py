"""Distances, scores and re-ranking: by hand, against plain loops, and what must change nothing."""
import math
from dataclasses import replace
from types import SimpleNamespace

from data import Tracklet, load_dataset, normalise
from evaluate import RANKS, clips, distances, embed_tracklets, evaluate, labels_of, rerank, score
from layouts import tracks, write_hitsz
from support.files import UserError
from support.footage import read_frame
from support.method import Method

import numpy as np
import pytest
import torch

# ---------------------------------------------------------------- scores ----

def one_query(ranking):
    """The gallery by distance, such as "101" for hit, miss, hit."""
    match = np.array([[letter == "1" for letter in ranking]])
    return score(np.arange(len(ranking))[None], match, np.ones_like(match))


@pytest.mark.parametrize("ranking, rank_1, AP, INP", [
    ("101", 1, 5 / 6, 2 / 3), ("01", 0, 1 / 2, 1 / 2), ("0110", 0, 7 / 12, 2 / 3)])
def test_one_query_by_hand(ranking, rank_1, AP, INP):
    result = one_query(ranking)
    found = result["rank-1"], result["mAP"], result["mINP"]
    assert found == pytest.approx((rank_1, AP, INP))


def test_rank_k_counts_the_first_k_of_galleries_of_at_least_k():
    small, large = one_query("000001" + "0" * 13), one_query("000001" + "0" * 14)
    assert (small["rank-1"], small["rank-5"], small["rank-10"]) == (0, 0, 1)
    assert "rank-20" not in small and large["rank-20"] == 1


def plain_score(distance, match, valid):
    """The definition, one query at a time: by distance, of equal ones the wrong ones first."""
    found, G = [], distance.shape[1]
    for q, row in enumerate(distance.tolist()):
        ranking = sorted((d, match[q, g]) for g, d in enumerate(row) if valid[q, g])
        hits = [place for place, (_, is_hit) in enumerate(ranking, start=1) if is_hit]
        if hits:
            AP = np.mean([n / place for n, place in enumerate(hits, start=1)])
            found.append([hits[0], AP, len(hits) / hits[-1]])
    first, AP, INP = np.transpose(found)
    ranks = {f"rank-{r}": np.mean(first <= r) for r in RANKS if r <= G}
    means = {"mAP": AP.mean(), "mINP": INP.mean()}
    return ranks | means | {"queries": len(found), "gallery": G}


def crowd(seed, Q=8):
    """A random case with many ties; some right ones do not count, some queries have no answer."""
    rng = np.random.default_rng(seed)
    G = rng.integers(2, 40)
    distance = rng.integers(0, rng.choice([2, 5, 1000]), (Q, G)) / 8
    match = rng.random((Q, G)) < 0.2
    valid = ~match | (rng.random((Q, G)) < 0.6)
    match[0, 0] = valid[0, 0] = True    # one query has an answer
    return distance, match, valid


def test_score_equals_the_plain_loop():
    for seed in range(200):
        case = crowd(seed)
        assert score(*case) == pytest.approx(plain_score(*case)), seed
    case = crowd(0, Q=700)    # more queries than a block
    assert score(*case) == pytest.approx(plain_score(*case))


def test_the_order_of_the_gallery_changes_nothing():
    for seed in range(50):
        case = crowd(seed)
        order = np.random.default_rng(seed).permutation(case[0].shape[1])
        found = score(*(array[:, order] for array in case))
        assert found == pytest.approx(score(*case))


def test_a_tie_counts_against_the_query():
    right = np.array([[True, False], [False, True]])    # whichever stands first
    result = score(np.ones((2, 2)), right, np.ones_like(right))
    assert (result["rank-1"], result["mAP"], result["mINP"]) == (0, 0.5, 0.5)


def test_constant_features_score_as_badly_as_possible():
    same = torch.full((300, 2, 24), 1.7)
    distance = distances(same, same[:40]).numpy()
    right = np.tile(np.arange(40) < 2, (300, 1))    # the first two
    result = score(distance, right, np.ones_like(right))
    assert result["rank-1"] == 0
    assert result["mAP"] == pytest.approx((1 / 39 + 2 / 40) / 2)
    assert result["mINP"] == pytest.approx(2 / 40)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_distance_that_is_not_finite_is_refused(value):
    distance = np.ones((3, 4))
    distance[2, 3] = value
    with pytest.raises(UserError):
        score(distance, np.eye(3, 4) > 0, np.ones((3, 4), bool))


# ------------------------------------------------------------- distances ----

def features(n, parts, dim, seed):
    return torch.randn(n, parts, dim, generator=torch.Generator().manual_seed(seed))


def plain_distances(query, gallery):
    return (query[:, None].double() - gallery[None].double()).norm(dim=-1).mean(-1)


def test_a_distance_by_hand():
    """The mean over parts, not the distance of the concatenation; of streams, over all parts."""
    gallery = torch.tensor([[[3.0, 4.0], [5.0, 12.0]], [[0.0, 0.0], [0.0, 1.0]]])
    query = torch.zeros(1, 2, 2)
    assert distances(query, gallery).tolist() == [[(5 + 13) / 2, 1 / 2]]
    other = torch.tensor([[[2.0, 2.0, 1.0]], [[0.0, 0.0, 6.0]]])
    queries = {"a": query, "b": torch.zeros(1, 1, 3)}
    found = distances(queries, {"a": gallery, "b": other})
    assert found.tolist() == [pytest.approx([(5 + 13 + 3) / 3, (0 + 1 + 6) / 3])]


@pytest.mark.parametrize("Q, G, P, D", [(1, 26, 3, 1), (26, 40, 70, 4), (600, 300, 2, 8)])
def test_distances_equal_a_plain_loop(Q, G, P, D):
    """Far from 0 as well, where |a|^2 + |b|^2 - 2ab would lose its digits."""
    query, gallery = features(Q, P, D, 0), features(G, P, D, 1)
    for shift in 0, 100:
        found = distances(query + shift, gallery + shift).double()
        assert torch.allclose(found, plain_distances(query, gallery), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------ re-ranking ----

def literal_rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """The paper's sets and sums, one after the other, in float64."""
    d = (distance.astype(np.float64) / distance.max(1, keepdims=True)) ** 2
    nearest, N = d.argsort(1), len(d)

    def R(i, k):
        return {j for j in nearest[i, :k + 1] if i in nearest[j, :k + 1]}

    V = np.zeros((N, N))
    for i in range(N):
        near = wide = R(i, k1)
        for j in near:
            half = R(j, round(k1 / 2))
            if len(half & near) > 2 / 3 * len(half):
                wide = wide | half
        for j in wide:
            V[i, j] = np.exp(-d[i, j])
        V[i] /= V[i].sum()
    V = np.stack([V[nearest[i, :k2]].mean(0) for i in range(N)])
    query, gallery = V[:Q, None], V[None, Q:]
    jaccard = 1 - np.minimum(query, gallery).sum(2) / np.maximum(query, gallery).sum(2)
    return (1 - weight) * jaccard + weight * d[:Q, Q:]


def test_rerank_by_hand():
    """On a line, the query at 0, the gallery at 1, 10 and 12. With k1 = 1 there are two pairs."""
    places = np.array([0, 1, 10, 12], np.float32)
    a, b = np.exp(-1 / 144), np.exp(-1 / 121)    # the neighbour's weight, seen from 0 and from 1
    common = b / (1 + b) + a / (1 + a)
    first = 0.7 * (1 - common / (2 - common)) + 0.3 / 144
    found = rerank(abs(places[:, None] - places), 1, k1=1, k2=1)
    assert np.allclose(found, [[first, 0.7 + 0.3 * 100 / 144, 1]], atol=1e-5)


@pytest.mark.parametrize("Q, G, options", [
    (25, 75, {}), (1, 1, {}), (4, 9, {}), (8, 40, {"k1": 1000}),
    (7, 33, {"k1": 5, "k2": 2, "weight": 0.5}), (12, 50, {"k1": 11, "k2": 1})])
def test_rerank_equals_the_literal_loops(Q, G, options):
    people = 2 * features(7, 1, 4, seed=0)
    points = people[torch.arange(Q + G) % 7] + features(Q + G, 1, 4, seed=1)
    distance = distances(points, points).numpy()
    found = rerank(distance, Q, **options)
    assert np.allclose(found, literal_rerank(distance, Q, **options), atol=1e-5)


# ------------------------------------------------------------ evaluation ----

CONFIG = SimpleNamespace(size=(32, 16), frames=2, test_frames=0, frame_rule="", test_batch=13,
                         workers=0)


class Averages(Method):
    """A method whose embedding is known: mean and deviation of each channel, (B, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.unused, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def embed(self, frames, modality):
        self.seen += modality.tolist()
        return torch.stack([frames.mean((1, 3, 4)), frames.std((1, 3, 4))], dim=1)

    def streams_of(self, embeddings):
        return {"mean": embeddings[:, :1], "deviation": embeddings[:, 1:]}


class Apart(Averages):
    """The same as {stream: tensor}."""

    def embed(self, frames, modality):
        return Averages.streams_of(self, super().embed(frames, modality))

    streams_of = Method.streams_of


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load_dataset(write_hitsz(root, train=tracks((1, 2), each=1), test=tracks(range(21, 26))))


@pytest.mark.parametrize("method", [Averages, Apart])
def test_one_embedding_of_each_tracklet_serves_both_directions_and_each_stream(method, small):
    model = method()
    results, _, _ = evaluate(model, small, CONFIG)
    assert model.seen == [int(t.modality == "infrared") for t in small.test]
    frames = [[read_frame(t.frames[i], (32, 16)) for i in (0, 6)] for t in small.test]
    frames = normalise(torch.stack([torch.stack(own) for own in frames]))
    wanted = Averages().embed(frames, torch.zeros(len(frames)))
    for direction, (query, gallery) in small.directions.items():
        for stream, parts in (None, [0, 1]), ("mean", [0]), ("deviation", [1]):
            found = results["streams"][stream] if stream else results["directions"]
            distance = plain_distances(wanted[query][:, parts], wanted[gallery][:, parts])
            expected = plain_score(distance, *labels_of(small, direction))
            assert found[direction] == pytest.approx(expected, abs=1e-6)


def test_the_same_person_before_the_same_camera_counts_unless_the_dataset_says_no(small):
    direction = "visible->infrared"
    match, valid = labels_of(small, direction)
    queries, gallery = ([small.test[i] for i in side] for side in small.directions[direction])
    for q, t in enumerate(queries):
        assert match[q].tolist() == [t.pid == u.pid for u in gallery]
        same = [t.pid == u.pid and t.camera == u.camera for u in gallery]
        assert (~valid[q]).tolist() == same and any(same)
    _, valid = labels_of(replace(small, ignore_same_camera=False), direction)
    assert valid.all()


@pytest.mark.parametrize("n, T", [(12, 6), (13, 6), (3, 6)])
def test_clips_hold_every_frame(n, T):
    found = [clip.frames for clip in clips(Tracklet(tuple(range(n)), 7, "D3", "infrared"), T)]
    assert np.shape(found) == (math.ceil(n / T), T)
    assert set(np.ravel(found)) == set(range(n))


def test_all_frames_is_the_mean_over_clips(small):
    """Of 12 frames, two at a time: each frame counts once."""
    short = replace(small.test[1], frames=small.test[1].frames[:2])
    tracklets = [small.test[0], short]
    found = embed_tracklets(Averages(), tracklets, CONFIG, all_frames=True)
    for embedding, tracklet in zip(found, tracklets, strict=True):
        frames = torch.stack([read_frame(frame, (32, 16)) for frame in tracklet.frames])
        assert torch.allclose(embedding[0], normalise(frames).mean((0, 2, 3)), atol=1e-5)
