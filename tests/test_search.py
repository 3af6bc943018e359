"""Search in one's own footage, re-ranking, all frames: written from the description of what users meet, not from the code.

The model is the tiny LSMRL run of test_scripts.py: what it finds means nothing, but equal frames are at distance 0 whatever the model.
"""
import json
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import Tracklet, UserError, frame_indices, load_dataset, read_frame
from evaluate import clips
from footage import read_footage
from ranking import distances, metrics, nearest, rerank
from layouts import picture
from test_scripts import TINY, Evil, fails, here, tensors_of, trained_lsmrl  # noqa: F401

SEARCH = "--query {q} --gallery {g} "


def grey(path, *levels):
    """Plain pictures that say their place by their level: one in a file, or several in an animated one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.new("L", (8, 16), level) for level in levels]
    first.save(path, lossless=True, **({"save_all": True, "append_images": rest} if rest else {}))


def levels(tracklet):
    return [round(read_frame(frame, (16, 8)).float().mean().item()) for frame in tracklet.frames]


def test_footage_is_read_whole_and_in_natural_order(tmp_path, monkeypatch):
    """Tracklets by name, frames by their pixels, at any depth; neither what is hidden nor what is no picture. Each is found by its own path too."""
    root, ramp = tmp_path / "my footage", list(range(10, 250, 20))
    animated = "cam2/walk.gif cam3/pages.TIFF cam3/turn.webp night#5/run.gif cam10/1/in.gif".split()
    folders = {name: [f"frame{i + 1}.png" for i in range(12)] for name in ("cam10/1", "cam2/007", "night#5/deep/er/x y")}
    folders["cam2/12"] = "f#1.PNG f#2.jpg f#3.JPEG f#9.bmp f#10.webp f#11.gif f#20.tif f#100.TIFF".split()    # one picture each: frames
    for name, files in folders.items():
        for file, level in zip(files, ramp):
            grey(root / name / file, level)
    for name in animated:
        grey(root / name, *ramp)
    grey(root / "cam2/007/._frame3.png", 0)    # what a Mac leaves, and other company
    for name in "cam2/007/Thumbs.db", "cam2/007/plan.pdf", "cam2/007/source.mp4", "cam10/notes.txt", "labels.json", ".DS_Store":
        (root / name).write_text("no picture")
    (root / "cam2/12/notes").mkdir()    # holds no tracklet: no ambiguity
    found = read_footage(root, "infrared")
    assert list(found) == ["cam2/007", "cam2/12", "cam2/walk.gif", "cam3/pages.TIFF", "cam3/turn.webp", "cam10/1", "cam10/1/in.gif",
                           "night#5/deep/er/x y", "night#5/run.gif"]
    for name, t in found.items():
        files = [str(root / name / file) for file in folders[name]] if name in folders else [f"{root / name}#{n}" for n in range(12)]
        assert isinstance(t, Tracklet) and (t.pid, t.camera, t.modality, list(map(str, t.frames))) == (-1, "", "infrared", files)
        assert levels(t) == pytest.approx(ramp[:len(files)], abs=2), name    # JPEG rounds
        if name != "cam10/1":
            assert read_footage(str(root / name), "infrared") == {name.split("/")[-1]: t}
    for name in animated:
        assert read_frame(f"{root / name}#3", (32, 24)).shape == (3, 32, 24)
        with pytest.raises(UserError, match=name):
            read_frame(f"{root / name}#12", (16, 8))
    monkeypatch.chdir(root / "cam2/12")
    assert {name: levels(t) for name, t in read_footage(".", "visible").items()} == {"12": levels(found["cam2/12"])}


@pytest.mark.parametrize("files, words", [
    ("", "own"), ("a/notes.txt a/.x.png", "own"), ("a/clip.mp4", ".mp4 extract"), ("b/notes.txt b/c/clip.MOV", ".mov extract"),
    ("clip.mpg", ".mpg extract"),    # pillow knows the name .mpg, and reads none
    ("1.png a/1.png", "move"), ("cam/1.png cam/a/b/1.png", "cam move"), (None, "nowhere")])
def test_refused_folders(files, words, tmp_path):
    grey(tmp_path / "own.png", 9)
    (tmp_path / "own").mkdir()
    for path in (tmp_path / "own" / file for file in (files or "").split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "own.png" if path.suffix == ".png" else __file__, path)
    with pytest.raises(UserError) as caught:
        read_footage(tmp_path / ("nowhere" if files is None else "own"), "visible")
    assert all(word in str(caught.value).lower() for word in words.split()) and "\n" not in str(caught.value), caught.value


def test_links_in_circles_and_foreign_digits(tmp_path):
    for name in "a/3", "a/\u0663", "b/10":    # an Arabic three
        grey(tmp_path / name / "1.png", 9)
    for link, target in ("a/x", "b"), ("b/y", "a"), ("b/up", "."):
        (tmp_path / link).symlink_to(tmp_path / target)
    assert list(read_footage(tmp_path, "visible")) == ["a/3", "a/x/10", "a/\u0663", "b/10", "b/y/3", "b/y/\u0663"]


def test_a_picture_is_upright_and_its_transparency_no_matter(tmp_path):
    picture = Image.fromarray(np.tile(np.array([[0], [250]], np.uint8), (1, 2)))    # dark above, bright below
    exif = picture.getexif()
    exif[0x0112] = 3    # the camera was upside down
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_frame(str(tmp_path / "a.png"), (2, 2))[0, :, 0].tolist() == [250, 0]
    picture.convert("P").save(tmp_path / "p.png", transparency=bytes([0, 255]))
    assert read_frame(str(tmp_path / "p.png"), (2, 2))[0, :, 0].tolist() == [0, 250]


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp", "walk.tiff"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.97])
def test_a_broken_animation_is_named(name, keep, tmp_path):
    """By whoever meets it first, the listing or the reading of a frame; pillow says so by errors of several kinds."""
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 8), dtype=np.uint8)) for i in range(5)]
    noise[0].save(tmp_path / name, save_all=True, append_images=noise[1:])
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=name):
        [levels(tracklet) for tracklet in read_footage(tmp_path, "visible").values()]


@pytest.mark.parametrize("file, dtype, values", [
    ("a.png", "<u2", [300, 1000, 1700]), ("a.tif", "<u2", [0, 1, 2]), ("a.tif", ">u2", [255, 256, 257]), ("a.tif", "i4", [-2**31, 0, 2**31 - 1]),
    ("a.tif", "f4", [-1.5, 0, 1.5]), ("a.tif", "f4", [1e-3, 2e-3, 3e-3]), ("a.png", "<u2", [900] * 3), ("a.tif", "i4", [-5] * 3), ("a.tif", "f4", [0.25] * 3)])
def test_deep_pictures_are_stretched(file, dtype, values, tmp_path):
    """Darkest to 0, brightest to 255, linear between, all channels alike; a constant picture is some constant."""
    Image.fromarray(np.tile(np.array(values, dtype), (4, 1))).save(tmp_path / file)
    frame = read_frame(str(tmp_path / file), (4, 3))
    assert frame.shape == (3, 4, 3) and frame.dtype == torch.uint8 and (frame == frame[:1, :1]).all()
    assert frame[0, 0].tolist() == pytest.approx([0, 127.5, 255] if values[0] < values[2] else [int(frame[0, 0, 0])] * 3, abs=1)


@pytest.mark.parametrize("Q, G, P, D, top, rows", [(3, 50, 2, 4, 10, 7), (1, 1, 1, 1, 5, 3), (40, 101, 3, 8, 10, 32), (4, 6, 2, 5, 10, 4),
                                                   (5, 30, 2, 4, 1, 1), (2, 12, 1, 3, 12, 6), (3, 9, 2, 4, 4, 100)])
def test_nearest_equals_the_sorted_whole(Q, G, P, D, top, rows):
    """The gallery is asked for in consecutive pieces of at most `rows`; among equals, in a piece or not, the lower index comes first."""
    query, gallery = (torch.randn(n, P, D, generator=torch.Generator().manual_seed(n)) for n in (Q, G))
    if Q < 25:    # else 0 is rounded
        gallery[[0, G // 3, G // 2, -2 % G, -1]] = query[0]
    asked, before = [], query.clone()
    distance, index = nearest(query, lambda start, stop: asked.append((start, stop)) or gallery[start:stop].clone(), G, top, rows=rows)
    whole = sum((query[:, None, p].double() - gallery[None, :, p].double()).norm(dim=-1) for p in range(P)) / P
    expected = whole.sort(dim=1, stable=True)
    assert distance.shape == index.shape == (Q, min(top, G)) and (distance.diff(dim=1) >= 0).all() and torch.equal(query, before)
    assert torch.equal(index[:1], expected.indices[:1, :top]) and torch.equal(whole.gather(1, index), expected.values[:, :top])
    assert torch.allclose(distance.double(), expected.values[:, :top], atol=1e-5)
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])] and asked[-1][1] == G
    assert all(0 < stop - start <= rows for start, stop in asked)
    again = nearest(query, lambda start, stop: gallery[start:stop], G, top)    # with its own number of rows
    assert torch.equal(whole.gather(1, again[1]), expected.values[:, :top])


def literal_rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal encoding the way of the authors' re_ranking(), in float64."""
    original = distance.astype(np.float64) ** 2
    original = (original / original.max(axis=0)).T
    rank, N = np.argsort(original, axis=1), len(original)
    reciprocal = lambda i, k: np.array([j for j in rank[i, :k + 1] if i in rank[j, :k + 1]])
    V = np.zeros((N, N))
    for i in range(N):
        neighbours = joined = reciprocal(i, k1)
        for candidate in neighbours:
            theirs = reciprocal(candidate, int(np.around(k1 / 2)))    # numpy's rounding: 2.5 -> 2, 3.5 -> 4
            if len(np.intersect1d(theirs, neighbours)) > 2 / 3 * len(theirs):
                joined = np.union1d(joined, theirs)
        V[i, joined] = np.exp(-original[i, joined]) / np.exp(-original[i, joined]).sum()
    if k2 != 1:
        V = np.stack([V[rank[i, :k2]].mean(axis=0) for i in range(N)])
    common = np.array([[sum(min(V[i, n], V[j, n]) for n in range(N)) for j in range(Q, N)] for i in range(Q)])
    return (1 - weight) * (1 - common / (2 - common)) + weight * original[:Q, Q:]


