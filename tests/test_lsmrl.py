"""LSMRL and CLIP against literal forms: loops, PyTorch's own attention, numbers worked by hand."""
import math
import re
import shutil
from dataclasses import replace
from functools import partial

import lsmrl
from lsmrl import LSMRL, Options, attend_grouped, attend_shifted, partners, stfl
from support.clip import CLIP, CLIP_MODELS, Attention, load_clip, prompt_of
from support.files import UserError
from train import read_command_line

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")    # it goes, its archives stay
SMALL_CLIP = {"patch": 8, "grid": (4, 4), "width": 24, "depth": 3, "heads": 3, "dim": 12,
              "text_width": 16, "text_depth": 2, "text_heads": 2, "words": 49408}
SHIFT = [[-4, 1, 2], [-1, 0, 3], [-2, -3, 4]]
SIZE = 64, 32
SMALL = Options(clip="tiny-random", split=(2, 1, 1), groups=2)
LABEL = torch.tensor([3, 0, 0, 3, 3, 0, 3, 0])
MODALITY = torch.tensor([0, 0, 1, 1, 0, 1, 1, 0])
FRAMES = torch.randn(8, 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
WEIGHTS = {"text": 0.08, "contrast": 1.0, "centre": 0.5, "consistency": 1.0}
LOSSES = {f"{loss}_{stream}" for loss in ("identity", "triplet") for stream in ("z", "f", "cmi")}
LOSSES |= WEIGHTS.keys()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def small_clip():
    torch.manual_seed(0)
    clip = CLIP(**SMALL_CLIP).requires_grad_(False)
    for parameter in clip.parameters():
        nn.init.normal_(parameter, std=0.3)
    return clip


def small_model(method=LSMRL, **changes):
    torch.manual_seed(0)
    model = method(replace(SMALL, **changes), 4, SIZE).train()
    if model.sd is not None:    # or SD would be the identity
        nn.init.normal_(model.sd.attn.out_proj.weight, std=0.3)
    return model


def losses_of(model, order=slice(None)):
    losses, _ = model(FRAMES[order], MODALITY[order], LABEL[order])
    return losses


# ------------------------------------------------------------ literal forms ----

def torch_attention(attention, x, context=None, mask=None):
    """PyTorch's own: x (L, D), context (M, D), by default x -> (L, D), and shares (L, M)."""
    context, out = x if context is None else context, attention.out_proj
    return F.multi_head_attention_forward(
        x, context, context, x.shape[1], attention.heads, attention.in_proj_weight,
        attention.in_proj_bias, None, None, False, 0.0, out.weight, out.bias, attn_mask=mask)


def literal_attention(*arguments):
    return torch_attention(*arguments)[0]


def literal_basic(attention, x):
    frames = [literal_attention(attention, frame) for frame in x.flatten(0, 1)]
    return torch.stack(frames).view_as(x)


def literal_grouped(attention, x, groups):
    tracklets = []
    for frames in x:
        cls = frames[:, 0]
        parts = [literal_attention(attention, cls, frames.flatten(0, 1))[:, None]]
        for stripe in frames[:, 1:].chunk(groups, dim=1):
            row = torch.cat([stripe.flatten(0, 1), cls])
            parts.append(literal_attention(attention, row)[:-len(cls)].view_as(stripe))
        tracklets.append(torch.cat(parts, dim=1))
    return torch.stack(tracklets)


def literal_roll(patches, grid, sign=1):
    rolled = patches.clone()
    for r in range(grid[0]):
        for c in range(grid[1]):
            n, shift = r * grid[1] + c, sign * SHIFT[r % 3][c % 3]
            rolled[:, :, n] = torch.roll(patches[:, :, n], shift, dims=1)
    return rolled


def literal_shifted(attention, x, grid):
    x = torch.cat([x[:, :, :1], literal_roll(x[:, :, 1:], grid)], dim=2)
    x = literal_basic(attention, x)
    return torch.cat([x[:, :, :1], literal_roll(x[:, :, 1:], grid, -1)], dim=2)


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-5)


def literal_block(block, x, attend):
    x = x + attend(block.attn, norm(block.ln_1, x))
    hidden = F.linear(norm(block.ln_2, x), block.mlp.c_fc.weight, block.mlp.c_fc.bias)
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return x + F.linear(hidden, block.mlp.c_proj.weight, block.mlp.c_proj.bias)


