"""DinoGRL assembled: weights in, shapes out, losses by loops, ablations, an idea of one's own."""
import itertools
from dataclasses import replace

from golden import formula, official_keys
from model import (
    DinoGRL,
    Options,
    Parts,
    identity_loss,
    load_mask_branch,
    load_official,
    triplet_loss,
)
from sasgl import MaskBranch
from support.files import UserError
from support.options import check_ranges
from support.resnet import Stages, Stem, load_resnet50
from train import method_and_config

import pytest
import torch

SMALL = Options(width=8, blocks=(1, 1, 1, 1), strides=(1, 1, 1, 1), gait_strides=(1, 1, 1, 1),
                dim=16, dino_size=(224, 112), code_size=(16, 8), dinov2="tiny-random",
                resnet_weights="random")
BATCH = {"modality": torch.tensor([0, 0, 1, 1]), "label": torch.tensor([0, 1, 0, 1])}


def small_model(method=DinoGRL, classes=5, **changes):
    torch.manual_seed(0)
    return method(replace(SMALL, **changes), classes)


def training_step(model, seed=1):
    """-> named losses, what else is shown."""
    frames = torch.randn(4, 2, 3, 64, 32, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    return model.train()(frames, **BATCH)


def saved(tensors, path):
    torch.save(tensors, path)
    return str(path)


# ------------------------------------------------------------ shapes, parts ----

def test_embedding_does_not_depend_on_the_batch_or_its_order():
    model = small_model().eval()
    frames, modality = torch.randn(5, 2, 3, 64, 32), torch.tensor([1, 0, 1, 1, 0])
    with torch.no_grad():
        together = model.embed(frames, modality)
        # One modality, a batch of one.
        alone = [model.embed(frames[i:i + 1], modality[i:i + 1]) for i in range(5)]
    assert together.shape == (5, 70, 16)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_each_modality_has_its_own_stem():
    model = small_model().eval()
    frames = torch.randn(1, 2, 3, 64, 32)

    def both():
        with torch.no_grad():
            return [model.embed(frames, torch.tensor([modality])) for modality in (0, 1)]
    assert not torch.allclose(*both())
    model.infrared_stem.load_state_dict(model.visible_stem.state_dict())
    assert torch.equal(*both())


@pytest.mark.parametrize("switches, parts", [
    ({}, 70), ({"pbmge": False}, 62), ({"gait": False}, 31)])
def test_ablations_remove_parts_and_losses(switches, parts):
    model = small_model(**switches)
    losses, shown = training_step(model)
    expected, streams = {"identity_appearance", "triplet_appearance"}, {"appearance"}
    if model.config.gait:
        expected |= {"mask", "smooth_mask", "smooth_part", "diversity", "identity_gait",
                     "triplet_gait"}
        streams |= {"gait"}
    assert losses.keys() == expected
    assert shown.keys() == {f"accuracy_{stream}" for stream in streams}
    assert all(loss.ndim == 0 for loss in (*losses.values(), *shown.values()))
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle}"
    frames = torch.randn(4, 2, 3, 64, 32)
    with torch.no_grad():
        assert model.eval().embed(frames, BATCH["modality"]).shape == (4, parts, 16)


class OneStream(DinoGRL):
    """What a student may write: gait alone is compared."""

    def embed(self, frames, modality):
        return super().embed(frames, modality)[:, :35]


@pytest.mark.parametrize("switches", [{}, {"pbmge": False}, {"strips": (1, 2, 4, 8)}])
@torch.no_grad()
def test_the_streams_of_an_embedding_are_those_it_was_made_of(switches):
    """All of it, gait first. Where there is one alone, none is named."""
    model = small_model(**switches).eval()
    batch = torch.randn(4, 2, 3, 64, 32), BATCH["modality"]
    embedding, (streams, _) = model.embed(*batch), model.parts_by_stream(*batch)
    named = model.streams_of(embedding)
    assert list(named) == list(streams) == ["gait", "appearance"]
    assert all(torch.equal(named[name], parts) for name, parts in streams.items())
    assert torch.equal(torch.cat(list(named.values()), dim=1), embedding)
    for other in small_model(gait=False), small_model(method=OneStream):
        assert other.streams_of(other.eval().embed(*batch)) == {}
        assert other.strips_of(torch.arange(35.0)) == {}


