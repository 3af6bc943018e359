"""DinoGRL assembled: weights in, shapes out, losses by loops, ablations."""
import itertools

import pytest
import torch

from data import UserError
from golden import formula, official_keys
from model import (DinoGRL, Parts, Stages, build, load_mask_branch, load_official, load_resnet50, triplet_loss)
from sasgl import load_dinov2
from train import config_of

SMALL = dict(width=8, blocks=(1, 1, 1, 1), strides=(1, 1, 1, 1), gait_strides=(1, 1, 1, 1), dim=16, dino_size=(224, 112),
             code_size=(16, 8))


def small_model(classes=5, **changes):
    torch.manual_seed(0)
    return DinoGRL(classes=classes, dinov2=load_dinov2("tiny"), **{**SMALL, **changes})


def torchvision_resnet50():
    """Formula-filled tensors under the names of torchvision's file, taken from the official list of the gait net's copy."""
    tensors = {"conv1.weight": formula("conv1.weight", (64, 3, 7, 7)), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    for k, s in official_keys()["best_model.pth"].items():
        if k.startswith("image_encoder1.resnet_conv.1."):
            tensors[k.replace("image_encoder1.resnet_conv.1", "bn1")] = formula(k, s)
        if k.startswith("share_encoder.resnet_conv."):
            stage, rest = k.removeprefix("share_encoder.resnet_conv.").split(".", 1)
            tensors[f"layer{int(stage) + 1}.{rest}"] = formula(k, s)
    return tensors


def test_batch_norms_folded_at_test_change_nothing():
    model = small_model()
    for buffer in model.buffers():
        if buffer.dtype == torch.float32:
            buffer += torch.rand_like(buffer)
    for name, parameter in model.named_parameters():
        if ".bn" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    frames, modality = torch.randn(3, 2, 3, 64, 32), torch.tensor([0, 1, 1])
    with torch.no_grad():
        folded = model.embed(frames, modality)
    plain = model.embed(frames, modality).detach()    # where a gradient may be asked for, every batch norm is called
    assert not torch.equal(folded, plain)    # two routes indeed
    torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


def test_embedding_does_not_depend_on_the_batch_or_its_order():
    model = small_model().eval()
    frames, modality = torch.randn(5, 2, 3, 64, 32), torch.tensor([1, 0, 1, 1, 0])
    with torch.no_grad():
        together = model.embed(frames, modality)
        alone = torch.cat([model.embed(frames[i:i + 1], modality[i:i + 1]) for i in range(5)])    # one modality, batch of one
    assert together.shape == (5, 70, 16)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_each_modality_has_its_own_stem():
    model = small_model().eval()
    frames = torch.randn(1, 2, 3, 64, 32)
    with torch.no_grad():
        assert not torch.allclose(model.embed(frames, torch.tensor([0])), model.embed(frames, torch.tensor([1])))
        model.infrared_stem.load_state_dict(model.visible_stem.state_dict())
        assert torch.equal(model.embed(frames, torch.tensor([0])), model.embed(frames, torch.tensor([1])))


@pytest.mark.parametrize("switches, parts", [({}, 70), ({"pbmge": False}, 62), ({"gait": False}, 31)])
def test_ablations_remove_parts_and_losses(switches, parts):
    model = small_model(**switches).train()
    frames, modality, label = torch.randn(4, 2, 3, 64, 32), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    losses, shown = model(frames, modality, label)
    sasgl = {"mask", "smooth_mask", "smooth_part", "diversity", "identity_gait", "triplet_gait"}
    expected = {"identity_appearance", "triplet_appearance"} | (sasgl if switches.get("gait", True) else set())
    assert losses.keys() == expected
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle}"
    with torch.no_grad():
        assert model.eval().embed(frames, modality).shape == (4, parts, 16)


def test_strips_run_from_top_to_bottom_and_time_is_a_maximum():
    maps = torch.zeros(1, 3, 1, 16, 8)
    maps[0, 1, 0, :4] = 2    # one frame, top quarter
    parts = Parts(channels=1, dim=1, strips=(1, 2, 4, 8, 16))
    torch.nn.init.ones_(parts.weight)
    got = parts(maps)[0, :, 0].tolist()
    assert got == [2.5] + [3, 0] + [4, 0, 0, 0] + [4, 4] + [0] * 6 + [4] * 4 + [0] * 12    # mean + max of each strip


def test_triplet_loss_against_loops_with_uneven_identities():
    torch.manual_seed(0)
    parts, label = torch.randn(6, 3, 4) * 0.2, torch.tensor([0, 1, 0, 2, 0, 1])
    per_part = []
    for p in range(3):
        terms = [max(0.0, ((parts[a, p] - parts[i, p]).norm() - (parts[a, p] - parts[n, p]).norm() + 0.2).item())
                 for a, i, n in itertools.product(range(6), repeat=3) if label[a] == label[i] and label[a] != label[n]]
        active = [t for t in terms if t > 0]
        per_part.append(sum(active) / max(1, len(active)))
    assert triplet_loss(parts, label).item() == pytest.approx(sum(per_part) / 3, rel=1e-5)
    x = parts.clone().requires_grad_()
    triplet_loss(x, label).backward()    # the anchor as its own positive is at distance 0, where the root has no slope
    assert x.grad.isfinite().all()


