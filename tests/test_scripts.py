"""The scripts as a user runs them: subprocesses (or, where refused early, main() itself), exit codes, files."""
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import train
from data import cli, main as check_dataset
from golden import formula
from layouts import tracks, write_buptcampus, write_hitsz
from lsmrl import CLIP_MODELS
from test_lsmrl import official_tensors, save_archive
from test_model import torchvision_resnet50
from test_sasgl import DINOV2, dino_shapes

ROOT = Path(__file__).parent.parent
# A run of seconds: the small preset, smaller still.
TINY = ("--preset small --epochs 1 --steps 2 --identities 2 --frames 2 --mask-warmup 2 --workers 0 --width 8 "
        "--dim 8 --dino-size 224 112 --code-size 16 8 --gait-strides 1 1 1 1").split()
TINY_LSMRL = "--method lsmrl --preset small --epochs 1 --steps 2 --identities 2 --frames 2 --size 32 16 --groups 2".split()

BOTH_CORES = {"OMP_NUM_THREADS": "2"}    # for networks of the paper's size; tiny ones gain nothing by it, and disturb each other


def run(*command, cwd=ROOT, env=None):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, stdin=subprocess.DEVNULL)


def together(function, *arguments):
    """function(argument) of each, all at once, for what waits for processes: most of a short one is spent on one core, importing torch."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, arguments))


def here(script, *arguments):
    """run() in this process: two seconds sooner, for what is refused early."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli({"train.py": train.main, "evaluate.py": evaluate.main, "data.py": check_dataset}[script])
    except SystemExit as stop:
        return SimpleNamespace(returncode=stop.code or 0, stdout=out.getvalue(), stderr=err.getvalue())
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fails(result, *words):
    """Exit code 2, one line on stderr (progress bars aside) that holds all the words, no traceback."""
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr and len(errors) == 1, result.stderr[-2000:]
    assert all(w in errors[0] for w in words), errors[0]


@pytest.fixture(scope="module")
def trained(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = run("train.py", "--data", walkers, "--run", folder, *TINY)
    assert result.returncode == 0, result.stderr
    return folder, result


def tensors_of(run_folder):
    return torch.load(Path(run_folder) / "last.pt", weights_only=True)


def same_bits(a, b):
    """Two checkpoints: the same weights and optimizer state, bit for bit."""
    for key in a["model"]:
        assert torch.equal(a["model"][key], b["model"][key]), key
    for p, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][p][k]) for k in state)


def test_a_run_leaves_what_it_promises(trained, walkers):
    folder, result = trained
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "curves.png", "last.pt", "log.jsonl", "results.json", "silhouettes-1.png"]
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {"method", "dataset", "directions", "silhouette_iou", "seconds"}
    assert results["dataset"] == "walkers" and 0 <= results["silhouette_iou"] <= 1
    for direction in ("infrared->visible", "visible->infrared"):
        r = results["directions"][direction]
        assert r.keys() == {"rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP", "queries", "gallery"}
        assert (r["queries"], r["gallery"]) == (20, 20) and 0 <= r["rank-1"] <= r["rank-5"] <= r["rank-20"] <= 1
        assert f"{100 * r['mAP']:.2f}" in result.stdout and direction in result.stdout
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == 1 and {"epoch", "lr", "mask", "smooth_mask", "smooth_part", "diversity", "identity_gait", "triplet_gait",
                              "identity_appearance", "triplet_appearance", "accuracy_gait"} <= log[0].keys()
    checkpoint = tensors_of(folder)
    assert checkpoint.keys() == {"model", "optimizer", "scheduler", "scaler", "epoch", "config", "classes", "method", "random", "step", "sums"}
    assert checkpoint["classes"] == [1, 2, 3, 4] and checkpoint["epoch"] == 1
    assert all(name in result.stderr for name in ("mask ", "smooth ", "div ", "id ", "tri ", "acc ")) and "frames/s" in result.stderr    # the progress bar names its losses


