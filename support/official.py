"""The authors' files: three of DinoGRL, one of BigGait (docs/weights.md says where they are)."""
import os

from support.dinov2 import load_dinov2
from support.files import UserError
from support.weights import load_strictly, read_pretrained, read_tensors

import torch

FILES = "best_model.pth", "best_model2.pth", "best_shape.pth"

# Parts of our names -> of theirs, replaced in this order.
PARTS = {
    "streams.appearance.": "best_model.pth: ",
    "pbmge.": "best_model2.pth: ",
    "streams.gait.sasgl.": "best_shape.pth: dinov2.",
    "streams.gait.": "best_shape.pth: dinov2.gait_net.",
    "visible_stem.conv1.": "image_encoder1.resnet_conv.0.",
    "visible_stem.bn1.": "image_encoder1.resnet_conv.1.",
    "infrared_stem.conv1.": "image_encoder2.resnet_conv.0.",
    "infrared_stem.bn1.": "image_encoder2.resnet_conv.1.",
    "gait_net.backbone.": "gait_net.post_backbone.",
    ": backbone.": ": share_encoder.",
    **{f"layer{i + 1}.": f"resnet_conv.{i}." for i in range(4)},
    "parts.weight": "FCs.fc_bin",
    "head.weight": "BNNecks.fc_bin",
    "head.bn.": "BNNecks.bn1d.",
    "prior.": "dinov2.",
    "mask_branch.": "Mask_Branch.",
    "denoising_branch.": "Denoising_Branch.",
    "appearance_branch.": "Appearance_Branch.",
    "denoising_stem.": "pre_part.forward_block.",
    "appearance_stem.": "pre_rgb.forward_block.",
    "forward_block.conv.": "forward_block.conv1.conv.",
    "forward_block.bn.": "forward_block.bn1.",
    "forward_block.block.": "forward_block.layer1.0.",
    "fusion.score.": "fusion.conv.forward_block.",
    "enhance_gait.": "enhance_shape_net_3.",
    "enhance_appearance.": "enhance_app_net_3.",
    "net_3.g.": "net_3.g.0."}

# Parts of the names of tensors that are ignored.
UNUSED = ".gcn_", ".GAP.p", "Mask_Branch.bn_t.", "Denoising_Branch.bn_t."


def official_name(own):
    """The name of a tensor of our DinoGRL -> "FILE: the authors' name"."""
    name = own
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    return name if ".pth: " in name else f"the model's own {own}"


def load_release(method, folder):
    """method: the class DinoGRL; folder: of the authors' three files -> the model in eval mode,
    with exactly their embeddings, and its config as a dict. Raises UserError."""
    class Empty(method):
        def prior(self):    # best_shape.pth holds DINOv2 too
            return load_dinov2(self.options.dinov2, pretrained=False)

    files = {file: read_tensors(f"{folder}/{file}") for file in FILES}
    try:
        classes = files["best_model.pth"]["BNNecks.fc_bin"].shape[2]
    except (KeyError, IndexError):
        raise UserError(f"{folder}/best_model.pth has no BNNecks.fc_bin (parts, dim, classes); "
                        "expected the authors' file of the appearance stream") from None
    config = {"size": (256, 128), "frames": 6, "test_frames": 0, "frame_rule": "", "data": "",
              "reader": "", "workers": min(8, os.cpu_count() or 1), "test_batch": 32}
    model = Empty(method.Options(), classes, config["size"], pretrained=False)
    held = {f"{file}: {name}": tensor for file, tensors in files.items()
            for name, tensor in tensors.items() if not any(part in name for part in UNUSED)}
    load_strictly(model, held, f"{folder} (as DinoGRL)", official_name)
    torch.backends.cudnn.allow_tf32 = False    # their embeddings to float32's last digits
    return model.eval(), config


def load_mask_branch(mask_branch, path):
    """BigGait's mask branch; its bn_t is not used. Raises UserError."""
    used = {name: tensor for name, tensor in read_pretrained(path).items()
            if not name.startswith("bn_t.")}
    load_strictly(mask_branch, used, f"{path} (as BigGait's mask branch)")
