"""What trades memory for time changes no result: --cache and --checkpoint-activations against runs
and steps without."""
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import train
from data import load_dataset
from scripts import (
    TINY,
    TINY_LSMRL,
    edit,
    fails,
    here,
    same_bits,
    small_network,
    succeeds,
    tensors_of,
)
from support import clip, resnet
from walkers import make_walkers

import pytest
import torch

METHODS = {"dinogrl": TINY, "lsmrl": TINY_LSMRL}
HEIGHT, WIDTH = 32, 16    # TINY_LSMRL's --size
FRAMES = 2 * 4 * 12    # of the walkers' training tracklets


def trained(folder, *options):
    """A run in this process -> the checkpoint it ends with."""
    succeeds(here("train.py", "--run", folder, *options))
    return tensors_of(folder)


def resumed(folder, *options):
    succeeds(here("train.py", "--resume", folder, *options))
    return tensors_of(folder)


def same_state(a, b):
    assert a["model"].keys() == b["model"].keys()
    same_bits(a, b)


# ----------------------------------------------------------------- --cache ----

@pytest.fixture(scope="module")
def walkers(tmp_path_factory):
    """Fewer of them than elsewhere: they are copied often."""
    folder = tmp_path_factory.mktemp("fewer") / "walkers"
    make_walkers(folder, train_identities=2, test_identities=2, tracklets=2, frames=12, height=64,
                 cameras=2)
    return folder


