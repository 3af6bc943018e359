"""What a search in one's own footage stands on: frames and folders of them, the cache of frames,
the nearest in a gallery, re-ranking, FILE.npz. Written from the description of what users meet,
not from the code; whoever may have made a file, one clear error is the worst that it can do."""
import io
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

from scripts import forget
from support import footage
from support.files import UserError
from support.footage import FrameCache, find_footage, read_frame
from support.ranking import StoredGallery, distances, nearest, rerank, write_gallery

import numpy as np
import pytest
import torch
from PIL import Image

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def grey(path, *levels):
    """Plain pictures that say their place by their level: one in a file, or several in an animated
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.new("L", (8, 16), level) for level in levels]
    animated = {"save_all": True, "append_images": rest} if rest else {}
    first.save(path, lossless=True, **animated)


def levels(frames):
    return [round(read_frame(frame, (16, 8)).float().mean().item()) for frame in frames]


def refused(action, *words):
    """Calls it: a UserError of one line that holds the words, in any case."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(word).lower() in message.lower() for word in words), message
    return message


# ------------------------------------------------------- folders of frames ----

RAMP = list(range(10, 250, 20))
ANIMATED = ["cam2/walk.gif", "cam3/pages.TIFF", "cam3/turn.webp", "night#5/run.gif",
            "cam10/1/in.gif"]
NUMBERED = [f"frame{i + 1}.png" for i in range(12)]
FOLDERS = {"cam10/1": NUMBERED, "cam2/007": NUMBERED, "night#5/deep/er/x y": NUMBERED,
           # One picture in each: frames.
           "cam2/12": ["f#1.PNG", "f#2.jpg", "f#3.JPEG", "f#9.bmp", "f#10.webp", "f#11.gif",
                       "f#20.tif", "f#100.TIFF"]}
NO_PICTURES = ["cam2/007/Thumbs.db", "cam2/007/plan.pdf", "cam2/007/source.mp4",
               "cam10/notes.txt", "labels.json", ".DS_Store"]


@pytest.fixture
def my_footage(tmp_path):
    root = tmp_path / "my footage"
    for folder, files in FOLDERS.items():
        for file, level in zip(files, RAMP, strict=False):
            grey(root / folder / file, level)
    for name in ANIMATED:
        grey(root / name, *RAMP)
    grey(root / "cam2/007/._frame3.png", 0)    # what a Mac leaves
    for name in NO_PICTURES:
        (root / name).write_text("no picture")
    (root / "cam2/12/notes").mkdir()    # holds no tracklet: no ambiguity
    return root


def test_footage_is_read_whole_and_in_natural_order(my_footage, monkeypatch):
    """Tracklets by name, frames by their pixels, at any depth; neither what is hidden nor what is
    no picture. Each is found by its own path too."""
    found = find_footage(my_footage)
    assert list(found) == ["cam2/007", "cam2/12", "cam2/walk.gif", "cam3/pages.TIFF",
                           "cam3/turn.webp", "cam10/1", "cam10/1/in.gif", "night#5/deep/er/x y",
                           "night#5/run.gif"]
    for name, frames in found.items():
        place = my_footage / name
        expected = [f"{place}#{n}" for n in range(12)]
        if name in FOLDERS:
            expected = [str(place / file) for file in FOLDERS[name]]
        assert frames == tuple(expected)
        assert levels(frames) == pytest.approx(RAMP[:len(frames)], abs=2), name    # JPEG rounds
        if name != "cam10/1":
            assert find_footage(str(place)) == {name.split("/")[-1]: frames}
    monkeypatch.chdir(my_footage / "cam2/12")
    here = {name: levels(frames) for name, frames in find_footage(".").items()}
    assert here == {"12": levels(found["cam2/12"])}


def test_pictures_of_an_animated_file_by_number(my_footage):
    for name in ANIMATED:
        assert read_frame(f"{my_footage / name}#3", (32, 24)).shape == (3, 32, 24)
        refused(lambda name=name: read_frame(f"{my_footage / name}#12", (16, 8)), name)


@pytest.mark.parametrize("files, words", [
    ("", "own"), ("a/notes.txt a/.x.png", "own"), ("a/clip.mp4", ".mp4 extract"),
    ("b/notes.txt b/c/clip.MOV", ".mov extract"),
    ("clip.mpg", ".mpg extract"),    # pillow knows the name .mpg, and reads none
    ("1.png a/1.png", "move"), ("cam/1.png cam/a/b/1.png", "cam move"), (None, "nowhere")])