def literal_visual(visual, frames, *attend):
    """Frames (B, T, 3, 32, 16) -> CLS tokens (B, T, D). attend: what each block does."""
    patches = F.conv2d(frames.flatten(0, 1), visual.conv1.weight, stride=8)
    patches = patches.flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(patches), 1, -1)
    x = norm(visual.ln_pre, torch.cat([cls, patches], dim=1) + visual.positional_embedding)
    x = x.unflatten(0, frames.shape[:2])
    for block, how in zip(visual.transformer.resblocks, attend, strict=True):
        x = literal_block(block, x, how)
    return norm(visual.ln_post, x[:, :, 0])


# ------------------------------------------------------------ STFL and CLIP ----

@torch.no_grad()
@pytest.mark.parametrize("T", [1, 5])
def test_grouped_and_shifted_attention_equal_the_loops(T):
    torch.manual_seed(T)
    attention, x, grid = Attention(8, 2), torch.randn(2, T, 1 + 4 * 3, 8), (4, 3)
    nn.init.normal_(attention.in_proj_bias)
    close(attend_shifted(attention, x, grid), literal_shifted(attention, x, grid))
    for groups in (1, 2, 4):
        close(attend_grouped(attention, x, groups), literal_grouped(attention, x, groups))


@torch.no_grad()
def test_stfl_is_clip_with_grouped_and_then_shifted_blocks():
    visual, frames = small_clip().visual, torch.randn(3, 5, 3, 32, 16)
    visual.resize(4, 2)
    grouped, shifted = partial(literal_grouped, groups=2), partial(literal_shifted, grid=(4, 2))
    plain = literal_visual(visual, frames, *[literal_basic] * 3)
    close(stfl(visual, frames, split=(3, 0, 0), groups=2), plain)
    # A single frame: nothing to shift or to mix with.
    close(stfl(visual, frames[:, 2:3], split=(0, 1, 2), groups=1), plain[:, 2:3])
    mixed = literal_visual(visual, frames, literal_basic, grouped, shifted)
    close(stfl(visual, frames, split=(1, 1, 1), groups=2), mixed)


@torch.no_grad()
def test_a_prompt_s_twelve_positions_give_the_text_feature_of_all_77():
    clip, sentence = small_clip(), prompt_of("ViT-B-16")
    numbers = "49406 320 1125 539 320 343 343 343 343 2533 269 49407"    # CLIP's tokenizer's
    assert sentence.tolist() == list(map(int, numbers.split()))
    prompts = lsmrl.Prompts(classes=3, width=16, sentence=sentence)
    whole = clip.token_embedding(F.pad(sentence, (0, 65))).repeat(3, 1, 1)
    whole[:, 5:9] = prompts.words.normal_()
    assert torch.equal(prompts(clip.token_embedding), whole[:, :12])
    mask = torch.full((77, 77), -math.inf).triu(1)
    for row, feature in zip(whole, clip.encode_text(whole[:, :12], 11), strict=True):
        x = row + clip.positional_embedding
        for block in clip.transformer.resblocks:
            x = literal_block(block, x, lambda a, x: literal_attention(a, x, x, mask))
        close(feature, norm(clip.ln_final, x[11]) @ clip.text_projection)


def test_positions_are_resized_bilinearly_and_row_0_is_kept():
    visual = CLIP(**SMALL_CLIP | {"grid": (14, 14)}).visual
    before = visual.positional_embedding.detach().clone()    # (197, 24)
    visual.resize(18, 9)
    after = visual.positional_embedding    # (163, 24)
    assert torch.equal(after[0], before[0])
    square = before[1:].t().reshape(1, 24, 14, 14)
    close(after[1:], F.interpolate(square, (18, 9), mode="bilinear")[0].flatten(1).t())


