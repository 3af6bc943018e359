"""Distances, ranks and metrics, and evaluate.py's use of them: golden values by hand, parity with a
plain loop, and what must change nothing.

"Defect n" is the n-th of the list of what existing evaluators get wrong: 1 samples dropped, 2
fixed sizes and batches of one, 6 trapezoid average precision and lucky ties, 7 `cmc[19]` on small
galleries and ragged rows, 8 features extracted twice.
"""
import math
from types import SimpleNamespace

from data import load_dataset, normalise
from evaluate import evaluate, table
from layouts import tracks, write_hitsz
from support.files import UserError
from support.footage import read_frame
from support.ranking import Labels, as_integers, distances, score

import numpy as np
import pytest
import torch

RANKS = (1, 5, 10, 20)
NAN, INF = math.nan, math.inf


def ranks_of(gallery):
    """The results that a gallery of that size has: no rank is larger than it."""
    return [f"rank-{r}" for r in RANKS if r <= gallery]


def metrics(distance, query_pid, gallery_pid, query_camera=None, gallery_camera=None):
    """score for a whole matrix (Q, G) and plain sequences. With cameras given, gallery tracklets of
    the query's pid and camera are ignored."""
    def integers(query, gallery):
        both = np.concatenate([np.asarray(query), np.asarray(gallery)])
        return as_integers(both).split([len(query), len(gallery)])

    query_pid, gallery_pid = integers(query_pid, gallery_pid)
    if query_camera is not None:
        query_camera, gallery_camera = integers(query_camera, gallery_camera)
    query, gallery = Labels(query_pid, query_camera), Labels(gallery_pid, gallery_camera)
    return score(lambda rows: distance[rows], query, gallery)


def values(result, *names):
    return [result[name] for name in names]


def one_query(ranking, **cameras):
    """A query of identity 1, a gallery in order of distance, such as "101" for hit, miss, hit."""
    distance = torch.arange(len(ranking)).float()[None]
    gallery_pid = [1 if letter == "1" else 2 for letter in ranking]
    return metrics(distance, [1], gallery_pid, **cameras)


def plain_metrics(distance, query_pid, gallery_pid, query_camera=None, gallery_camera=None):
    """The definition, one query at a time: rank by distance, wrong ones first among equals, the
    ignored left out."""
    gallery = distance.shape[1]
    names = [*ranks_of(gallery), "mAP", "mINP"]
    found = []
    for q, row in enumerate(distance.tolist()):
        ranking = []
        for g, d in enumerate(row):
            match = gallery_pid[g] == query_pid[q]
            ignored = query_camera is not None and match and gallery_camera[g] == query_camera[q]
            if not ignored:
                ranking.append((d, match))
        ranking.sort()
        hits = [place for place, (_, match) in enumerate(ranking, start=1) if match]
        if hits:
            reached = [hits[0] <= r for r in RANKS if r <= gallery]
            AP = np.mean([n / place for n, place in enumerate(hits, start=1)])
            found.append([*reached, AP, len(hits) / hits[-1]])
    means = np.mean(found, axis=0)
    return {**dict(zip(names, means, strict=True)), "queries": len(found), "gallery": gallery}


def crowd(seed, queries=37, gallery=61, pids=9, levels=25):
    """Random distances on few levels, so with many ties, pids and cameras -> arguments of metrics;
    pid 99 has no match."""
    rng = np.random.default_rng(seed)
    distance = rng.integers(0, levels, (queries, gallery)) / 8
    query_pid = rng.integers(1, pids, queries).tolist()
    query_pid[5] = 99
    cameras = [[f"D{camera}" for camera in rng.integers(1, 4, n)] for n in (queries, gallery)]
    gallery_pid = rng.integers(1, pids, gallery).tolist()
    return [torch.as_tensor(distance, dtype=torch.float32), query_pid, gallery_pid, *cameras]


# --------------------------------------------------------------- by hand ----

@pytest.mark.parametrize("ranking, rank1, rank5, AP, INP", [
    ("101", 1, None, 5 / 6, 2 / 3),    # trapezoids would give 0.79 (defect 6)
    ("1", 1, None, 1, 1),
    ("01", 0, None, 1 / 2, 1 / 2),
    ("110", 1, None, 1, 1),
    ("000001", 0, 0, 1 / 6, 1 / 6),
    ("0110", 0, None, (1 / 2 + 2 / 3) / 2, 2 / 3),
    ("10001", 1, 1, (1 + 2 / 5) / 2, 2 / 5)])