def test_rerank_by_hand():
    """On a line, the query at 0, the gallery at 1, 10 and 12: with k1 = 1 there are two pairs that know only each other."""
    distance = abs(np.array([[0.0], [1], [10], [12]]) - np.array([0.0, 1, 10, 12]))
    a, b = np.exp(-1 / 144), np.exp(-1 / 121)    # the neighbour's weight, seen from 0 and from 1; one's own is 1
    common = b / (1 + b) + a / (1 + a)
    expected = [[0.7 * (1 - common / (2 - common)) + 0.3 / 144, 0.7 + 0.3 * 100 / 144, 1]]
    assert np.allclose(literal_rerank(distance, 1, k1=1, k2=1), expected, atol=1e-12)
    assert np.allclose(rerank(torch.from_numpy(distance).float(), 1, k1=1, k2=1), expected, atol=1e-5)


@pytest.mark.parametrize("Q, G, options", [
    (10, 40, {}), (25, 75, {}), (1, 1, {}), (1, 3, {}), (4, 9, {}), (10, 11, {}), (7, 33, dict(k1=5, k2=2, weight=0.5)), (12, 50, dict(k1=7, k2=1)),
    (2, 5, dict(k1=1, k2=1)), (12, 50, dict(k1=11, k2=4, weight=0.0)), (3, 60, dict(k1=3, weight=1.0)), (4, 6, dict(k1=3, k2=20)), (8, 40, dict(k1=1000))])