OPENAI = """
positional_embedding 77x512 text_projection 512x512 token_embedding.weight 49408x512
logit_scale scalar ln_final.weight 512 ln_final.bias 512 visual.proj 768x512
visual.ln_pre.weight 768 visual.ln_pre.bias 768 visual.ln_post.weight 768 visual.ln_post.bias 768
visual.class_embedding 768 visual.positional_embedding 197x768 visual.conv1.weight 768x3x16x16
"""
BLOCK = """
{0}ln_1.weight {D} {0}ln_1.bias {D} {0}ln_2.weight {D} {0}ln_2.bias {D}
{0}attn.in_proj_weight {D3}x{D} {0}attn.in_proj_bias {D3}
{0}attn.out_proj.weight {D}x{D} {0}attn.out_proj.bias {D}
{0}mlp.c_fc.weight {D4}x{D} {0}mlp.c_fc.bias {D4}
{0}mlp.c_proj.weight {D}x{D4} {0}mlp.c_proj.bias {D}
"""


def test_vit_b_16_has_the_names_and_shapes_of_openai_s_file():
    text, sizes = OPENAI, CLIP_MODELS["ViT-B-16"]
    for side, D in ("visual.", 768), ("", 512):
        text += BLOCK.format(f"{side}transformer.resblocks.0.", D=D, D3=3 * D, D4=4 * D)
    words = text.split()
    tensors = CLIP(**sizes | {"depth": 1, "text_depth": 1}).state_dict()
    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in tensors.items()}
    assert shapes | {"logit_scale": "scalar"} == dict(zip(words[::2], words[1::2], strict=True))
    assert sizes["depth"] == sizes["text_depth"] == sizes["heads"] == 12 == sizes["text_heads"] + 4


@pytest.fixture
def openai(monkeypatch, tmp_path):
    """OpenAI's file, if ViT-B-16 is small: TorchScript in half precision, with an integer that is
    not a weight. No file is cached."""
    monkeypatch.setitem(CLIP_MODELS, "ViT-B-16", SMALL_CLIP)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    clip, path = small_clip(), str(tmp_path / "ViT-B-16.pt")
    clip.register_buffer("input_resolution", torch.tensor(224))
    archive = torch.jit.trace_module(clip, {"encode_image": torch.zeros(1, 3, 32, 32)})
    torch.jit.save(archive.half(), path)
    return path


def is_small_clip(clip):
    want, found = small_clip().half().float().state_dict(), clip.state_dict()
    return all(torch.equal(found.pop(name), tensor) for name, tensor in want.items()) and not found


def test_archives_and_state_dicts_load_and_misfits_are_named(openai):
    clip = load_clip("ViT-B-16", openai)
    assert is_small_clip(clip)
    assert all(p.requires_grad == ("visual." in name) for name, p in clip.named_parameters())
    tensors = clip.state_dict()
    torch.save(tensors, openai)
    assert is_small_clip(load_clip("ViT-B-16", openai))
    del tensors["visual.proj"]
    torch.save(tensors, openai)
    with pytest.raises(UserError, match="visual.proj"):
        load_clip("ViT-B-16", openai)


def test_the_download_is_checked_and_cached_or_its_failure_told(openai, monkeypatch):
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        if len(asked) == 1:
            raise OSError("no route to host")
        shutil.copyfile(openai, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match="no route to host.*--clip-weights"):
        load_clip("ViT-B-16")
    assert all(is_small_clip(load_clip("ViT-B-16")) for _ in range(2))
    _, (url, sha256) = asked
    assert len(sha256) == 64 and url.endswith(f"/clip/models/{sha256}/ViT-B-16.pt")


# --------------------------------------------------------- prompts, SD, CMI ----

def test_prompts_are_all_that_trains_of_the_text_side():
    model = small_model()
    nn.init.normal_(model.prompts.words)
    sum(losses_of(model).values()).backward()
    close(model.bank, model.text_features().detach())
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    of_images = "clip.visual.", "sd.", "cmi.", "heads."
    assert {name for name in trained if not name.startswith(of_images)} == {"prompts.words"}


@torch.no_grad()
def test_embeddings_are_a_tracklet_s_own_and_the_bank_travels_with_the_checkpoint():
    model, copy = small_model(), small_model().eval()
    losses_of(model)    # fills the bank, moves the statistics
    together = model.eval().embed(FRAMES, MODALITY)
    assert together.shape == (8, 1, 96 + 64)
    close(model.embed(FRAMES[2:3], 1 - MODALITY[2:3]), together[2:3])
    named = model.streams_of(together)
    _, z, f = model.features(FRAMES, model.bank)
    for name, x in {"z": z, "f": f}.items():
        assert torch.equal(named[name], F.normalize(x, dim=1)[:, None])
    model.prompts.words.add_(1)    # the bank is what SD used, not what the words are now
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.embed(FRAMES, MODALITY), together)