def whole_and_resumed(one_epoch, walkers, tmp_path, options):
    """-> the folders of two epochs at once and of a resumed run's one and one, which have the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    shutil.copytree(one_epoch, parts)
    for result in together(lambda command: run("train.py", *command, "--epochs", 2),
                           ["--data", walkers, "--run", whole, *options], ["--resume", parts, "--workers", 1]):    # workers change nothing
        assert result.returncode == 0, result.stderr
    a, b = tensors_of(whole), tensors_of(parts)
    assert a["epoch"] == b["epoch"] == 2
    same_bits(a, b)
    return whole, parts


def test_two_epochs_are_one_and_one_resumed_bit_for_bit(trained, walkers, tmp_path):
    whole, parts = whole_and_resumed(trained[0], walkers, tmp_path, TINY)
    assert json.loads((whole / "results.json").read_text())["directions"] == json.loads((parts / "results.json").read_text())["directions"]
    assert [json.loads(s)["epoch"] for s in (parts / "log.jsonl").read_text().splitlines()] == [1, 2]
    once_more = here("train.py", "--resume", parts)
    assert once_more.returncode == 0 and "raise --epochs" in once_more.stdout


def test_a_run_is_never_overwritten(trained, walkers, tmp_path):
    fails(here("train.py", "--data", walkers, "--run", trained[0], *TINY), "not empty", "--resume")
    (tmp_path / "notes.txt").write_text("mine")
    fails(here("train.py", "--resume", trained[0], "--run", tmp_path, "--epochs", 2), "not empty")
    fails(here("train.py", "--data", walkers, "--run", tmp_path / "notes.txt", *TINY), "notes.txt")


def test_options_given_on_resume_override_the_run_s(trained, tmp_path):
    result = here("train.py", "--resume", trained[0] / "last.pt", "--run", tmp_path / "other", "--epochs", 2, "--lr", 1e-5)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "other" / "log.jsonl").read_text().splitlines()[-1])["lr"] == pytest.approx(1e-5)
    group = tensors_of(tmp_path / "other")["optimizer"]["param_groups"][0]
    assert group["initial_lr"] == 1e-5
    assert here("train.py", "--resume", trained[0], "--preset", "paper").returncode == 2
    torch.save({k: v for k, v in tensors_of(trained[0]).items() if k != "optimizer"}, tmp_path / "light.pt")
    fails(here("train.py", "--resume", tmp_path / "light.pt", "--epochs", 2), "no optimizer")


def test_an_evaluation_that_a_stop_has_cost_is_made_up_for(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    line = json.loads((folder / "log.jsonl").read_text())
    (folder / "log.jsonl").write_text(json.dumps({k: v for k, v in line.items() if k not in ("rank-1", "mAP")}) + "\n" + json.dumps({**line, "epoch": 2}) + "\n")
    (folder / "silhouettes-1.png").unlink()
    result = here("train.py", "--resume", folder, "--epochs", 2, "--evaluate-every", 1)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(s) for s in (folder / "log.jsonl").read_text().splitlines()]    # the second line was of an epoch that was not saved
    assert [line["epoch"] for line in lines] == [1, 2] and all({"infrared->visible", "visible->infrared"} == set(line["rank-1"]) for line in lines)
    assert {"silhouettes-1.png", "silhouettes-2.png", "curves.png"} <= set(os.listdir(folder))
    (folder / "log.jsonl").write_text("{\n")
    fails(here("train.py", "--resume", folder, "--epochs", 3), "log.jsonl", "remove that line")


def test_a_masks_folder_of_another_kind_gives_no_iou(walkers, tmp_path):
    data = spoiled(walkers, tmp_path, lambda d: (shutil.rmtree(d / "masks"), (d / "masks").mkdir()))
    result = here("train.py", "--data", data, "--run", tmp_path / "run", *TINY, "--epochs", 0)
    assert result.returncode == 0 and "untrained" in result.stdout, result.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["silhouette_iou"] is None


def test_evaluate_reproduces_the_run_and_saves_embeddings(trained, tmp_path):
    folder, _ = trained
    result = run("evaluate.py", "--checkpoint", folder, "--json", tmp_path / "r.json", "--save", tmp_path / "e.npz",
                 "--test-batch", 1, "--workers", 0)    # a last batch of one, a first one too
    assert result.returncode == 0, result.stderr
    again, before = (json.loads(Path(p).read_text()) for p in (tmp_path / "r.json", folder / "results.json"))
    for direction, r in before["directions"].items():
        assert again["directions"][direction] == pytest.approx(r, abs=0.06)    # another batch size rounds otherwise
    saved = np.load(tmp_path / "e.npz")
    assert saved["embedding"].shape == (40, 70, 8) and saved["embedding"].dtype == np.float32
    assert len(saved["pid"]) == len(saved["camera"]) == 40 and set(saved["modality"]) == {"visible", "infrared"}
    assert all(Path(str(f)).is_file() for f in saved["frame"])


def test_official_end_to_end(walkers, official_files, tmp_path):
    data = write_hitsz(tmp_path / "vcm", test=tracks((21, 22, 23, 24, 25)))    # as few as may be, and without true masks to look at
    result = run("evaluate.py", "--official", official_files, "--data", data, "--save", tmp_path / "e.npz",
                 "--json", tmp_path / "r.json", "--frames", 1, env=BOTH_CORES)    # of 6: a paper-size frame takes half a second on a CPU
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "e.npz")["embedding"].shape == (40, 70, 256)
    assert json.loads((tmp_path / "r.json").read_text())["directions"]["infrared->visible"]["gallery"] == 20
    for name in ("best_model.pth", "best_model2.pth"):
        (tmp_path / name).symlink_to(official_files / name)
    (tmp_path / "best_shape.pth").write_bytes((official_files / "best_shape.pth").read_bytes()[:5000])
    fails(here("evaluate.py", "--official", tmp_path, "--data", walkers), "best_shape.pth")
    torch.save([1, 2], tmp_path / "best_shape.pth")
    fails(here("evaluate.py", "--official", tmp_path, "--data", walkers), "best_shape.pth", "no dict of named tensors")
    fails(here("evaluate.py", "--official", official_files, "--data", walkers, "--json", tmp_path / "no" / "r.json"), "no folder")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Local files for the paper preset: official DINOv2 and torchvision ResNet-50 names, formula-filled."""
    folder = tmp_path_factory.mktemp("weights")
    dim, depth, _, registers = DINOV2["dinov2_vits14"]
    torch.save({k: formula(k, s) for k, s in dino_shapes(dim, depth, registers).items()}, folder / "dinov2.pth")
    torch.save(torchvision_resnet50(), folder / "resnet50.pth")
    return ["--dinov2-weights", folder / "dinov2.pth", "--resnet-weights", folder / "resnet50.pth"]


