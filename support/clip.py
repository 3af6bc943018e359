"""CLIP (Radford et al., 2021): the image and the text transformer from which LSMRL starts.

    images (N,3,H,W) -> VisionTransformer.embed -> tokens (N,1+h*w,D), CLS first -> resblocks
    word vectors (C,L,width) -> CLIP.encode_text -> text features (C,dim)

Mirrors github.com/openai/CLIP (clip/model.py): the same 302 tensors as ViT-B-16.pt. LSMRL needs a
single sentence (prompt_of), so there is no tokenizer.
"""
import math
import os

from support.files import ROOT, UserError
from support.weights import download, load_strictly, read_pretrained

import torch
import torch.nn.functional as F
from torch import nn

# The words of `tiny`. X is padding, and the place of a learned word.
VOCABULARY = str.split(
    "X <start> <end> a photo of person in and with . tall short slim broad plain striped lined "
    "checked dotted banded halved diagonal zigzag tank t-shirt long shirt jacket coat wide "
    "trousers shorts skirt hair afro bun cap hat backpack shoulder bag handbag trolley")
# `tiny` was trained on walkers (support/priors.py), `tiny-random` is not trained.
TINY_SIZES = {
    "patch": 16, "grid": (8, 4), "width": 96, "depth": 4, "heads": 3, "dim": 64, "text_width": 32,
    "text_depth": 2, "text_heads": 1, "words": len(VOCABULARY)}
CLIP_MODELS = {"tiny": TINY_SIZES, "tiny-random": TINY_SIZES, "ViT-B-16": {
    "patch": 16, "grid": (14, 14), "width": 768, "depth": 12, "heads": 12, "dim": 512,
    "text_width": 512, "text_depth": 12, "text_heads": 8, "words": 49408}}
TINY_FILE = f"{ROOT}/assets/tiny_clip.pt"
CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"


def drawn(std, *shape):
    return nn.Parameter(torch.randn(shape) * std)


class Attention(nn.Module):
    """Multi-head attention. causal: a token attends to itself and those before it."""

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = drawn(dim ** -0.5, 3 * dim, dim)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x, context):
        """-> three of (N, heads, L or M, D / heads)."""
        weight, bias, D = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        context = x if context is None else context
        three = [F.linear(x, weight[:D], bias[:D]),
                 *F.linear(context, weight[D:], bias[D:]).chunk(2, -1)]
        return [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in three]

    def forward(self, x, context=None):
        """x (N, L, D), context (N, M, D), by default x itself -> (N, L, D)."""
        y = F.scaled_dot_product_attention(
            *self.queries_keys_values(x, context), is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def weights(self, x, context):
        """For pictures: the attention weights of x on context, (N, L, M), mean over the heads."""
        q, k, _ = self.queries_keys_values(x, context)
        scores = q @ k.mT / q.shape[-1] ** 0.5    # (N, heads, L, M)
        return scores.softmax(-1).mean(1)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x):
        # QuickGELU, x * sigmoid(1.702 x)
        return self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)