def test_refused_folders(files, words, tmp_path):
    grey(tmp_path / "own.png", 9)
    (tmp_path / "own").mkdir()
    for file in (files or "").split():
        path = tmp_path / "own" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tmp_path / "own.png" if path.suffix == ".png" else __file__, path)
    path = tmp_path / ("nowhere" if files is None else "own")
    refused(lambda: find_footage(path), *words.split())


def test_each_folder_is_visited_once_and_by_its_own_name(tmp_path):
    """Links in circles and upwards, and digits that are foreign."""
    root = tmp_path / "root"
    for name in "a/3", "a/\u0663", "b/10", "../beside/1":    # an Arabic three
        grey(root / name / "1.png", 9)
    for link, target in ("a/x", "b"), ("b/y", "a"), ("b/up", "."), ("b/above", ".."):
        (root / link).symlink_to(root / target)
    assert list(find_footage(root)) == ["a/3", "a/\u0663", "b/10"]
    (root / "a/away").symlink_to(tmp_path / "beside")
    (root / "b/away").symlink_to(tmp_path / "beside")
    assert list(find_footage(root)) == ["a/3", "a/away/1", "a/\u0663", "b/10"]


def test_links_that_multiply_are_no_work(tmp_path):
    """Two links in each of 40 folders lead to the next one: a billion ways to one frame."""
    rooms = [tmp_path / "outside" / str(i) for i in range(40)]
    grey(rooms[-1] / "1.png", 9)
    for room, following in zip(rooms, rooms[1:], strict=False):
        room.mkdir(exist_ok=True)
        for door in "a", "b":
            (room / door).symlink_to(following)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/in").symlink_to(rooms[0])
    found = find_footage(tmp_path / "own")
    assert list(found) == ["in" + 39 * "/a"]
    assert levels(found["in" + 39 * "/a"]) == [9]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    grey(tmp_path / "a/1.png", 9)
    (tmp_path / "closed").mkdir(mode=0)
    refused(lambda: find_footage(tmp_path), "closed", "permissions")


# -------------------------------------------------------------- one frame ----

def test_a_picture_is_upright_and_its_transparency_no_matter(tmp_path):
    dark_above = np.tile(np.array([[0], [250]], np.uint8), (1, 2))
    picture = Image.fromarray(dark_above)
    exif = picture.getexif()
    exif[0x0112] = 3    # the camera was upside down
    picture.save(tmp_path / "a.png", exif=exif)
    assert read_frame(str(tmp_path / "a.png"), (2, 2))[0, :, 0].tolist() == [250, 0]
    picture.convert("P").save(tmp_path / "p.png", transparency=bytes([0, 255]))
    assert read_frame(str(tmp_path / "p.png"), (2, 2))[0, :, 0].tolist() == [0, 250]


@pytest.mark.parametrize("name", ["walk.gif", "walk.webp", "walk.tiff"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.97])
def test_a_broken_animation_is_named(name, keep, tmp_path):
    """By whoever meets it first, the listing or the reading of a frame; pillow says so by errors of
    several kinds."""
    path = tmp_path / name
    noise = [np.random.default_rng(i).integers(0, 256, (16, 8), dtype=np.uint8) for i in range(5)]
    first, *rest = map(Image.fromarray, noise)
    first.save(path, save_all=True, append_images=rest)
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if keep < 1 else keep])
    refused(lambda: [levels(frames) for frames in find_footage(tmp_path).values()], name)


@pytest.mark.parametrize("file, dtype, values", [
    ("a.png", "<u2", [300, 1000, 1700]), ("a.tif", "<u2", [0, 1, 2]),
    ("a.tif", ">u2", [255, 256, 257]), ("a.tif", "i4", [-2**31, 0, 2**31 - 1]),
    ("a.tif", "f4", [-1.5, 0, 1.5]), ("a.tif", "f4", [1e-3, 2e-3, 3e-3]),
    ("a.png", "<u2", [900] * 3), ("a.tif", "i4", [-5] * 3), ("a.tif", "f4", [0.25] * 3)])
