"""LSMRL against literal forms written from its specification: loops, PyTorch's own attention,
numbers worked by hand."""
import math
import os
import pickle
import re
import warnings
import zipfile
import zlib
from dataclasses import fields

import lsmrl
from golden import formula
from lsmrl import (
    LSMRL,
    attend_grouped,
    attend_shifted,
    centre_loss,
    contrast_loss,
    partners,
    roll_patches,
    stfl,
)
from support.clip import (
    CLIP,
    CLIP_MODELS,
    TINY_SIZES,
    VOCABULARY,
    Attention,
    load_clip,
    prompt_of,
    read_clip,
    tokenized,
)
from support.files import UserError
from support.ranking import distances

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SMALL = {"patch": 8, "grid": (4, 4), "width": 24, "depth": 3, "heads": 3, "dim": 12,
         "text_width": 16, "text_depth": 2, "text_heads": 2, "words": 49408}
SHIFT = [[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]]
LABEL = torch.tensor([3, 0, 0, 3, 3, 0, 3, 0])
MODALITY = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0])
FRAMES = torch.randn(8, 3, 3, 32, 16, generator=torch.Generator().manual_seed(0))
BATCH = FRAMES, MODALITY, LABEL
LOSSES = {"identity_z", "identity_f", "identity_cmi", "triplet_z", "triplet_f", "triplet_cmi",
          "text", "contrast", "centre", "consistency"}
