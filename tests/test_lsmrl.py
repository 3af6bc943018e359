"""LSMRL against literal forms written from its specification: loops, PyTorch's own attention, numbers worked by hand."""
import inspect
import math
import os
import pickle
import re
import warnings
import zipfile
import zlib
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lsmrl
from data import UserError
from golden import formula
from lsmrl import attend_grouped, attend_shifted, centre_loss, contrast_loss, load_clip, partners, roll_patches, stfl
from train import config_of, rate

SMALL = dict(patch=8, grid=4, width=24, depth=3, heads=3, text_width=16, text_depth=2, text_heads=2, dim=12)
SHIFT = [[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]]
LABEL, MODALITY = torch.tensor([3, 0, 0, 3, 3, 0, 3, 0]), torch.tensor([0, 0, 1, 1, 0, 1, 1, 0])
BATCH = torch.randn(8, 3, 3, 32, 16, generator=torch.Generator().manual_seed(0)), MODALITY, LABEL
LOSSES = set("identity_z identity_f identity_cmi triplet_z triplet_f triplet_cmi text contrast centre consistency".split())


def clip_shapes(patch, grid, width, depth, text_width, text_depth, dim, **heads):
    """Names and shapes of OpenAI's file, written down from the specification."""
    shapes = {"positional_embedding": (77, text_width), "text_projection": (text_width, dim), "logit_scale": (),
              "token_embedding.weight": (49408, text_width), "visual.class_embedding": (width,), "visual.proj": (width, dim),
              "visual.positional_embedding": (grid ** 2 + 1, width), "visual.conv1.weight": (width, 3, patch, patch)}
    norms = [("ln_final", text_width), ("visual.ln_pre", width), ("visual.ln_post", width)]
    for side, D, n in (("visual.", width, depth), ("", text_width, text_depth)):
        for block in (f"{side}transformer.resblocks.{i}." for i in range(n)):
            norms += [(block + "ln_1", D), (block + "ln_2", D)]
            shapes |= {block + "attn.in_proj_weight": (3 * D, D), block + "attn.in_proj_bias": (3 * D,)}
            for linear, rows, columns in (("attn.out_proj", D, D), ("mlp.c_fc", 4 * D, D), ("mlp.c_proj", D, 4 * D)):
                shapes |= {f"{block}{linear}.weight": (rows, columns), f"{block}{linear}.bias": (rows,)}
    return shapes | {f"{norm}.{leaf}": (D,) for norm, D in norms for leaf in ("weight", "bias")}


def small_clip():
    clip = lsmrl.CLIP(**SMALL)
    clip.load_state_dict({k: formula(k, s) for k, s in clip_shapes(**SMALL).items()})
    clip.visual.resize(4, 2)
    return clip


def small_model(seed=0, **switches):
    torch.manual_seed(seed)
    clip = load_clip("tiny")
    clip.visual.resize(4, 2)
    model = lsmrl.LSMRL(classes=4, clip=clip, split=(2, 1, 1), groups=2, **switches).train()
    if switches.get("sd", True):
        nn.init.normal_(model.sd.attn.out_proj.weight, std=0.3)    # or SD would be the identity
    return model


def literal_attention(attention, tokens):
    """Tokens (L, D) -> (L, D), one query and one head at a time."""
    size, rows = tokens.shape[1] // attention.heads, []
    q, k, v = (tokens @ attention.in_proj_weight.t() + attention.in_proj_bias).split(tokens.shape[1], dim=1)
    for query in q:
        heads = []
        for head in (slice(s, s + size) for s in range(0, len(query), size)):
            share = torch.exp(k[:, head] @ query[head] / math.sqrt(size))
            heads.append(share @ v[:, head] / share.sum())
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ attention.out_proj.weight.t() + attention.out_proj.bias


