"""Spoiled files and odd numbers: each loads, or is refused by one line. Never a traceback, never
half a run, and no memory, process or file taken for what a stranger's file asks for."""
import copy
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import evaluate
import train
from data import read_dataset
from layouts import pairs, tracks, write_buptcampus, write_hitsz
from scripts import TINY, TINY_LSMRL, fails, here, succeeds, tensors_of
from support.files import UserError
from support.footage import read_frame
from support.options import stored_config
from support.weights import rebuild

import numpy as np
import pytest
import torch

NAN = float("nan")
WORDS = [b"-1", b"0", b"99999999999999999999", b"1e9", b"nan", b"\x00", b"../../x", b"/etc/passwd",
         "\u0663\ufeff".encode(), b"\xff\xfe", b"\n\n", b" ", b"{", b"]", b'"', b"\t1", b"\x1b[2J"]


def spoil(content, rng):
    """One to three cuts, flips, repetitions or foreign words."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(int(n) for n in rng.integers(len(content) + 1, size=2))
        match rng.integers(6):
            case 0:
                content = content[:i]
            case 1:
                content[i:min(j, i + 40)] = b""
            case 2:
                content[i:i] = content[i:min(j, i + 200)]
            case 3:
                content[i:i] = WORDS[rng.integers(len(WORDS))]
            case 4:
                content[i:i + 1] = bytes([rng.integers(256)])
            case 5:
                content[i:min(j, i + 4)] = rng.bytes(4)
    return bytes(content)


def read(load, *arguments):
    """-> what was read, or None where it was refused in one line; anything else is an error of
    ours."""
    try:
        return load(*arguments)
    except UserError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error), str(error)[:500]
        return None


# --------------------------------------------------- datasets and pictures ----

SMALL = {write_hitsz: {"train": tracks((1, 2), each=2), "test": tracks((21, 22), each=2)},
         write_buptcampus: {"train": pairs((1, 2), each=2, frames=3), "auxiliary": [],
                            "test": pairs((21, 22), each=2, frames=3)}}


@pytest.mark.parametrize("write, times", [(write_hitsz, 100), (write_buptcampus, 80)])
def test_lists(write, times, tmp_path):
    write(tmp_path / "d", **SMALL[write])
    lists = sorted([*(tmp_path / "d").rglob("*.txt"), *(tmp_path / "d").rglob("*.json")])
    rng, usable = np.random.default_rng(1), 0
    assert lists and not read_dataset(tmp_path / "d").problems
    for n in range(times):
        path = lists[n % len(lists)]
        before = path.read_bytes()
        path.write_bytes(spoil(before, rng))
        dataset = read(read_dataset, tmp_path / "d")
        if dataset:
            usable += not dataset.problems
            assert not any("\n" in problem for problem in dataset.problems)
        path.write_bytes(before)
    assert usable < times    # most are noticed; a changed camera number is as good as the old one


def test_images(tmp_path):
    write_hitsz(tmp_path / "d", train=tracks((1,), each=1), test=tracks((21,), each=1))
    picture = next((tmp_path / "d").rglob("*.jpg"))
    content, rng = picture.read_bytes(), np.random.default_rng(2)
    loaded = 0
    for _ in range(60):
        picture.write_bytes(spoil(content, rng))
        loaded += read(read_frame, str(picture), (16, 8)) is not None
    assert 0 < loaded < 60


# ------------------------------------------------------------- checkpoints ----

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: the folder of a run of one epoch}, on a dataset of 8 test tracklets."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_hitsz(folder / "data", **SMALL[write_hitsz])
    for method, options in ("dinogrl", TINY), ("lsmrl", TINY_LSMRL):
        succeeds(here("train.py", "--data", folder / "data", "--run", folder / method, *options))
    return {method: folder / method for method in ("dinogrl", "lsmrl")}


@pytest.fixture(scope="module")
def checkpoints(runs):
    return {method: tensors_of(folder) for method, folder in runs.items()}


@pytest.fixture
def crafted(checkpoints, tmp_path):
    """crafted(method, change): that run's checkpoint, changed in place by change(checkpoint) -> its
    folder. without: what is left out of it, for a file that is refused before anything gets there:
    of hundreds of tensors, reading takes a while."""
    made = iter(range(1000))

    def craft(method, change, without=()):
        checkpoint = {key: {} if key in without else copy.deepcopy(value)
                      for key, value in checkpoints[method].items()}
        change(checkpoint)
        folder = tmp_path / f"run{next(made)}"
        folder.mkdir()
        torch.save(checkpoint, folder / "last.pt")
        return folder
    return craft


TENSORS = "model", "optimizer"


def with_keys(**values):
    """A change of a checkpoint, for `crafted`."""
    return lambda checkpoint: checkpoint.update(values)


def with_config(**values):
    return lambda checkpoint: checkpoint["config"].update(values)


def refused_everywhere(folder, *words):
    """load_run, evaluate.py and a resumed train.py each refuse the checkpoint in a line that holds
    the words, and leave the folder as it was."""
    content = (folder / "last.pt").read_bytes()
    with pytest.raises(UserError) as caught:
        evaluate.load_run(str(folder))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    fails(here("evaluate.py", "--checkpoint", folder), *words)
    not_resumed(folder, *words)
    assert (folder / "last.pt").read_bytes() == content


def not_resumed(folder, *words):
    fails(here("train.py", "--resume", folder, "--epochs", 2), *words)
    assert os.listdir(folder) == ["last.pt"]


def test_checkpoints_with_spoiled_bytes(runs, tmp_path):
    content, rng = (runs["lsmrl"] / "last.pt").read_bytes(), np.random.default_rng(3)
    head, tail = 3000, 40_000    # the structure; the middle is tensors
    for n in range(20):
        if n % 2:
            spoiled = spoil(content[:head], rng) + content[head:]
        else:
            spoiled = content[:-tail] + spoil(content[-tail:], rng)
        (tmp_path / "last.pt").write_bytes(spoiled)
        read(evaluate.load_run, str(tmp_path))


# What can take the place of a tensor in a file.
SPOILED = {
    "of another shape": lambda t: torch.zeros(*t.shape, 2),
    "int8": lambda t: t.to(torch.int8),
    "complex": lambda t: t.to(torch.complex64),
    "expanded": lambda t: torch.zeros(()).expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_tensors_are_refused_by_name(crafted, kind):
    """int8 and expanded ones would load, and make all distances 0."""
    names = []

    def change(checkpoint):
        tensors = checkpoint["model"]
        names.append(next(name for name, tensor in tensors.items() if tensor.dim() > 1))
        tensors[names[0]] = SPOILED[kind](tensors[names[0]])

    folder = crafted("lsmrl", change, without=["optimizer"])
    refused_everywhere(folder, f"{folder}", f"{names[0]} is ")


def test_other_floating_kinds_of_the_same_numbers_are_read(crafted, runs):
    """A checkpoint that was halved to save space is one all the same."""
    def halve(checkpoint):
        for name, tensor in checkpoint["model"].items():
            if tensor.is_floating_point():
                checkpoint["model"][name] = tensor.half()

    halved, config, method = evaluate.load_run(str(crafted("lsmrl", halve)))
    whole, _, _ = evaluate.load_run(str(runs["lsmrl"]))
    assert method == "lsmrl" and config.groups == 2
    for name, tensor in halved.state_dict().items():
        assert tensor.dtype == whole.state_dict()[name].dtype
        assert torch.allclose(tensor, whole.state_dict()[name], atol=1e-3, rtol=1e-3), name


KEYS = {    # of the checkpoint
    "model": [None, [], {"x": 1}, {1: torch.zeros(1)}, {}],
    "config": [None, [], {1: 2}, b"x", torch.zeros(2, 2)],
    "classes": [None, [], "1234", {1: 2}, [1, "2"], [1, 2.5], [[1], [2]], torch.arange(4)],
    "method": [None, 3, "nonsense", "data.py:Dataset", "../evil.py:Evil", "\x1b[2J\nerror: x"],
    "epoch": [None, -1, 1.0, "1", NAN, [1], torch.ones(2, 2), 10 ** 400],
    "dataset": [None, 3, b"x", ["x"]],
}


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_another_kind_are_refused(crafted, key):
    if key != "dataset":    # which older ones do not have
        refused_everywhere(crafted("lsmrl", lambda checkpoint: checkpoint.pop(key), TENSORS), key)
    for value in KEYS[key]:
        refused_everywhere(crafted("lsmrl", with_keys(**{key: value}), TENSORS))


BEYOND = {    # configurations of what no option allows: for evaluate.py and train.py, ...
    "dinogrl": {
        "width": [10 ** 6, 10 ** 30, 0, -1, 8.0, "8", None, [8], True],
        "blocks": [(10 ** 6,) * 4, (1,) * 10 ** 4, (1, 1, 1), (), (1.0,) * 4, "1111", 1],
        "strides": [(10 ** 9,) * 4, (0, 1, 1, 1), (-1, 1, 1, 1)],
        "strips": [(1,) * 10 ** 4, (1, 10 ** 9), (1, 10 ** 30), (), (2, 4), (1, 0), (1, -1)],
        "dim": [10 ** 9, 0],
        "dino_size": [(14 * 10 ** 6,) * 2, (224,), (0, 0), (225, 112)],
        "code_size": [(10 ** 6, 10 ** 6), (16, 8.0)],
        "gait": [1, "on"],
        "size": [(8192, 4096), (10 ** 6, 10 ** 6), (64,), (64, 32, 1), ("a", "b")],
    },
    "lsmrl": {
        "split": [(10 ** 6, 2, 2), (100, 100, 100), (-2, 3, 3), (4,), (2, 1)],
        "groups": [10 ** 6, 0, 3, 2.0],
        "clip": ["nonsense", "\x1b[2J\n", 3],
        "size": [(8192, 8192), (10 ** 9, 16), (31, 16)],
        "frames": [10 ** 9, 10 ** 400, 0, NAN, "2", torch.zeros(2, 2)],
        "workers": [10 ** 6, 10 ** 17, -1],
        "test_batch": [10 ** 9, 0],
        "data": [b"x", None, 3, (3,), ("a", b"x"), ["a"], torch.zeros(2, 2).to_sparse()],
        "reader": [None, 3, ("a.py:b",)],
        "device": [b"cpu", 0],
        "text": [NAN, float("inf"), 1e300, 10 ** 400, "1"],
        "sd": [0, None],
    },
}
BEYOND_TRAINING = {    # ... and for train.py
    "people": [1, 10 ** 9], "seed": [10 ** 24, -1, 1.5], "epochs": [10 ** 9, -1],
    "steps": [10 ** 12, 0],
    "identities": [10 ** 12, 1], "tracklets": [10 ** 9, 0], "erase": [5, NAN],
    "lr": [1e300, NAN, float("inf"), 0, "x", 10 ** 400], "weight_decay": [1e300, -1],
    "milestones": [(5, 4), ("a",), [4, 5]], "warmup_epochs": [10 ** 9], "precision": ["int8", ""],
    "optimizer": ["SGD", "\n"], "cosine": [1, "on"], "evaluate_every": [10 ** 9],
}

UNFIT = {    # of what options allow, but of other tensors than are there
    "dinogrl": [{"width": 512}, {"blocks": (9,) * 4}, {"dim": 4096}, {"dinov2": "dinov2_vitb14"}],
    "lsmrl": [{"size": (4096, 4096)}, {"clip": "ViT-B-16", "split": (8, 2, 2)}, {"sd": False}],
}


@pytest.mark.parametrize("method", BEYOND)
def test_configurations_beyond_the_limits_are_refused(crafted, little_memory, method):
    """Before anybody looks at the tensors, of which there are none here."""
    for name, values in BEYOND[method].items():
        for value in values:
            folder = crafted(method, with_config(**{name: value}), TENSORS)
            refused_everywhere(folder, "a configuration that cannot be used: --")


def test_configurations_beyond_the_limits_are_not_resumed(crafted):
    for name, values in BEYOND_TRAINING.items():
        for value in values:
            folder = crafted("lsmrl", with_config(**{name: value}), TENSORS)
            not_resumed(folder, f"--{name.replace('_', '-')}")


@pytest.fixture
def little_memory():
    """Half a gigabyte more than is in use: whoever asks for more is refused by the system."""
    if sys.platform != "linux":
        yield
        return
    import resource  # only here: Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 ** 29
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_configurations_that_do_not_fit_take_no_memory(crafted, little_memory):
    """Up to 300 GB, were they built to be compared."""
    with pytest.raises(RuntimeError, match="memory"):
        torch.zeros(2 ** 30)
    for method, changes in UNFIT.items():
        for change in changes:
            folder = crafted(method, with_config(**change), ["optimizer"])
            with pytest.raises(UserError, match=" does not fit: "):
                evaluate.load_run(str(folder))
        not_resumed(folder, " does not fit: ")


def test_files_that_a_configuration_names_are_neither_written_nor_read(crafted, tmp_path):
    """--cache is the command line's alone; weights stand in the checkpoint."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    change = {name: str(elsewhere / name) for name in ("cache", "resnet_weights", "mask_branch")}
    folders = {method: crafted(method, with_config(**change)) for method in ("dinogrl", "lsmrl")}
    for folder in folders.values():
        assert read(evaluate.load_run, str(folder))
    succeeds(here("train.py", "--resume", folders["lsmrl"], "--epochs", 2))
    resumed = tensors_of(folders["lsmrl"])
    assert resumed["epoch"] == 2 and resumed["config"]["cache"] == ""
    assert os.listdir(elsewhere) == []