def test_rerank_equals_the_literal_loops(Q, G, options):
    rng = np.random.default_rng(Q + G)
    points = 2 * rng.standard_normal((7, 4))[rng.integers(0, 7, Q + G)] + rng.standard_normal((Q + G, 4))
    distance = torch.from_numpy(np.linalg.norm(points[:, None] - points, axis=-1)).float()
    before = distance.clone()
    found = np.asarray(rerank(distance, Q, **options))
    assert found.shape == (Q, G) and torch.equal(distance, before)
    assert np.allclose(found, literal_rerank(before.numpy(), Q, **options), atol=1e-5)


@pytest.mark.parametrize("rule", ["chunks", "linspace"])
@pytest.mark.parametrize("n, T", [(12, 6), (13, 6), (100, 6), (3, 6), (1, 2), (7, 3), (7, 1), (2, 2), (17, 16)])
def test_clips_hold_every_frame(n, T, rule):
    found = clips(Tracklet(tuple(f"{i}.jpg" for i in range(n)), 7, "D3", "infrared"), T, rule)
    numbers, size = [[int(frame[:-4]) for frame in clip.frames] for clip in found], -(-n // T)
    assert len(found) == size and all((c.pid, c.camera, c.modality, len(c.frames)) == (7, "D3", "infrared", T) for c in found)
    assert numbers[0] == frame_indices(n, T, rule=rule).tolist() and {i for clip in numbers for i in clip} == set(range(n))
    assert rule == "linspace" or numbers == [[min(k * size + j, n - 1) for k in range(T)] for j in range(size)]


# ----------------------------------------------------------------------------------------------------- the command line

def write(folder, modality, *pids):    # one frame each
    folder.mkdir(parents=True)
    for i, pid in enumerate(pids, start=1):
        (folder / f"{i}.jpg").write_bytes(picture(pid, modality, 1, i, (32, 16)))


@pytest.fixture(scope="module")
def evaluate(trained_lsmrl):  # noqa: F811
    """evaluate.py on the tiny run; with a file for its JSON -> what it prints and the JSON."""
    def call(*options, file=None, checkpoint=trained_lsmrl[0]):
        result = here("evaluate.py", "--checkpoint", checkpoint, "--workers", 0, *options, *(["--json", file] if file else []))
        assert not file or result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        return (result.stdout, json.loads(file.read_text())) if file else result
    return call


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A gallery of 12, one of them a GIF, two queries, a copy of cam2/3's frames and somebody by night, and a broken tracklet."""
    root = tmp_path_factory.mktemp("footage")
    for pid, name in enumerate(("cam1/1", "cam1/2", "cam2/3", *(f"cam10/{i} b" for i in range(8))), start=1):
        write(root / "gallery" / name, "visible", *[pid] * 6)
    write(root / "queries/night 5", "infrared", *[50] * 6)
    shutil.copytree(root / "gallery/cam2/3", root / "queries/copy")
    grey(root / "gallery/cam2/walk.gif", 0, 100, 200)
    shutil.copytree(root / "gallery/cam2/3", root / "broken/p")
    for frame in (root / "broken/p").iterdir():    # all of them: whichever is looked at
        frame.write_bytes(frame.read_bytes()[:300])
    return root


@pytest.fixture(scope="module")
def found(evaluate, footage, tmp_path_factory):
    out = tmp_path_factory.mktemp("found")
    return out, *evaluate("--query", footage / "queries", "--gallery", footage / "gallery", "--query-modality", "visible", "--top", 3,
                          "--figure", out / "f.png", "--save", out / "g.npz", file=out / "r.json")


def test_a_search(found, footage):
    """The copy is found first, at distance 0; the lists on screen are those of the JSON."""
    out, stdout, results = found
    assert results.keys() == {"method", "gallery", "queries", "seconds"} and (results["method"], results["gallery"]) == ("lsmrl", 12)
    assert [(q["query"], q["modality"], q["frames"]) for q in results["queries"]] == [("copy", "visible", 6), ("night 5", "visible", 6)]
    names, lines = read_footage(footage / "gallery", "visible").keys(), []
    for q in results["queries"]:
        ranked = [r["distance"] for r in q["ranked"]]
        assert q.keys() == {"query", "modality", "frames", "ranked"} and len(ranked) == 3 and ranked == sorted(ranked) and q["query"] in stdout
        assert all(r.keys() == {"tracklet", "modality", "distance"} and r["modality"] == "visible" and r["tracklet"] in names for r in q["ranked"])
        lines += [(rank, pytest.approx(r["distance"], abs=0.006), r["modality"], r["tracklet"]) for rank, r in enumerate(q["ranked"], start=1)]
    first, second = results["queries"][0]["ranked"][:2]
    assert first["tracklet"] == "cam2/3" and first["distance"] == pytest.approx(0, abs=1e-4) and second["distance"] > 1e-3
    shown = re.findall(r"^\s*(\d+)\s+([\d.e-]+)\s+(visible|infrared)\s+(.+?)\s*$", stdout, re.M)
    assert [(int(rank), float(distance), modality, name) for rank, distance, modality, name in shown] == lines
    assert np.ptp(np.asarray(Image.open(out / "f.png"))) > 0


def test_the_saved_gallery_answers_alone(found, evaluate, trained_lsmrl, footage, tmp_path):  # noqa: F811
    """--gallery DIR --save only embeds; then the frames are gone and the lists the same; a model of one other number is refused. The defaults."""
    gallery, file, query = tmp_path / "gallery", tmp_path / "g.npz", ["--query", footage / "queries", "--query-modality", "visible", "--top", 3]
    shutil.copytree(footage / "gallery", gallery)
    result = evaluate("--gallery", gallery, "--save", file)
    assert result.returncode == 0, result.stderr
    tracklets = read_footage(gallery, "visible")
    shutil.rmtree(gallery)
    saved, before = np.load(file), np.load(found[0] / "g.npz")
    assert saved["embedding"].shape[:2] == (12, 1) and saved["embedding"].dtype == np.float32 and saved["shown"].shape == (12, 4)
    assert np.allclose(saved["embedding"], before["embedding"], atol=1e-5) and np.array_equal(saved["model"], before["model"])
    assert saved["name"].tolist() == list(tracklets) and set(saved["modality"].tolist()) == {"visible"}
    for tracklet, frame, shown in zip(tracklets.values(), saved["frame"], saved["shown"], strict=True):
        assert frame == str(tracklet.frames[0]) and set(shown) <= set(map(str, tracklet.frames))
    _, again = evaluate(*query, "--gallery", file, file=tmp_path / "r.json")
    for q, p in zip(again["queries"], found[2]["queries"], strict=True):
        assert (q["query"], [r["tracklet"] for r in q["ranked"]]) == (p["query"], [r["tracklet"] for r in p["ranked"]])
        assert [r["distance"] for r in q["ranked"]] == pytest.approx([r["distance"] for r in p["ranked"]], abs=1e-5)
    _, plain = evaluate("--query", footage / "queries/night 5", "--gallery", footage / "gallery", file=tmp_path / "r.json")
    assert [(q["query"], q["modality"], len(q["ranked"]), q["ranked"][0]["modality"]) for q in plain["queries"]] == [("night 5", "infrared", 10, "visible")]
    other = tensors_of(trained_lsmrl[0])
    other["model"]["bank"][0, 0] += 1
    torch.save(other, tmp_path / "other.pt")
    fails(evaluate(*query, "--gallery", file, checkpoint=tmp_path / "other.pt"), "g.npz", "model")


def test_all_frames_sees_what_the_sample_misses(evaluate, tmp_path):
    """Of "odd" two frames are looked at, and those are the gallery's, unless all four are; two frames are one clip either way."""
    for name, pids in ("q/odd", (1, 9, 2, 2)), ("q/two", (3, 4)), ("g/ab", (5, 6)):
        write(tmp_path / name, "visible", *pids)
    for number, frame in (1, 1), (2, 3):
        shutil.copyfile(tmp_path / f"q/odd/{frame}.jpg", tmp_path / f"g/ab/{number}.jpg")
    given, best = ["--query", tmp_path / "q", "--gallery", tmp_path / "g", "--query-modality", "visible"], []
    for switch in [], ["--all-frames"]:
        _, results = evaluate(*given, *switch, file=tmp_path / "r.json")
        assert results.get("all_frames", False) is bool(switch) and [q["frames"] for q in results["queries"]] == [4, 2]
        best += [q["ranked"][0]["distance"] for q in results["queries"]]
    assert best[0] == pytest.approx(0, abs=1e-4) and best[2] > 1e-3 and best[3] == pytest.approx(best[1], abs=1e-5)


@pytest.mark.parametrize("switch", ["", "--rerank", "--all-frames"])
def test_a_benchmark_s_evaluation(switch, evaluate, walkers, tmp_path):
    """Both switches say so and are off by default; re-ranked scores are those of the literal loops; the saved file is a gallery."""
    options = ["--figure", tmp_path / "f.png", "--save", tmp_path / "g.npz", *switch.split()]
    stdout, results = evaluate("--data", walkers, *options, file=tmp_path / "r.json")
    assert ("re-ranked" in stdout, "all frames" in stdout) == (switch == "--rerank", switch == "--all-frames")
    assert {k: results[k] for k in ("rerank", "all_frames") if k in results} == ({switch[2:].replace("-", "_"): True} if switch else {})
    saved = dict(np.load(tmp_path / "g.npz"))
    for direction, r in results["directions"].items():
        sides = [np.flatnonzero(saved["modality"] == modality) for modality in direction.split("->")]
        features = torch.from_numpy(saved["embedding"][np.concatenate(sides)])
        distance = distances(features, features)
        distance = torch.from_numpy(literal_rerank(distance.numpy(), 20)) if switch == "--rerank" else distance[:20, 20:]
        assert r == pytest.approx(metrics(distance, *(saved[name][side] for name in ("pid", "camera") for side in sides)), abs=1e-4)
    wanted = next(t for t in load_dataset(walkers).test[3:] if t.modality == "visible")
    (tmp_path / "q").mkdir()
    for i, frame in enumerate(wanted.frames):
        shutil.copyfile(frame, tmp_path / f"q/{i}.jpg")
    every = [switch] if switch == "--all-frames" else []
    _, found = evaluate("--query", tmp_path / "q", "--gallery", tmp_path / "g.npz", "--query-modality", "visible", *every, file=tmp_path / "r.json")
    best, place = found["queries"][0]["ranked"][0], saved["frame"].tolist().index(str(wanted.frames[0]))
    assert found["gallery"] == 40 == len(set(saved["name"].tolist())) and saved["shown"].shape == (40, 4)
    assert (best["tracklet"], best["modality"]) == (saved["name"][place], "visible") and best["distance"] < 5e-3    # among so many 0 is rounded


def test_silhouettes_and_figures_of_dinogrl(evaluate, footage, walkers, tmp_path):
    trained = here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY, "--steps", 1, "--mask-warmup", 1, "--frames", 1)
    assert trained.returncode == 0, trained.stderr
    for i, given in enumerate((["--query", footage / "queries", "--gallery", footage / "gallery"], ["--data", walkers])):
        pictures = {f"--{name}": tmp_path / f"{name}{i}.png" for name in ("silhouettes", "figure")}
        evaluate(*given, *(word for pair in pictures.items() for word in pair), file=tmp_path / "r.json", checkpoint=tmp_path / "run")
        assert all(np.ptp(np.asarray(Image.open(picture))) > 0 for picture in pictures.values())