class Block(nn.Module):
    """Attention and MLP, each with a shortcut: x (N, L, D) -> (N, L, D)."""

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.attn = Attention(dim, heads, causal)
        self.mlp = Mlp(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def transformer(depth, *of_a_block):
    return nn.ModuleDict({"resblocks": nn.Sequential(*(Block(*of_a_block) for _ in range(depth)))})


class VisionTransformer(nn.Module):
    """CLIP's image side. grid: rows and columns of patches."""

    def __init__(self, *, patch, grid, width, depth, heads, dim):
        super().__init__()
        self.grid = grid
        std = width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = drawn(std, width)
        self.positional_embedding = drawn(std, 1 + math.prod(grid), width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = transformer(depth, width, heads)
        self.proj = drawn(std, width, dim)

    def embed(self, images):
        """Images (N, 3, H, W) -> the input of the blocks (N, 1 + h*w, D): CLS, then patches."""
        patches = self.conv1(images).flatten(2).mT
        cls = self.class_embedding.to(patches).expand_as(patches[:, :1])
        return self.ln_pre(torch.cat([cls, patches], 1) + self.positional_embedding)

    def resize(self, h, w):
        """Resize the positions bilinearly to an h x w grid of patches. Row 0 (CLS) stays."""
        rows = self.positional_embedding.data
        maps = rows[1:].t().unflatten(1, self.grid)[None]    # (1, D, rows, columns)
        resized = F.interpolate(maps, (h, w), mode="bilinear")[0].flatten(1).t()
        self.positional_embedding = nn.Parameter(torch.cat([rows[:1], resized]))
        self.grid = h, w


class CLIP(nn.Module):
    def __init__(self, *, words, dim, text_width, text_depth, text_heads, **visual):
        super().__init__()
        self.visual = VisionTransformer(dim=dim, **visual)
        self.transformer = transformer(text_depth, text_width, text_heads, True)    # causal
        self.token_embedding = nn.Embedding(words, text_width)
        self.positional_embedding = drawn(0.01, 77, text_width)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = drawn(text_width ** -0.5, text_width, dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """Images (N, 3, H, W) -> features (N, dim)."""
        visual = self.visual
        x = visual.transformer.resblocks(visual.embed(images))
        return visual.ln_post(x[:, 0]) @ visual.proj

    def encode_text(self, words, end):
        """Word vectors (C, L, width), index of the end token, int or (C,) -> features (C, dim)."""
        x = self.transformer.resblocks(words + self.positional_embedding[:words.shape[1]])
        rows = torch.arange(len(x), device=x.device)
        return self.ln_final(x[rows, end]) @ self.text_projection


def tokenized(sentences):
    """Sentences of VOCABULARY's words -> numbers (C, L), padded with 0; index of each end (C,)."""
    rows = [torch.tensor([VOCABULARY.index(word) for word in f"<start> {sentence} <end>".split()])
            for sentence in sentences]
    end = torch.tensor([len(row) - 1 for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), end


def prompt_of(name):
    """-> the 12 numbers of "A photo of a X X X X person." for the CLIP of that name."""
    if name == "ViT-B-16":    # by CLIP's tokenizer
        return torch.tensor([49406, 320, 1125, 539, 320, 343, 343, 343, 343, 2533, 269, 49407])
    return tokenized(["a photo of a X X X X person ."])[0][0]


def fetch_openai():
    folder = f"{torch.hub.get_dir()}/checkpoints"
    path = f"{folder}/CLIP-ViT-B-16-{CLIP_SHA256[:8]}.pt"
    if not os.path.exists(path):    # torch writes to a temporary name first
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(
            f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt", path,
            CLIP_SHA256)
    return path


def load_clip(name, weights="", pretrained=True):
    """The CLIP of that name with a frozen text side. weights: a local file in place of the
    download. pretrained=False: random, for a checkpoint to fill. Raises UserError."""
    if name not in CLIP_MODELS:
        raise UserError(f"CLIP {name} is not known; expected one of {', '.join(CLIP_MODELS)}")
    clip = CLIP(**CLIP_MODELS[name])
    if pretrained and name != "tiny-random":
        path = weights or (TINY_FILE if name == "tiny" else download(
            "CLIP ViT-B/16", "give OpenAI's file by --clip-weights FILE, or take --preset small (a "
            "tiny CLIP)", fetch_openai))
        try:
            tensors = torch.jit.load(path, map_location="cpu").state_dict()
        except (RuntimeError, ValueError):    # not an archive, or a torn one
            tensors = read_pretrained(path)
        for key in "input_resolution", "context_length", "vocab_size":    # integers, not weights
            tensors.pop(key, None)
        load_strictly(clip, tensors, f"{path} (as CLIP {name})")
    clip.requires_grad_(False).visual.requires_grad_()
    return clip