def test_deep_pictures_are_stretched(file, dtype, values, tmp_path):
    """Darkest to 0, brightest to 255, linear between, all channels alike; a constant picture is
    some constant."""
    path = tmp_path / file
    Image.fromarray(np.tile(np.array(values, dtype), (4, 1))).save(path)
    frame = read_frame(str(path), (4, 3))
    assert frame.shape == (3, 4, 3) and frame.dtype == torch.uint8
    assert (frame == frame[:1, :1]).all()
    expected = [0, 127.5, 255] if values[0] < values[2] else [int(frame[0, 0, 0])] * 3
    assert frame[0, 0].tolist() == pytest.approx(expected, abs=1)


@needs_pipes
@pytest.mark.parametrize("name", ["walk.gif", "1.png"])
@pytest.mark.parametrize("special", ["pipe", "link to a pipe", "link to a device", "folder"])
def test_only_regular_files_are_opened(name, special, tmp_path):
    """Whoever opened the pipe would wait for ever."""
    path, pipe = tmp_path / "own" / name, tmp_path / "pipe"
    path.parent.mkdir()
    os.mkfifo(pipe)
    if special == "pipe":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if special == "link to a device" else pipe)
    refused(lambda: read_frame(str(path), (16, 8)), name)
    refused(lambda: read_frame(f"{path}#0", (16, 8)), name)
    for place in path.parent, path:
        refused(lambda place=place: list(map(levels, find_footage(place).values())), "own")


def wide_gif(path):
    """20 small pictures on a canvas that is 8,000 x 8,000: 1.28e9 pixels in a kilobyte."""
    grey(path, *range(0, 200, 10))
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", 8000, 8000)
    path.write_bytes(content)


def long_apng(path):
    """Three pictures that say they are two thousand million."""
    grey(path, 10, 20, 30)
    content = bytearray(path.read_bytes())
    at = content.index(b"acTL")
    content[at + 4:at + 8] = struct.pack(">I", 2 ** 31 - 1)
    content[at + 12:at + 16] = struct.pack(">I", zlib.crc32(content[at:at + 12]))
    path.write_bytes(content)


@pytest.mark.parametrize("name, write", [("walk.gif", wide_gif), ("walk.apng", long_apng)])
def test_an_animation_too_large_is_refused_before_it_is_decoded(name, write, tmp_path, monkeypatch):
    write(tmp_path / name)
    decoded = []
    monkeypatch.setattr(Image.Image, "load", decoded.append)
    monkeypatch.setattr(footage, "picture", lambda *arguments: decoded.append(arguments))
    refused(lambda: find_footage(tmp_path), name, "extract its frames")
    refused(lambda: read_frame(f"{tmp_path / name}#0", (16, 8)), name, "extract its frames")
    assert not decoded


def test_each_page_counts_by_its_own_size(tmp_path, monkeypatch):
    path = tmp_path / "pages.tiff"
    pages = [Image.new("L", size) for size in [(8, 16), (8, 16), (80, 160)]]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert len(find_footage(path)["pages.tiff"]) == 3
    monkeypatch.setattr(footage, "MOST_PIXELS", 2 * 8 * 16 + 80 * 160)
    assert read_frame(f"{path}#2", (16, 8)).shape == (3, 16, 8)
    monkeypatch.setattr(footage, "MOST_PIXELS", 2 * 8 * 16 + 80 * 160 - 1)
    refused(lambda: read_frame(f"{path}#2", (16, 9)), "pages.tiff", "extract its frames")


# ------------------------------------------------------- a cache of frames ----

SIZE = (16, 8)
FRAME_BYTES = 3 * 16 * 8