def test_sd_starts_as_the_identity_and_reads_the_bank():
    torch.manual_seed(0)
    sd = lsmrl.SD(dim=8, text_dim=6, heads=2)
    tokens, bank = torch.randn(3, 4, 8), torch.randn(5, 6)
    assert torch.equal(sd(tokens, bank), tokens)
    nn.init.normal_(sd.attn.out_proj.weight)
    text = sd.text(norm(sd.ln_text, bank))
    want = tokens[1] + literal_attention(sd.attn, norm(sd.ln, tokens[1]), text)
    close(sd(tokens, bank)[1], want)


def test_cmi_attends_over_a_tracklet_s_and_its_partner_s_frames_and_averages_its_own():
    torch.manual_seed(0)
    cmi, tokens, partner = lsmrl.CMI(dim=8, heads=2), torch.randn(8, 3, 8), [3, 2, 1, 0, 6, 7, 4, 5]
    assert partners(MODALITY, LABEL).tolist() == partner
    c = cmi(tokens, partners(MODALITY, LABEL))
    for b in range(8):
        row = torch.cat([tokens[partner[b]], tokens[b]])    # six frames of one set, in any order
        close(c[b], literal_block(cmi.block, row, literal_attention)[3:].mean(0))


@torch.no_grad()
def test_reading_shows_attention_s_shares_at_the_frame_that_each_patch_comes_from():
    model, seen = small_model(), []
    look, reads = model.reading(FRAMES)
    last = model.clip.visual.transformer.resblocks[-1].attn
    last.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    tokens, sd = model.tokens(FRAMES), model.sd
    shares = torch.stack([torch_attention(last, x)[1][0, 1:] for x in seen]).view(8, 3, 8, 1)
    close(look.view(8, 3, 8, 1), literal_roll(shares, (4, 2), -1))
    text = sd.text(norm(sd.ln_text, model.bank))
    _, shares = torch_attention(sd.attn, norm(sd.ln, tokens[5]), text)
    close(reads[5], shares.mean(0))
    assert small_model(sd=False, split=(2, 2, 0)).reading(FRAMES) == (None, None)


# ------------------------------------------------------------------- losses ----

def test_the_triplet_loss_gives_the_number_of_vld_s_code():
    """What its published TripletLoss_WRT prints."""
    x = torch.tensor([[(3 * i + 5 * j) % 7 - 3 for j in range(4)] for i in range(8)]) / 4
    assert lsmrl.weighted_triplet_loss(x, LABEL).item() == pytest.approx(0.890695, abs=2e-6)


def test_the_contrast_loss_by_hand():
    # Identities 4 and 2, visible and then infrared.
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0]])
    label, modality = torch.tensor([4, 2, 4, 2]), torch.tensor([0, 0, 1, 1])
    products = (0.6, 0), (1, 0.8), (0.6, 0.8), (1, 0)    # of positive and negative, per anchor
    terms = [math.log1p(math.exp(10 * (n - p))) for p, n in products]
    got = lsmrl.contrast_loss(x, label, modality)
    assert got.item() == pytest.approx(sum(terms) / 4, rel=1e-5)


def test_the_centre_loss_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [5.0, 5.0], [5.0, 9.0]])
    label, modality = torch.tensor([7, 7, 7, 2, 2]), torch.tensor([0, 0, 1, 0, 1])
    assert lsmrl.centre_loss(x, label, modality).item() == pytest.approx((3 ** 2 + 4 ** 2) / 2)