WEIGHTS = "text", "contrast", "centre", "consistency"


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def nearly(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------- models that are quick to make ----

def clip_shapes(patch, grid, width, depth, text_width, text_depth, dim, words, **heads):
    """Names and shapes of OpenAI's file, written down from the specification."""
    shapes = {"positional_embedding": (77, text_width),
              "text_projection": (text_width, dim),
              "logit_scale": (),
              "token_embedding.weight": (words, text_width),
              "visual.class_embedding": (width,),
              "visual.proj": (width, dim),
              "visual.positional_embedding": (math.prod(grid) + 1, width),
              "visual.conv1.weight": (width, 3, patch, patch)}
    norms = [("ln_final", text_width), ("visual.ln_pre", width), ("visual.ln_post", width)]
    for side, D, blocks in (("visual.", width, depth), ("", text_width, text_depth)):
        for i in range(blocks):
            block = f"{side}transformer.resblocks.{i}."
            norms += [(block + "ln_1", D), (block + "ln_2", D)]
            shapes[block + "attn.in_proj_weight"] = (3 * D, D)
            shapes[block + "attn.in_proj_bias"] = (3 * D,)
            linears = ("attn.out_proj", D, D), ("mlp.c_fc", 4 * D, D), ("mlp.c_proj", D, 4 * D)
            for linear, rows, columns in linears:
                shapes[f"{block}{linear}.weight"] = (rows, columns)
                shapes[f"{block}{linear}.bias"] = (rows,)
    for norm, D in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (D,)
    return shapes


def small_clip():
    clip = CLIP(**SMALL)
    clip.load_state_dict({name: formula(name, s) for name, s in clip_shapes(**SMALL).items()})
    clip.visual.resize(4, 2)
    return clip


def tiny_options(**own):
    """The paper's choices, but for a tiny CLIP on small frames, and `own`."""
    tiny = {"clip": "tiny-random", "size": (32, 16), "split": (2, 1, 1), "groups": 2}
    return LSMRL.Options(**tiny | own)


def small_model(seed=0, method=LSMRL, **own):
    torch.manual_seed(seed)
    model = method(tiny_options(**own), 4).train()
    if model.sd is not None:    # or SD would be the identity
        nn.init.normal_(model.sd.attn.out_proj.weight, std=0.3)
    return model


# ------------------------------------------------------------- literal forms ----

def literal_attention(attention, tokens, asking=None):
    """Tokens (L, D), of which those of the numbers `asking` ask (all, by default) -> what each of
    these gets (L, D), one query and one head at a time."""
    D = tokens.shape[1]
    size = D // attention.heads
    qkv = tokens @ attention.in_proj_weight.t() + attention.in_proj_bias
    q, k, v = qkv.split(D, dim=1)
    rows = []
    for query in q if asking is None else q[asking]:
        heads = []
        for start in range(0, D, size):
            head = slice(start, start + size)
            share = torch.exp(k[:, head] @ query[head] / math.sqrt(size))
            heads.append(share @ v[:, head] / share.sum())
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ attention.out_proj.weight.t() + attention.out_proj.bias


def literal_grouped(attention, x, groups, grid):
    (h, w), T = grid, x.shape[1]
    update = torch.zeros_like(x)
    for b in range(len(x)):
        everything = [(t, i) for i in range(x.shape[2]) for t in range(T)]    # the T CLS first
        for g in range(groups):
            rows = range(g * h // groups, (g + 1) * h // groups)
            places = [(t, 0) for t in range(T)]
            for c in range(w):
                places += [(t, 1 + r * w + c) for r in rows for t in range(T)]
            tokens = torch.stack([x[b, t, i] for t, i in places])
            for (t, i), new in zip(places, literal_attention(attention, tokens), strict=True):
                if i:
                    update[b, t, i] = new
        tokens = torch.stack([x[b, t, i] for t, i in everything])
        update[b, :, 0] = literal_attention(attention, tokens, asking=range(T))
    return update


def literal_roll(patches, grid, sign=1):
    rolled = patches.clone()
    for r in range(grid[0]):
        for c in range(grid[1]):
            n = r * grid[1] + c
            shift = sign * SHIFT[r % 3][c % 3]
            rolled[:, :, n] = torch.roll(patches[:, :, n], shift, dims=1)
    return rolled


def literal_shifted(attention, x, grid):
    x = torch.cat([x[:, :, :1], literal_roll(x[:, :, 1:], grid)], dim=2)
    frames = [literal_attention(attention, frame) for frame in x.flatten(0, 1)]
    x = torch.stack(frames).view_as(x)
    return torch.cat([x[:, :, :1], literal_roll(x[:, :, 1:], grid, -1)], dim=2)


def torch_attention(attention, x, context=None, mask=None):
    """PyTorch's own multi-head attention: x (N, L, D), context (N, M, D) -> (N, L, D)."""
    context = x if context is None else context
    q, k = x.transpose(0, 1), context.transpose(0, 1)
    out = attention.out_proj
    y, _ = F.multi_head_attention_forward(
        q, k, k, x.shape[2], attention.heads, attention.in_proj_weight, attention.in_proj_bias,
        None, None, False, 0.0, out.weight, out.bias, need_weights=False, attn_mask=mask)
    return y.transpose(0, 1)


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)


def literal_block(block, x, attend):
    x = x + attend(block.attn, norm(block.ln_1, x))
    hidden = norm(block.ln_2, x) @ block.mlp.c_fc.weight.t() + block.mlp.c_fc.bias
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return x + hidden @ block.mlp.c_proj.weight.t() + block.mlp.c_proj.bias


def literal_visual(visual, images, *routes):
    """Images (T, 3, 32, 16) of a tracklet -> CLS tokens (1, T, D). routes: what each block's
    attention does."""
    x = [visual.class_embedding.expand(len(images), -1)]
    for r in range(0, 32, 8):
        for c in (0, 8):
            patch = images[:, None, :, r:r + 8, c:c + 8]
            x.append((patch * visual.conv1.weight).sum((2, 3, 4)))
    x = torch.stack(x, dim=1) + visual.positional_embedding
    x = norm(visual.ln_pre, x)[None]    # (1, T, 9, D)
    for block, attend in zip(visual.transformer.resblocks, routes, strict=True):
        x = literal_block(block, x, attend)
    return norm(visual.ln_post, x[:, :, 0])


# ------------------------------------------------------------------ STFL ----

@pytest.mark.parametrize("T", [1, 2, 5])
def test_grouped_and_shifted_attention_equal_the_loops(T):
    torch.manual_seed(T)
    attention = Attention(8, 2).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    grid = (6, 2)
    x = torch.randn(2, T, 1 + 6 * 2, 8).double().requires_grad_()
    direction = torch.randn_like(x)

    def slopes(y):
        return torch.autograd.grad((direction * y).sum(), [x, *attention.parameters()])

    pairs = [(attend_shifted(attention, x, grid), literal_shifted(attention, x, grid))]
    for groups in (1, 2, 6):
        want = literal_grouped(attention, x, groups, grid)
        pairs.append((attend_grouped(attention, x, groups), want))
    for got, want in pairs:
        close(got, want, 1e-9)
        close(slopes(got), slopes(want), 1e-9)


@pytest.mark.parametrize("T", [1, 3, 6])
def test_patch_shift_equals_the_loops_and_undoes_itself(T):
    patches = torch.randn(2, T, 5 * 4, 3)
    for sign in (1, -1):
        rolled = roll_patches(patches, (5, 4), sign)
        assert torch.equal(rolled, literal_roll(patches, (5, 4), sign))
        assert torch.equal(roll_patches(rolled, (5, 4), -sign), patches)
    # Each patch shows the number of its frame: minus its shift.
    clock = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 9, 1)
    shown = roll_patches(clock, (3, 3))[0, 0].view(3, 3)
    assert shown.tolist() == [[4, 5, 4], [1, 0, 3], [2, 3, 2]]


@torch.no_grad()
def test_stfl_is_clip_with_grouped_and_then_shifted_blocks():
    visual = small_clip().visual
    frames = torch.randn(3, 5, 3, 32, 16)

    def basic(attention, x):
        return torch_attention(attention, x[0])[None]

    def grouped(attention, x):
        return literal_grouped(attention, x, 2, (4, 2))

    def shifted(attention, x):
        return literal_shifted(attention, x, (4, 2))

    tracklets = [literal_visual(visual, frames[b], basic, basic, basic) for b in range(3)]
    plain = torch.cat(tracklets)
    close(stfl(visual, frames, split=(3, 0, 0), groups=2), plain)
    # T = 1: nothing to shift or to mix with.
    for split, groups in (((3, 0, 0), 2), ((1, 0, 2), 2), ((0, 3, 0), 1)):
        one = stfl(visual, frames[:, 2:3], split=split, groups=groups)
        close(one, plain[:, 2:3])
    got = stfl(visual, frames[:1], split=(1, 1, 1), groups=2)
    close(got, literal_visual(visual, frames[0], basic, grouped, shifted))