def test_the_narrowest_strips_of_each_stream_are_named():
    """Of 1 + 2 + 4 + 8 + 16 parts and 4 refined ones, twice: the 16 before the refined ones."""
    strips = small_model().strips_of(torch.arange(70.0))
    assert {name: values.tolist() for name, values in strips.items()} == {
        "gait": list(range(15, 31)), "appearance": list(range(50, 66))}


def test_strips_run_from_top_to_bottom_and_time_is_a_maximum():
    maps = torch.zeros(1, 3, 1, 16, 8)
    maps[0, 1, 0, :4] = 2    # one frame, top quarter
    parts = Parts(channels=1, dim=1, strips=(1, 2, 4, 8, 16))
    torch.nn.init.ones_(parts.weight)
    got = parts(maps)[0, :, 0].tolist()
    # Mean + maximum of each strip.
    want = [2.5], [3, 0], [4, 0, 0, 0], [4, 4] + [0] * 6, [4] * 4 + [0] * 12
    assert got == sum(want, [])


def test_strips_are_an_option():
    """Fewer granularities: 1 + 2 + 4 + 8 parts and 3 refined ones in each stream."""
    model = small_model(strips=(1, 2, 4, 8))
    assert model.gait_parts.weight.shape == model.appearance_parts.weight.shape == (15, 256, 16)
    for head in (model.gait_head, model.appearance_head):
        assert head.weight.shape == (15 + 3, 16, 5)
    losses, _ = training_step(model)
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        embedding = model.eval().embed(torch.randn(4, 2, 3, 64, 32), BATCH["modality"])
    assert embedding.shape == (4, 2 * (15 + 3), 16)
    without = small_model(strips=(1, 2, 4, 8), pbmge=False)
    assert without.gait_head.weight.shape == (15, 16, 5)


@pytest.mark.parametrize("strips", [
    (), (1,), (2, 4), (1, 0), (1, -2), (1, 257), (1,) * 11, (1, 3), (1, 32)])
def test_strips_that_cannot_be_cut_are_refused(strips):
    _, configuration = method_and_config("dinogrl")
    configuration().check()
    with pytest.raises(UserError, match="strips"):
        configuration(strips=strips).check()


@pytest.mark.parametrize("name", ["blocks", "strides", "gait_strides"])
def test_resnets_have_four_layers_of_as_many_blocks_as_the_config_says(name):
    for wrong in ((1, 1, 1), (1, 1, 1, 1, 1), ()):
        option = "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=f"{option}.*expected 4 numbers"):
            check_ranges(replace(SMALL, **{name: wrong}))
    check_ranges(SMALL)
    model = small_model(blocks=(2, 1, 3, 1), strides=(1, 2, 1, 1), strips=(1, 2, 4, 8))
    for stages in (model.backbone, model.sasgl.gait_net.backbone):
        layers = [stages.layer1, stages.layer2, stages.layer3, stages.layer4]
        assert [len(layer) for layer in layers] == [2, 1, 3, 1]
    assert model.backbone(torch.zeros(1, 8, 16, 8)).shape == (1, 256, 8, 4)
    assert model.sasgl.gait_net.backbone(torch.zeros(1, 8, 16, 8)).shape == (1, 256, 16, 8)


# ------------------------------------------------------------------- losses ----

def test_triplet_loss_against_loops_with_uneven_identities():
    torch.manual_seed(0)
    parts, label = torch.randn(6, 3, 4) * 0.2, torch.tensor([0, 1, 0, 2, 0, 1])
    per_part = []
    for p in range(3):
        terms = []
        for anchor, positive, negative in itertools.product(range(6), repeat=3):
            if label[anchor] == label[positive] and label[anchor] != label[negative]:
                near = (parts[anchor, p] - parts[positive, p]).norm()
                far = (parts[anchor, p] - parts[negative, p]).norm()
                terms.append(max(0.0, (near - far + 0.2).item()))
        active = [term for term in terms if term > 0]
        per_part.append(sum(active) / max(1, len(active)))
    assert triplet_loss(parts, label).item() == pytest.approx(sum(per_part) / 3, rel=1e-5)
    x = parts.clone().requires_grad_()
    # The anchor as its own positive is at distance 0, where the root has no slope.
    triplet_loss(x, label).backward()
    assert x.grad.isfinite().all()