def test_a_method_that_a_checkpoint_names_is_not_run(crafted, tmp_path):
    """Code is run because the command line says so."""
    leave_a_file = f"open({str(tmp_path / 'owned')!r}, 'w')"
    (tmp_path / "evil.py").write_text(f"{leave_a_file}\nclass Evil: pass\n")
    folder = crafted("lsmrl", with_keys(method=f"{tmp_path / 'evil.py'}:Evil"))
    refused_everywhere(folder, "--method FILE.py:CLASS")
    assert not (tmp_path / "owned").exists()


def test_names_of_tensors_are_not_printed_raw(crafted):
    folder = crafted("lsmrl", lambda c: c["model"].update({"\x1b[2J\nerror: x": torch.zeros(1)}))
    for result in here("evaluate.py", "--checkpoint", folder), here("train.py", "--resume", folder):
        fails(result, "\\x1b[2J\\nerror: x is surplus")
        assert result.stderr.count("\n") == 1 and result.stderr[:-1].isprintable()


# ------------------------------------------------------- states of a run ----

def in_group(name, value):
    return lambda checkpoint: checkpoint["optimizer"]["param_groups"][0].update({name: value})


def in_state(name, value):
    def change(checkpoint):
        states = checkpoint["optimizer"]["state"]
        states[min(states)][name] = value
    return change