# ------------------------------------------------------------------ CLIP ----

@torch.no_grad()
def test_a_prompt_s_twelve_positions_give_the_text_feature_of_all_77():
    clip = small_clip()
    sentence = prompt_of("ViT-B-16")
    prompts = lsmrl.Prompts(classes=3, width=16, sentence=sentence)
    words = prompts.words.normal_()
    numbers = "49406 320 1125 539 320 343 343 343 343 2533 269 49407"
    ids = [int(number) for number in numbers.split()]
    padded = torch.tensor(ids + [0] * 65)
    whole = clip.token_embedding(padded).repeat(3, 1, 1)
    whole[:, 5:9] = words
    assert sentence.tolist() == ids
    assert list(range(12))[lsmrl.SLOTS] == [5, 6, 7, 8]
    assert torch.equal(prompts(clip.token_embedding), whole[:, :12])

    x = whole + clip.positional_embedding
    mask = torch.full((77, 77), -math.inf).triu(1)
    for block in clip.transformer.resblocks:
        x = literal_block(block, x, lambda a, x: torch_attention(a, x, mask=mask))
    want = norm(clip.ln_final, x)[:, 11] @ clip.text_projection
    for sentences in (whole, whole[:, :12]):
        close(clip.encode_text(sentences, 11), want)


@torch.no_grad()
def test_sentences_of_several_lengths_are_read_at_their_own_ends():
    clip = CLIP(**TINY_SIZES)
    sentences = ["a photo of a tall person .", "a photo of a person in a striped coat ."]
    words, end = tokenized(sentences)
    assert words.shape == (2, 12) and end.tolist() == [8, 11]
    assert [VOCABULARY[number] for number in words[0]] == [
        "<start>", *sentences[0].split(), "<end>", *["X"] * 3]
    both = clip.encode_text(clip.token_embedding(words), end)
    for sentence, together in zip(sentences, both, strict=True):
        alone, [its_end] = tokenized([sentence])
        close(clip.encode_text(clip.token_embedding(alone), its_end)[0], together)
    slots = prompt_of("tiny")[lsmrl.SLOTS]
    assert [VOCABULARY[number] for number in slots] == ["X"] * 4


def test_positions_are_resized_bilinearly_and_row_0_is_kept():
    visual = CLIP(**SMALL | {"grid": (14, 14)}).visual
    before = visual.positional_embedding.detach().normal_().clone()    # (197, 24)
    visual.resize(18, 9)
    after = visual.positional_embedding    # (163, 24)
    assert isinstance(after, nn.Parameter) and tuple(visual.grid) == (18, 9)
    assert torch.equal(after[0], before[0])
    square = before[1:].t().reshape(1, 24, 14, 14)
    want = F.interpolate(square, (18, 9), mode="bilinear")[0].flatten(1).t()
    torch.testing.assert_close(after[1:], want)


def official_tensors(**sizes):
    """What OpenAI's file holds: half precision (here a few in single), and three integers that are
    no weights."""
    tensors = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77),
               "vocab_size": torch.tensor(49408)}
    for name, shape in clip_shapes(**sizes).items():
        # Element (i, j) is wave[2 * i + j]: a view, quick to save.
        steps = [2 ** k for k in reversed(range(len(shape)))]
        last = sum(step * (n - 1) for step, n in zip(steps, shape, strict=True))
        wave = (torch.arange(1 + last) + zlib.crc32(name.encode()) % 1000).sin()
        if not name.endswith(("ln_1.weight", "logit_scale")):
            wave = wave.half()
        tensors[name] = wave.as_strided(shape, steps)
    return tensors