def test_resnet50_has_torchvision_s_tensors(tmp_path):
    tensors = torchvision_resnet50()
    stages = Stages(width=64, blocks=(3, 4, 6, 3), strides=(1, 2, 2, 1))
    assert len([k for k in stages.state_dict()]) + 6 + 2 == len(tensors) == 320    # + conv1, bn1, fc
    torch.save(tensors, tmp_path / "resnet50.pth")
    model = DinoGRL(classes=2, dinov2=load_dinov2("tiny"), dim=8)
    load_resnet50(model, str(tmp_path / "resnet50.pth"))
    for module in (model.backbone, model.sasgl.gait_net.backbone):
        assert torch.equal(module.layer3[5].conv2.weight, tensors["layer3.5.conv2.weight"])
    for stem in (model.visible_stem, model.infrared_stem):
        assert torch.equal(stem.conv1.weight, tensors["conv1.weight"]) and torch.equal(stem.bn1.running_var, tensors["bn1.running_var"])
    del tensors["layer2.0.conv1.weight"]
    torch.save(tensors, tmp_path / "torn.pth")
    with pytest.raises(UserError, match="layer2.0.conv1.weight is missing"):
        load_resnet50(model, str(tmp_path / "torn.pth"))


def test_no_network_for_resnet50_is_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="--resnet-weights FILE"):
        load_resnet50(small_model(), "imagenet")


def test_mask_branch_file(tmp_path):
    shapes = {k.removeprefix("dinov2.Mask_Branch."): s for k, s in official_keys()["best_shape.pth"].items() if ".Mask_Branch." in k}
    tensors = {k: formula(k, s) for k, s in shapes.items()}
    assert any(k.startswith("bn_t.") for k in tensors)    # BigGait's file holds it, nothing reads it
    torch.save({"model": tensors, "iteration": 80000}, tmp_path / "MaskBranch_vits14.pt")
    with torch.device("meta"):
        model = DinoGRL(classes=2, dinov2=load_dinov2("dinov2_vits14", pretrained=False), dim=8)
    model.sasgl.mask_branch.to_empty(device="cpu")
    load_mask_branch(model, str(tmp_path / "MaskBranch_vits14.pt"))
    assert torch.equal(model.sasgl.mask_branch.up_sampling.weight, tensors["up_sampling.weight"])
    torch.save(tensors, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="no key `model`"):
        load_mask_branch(model, str(tmp_path / "bare.pt"))


def test_official_files_other_class_counts_and_every_wrong_key_listed(official_files, tmp_path):
    files = {path.name: torch.load(path, weights_only=True) for path in official_files.iterdir()}

    def write(**changes):    # a fresh copy with some tensors changed, or (None) removed
        for name, tensors in files.items():
            mine = changes.get(name.removesuffix(".pth"), {})
            torch.save({k: v for k, v in {**tensors, **mine}.items() if v is not None}, tmp_path / name)

    head = torch.zeros(35, 256, 7)    # another class count: the files decide
    heads = {"best_model": {"BNNecks.fc_bin": head}, "best_shape": {"dinov2.gait_net.BNNecks.fc_bin": head}}
    write(**heads)
    assert load_official(tmp_path).classes == 7
    write(best_model={**heads["best_model"], "FCs.fc_bin": None, "text_encoder.weight": torch.zeros(2)},
          best_shape={**heads["best_shape"], "dinov2.Appearance_Branch.down_sampling.bias": torch.zeros(15),
                      "dinov2.gait_net.post_backbone.GAP.p": None})
    with pytest.raises(UserError) as error:
        load_official(tmp_path)
    for words in ("best_model.pth: FCs.fc_bin is missing", "best_model.pth: text_encoder.weight is surplus",
                  "best_shape.pth: dinov2.Appearance_Branch.down_sampling.bias is (15,), expected (16,)",
                  "best_shape.pth: dinov2.gait_net.post_backbone.GAP.p is missing"):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and "gcn" not in str(error.value)
    (tmp_path / "best_model2.pth").unlink()
    with pytest.raises(UserError, match="best_model2.pth"):
        load_official(tmp_path)


def test_paper_preset_is_resnet50_and_70_parts_of_256():
    with torch.device("meta"):
        model = build(config_of("dinogrl")(), 500, pretrained=False)
    assert model.gait_head.weight.shape == model.appearance_head.weight.shape == (35, 256, 500)
    assert sum(p.numel() for p in model.backbone.parameters()) + 9408 + 128 + 2048 * 1000 + 1000 == 25_557_032    # torchvision's
    assert config_of("dinogrl")().dinov2 == "dinov2_vits14"