class Centred(DinoGRL):
    """An idea of one's own in ten lines: parts are drawn to their identity's centre instead."""

    def losses_of(self, parts, logits, label, modality):
        same = (label[:, None] == label).float()
        share = same / same.sum(1, keepdim=True)    # (B, B)
        centre = torch.einsum("ab,bpd->apd", share, parts)
        losses = super().losses_of(parts, logits, label, modality)
        return {**losses, "triplet": (parts - centre).norm(dim=2).mean()}


def test_a_subclass_changes_exactly_the_loss_that_it_replaces():
    losses, shown = training_step(small_model())
    own_losses, own_shown = training_step(small_model(Centred))
    assert own_losses.keys() == losses.keys()
    changed = {name for name in losses if not torch.equal(losses[name], own_losses[name])}
    assert changed == {"triplet_gait", "triplet_appearance"}
    assert all(torch.equal(shown[name], own_shown[name]) for name in shown)
    sum(own_losses.values()).backward()


def test_losses_of_sees_the_whole_batch_and_is_weighted_by_the_configuration():
    seen = []

    class Watching(DinoGRL):
        def losses_of(self, parts, logits, label, modality):
            seen.append((parts, logits, label, modality))
            return super().losses_of(parts, logits, label, modality)
    changes = {"identity_weight": 0.5, "triplet_weight": 3.0, "margin": 0.7}
    losses, _ = training_step(small_model(Watching, **changes))
    for stream, (parts, logits, label, modality) in zip(("gait", "appearance"), seen, strict=True):
        assert parts.shape == (4, 35, 16) and logits.shape == (4, 35, 5)
        assert torch.equal(label, BATCH["label"]) and torch.equal(modality, BATCH["modality"])
        identity, triplet = identity_loss(logits, label), triplet_loss(parts, label, margin=0.7)
        assert torch.equal(losses[f"identity_{stream}"], 0.5 * identity)
        assert torch.equal(losses[f"triplet_{stream}"], 3 * triplet)


# ---------------------------------------------------------- pre-trained parts ----

def torchvision_resnet50():
    """Formula-filled tensors under the names of torchvision's file, taken from the official list of
    the shared ResNet's copy."""
    tensors = {"conv1.weight": formula("conv1.weight", (64, 3, 7, 7)),
               "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    stem, stages = "image_encoder1.resnet_conv.1.", "share_encoder.resnet_conv."
    for key, shape in official_keys()["best_model.pth"].items():
        if key.startswith(stem):
            tensors["bn1." + key.removeprefix(stem)] = formula(key, shape)
        if key.startswith(stages):
            stage, rest = key.removeprefix(stages).split(".", 1)
            tensors[f"layer{int(stage) + 1}.{rest}"] = formula(key, shape)
    return tensors


def test_resnet50_has_torchvision_s_tensors(tmp_path):
    tensors = torchvision_resnet50()
    stages = Stages(width=64, blocks=(3, 4, 6, 3), strides=(1, 2, 2, 1))
    assert len(stages.state_dict()) + 6 + 2 == len(tensors) == 320    # + conv1 and bn1, fc
    path = saved(tensors, tmp_path / "resnet50.pth")
    model = DinoGRL(Options(dinov2="tiny-random", dim=8, resnet_weights=path), 2)
    for module in (model.backbone, model.sasgl.gait_net.backbone):
        assert torch.equal(module.layer3[5].conv2.weight, tensors["layer3.5.conv2.weight"])
    for stem in (model.visible_stem, model.infrared_stem):
        assert torch.equal(stem.conv1.weight, tensors["conv1.weight"])
        assert torch.equal(stem.bn1.running_var, tensors["bn1.running_var"])
    del tensors["layer2.0.conv1.weight"]
    torn = saved(tensors, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="layer2.0.conv1.weight is missing"):
        load_resnet50(torn, [Stem(64)], [stages])


def test_no_network_for_resnet50_is_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="--resnet-weights FILE") as error:
        small_model(resnet_weights="imagenet")
    assert "\n" not in str(error.value)
    replaced = replace(SMALL, resnet_weights="imagenet")
    DinoGRL(replaced, 5, pretrained=False)    # a checkpoint will fill it: nothing is fetched