def literal_grouped(attention, x, groups, grid):
    update, (h, w), T = torch.zeros_like(x), grid, x.shape[1]
    for b in range(len(x)):
        for g in range(groups):
            rows = range(g * h // groups, (g + 1) * h // groups)
            places = [(t, 0) for t in range(T)] + [(t, 1 + r * w + c) for c in range(w) for r in rows for t in range(T)]
            for (t, i), new in zip(places, literal_attention(attention, torch.stack([x[b, t, i] for t, i in places]))):
                update[b, t, i] += new if i else new / groups
    return update


def literal_roll(patches, grid, sign=1):
    rolled = patches.clone()
    for n, (r, c) in enumerate((r, c) for r in range(grid[0]) for c in range(grid[1])):
        rolled[:, :, n] = torch.roll(patches[:, :, n], sign * SHIFT[r % 3][c % 3], dims=1)
    return rolled


def literal_shifted(attention, x, grid):
    x = torch.cat([x[:, :, :1], literal_roll(x[:, :, 1:], grid)], dim=2)
    x = torch.stack([torch.stack([literal_attention(attention, frame) for frame in tracklet]) for tracklet in x])
    return torch.cat([x[:, :, :1], literal_roll(x[:, :, 1:], grid, -1)], dim=2)


def torch_attention(attention, x, context=None, mask=None):
    """PyTorch's own multi-head attention with these weights: x (N, L, D), context (N, M, D) -> (N, L, D)."""
    q, k, out = x.transpose(0, 1), (x if context is None else context).transpose(0, 1), attention.out_proj
    y, _ = F.multi_head_attention_forward(
        q, k, k, x.shape[2], attention.heads, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
        out.weight, out.bias, need_weights=False, attn_mask=mask)
    return y.transpose(0, 1)


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)


def literal_block(block, x, attend):
    x = x + attend(block.attn, norm(block.ln_1, x))
    hidden = norm(block.ln_2, x) @ block.mlp.c_fc.weight.t() + block.mlp.c_fc.bias
    return x + hidden / (1 + torch.exp(-1.702 * hidden)) @ block.mlp.c_proj.weight.t() + block.mlp.c_proj.bias


def literal_visual(visual, images, *routes):
    """Images (T, 3, 32, 16) of a tracklet -> CLS tokens (1, T, D). routes: what each block's attention does."""
    x = [(images[:, None, :, r:r + 8, c:c + 8] * visual.conv1.weight).sum((2, 3, 4)) for r in range(0, 32, 8) for c in (0, 8)]
    x = torch.stack([visual.class_embedding.expand(len(images), -1), *x], dim=1) + visual.positional_embedding
    x = norm(visual.ln_pre, x)[None]    # (1, T, 9, D)
    for block, attend in zip(visual.transformer.resblocks, routes, strict=True):
        x = literal_block(block, x, attend)
    return norm(visual.ln_post, x[:, :, 0])


@pytest.mark.parametrize("T", [1, 2, 5])
def test_grouped_and_shifted_attention_equal_the_loops(T):
    torch.manual_seed(T)
    attention, x, grid = lsmrl.Attention(8, 2).double(), torch.randn(2, T, 1 + 6 * 2, 8).double().requires_grad_(), (6, 2)
    for p in attention.parameters():
        nn.init.normal_(p)
    direction = torch.randn_like(x)
    pairs = [(attend_grouped(attention, x, groups), literal_grouped(attention, x, groups, grid)) for groups in (1, 2, 6)]
    for pair in [*pairs, (attend_shifted(attention, x, grid), literal_shifted(attention, x, grid))]:
        (ours, *our_slopes), (want, *slopes) = (
            (y, *torch.autograd.grad((direction * y).sum(), [x, *attention.parameters()])) for y in pair)
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(our_slopes, slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 3, 6])
def test_patch_shift_equals_the_loops_and_undoes_itself(T):
    patches = torch.randn(2, T, 5 * 4, 3)
    for sign in (1, -1):
        rolled = roll_patches(patches, (5, 4), sign)
        assert torch.equal(rolled, literal_roll(patches, (5, 4), sign))
        assert torch.equal(roll_patches(rolled, (5, 4), -sign), patches)
    clock = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 9, 1)    # each patch shows the number of its frame:
    assert roll_patches(clock, (3, 3))[0, 0].view(3, 3).tolist() == [[4, 5, 4], [1, 0, 3], [2, 3, 2]]    # minus its shift