def without(name):
    def change(checkpoint):
        states = checkpoint["optimizer"]["state"]
        del states[min(states)][name]
    return change


def each_moment(change):
    """change(tensor) in the place of the first parameter's exp_avg."""
    def changed(checkpoint):
        states = checkpoint["optimizer"]["state"]
        first = states[min(states)]
        first["exp_avg"] = change(first["exp_avg"])
    return changed


STATES = {
    "lr is text": in_group("lr", "0.1"), "lr is nan": in_group("lr", NAN),
    "lr is a tensor": in_group("lr", torch.zeros(2, 2)), "lr is none": in_group("lr", None),
    "betas are text": in_group("betas", "ab"), "betas of 3": in_group("betas", (0.9, 0.9, 0.9)),
    "eps is nan": in_group("eps", NAN), "amsgrad": in_group("amsgrad", True),
    "capturable": in_group("capturable", True), "differentiable": in_group("differentiable", True),
    "maximize": in_group("maximize", True), "foreach is text": in_group("foreach", "x"),
    "other parameters": in_group("params", [0]), "no parameters": in_group("params", None),
    "step is text": in_state("step", "x"), "step is nan": in_state("step", torch.tensor(NAN)),
    "step is -1": in_state("step", torch.tensor(-1.0)),
    "step is many": in_state("step", torch.zeros(3)),
    "moment is none": in_state("exp_avg", None), "moment is text": in_state("exp_avg_sq", "x"),
    "no moment": without("exp_avg"), "no step": without("step"),
    "another moment": in_state("max_exp_avg_sq", torch.zeros(1)),
    "state is a list": lambda c: c["optimizer"].update(state=[]),
    "state of a parameter that is none": lambda c: c["optimizer"]["state"].update({10 ** 6: {}}),
    "state of text": lambda c: c["optimizer"]["state"].update({"x": {}}),
    "groups are none": lambda c: c["optimizer"].update(param_groups=None),
    "groups are empty": lambda c: c["optimizer"].update(param_groups=[]),
    "a group more": lambda c: c["optimizer"]["param_groups"].append({}),
    "optimizer is empty": with_keys(optimizer={}), "optimizer is text": with_keys(optimizer="x"),
    "random is none": with_keys(random=None), "random is text": with_keys(random={"cpu": "x"}),
    "random of floats": with_keys(random={"cpu": torch.zeros(1, 5056), "cuda": None}),
    "random too short": with_keys(random={"cpu": torch.zeros(1, 7, dtype=torch.uint8)}),
}
for kind, spoiler in SPOILED.items():
    STATES[f"moment {kind}"] = each_moment(spoiler)


