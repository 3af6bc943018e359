"""The embedding network as one file, for programs without this repository.

    python evaluate.py --checkpoint RUN --export FILE.pt2
    network = torch.export.load("FILE.pt2").module()
    embeddings = network(frames, modality)

frames: float32 (B, T, 3, H, W), in 0..1, minus ImageNet's mean, over its deviation; modality (B,),
0 visible, 1 infrared -> (B, parts, dim). Any B; T, H and W are the run's.

torch.export writes down what is done with one example, so no shape may depend on what is seen. Two
of DinoGRL's do: each frame goes through the stem of its modality, and only a silhouette's pixels
are encoded. Exported, both stems read every frame and both branches every pixel, and what is not
wanted is dropped: the same embeddings, for a little more work.

Quick question: would that do in training? (No: the batch norms of stems and branches would take
their statistics from the wrong frames and pixels. At test they have fixed ones.)

Ours, not the papers': all of it.
"""
import copy
from contextlib import nullcontext
from types import MethodType
from unittest.mock import patch

from support.files import UserError, in_short, write_atomic

import torch
from torch import nn


def maps_by_both_stems(self, frames, modality):
    """In place of DinoGRL.appearance_maps."""
    B, T = frames.shape[:2]
    frames = frames.flatten(0, 1)
    is_visible = (modality == 0).repeat_interleave(T)[:, None, None, None]
    stems = torch.where(is_visible, self.visible_stem(frames), self.infrared_stem(frames))
    return self.backbone(stems).unflatten(0, (B, T)), torch.arange(B)


def codes_everywhere(self, mid4, silhouette):
    """In place of SASGL.codes_of."""
    pixels = self.upsampled(mid4)    # (N, H, W, 4D)
    is_body = (silhouette > 0)[:, None]
    codes = []
    for branch in self.denoising_branch, self.appearance_branch:
        code = branch(pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3])
        codes.append(code.permute(0, 3, 1, 2) * is_body)
    return codes


class Embedding(nn.Module):
    """model.embed as a forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frames, modality):
        return self.model.embed(frames, modality)


def export(original, T, size, path):
    """Writes the network that embeds T frames of that size (H, W), atomically. Raises UserError for
    one that cannot be exported, or would embed otherwise."""
    model = copy.deepcopy(original).cpu().eval()
    if hasattr(model, "appearance_maps"):
        model.appearance_maps = MethodType(maps_by_both_stems, model)
    if getattr(model, "sasgl", None) is not None:
        model.sasgl.codes_of = MethodType(codes_everywhere, model.sasgl)
    example = torch.randn(3, T, 3, *size), torch.tensor([0, 1, 0])
    any_number = torch.export.Dim("B", min=1, max=2 ** 16)
    # All is float32: where the code says "no autocast here", there is none, and torch.export
    # cannot write such a region down.
    no_autocast = patch("torch.autocast", lambda *arguments, **settings: nullcontext())
    try:
        with torch.no_grad(), no_autocast:
            program = torch.export.export(Embedding(model), example,
                                          dynamic_shapes=({0: any_number}, {0: any_number}))
            got, wanted = program.module()(*example), original.cpu().embed(*example)
    except Exception as error:    # torch raises dozens of types for what it cannot write down
        raise UserError(f"--export: this method cannot be exported ({type(error).__name__}: "
                        f"{in_short(error)}); expected an embed whose shapes depend on nothing "
                        "that is seen") from None
    if not torch.allclose(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item()):
        raise UserError("--export: exported, this method embeds otherwise; expected no own "
                        "appearance_maps and codes_of, which are replaced (support/export.py)")
    write_atomic(path, lambda file: torch.export.save(program, file))
