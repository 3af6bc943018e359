"""CLIP (Radford et al., 2021): the image and the text transformer that LSMRL begins with.

    images (N,3,H,W) -> VisionTransformer.embed -> tokens (N,1+h*w,D), CLS first -> resblocks
    word vectors (C,L,width) -> CLIP.encode_text -> text features (C,dim)

Tensor for tensor OpenAI's ViT-B-16.pt. In which order the image blocks are read is the method's
choice: see stfl in lsmrl.py. There is no tokenizer: LSMRL says one sentence, whose numbers are
OPENAI_PROMPT; `tiny` has a few dozen words, and `tokenized` looks them up.

Quick question: why is OpenAI's file searched for __setstate__? (It is no list of tensors but a
program in TorchScript. Loading it runs none of its code, but for the methods of that name.)

Ours, not the paper's: the two tiny ones; positions resized to a grid that is not square.
"""
import math
import os
import re
import warnings
import zipfile
import zlib

from support.files import ROOT, UserError
from support.weights import download, load_strictly, named_tensors, read_tensors

import torch
import torch.nn.functional as F
from torch import nn

# The words of `tiny`, by number. The first one pads, and holds the place of a word to be learned.
VOCABULARY = (
    "X", "<start>", "<end>", "a", "photo", "of", "person", "in", "and", "with", ".", "tall",
    "short", "slim", "broad", "plain", "striped", "lined", "checked", "dotted", "banded", "halved",
    "diagonal", "zigzag", "tank", "t-shirt", "long", "shirt", "jacket", "coat", "wide",
    "trousers", "shorts", "skirt", "hair", "afro", "bun", "cap", "hat", "backpack", "shoulder",
    "bag", "handbag", "trolley")

# "A photo of a X X X X person.", start and end token included, as CLIP's tokenizer has it. CLIP
# pads it to 77 with zeros, but its text transformer is causal: what stands after the end token
# cannot change the feature read there. So these 12 suffice, exactly, at a sixth of the cost.
OPENAI_PROMPT = 49406, 320, 1125, 539, 320, 343, 343, 343, 343, 2533, 269, 49407

# `tiny` was trained on walkers by support/priors.py, `tiny-random` is not trained.
TINY_SIZES = {
    "patch": 8, "grid": (16, 8), "width": 64, "depth": 4, "heads": 2, "dim": 64, "text_width": 32,
    "text_depth": 2, "text_heads": 1, "words": len(VOCABULARY)}
CLIP_MODELS = {
    "ViT-B-16": {"patch": 16, "grid": (14, 14), "width": 768, "depth": 12, "heads": 12, "dim": 512,
                 "text_width": 512, "text_depth": 12, "text_heads": 8, "words": 49408},
    "tiny": TINY_SIZES, "tiny-random": TINY_SIZES}
TINY, RANDOM = "tiny", "tiny-random"
TINY_FILE = os.path.join(ROOT, "assets", "tiny_clip.pt")
CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
CLIP_URL = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt"