def save_archive(tensors, path):
    """A TorchScript archive of these names: modules without code."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        module = root
        for folder in folders:
            if folder not in module._modules:
                module.add_module(folder, nn.Module())
            module = module._modules[folder]
        module.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # TorchScript is going, its archives stay
        torch.jit.save(torch.jit.script(root), path)


def same_tensors(got, want):
    """Are they, in float32, the real numbers of `want`?"""
    want = {name: tensor.float() for name, tensor in want.items() if tensor.is_floating_point()}
    if got.keys() != want.keys():
        return False
    equal = [torch.equal(tensor, want[name]) for name, tensor in got.items()]
    return all(equal) and {tensor.dtype for tensor in got.values()} == {torch.float32}


@pytest.fixture
def small_vit(monkeypatch, tmp_path):
    """Lets the name ViT-B-16 mean a CLIP that is quick to save, and no file be cached."""
    monkeypatch.setitem(CLIP_MODELS, "ViT-B-16", SMALL)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


def test_vit_b_16_loads_openai_s_archive(tmp_path):
    tensors = official_tensors(**CLIP_MODELS["ViT-B-16"])
    save_archive(tensors, tmp_path / "ViT-B-16.pt")
    clip = load_clip("ViT-B-16", str(tmp_path / "ViT-B-16.pt"))
    assert len(clip.state_dict()) == 302
    assert same_tensors(clip.state_dict(), tensors)
    assert clip.visual.proj.shape == (768, 512)
    assert tuple(clip.visual.grid) == (14, 14)
    assert clip.visual.transformer.resblocks[11].attn.heads == 12
    assert clip.transformer.resblocks[11].attn.heads == 8
    trained = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert trained == {name for name in tensors if name.startswith("visual.")}


def test_state_dicts_load_and_misfits_are_named(small_vit, tmp_path):
    tensors, path = official_tensors(**SMALL), tmp_path / "clip.pt"
    torch.save(tensors, path)
    assert same_tensors(read_clip(path), tensors)
    assert same_tensors(load_clip("ViT-B-16", str(path)).state_dict(), tensors)
    bias = "visual.transformer.resblocks.1.attn.in_proj_bias"
    misfits = [(bias, None), ("visual.lora", torch.zeros(3)), (bias, torch.zeros(7)),
               ("visual.proj", torch.ones(1)), ("visual.proj", torch.ones(24, 12).long())]
    for name, value in misfits:
        changed = tensors | {name: value}
        if value is None:
            del changed[name]
        torch.save(changed, path)
        with pytest.raises(UserError, match=re.escape(name)):
            load_clip("ViT-B-16", str(path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_torn_and_evil_files_are_refused_and_nothing_runs(small_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_archive(official_tensors(**SMALL), "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    evil = pickle.dumps({"visual.proj": Evil()})
    for name, content in (("torn", whole[:10_000]), ("empty", b""), ("pickle", evil)):
        (tmp_path / f"{name}.pt").write_bytes(content)
    torch.save([torch.zeros(3)], "list.pt")
    torch.save({"epoch": 3}, "number.pt")
    torch.save(Evil(), "evil.pt")
    torch.save(Evil(), "disguised.pt")
    with zipfile.ZipFile("disguised.pt", "a") as archive:    # as TorchScript
        archive.writestr("disguised/constants.pkl", pickle.dumps(()))
    bad = "torn", "empty", "pickle", "list", "number", "evil", "disguised", "gone"
    for name in bad:
        with pytest.raises(UserError, match=f"{name}.pt"):
            load_clip("ViT-B-16", f"{name}.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads(evil)
    assert (tmp_path / "ran").exists()    # it would have run


class Program(nn.Module):
    """TorchScript that writes a file while it is read."""

    def __init__(self):
        super().__init__()
        self.training = True

    @torch.jit.export
    def __getstate__(self):
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(state[0], "ran")
        self.training = state[1]


def test_an_archive_that_runs_while_it_is_read_is_refused(small_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Program()), "program.pt")
    with pytest.raises(UserError, match="__setstate__"):
        load_clip("ViT-B-16", "program.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_download_is_one_clear_error(small_vit, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as error:
        load_clip("ViT-B-16")
    message = str(error.value)
    assert "\n" not in message
    for way in ("network", "--clip-weights", "--preset small"):
        assert way in message
    random = load_clip("ViT-B-16", pretrained=False)    # a checkpoint will fill it
    assert random.visual.proj.shape == (24, 12)
    for name, weights in (("RN50", None), ("tiny", "file.pt")):
        with pytest.raises(UserError):
            load_clip(name, weights)


def test_the_download_is_checked_and_cached(small_vit, monkeypatch):
    tensors, asked = official_tensors(**SMALL), []

    def download(url, dst, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        save_archive(tensors, dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert same_tensors(load_clip("ViT-B-16").state_dict(), tensors)
    assert len(asked) == 1
    url, sha256 = asked[0]
    assert re.fullmatch("[0-9a-f]{64}", sha256)
    assert url == f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-B-16.pt"


# ------------------------------------------------------ prompts, SD, CMI ----

def test_prompts_are_all_that_trains_of_the_text_side():
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [{"params": group["params"], "lr": 1e-3 * group["factor"]}
              for group in model.parameter_groups()]
    optimizer = torch.optim.AdamW(groups)
    losses, _ = model(*BATCH)
    sum(losses.values()).backward()
    bank = model.bank.clone()
    torch.testing.assert_close(bank, model.text_features().detach())
    model(FRAMES.flip(1, 3), MODALITY, LABEL)
    # The sentences', whatever the images.
    assert torch.equal(model.bank, bank) and bank.shape == (4, 64)

    optimizer.step()
    other = ("clip.visual", "sd", "cmi", "heads")
    text_side = {n: p for n, p in model.named_parameters() if not n.startswith(other)}
    assert {n for n, p in text_side.items() if p.requires_grad} == {"prompts.words"}
    changed = {n for n, p in text_side.items() if not torch.equal(before[n], p)}
    assert changed == {"prompts.words"}


@torch.no_grad()
def test_embeddings_are_a_tracklet_s_own_and_the_bank_travels_with_the_checkpoint():
    model, copy = small_model(), small_model(seed=1).eval()
    model(*BATCH)    # fills the bank, moves the statistics
    model.eval()
    together = model.embed(FRAMES, MODALITY)
    assert together.shape == (8, 1, 64 + 64) and together.dtype == torch.float32
    nearly(model.embed(FRAMES[2:3], MODALITY[2:3]), together[2:3])
    nearly(model.embed(FRAMES.flip(0), 1 - MODALITY), together.flip(0))
    for half in together.split(64, dim=2):
        torch.testing.assert_close(half.norm(dim=2), torch.ones(8, 1))
    # As the optimizer's step does: the bank is what SD used, not what the words are now.
    model.prompts.words.add_(1)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.embed(FRAMES, MODALITY), together)
    copy.bank.normal_()
    assert not torch.allclose(copy.embed(FRAMES, MODALITY), together, atol=1e-3)


@pytest.mark.parametrize("switches", [{}, {"sd": False, "cmi": False}])
@torch.no_grad()
def test_the_streams_of_an_embedding_are_z_and_f(switches):
    """All of it. The squares of their distances add up to that of both."""
    model = small_model(**switches).eval()
    embedding, (_, z, f) = model.embed(FRAMES, MODALITY), model.features(FRAMES, model.bank)
    named = model.streams_of(embedding)
    assert list(named) == ["z", "f"]
    assert torch.equal(torch.cat(list(named.values()), dim=2), embedding)
    for name, x in {"z": z, "f": f}.items():
        assert torch.equal(named[name], F.normalize(x, dim=1)[:, None])
    squares = [distances(alone, alone) ** 2 for alone in named.values()]
    nearly(sum(squares).sqrt(), distances(embedding, embedding))
    assert model.streams_of(named["z"]) == {}    # as of a subclass that embeds z alone


def test_sd_starts_as_the_identity_and_learns():
    torch.manual_seed(0)
    sd = lsmrl.SD(dim=8, text_dim=6, heads=2)
    tokens, bank = torch.randn(3, 4, 8), torch.randn(5, 6)
    assert torch.equal(sd(tokens, bank), tokens)
    (sd(tokens, bank) * torch.randn(3, 4, 8)).sum().backward()
    assert sd.attn.out_proj.weight.grad.abs().max() > 0
    nn.init.normal_(sd.attn.out_proj.weight)
    diffused = sd(tokens, bank)
    assert not torch.allclose(diffused, tokens, atol=1e-2)
    alone = sd(tokens[:1, 2:3], bank.flip(0))    # no order, no other token
    torch.testing.assert_close(alone, diffused[:1, 2:3])


def test_cmi_attends_over_both_modalities_frames_and_averages_its_own():
    torch.manual_seed(0)
    cmi = lsmrl.CMI(dim=8, heads=2)
    tokens, partner = torch.randn(4, 3, 8), torch.tensor([2, 3, 0, 1])
    for parameter in cmi.parameters():
        nn.init.normal_(parameter)
    c, block = cmi(tokens, partner), cmi.block
    # Modalities swapped: the weights are shared.
    torch.testing.assert_close(cmi(tokens[partner], partner), c[partner])

    for b in range(4):
        row = torch.cat([tokens[b], tokens[partner[b]]])[None]    # no order: six frames of one set
        want = literal_block(block, row, torch_attention)
        close(c[b], want[0, :3].mean(0))
        close(c[partner[b]], want[0, 3:].mean(0))
    tokens[3] = torch.randn(3, 8)
    moved = (cmi(tokens, partner) - c).abs().amax(1) > 1e-3
    assert moved.tolist() == [False, True, False, True]


# ---------------------------------------------------------- what it reads ----

@torch.no_grad()
def test_the_shares_that_pictures_show_are_those_that_attention_uses():
    attention = Attention(8, 1)
    x, context = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    shares = attention.weights(x, context)
    values = F.linear(context, attention.in_proj_weight[16:], attention.in_proj_bias[16:])
    close(attention.out_proj(shares @ values), attention(x, context))
    several = Attention(8, 4).weights(x, context)    # the heads' mean
    assert several.shape == (3, 4, 5) and (several > 0).all()
    close(several.sum(2), torch.ones(3, 4))


@torch.no_grad()
def test_a_frame_s_token_looks_at_patches_and_a_tracklet_reads_sentences():
    model = small_model().eval()
    look, reads = model.reading(FRAMES)
    assert look.shape == (8, 3, 4, 2) and reads.shape == (8, 4)
    close(reads.sum(1), torch.ones(8))
    assert (look > 0).all() and (look.sum((1, 2, 3)) < 3).all()    # the rest is the token itself
    tokens, _ = lsmrl.looks(model.clip.visual, FRAMES, split=(2, 1, 1), groups=2)
    assert torch.equal(tokens, stfl(model.clip.visual, FRAMES, split=(2, 1, 1), groups=2))
    assert small_model(sd=False, split=(2, 2, 0)).reading(FRAMES) == (None, None)


@torch.no_grad()
def test_what_a_shifted_block_looks_at_is_shown_where_it_comes_from():
    """Each share goes back to the frame that its patch came from."""
    visual = small_clip().visual
    frames, split = torch.randn(2, 5, 3, 32, 16), (0, 0, 3)
    _, look = lsmrl.looks(visual, frames, split=split, groups=1)
    seen = []
    last = visual.transformer.resblocks[-1].attn
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    stfl(visual, frames, split=split, groups=1)
    hook.remove()
    shares = last.weights(seen[0][:, :1], seen[0])[:, 0, 1:].view(2, 5, 4, 2)
    for row in range(4):
        for column in range(2):
            shift = SHIFT[row % 3][column % 3]
            for t in range(5):
                close(look[:, (t - shift) % 5, row, column], shares[:, t, row, column])


def test_partners_are_the_kth_of_each_modality():
    assert partners(MODALITY, LABEL).tolist() == [3, 2, 1, 0, 6, 7, 4, 5]
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        label, modality = order // 4, order % 2
        partner = partners(modality, label)
        assert torch.equal(partner[partner], torch.arange(16))
        assert torch.equal(label[partner], label)
        assert torch.equal(modality[partner], 1 - modality)


# ---------------------------------------------------------------- losses ----

def triplet_loss(x, label, modality):
    return lsmrl.weighted_triplet_loss(x, label)


def test_the_losses_after_vld_give_the_numbers_of_its_code():
    """What VLD's published classes (TripletLoss_WRT; CrossEntropyLoss of features @ text.t())
    printed for these inputs, in float32."""
    x = torch.tensor([[(3 * i + 5 * j) % 7 - 3 for j in range(4)] for i in range(8)]) / 4
    text = torch.tensor([[(2 * i + 3 * j) % 5 - 2 for j in range(4)] for i in range(4)]) / 2
    triplet, sentences = lsmrl.weighted_triplet_loss(x, LABEL), lsmrl.text_loss(x, text, LABEL)
    assert triplet.item() == pytest.approx(0.890695, abs=2e-6)
    assert sentences.item() == pytest.approx(1.941103, abs=2e-6)


def test_the_triplet_loss_by_hand():
    # 0 and 3 share an identity, 7 is alone with itself.
    x, label = torch.tensor([[0.0], [3.0], [7.0]]), torch.tensor([5, 5, 1])
    p = 3 * math.exp(3) / (1 + math.exp(3))
    n = (7 * math.exp(-7) + 4 * math.exp(-4)) / (math.exp(-7) + math.exp(-4))
    terms = [math.log1p(math.exp(difference)) for difference in (p - 7, p - 4, 0 - n)]
    assert triplet_loss(x, label, None).item() == pytest.approx(sum(terms) / 3, rel=1e-4)


def test_the_contrast_loss_by_hand():
    # Identities 4 and 2, visible and then infrared.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0]])
    label, modality = torch.tensor([4, 2, 4, 2]), torch.tensor([0, 0, 1, 1])
    products = (0.6, 0), (1, 0.8), (0.6, 0.8), (1, 0)    # of positive and negative, per anchor
    for factor, option in ((2, {"temperature": 0.5}), (10, {})):
        terms = [math.log1p(math.exp(factor * (n - p))) for p, n in products]
        got = contrast_loss(x, label, modality, **option)
        assert got.item() == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_the_centre_loss_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [5.0, 5.0], [5.0, 9.0]])
    label, modality = torch.tensor([7, 7, 7, 2, 2]), torch.tensor([0, 0, 1, 0, 1])
    # The centres are 3 and 4 apart.
    assert centre_loss(x, label, modality).item() == pytest.approx((9 + 16) / 2)
    x[2, 1], x[4, 1] = 0, 5    # the centres meet, the tracklets do not
    assert centre_loss(x, label, modality).item() == 0


def literal_losses(x):
    """Triplet, contrast and centre loss of x (8, D), LABEL and MODALITY, in loops."""
    triplet, contrast, centre = 0, 0, 0
    for i in range(8):
        positive, negative, others = [], [], {}
        for j in range(8):
            distance = (x[i] - x[j]).norm() if j != i else torch.zeros(())
            side = positive if LABEL[j] == LABEL[i] else negative
            side.append(distance)
            if MODALITY[j] != MODALITY[i]:
                others[j] = torch.exp(x[i] @ x[j] / 0.1)
        p, n = torch.stack(positive), torch.stack(negative)
        difference = (p.softmax(0) * p).sum() - ((-n).softmax(0) * n).sum()
        triplet += torch.log(1 + torch.exp(difference)) / 8
        for j, similarity in others.items():
            if LABEL[j] == LABEL[i]:
                contrast -= torch.log(similarity / sum(others.values())) / 2 / 8
    for i in (0, 3):
        visible = x[LABEL.eq(i) & MODALITY.eq(0)].mean(0)
        infrared = x[LABEL.eq(i) & MODALITY.eq(1)].mean(0)
        centre += (visible - infrared).square().sum() / 2
    return triplet, contrast, centre


def test_losses_equal_the_loops_and_ignore_the_order():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    x = F.normalize(x, dim=1).requires_grad_()
    losses = triplet_loss, contrast_loss, centre_loss
    for loss, want in zip(losses, literal_losses(x), strict=True):
        slope, = torch.autograd.grad(want, x, retain_graph=True)
        for order in (range(8), [3, 7, 0, 5, 1, 6, 2, 4]):
            got = loss(x[order], LABEL[order], MODALITY[order])
            our_slope, = torch.autograd.grad(got, x)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(our_slope, slope, rtol=1e-3, atol=1e-5)


def test_contrast_loss_has_no_candidates_of_the_anchor_s_modality():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    x[MODALITY == 1, 4:] = 0    # infrared uses 4 of 6 dimensions:
    x = F.normalize(x, dim=1)
    moved = x.clone()
    # A turn in the others moves tracklet 0 among the visible ones alone.
    moved[0, 4], moved[0, 5] = x[0, 5], -x[0, 4]
    change = (moved[0] - x[0]) @ x[MODALITY == 0].t()
    assert change.abs().min() > 1e-3
    got, want = contrast_loss(moved, LABEL, MODALITY), contrast_loss(x, LABEL, MODALITY)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------- the whole ----

def test_forward_weighs_the_losses_of_z_and_f_and_c():
    model = small_model()
    losses, _ = model(*BATCH)
    text = model.text_features()
    tokens, z, f = model.features(FRAMES, text)
    c = model.cmi(tokens, partners(MODALITY, LABEL))
    torch.testing.assert_close(z, tokens.mean(1))
    text_loss = 0.08 * F.cross_entropy(f @ text.t(), LABEL)
    torch.testing.assert_close(losses["text"], text_loss)
    for name, x in (("z", z), ("f", f), ("cmi", c)):
        weight = model.heads[name][1].weight
        logits = F.batch_norm(x, None, None, training=True) @ weight.t()
        nearly(losses[f"identity_{name}"], F.cross_entropy(logits, LABEL))
        nearly(losses[f"triplet_{name}"], triplet_loss(x, LABEL, MODALITY))
    z, f, c = (F.normalize(x, dim=1) for x in (z, f, c))
    compared = torch.cat([z, f], dim=1) / math.sqrt(2)    # what test compares, of length 1
    contrast = contrast_loss(compared, LABEL, MODALITY)
    centre = 0.5 * centre_loss(compared, LABEL, MODALITY)
    torch.testing.assert_close(losses["contrast"], contrast)
    torch.testing.assert_close(losses["centre"], centre)
    torch.testing.assert_close(losses["consistency"], (z - c).square().sum(1).mean())


def test_forward_does_not_see_the_order_and_doubles_with_the_weights():
    losses, _ = small_model()(*BATCH)
    flipped, _ = small_model()(*(x.flip(0) for x in BATCH))    # keeps the pairs
    torch.testing.assert_close(flipped, losses, rtol=1e-3, atol=1e-5)
    double, _ = small_model(text=0.16, contrast=2.0, centre=1.0, consistency=2.0)(*BATCH)
    want = {name: loss * 2 if name in WEIGHTS else loss for name, loss in losses.items()}
    torch.testing.assert_close(double, want)


@pytest.mark.parametrize("switch", ["none", "cmi", "sd", *WEIGHTS])
def test_a_part_or_loss_switched_off_is_gone_and_all_else_trains_once(switch):
    off = {} if switch == "none" else {switch: 0}
    model = small_model(**off, boost=5.0)
    losses, _ = model(*BATCH)
    gone = {"identity_cmi", "triplet_cmi", "consistency"} if switch == "cmi" else {switch}
    assert losses.keys() == LOSSES - gone
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith((f"{switch}.", f"heads.{switch}.")) for n in names.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    slow, fast = model.parameter_groups()
    assert (slow["factor"], fast["factor"]) == (1, 5.0)
    assert sorted(id(p) for p in slow["params"] + fast["params"]) == sorted(names)
    boosted = {names[id(p)] for p in fast["params"]}
    new = r".*bias|prompts\.words|heads\.\w+\.1\.weight"
    norm_of_classifier = r"heads\.\w+\.0\.weight"    # either group will do
    needed = {n for n in names.values() if re.fullmatch(new, n)}
    allowed = {n for n in names.values() if re.fullmatch(norm_of_classifier, n)}
    assert needed <= boosted <= needed | allowed


def test_consistency_pulls_z_and_gives_cmi_no_gradient():
    model = small_model()
    losses, _ = model(*BATCH)
    losses["consistency"].backward()
    pulled = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            pulled.add(name.split(".")[0])
    assert "clip" in pulled and not pulled & {"cmi", "heads"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_losses_are_float32_and_near_those_of_float32(dtype):
    model = small_model()
    whole, _ = small_model()(*BATCH)
    with torch.autocast("cpu", dtype):
        losses, _ = model(*BATCH)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses, whole, rtol=0.1, atol=0.02)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        assert model.eval().embed(FRAMES, MODALITY).dtype == torch.float32


class Mine(LSMRL):
    """What a student may write: the maximum over time, and another loss of that name."""

    def pool(self, tokens):
        return tokens.amax(1)

    def losses_of(self, streams, text, label, modality):
        losses = super().losses_of(streams, text, label, modality)
        losses["centre"] = 3 * centre_loss(streams["z"], label, modality)
        return losses


def test_a_subclass_replaces_one_loss_and_the_pooling():
    model = small_model(method=Mine)
    losses, _ = model(*BATCH)
    tokens, z, _ = model.features(FRAMES, model.text_features())
    assert losses.keys() == LOSSES
    assert torch.equal(z, tokens.amax(1))
    torch.testing.assert_close(losses["centre"], 3 * centre_loss(z, LABEL, MODALITY))
    torch.testing.assert_close(losses["triplet_z"], triplet_loss(z, LABEL, MODALITY))


# --------------------------------------------------------- configuration ----

def test_the_defaults_are_the_specification_s():
    options = LSMRL.Options()
    wanted = {"size": (288, 144), "optimizer": "AdamW", "lr": 2.5e-5, "weight_decay": 1e-4,
              "boost": 25.0, "warmup_epochs": 3, "cosine": True, "epochs": 24,
              "clip": "ViT-B-16", "split": (8, 2, 2), "groups": 6, "text": 0.08,
              "contrast": 1.0, "centre": 0.5, "sd": True, "cmi": True}
    assert {name: getattr(options, name) for name in wanted} == wanted
    options.check()
    for f in fields(options):
        least, most = f.metadata["least"], f.metadata["most"]
        assert (least is None) == (most is None), f.name
        assert f.metadata["group"] in ("run", "schedule", "data", "method")


def test_a_run_of_the_paper_s_preset_is_the_specification_s():
    from train import method_and_config
    method, configuration = method_and_config("lsmrl")
    assert method is LSMRL
    config = configuration(method="lsmrl")
    wanted = {"identities": 4, "tracklets": 4, "frames": 6, "steps": 200, "epochs": 24,
              "lr": 2.5e-5, "size": (288, 144)}
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("wrong, words", [
    ({"clip": "RN50"}, "--clip RN50; ViT-B-16, tiny"),
    ({"size": (60, 32)}, "--size 60 32; multiples of 8"),
    ({"split": (1, 1, 1)}, "--split 1 1 1; 4 blocks"),
    ({"groups": 3}, "--groups 3; 4 rows")])
def test_choices_that_cannot_work_are_refused(wrong, words):
    with pytest.raises(UserError) as error:
        tiny_options(**wrong).check()
    for word in words.split("; "):
        assert word in str(error.value)
    tiny_options(split=(4, 0, 0), groups=3).check()    # no block is grouped


def test_the_choices_reach_the_model():
    own = {"split": (1, 2, 1), "text": 0.3, "contrast": 0.7, "centre": 0.2, "consistency": 0.1,
           "boost": 7.0}
    model = LSMRL(tiny_options(**own), 4)
    assert model.warm_up_steps == 0
    text = model.text_features().detach()
    torch.testing.assert_close(model.bank, text)    # an untrained model can be evaluated
    _, fast = model.parameter_groups()
    assert fast["factor"] == 7.0

    losses, _ = model(*BATCH)
    tokens, z, f = model.features(FRAMES, text)
    # SD, untrained, leaves them as they are.
    torch.testing.assert_close(tokens, stfl(model.clip.visual, FRAMES, split=(1, 2, 1), groups=2))
    c = model.cmi(tokens, partners(MODALITY, LABEL))
    compared = lsmrl.side_by_side(z, f) / math.sqrt(2)
    unweighted = {"text": lsmrl.text_loss(f, text, LABEL),
                  "contrast": contrast_loss(compared, LABEL, MODALITY),
                  "centre": centre_loss(compared, LABEL, MODALITY),
                  "consistency": lsmrl.consistency_loss(z, c)}
    for name, loss in unweighted.items():
        nearly(losses[name], own[name] * loss)

    off = LSMRL(tiny_options(**own, sd=False, cmi=False), 4, pretrained=False)
    assert off.sd is None and off.cmi is None and not off.bank.any()


def test_the_rate_warms_up_and_then_follows_a_cosine():
    from train import learning_rate_factor, method_and_config
    _, configuration = method_and_config("lsmrl")
    config = configuration(method="lsmrl")
    first = [learning_rate_factor(config, epoch) for epoch in range(4)]
    assert first == pytest.approx([0.01, 0.34, 0.67, 1])
    for epoch in range(3, 30):
        past = min(1, (epoch - 3) / 21)
        want = 0.01 + 0.99 * math.cos(math.pi / 2 * past) ** 2
        assert learning_rate_factor(config, epoch) == pytest.approx(want)