def test_one_query_by_hand(ranking, rank1, rank5, AP, INP):
    """Average precision is the mean of precision at each hit; a gallery of four has no rank-5
    (defect 7)."""
    result = one_query(ranking)
    expected = {"rank-1": rank1, "mAP": AP, "mINP": INP, "queries": 1, "gallery": len(ranking)}
    if rank5 is not None:
        expected["rank-5"] = rank5
    assert result == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("place, reached", [
    (1, "1111"), (2, "0111"), (5, "0111"), (6, "0011"), (10, "0011"), (11, "0001"), (20, "0001"),
    (21, "0000")])
def test_rank_k_counts_the_first_k(place, reached):
    """The hit at place k counts for rank-k and not for rank-(k-1); every size has its ranks."""
    for misses in (5, 25):
        result = one_query("0" * (place - 1) + "1" + "0" * misses)
        expected = {f"rank-{r}": float(c) for r, c in zip(RANKS, reached, strict=True)}
        there = ranks_of(place + misses)
        assert values(result, *there) == values(expected, *there)
        assert not [name for name in expected if name in result and name not in there]


def test_tie_counts_against_the_query():
    """Defect 6: wrong, right at equal distance is a miss whichever stands first; so is a tie
    further down."""
    for gallery_pid in [1, 2], [2, 1]:
        result = metrics(torch.ones(1, 2), [1], gallery_pid)
        assert values(result, "rank-1", "mAP", "mINP") == [0, 0.5, 0.5]
    for gallery_pid in [1, 2, 1, 3], [1, 1, 3, 2], [1, 3, 2, 1]:
        result = metrics(torch.tensor([[0.0, 0.5, 0.5, 0.5]]), [1], gallery_pid)
        expected = [1, (1 + 2 / 4) / 2, 2 / 4]
        assert values(result, "rank-1", "mAP", "mINP") == pytest.approx(expected)
    among_matches = metrics(torch.ones(1, 3), [1], [1, 1, 1])
    assert among_matches["mAP"] == 1    # harms no one


def test_same_identity_and_camera_is_ignored():
    """Such an item is neither hit nor miss; the same camera alone, or the same identity alone, is
    not ignored."""
    camera = {"query_camera": ["D1"]}
    ignored = one_query("1101", **camera, gallery_camera=["D1", "D2", "D1", "D3"])
    assert values(ignored, "rank-1", "mAP", "mINP") == pytest.approx([1, 5 / 6, 2 / 3])
    ignored = one_query("101", **camera, gallery_camera=["D1", "D1", "D2"])
    assert values(ignored, "rank-1", "mAP", "mINP") == pytest.approx([0, 1 / 2, 1 / 2])
    assert ignored["gallery"] == 3
    assert one_query("101")["mAP"] == pytest.approx(5 / 6)


def test_queries_without_a_match_are_left_out_and_counted_so():
    """Query 2 has no match at all, query 3 only an ignored one: the means are over query 1."""
    distance = torch.tensor([[1.0, 2.0]] * 3)
    result = metrics(distance, [1, 9, 2], [2, 1], ["D1", "D1", "D2"], ["D2", "D2"])
    assert result == {"rank-1": 0, "mAP": 0.5, "mINP": 0.5, "queries": 1, "gallery": 2}
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


# ---------------------------------------------------- parity, invariance ----

@pytest.mark.parametrize("seed, sizes", [
    (0, {}),
    (1, {"levels": 2}),
    (2, {"levels": 10**6}),
    (3, {"gallery": 7, "pids": 3}),
    (4, {"queries": 6, "gallery": 1, "pids": 2}),
    (5, {"queries": 150, "gallery": 400, "pids": 40}),
    (6, {"queries": 2100, "gallery": 20})])
@pytest.mark.parametrize("ignore", [False, True])
def test_equals_the_plain_loop(seed, sizes, ignore):
    """Ties, ignored items (so rows of unequal length, defect 7), queries without a match, any size
    (defect 2)."""
    arguments = crowd(seed, **sizes)
    if not ignore:
        arguments = arguments[:3]
    elif sizes.get("gallery") == 1:
        arguments[4] = ["D9"]    # else its one item is ignored for some and nothing is left
    assert metrics(*arguments) == pytest.approx(plain_metrics(*arguments), abs=1e-6)