def test_forward_weighs_the_losses_of_z_and_f_and_c():
    model = small_model()
    losses, text = losses_of(model), model.text_features()
    tokens, z, f = model.features(FRAMES, text)
    close(z, tokens.mean(1))
    streams = {"z": z, "f": f, "cmi": model.cmi(tokens, partners(MODALITY, LABEL))}
    want = {"text": F.cross_entropy(f @ text.t(), LABEL)}
    for name, x in streams.items():
        logits = F.batch_norm(x, None, None, training=True) @ model.heads[name][1].weight.t()
        want[f"identity_{name}"] = F.cross_entropy(logits, LABEL)
        want[f"triplet_{name}"] = lsmrl.weighted_triplet_loss(x, LABEL)
    z, f, c = (F.normalize(x, dim=1) for x in streams.values())
    compared = torch.cat([z, f], dim=1) / math.sqrt(2)    # what test compares, of length 1
    want["contrast"] = lsmrl.contrast_loss(compared, LABEL, MODALITY)
    want["centre"] = lsmrl.centre_loss(compared, LABEL, MODALITY)
    want["consistency"] = (z - c).square().sum(1).mean()
    close(losses, {name: WEIGHTS.get(name, 1) * want[name] for name in losses})
    close(losses_of(small_model(), [3, 7, 0, 5, 1, 6, 2, 4]), losses)


@pytest.mark.parametrize("switch", ["none", "sd", "cmi", *WEIGHTS])
def test_a_part_or_loss_switched_off_is_gone_and_all_else_trains_once(switch):
    model = small_model(**{} if switch == "none" else {switch: 0}, boost=5.0)
    losses = losses_of(model)
    gone = {"identity_cmi", "triplet_cmi", "consistency"} if switch == "cmi" else {switch}
    assert losses.keys() == LOSSES - gone
    sum(losses.values()).backward()
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in names)
    slow, fast = model.parameter_groups()
    assert (slow["factor"], fast["factor"]) == (1, 5.0)
    assert set(slow["params"]) ^ set(fast["params"]) == names.keys()
    boosted = re.compile(r".*bias|prompts\.words|heads\.\w+\.1\.weight")
    assert set(fast["params"]) == {p for p, name in names.items() if boosted.fullmatch(name)}


def test_consistency_pulls_z_and_gives_cmi_no_gradient():
    model = small_model()
    losses_of(model)["consistency"].backward()
    pulled = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert "clip" in pulled and not pulled & {"cmi", "heads"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_losses_are_float32_and_near_those_of_float32(dtype):
    model = small_model()
    with torch.autocast("cpu", dtype):
        losses = losses_of(model)
        assert model.eval().embed(FRAMES, MODALITY).dtype == torch.float32
    torch.testing.assert_close(losses, losses_of(small_model()), rtol=0.1, atol=0.02)


class Mine(LSMRL):
    """What a student may write: the maximum over time, and another loss of that name."""

    def pool(self, tokens):
        return tokens.amax(1)

    def losses_of(self, streams, text, label, modality):
        losses = super().losses_of(streams, text, label, modality)
        return losses | {"centre": 3 * lsmrl.centre_loss(streams["z"], label, modality)}


def test_a_subclass_replaces_one_loss_and_the_pooling():
    model = small_model(Mine)
    losses = losses_of(model)
    tokens, z, _ = model.features(FRAMES, model.text_features())
    assert torch.equal(z, tokens.amax(1))
    close(losses["centre"], 3 * lsmrl.centre_loss(z, LABEL, MODALITY))
    close(losses["triplet_z"], lsmrl.weighted_triplet_loss(z, LABEL))


def test_the_recipe_s_values_are_the_specification_s():
    asked = read_command_line(["--method", "lsmrl", "--preset", "paper"])
    options = {"boost": 25.0, "clip": "ViT-B-16", "split": (8, 2, 2), "groups": 6, "sd": True,
               "cmi": True, **WEIGHTS}
    config = {"size": (288, 144), "optimizer": "AdamW", "lr": 2.5e-5, "weight_decay": 1e-4,
              "warmup_epochs": 3, "cosine": True, "epochs": 24, "steps": 200, "identities": 4,
              "tracklets": 4, "frames": 6}
    assert {name: getattr(asked.options, name) for name in options} == options
    assert {name: getattr(asked.config, name) for name in config} == config


@pytest.mark.parametrize("changes, size", [
    ({"clip": "RN50"}, SIZE), ({}, (60, 32)), ({"split": (1, 1, 1)}, SIZE), ({"groups": 3}, SIZE)])
def test_choices_that_cannot_work_are_refused(changes, size):
    with pytest.raises(UserError, match="expected"):
        LSMRL(replace(SMALL, **changes), 4, size)