def test_buptcampus_trains_evaluates_and_resumes(tmp_path):
    write_buptcampus(tmp_path / "bupt")
    data = tmp_path / "bupt" / "DATA"    # as some users will
    result = here("train.py", "--data", data, "--run", tmp_path / "run", *TINY)
    assert result.returncode == 0 and "on BUPTCampus" in result.stdout and "infrared->visible" in result.stdout, result.stderr
    result = here("train.py", "--resume", tmp_path / "run", "--epochs", 2)
    assert result.returncode == 0 and tensors_of(tmp_path / "run")["epoch"] == 2, result.stderr


def test_paper_preset_trains_evaluates_and_resumes(walkers, weights, tmp_path):
    few = ["--steps", 1, "--identities", 2, "--tracklets", 1, "--frames", 1, "--mask-warmup", 1, "--workers", 0, "--epochs", 1,
           "--size", 256, 64, "--code-size", 64, 16, "--dino-size", 112, 56]    # narrower views: the networks are the paper's
    result = run("train.py", "--data", walkers, "--preset", "paper", "--run", tmp_path / "run", *few, *weights, env=BOTH_CORES)
    assert result.returncode == 0, result.stderr
    result = here("train.py", "--resume", tmp_path / "run", "--epochs", 2)
    assert result.returncode == 0, result.stderr
    assert tensors_of(tmp_path / "run")["epoch"] == 2 and "infrared->visible" in result.stdout