def test_order_of_gallery_and_queries_changes_nothing():
    """With ties in every row, for five shuffles of both."""
    arguments = crowd(0)
    distance, query_pid, gallery_pid, query_camera, gallery_camera = map(np.asarray, arguments)
    expected = metrics(*arguments)
    assert 0 < expected["mAP"] < 1
    for seed in range(5):
        q, g = (np.random.default_rng(seed).permutation(n) for n in distance.shape)
        shuffled = torch.from_numpy(distance[q][:, g])
        cameras = query_camera[q], gallery_camera[g]
        found = metrics(shuffled, query_pid[q], gallery_pid[g], *cameras)
        assert found == pytest.approx(expected, abs=1e-6)


def test_any_sequences_and_no_side_effects():
    """Lists, tuples, arrays and tensors of pids and cameras, numbers or names; the distances stay
    as they were."""
    arguments = crowd(0)
    expected, before = metrics(*arguments), arguments[0].clone()
    numbers = [[int(camera[1:]) for camera in cameras] for cameras in arguments[3:]]
    for kind in tuple, np.array, torch.tensor:
        pids_and_cameras = map(kind, arguments[1:3] + numbers)
        assert metrics(arguments[0], *pids_and_cameras) == expected
    assert metrics(arguments[0], *map(np.array, arguments[1:])) == expected
    assert torch.equal(arguments[0], before)


@pytest.mark.parametrize("sizes", [(5, 30), (37, 61), (300, 700)])
def test_constant_features_score_as_badly_as_possible(sizes):
    """Defect 6, from features to scores: every wrong item ranks before every right one, in any
    order of the gallery."""
    queries, gallery = sizes
    features = torch.linspace(-1.7, 2.3, 2 * 24).view(1, 2, 24)
    distance = distances(features.repeat(queries, 1, 1), features.repeat(gallery, 1, 1))
    gallery_pid = sorted(i % 5 for i in range(gallery))    # the matches of identity 0 come first
    result, n = metrics(distance, [0] * queries, gallery_pid), gallery_pid.count(0)
    worst = np.mean([k / (gallery - n + k) for k in range(1, n + 1)])
    assert result["rank-1"] == 0
    assert result["mINP"] == pytest.approx(n / gallery)
    assert result["mAP"] == pytest.approx(worst, abs=1e-6)


# ------------------------------------------------------------- distances ----

def features(n, parts, dim, seed):
    return torch.randn(n, parts, dim, generator=torch.Generator().manual_seed(seed))


def test_distance_by_hand():
    """Mean over parts of the Euclidean distance: (5 + 13) / 2, not the distance of the
    concatenation."""
    gallery = torch.tensor([[[3.0, 4.0], [5.0, 12.0]], [[0.0, 0.0], [0.0, 1.0]]])
    assert distances(torch.zeros(1, 2, 2), gallery).tolist() == [[9.0, 0.5]]


def plain_distances(query, gallery):
    """(Q, P, D), (G, P, D) -> (Q, G), in float64."""
    difference = query[:, None].double() - gallery[None].double()
    return difference.norm(dim=-1).mean(-1)


@pytest.mark.parametrize("Q, G, P, D", [
    (1, 1, 1, 1), (1, 26, 3, 8), (30, 1, 2, 5), (26, 40, 70, 4), (700, 900, 2, 8), (3, 2000, 5, 4)])
def test_distances_equal_a_plain_loop(Q, G, P, D):
    """Any sizes (defect 2), whatever is computed at a time; the two arguments stay as they were."""
    query, gallery = features(Q, P, D, 0), features(G, P, D, 1)
    copies = query.clone(), gallery.clone()
    found = distances(query, gallery)
    expected = plain_distances(query, gallery)
    assert found.shape == (Q, G) and found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(query, copies[0]) and torch.equal(gallery, copies[1])


def test_the_distance_is_that_of_the_streams_weighted_by_their_parts():
    query, gallery = features(26, 7, 4, 0), features(40, 7, 4, 1)
    first = distances(query[:, :2], gallery[:, :2])
    second = distances(query[:, 2:], gallery[:, 2:])
    both = distances(query, gallery)
    assert torch.allclose(both, (2 * first + 5 * second) / 7, rtol=1e-5)
    assert not torch.allclose(both, (first + second) / 2, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 25])
def test_identical_features_are_at_distance_0(n):
    """Exactly 0 for few rows, and far rows stay far; features of usual size."""
    same = features(n, 3, 256, 0) * 5 + 2
    found = distances(same, same.clone())
    others = ~torch.eye(n, dtype=torch.bool)
    assert (found.diagonal() == 0).all() and (found[others] > 10).all()