@pytest.fixture(scope="module")
def restore(checkpoints):
    """restore(change, **options): goes on from LSMRL's checkpoint, changed so, as train.py does."""
    method, kind = train.method_and_config("lsmrl")
    stored = checkpoints["lsmrl"]
    config = stored_config(kind, stored["config"], "the run")
    model = rebuild(method, config, stored, "the run")

    def restored(change, **options):
        checkpoint = copy.deepcopy({**stored, "model": {}})
        change(checkpoint)
        chosen = dataclasses.replace(config, **options)
        state = train.TrainingState(model, chosen, torch.device("cpu"))
        return state.restore(checkpoint, SimpleNamespace(resume="the run"))
    return restored


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("state", STATES)
def test_states_of_another_shape_or_type_are_not_resumed(restore, state):
    """Which torch itself takes, to fail at the next step or to train otherwise."""
    with pytest.raises(UserError, match="can be evaluated but not resumed") as caught:
        restore(STATES[state])
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_states_can_be_evaluated(crafted, restore):
    assert restore(with_keys()) == 1    # whole epochs: the others are refused for what was changed
    folder = crafted("lsmrl", lambda checkpoint: checkpoint.pop("optimizer"))
    assert read(evaluate.load_run, str(folder))
    not_resumed(folder, "can be evaluated but not resumed", "optimizer")