@torch.no_grad()
def test_stfl_is_clip_with_grouped_and_then_shifted_blocks():
    visual, frames = small_clip().visual, torch.randn(3, 5, 3, 32, 16)
    basic, close = lambda a, x: torch_attention(a, x[0])[None], partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    plain = torch.cat([literal_visual(visual, tracklet, *[basic] * 3) for tracklet in frames])
    close(stfl(visual, frames, split=(3, 0, 0), groups=2), plain)
    for split, groups in (((3, 0, 0), 2), ((1, 0, 2), 2), ((0, 3, 0), 1)):    # T = 1: nothing to shift or to mix with
        close(stfl(visual, frames[:, 2:3], split=split, groups=groups), plain[:, 2:3])
    grouped, shifted = lambda a, x: literal_grouped(a, x, 2, (4, 2)), lambda a, x: literal_shifted(a, x, (4, 2))
    close(stfl(visual, frames[:1], split=(1, 1, 1), groups=2), literal_visual(visual, frames[0], basic, grouped, shifted))


@torch.no_grad()
def test_a_prompt_s_twelve_positions_give_the_text_feature_of_all_77():
    clip = small_clip()
    prompts = lsmrl.Prompts(classes=3, token_embedding=clip.token_embedding)
    words = prompts.words.normal_()
    ids = [int(i) for i in "49406 320 1125 539 320 343 343 343 343 2533 269 49407".split()]
    whole = clip.token_embedding(torch.tensor(ids + [0] * 65)).repeat(3, 1, 1)    # zero-padded
    whole[:, 5:9] = words
    assert list(lsmrl.PROMPT) == ids and list(range(12))[lsmrl.SLOTS] == [5, 6, 7, 8]
    assert torch.equal(prompts(clip.token_embedding), whole[:, :12])
    x, mask = whole + clip.positional_embedding, torch.full((77, 77), -math.inf).triu(1)
    for block in clip.transformer.resblocks:
        x = literal_block(block, x, lambda a, x: torch_attention(a, x, mask=mask))
    want = norm(clip.ln_final, x)[:, 11] @ clip.text_projection
    for sentences in (whole, whole[:, :12]):
        torch.testing.assert_close(clip.encode_text(sentences, 11), want, rtol=1e-4, atol=1e-4)


def test_positions_are_resized_bilinearly_and_row_0_is_kept():
    visual = lsmrl.CLIP(**SMALL | {"grid": 14}).visual
    before = visual.positional_embedding.detach().normal_().clone()    # (197, 24)
    visual.resize(18, 9)
    after = visual.positional_embedding    # (163, 24)
    assert isinstance(after, nn.Parameter) and tuple(visual.grid) == (18, 9) and torch.equal(after[0], before[0])
    want = F.interpolate(before[1:].t().reshape(1, 24, 14, 14), (18, 9), mode="bilinear")[0].flatten(1).t()
    torch.testing.assert_close(after[1:], want)


def official_tensors(**sizes):
    """What OpenAI's file holds: half precision (here a few in single), and three integers that are no weights."""
    tensors = {k: torch.tensor(v) for k, v in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408))}
    for name, shape in clip_shapes(**sizes).items():
        steps = [2 ** k for k in reversed(range(len(shape)))]    # element (i, j) is wave[2 * i + j]: a view, quick to save
        wave = torch.arange(1 + sum(step * (n - 1) for step, n in zip(steps, shape))) + zlib.crc32(name.encode()) % 1000
        wave = wave.sin() if name.endswith(("ln_1.weight", "logit_scale")) else wave.sin().half()
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
    want = {k: v.float() for k, v in want.items() if v.is_floating_point()}
    return got.keys() == want.keys() and all(v.dtype == torch.float32 and torch.equal(v, want[k]) for k, v in got.items())


@pytest.fixture
def small_vit(monkeypatch, tmp_path):
    """Lets the name ViT-B-16 mean a CLIP that is quick to save, and no file be cached."""
    monkeypatch.setitem(lsmrl.CLIP_MODELS, "ViT-B-16", SMALL)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