@pytest.fixture(scope="module")
def plain(walkers, tmp_path_factory):
    """The checkpoint after two epochs that nobody interrupted, of the walkers' own images."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return trained(folder, "--data", walkers, *TINY_LSMRL, "--epochs", 2)


def writable(walkers, folder):
    """The walkers with training images of their own, to be damaged."""
    data = folder / "copy"
    for part in "Train", "info":
        shutil.copytree(walkers / part, data / part)
    shutil.copy(walkers / "walkers.json", data)
    (data / "Test").symlink_to(walkers / "Test")
    return data


@pytest.fixture(scope="module")
def original(walkers, tmp_path_factory):
    """A folder of walkers, the cache of their frames, alone in its folder, and a run of an epoch
    that made it. To be copied."""
    folder = tmp_path_factory.mktemp("original")
    data, cache = writable(walkers, folder), folder / "caches" / "frames"
    cache.parent.mkdir()
    trained(folder / "run", "--data", data, *TINY_LSMRL, "--cache", cache)
    return folder


@pytest.fixture
def made(original, tmp_path):
    """A copy of the original -> its folder, data, cache and run."""
    folder = tmp_path / "made"
    shutil.copytree(original, folder, symlinks=True)    # times of change too
    return SimpleNamespace(data=folder / "copy", cache=folder / "caches" / "frames",
                           run=folder / "run", folder=folder)


def training_images(data):
    return sorted((data / "Train").rglob("*.jpg"))


def change(path, contents=None, later=0):
    """Other contents, or a later time of change in ns; what is not asked for stays as it was."""
    before = path.stat()
    if contents is not None:
        path.write_bytes(contents)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))


def garbage(*paths):
    """The files keep their sizes and times and nothing else."""
    for path in paths:
        change(path, b"\x13" * path.stat().st_size)


def stamp(path):
    return path.read_bytes(), path.stat().st_mtime_ns


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_the_same_with_a_new_cache_and_with_an_old_one_alone(
        workers, plain, walkers, tmp_path):
    data, cache = writable(walkers, tmp_path), tmp_path / "caches" / "frames"
    cache.parent.mkdir()
    options = ["--data", data, *TINY_LSMRL, "--epochs", 2, "--workers", workers]
    first = trained(tmp_path / "made", *options, "--cache", cache)
    same_state(plain, first)
    assert first["config"]["cache"] == str(cache)
    assert list(cache.parent.iterdir()) == [cache]
    before = stamp(cache)
    garbage(*training_images(data))
    without = here("train.py", "--run", tmp_path / "without", *options, "--workers", 0)
    fails(without, "cannot be read")
    same_state(plain, trained(tmp_path / "used", *options, "--cache", cache))
    assert stamp(cache) == before and list(cache.parent.iterdir()) == [cache]


def test_a_frame_is_kept_once_however_many_tracklets_show_it(walkers, tmp_path):
    data, cache, sizes = writable(walkers, tmp_path), tmp_path / "frames", []
    tracks = data / "info" / "track_train_info.txt"
    for more in "", "1 1 24 1 1\n":    # a tracklet of two others' frames
        tracks.write_text(tracks.read_text().rstrip("\n") + "\n" + more)
        frames = [frame for tracklet in load_dataset(data).train for frame in tracklet.frames]
        assert len(set(frames)) == FRAMES == len(frames) - 24 * bool(more)
        options = ["--data", data, *TINY_LSMRL]
        expected = trained(tmp_path / f"plain{len(sizes)}", *options)
        found = trained(tmp_path / f"cached{len(sizes)}", *options, "--cache", cache)
        same_state(expected, found)
        sizes.append(cache.stat().st_size)
        cache.unlink()
    # Beside each frame the four bytes of its checksum.
    assert sizes == [64 + FRAMES * (3 * HEIGHT * WIDTH + 4)] * 2


def grow(made):
    image = training_images(made.data)[40]
    change(image, image.read_bytes() + b"\0")    # an image still


def rename(made):
    names = made.data / "info" / "train_name.txt"
    edit(names, lambda s: s.replace("0001M1D1T1F12.jpg", "0001M1D1T1F99.jpg"))
    folder = made.data / "Train" / "0001" / "ir" / "D1"
    (folder / "12.jpg").rename(folder / "99.jpg")


def touch(made):
    change(training_images(made.data)[40], later=1_000_000_000)


def drop_tracklet(made):
    edit(made.data / "info" / "track_train_info.txt", lambda s: s[s.index("\n") + 1:])


def cut_short(made):
    change(made.cache, made.cache.read_bytes()[:-1])


def write_text(made):
    change(made.cache, b"mine\n" * 100)


def write_nothing(made):
    change(made.cache, b"")


def write_zeros(made):
    change(made.cache, bytes(made.cache.stat().st_size))


@pytest.mark.parametrize("spoil", [grow, rename, touch, drop_tracklet, cut_short, write_text,
                                   write_nothing, write_zeros])
def test_a_cache_that_does_not_fit_is_named_and_left_alone(spoil, made, tmp_path):
    state = tensors_of(made.run)
    spoil(made)
    before = stamp(made.cache)
    options = ["--data", made.data, "--cache", made.cache]
    fails(here("train.py", "--run", tmp_path / "run", *TINY_LSMRL, *options), str(made.cache))
    # Nor does a resumed run go on with it.
    fails(here("train.py", "--resume", made.run, "--epochs", 2, *options), str(made.cache))
    same_state(state, tensors_of(made.run))
    assert stamp(made.cache) == before
    assert list(made.cache.parent.iterdir()) == [made.cache]


def test_a_cache_of_another_size_is_named_and_left_alone(made, tmp_path):
    before = stamp(made.cache)
    options = ["--data", made.data, *TINY_LSMRL, "--size", WIDTH, HEIGHT]    # as many bytes
    trained(tmp_path / "healthy", *options)
    spoiled = here("train.py", "--run", tmp_path / "run", *options, "--cache", made.cache)
    fails(spoiled, str(made.cache))
    assert stamp(made.cache) == before


def test_a_place_that_cannot_hold_a_cache_is_refused(walkers, tmp_path):
    options = ["--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL]
    folder, nowhere = tmp_path / "folder", tmp_path / "nowhere"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    fails(here("train.py", *options, "--cache", nowhere / "frames"), "nowhere")
    fails(here("train.py", *options, "--cache", folder), str(folder))
    assert not nowhere.exists()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_frame_is_named_and_leaves_no_cache(workers, walkers, tmp_path):
    data, cache = writable(walkers, tmp_path), tmp_path / "caches" / "frames"
    cache.parent.mkdir()
    frame = training_images(data)[50]    # whether or not a step would draw it
    garbage(frame)
    options = ["--data", data, *TINY_LSMRL, "--workers", workers, "--cache", cache]
    fails(here("train.py", "--run", tmp_path / "run", *options), str(frame), "cannot be read")
    assert not list(cache.parent.iterdir())


def test_a_resumed_run_is_given_its_cache_again_or_reads_the_images(plain, made):
    garbage(*training_images(made.data))
    state, before = tensors_of(made.run), stamp(made.cache)
    two = ["--data", made.data, "--epochs", 2]
    fails(here("train.py", "--resume", made.run, *two), "cannot be read")
    same_state(state, tensors_of(made.run))
    ended = resumed(made.run, *two, "--cache", made.cache)
    same_state(plain, ended)
    assert ended["epoch"] == 2 and ended["config"]["cache"] == str(made.cache)
    assert stamp(made.cache) == before


def test_a_resumed_run_without_its_cache_ends_the_same(plain, made):
    made.cache.unlink()
    ended = resumed(made.run, "--data", made.data, "--epochs", 2)
    same_state(plain, ended)
    assert ended["config"]["cache"] == ""
    assert not list(made.cache.parent.iterdir())


def test_a_checkpoint_may_name_a_cache_but_nothing_is_written_there(plain, made, original):
    checkpoint, foreign = tensors_of(made.run), made.folder / "foreign"
    before = stamp(original / "caches" / "frames")
    assert checkpoint["config"]["cache"] == str(original / "caches" / "frames")
    checkpoint["config"]["cache"] = str(foreign)
    torch.save(checkpoint, made.run / "last.pt")
    ended = resumed(made.run, "--data", made.data, "--epochs", 2)
    same_state(plain, ended)
    assert ended["config"]["cache"] == "" and str(foreign) not in read_all(made.run)
    assert not foreign.exists()
    assert stamp(original / "caches" / "frames") == before


def read_all(folder):
    texts = [path for path in Path(folder).iterdir() if path.suffix in (".json", ".jsonl")]
    return "\n".join(path.read_text() for path in texts)


# ------------------------------------------------ --checkpoint-activations ----

def small_net(name, **changes):
    """A small network, the same at each call, wholly in training mode."""
    net = small_network(name, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():    # what starts at zero would hide its gradient's way
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return net


def batch():
    """-> frames, modality, label: 4 identities, of each 2 tracklets in each modality."""
    frames = torch.randn(16, 2, 3, 64, 32, generator=torch.Generator().manual_seed(2))
    label = torch.tensor([0, 0, 1, 1, 3, 3, 5, 5] * 2)
    return frames, torch.arange(16) // 8, label    # the visible ones first


def step(net, precision=torch.float32):
    """A step from a seed -> losses, shown, gradients, buffers."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        losses, shown = net(*batch())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return losses, shown, gradients, buffers


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_activations_computed_again_have_the_same_gradients_bit_for_bit(method, precision):
    """Dropout and blanking are drawn as the first time; a batch norm counts a batch once."""
    net, again = small_net(method), small_net(method)
    train.recompute_activations(again)
    expected, found = step(net, precision), step(again, precision)
    assert len(expected[2]) > 50    # gradients
    for wanted, got in zip(expected, found, strict=True):
        assert wanted.keys() == got.keys() and wanted
        for name, tensor in wanted.items():
            assert tensor.isfinite().all() and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("method, block", [("dinogrl", resnet.Bottleneck), ("lsmrl", clip.Mlp)])
