"""Folders, lists and weights as people really bring them: read, or named in one clear line."""
import json
import re
import struct
from itertools import cycle

from data import load_dataset
from evaluate import evaluate, report
from layouts import own, write_bupt, write_hitsz, write_own
from scripts import TINY_LSMRL, fails, here, results_of, succeeds, tensors_of
from support.clip import load_clip
from support.dinov2 import load_dinov2
from support.files import UserError
from support.resnet import Stages, Stem, load_resnet50
from support.weights import load_run

import numpy as np
import pytest
import torch
from PIL import Image

NETWORKS = pytest.mark.parametrize("network", ["resnet", "dinov2", "clip"])
BUPT = ["data_paths.json", "train.txt", "query.txt", "gallery.txt"]
INFO = ["track_train_info.txt", "track_test_info.txt", "query_IDX.txt"]
HITSZ = ["train_name.txt", "test_name.txt", *INFO]
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
         "I64": "int64"}


def lines_with(words, printed):
    return [line for line in printed.splitlines() if words in line]


def test_a_flat_gallery_and_wide_frames_are_noted_in_a_search(run_of, tmp_path):
    for folder in "query/1", "market":
        (tmp_path / folder).mkdir(parents=True)
        for frame in "0002_c1s1_000451_03.jpg", "0007_c2s1_000801_01.jpg":
            Image.new("RGB", (40, 20)).save(tmp_path / folder / frame)
    result = here("search.py", "--checkpoint", run_of("lsmrl"), "--query", tmp_path / "query",
                  "--gallery", tmp_path / "market")
    [flat] = lines_with("one tracklet", succeeds(result).stdout)
    assert "market" in flat and result.stdout.count("wider than high") == 2    # in both folders


def test_unread_folders_and_wide_frames_are_noted_in_a_dataset(tmp_path, capsys):
    unread, root = {"test", "Query", "Gallery"}, write_own(tmp_path, own("train", (1, 2)))
    for name in *unread, "masks", ".hidden":
        write_own(root, own(name, [3]))
    load_dataset(root)
    printed = capsys.readouterr().out
    [note] = lines_with("train/ query/ gallery/", printed)
    assert note.startswith("note:") and "wider than high" not in printed
    assert {*unread, "masks", "hidden"} & set(re.findall(r"\w+", note)) == unread
    for file in root.rglob("*.jpg"):
        Image.new("L", (40, 20)).save(file)
    load_dataset(root)
    [wide] = lines_with("wider than high", capsys.readouterr().out)
    printed = succeeds(here("data.py", root)).stdout.splitlines()
    assert {note, wide} <= set(printed) and len(printed) <= 20


def test_own_folders_win_over_a_stray_list_and_a_whole_benchmark_over_them(tmp_path):
    places = own("train", (1, 2)) | own("query", [3]) | own("gallery", [3])
    root = write_own(tmp_path / "own", places)
    before = load_dataset(root)
    for stray in *BUPT, INFO[0]:
        (root / stray).touch()
        assert load_dataset(root) == before
        (root / stray).unlink()
    (write_bupt(tmp_path / "bupt") / "train").mkdir()
    assert load_dataset(tmp_path / "bupt").name == "BUPTCampus"


@pytest.mark.parametrize("lists", [BUPT, BUPT[::-1], HITSZ, HITSZ[::-1]])
def test_a_part_of_a_benchmark_names_a_list_that_is_there_and_a_missing_one(lists, tmp_path):
    for n in range(1, len(lists)):
        (tmp_path / lists[n - 1]).touch()
        with pytest.raises(UserError) as caught:
            load_dataset(tmp_path)
        said = set(re.findall(r"\w+\.(?:txt|json)", str(caught.value)))
        assert said & set(lists[:n]) and said & set(lists[n:])


@pytest.mark.parametrize("name", INFO)
def test_whole_numbers_are_read_as_numpy_writes_them_and_no_others(name, tmp_path):
    before, file = load_dataset(write_hitsz(tmp_path)), tmp_path / "info" / name
    numbers = np.loadtxt(file)
    np.savetxt(file, numbers)
    assert load_dataset(tmp_path) == before
    for number in 5.5, np.nan, np.inf:
        numbers.flat[-1] = number
        np.savetxt(file, numbers)
        with pytest.raises(UserError, match=f"{name} line {len(numbers)}:"):
            load_dataset(tmp_path)


@pytest.mark.parametrize("places", [    # nobody by day, somebody else by day
    "query/3/rgb/a query/3/ir/a gallery/3/ir/a",
    "query/3/rgb/a query/4/ir/a gallery/3/ir/a gallery/3/rgb/a"])
def test_a_direction_without_answers_is_noted_and_the_other_one_ranked(places, tmp_path):
    places = own("train", (1, 2)) | dict.fromkeys(places.split(), 2)
    root, run, out = write_own(tmp_path / "data", places), tmp_path / "run", tmp_path / "out"
    for words in (["train.py", "--data", root, "--run", run, *TINY_LSMRL],
                  ["evaluate.py", "--checkpoint", run, "--out", out], ["data.py", root]):
        assert re.search("(?m)^note:.*infrared->visible", succeeds(here(*words)).stdout)
    for folder in run, out:
        assert results_of(folder)["directions"].keys() == {"visible->infrared"}


