"""DINOv2 (Oquab et al., 2023): the frozen vision transformer from whose tokens DinoGRL reads gait.

    frames (N,3,448,224) -> patches of 14x14 -> 32x16 tokens of D, and CLS -> 12 blocks -> tokens

Mirrors github.com/facebookresearch/dinov2 (models/vision_transformer.py): the same state dict and
tokens, register variants included. SASGL uses get_intermediate_layers, norm, blocks and embed_dim.

Quick question: why is 0.1 added to the size of the grid when positions are interpolated? (The
official code does, so that rounding never loses a row. Without it all tokens would change.)
"""
from collections import OrderedDict

from support.files import ROOT, UserError
from support.weights import download, load_strictly, read_pretrained

import torch
import torch.nn.functional as F
from torch import nn

# name: (width D, blocks, heads, register tokens). `tiny` is distilled from DINOv2
# (tests/distil.py), `tiny-random` is not trained.
DINOV2 = {"dinov2_vits14": (384, 12, 6, 0), "dinov2_vits14_reg": (384, 12, 6, 4),
          "dinov2_vitb14": (768, 12, 12, 0), "dinov2_vitb14_reg": (768, 12, 12, 4),
          "dinov2_vitl14": (1024, 24, 16, 0), "dinov2_vitl14_reg": (1024, 24, 16, 4),
          "tiny": (32, 4, 1), "tiny-random": (32, 4, 1)}
TINY, RANDOM = "tiny", "tiny-random"
TINY_FILE = f"{ROOT}/assets/tiny_dinov2.pt"
# A pinned commit: torch.hub runs its code.
DINOV2_HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"


class DinoBlock(nn.Module):
    """Attention and MLP, each with a scaled shortcut: x (N, L, D) -> (N, L, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x):
        # Queries, keys and values of each head, of d = D / heads numbers.
        qkv = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        # (N, L, 3, heads, d) -> three of (N, heads, L, d)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.ls1.gamma * self.attn.proj(y.transpose(1, 2).flatten(2))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class DinoVisionTransformer(nn.Module):
    """The network of the official state dict; mask_token is not used.

    dim: of a token, D; depth: number of blocks; registers: number of extra tokens."""

    def __init__(self, dim, depth, heads, registers=0):
        super().__init__()
        self.embed_dim = dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Pre-trained at 518x518 pixels: 37x37 patches.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, 14, 14)))
        self.blocks = nn.ModuleList(DinoBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, h, w):
        """-> position embeddings of CLS and an h x w grid of patches, (1, 1 + h*w, D). Models with
        registers interpolate in another way, as in the official code."""
        if h == w == 37:
            return self.pos_embed
        how = {"size": (h, w), "antialias": True}
        if self.register_tokens is None:
            how = {"scale_factor": ((h + 0.1) / 37, (w + 0.1) / 37)}
        grid = self.pos_embed[:, 1:].mT.unflatten(2, (37, 37))    # (1, D, 37, 37)
        grid = F.interpolate(grid, mode="bicubic", **how)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def get_intermediate_layers(self, x, n, norm=True):
        """x (N, 3, H, W), H and W multiples of 14 -> a list: for each block whose index is in n its
        patch tokens (N, H*W/196, D). norm: whether the last layer norm is applied."""
        patches = self.patch_embed(x)
        N, _, h, w = patches.shape
        x = torch.cat([self.cls_token.expand(N, -1, -1), patches.flatten(2).mT], 1)
        x = x + self.positions(h, w)    # (N, 1 + h*w, D)
        if self.register_tokens is not None:    # after the CLS token, and without a position
            x = torch.cat([x[:, :1], self.register_tokens.expand(N, -1, -1), x[:, 1:]], 1)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in n:
                layers.append((self.norm(x) if norm else x)[:, -h * w:])
        return layers


def levels_of(prior):
    """The indices of the blocks whose tokens SASGL reads: the last of each quarter."""
    return [len(prior.blocks) * k // 4 - 1 for k in range(1, 5)]


# --------------------------------------------------------------- weights ----

# Parts of Hugging Face's names -> of the official ones, replaced in this order.
HUGGING_FACE = {
    "dinov2.": "", "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.position_embeddings": "pos_embed", "embeddings.": "", "layernorm.": "norm.",
    "encoder.layer.": "blocks.", "attention.attention.query.": "attn.qkv.",
    "attention.output.dense.": "attn.proj.", "layer_scale": "ls", "lambda1": "gamma"}


def with_official_names(tensors):
    """A state dict with the official names or Hugging Face's -> with the official ones."""
    for name in [name for name in tensors if ".query." in name]:
        # Query, key and value are one tensor in the official file.
        three = [name.replace("query", part) for part in ("query", "key", "value")]
        tensors[name] = torch.cat([tensors.pop(part) for part in three if part in tensors])
    for theirs, ours in HUGGING_FACE.items():
        tensors = {name.replace(theirs, ours): tensor for name, tensor in tensors.items()}
    return tensors


def load_dinov2(name, weights="", pretrained=True):
    """The frozen DINOv2 of that name (a key of DINOV2), in eval mode.

    weights: a local file with the official names or Hugging Face's, instead of the download.
    pretrained=False: random weights, for the caller to fill. Raises UserError."""
    if name not in DINOV2:
        raise UserError(f"DINOv2 {name} is not known; expected one of {', '.join(DINOV2)}")
    if name == TINY:
        weights = weights or TINY_FILE
    # Nothing drawn in here, or by torch.hub, changes what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        # `tiny-random` is the same network in every run, as a trained one would be.
        torch.default_generator.manual_seed(1002)    # not the GPUs': they are not restored
        dinov2 = DinoVisionTransformer(*DINOV2[name])
        if pretrained and (weights or name != RANDOM):
            tensors = read_pretrained(weights) if weights else download(
                f"DINOv2 ({name})", "give its official file by --dinov2-weights FILE, or take "
                "--dinov2 tiny (small, for trying out)", torch.hub.load, DINOV2_HUB, name,
                trust_repo=True, skip_validation=True).state_dict()
            tensors = with_official_names(tensors)
            tensors.setdefault("mask_token", dinov2.mask_token)    # not used; timm leaves it out
            load_strictly(dinov2, tensors, f"{weights or 'torch.hub'} (as DINOv2 {name})")
    return dinov2.requires_grad_(False).eval()