SCALES = {"text": "x", "nan": NAN, "zero": 0.0, "negative": -1.0, "infinite": float("inf")}


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_that_is_none_is_not_resumed(restore, scale):
    """float16's loss scaling: with a scale that is no positive number no step would be taken."""
    good = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9,
            "_growth_tracker": 0}
    odd = {**good, "scale": SCALES[scale]}
    assert restore(with_keys(scaler=good), precision="float16") == 1
    with pytest.raises(UserError, match="can be evaluated but not resumed"):
        restore(with_keys(scaler=odd), precision="float16")


def test_a_schedule_is_not_taken_from_a_file(crafted):
    """Older checkpoints hold one, and the rates that it began with. Both follow from the epoch and
    the configuration: a run goes on from such a file as from one without."""
    def as_older(checkpoint):
        checkpoint["scheduler"] = {"last_epoch": 7, "base_lrs": "x", "optimizer": None, "get_lr": 3}
        for group in checkpoint["optimizer"]["param_groups"]:
            group.update(initial_lr=9.0, lr=8.0)

    ends = []
    for change in with_keys(), as_older:
        folder = crafted("lsmrl", change)
        succeeds(here("train.py", "--resume", folder, "--epochs", 2))
        ends.append(tensors_of(folder))
    expected, found = ends
    assert found.keys() == expected.keys() and "scheduler" not in found
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    rates = [[group["lr"] for group in end["optimizer"]["param_groups"]] for end in ends]
    assert rates[0] == rates[1]


# ------------------------------------------------------------- all of it ----

ODD = [None, "x", -1, 10 ** 6, 10 ** 30, 10 ** 400, NAN, 1e300, True, [], {}, (1,), [1, 2, 3, 4],
       (10 ** 9,) * 4, torch.zeros(2), torch.eye(3).to_sparse(), torch.zeros(2, device="meta"),
       {"cpu": 3}, b"x", "a.py:B", "\x1b[2J"]


def spoil_somewhere(value, rng):
    """Changes something in a dict or a list in place, at any depth -> where, for the message."""
    places = sorted(value, key=str) if isinstance(value, dict) else range(len(value))
    place = places[rng.integers(len(places))]
    inner = value[place]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.9:
        return [place, *spoil_somewhere(inner, rng)]
    if rng.random() < 0.1:
        del value[place]
        return [place, "deleted"]
    if torch.is_tensor(inner) and rng.random() < 0.7:
        value[place] = list(SPOILED.values())[rng.integers(len(SPOILED))](inner)
    else:
        value[place] = ODD[rng.integers(len(ODD))]
    return [place, f"{value[place]!r:.50}"]


