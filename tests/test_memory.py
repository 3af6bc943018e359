"""What trades memory for time changes no result: --cache, --accumulate, --checkpoint-activations against runs and steps without."""
import copy
import functools
import json
import math
import shutil

import pytest
import torch

import lsmrl
import model
import train
from data import load_dataset
from test_scripts import TINY, TINY_LSMRL, edit, fails, here, run, same_bits, tensors_of

METHODS = {"dinogrl": (model, TINY), "lsmrl": (lsmrl, TINY_LSMRL)}
HEIGHT, WIDTH = 32, 16    # TINY_LSMRL's --size


def trained(folder, *options):
    """A run in this process -> the checkpoint it ends with."""
    result = here("train.py", "--run", folder, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    return tensors_of(folder)


def same_state(a, b):
    assert a["model"].keys() == b["model"].keys()
    same_bits(a, b)


# ------------------------------------------------------------------------------------------------------------- --cache

@pytest.fixture(scope="module")
def plain(walkers, tmp_path_factory):
    """method -> the checkpoint after two epochs that nobody interrupted, of the walkers' own images, step by step."""
    ran = {}

    def of(method):
        if method not in ran:
            ran[method] = trained(tmp_path_factory.mktemp("plain") / "run", "--data", walkers, *METHODS[method][1], "--epochs", 2)
        return ran[method]
    return of


def writable(walkers, folder):
    """The walkers with training images of their own, to be damaged."""
    data = folder / "copy"
    for part in "Train", "info":
        shutil.copytree(walkers / part, data / part)
    shutil.copy(walkers / "walkers.json", data)
    (data / "Test").symlink_to(walkers / "Test")
    return data


def garbage(*paths):
    """The files keep their sizes and nothing else."""
    for path in paths:
        path.write_bytes(b"\x13" * path.stat().st_size)


def training_images(data):
    return sorted((data / "Train").rglob("*.jpg"))


def stamp(path):
    return path.read_bytes(), path.stat().st_mtime_ns


@pytest.mark.parametrize("method, workers", [("lsmrl", 0), ("lsmrl", 2)])
def test_weights_are_the_same_with_a_new_cache_and_with_an_old_one_alone(method, workers, plain, walkers, tmp_path):
    data, cache = writable(walkers, tmp_path), tmp_path / "caches" / "frames"
    cache.parent.mkdir()
    options = ["--data", data, *METHODS[method][1], "--epochs", 2, "--workers", workers]
    made = trained(tmp_path / "made", *options, "--cache", cache)
    same_state(plain(method), made)
    assert made["config"]["cache"] == str(cache) and list(cache.parent.iterdir()) == [cache]
    before = stamp(cache)
    garbage(*training_images(data))
    fails(here("train.py", "--run", tmp_path / "without", *options, "--workers", 0), "cannot be read")
    same_state(plain(method), trained(tmp_path / "used", *options, "--cache", cache))
    assert stamp(cache) == before and list(cache.parent.iterdir()) == [cache]


def test_a_frame_is_kept_once_however_many_tracklets_show_it(walkers, tmp_path):
    data, cache, sizes = writable(walkers, tmp_path), tmp_path / "frames", []
    for more in "", "1 1 24 1 1\n":    # a tracklet of two others' frames
        edit(data / "info" / "track_train_info.txt", lambda s: s.rstrip("\n") + "\n" + more)
        frames = [frame for tracklet in load_dataset(data).train for frame in tracklet.frames]
        assert len(set(frames)) == 384 == len(frames) - 24 * bool(more)
        expected = trained(tmp_path / f"plain{len(sizes)}", "--data", data, *TINY_LSMRL)
        same_state(expected, trained(tmp_path / f"cached{len(sizes)}", "--data", data, *TINY_LSMRL, "--cache", cache))
        sizes.append(cache.stat().st_size)
        cache.unlink()
    assert sizes == [64 + 384 * 3 * HEIGHT * WIDTH] * 2


def grow(data, cache):
    with open(training_images(data)[200], "ab") as file:
        file.write(b"\0")    # an image still


def rename(data, cache):
    edit(data / "info" / "train_name.txt", lambda s: s.replace("0001M1D1T1F12.jpg", "0001M1D1T1F99.jpg"))
    folder = data / "Train" / "0001" / "ir" / "D1"
    (folder / "12.jpg").rename(folder / "99.jpg")


@pytest.mark.parametrize("what, spoil, options", [
    ("another size", lambda data, cache: None, ["--size", WIDTH, HEIGHT]),
    ("a frame's file grew", grow, []),
    ("a frame of another name", rename, []),
    ("a tracklet less", lambda data, cache: edit(data / "info" / "track_train_info.txt", lambda s: s[s.index("\n") + 1:]), []),
    ("truncated", lambda data, cache: cache.write_bytes(cache.read_bytes()[:-1]), []),
    ("a text", lambda data, cache: cache.write_text("mine\n" * 100), []),
    ("empty", lambda data, cache: cache.write_bytes(b""), []),
    ("foreign, of the same length", lambda data, cache: cache.write_bytes(bytes(cache.stat().st_size)), []),
])
def test_a_cache_that_does_not_fit_is_named_and_left_alone(what, spoil, options, walkers, tmp_path):
    data, cache = writable(walkers, tmp_path), tmp_path / "caches" / "frames"
    cache.parent.mkdir()
    if options:    # as many bytes, and a size that trains
        trained(tmp_path / "healthy", "--data", data, *TINY_LSMRL, *options)
    made = trained(tmp_path / "made", "--data", data, *TINY_LSMRL, "--cache", cache)
    spoil(data, cache)
    before = stamp(cache)
    fails(here("train.py", "--run", tmp_path / "run", "--data", data, *TINY_LSMRL, *options, "--cache", cache), str(cache))
    if not options:    # nor does a resumed run go on without it
        fails(here("train.py", "--resume", tmp_path / "made", "--epochs", 2), str(cache))
        same_state(made, tensors_of(tmp_path / "made"))
    assert stamp(cache) == before and list(cache.parent.iterdir()) == [cache]


def test_a_place_that_cannot_hold_a_cache_is_refused(walkers, tmp_path):
    options = ["--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    fails(here("train.py", *options, "--cache", tmp_path / "nowhere" / "frames"), "nowhere")
    fails(here("train.py", *options, "--cache", tmp_path / "folder"), str(tmp_path / "folder"))
    assert not (tmp_path / "nowhere").exists() and [p.name for p in (tmp_path / "folder").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_frame_is_named_and_leaves_no_cache(workers, walkers, tmp_path):
    data, cache = writable(walkers, tmp_path), tmp_path / "caches" / "frames"
    cache.parent.mkdir()
    frame = training_images(data)[250]    # whether or not a step would draw it
    garbage(frame)
    start = run if workers else here    # a process of its own: torch takes 5 seconds to let go of each loader process that was left
    result = start("train.py", "--data", data, "--run", tmp_path / "run", *TINY_LSMRL, "--workers", workers, "--cache", cache)
    fails(result, str(frame), "cannot be read")
    assert not list(cache.parent.iterdir())


def test_a_resumed_run_goes_on_with_its_cache(plain, walkers, tmp_path):
    data = writable(walkers, tmp_path)
    trained(tmp_path / "run", "--data", data, *TINY_LSMRL, "--epochs", 1, "--cache", tmp_path / "frames")
    garbage(*training_images(data))
    result = here("train.py", "--resume", tmp_path / "run", "--epochs", 2)
    assert result.returncode == 0, result.stderr
    same_state(plain("lsmrl"), tensors_of(tmp_path / "run"))


# -------------------------------------------------------------------------------------------------------- --accumulate

IN_BLOCKS = [0, 0, 1, 1, 3, 3, 5, 5] * 2    # the visible ones first
MIXED = [3, 0, 3, 5, 1, 0, 5, 1, 1, 1, 5, 0, 3, 0, 5, 3]


def small_net(method, fixed=False, **changes):
    """A small network, the same at each call, in training mode; fixed: DinoGRL without dropout, blanking, and statistics of a chunk."""
    options = train.config_of(method)
    small = dict(options.small, **changes)
    if method == "dinogrl":
        small = dict(options.small, width=8, dim=8, dino_size=(112, 56), code_size=(16, 8), gait_strides=(1, 1, 1, 1), **changes)
    torch.manual_seed(0)
    net = METHODS[method][0].build(options(**small), 6).train()
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():    # what starts at zero would hide its gradient's way
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    for name, part in net.named_children():
        if fixed and method == "dinogrl" and not name.endswith("head"):
            part.eval()
    return net


def batch(label=IN_BLOCKS):
    """-> frames, modality, label: 4 identities, of each 2 tracklets in each modality."""
    frames = torch.randn(16, 2, 3, 64, 32, generator=torch.Generator().manual_seed(2))
    return frames, torch.arange(16) // 8, torch.tensor(label)


def step(net, *arguments, seed=3, **options):
    """forward_backward from a seed -> losses, shown, gradients, buffers."""
    torch.manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = None
    losses, shown = train.forward_backward(net, *arguments, **options)
    return losses, shown, gradients(net), {name: buffer.clone() for name, buffer in net.named_buffers()}


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def plain_step(net, frames, modality, label):
    """What step() does, in the plainest way."""
    torch.manual_seed(3)
    losses, shown = net(frames, modality, label)
    sum(losses.values()).backward()
    return {k: v.detach() for k, v in losses.items()}, shown, gradients(net), dict(net.named_buffers())


@pytest.fixture
def precise(monkeypatch):
    """All in float64. In float32 the gradients of PBMGE's scalars, large ones of a whole batch that cancel, are half rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found, expected, scale=None, within=1e-9):
    """Two dicts of tensors: each within 1e-9 of `scale`, or of its own largest value."""
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        limit = within * (value.abs().max() if scale is None else scale)
        assert value.isfinite().all() and (found[name] - value).abs().max() <= limit, (name, found[name], value)


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() and a
        for name in a:
            assert torch.equal(a[name], b[name]), name


def largest(tensors):
    return max(t.abs().max() for t in tensors.values())


def in_head(name):
    return name.split(".")[0].endswith(("head", "heads"))


@pytest.mark.parametrize("label, chunks", [(IN_BLOCKS, (4,)), (MIXED, (2,))], ids=["in blocks", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_have_the_losses_and_gradients_and_head_statistics_of_the_whole(method, label, chunks, precise):
    frames = batch(label)
    expected = plain_step(small_net(method, fixed=True), *frames)
    assert len(expected[2]) > 50 and any(in_head(name) and "running" in name for name in expected[3])
    for accumulate in chunks:
        losses, shown, found, buffers = step(small_net(method, fixed=True), *frames, accumulate=accumulate)
        assert all(value.ndim == 0 and not value.requires_grad for value in (*losses.values(), *shown.values()))
        close(losses, expected[0])
        close(shown, expected[1])
        close(found, expected[2], largest(expected[2]))
        close({k: v.double() for k, v in buffers.items()}, {k: v.double() for k, v in expected[3].items()})
        assert all(v == 1 for k, v in buffers.items() if in_head(k) and k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_gradient_is_added_to_what_is_there(method, precise):
    frames, net = batch(), small_net(method, fixed=True)
    expected = plain_step(net, *frames)
    losses, _ = train.forward_backward(net, *frames, accumulate=2, scale=lambda loss: 4 * loss)
    close(losses, expected[0])    # which are not scaled
    close(gradients(net), {k: 5 * v for k, v in expected[2].items()}, 5 * largest(expected[2]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_pass_is_under_the_given_autocast(method, accumulate):
    expected = plain_step(small_net(method, fixed=True), *batch())
    net, seen = small_net(method, fixed=True), []
    watched = net.backbone if method == "dinogrl" else net.clip.visual
    watched.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    inner = [m for m in watched.modules() if isinstance(m, torch.nn.Linear if method == "lsmrl" else torch.nn.Conv2d)][0]
    inner.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype == torch.bfloat16))
    losses, _, found, _ = step(net, *batch(), accumulate=accumulate, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(seen) >= accumulate and all(seen)
    assert all(torch.isclose(losses[k], v, rtol=0.1, atol=0.02) for k, v in expected[0].items())
    assert found.keys() == expected[2].keys() and all(g.isfinite().all() for g in found.values())
    assert not torch.is_autocast_enabled("cpu")


def test_other_batch_norms_see_each_chunk_once_and_those_of_the_heads_the_whole():
    frames, modality, label = batch(MIXED)
    counts = lambda buffers: {name: n.item() for name, n in buffers.items() if name.endswith("num_batches_tracked")}
    whole = counts(step(small_net("dinogrl"), frames, modality, label)[3])
    assert whole == counts(plain_step(small_net("dinogrl"), frames, modality, label)[3])
    assert {whole[name] for name in whole if "pbmge" not in name} == {1} and len(whole) > 40    # PBMGE's serve all granularities
    for accumulate in 2, 4:
        buffers = step(small_net("dinogrl"), frames, modality, label, accumulate=accumulate)[3]
        assert counts(buffers) == {name: n * (1 if in_head(name) else accumulate) for name, n in whole.items()}
        stem = copy.deepcopy(small_net("dinogrl").visible_stem)
        for chunk in torch.tensor([3, 0, 5, 1]).chunk(accumulate):    # the identities in order of appearance
            stem(frames[torch.isin(label, chunk) & (modality == 0)].flatten(0, 1))
        for name in "running_mean", "running_var":
            close({name: buffers[f"visible_stem.bn1.{name}"]}, {name: getattr(stem.bn1, name)}, within=1e-5)


def test_chance_is_the_seed_s_alone():
    one, again, other = (step(small_net("dinogrl"), *batch(), accumulate=2, seed=seed) for seed in (3, 3, 4))
    equal(one, again)
    assert one[0]["mask"] != other[0]["mask"]    # dropout is in play
    assert all(value.isfinite().all() for values in one for value in values.values())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_is_that_of_the_loss_by_the_same_chance(accumulate, monkeypatch):
    """A chunk that met other dropout or other blanked codes at its second pass would have a gradient that is not its loss's."""
    monkeypatch.setattr(model, "triplet_loss", functools.partial(model.triplet_loss, margin=100))    # or terms come and go as one moves
    slope = {name: g for name, g in step(small_net("dinogrl"), *batch(), accumulate=accumulate)[2].items() if name.startswith("sasgl.gait_net")}
    norm, values, distance = math.sqrt(sum(g.double().square().sum().item() for g in slope.values())), [], 3e-4
    for sign in 1, -1:
        moved = small_net("dinogrl")
        for name, g in slope.items():
            moved.get_parameter(name).data += sign * distance * g / norm
        values.append(sum(v.item() for v in step(moved, *batch(), accumulate=accumulate)[0].values()))
    assert norm > 1 and (values[0] - values[1]) / (2 * distance) == pytest.approx(norm, rel=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_steps_on_chunks_learn(method):
    net, totals = small_net(method), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for i in range(4):
        totals.append(sum(step(net, *batch(), accumulate=2, seed=i)[0].values()).item())
        optimizer.step()
    assert all(map(math.isfinite, totals)) and totals[-1] < 0.98 * totals[0], totals


def log(folder):
    """The lines of log.jsonl, each without its seconds and scores."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "rank-1", "mAP")} for line in lines]


def test_a_run_on_chunks_is_logged_saved_resumed_and_evaluated(walkers, tmp_path):
    whole, parts, chunks = tmp_path / "whole", tmp_path / "parts", ["--data", walkers, *TINY, "--accumulate", 2]
    a = trained(whole, *chunks, "--epochs", 2)
    assert a["config"]["accumulate"] == 2 and trained(parts, *chunks)["epoch"] == 1
    result = here("train.py", "--resume", parts, "--epochs", 2)
    assert result.returncode == 0 and "infrared->visible" in result.stdout, result.stderr
    same_state(a, tensors_of(parts))
    logs = log(whole), log(parts)
    assert logs[0] == logs[1] and len(logs[0]) == 2 and {"mask", "triplet_gait", "identity_appearance", "accuracy_gait"} <= logs[0][0].keys()
    directions = [json.loads((folder / "results.json").read_text())["directions"] for folder in (whole, parts)]
    assert directions[0] == directions[1]
    steps = {k: v for k, v in a["model"].items() if k.endswith("num_batches_tracked")}    # two epochs of two steps of two chunks
    assert steps["gait_head.bn.num_batches_tracked"] == 4 and steps["visible_stem.bn1.num_batches_tracked"] == 8


def test_a_run_s_first_losses_are_the_same_on_chunks(walkers, tmp_path):
    logs = []
    for accumulate in 1, 2:
        trained(tmp_path / str(accumulate), "--data", walkers, *TINY_LSMRL, "--steps", 1, "--accumulate", accumulate)
        logs += log(tmp_path / str(accumulate))
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and "triplet_cmi" in logs[0]


def test_identities_that_cannot_be_cut_into_so_many_chunks_are_refused(walkers, tmp_path):
    for identities, accumulate in (3, 2), (2, 4), (4, 3):
        given = ["--identities", identities, "--accumulate", accumulate]
        fails(here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL, *given), "--accumulate")
    fails(here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL, "--accumulate", 0), "--accumulate")


# -------------------------------------------------------------------------------------------- --checkpoint-activations

@pytest.mark.parametrize("method, block", [("dinogrl", model.Bottleneck), ("lsmrl", lsmrl.Mlp)])
def test_a_run_that_computes_its_activations_again_ends_the_same(method, block, walkers, tmp_path, monkeypatch):
    calls, forward = [], block.forward

    def counted(*arguments):
        calls.append(arguments[0].training)
        return forward(*arguments)
    monkeypatch.setattr(block, "forward", counted)
    ends, passes = [], []
    for name, options in ("kept", []), ("again", ["--checkpoint-activations", "on"]):
        calls.clear()
        ends.append(trained(tmp_path / name, "--data", walkers, *METHODS[method][1], *options))
        passes.append(sum(calls))
    same_state(*ends)
    assert [end["config"]["checkpoint_activations"] for end in ends] == [False, True]
    assert passes[1] >= 1.5 * passes[0] > 0    # it did compute them again


def kept(net, *arguments):
    """-> bytes of activations that autograd keeps after a forward pass, each storage once."""
    own, storages, alive = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}, {}, []

    def pack(tensor):
        alive.append(tensor)    # or a later one might be given its place
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses, _ = net(*arguments)
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize("method, deeper", [("dinogrl", {"blocks": (3, 3, 3, 3)}), ("lsmrl", {})])
def test_autograd_keeps_fewer_bytes_where_activations_are_computed_again(method, deeper):
    net = small_net(method, **deeper)
    before, frames = kept(net, *batch()), batch()[0]
    assert train.recompute(net) is None
    assert before > frames.nbytes and kept(net, *batch()) < 0.7 * before


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_activations_computed_again_have_the_same_gradients_bit_for_bit(method, accumulate):
    ends = []
    for again in False, True:
        net = small_net(method)    # wholly in training mode: dropout and blanking are drawn as the first time
        if again:
            train.recompute(net)
        ends.append(step(net, *batch(), accumulate=accumulate))
    equal(*ends)    # losses, what is shown, gradients, running statistics