def test_vit_b_16_loads_openai_s_archive(tmp_path):
    tensors = official_tensors(**lsmrl.CLIP_MODELS["ViT-B-16"])
    save_archive(tensors, tmp_path / "ViT-B-16.pt")
    clip = load_clip("ViT-B-16", str(tmp_path / "ViT-B-16.pt"))
    assert len(clip.state_dict()) == 302 and same_tensors(clip.state_dict(), tensors)
    assert clip.visual.proj.shape == (768, 512) and tuple(clip.visual.grid) == (14, 14)
    assert [side.transformer.resblocks[11].attn.heads for side in (clip.visual, clip)] == [12, 8]
    assert {n for n, p in clip.named_parameters() if p.requires_grad} == {n for n in tensors if n.startswith("visual.")}


def test_state_dicts_load_and_misfits_are_named(small_vit, tmp_path):
    tensors, path, name = official_tensors(**SMALL), tmp_path / "clip.pt", "visual.transformer.resblocks.1.attn.in_proj_bias"
    torch.save(tensors, path)
    assert same_tensors(lsmrl.read_clip(path), tensors) and same_tensors(load_clip("ViT-B-16", str(path)).state_dict(), tensors)
    for misfit, value in ((name, None), ("visual.lora", torch.zeros(3)), (name, torch.zeros(7)), ("visual.proj", torch.ones(1))):
        torch.save({k: v for k, v in (tensors | {misfit: value}).items() if v is not None}, path)
        with pytest.raises(UserError, match=re.escape(misfit)):
            load_clip("ViT-B-16", str(path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_torn_and_evil_files_are_refused_and_nothing_runs(small_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_archive(official_tensors(**SMALL), "whole.pt")
    bad = {"torn": (tmp_path / "whole.pt").read_bytes()[:10_000], "empty": b"", "pickle": pickle.dumps({"visual.proj": Evil()})}
    for name, content in bad.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name, content in (("list", [torch.zeros(3)]), ("number", {"epoch": 3}), ("evil", Evil()), ("disguised", Evil())):
        torch.save(content, f"{name}.pt")
    with zipfile.ZipFile("disguised.pt", "a") as archive:    # as TorchScript
        archive.writestr("disguised/constants.pkl", pickle.dumps(()))
    for name in (*bad, "list", "number", "evil", "disguised", "gone"):
        with pytest.raises(UserError, match=f"{name}.pt"):
            load_clip("ViT-B-16", f"{name}.pt")
    assert not (tmp_path / "ran").exists()

    class Program(nn.Module):    # TorchScript that writes a file while it is read
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Program()), "program.pt")
    with pytest.raises(UserError, match="__setstate__"):
        load_clip("ViT-B-16", "program.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads(bad["pickle"])
    assert (tmp_path / "ran").exists()    # it would have run


def test_the_download_is_checked_and_cached_and_its_failure_one_clear_error(small_vit, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as error:
        load_clip("ViT-B-16")
    message = str(error.value)
    assert "\n" not in message and all(way in message for way in ("network", "--clip-weights", "--preset small"))
    assert load_clip("ViT-B-16", pretrained=False).visual.proj.shape == (24, 12)    # a checkpoint will fill it
    for name, weights in (("RN50", None), ("tiny", "file.pt")):
        with pytest.raises(UserError):
            load_clip(name, weights)
    tensors, asked = official_tensors(**SMALL), []

    def download(url, dst, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        save_archive(tensors, dst)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert same_tensors(load_clip("ViT-B-16").state_dict(), tensors) and load_clip("ViT-B-16") and len(asked) == 1
    url, sha256 = asked[0]
    assert re.fullmatch("[0-9a-f]{64}", sha256)
    assert url == f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-B-16.pt"


def test_prompts_are_all_that_trains_of_the_text_side():
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([{"params": g["params"], "lr": 1e-3 * g["factor"]} for g in model.parameter_groups()])
    sum(model(*BATCH)[0].values()).backward()
    bank = model.bank.clone()
    torch.testing.assert_close(bank, model.text_features().detach())
    model(BATCH[0].flip(1, 3), MODALITY, LABEL)
    assert torch.equal(model.bank, bank) and bank.shape == (4, 64)    # the sentences', whatever the images
    optimizer.step()
    text_side = {n for n, _ in model.named_parameters() if not n.startswith(("clip.visual", "sd", "cmi", "heads"))}
    assert {n for n, p in model.named_parameters() if n in text_side and p.requires_grad} == {"prompts.words"}
    assert {n for n in text_side if not torch.equal(before[n], model.state_dict()[n])} == {"prompts.words"}


@torch.no_grad()
def test_embeddings_are_a_tracklet_s_own_and_the_bank_travels_with_the_checkpoint():
    model, copy, (frames, modality, label) = small_model(), small_model(seed=1).eval(), BATCH
    model(frames, modality, label)    # fills the bank, moves the statistics
    model.eval()
    together = model.embed(frames, modality)
    assert together.shape == (8, 1, 64 + 64) and together.dtype == torch.float32
    torch.testing.assert_close(model.embed(frames[2:3], modality[2:3]), together[2:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.embed(frames.flip(0), 1 - modality), together.flip(0), rtol=1e-4, atol=1e-5)
    for half in together.split(64, dim=2):
        torch.testing.assert_close(half.norm(dim=2), torch.ones(8, 1))
    model.prompts.words.add_(1)    # as the optimizer's step does: the bank is what SD used, not what the words are now
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.embed(frames, modality), together)
    copy.bank.normal_()
    assert not torch.allclose(copy.embed(frames, modality), together, atol=1e-3)


def test_sd_starts_as_the_identity_and_learns():
    torch.manual_seed(0)
    sd, tokens, bank = lsmrl.SD(dim=8, text_dim=6, heads=2), torch.randn(3, 4, 8), torch.randn(5, 6)
    assert torch.equal(sd(tokens, bank), tokens)
    (sd(tokens, bank) * torch.randn(3, 4, 8)).sum().backward()
    assert sd.attn.out_proj.weight.grad.abs().max() > 0
    nn.init.normal_(sd.attn.out_proj.weight)
    diffused = sd(tokens, bank)
    assert not torch.allclose(diffused, tokens, atol=1e-2)
    torch.testing.assert_close(sd(tokens[:1, 2:3], bank.flip(0)), diffused[:1, 2:3])    # no order, no other token


def test_cmi_attends_to_the_partner_s_frames():
    torch.manual_seed(0)
    cmi, tokens, partner = lsmrl.CMI(dim=8, heads=2), torch.randn(4, 3, 8), torch.tensor([2, 3, 0, 1])
    for p in cmi.parameters():
        nn.init.normal_(p)
    c, block = cmi(tokens, partner), cmi.block
    torch.testing.assert_close(cmi(tokens[partner], partner), c[partner])    # modalities swapped: the weights are shared
    for b in range(4):
        x, y = tokens[b:b + 1], tokens[partner[b]:partner[b] + 1]
        z = literal_block(block, x, lambda a, x: torch_attention(a, x, norm(block.ln_1, y)))
        torch.testing.assert_close(c[b], z[0].mean(0), rtol=1e-4, atol=1e-4)
    tokens[3] = torch.randn(3, 8)
    assert (cmi(tokens, partner) - c).abs().amax(1).gt(1e-3).tolist() == [False, True, False, True]


def test_partners_are_the_kth_of_each_modality():
    assert partners(MODALITY, LABEL).tolist() == [3, 2, 1, 0, 6, 7, 4, 5]
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        label, modality = order // 4, order % 2
        partner = partners(modality, label)
        assert torch.equal(partner[partner], torch.arange(16))
        assert torch.equal(label[partner], label) and torch.equal(modality[partner], 1 - modality)


def triplet_loss(x, label, modality):
    return lsmrl.weighted_triplet_loss(x, label)


def test_losses_by_hand():
    x = torch.tensor([[0.0], [3.0], [7.0]])    # 0 and 3 share an identity, 7 is alone with itself
    p, n = 3 * math.exp(3) / (1 + math.exp(3)), (7 * math.exp(-7) + 4 * math.exp(-4)) / (math.exp(-7) + math.exp(-4))
    want = sum(math.log1p(math.exp(difference)) for difference in (p - 7, p - 4, 0 - n)) / 3
    assert triplet_loss(x, torch.tensor([5, 5, 1]), None).item() == pytest.approx(want, rel=1e-4)

    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0]])    # identities 4 and 2, visible and then infrared
    for factor, option in ((2, {"temperature": 0.5}), (10, {})):    # dot products of positive and negative, per anchor
        want = sum(math.log1p(math.exp(factor * (n - p))) for p, n in ((0.6, 0), (1, 0.8), (0.6, 0.8), (1, 0))) / 4
        got = contrast_loss(x, torch.tensor([4, 2, 4, 2]), torch.tensor([0, 0, 1, 1]), **option)
        assert got.item() == pytest.approx(want, rel=1e-5)

    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [5.0, 5.0], [5.0, 9.0]])    # centres 3 and 4 apart
    label, modality = torch.tensor([7, 7, 7, 2, 2]), torch.tensor([0, 0, 1, 0, 1])
    assert centre_loss(x, label, modality).item() == pytest.approx((9 + 16) / 2)
    x[2, 1], x[4, 1] = 0, 5    # the centres meet, the tracklets do not
    assert centre_loss(x, label, modality).item() == 0