@pytest.mark.parametrize("Q, G", [(20, 22), (150, 260)])
def test_a_shift_of_all_features_changes_nothing(Q, G):
    """|a|^2 + |b|^2 - 2ab loses its digits when features lie far from 0; ours must not."""
    query, gallery = features(Q, 2, 64, 0), features(G, 2, 64, 1)
    shift = 30 * features(1, 2, 64, 2)
    shifted = distances(query + shift, gallery + shift)
    assert torch.allclose(shifted, distances(query, gallery), rtol=1e-4, atol=0)


def test_close_neighbours_keep_their_order():
    """Among 300 rows, copies moved by 0.01 and by 0.02 are found first and second."""
    query = features(300, 2, 64, 0)
    step = torch.nn.functional.normalize(features(300, 2, 64, 1), dim=-1)
    found = distances(query, torch.cat([query + 0.02 * step, query + 0.01 * step]))
    nearest = found.topk(2, largest=False).indices
    expected = torch.stack([torch.arange(300) + 300, torch.arange(300)], dim=1)
    assert torch.equal(nearest, expected)


# ------------------------------------------------------------ evaluation ----

class Averages(torch.nn.Module):
    """A model whose embedding is known: mean and deviation of each channel, (B, 2, 3)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def embed(self, frames, modality):
        self.seen += modality.tolist()
        return torch.stack([frames.mean((1, 3, 4)), frames.std((1, 3, 4))], dim=1)


class Named(Averages):
    """The same with two streams."""

    def streams_of(self, embeddings):
        return {"mean": embeddings[:, :1], "deviation": embeddings[:, 1:]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    train, test = tracks((1, 2), each=1), tracks((21, 22, 23, 24, 25))
    return load_dataset(write_hitsz(root, train=train, test=test))


@pytest.mark.parametrize("batch", [8, 13, 64])
def test_each_tracklet_is_embedded_once_for_both_directions(small, batch):
    """Defects 1, 2 and 8: 40 tracklets in batches of 8 (none left over), of 13 (a last one of one),
    of 64 (all at once)."""
    size = (32, 16)
    config = SimpleNamespace(size=size, frames=2, test_frames=0, frame_rule="",
                             test_batch=batch, workers=0)
    model = Averages()
    results, embeddings, _ = evaluate(model, small, config, torch.device("cpu"))
    assert model.seen == [int(t.modality == "infrared") for t in small.test]
    frames = [torch.stack([read_frame(t.frames[i], size) for i in (0, 6)]) for t in small.test]
    expected = Averages().embed(normalise(torch.stack(frames)), torch.zeros(40))
    assert torch.allclose(embeddings, expected, atol=1e-5)
    for direction, scores in plain_scores(small, expected).items():
        assert results["directions"][direction] == pytest.approx(scores, abs=1e-6)


def plain_scores(dataset, embeddings):
    """{direction: its results} of plain_metrics."""
    scores = {}
    for direction, (query, gallery) in dataset.directions.items():
        distance = plain_distances(embeddings[query], embeddings[gallery])
        pids = [[dataset.test[i].pid for i in side] for side in (query, gallery)]
        cameras = [[dataset.test[i].camera for i in side] for side in (query, gallery)]
        scores[direction] = plain_metrics(distance, *pids, *cameras)
    return scores


def test_each_stream_is_ranked_alone_from_the_same_embeddings(small):
    """Its figures are those of its parts, and nobody else's; who names no stream gets no row."""
    config = SimpleNamespace(size=(32, 16), frames=2, test_frames=0, frame_rule="", test_batch=64,
                             workers=0)
    plain, _, _ = evaluate(Averages(), small, config, torch.device("cpu"))
    model = Named()
    results, embeddings, _ = evaluate(model, small, config, torch.device("cpu"))
    assert len(model.seen) == len(small.test)
    assert plain["streams"] == {} and "alone" not in table(plain)
    assert results["directions"] == plain["directions"]
    for part, name in enumerate(["mean", "deviation"]):
        alone = results["streams"][name]
        for direction, scores in plain_scores(small, embeddings[:, [part]]).items():
            assert alone[direction] == pytest.approx(scores, abs=1e-6)
        assert alone != results["directions"]
    labels = [line[:20].rstrip() for line in table(results).splitlines()[1:]]
    assert labels == ["infrared->visible", "  mean alone", "  deviation alone",
                      "visible->infrared", "  mean alone", "  deviation alone"]
