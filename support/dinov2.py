"""DINOv2 (Oquab et al., 2023): the frozen vision transformer from whose tokens DinoGRL reads gait.

    frames (N,3,448,224) -> patches of 14x14 -> 32x16 tokens of D, and CLS -> 12 blocks -> tokens

Mirrors github.com/facebookresearch/dinov2 (models/vision_transformer.py): the same state dict,
register variants included, and the same tokens. Another network can take its place: SASGL uses
get_intermediate_layers, norm, blocks, embed_dim and patch_size.

Quick question: why is 0.1 added to the size of the grid when positions are interpolated? (The
official code adds it so that rounding never gives one row too few. The grid shifts a little, in
every published result too: without the 0.1 all tokens change.)

Ours, not the paper's: the two tiny networks.
"""
import os
import warnings
from collections import OrderedDict

from support.files import ROOT, UserError
from support.weights import download, load_strictly, read_tensors

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 14
# name: (width D, blocks, heads, register tokens). The tiny ones are for the offline demo and tests:
# `tiny` is distilled from DINOv2 (support/priors.py), `tiny-random` is not trained.
DINOV2 = {"dinov2_vits14": (384, 12, 6, 0), "dinov2_vits14_reg": (384, 12, 6, 4),
          "dinov2_vitb14": (768, 12, 12, 0), "dinov2_vitb14_reg": (768, 12, 12, 4),
          "dinov2_vitl14": (1024, 24, 16, 0), "dinov2_vitl14_reg": (1024, 24, 16, 4),
          "tiny": (32, 4, 1, 0), "tiny-random": (32, 4, 1, 0)}
TINY, RANDOM = "tiny", "tiny-random"
TINY_FILE = os.path.join(ROOT, "assets", "tiny_dinov2.pt")
RANDOM_SEED = 1002
# A pinned commit: torch.hub runs its code.
DINOV2_HUB = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class DinoAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, L, D = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)    # (N, heads, L, d) each
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(N, L, D))


class DinoBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DinoAttention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    """DINOv2's ViT with the official state dict (its mask_token included, unused)."""
    patch_size = PATCH

    def __init__(self, *, dim, depth, heads, registers=0):
        super().__init__()
        self.embed_dim = dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Pre-trained at 518x518 pixels: 37x37 patches.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 37 * 37, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, PATCH, PATCH)))
        self.blocks = nn.ModuleList(DinoBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def positions(self, h, w):
        """Position embeddings of CLS and an h x w grid of patches, (1, 1 + h*w, D). Register models
        interpolate in another way, as in the official code."""
        if h == w == 37:
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.float().transpose(1, 2).unflatten(2, (37, 37))    # (1, D, 37, 37)
        if self.register_tokens is None:
            scale = (h + 0.1) / 37, (w + 0.1) / 37
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def get_intermediate_layers(self, x, n, norm=True):
        """x (N, 3, H, W), H and W multiples of 14 -> for each block index in n its patch tokens
        (N, H*W/196, D)."""
        N, _, H, W = x.shape
        h, w = H // PATCH, W // PATCH
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)    # (N, h*w, D)
        x = torch.cat([self.cls_token.expand(N, -1, -1), patches], dim=1) + self.positions(h, w)
        if self.register_tokens is not None:    # after the CLS token, and without a position
            x = torch.cat([x[:, :1], self.register_tokens.expand(N, -1, -1), x[:, 1:]], dim=1)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in n:
                layers.append((self.norm(x) if norm else x)[:, -h * w:])
        return tuple(layers)


def levels_of(prior):
    """The indices of the blocks whose tokens SASGL reads: the last of each quarter."""
    return [len(prior.blocks) * k // 4 - 1 for k in (1, 2, 3, 4)]


# --------------------------------------------------------------- weights ----

# Parts of Hugging Face's names -> of the official ones, replaced in this order.
HUGGING_FACE = {
    "dinov2.": "", "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.position_embeddings": "pos_embed", "embeddings.": "", "layernorm.": "norm.",
    "encoder.layer.": "blocks.", "attention.attention.query.": "attn.qkv.",
    "attention.output.dense.": "attn.proj.", "layer_scale": "ls", "lambda1": "gamma"}


def with_official_names(tensors):
    """A state dict with the official names or Hugging Face's -> with the official ones."""
    official = {}
    for name, tensor in tensors.items():
        if ".query." in name:    # officially one tensor with key and value
            three = [name.replace("query", part) for part in ("query", "key", "value")]
            tensor = torch.cat([tensors[part] for part in three if part in tensors])
        if ".key." not in name and ".value." not in name:
            for theirs, ours in HUGGING_FACE.items():
                name = name.replace(theirs, ours)
            official[name] = tensor
    return official


def load_dinov2(name, weights="", pretrained=True):
    """The frozen DINOv2 of that name (a key of DINOV2), in eval mode.

    Its tensors come from torch.hub, downloaded once and cached; those of `tiny` lie in assets/.
    weights: read this local file instead, with the official names or Hugging Face's.
    pretrained=False: random, for the caller to fill. Raises UserError."""
    if name not in DINOV2:
        raise UserError(f"DINOv2 {name} is not known; expected one of {', '.join(DINOV2)}")
    dim, depth, heads, registers = DINOV2[name]
    file = TINY_FILE if name == TINY and not weights else weights
    # Nothing drawn in here, or by torch.hub, changes what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        # `tiny-random` is the same network in every run, as a trained one would be.
        torch.default_generator.manual_seed(RANDOM_SEED)    # not the GPUs': they are not restored
        dinov2 = DinoVisionTransformer(dim=dim, depth=depth, heads=heads, registers=registers)
        if pretrained and (file or name != RANDOM):
            tensors = with_official_names(read_tensors(file) if file else fetch_from_hub(name))
            load_strictly(dinov2, tensors, f"{file or 'torch.hub'} (as DINOv2 {name})")
    return dinov2.requires_grad_(False).eval()


def fetch_from_hub(name):
    """The official tensors of that name. Raises UserError."""
    def fetch():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # three of them about xFormers, harmless
            hub = torch.hub.load(DINOV2_HUB, name, trust_repo=True, skip_validation=True)
        return hub.state_dict()

    return download(f"DINOv2 ({name})", fetch, "give its official file by --dinov2-weights FILE "
                    "(argument weights), or take --dinov2 tiny (small, for trying out)")