def harmless(checkpoint):
    del checkpoint["config"]["reader"]    # as in an older one
    return "no reader"


def harmful(checkpoint):
    checkpoint["epoch"] = -1
    return "epoch -1"


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("method, times", [("dinogrl", 3), ("lsmrl", 16)])
def test_checkpoints_with_other_contents(checkpoints, method, times, tmp_path):
    """Whole files of which one value is of another kind: load_run, and a resumed run, which must
    leave the folder as it was unless it goes on. Of the first two it is known what must happen; of
    the others the numbers decide, and any share of them may be harmless."""
    spoiled = partial(spoil_somewhere, rng=np.random.default_rng(6))
    changes, resumed = [harmless, harmful, *times * [spoiled]], []
    # Any number of steps and any machine is a fair wish; here it would take its time.
    safe = ["--epochs", 2, "--steps", 1, "--workers", 0, "--device", "cpu"]
    for n, change in enumerate(changes):
        folder = tmp_path / str(n)
        folder.mkdir()
        other = copy.deepcopy(checkpoints[method])
        where = change(other)
        torch.save(other, folder / "last.pt")
        if n % 2:
            read(evaluate.load_run, str(folder))
        content = (folder / "last.pt").read_bytes()
        result = here("train.py", "--resume", folder, *safe)
        assert result.returncode in (0, 2), (where, result.stderr)
        assert "Traceback" not in result.stderr, (where, result.stderr)
        resumed.append(result.returncode == 0)
        if not resumed[-1]:
            fails(result)
            assert (folder / "last.pt").read_bytes() == content, where
    assert resumed[:2] == [True, False]


# ------------------------------------------------------------ command line ----

BILLION, LONG = str(10 ** 9), "9" * 400
NUMBERS = [
    ("--seed", "9" * 24), ("--seed", LONG), ("--seed", "9" * 5000), ("--seed", "-1"),
    ("--seed", "1e5"), ("--frames", BILLION), ("--frames", LONG), ("--frames", "0"),
    ("--tracklets", BILLION),
    ("--size", BILLION, BILLION), ("--size", "8192", "4096"), ("--size", "64"), ("--size",),
    ("--test-batch", BILLION), ("--workers", "1" + "0" * 17), ("--workers", "-1"), ("--erase", "5"),
    ("--erase", "nan"), ("--erase", "-0.1"), ("--lr", "1e300"), ("--lr", "nan"), ("--lr", "inf"),
    ("--lr", "0"), ("--weight-decay", "1e300"), ("--epochs", BILLION), ("--epochs", "-1"),
    ("--steps", str(10 ** 12)), ("--identities", str(10 ** 12)), ("--identities", "1"),
    ("--milestones", "5", "4"), ("--warmup-epochs", BILLION), ("--evaluate-every", BILLION),
    ("--dim", BILLION), ("--dim", "0"), ("--width", str(10 ** 6)), ("--blocks", *["1000000"] * 4),
    ("--blocks", "1", "1", "1"), ("--strips", "1", BILLION), ("--strips", *["1"] * 1000),
    ("--strides", *[BILLION] * 4), ("--dino-size", BILLION, BILLION), ("--margin", "1e300"),
    ("--mask-warmup", str(10 ** 12)), ("--device", "cpu:" + "9" * 20), ("--device", "meta"),
    ("--device", "x" * 99),
]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: " ".join(option)[:30])
def test_odd_numbers_on_the_command_line(option, tmp_path, monkeypatch):
    """One line and exit code 2, before walkers are drawn or a folder is made."""
    monkeypatch.chdir(tmp_path)
    fails(here("train.py", *option), option[0])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", [
    ("--groups", BILLION), ("--split", BILLION, "1", "1"), ("--boost", "1e300"), ("--text", "nan")])
def test_odd_numbers_for_lsmrl(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(here("train.py", "--method", "lsmrl", *option), option[0])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", [
    ("--frames", BILLION), ("--test-batch", LONG), ("--workers", "1" + "0" * 17),
    ("--size", BILLION, BILLION), ("--top", "9" * 24), ("--top", "0"), ("--frame-rule", "x")])
def test_odd_numbers_for_an_evaluation(option, runs):
    fails(here("evaluate.py", "--checkpoint", runs["lsmrl"], *option), option[0])