def mask_branch_tensors():
    """Formula-filled tensors under the names of BigGait's file."""
    prefix = "dinov2.Mask_Branch."
    return {key.removeprefix(prefix): formula(key.removeprefix(prefix), shape)
            for key, shape in official_keys()["best_shape.pth"].items() if key.startswith(prefix)}


def test_mask_branch_file(tmp_path):
    tensors = mask_branch_tensors()
    # BigGait's file holds it, nothing reads it.
    assert any(name.startswith("bn_t.") for name in tensors)
    contents = {"model": tensors, "iteration": 80000}
    mask_branch = MaskBranch(384)
    load_mask_branch(mask_branch, saved(contents, tmp_path / "MaskBranch_vits14.pt"))
    for name, tensor in mask_branch.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    with pytest.raises(UserError, match="no key `model`"):
        load_mask_branch(mask_branch, saved(tensors, tmp_path / "bare.pt"))


def test_a_trained_mask_branch_spares_the_warm_up(tmp_path):
    assert small_model(mask_warmup=7).warm_up_steps == 7
    assert small_model(mask_warmup=7, gait=False).warm_up_steps == 0
    torch.manual_seed(3)
    trained = MaskBranch(32)    # tiny-random's width
    path = saved({"model": trained.state_dict()}, tmp_path / "mask.pt")
    model = small_model(mask_warmup=7, mask_branch=path)
    assert model.warm_up_steps == 0
    assert torch.equal(model.sasgl.mask_branch.up_sampling.weight, trained.up_sampling.weight)


def test_official_files_other_class_counts_and_every_wrong_key_listed(official_files, tmp_path):
    files = {path.name: torch.load(path, weights_only=True) for path in official_files.iterdir()}

    def write(**changes):    # a fresh copy with some tensors changed, or (None) removed
        for name, tensors in files.items():
            mine = {**tensors, **changes.get(name.removesuffix(".pth"), {})}
            kept = {key: tensor for key, tensor in mine.items() if tensor is not None}
            torch.save(kept, tmp_path / name)

    head = torch.zeros(35, 256, 7)    # another class count: the files decide
    heads = {"best_model": {"BNNecks.fc_bin": head},
             "best_shape": {"dinov2.gait_net.BNNecks.fc_bin": head}}
    write(**heads)
    model = load_official(tmp_path)
    assert model.gait_head.weight.shape[-1] == 7 and not model.training
    heads["best_model"] |= {"FCs.fc_bin": None, "text_encoder.weight": torch.zeros(2)}
    heads["best_shape"] |= {"dinov2.Appearance_Branch.down_sampling.bias": torch.zeros(15),
                            "dinov2.gait_net.post_backbone.GAP.p": None}
    write(**heads)
    with pytest.raises(UserError) as error:
        load_official(tmp_path)
    message = str(error.value)
    for words in ("best_model.pth: FCs.fc_bin is missing",
                  "best_model.pth: text_encoder.weight is surplus",
                  "best_shape.pth: dinov2.Appearance_Branch.down_sampling.bias is (15,), "
                  "expected (16,)",
                  "best_shape.pth: dinov2.gait_net.post_backbone.GAP.p is missing"):
        assert words in message
    assert "\n" not in message and "gcn" not in message
    (tmp_path / "best_model2.pth").unlink()
    with pytest.raises(UserError, match="best_model2.pth"):
        load_official(tmp_path)


def test_paper_preset_is_resnet50_and_70_parts_of_256():
    method, configuration = method_and_config("dinogrl")
    assert method.__name__ == "DinoGRL" and configuration().dinov2 == "dinov2_vits14"
    with torch.device("meta"):
        model = method(configuration(), 500, pretrained=False)
    assert model.gait_head.weight.shape == model.appearance_head.weight.shape == (35, 256, 500)
    ours = sum(p.numel() for p in model.backbone.parameters())
    stem, classifier = 9408 + 128, 2048 * 1000 + 1000
    assert ours + stem + classifier == 25_557_032    # torchvision's