@pytest.mark.parametrize("switch", [["--gait", "off"], ["--pbmge", "off"], ["--precision", "bfloat16"]])
def test_ablations_and_precision_run(switch, walkers, tmp_path):
    result = here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY, *switch)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["silhouette_iou"] is None) == (switch == ["--gait", "off"])


@pytest.fixture(scope="module")
def trained_lsmrl(walkers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lsmrl"
    result = run("train.py", "--data", walkers, "--run", folder, *TINY_LSMRL)
    assert result.returncode == 0, result.stderr
    return folder, result


def test_lsmrl_leaves_the_same_files_but_silhouettes_and_evaluates_alike(trained_lsmrl, tmp_path):
    folder, result = trained_lsmrl
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "curves.png", "last.pt", "log.jsonl", "results.json"]
    results, log = (json.loads((folder / name).read_text()) for name in ("results.json", "log.jsonl"))
    assert results["method"] == "lsmrl" and results["silhouette_iou"] is None and "silhouettes" not in result.stdout
    assert {"identity_z", "identity_f", "identity_cmi", "triplet_z", "text", "contrast", "centre", "consistency"} <= log.keys()
    assert tensors_of(folder)["model"]["bank"].shape == (4, CLIP_MODELS["tiny"]["dim"])
    again = here("evaluate.py", "--checkpoint", folder, "--json", tmp_path / "r.json", "--save", tmp_path / "e.npz", "--test-batch", 1)
    assert again.returncode == 0, again.stderr
    for direction, r in json.loads((tmp_path / "r.json").read_text())["directions"].items():
        assert r == pytest.approx(results["directions"][direction], abs=0.06)    # another batch size rounds otherwise
    embedding = np.load(tmp_path / "e.npz")["embedding"]
    assert embedding.shape == (40, 1, CLIP_MODELS["tiny"]["width"] + CLIP_MODELS["tiny"]["dim"])
    assert np.allclose((embedding ** 2).sum(2), 2, atol=1e-5)


def test_lsmrl_resumes_bit_for_bit_and_as_itself(trained_lsmrl, walkers, tmp_path):
    _, parts = whole_and_resumed(trained_lsmrl[0], walkers, tmp_path, TINY_LSMRL)    # its one epoch was all warm-up: the cosine had not begun
    checkpoint = tensors_of(parts)
    slow, fast = checkpoint["optimizer"]["param_groups"]
    assert fast["lr"] == pytest.approx(checkpoint["config"]["boost"] * slow["lr"]) and checkpoint["config"]["optimizer"] == "AdamW"
    for given, words in ((["--method", "dinogrl"], ["--method dinogrl", "lsmrl"]), (["--optimizer", "Adam"], ["--optimizer Adam", "AdamW"])):
        fails(here("train.py", "--resume", parts, *given), *words)