def test_losses_equal_the_loops_and_ignore_the_order():
    x = F.normalize(torch.randn(8, 5, generator=torch.Generator().manual_seed(3)), dim=1).requires_grad_()
    triplet, contrast = 0, 0
    for i in range(8):
        distances = [(x[i] - x[j]).norm() if j != i else torch.zeros(()) for j in range(8)]
        p, n = (torch.stack([d for j, d in enumerate(distances) if (LABEL[j] == LABEL[i]) == same]) for same in (True, False))
        triplet += torch.log(1 + torch.exp((p.softmax(0) * p).sum() - ((-n).softmax(0) * n).sum())) / 8
        others = {j: torch.exp(x[i] @ x[j] / 0.1) for j in range(8) if MODALITY[j] != MODALITY[i]}
        contrast -= sum(torch.log(e / sum(others.values())) for j, e in others.items() if LABEL[j] == LABEL[i]) / 2 / 8
    centres = [[x[(LABEL == i) & (MODALITY == m)].mean(0) for m in (0, 1)] for i in (0, 3)]
    centre = sum((a - b).square().sum() for a, b in centres) / 2
    for loss, want in ((triplet_loss, triplet), (contrast_loss, contrast), (centre_loss, centre)):
        slope, = torch.autograd.grad(want, x, retain_graph=True)
        for order in (range(8), [3, 7, 0, 5, 1, 6, 2, 4]):
            got = loss(x[order], LABEL[order], MODALITY[order])
            torch.testing.assert_close([got, *torch.autograd.grad(got, x)], [want, slope], rtol=1e-3, atol=1e-5)


