"""train.py from the command line to results.json: presets, options, methods of one's own."""
import json
from contextlib import nullcontext

import train
from data import load_dataset
from lsmrl import LSMRL
from model import DinoGRL
from scripts import OPTIONS, TINY_LSMRL, fails, here, log_of, results_of, succeeds, tensors_of
from support.parallel import precision_of
from train import learning_rate_factor, read_command_line

import pytest
import torch

DIRECTIONS = {"infrared->visible", "visible->infrared"}


# ----------------------------------------------------------------- a run ----

@pytest.mark.parametrize("method, streams, losses", [
    ("dinogrl", ["gait", "appearance"], {"mask", "smooth_part", "identity_gait", "triplet_gait",
                                         "identity_appearance", "triplet_appearance"}),
    ("lsmrl", ["z", "f"], {"identity_z", "identity_f", "identity_cmi", "triplet_z", "text",
                           "contrast", "centre", "consistency"})])
def test_a_run_leaves_config_log_checkpoint_and_results(method, streams, losses, run_of):
    folder = run_of(method)
    results, [line], checkpoint = results_of(folder), log_of(folder), tensors_of(folder)
    assert results["method"] == method and results["dataset"] == "walkers"
    assert results["directions"].keys() == DIRECTIONS and list(results["streams"]) == streams
    for scores in results["directions"].values():
        ranks = [scores[f"rank-{r}"] for r in (1, 5, 10, 20)]
        assert ranks == sorted(ranks) and ranks[-1] == 1 and scores["gallery"] == 20
        assert 0 <= scores["mINP"] <= scores["mAP"] <= 1
    assert (results["silhouette_iou"] is None) == (method == "lsmrl")
    assert losses <= line["losses"].keys() and line["epoch"] == 1
    for direction, scores in results["directions"].items():
        assert line["rank-1"][direction] == scores["rank-1"]
    assert checkpoint["epoch"] == 1 and checkpoint["classes"] == [1, 2, 3, 4]
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["identities"] == 2 and config["options"].keys()
    for picture in "sees", "ranking", "curves":
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_prior_is_evaluated_before_the_first_step_and_resuming_counts_on(walkers, tmp_path):
    run_it = ["train.py", *TINY_LSMRL, "--data", walkers, "--run", tmp_path / "run"]
    succeeds(here(*run_it, "--evaluate-first", "on"))
    succeeds(here("train.py", "--resume", tmp_path / "run", "--epochs", 2))
    first, one, two = log_of(tmp_path / "run")
    assert [line["epoch"] for line in (first, one, two)] == [0, 1, 2]
    assert first["rank-1"].keys() == two["rank-1"].keys() and "losses" not in first
    assert (tmp_path / "run/sees-0.png").read_bytes() != (tmp_path / "run/sees.png").read_bytes()


MY_IDEA = """
from dataclasses import dataclass
import lsmrl
from data import IdentitySampler

@dataclass
class Options(lsmrl.Options):
    pull: float = 0.01

class Three(IdentitySampler):
    def __init__(self, *given, P, **more):
        super().__init__(*given, P=3, **more)

def dark(frames, modality, rng, erase):
    return frames.float() * 0

class Mine(lsmrl.LSMRL):
    Options = Options
    sampler = Three
    augment = staticmethod(dark)

    def losses_of(self, streams, text, label, modality):
        return {"pull": self.options.pull + 0 * streams["z"].sum()}

    def forward(self, frames, modality, label):
        losses, shown = super().forward(frames, modality, label)
        brightest = float(frames.abs().max())
        return losses, {**shown, "people": float(len(label.unique())), "brightest": brightest}
"""