class Attention(nn.Module):
    """Multi-head attention with CLIP's tensor names: x (N, L, D), context (N, M, D), x itself by
    default -> (N, L, D). causal: no token looks at those behind it."""
    recomputable = True    # --checkpoint-activations

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x, context=None):
        """-> three of (N, heads, L or M, D / heads)."""
        if context is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            D = x.shape[-1]
            q = F.linear(x, self.in_proj_weight[:D], self.in_proj_bias[:D])
            kv = F.linear(context, self.in_proj_weight[D:], self.in_proj_bias[D:])
            k, v = kv.chunk(2, dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def forward(self, x, context=None, causal=False):
        q, k, v = self.queries_keys_values(x, context)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def weights(self, x, context):
        """How much each of x (N, L, D) reads of each of context (N, M, D): (N, L, M), the heads'
        mean. For pictures: forward never forms it."""
        q, k, _ = self.queries_keys_values(x, context)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5    # (N, heads, L, M)
        return scores.softmax(-1).mean(1)

    def split_heads(self, x):
        """(N, L, D) -> (N, heads, L, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    recomputable = True    # --checkpoint-activations

    def __init__(self, dim):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x):
        hidden = F.silu(1.702 * self.c_fc(x)) / 1.702    # QuickGELU, x * sigmoid(1.702 x)
        return self.c_proj(hidden)


class Block(nn.Module):
    """Attention and MLP, each beside a shortcut: x (N, L, D) -> (N, L, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.ln_2 = nn.LayerNorm(dim)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks. Whoever holds them runs them."""

    def __init__(self, dim, depth, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))


class VisionTransformer(nn.Module):
    """CLIP's image side. grid: rows and columns of patches that it has positions for."""

    def __init__(self, *, patch, grid, width, depth, heads, dim):
        super().__init__()
        self.grid = grid
        scale = width ** -0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * scale)
        self.positional_embedding = nn.Parameter(torch.randn(1 + math.prod(grid), width) * scale)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads)
        self.proj = nn.Parameter(torch.randn(width, dim) * scale)

    def embed(self, images):
        """Images (N, 3, H, W) -> what the first block gets, (N, 1 + h*w, D): CLS and patches, with
        their positions."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(patches.dtype).expand(images.shape[0], 1, -1)
        return self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)

    def resize(self, h, w):
        """Positions for an h x w grid of patches: the grid resized bilinearly, row 0 (CLS) kept."""
        cls, rows = self.positional_embedding.data.split([1, math.prod(self.grid)])
        maps = rows.t().unflatten(1, self.grid)[None]    # (1, D, rows, columns)
        maps = F.interpolate(maps, (h, w), mode="bilinear", align_corners=False)
        rows = maps[0].flatten(1).t()    # (h*w, D)
        self.positional_embedding = nn.Parameter(torch.cat([cls, rows]))
        self.grid = (h, w)


class CLIP(nn.Module):
    """Both sides: OpenAI's 302 tensors (logit_scale included, unused here)."""

    def __init__(self, *, patch, grid, width, depth, heads, dim, text_width, text_depth,
                 text_heads, words):
        super().__init__()
        self.visual = VisionTransformer(patch=patch, grid=grid, width=width, depth=depth,
                                        heads=heads, dim=dim)
        self.transformer = Transformer(text_width, text_depth, text_heads)
        self.token_embedding = nn.Embedding(words, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(77, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        projection = torch.randn(text_width, dim) * text_width ** -0.5
        self.text_projection = nn.Parameter(projection)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """Images (N, 3, H, W) -> image features (N, dim), as CLIP itself reads the blocks."""
        x = self.visual.embed(images)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def encode_text(self, words, end):
        """Word vectors (C, L, text_width), L <= 77, with the end token at position `end`, one for
        all or (C,) -> text features (C, dim)."""
        x = words + self.positional_embedding[:words.shape[1]]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        return self.ln_final(x[torch.arange(len(x)), end]) @ self.text_projection


def prompt_of(name):
    """-> the 12 numbers of "A photo of a X X X X person." for the CLIP of that name."""
    if name in (TINY, RANDOM):
        numbers, _ = tokenized(["a photo of a X X X X person ."])
        return numbers[0]
    return torch.tensor(OPENAI_PROMPT)


def tokenized(sentences):
    """Sentences of words of VOCABULARY, with spaces between -> their numbers (C, L), start and end
    token included, padded with 0, and the place of each one's end token (C,)."""
    number = {word: i for i, word in enumerate(VOCABULARY)}
    rows = [[number[word] for word in f"<start> {sentence} <end>".split()]
            for sentence in sentences]
    end = torch.tensor([len(row) - 1 for row in rows])
    return nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True), end


# --------------------------------------------------------------- weights ----

def clip_sizes(name):
    """-> the arguments of CLIP for that name. Raises UserError."""
    if name not in CLIP_MODELS:
        raise UserError(f"--clip {name} is not known; expected one of {', '.join(CLIP_MODELS)}")
    return CLIP_MODELS[name]


def read_archive(path):
    """A TorchScript archive -> {name: tensor}; None for any other file, a torn one included.

    torch.jit.load runs no Python; the one thing that it does run, __setstate__ methods of the
    archive, is refused: UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.filename.endswith("/constants.pkl") for entry in entries):
                return None
            # All but the tensors' numbers.
            texts = [archive.read(entry) for entry in entries
                     if not re.fullmatch(r"[^/]+/data/\d+", entry.filename)]
        if any(b"__setstate__" in text for text in texts):
            raise UserError(f"{path} is a program that runs while it is read (__setstate__); "
                            "expected OpenAI's ViT-B-16.pt, which is none: download it again")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")    # newer torch announces the end of TorchScript
            return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None


def read_clip(path):
    """OpenAI's TorchScript archive, or a state dict saved from it -> {name: tensor}, float32.
    Raises UserError."""
    tensors = read_archive(path)
    if tensors is None:
        tensors = read_tensors(path)
    weights = {}
    for name, tensor in named_tensors(tensors, path).items():
        if name not in ("input_resolution", "context_length", "vocab_size"):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def fetch_official():
    """-> the path of OpenAI's ViT-B-16.pt, downloaded once and cached, its SHA-256 checked. Raises
    UserError."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, f"CLIP-ViT-B-16-{CLIP_SHA256[:8]}.pt")

    def fetch():
        if not os.path.exists(path):    # torch renames a whole file: half of one is never there
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(CLIP_URL, path, hash_prefix=CLIP_SHA256)
        return path

    return download("CLIP ViT-B/16", fetch, "give OpenAI's file by --clip-weights FILE, or take "
                    "--preset small (a tiny CLIP, for trying out)")


def load_clip(name, weights=None, pretrained=True):
    """The CLIP of that name, its text side frozen.

    By default OpenAI's file, downloaded once and cached; weights: a local copy of it;
    pretrained=False: random, to be filled by a checkpoint. `tiny` lies in assets/. Raises
    UserError."""
    sizes = clip_sizes(name)
    if name in (TINY, RANDOM) and weights:
        raise UserError(f"--clip {name} reads no weights; drop --clip-weights, or take "
                        "--clip ViT-B-16")
    clip = CLIP(**sizes)
    if pretrained and name != RANDOM:
        path = TINY_FILE if name == TINY else weights or fetch_official()
        load_strictly(clip, read_clip(path), f"{path} (as CLIP {name})")
    for key, parameter in clip.named_parameters():
        parameter.requires_grad_(key.startswith("visual."))
    return clip