def test_contrast_loss_has_no_candidates_of_the_anchor_s_modality():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    x[MODALITY == 1, 4:] = 0    # infrared uses 4 of 6 dimensions,
    x = F.normalize(x, dim=1)
    moved = x.clone()
    moved[0, 4], moved[0, 5] = x[0, 5], -x[0, 4]    # so a turn in the others moves tracklet 0 among the visible ones alone
    assert ((moved[0] - x[0]) @ x[MODALITY == 0].t()).abs().min() > 1e-3
    torch.testing.assert_close(contrast_loss(moved, LABEL, MODALITY), contrast_loss(x, LABEL, MODALITY))


def test_forward_weighs_the_losses_of_z_and_f_and_c():
    model, (frames, modality, label) = small_model(), BATCH
    losses, _ = model(frames, modality, label)
    text = model.text_features()
    tokens, z, f = model.features(frames, text)
    torch.testing.assert_close(z, tokens.mean(1))
    torch.testing.assert_close(losses["text"], 0.08 * F.cross_entropy(f @ text.t(), label))
    for name, x in (("z", z), ("f", f), ("cmi", model.cmi(tokens, partners(modality, label)))):
        logits = F.batch_norm(x, None, None, training=True) @ model.heads[name][1].weight.t()
        torch.testing.assert_close(losses[f"identity_{name}"], F.cross_entropy(logits, label), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses[f"triplet_{name}"], triplet_loss(x, label, modality), rtol=1e-4, atol=1e-5)
    c, (z, f) = F.normalize(model.cmi(tokens, partners(modality, label)), dim=1), (F.normalize(x, dim=1) for x in (z, f))
    compared = torch.cat([z, f], dim=1) / math.sqrt(2)    # what test compares, of length 1
    torch.testing.assert_close(losses["contrast"], contrast_loss(compared, label, modality))
    torch.testing.assert_close(losses["centre"], 0.5 * centre_loss(compared, label, modality))
    torch.testing.assert_close(losses["consistency"], (z - c).square().sum(1).mean())
    flipped, _ = model(*(x.flip(0) for x in BATCH))    # keeps the pairs
    torch.testing.assert_close(flipped, losses, rtol=1e-3, atol=1e-5)
    double, _ = small_model(text=0.16, contrast=2, centre=1, consistency=2)(*BATCH)
    torch.testing.assert_close(double, losses | {k: 2 * losses[k] for k in ("text", "contrast", "centre", "consistency")})