@pytest.mark.parametrize("switches", ["--cmi off --precision bfloat16", "--split 4 0 0 --contrast 0 --centre 0 --text 0 --groups 3"])
def test_lsmrl_s_parts_can_be_switched_off(switches, walkers, tmp_path):
    result = here("train.py", "--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL, *switches.split())
    assert result.returncode == 0, result.stderr
    losses = json.loads((tmp_path / "run" / "log.jsonl").read_text()).keys()
    assert not {"identity_cmi", "consistency"} & losses if "cmi" in switches else not {"text", "contrast", "centre"} & losses


def test_lsmrl_s_paper_preset_on_openai_s_format(walkers, tmp_path):
    save_archive(official_tensors(**CLIP_MODELS["ViT-B-16"]), tmp_path / "ViT-B-16.pt")
    few = "--preset paper --steps 1 --identities 2 --tracklets 1 --frames 1 --workers 0 --epochs 1 --size 96 48".split()    # 6 x 3 patches: a CPU
    result = run("train.py", "--method", "lsmrl", "--data", walkers, "--run", tmp_path / "run", *few, "--clip-weights", tmp_path / "ViT-B-16.pt", env=BOTH_CORES)
    assert result.returncode == 0, result.stderr
    assert "infrared->visible" in result.stdout and tensors_of(tmp_path / "run")["model"]["clip.visual.positional_embedding"].shape == (19, 768)
    shown = here("train.py", "--method", "lsmrl", "--help").stdout
    assert "--clip-weights" in shown and "--dinov2" not in shown and "(AdamW)" in shown


def spoiled(walkers, tmp_path, spoil):
    copy = tmp_path / "copy"
    shutil.copytree(walkers, copy)
    spoil(copy)
    return copy


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize("what, spoil, words", [
    ("names that point nowhere", lambda d: next((d / "Train" / "0001").rglob("*.jpg")).unlink(), ["no file", "0001"]),
    ("query out of range", lambda d: edit(d / "info" / "query_IDX.txt", lambda s: s.strip() + " 99999"), ["99999", "query_IDX"]),
    ("one modality", lambda d: edit(d / "info" / "track_train_info.txt",
                                    lambda s: "\n".join(l for l in s.splitlines() if not (l.split()[0] == "1" and l.split()[3] == "1"))),
     ["identity 1 ", "visible tracklets only"]),
    ("a gallery of 5", lambda d: edit(d / "info" / "track_test_info.txt",
                                      lambda s: "\n".join([l for l in s.splitlines() if l[0] == "1"] + [l for l in s.splitlines() if l[0] == "2"][:5])),
     ["gallery of 5", "rank-20"]),
    ("no names file", lambda d: (d / "info" / "train_name.txt").unlink(), ["train_name.txt"]),
])
def test_bad_datasets(what, spoil, words, walkers, tmp_path):
    if what == "a gallery of 5":    # query_IDX counts rows of the whole file: renumber
        def spoil(d, spoil=spoil):
            spoil(d)
            rows = (d / "info" / "track_test_info.txt").read_text().splitlines()
            (d / "info" / "query_IDX.txt").write_text(" ".join(str(i) for i, r in enumerate(rows, 1) if r[0] == "1"))
    data = spoiled(walkers, tmp_path, spoil)
    fails(here("train.py", "--data", data, "--run", tmp_path / "run", *TINY), *words)
    assert not (tmp_path / "run").exists()    # refused before anything is written
    checked = here("data.py", data)
    assert checked.returncode == 2 and "Traceback" not in checked.stderr


def test_missing_empty_and_foreign_folders(tmp_path):
    fails(here("train.py", "--data", tmp_path / "nowhere"), "no folder")
    (tmp_path / "empty").mkdir()
    fails(here("train.py", "--data", tmp_path / "empty"), "no dataset", "Train/ Test/ info/")
    (tmp_path / "empty" / "0001").mkdir()
    (tmp_path / "empty" / "bounding_box_train").mkdir()
    fails(here("evaluate.py", "--official", tmp_path, "--data", tmp_path / "empty"), "best_model.pth")
    fails(here("data.py", tmp_path / "empty"), "no dataset")


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_names_the_file(workers, walkers, tmp_path):
    def truncate(d):
        for path in (d / "Train").rglob("*.jpg"):
            path.write_bytes(path.read_bytes()[:300])
    data = spoiled(walkers, tmp_path, truncate)
    fails(here("train.py", "--data", data, "--run", tmp_path / "run", *TINY, "--workers", workers), ".jpg", "cannot be read")
    checked = here("data.py", data)
    assert checked.returncode == 2 and re.search(r"problem: .*Train.0001.*\.jpg cannot be read", checked.stdout)


def test_healthy_datasets_pass_the_check(walkers, tmp_path):
    write_hitsz(tmp_path / "vcm", layout="flat")
    write_buptcampus(tmp_path / "bupt")
    for folder in (walkers, tmp_path / "vcm", tmp_path / "bupt"):
        result = here("data.py", folder)
        assert result.returncode == 0 and "usable" in result.stdout, result.stdout + result.stderr


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/owned-by-a-pickle",)


def test_corrupt_foreign_and_malicious_checkpoints(trained, walkers, tmp_path):
    for name, data in (("torn.pt", (trained[0] / "last.pt").read_bytes()[:10000]), ("text.pt", b"hello"), ("empty.pt", b""),
                       ("evil.pt", pickle.dumps(Evil()))):
        (tmp_path / name).write_bytes(data)
        fails(here("evaluate.py", "--checkpoint", tmp_path / name, "--data", walkers), name)
    assert not os.path.exists("/tmp/owned-by-a-pickle")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    fails(here("evaluate.py", "--checkpoint", tmp_path / "foreign.pt", "--data", walkers), "no checkpoint of train.py")
    fails(here("train.py", "--resume", tmp_path / "nothing"), "no file")
    other = tensors_of(trained[0])
    other["classes"] = [1, 2, 3, 5]
    torch.save(other, tmp_path / "other.pt")
    fails(here("train.py", "--resume", tmp_path / "other.pt", "--run", tmp_path / "r", "--epochs", 2), "identities")


def test_no_network_for_the_hub(walkers, tmp_path):
    """The real hub call, pointed at a proxy that is not there."""
    offline = {v: "http://127.0.0.1:9" for v in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    offline |= {"TORCH_HOME": str(tmp_path), "no_proxy": ""}
    dinogrl, lsmrl = together(lambda method: run("train.py", "--data", walkers, "--preset", "paper", "--run", tmp_path / method, "--method", method, env=offline),
                              "dinogrl", "lsmrl")
    fails(dinogrl, "network", "--dinov2-weights", "--dinov2 tiny")
    fails(lsmrl, "network", "--clip-weights", "--preset small")


@pytest.mark.parametrize("method, options, words", [
    ("dinogrl", "--identities 99", "99 4"), ("dinogrl", "--epochs -1", "--epochs"), ("dinogrl", "--precision half", "half bfloat16"),
    ("magic", "", "magic dinogrl lsmrl"), ("lsmrl", "--resume=", "empty"), ("lsmrl", "--metho dinogrl", "--metho"), ("dinogrl", "--device cuda:9", "cuda"), ("dinogrl", "--dinov2 dinov3", "dinov3"),
    ("dinogrl", "--size 60 30", "--size 16"), ("dinogrl", "--gait maybe", "maybe"), ("dinogrl", "--blocks 1", "--blocks 4"),
    ("dinogrl", "--lr -1", "--lr"), ("dinogrl", "--lr nan", "--lr nan"), ("dinogrl", "--seed -1", "--seed"),
    ("dinogrl", "--milestones 70 40", "ascending"), ("dinogrl", "--clip tiny", "--clip"), ("dinogrl", "--optimizer SGD", "SGD AdamW"),
    ("lsmrl", "--clip RN50", "RN50 tiny"), ("lsmrl", "--size 60 32", "60 32 multiples"), ("lsmrl", "--split 1 1 1", "4 blocks"),
    ("lsmrl", "--groups 3", "3 4 rows"), ("lsmrl", "--split 4 0", "--split 3 numbers"), ("lsmrl", "--text -1", "--text"),
    ("lsmrl", "--clip-weights x.pt", "tiny --clip-weights"), ("lsmrl", "--gait off", "--gait"), ("lsmrl", "--contrast inf", "--contrast inf")])
def test_bad_options(method, options, words, walkers, tmp_path):
    tiny = TINY if method == "dinogrl" else TINY_LSMRL[2:]
    result = here("train.py", "--data", walkers, "--run", tmp_path / "run", *tiny, "--method", method, *options.split())
    error = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "error: " in error and all(word in error for word in words.split()), error
    assert not (tmp_path / "run").exists()    # refused before anything is written