@pytest.fixture
def frames(tmp_path):
    """Eight pictures of noise in two folders, and three in an animated file."""
    paths = []
    for i in range(8):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (20, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        paths.append(str(path))
    grey(tmp_path / "data/c/walk.gif", 10, 20, 30)
    return paths + [f"{tmp_path / 'data/c/walk.gif'}#{i}" for i in range(3)]


@pytest.fixture
def make(frames, tmp_path):
    def cache(frames=frames, size=SIZE, workers=0):
        return FrameCache(str(tmp_path / "cache"), frames, size=size, root=tmp_path / "data",
                          workers=workers)
    return cache


def decoded(frames):
    return torch.stack([read_frame(frame, SIZE) for frame in frames])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_holds_the_frames(workers, make, frames, tmp_path):
    """Name, frames, checksums; made once; a run's random numbers are left alone. The same frame
    twice is stored once."""
    state = torch.get_rng_state()
    cache = make(frames + frames[:2], workers=workers)
    assert torch.equal(torch.get_rng_state(), state)
    content = (tmp_path / "cache").read_bytes()
    body = decoded(frames).numpy().tobytes()
    checksums = [zlib.crc32(frame.numpy().tobytes()) for frame in decoded(frames)]
    assert int(content[:64], 16) > 0
    assert content[64:] == body + struct.pack("<11I", *checksums)
    before = os.stat(tmp_path / "cache")
    for reader in cache, make(), pickle.loads(pickle.dumps(cache)):
        for chosen in frames[3:4], frames[::-1], frames[:2] * 2:
            assert torch.equal(reader.read(chosen), decoded(chosen))
    after = os.stat(tmp_path / "cache")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(os.listdir(tmp_path)) == ["cache", "data"]


class Cached(torch.utils.data.Dataset):
    def __init__(self, cache, frames):
        self.cache, self.frames = cache, frames

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        return self.cache.read([self.frames[index]])[0]


@pytest.mark.parametrize("method", torch.multiprocessing.get_all_start_methods())
def test_a_cache_is_read_by_processes_however_started(method, make, frames):
    cache = make()
    cache.read(frames[:1])    # opened here already
    loader = torch.utils.data.DataLoader(Cached(cache, frames), batch_size=4, num_workers=1,
                                         multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), decoded(frames))


def test_a_system_without_pread(make, frames, monkeypatch):
    monkeypatch.delattr(os, "pread")
    assert torch.equal(make().read(frames[::-1]), decoded(frames[::-1]))


def replace_by_another_of_its_size(path):
    """Its time of change alone tells that it is another."""
    path = Path(path)
    content = bytearray(path.read_bytes())
    state = path.stat()
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


@pytest.mark.parametrize("what", ["another size", "a frame less", "another order", "replaced",
                                  "animation replaced", "an older file", "foreign", "a text",
                                  "empty", "cut short", "longer"])
def test_a_cache_that_does_not_fit_is_named_and_left_alone(what, make, frames, tmp_path):
    path = tmp_path / "cache"
    make()
    content = path.read_bytes()
    replaced = {"foreign": bytes(len(content)), "a text": b"mine\n" * 100, "empty": b"",
                "cut short": content[:-1], "longer": content + b"0",
                "an older file": content[:-4 * len(frames)]}
    other = {"another size": {"size": (8, 16)}, "a frame less": {"frames": frames[1:]},
             "another order": {"frames": frames[::-1]}}
    if what == "replaced":
        replace_by_another_of_its_size(frames[3])
    if what == "animation replaced":
        replace_by_another_of_its_size(tmp_path / "data/c/walk.gif")
    path.write_bytes(replaced.get(what, content))
    before = path.read_bytes()
    refused(lambda: make(**other.get(what, {})), path, "remove")
    assert path.read_bytes() == before


def test_a_damaged_frame_is_refused_when_it_is_first_read(make, frames, tmp_path):
    """Noise in the body, or in a checksum: size and name are the same. Other frames can be read."""
    make()
    path = tmp_path / "cache"
    content = bytearray(path.read_bytes())
    content[64 + 2 * FRAME_BYTES + 5] ^= 64    # of the third frame
    content[64 + 11 * FRAME_BYTES + 4 * 6] ^= 1    # the seventh's checksum
    path.write_bytes(content)
    cache = make()
    good = [frame for i, frame in enumerate(frames) if i not in (2, 6)]
    assert torch.equal(cache.read(good), decoded(good))
    for i in 2, 6:
        for _ in range(2):    # a second try finds the same
            refused(lambda i=i: cache.read([frames[0], frames[i]]), path, "damaged", "remove")


