"""The authors' files: three of DinoGRL, one of BigGait (docs/weights.md says where they are).

    load_release(DinoGRL, folder)         best_model.pth, best_model2.pth, best_shape.pth -> DinoGRL
    load_mask_branch(mask_branch, path)   MaskBranch_vits14.pt -> SASGL's mask branch

Quick question: why are some of their tensors ignored? (They belong to layers that the released
network never calls. The files hold them, but no output depends on them.)
"""
import os

from support.dinov2 import load_dinov2
from support.files import UserError
from support.weights import load_strictly, read_tensors

import torch

# {file: (our module, {their prefix of a tensor's name: our prefix})}; the rest of the name is the
# same. The first prefix that fits is taken: enhance_gait.g. stands before enhance_gait.
OFFICIAL = {
    "best_model.pth": ("streams.appearance.", {
        "image_encoder1.resnet_conv.0.": "visible_stem.conv1.",
        "image_encoder1.resnet_conv.1.": "visible_stem.bn1.",
        "image_encoder2.resnet_conv.0.": "infrared_stem.conv1.",
        "image_encoder2.resnet_conv.1.": "infrared_stem.bn1.",
        "share_encoder.resnet_conv.0.": "backbone.layer1.",
        "share_encoder.resnet_conv.1.": "backbone.layer2.",
        "share_encoder.resnet_conv.2.": "backbone.layer3.",
        "share_encoder.resnet_conv.3.": "backbone.layer4.",
        "FCs.fc_bin": "parts.weight",
        "BNNecks.fc_bin": "head.weight",
        "BNNecks.bn1d.": "head.bn."}),
    "best_model2.pth": ("pbmge.", {
        "enhance_shape_net_3.g.0.": "enhance_gait.g.",
        "enhance_shape_net_3.": "enhance_gait.",
        "enhance_app_net_3.g.0.": "enhance_appearance.g.",
        "enhance_app_net_3.": "enhance_appearance."}),
    "best_shape.pth": ("streams.gait.", {
        "dinov2.dinov2.": "sasgl.prior.",
        "dinov2.Mask_Branch.": "sasgl.mask_branch.",
        "dinov2.Denoising_Branch.": "sasgl.denoising_branch.",
        "dinov2.Appearance_Branch.": "sasgl.appearance_branch.",
        "dinov2.gait_net.pre_part.forward_block.conv1.conv.": "sasgl.gait_net.denoising_stem.conv.",
        "dinov2.gait_net.pre_part.forward_block.bn1.": "sasgl.gait_net.denoising_stem.bn.",
        "dinov2.gait_net.pre_part.forward_block.layer1.0.": "sasgl.gait_net.denoising_stem.block.",
        "dinov2.gait_net.pre_rgb.forward_block.conv1.conv.": "sasgl.gait_net.appearance_stem.conv.",
        "dinov2.gait_net.pre_rgb.forward_block.bn1.": "sasgl.gait_net.appearance_stem.bn.",
        "dinov2.gait_net.pre_rgb.forward_block.layer1.0.": "sasgl.gait_net.appearance_stem.block.",
        "dinov2.gait_net.fusion.conv.forward_block.": "sasgl.gait_net.fusion.score.",
        "dinov2.gait_net.post_backbone.resnet_conv.0.": "sasgl.gait_net.backbone.layer1.",
        "dinov2.gait_net.post_backbone.resnet_conv.1.": "sasgl.gait_net.backbone.layer2.",
        "dinov2.gait_net.post_backbone.resnet_conv.2.": "sasgl.gait_net.backbone.layer3.",
        "dinov2.gait_net.post_backbone.resnet_conv.3.": "sasgl.gait_net.backbone.layer4.",
        "dinov2.gait_net.FCs.fc_bin": "parts.weight",
        "dinov2.gait_net.BNNecks.fc_bin": "head.weight",
        "dinov2.gait_net.BNNecks.bn1d.": "head.bn."})}

# Parts of the names of tensors that are ignored.
UNUSED = ".gcn_", ".GAP.p", "Mask_Branch.bn_t.", "Denoising_Branch.bn_t."


def official_name(own):
    """The name of a tensor of our DinoGRL -> "FILE: the authors' name"."""
    for file, (module, prefixes) in OFFICIAL.items():
        for theirs, ours in prefixes.items():
            if own.startswith(module + ours):
                return f"{file}: {theirs}{own.removeprefix(module + ours)}"
    return f"the model's own {own}"


def load_release(method, folder):
    """method: the class DinoGRL; folder: of the authors' three files -> the model in eval mode,
    with exactly their embeddings, and its config as a dict.

    Raises UserError that lists every tensor that does not fit, under the authors' name."""
    class Empty(method):
        def prior(self):    # best_shape.pth holds DINOv2 too
            return load_dinov2(self.options.dinov2, pretrained=False)

    files = {file: read_tensors(f"{folder}/{file}") for file in OFFICIAL}
    try:
        classes = files["best_model.pth"]["BNNecks.fc_bin"].shape[2]
    except (KeyError, IndexError):
        raise UserError(f"{folder}/best_model.pth has no BNNecks.fc_bin (parts, dim, classes); "
                        "expected the authors' file of the appearance stream") from None
    config = {"size": (256, 128), "frames": 6, "test_frames": 0, "frame_rule": "", "data": "",
              "reader": "", "workers": min(8, os.cpu_count() or 1), "test_batch": 32}
    model = Empty(method.Options(), classes, config["size"], pretrained=False)
    own = model.state_dict()
    names = {official_name(name): name for name in own}    # theirs: ours
    held = {f"{file}: {name}": tensor for file, tensors in files.items()
            for name, tensor in tensors.items() if not any(part in name for part in UNUSED)}
    wrong = [f"{name} is missing" for name in names if name not in held]
    for name, tensor in held.items():
        if name not in names:
            wrong.append(f"{name} is surplus")
        elif tensor.shape != own[names[name]].shape:
            expected = tuple(own[names[name]].shape)
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {expected}")
    if wrong:
        raise UserError(f"{folder} does not fit this DinoGRL: {'; '.join(wrong)}")
    model.load_state_dict({ours: held[theirs] for theirs, ours in names.items()})
    torch.backends.cudnn.allow_tf32 = False    # their embeddings to float32's last digits
    return model.eval(), config


def load_mask_branch(mask_branch, path):
    """BigGait's mask branch, under the key `model` of its file; bn_t is not used. Raises
    UserError."""
    tensors = read_tensors(path)
    if "model" not in tensors:
        raise UserError(f"{path} has no key `model`; expected BigGait's MaskBranch file; see "
                        "docs/weights.md")
    used = {name: tensor for name, tensor in tensors["model"].items()
            if not name.startswith("bn_t.")}
    load_strictly(mask_branch, used, path)