@pytest.mark.parametrize("switch", ["none", "text", "contrast", "centre", "consistency", "cmi", "sd"])
def test_a_part_or_loss_switched_off_is_gone_and_all_else_trains_once(switch):
    model = small_model(**{} if switch == "none" else {switch: 0}, boost=5.0)
    losses, _ = model(*BATCH)
    assert losses.keys() == LOSSES - ({"identity_cmi", "triplet_cmi", "consistency"} if switch == "cmi" else {switch})
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in names.values() if n.startswith((f"{switch}.", f"heads.{switch}."))]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    slow, fast = model.parameter_groups()
    assert (slow["factor"], fast["factor"]) == (1, 5.0)
    assert sorted(id(p) for p in slow["params"] + fast["params"]) == sorted(names)
    small = {n for n in names.values() if re.fullmatch(r".*bias|prompts\.words|heads\.\w+\.1\.weight", n)}
    norms = {n for n in names.values() if re.fullmatch(r"heads\.\w+\.0\.weight", n)}    # of a classifier: either group will do
    assert small <= {names[id(p)] for p in fast["params"]} <= small | norms


def test_consistency_pulls_z_and_gives_cmi_no_gradient():
    model = small_model()
    model(*BATCH)[0]["consistency"].backward()
    pulled = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
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
        assert model.eval().embed(*BATCH[:2]).dtype == torch.float32


def test_the_paper_preset_is_the_specification_s_and_reaches_the_model():
    config = config_of("lsmrl")(method="lsmrl")
    wanted = dict(size=(288, 144), identities=4, tracklets=4, frames=6, optimizer="AdamW", lr=2.5e-5, weight_decay=1e-4, boost=25.0, warmup_epochs=3,
                  cosine=True, epochs=24, steps=200, clip="ViT-B-16", split=(8, 2, 2), groups=6, text=0.08, contrast=1.0, centre=0.5, sd=True, cmi=True)
    assert {k: getattr(config, k) for k in wanted} == wanted
    for name, p in inspect.signature(lsmrl.LSMRL).parameters.items():    # said twice, the same
        assert p.default is p.empty or p.default == getattr(config, name), name
    own = dict(clip="tiny", size=(32, 16), split=(1, 2, 1), groups=2, text=0.3, contrast=0.7, centre=0.2, consistency=0.1, boost=7.0)
    model = lsmrl.build(replace(config, **own), 4)
    assert (model.split, model.groups, model.boost) == ((1, 2, 1), 2, 7.0)
    assert model.weights == {k: own[k] for k in ("text", "contrast", "centre", "consistency")}
    torch.testing.assert_close(model.bank, model.text_features().detach())    # an untrained model can be evaluated
    off = lsmrl.build(replace(config, **own, sd=False, cmi=False), 4, pretrained=False)
    assert off.sd is None and off.cmi is None and not off.bank.any()


def test_the_rate_warms_up_and_then_follows_a_cosine():
    factor = rate(config_of("lsmrl")(method="lsmrl"))
    assert [factor(epoch) for epoch in range(4)] == pytest.approx([0.01, 0.34, 0.67, 1])
    for epoch in range(3, 30):
        assert factor(epoch) == pytest.approx(0.01 + 0.99 * math.cos(math.pi / 2 * min(1, (epoch - 3) / 21)) ** 2)