def tensors_in(network, file=""):
    """The state dict of a small network that was filled from a file; without one, at random."""
    if network == "resnet":
        stem, stages = Stem(4), Stages(width=4, blocks=[1] * 4, strides=(1, 2, 2, 1))
        if file:
            load_resnet50(str(file), [stem], [stages])
        return dict(stem.state_dict() | stages.state_dict())
    load = load_clip if network == "clip" else load_dinov2
    return dict(load("tiny" if file else "tiny-random", str(file)).state_dict())


@NETWORKS
@pytest.mark.parametrize("keys, prefix", [
    ("", "module."), ("state_dict", ""), ("model", "module."), ("teacher state_dict", "")])
def test_weights_in_other_places_and_without_counters(network, keys, prefix, tmp_path):
    expected, file = tensors_in(network), tmp_path / "w.pt"
    packed = {prefix + name: x for name, x in expected.items() if "num_batches" not in name}
    for key in keys.split():
        packed = {key: packed, "epoch": 90}
    torch.save(packed, file)
    torch.testing.assert_close(tensors_in(network, file), expected, rtol=0, atol=0)


@NETWORKS
def test_safetensors_of_all_types_are_read_and_a_torn_file_is_refused(network, tmp_path):
    expected, header, content = tensors_in(network), {"__metadata__": {"format": "pt"}}, b""
    for kind, (name, tensor) in zip(cycle(TYPES), expected.items()):
        stored = (9 * tensor.abs() + 1).to(getattr(torch, TYPES[kind]))
        expected[name], start = stored.to(tensor.dtype), len(content)
        content += stored.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [start, len(content)]}
    head, file = json.dumps(header).encode(), tmp_path / "w.safetensors"
    content = struct.pack("<Q", len(head)) + head + content
    file.write_bytes(content)
    torch.testing.assert_close(tensors_in(network, file), expected, rtol=0, atol=0)
    for torn in content[:20], content[:-3], b"\xff" * 20:
        file.write_bytes(torn)
        with pytest.raises(UserError, match="w.safetensors"):
            tensors_in(network, file)


def test_tensors_that_do_not_fit_are_counted_and_one_of_each_kind_named(tmp_path):
    tensors, file = tensors_in("dinov2"), tmp_path / "w.pt"
    missing, odd = ([name for name in tensors if f"blocks.{i}." in name] for i in (0, 1))
    surplus, odd = [f"extra{i:02}" for i in range(12)], odd[1:]    # 14, 12, 13 tensors
    tensors |= dict.fromkeys(surplus + odd, torch.ones(1, 2, 3, 4, 5))
    torch.save({name: tensors[name] for name in tensors.keys() - missing}, file)
    with pytest.raises(UserError) as caught:
        tensors_in("dinov2", file)
    for names, word in (missing, "missing"), (surplus, "surplus"), (odd, "shape"):
        assert re.search(rf"\b{len(names)}\b\D*{word}", str(caught.value))
        assert sum(name in str(caught.value) for name in names) == 1


@pytest.mark.parametrize("method, fresh", [
    ("dinogrl", {"streams.gait.head", "streams.appearance.head"}),
    ("lsmrl", {"heads", "prompts", "bank"})])
def test_a_run_goes_on_with_other_people(method, fresh, run_of, tmp_path):
    """As many as before: the old classifiers would fit, but they are others'."""
    call = ["train.py", "--init", run_of(method)]
    fails(here(*call, "--resume", run_of(method)), "--init", "--resume")
    call += str.split("--epochs 0 --identities 2 --frames 2 --workers 0")
    call += ["--data", write_own(tmp_path, own("train", "abcd")), "--run", tmp_path / "run"]
    assert "warm-up" not in succeeds(here(*call)).stdout
    old, new = tensors_of(run_of(method)), tensors_of(tmp_path / "run")
    changed = {next(filter(name.startswith, fresh), name)
               for name, tensor in old["model"].items()
               if not torch.equal(tensor, new["model"][name])}
    assert changed == fresh
    assert new["classes"] == list("abcd") and new["config"]["size"] == old["config"]["size"]
    assert old["options"].items() - new["options"].items() <= {("mask_warmup", 2)}    # may be 0


@pytest.mark.parametrize("wrong, least, most, first, beyond", [
    ([2.5, 5, 7, 8], 0.25, 0.25, 3, 5), ([3, 3, 3, 8], 0.25, 0.75, 3, 4), ([7] * 4, 0, 0, 6, 7)])
def test_equal_error_by_hand(wrong, least, most, first, beyond):
    """The last column does not count. In the second case one share jumps over the other."""
    from evaluate import equal_error
    distance, match = np.array([[1, 2, 3, 6, 9], [*wrong, 0]]), np.array([[True], [False]])
    found = equal_error(distance, match.repeat(5, 1), distance % 9 > 0)
    assert least <= found["rate"] <= most and first <= found["distance"] < beyond


def test_equal_errors_are_in_the_results_and_the_table(run_of, walkers, tmp_path, capsys):
    from evaluate import equal_error
    model, config, _ = load_run(run_of("lsmrl"))
    run = model, load_dataset(walkers), config
    report(*run, tmp_path, {})
    assert capsys.readouterr().out.count("\nequal error") == 1
    expected = {way: equal_error(*case) for way, case in evaluate(*run)[1].items()}
    assert results_of(tmp_path)["equal_error"] == expected