def test_a_method_of_your_own_runs_from_its_own_folder(walkers, tmp_path, monkeypatch):
    """Under a relative path, into a folder of runs/ that train.py chooses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_idea.py").write_text(MY_IDEA)
    words = ["--data", walkers, *TINY_LSMRL, "--method", "my_idea.py:Mine", "--pull", 0.5]
    printed = succeeds(here("train.py", *words)).stdout
    assert all(direction in printed for direction in DIRECTIONS)
    folder = tmp_path / "runs" / "my_idea-mine-walkers-1"
    [line] = log_of(folder)
    assert line["losses"]["pull"] == 0.5 and "triplet_z" not in line["losses"]
    assert line["shown"]["people"] == 3 and line["shown"]["brightest"] == 0
    assert json.loads((folder / "config.json").read_text())["options"]["pull"] == 0.5
    shown = here("train.py", "--method", "my_idea.py:Mine", "--help").stdout
    assert "--pull" in shown and "0.01" in shown


def test_zero_epochs_evaluate_the_untrained_model(walkers, tmp_path):
    folder = tmp_path / "run"
    new = ["--data", walkers, "--run", folder, *TINY_LSMRL, "--epochs", 0]
    assert "infrared->visible" in succeeds(here("train.py", *new)).stdout
    assert tensors_of(folder)["epoch"] == 0
    assert results_of(folder)["directions"].keys() == DIRECTIONS


def test_a_loss_that_is_not_finite_is_one_line_and_keeps_the_checkpoint(walkers, tmp_path):
    folder = tmp_path / "run"
    new = ["--data", walkers, "--run", folder, *TINY_LSMRL]
    fails(here("train.py", *new, "--text", "nan"), "not finite", "epoch 1, step 1", "--lr")
    checkpoint = tensors_of(folder)
    assert checkpoint["epoch"] == 0
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_bfloat16_differs_a_little_and_keeps_float32_weights(run_of, walkers, tmp_path):
    new = ["--data", walkers, "--run", tmp_path / "run", *TINY_LSMRL]
    succeeds(here("train.py", *new, "--precision", "bfloat16"))
    [coarse], [fine] = log_of(tmp_path / "run"), log_of(run_of("lsmrl"))
    assert coarse["losses"] != fine["losses"]
    assert coarse["losses"] == pytest.approx(fine["losses"], rel=0.2, abs=0.02)
    weight = tensors_of(tmp_path / "run")["model"]["clip.visual.proj"]
    assert weight.dtype == torch.float32


# --------------------------------------------------------------- options ----

def test_walkers_get_the_small_preset_and_other_data_the_paper_s(walkers, tmp_path):
    paper = read_command_line(["--data", str(tmp_path)])
    assert paper.config == train.Config(data=str(tmp_path)) and paper.options == DinoGRL.Options()
    for words in [], ["--data", str(walkers)]:
        small = read_command_line([*words, "--dim", "32"])
        assert small.config.epochs == DinoGRL.small["epochs"] and small.options.dim == 32
        assert small.options.strips == DinoGRL.small["strips"]
    asked = read_command_line(["--preset", "paper", "--milestones", "7", "9", "--gait", "off"])
    assert asked.config == train.Config(milestones=(7, 9)) and not asked.options.gait
    second = read_command_line(["--data", str(tmp_path), "--method", "lsmrl"])
    assert second.config.optimizer == "AdamW" and second.config.size == (288, 144)
    assert read_command_line(["--method", "lsmrl"]).config.people == LSMRL.small["people"]


@pytest.mark.parametrize("given, words", [
    ("--epohcs 3", ["--epohcs"]),
    ("--zzz 3", ["--zzz"]),
    ("--dinov2-weight x", ["--dinov2-weight"]),
    ("--method magic", ["magic", "dinogrl", "lsmrl"]),
    ("--method nowhere.py:Mine", ["nowhere.py:Mine"]),
    ("--optimizer SGD", ["SGD", "AdamW"]),
    ("--gait maybe", ["maybe"]),
    ("--epochs many", ["--epochs", "many"]),
    ("--identities 99", ["99", "4"]),
    ("--device cuda:99", ["cuda:99"]),
    ("--strips 1 3", ["(1, 3)", "8 rows"]),
    ("--data nowhere", ["nowhere"])])
def test_a_wrong_option_is_one_line_and_makes_no_folder(given, words, walkers, tmp_path):
    new = ["--data", walkers, "--run", tmp_path / "run", *OPTIONS["dinogrl"]]
    fails(here("train.py", *new, *given.split()), *words)
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_rises_then_falls_tenfold_or_as_a_cosine():
    config = train.Config(epochs=80, warmup_epochs=10, milestones=(40, 70))
    factors = [learning_rate_factor(config, epoch) for epoch in (0, 5, 10, 39, 40, 69, 70, 79)]
    assert factors == pytest.approx([0.01, 0.505, 1, 1, 0.1, 0.1, 0.01, 0.01])
    config = train.Config(epochs=21, warmup_epochs=1, cosine=True)
    factors = [learning_rate_factor(config, epoch) for epoch in (0, 1, 11, 21)]
    assert factors == pytest.approx([0.01, 1, 0.505, 0.01])


def test_auto_is_the_precision_that_the_device_has_in_hardware(monkeypatch):
    assert precision_of("auto", torch.device("cpu")) == torch.float32
    assert precision_of("bfloat16", torch.device("cpu")) == torch.bfloat16
    for has_it, dtype in (False, torch.float16), (True, torch.bfloat16):    # a T4, an H200
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, answer=has_it: answer)
        assert precision_of("auto", torch.device("cuda")) == dtype


def test_the_warm_up_trains_the_mask_branch_alone_and_leaves_no_gradients(walkers):
    asked = read_command_line([*OPTIONS["dinogrl"], "--data", str(walkers)])
    dataset, device = load_dataset(walkers), torch.device("cpu")
    loader = train.loader_of(asked.config, DinoGRL, dataset, device)
    model = DinoGRL(asked.options, 4, asked.config.size)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train.warm_up(model, loader, lambda frames, *_: frames / 255.0, asked.config, nullcontext,
                  torch.amp.GradScaler("cpu", enabled=False))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith(model.warm_up_module) for name in moved)
    assert all(parameter.grad is None for parameter in model.parameters())