def test_a_run_that_computes_its_activations_again_ends_the_same(
        method, block, walkers, tmp_path, monkeypatch):
    calls, forward = [], block.forward

    def counted(*arguments):
        calls.append(arguments[0].training)
        return forward(*arguments)
    monkeypatch.setattr(block, "forward", counted)
    ends, passes = [], []
    for value in "off", "on":
        calls.clear()
        options = [*METHODS[method], "--checkpoint-activations", value]
        ends.append(trained(tmp_path / value, "--data", walkers, *options))
        passes.append(sum(calls))
    same_state(*ends)
    assert [end["config"]["checkpoint_activations"] for end in ends] == [False, True]
    assert passes[1] >= 1.5 * passes[0] > 0    # it did compute them again


def kept(net):
    """-> bytes of activations that autograd keeps after a forward pass, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    storages, alive = {}, []

    def pack(tensor):
        alive.append(tensor)    # or a later one might be given its place
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*batch())
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("method, deeper", [("dinogrl", {"blocks": (3, 3, 3, 3)}), ("lsmrl", {})])
def test_autograd_keeps_fewer_bytes_where_activations_are_computed_again(method, deeper):
    net = small_net(method, **deeper)
    frames, _, _ = batch()
    before = kept(net)
    assert train.recompute_activations(net) is None
    assert before > frames.nbytes and kept(net) < 0.7 * before