@pytest.mark.parametrize("options, word", [
    (SEARCH + "--json {q}/1.jpg", ".json"), (SEARCH + "--figure a.png --silhouettes ./a.png", "two names"), (SEARCH + "--json=", "--json is empty"),
    ("--query {q} --gallery {npz} --all-frames", "all frames, 2 at a time"), ("--query {q}", "--gallery"), ("--gallery {g}", "--save"), ("--gallery {npz}", "--save"), (SEARCH + "--data {data}", "--data"),
    ("--gallery {g} --save {tmp}/e.npz --data {data}", "--data"), ("--query {q} --data {data}", "--data"), (SEARCH + "--rerank", "--rerank"),
    (SEARCH + "--top 0", "--top"), (SEARCH + "--top -3", "--top"), ("--query {q} --gallery {npz} --gallery-modality visible", "--gallery-modality"),
    (SEARCH + "--save {tmp}/none/e.npz", "none"), ("--gallery {g} --save {tmp}/none/e.npz", "none"), (SEARCH + "--json {tmp}/none/r.json", "none"),
    (SEARCH + "--figure {tmp}/none/f.png", "none"), (SEARCH + "--query-modality thermal", "thermal"), (SEARCH + "--gallery-modality thermal", "thermal"),
    ("--query {tmp}/nowhere --gallery {g}", "nowhere"), ("--query {q} --gallery {tmp}/nowhere", "nowhere"), ("--query {q} --gallery {tmp}/nil.npz", "nil.npz"),
    ("--query {broken} --gallery {g}", "broken"), ("--query {q} --gallery {broken}", "broken")])