@pytest.mark.parametrize("length", [0, 64, 64 + FRAME_BYTES, 64 + 8 * FRAME_BYTES - 1])
def test_a_cache_cut_short_during_a_run_is_one_error(length, make, frames, tmp_path):
    """Before a frame was read or after it: no bus error, no frame of something else."""
    cache = make()
    cache.read(frames[7:])
    os.truncate(tmp_path / "cache", length)
    for frame in frames[7], frames[10]:
        refused(lambda frame=frame: cache.read([frame]), tmp_path / "cache", "cut short")
    whole = frames[:max(0, (length - 64) // FRAME_BYTES)]
    assert torch.equal(cache.read(whole[:1]), decoded(frames[:1])[:len(whole)])


@needs_pipes
@pytest.mark.parametrize("special", ["folder", "pipe", "link to nothing", "no folder above"])
def test_a_place_that_cannot_hold_a_cache_is_refused(special, make, frames, tmp_path):
    path = tmp_path / "cache"
    if special == "folder":
        path.mkdir()
    elif special == "pipe":
        os.mkfifo(path)
    elif special == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        path = path / "file"
    refused(lambda: FrameCache(str(path), frames, size=SIZE, root=tmp_path), path)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_frame_is_named_and_leaves_no_cache(workers, make, frames, tmp_path):
    Path(frames[4]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=os.path.basename(frames[4])) as caught:
        make(workers=workers)
    forget(caught.value)
    os.remove(frames[4])
    refused(make, frames[4], "--cache")
    assert os.listdir(tmp_path) == ["data"]


# ----------------------------------------------------------------- search ----

@pytest.mark.parametrize("Q, G, P, D, top, rows", [
    (3, 50, 2, 4, 10, 7), (1, 1, 1, 1, 5, 3), (40, 101, 3, 8, 10, 32), (4, 6, 2, 5, 10, 4),
    (5, 30, 2, 4, 1, 1), (2, 12, 1, 3, 12, 6), (3, 9, 2, 4, 4, 100)])
def test_nearest_equals_the_sorted_whole(Q, G, P, D, top, rows):
    """The gallery is asked for in consecutive pieces of at most `rows`; among equals, in a piece or
    not, the lower index comes first."""
    query = torch.randn(Q, P, D, generator=torch.Generator().manual_seed(Q))
    gallery = torch.randn(G, P, D, generator=torch.Generator().manual_seed(G))
    if Q < 25:    # else 0 is rounded
        gallery[[0, G // 3, G // 2, -2 % G, -1]] = query[0]
    asked, before = [], query.clone()

    def piece(start, stop):
        asked.append((start, stop))
        return gallery[start:stop].clone()

    distance, index = nearest(query, piece, G, top, rows=rows)
    starts, stops = zip(*asked, strict=True)
    assert starts == (0, *stops[:-1]) and stops[-1] == G
    assert all(0 < stop - start <= rows for start, stop in asked)
    whole = (query[:, None].double() - gallery[None].double()).norm(dim=-1).mean(-1)    # (Q, G)
    expected = whole.sort(dim=1, stable=True)
    nearest_of_all = expected.values[:, :top]
    assert distance.shape == index.shape == (Q, min(top, G))
    assert (distance.diff(dim=1) >= 0).all() and torch.equal(query, before)
    assert torch.equal(index[:1], expected.indices[:1, :top])
    assert torch.equal(whole.gather(1, index), nearest_of_all)
    assert torch.allclose(distance.double(), nearest_of_all, atol=1e-5)
    _, index = nearest(query, piece, G, top)    # with its own number of rows
    assert torch.equal(whole.gather(1, index), nearest_of_all)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gallery_that_is_not_finite_is_refused(value):
    gallery = torch.ones(9, 2, 3)
    gallery[7, 1, 2] = value
    refused(lambda: nearest(torch.ones(1, 2, 3), lambda i, j: gallery[i:j], 9, 3, rows=4), "finite")


# ------------------------------------------------------------- re-ranking ----

def literal_rerank(distance, Q, k1=20, k2=6, weight=0.3):
    """k-reciprocal encoding the way of the authors' re_ranking(), in float64."""
    original = distance.astype(np.float64) ** 2
    original = (original / original.max(axis=0)).T
    rank, N = np.argsort(original, axis=1), len(original)

    def reciprocal(i, k):
        return np.array([j for j in rank[i, :k + 1] if i in rank[j, :k + 1]])

    V = np.zeros((N, N))
    for i in range(N):
        neighbours = joined = reciprocal(i, k1)
        for candidate in neighbours:
            half = int(np.around(k1 / 2))    # numpy's rounding: 2.5 -> 2, 3.5 -> 4
            theirs = reciprocal(candidate, half)
            if len(np.intersect1d(theirs, neighbours)) > 2 / 3 * len(theirs):
                joined = np.union1d(joined, theirs)
        V[i, joined] = np.exp(-original[i, joined]) / np.exp(-original[i, joined]).sum()
    if k2 != 1:
        V = np.stack([V[rank[i, :k2]].mean(axis=0) for i in range(N)])
    common = np.minimum(V[:Q, None], V[None, Q:]).sum(-1)
    return (1 - weight) * (1 - common / (2 - common)) + weight * original[:Q, Q:]


def test_rerank_by_hand():
    """On a line, the query at 0, the gallery at 1, 10 and 12: with k1 = 1 there are two pairs that
    know only each other."""
    places = np.array([0.0, 1, 10, 12])
    distance = abs(places[:, None] - places)
    # The neighbour's weight, seen from 0 and from 1; one's own is 1.
    a, b = np.exp(-1 / 144), np.exp(-1 / 121)
    common = b / (1 + b) + a / (1 + a)
    first = 0.7 * (1 - common / (2 - common)) + 0.3 / 144
    expected = [[first, 0.7 + 0.3 * 100 / 144, 1]]
    assert np.allclose(literal_rerank(distance, 1, k1=1, k2=1), expected, atol=1e-12)
    found = rerank(torch.from_numpy(distance).float(), 1, k1=1, k2=1)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("Q, G, options", [
    (10, 40, {}), (25, 75, {}), (1, 1, {}), (1, 3, {}), (4, 9, {}), (10, 11, {}),
    (7, 33, {"k1": 5, "k2": 2, "weight": 0.5}), (12, 50, {"k1": 7, "k2": 1}),
    (2, 5, {"k1": 1, "k2": 1}), (12, 50, {"k1": 11, "k2": 4, "weight": 0.0}),
    (3, 60, {"k1": 3, "weight": 1.0}), (4, 6, {"k1": 3, "k2": 20}), (8, 40, {"k1": 1000}),
    (70, 30, {}), (290, 20, {})])    # more than one block of queries, and of rows
def test_rerank_equals_the_literal_loops(Q, G, options):
    rng = np.random.default_rng(Q + G)
    people = 2 * rng.standard_normal((7, 4))
    points = people[rng.integers(0, 7, Q + G)] + rng.standard_normal((Q + G, 4))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    distance = torch.from_numpy(distance).float()
    before = distance.clone()
    found = np.asarray(rerank(distance, Q, **options))
    assert found.shape == (Q, G) and torch.equal(distance, before)
    assert np.allclose(found, literal_rerank(before.numpy(), Q, **options), atol=1e-5)


# --------------------------------------------------------------- FILE.npz ----

EMBEDDING = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
COLUMNS = {"name": ["cam1/1", "cam1/2", "caf\u00e9 \u732b", "x" * 300], "pid": [-1, 3, 3, 10 ** 9],
           "camera": ["", "D1", "D2", "D1"], "modality": ["visible"] * 3 + ["infrared"],
           "frame": ["/a/1.png", "/b/walk.gif#0", "/c/no\udcfftext.png", "d"],
           "shown": [[f"/a/{i}{j}.png" for j in range(4)] for i in range(4)],
           "model": ["0123456789abcdef" * 4], "setting": ["6 frames of each tracklet"]}


def gallery_file(path):
    with open(path, "wb") as file:
        write_gallery(file, COLUMNS, torch.from_numpy(EMBEDDING).unbind())
    return path


def arrays():
    return {"embedding": EMBEDDING, **{name: np.array(column) for name, column in COLUMNS.items()}}


def npy(array, **header):
    """The bytes of a .npy file, whose header may say something else: descr, shape,
    fortran_order."""
    file = io.BytesIO()
    honest = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, {**honest, **header})
    return file.getvalue() + array.tobytes()


def write_npz(path, members):
    """members: [(name, the bytes of its .npy file), ...]"""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(f"{name}.npy", content)


def test_a_stored_gallery_is_what_was_written(tmp_path):
    path = gallery_file(tmp_path / "g.npz")
    with np.load(path) as loaded:
        assert set(loaded) == set(arrays())
        assert all(np.array_equal(loaded[name], array) for name, array in arrays().items())
    np.savez(tmp_path / "again.npz", **arrays())
    for file in path, tmp_path / "again.npz":
        stored = StoredGallery(file)
        assert stored.shape == (4, 2, 3)
        assert [stored.model] == COLUMNS["model"] and [stored.setting] == COLUMNS["setting"]
        for name in ("embedding", "name", "pid", "camera", "modality", "frame", "shown"):
            for start, stop in (0, 4), (1, 3), (3, 4):
                rows = stored.rows(name, start, stop)
                assert np.array_equal(rows, arrays()[name][start:stop])
        stored.check_like(2, 3)
        for other in (1, 3), (2, 4), (3, 2):
            refused(lambda stored=stored, other=other: stored.check_like(*other), file, other)


RAW = {
    "-3 rows": {"embedding": npy(EMBEDDING, shape=(-3, 2, 3))},
    "-3 rows of -2 parts": {"embedding": npy(EMBEDDING, shape=(-4, -2, 3))},
    "no row": {"embedding": npy(EMBEDDING, shape=(0, 2, 3))},
    "half the parts": {"embedding": npy(EMBEDDING, shape=(4, 1, 3))},
    "half the rows": {"embedding": npy(EMBEDDING, shape=(2, 2, 3))},
    "twice the rows": {"embedding": npy(EMBEDDING, shape=(8, 2, 3))},
    "another order of sizes": {"embedding": npy(EMBEDDING, shape=(2, 4, 3))},
    "beyond the file": {"embedding": npy(EMBEDDING, shape=(2 ** 40, 2, 3))},
    "beyond any file": {"embedding": npy(EMBEDDING, shape=(2 ** 70, 2, 3))},
    "two axes": {"embedding": npy(EMBEDDING, shape=(4, 6))},
    "column by column": {"embedding": npy(EMBEDDING, fortran_order=True)},
    "other bytes first": {"embedding": npy(EMBEDDING, descr=">f4")},
    "whole numbers": {"embedding": npy(EMBEDDING, descr="<i4")},
    "a structure": {"embedding": npy(EMBEDDING, descr=[("a", "<f4")])},
    "an array in each": {"embedding": npy(EMBEDDING, descr=("<f4", (3,)), shape=(4, 2))},
    "objects": {"name": npy(np.zeros(4), descr="|O")},
    "no letters": {"name": npy(np.zeros(0), descr="<U0", shape=(4,))},
    "letters that are none": {"setting": npy(np.full(1, 2 ** 32 - 1, "<u4"), descr="<U1")},
    "a novel": {"setting": npy(np.zeros(10 ** 5, "<u4"), descr="<U100000", shape=(1,))},
    "more than it says": {"pid": npy(np.arange(4)) + b"more"},
    "cut short": {"pid": npy(np.arange(4))[:-1]},
    "parentheses": {"pid": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000},
    "Python 2's numbers": {"pid": npy(np.arange(4)).replace(b"(4,), }  ", b"(4L,), } ")},
    "no header": {"pid": b"\x93NUMPY\x01\x00"},
    "another version": {"pid": npy(np.arange(4)).replace(b"NUMPY\x01", b"NUMPY\x03")},
    "text": {"pid": b"12"},
    "nothing": {"pid": b""}}

OTHER = {
    "doubles": {"embedding": EMBEDDING.astype(np.float64)},
    "halves": {"embedding": EMBEDDING.astype(np.float16)},
    "a part less in the embeddings": {"embedding": EMBEDDING[:, 0]},
    "a row less": {"embedding": EMBEDDING[:3]},
    "a name less": {"name": np.array(COLUMNS["name"][:3])},
    "names as numbers": {"name": np.arange(4)},
    "names as bytes": {"name": np.array([b"a"] * 4)},
    "names in pairs": {"name": np.array([["a", "b"]] * 4)},
    "pids in pairs": {"pid": np.array([["1", "2"]] * 4)},
    "pids as fractions": {"pid": np.arange(4.0)},
    "cameras as numbers": {"camera": np.arange(4)},
    "modalities as truths": {"modality": np.ones(4, bool)},
    "times": {"frame": np.zeros(4, "datetime64[s]")},
    "one shown": {"shown": np.array(["a"] * 4)},
    "shown in squares": {"shown": np.full((4, 2, 2), "a")},
    "two models": {"model": np.array(["a", "b"])},
    "a model by itself": {"model": np.array("a")},
    "a setting of numbers": {"setting": np.arange(1)},
    "a column more": {"more": np.arange(4)}}


@pytest.mark.parametrize("what", [*RAW, *OTHER, *(f"no {name}" for name in arrays())])
def test_a_crafted_gallery_is_refused(what, tmp_path):
    path = tmp_path / "crafted.npz"
    members = {name: npy(array) for name, array in arrays().items() if what != f"no {name}"}
    members |= RAW.get(what, {})
    members |= {name: npy(array) for name, array in OTHER.get(what, {}).items()}
    write_npz(path, members.items())
    refused(lambda: StoredGallery(path), path, "evaluate.py --save")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["embedding", "name", "setting"])
def test_a_member_named_twice_is_refused(name, tmp_path):
    members = {name: npy(array) for name, array in arrays().items()}
    write_npz(tmp_path / "twice.npz", [*members.items(), (name, members[name])])
    refused(lambda: StoredGallery(tmp_path / "twice.npz"), "twice.npz")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("what", ["notes", "nothing", "half", "tail", "hole", "zeros", "compressed",
                                  "array", "zip", "evil", "folder", "nowhere"])
def test_refused_gallery_files(what, tmp_path):
    """And what is pickled in one is not run."""
    good = gallery_file(tmp_path / "good.npz").read_bytes()
    path, owned = tmp_path / f"{what}.npz", str(tmp_path / "owned by a pickle")
    contents = {"notes": b"these are notes\n", "nothing": b"", "half": good[:len(good) // 2],
                "tail": good[:-20], "hole": good[:300] + good[500:],
                "zeros": good[:-900] + bytes(900)}
    if what in contents:
        path.write_bytes(contents[what])
    elif what == "compressed":
        np.savez_compressed(path, **arrays())
    elif what == "array":
        with open(path, "wb") as file:
            np.save(file, EMBEDDING)
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif what == "evil":
        np.savez(path, **{**arrays(), "name": np.array([Evil(owned)] * 4, object)})
    elif what == "folder":
        path.mkdir()
    refused(lambda: StoredGallery(path), path)
    assert not os.path.exists(owned)


@needs_pipes
def test_a_pipe_is_no_gallery(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    refused(lambda: StoredGallery(tmp_path / "pipe.npz"), "pipe.npz")


def test_a_gallery_cut_short_during_a_search_is_one_error(tmp_path):
    path = gallery_file(tmp_path / "g.npz")
    stored = StoredGallery(path)
    os.truncate(path, 200)
    refused(lambda: stored.rows("embedding", 0, 4), path)
    os.remove(path)
    refused(lambda: stored.rows("name", 0, 1), path)


def test_text_that_is_none_is_refused_when_it_is_read(tmp_path):
    members = {name: npy(array) for name, array in arrays().items()}
    members["name"] = npy(np.array([65, 2 ** 31, 67, 68], "<u4"), descr="<U1")
    write_npz(tmp_path / "g.npz", members.items())
    stored = StoredGallery(tmp_path / "g.npz")
    assert stored.rows("name", 0, 1).tolist() == ["A"]
    refused(lambda: stored.rows("name", 0, 4), "g.npz")


def test_noise_anywhere_is_refused_or_harmless(tmp_path):
    """A byte or two changed, 400 times: one error, or a gallery of the same form."""
    good = gallery_file(tmp_path / "g.npz").read_bytes()
    path = tmp_path / "noisy.npz"
    columns = [name for name, array in arrays().items() if len(array) == 4]
    loaded = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        content = bytearray(good)
        for _ in range(1 + seed % 2):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(content)
        try:
            stored = StoredGallery(path)
            rows = [stored.rows(name, 0, 4).tolist() for name in columns]
        except UserError as error:
            assert "noisy.npz" in str(error) and "\n" not in str(error)
            continue
        loaded += 1
        assert stored.shape[1:] == (2, 3)
        assert all(len(row) == 4 for row in rows)
    assert 0 < loaded < 400


def test_a_search_in_a_file_is_one_in_memory(tmp_path):
    stored = StoredGallery(gallery_file(tmp_path / "g.npz"))
    query, gallery = torch.from_numpy(EMBEDDING[2:] + 0.1), torch.from_numpy(EMBEDDING)

    def piece(start, stop):
        return torch.from_numpy(stored.rows("embedding", start, stop))

    distance, index = nearest(query, piece, stored.shape[0], 3, rows=2)
    expected = distances(query, gallery).sort(dim=1)
    assert torch.equal(index, expected.indices[:, :3])
    assert torch.allclose(distance, expected.values[:, :3], atol=1e-6)
