"""Distances, scores and re-ranking: by hand, against plain loops, and what must change nothing."""
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

from data import load_dataset
from evaluate import RANKS, distances, evaluate, labels_of, rerank, score
from layouts import tracks, write_hitsz
from support.files import UserError
from support.footage import normalise, read_frame
from support.method import Method

import numpy as np
import pytest
import torch


def one_query(ranking):
    """The gallery by distance, such as "101" for hit, miss, hit."""
    match = np.array([[letter == "1" for letter in ranking]])
    return score(np.arange(len(ranking))[None], match, np.ones_like(match))


def test_scores_by_hand():
    """Hit, miss, hit: precision 1 and 2/3. Rank-k counts the first k, if there are as many."""
    assert one_query("101")["mAP"] == pytest.approx(5 / 6)
    found = one_query("0000010000000000000")
    assert (found["rank-1"], found["rank-5"], found["rank-10"]) == (0, 0, 1)
    assert "rank-20" not in found
    assert one_query("00000000000000000001")["rank-20"] == 1


def plain_score(distance, match, valid):
    """The definition, one query at a time: by distance, of equal ones the wrong ones first."""
    found, G = [], distance.shape[1]
    for q, row in enumerate(distance.tolist()):
        ranking = sorted((d, match[q, g]) for g, d in enumerate(row) if valid[q, g])
        hits = [place for place, (_, is_hit) in enumerate(ranking, 1) if is_hit]
        if hits:
            AP = np.mean([n / place for n, place in enumerate(hits, 1)])
            found.append([hits[0], AP, len(hits) / hits[-1]])
    first, AP, INP = np.transpose(found)
    ranks = {f"rank-{r}": np.mean(first <= r) for r in RANKS if r <= G}
    return ranks | {"mAP": AP.mean(), "mINP": INP.mean(), "queries": len(found), "gallery": G}


def crowd(seed, Q):
    """A random case with many ties; some right ones do not count, some queries have no answer."""
    rng = np.random.default_rng(seed)
    G = rng.integers(2, 40)
    distance = rng.integers(0, rng.choice([2, 5, 1000]), (Q, G)) / 8
    match = rng.random((Q, G)) < rng.choice([0, 0.2])
    valid = ~match | (rng.random((Q, G)) < 0.6)
    match[0, 0] = valid[0, 0] = True    # this one has an answer
    return distance, match, valid


def test_score_equals_the_plain_loop_in_any_order_of_the_gallery():
    for seed in range(200):
        case = crowd(seed, 600 if seed < 5 else 8)    # 600: more than a block
        wanted = pytest.approx(plain_score(*case))
        assert score(*case) == wanted, seed
        order = np.random.default_rng(seed).permutation(case[0].shape[1])
        assert score(*(array[:, order] for array in case)) == wanted, seed


def test_a_tie_counts_against_the_query():
    """Constant features score as badly as possible."""
    same = torch.full((300, 2, 24), 1.7)
    distance = distances(same, same[:64]).numpy()
    right = np.tile(np.arange(64) < 2, (300, 1))    # the first two
    result = score(distance, right, np.ones_like(right))
    assert (result["rank-1"], result["mINP"]) == (0, 2 / 64)
    assert result["mAP"] == pytest.approx((1 / 63 + 2 / 64) / 2)


def test_a_distance_that_is_not_finite_is_refused():
    for value in math.nan, math.inf:
        with pytest.raises(UserError):
            score(np.array([[value, 1.0]]), np.eye(1, 2) > 0, np.eye(1, 2) == 0)


def features(n, parts, dim, seed):
    return torch.randn(n, parts, dim, generator=torch.Generator().manual_seed(seed))


def plain_distances(query, gallery):
    return (query[:, None].double() - gallery[None].double()).norm(dim=-1).mean(-1)


def test_a_distance_by_hand():
    """The mean over parts, not the distance of the concatenation."""
    gallery = torch.tensor([[[3.0, 4.0], [5.0, 12.0]]])
    assert distances(0 * gallery, gallery).item() == (5 + 13) / 2


def test_distances_equal_a_plain_loop():
    """Far from 0 as well, where |a|^2 + |b|^2 - 2ab would lose its digits."""
    query, gallery = features(600, 7, 8, seed=0), features(300, 7, 8, seed=1)
    for shift in 0, 100:
        found = distances(query + shift, gallery + shift).double()
        assert torch.allclose(found, plain_distances(query, gallery), rtol=1e-3, atol=1e-4)


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
        wide = list(wide)
        V[i, wide] = np.exp(-d[i, wide]) / np.exp(-d[i, wide]).sum()
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
    assert np.allclose(found, [[first, 0.7 + 0.3 * 100 / 144, 1]])


@pytest.mark.parametrize("Q, G, options", [
    (25, 75, {}), (4, 9, {}), (7, 33, {"k1": 5, "k2": 2, "weight": 0.5})])
def test_rerank_equals_the_literal_loops(Q, G, options):
    people = 2 * features(7, 1, 4, seed=0)
    points = people[torch.arange(Q + G) % 7] + features(Q + G, 1, 4, seed=1)
    distance = distances(points, points).numpy()
    found = rerank(distance, Q, **options)
    expected = literal_rerank(distance, Q, **options)
    assert np.allclose(found, expected, atol=1e-5)


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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return load_dataset(write_hitsz(root, train=tracks((1, 2), each=1), test=tracks(range(21, 26))))


def test_one_embedding_of_each_tracklet_serves_both_directions_and_each_stream(small):
    model = Averages()
    results, _ = evaluate(model, small, CONFIG)
    assert model.seen == [int(t.modality == "infrared") for t in small.test]
    paths = [path for t in small.test for path in (t.frames[0], t.frames[6])]
    frames = normalise(torch.stack([read_frame(path, (32, 16)) for path in paths]))
    wanted = Averages().embed(frames.unflatten(0, (-1, 2)), torch.zeros(1))
    parts = {"whole": [0, 1], "mean": [0], "deviation": [1]}
    found = {"whole": results["directions"], **results["streams"]}
    for name, (direction, (query, gallery)) in product(parts, small.directions.items()):
        own = wanted[:, parts[name]]
        distance = plain_distances(own[query], own[gallery])
        expected = plain_score(distance, *labels_of(small, direction))
        assert found[name][direction] == pytest.approx(expected, abs=1e-6)


def test_the_same_person_before_the_same_camera_is_ignored_if_the_dataset_says_so(small):
    query, gallery = small.directions["visible->infrared"]
    match, valid = labels_of(small, "visible->infrared")
    for q, g in np.ndindex(match.shape):
        t, u = small.test[query[q]], small.test[gallery[g]]
        assert match[q, g] == (t.pid == u.pid)
        assert valid[q, g] == (t.pid != u.pid or t.camera != u.camera)
    assert not valid.all()
    _, valid = labels_of(replace(small, ignore_same_camera=False), "visible->infrared")
    assert valid.all()