def test_refused_options(options, word, found, evaluate, footage, walkers, tmp_path):
    files = dict(q=footage / "queries", g=footage / "gallery", broken=footage / "broken", npz=found[0] / "g.npz", data=walkers, tmp=tmp_path)
    result = evaluate(*options.format(**files).split())
    error = result.stderr.strip().splitlines()[-1]    # argparse puts the usage before it
    assert result.returncode == 2 and "error: " in error and "Traceback" not in result.stderr and word in error, result.stderr
    assert not list(tmp_path.iterdir()) and (word != "broken" or re.search(r"broken/p/\d\.jpg", error))


@pytest.mark.parametrize("name, damage", [
    ("notes.txt", lambda p, b, a: p.write_bytes(b"these are notes\n")), ("nothing.npz", lambda p, b, a: p.write_bytes(b"")),
    ("half.npz", lambda p, b, a: p.write_bytes(b[:len(b) // 2])), ("tail.npz", lambda p, b, a: p.write_bytes(b[:-20])),
    ("hole.npz", lambda p, b, a: p.write_bytes(b[:300] + b[500:])), ("zeros.npz", lambda p, b, a: p.write_bytes(b[:-900] + bytes(900))),
    ("compressed.npz", lambda p, b, a: np.savez_compressed(p, **a)), ("array.npz", lambda p, b, a: np.save(p.open("wb"), a["embedding"])),
    ("zip.npz", lambda p, b, a: zipfile.ZipFile(p, "w").writestr("a.txt", "hello")),
    ("evil.npz", lambda p, b, a: np.savez(p, **{**a, "name": np.array([Evil()] * 12, object)})),
    *[(f"no-{lost}.npz", lambda p, b, a, lost=lost: np.savez(p, **{k: v for k, v in a.items() if k != lost}))
      for lost in ("embedding", "name", "modality", "frame", "shown", "model")]])
def test_refused_gallery_files(name, damage, found, evaluate, footage, tmp_path):
    """p: the file to write, b: the bytes and a: the arrays of a good one. Each by its name; and what is pickled in one is not run."""
    good = found[0] / "g.npz"
    damage(tmp_path / name, good.read_bytes(), dict(np.load(good)))
    fails(evaluate("--query", footage / "queries", "--gallery", tmp_path / name), name)
    assert not os.path.exists("/tmp/owned-by-a-pickle")
