"""The two small priors of the offline demo: networks that a laptop can train and run.

    python walkers.py runs/prior --seed 77 --train-identities 300 --tracklets 1 --cameras 99
    python -m support.priors dinov2 --data runs/prior/Train --dinov2-weights FILE

    python walkers.py runs/people --seed 78 --train-identities 3600 --tracklets 1 --cameras 99
    python -m support.priors clip --data runs/people

**dinov2: distillation** (Hinton et al., 2015). A small network, the student, learns to reproduce
the tokens of a large one, the teacher. Both see the frames (N,3,128,64), enlarged to 336x168:

    clean frames -> teacher, 12 blocks of 384 -> tokens after each quarter of the blocks
                      -> layer norm -> 48 principal components (most of the variance) -----+
    half of them spoiled -> student, 4 blocks of 32 -> a linear map for each of 4 levels --+-> loss

The target stays that of the clean frame, so features become similar by day and by night.

**clip: contrastive language-image training** (Radford et al., 2021). In a step with P people:

    visible frames (P,3,128,64) -> image side -> image (P,64) --+-> a table (P,P) of cosines,
    sentences (P,L) -------------> text side  -> text  (P,64) --+   rows and columns

The cosine on the diagonal must be the largest of its row and of its column. As with the real CLIP,
all pictures are colour photographs of the day: nothing prepares it for the night.
"""
import os

from support import clip, footage
from support.dinov2 import DINOV2, TINY, DinoVisionTransformer, levels_of, load_dinov2
from support.files import UserError, read_json, write_atomic
from support.footage import find_footage, read_frame, read_frames
from support.options import Parser, cli, progress
from support.pictures import evenly

import torch
import torch.nn.functional as F
from torch import nn, optim

FRAME = (128, 64)    # size of the frames
COMPONENTS = 48    # principal components of a level (dinov2)
EACH = 12    # frames of a person in each modality (clip)
HELD_OUT = 120    # people to measure with (clip)
MEAN = footage.MEAN[:, None, None]    # ImageNet's
STD = footage.STD[:, None, None]

# ---------------------------------------------------------------- frames ----

def frames_of(path, number):
    """-> the paths of `number` frames of a folder, evenly taken. Raises UserError."""
    paths = [frame for frames in find_footage(path).values() for frame in frames]
    if len(paths) < number:
        raise UserError(f"{len(paths)} frames under {path}; expected {number}: lower --frames")
    return evenly(paths, number)


def cropped(frames, generator):
    """uint8 frames (3, H, W) of size FRAME -> a random piece of each, resized, (N, 3, H, W) in
    0..1: a detector's boxes vary."""
    pieces, (H, W) = [], FRAME
    for frame in frames:
        down, across, tall, wide = torch.rand(4, generator=generator).tolist()
        rows, columns = round(H * (0.85 + 0.15 * tall)), round(W * (0.85 + 0.15 * wide))
        top, left = round(down * (H - rows)), round(across * (W - columns))
        piece = frame[None, :, top:top + rows, left:left + columns] / 255
        pieces.append(F.interpolate(piece, FRAME, mode="bilinear"))
    return torch.cat(pieces)


def spoiled(frames, generator):
    """Frames (N, 3, H, W) in 0..1 -> each as another random camera might show it."""
    N = len(frames)

    def drawn(low, high):
        return low + (high - low) * torch.rand(N, 1, 1, 1, generator=generator)

    def for_a_share(share, changed):
        return torch.where(drawn(0, 1) < share, changed, frames)

    channel = torch.randint(3, (N,), generator=generator)
    frames = for_a_share(0.4, frames[torch.arange(N), channel][:, None])
    frames = for_a_share(0.1, 1 - frames)
    frames = (frames - 0.5) * drawn(0.7, 1.3) + 0.5 + drawn(-0.1, 0.1)
    frames = for_a_share(0.3, F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False))
    noise = torch.randn(frames.shape, generator=generator) * drawn(0, 0.03)
    return (frames + noise).clamp(0, 1)


def photographed(frames, generator):
    """Frames (N, 3, H, W) in 0..1 -> each as another photograph of that day: mirrored or not, other
    light and colours, blurred or not, a box in front of the person. Always in colour."""
    N, _, H, W = frames.shape

    def drawn(low, high, channels=1):
        return low + (high - low) * torch.rand(N, channels, 1, 1, generator=generator)

    frames = torch.where(drawn(0, 1) < 0.5, frames.flip(3), frames)
    frames = frames * drawn(0.8, 1.2, 3)    # colours
    frames = (frames - 0.5) * drawn(0.7, 1.3) + 0.5 + drawn(-0.1, 0.1)    # contrast, brightness
    blurred = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False)
    frames = torch.where(drawn(0, 1) < 0.3, blurred, frames)
    down = (torch.linspace(0, 1, H)[:, None] - drawn(0, 1)).abs() < drawn(0, 0.15)
    across = (torch.linspace(0, 1, W) - drawn(0, 1)).abs() < drawn(0, 0.3)
    return torch.where(down & across, drawn(0, 1, 3), frames).clamp(0, 1)


def fit(optimizer, schedule, steps, loss_of_step):
    """Take so many steps along the gradient of the loss that loss_of_step() returns."""
    bar = progress(range(steps), "training")
    for _ in bar:
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")


# ---------------------------------------------------------- distillation ----

def levels(dinov2, frames, size):
    """Frames (N, 3, H, W) in 0..1, enlarged to size -> the tokens that SASGL reads, (4, N, L, D):
    after 1/4, 2/4, 3/4 and all of the blocks, each layer-normalised."""
    enlarged = F.interpolate((frames - MEAN) / STD, size, mode="bilinear")
    *layers, last = dinov2.get_intermediate_layers(enlarged, levels_of(dinov2), norm=False)
    layers = [F.layer_norm(tokens, tokens.shape[2:]) for tokens in layers]
    return torch.stack([*layers, dinov2.norm(last)])


@torch.no_grad()
def targets_of(teacher, frames, size):
    """-> the student's targets (4, N, L, COMPONENTS), the teacher's tokens along the axes in which
    they vary most, in half precision; and the variance along these (4,)."""
    # A sixteenth of the frames is enough for the axes.
    sample = torch.cat([levels(teacher, some, size) for some in frames[::16].split(16)], 1)
    sample = sample.flatten(1, 2)    # (4, M, D)
    mean = sample.mean(1, keepdim=True)
    sample -= mean
    values, axes = torch.linalg.eigh(sample.mT @ sample / sample.shape[1])    # ascending
    axes = axes[:, None, :, -COMPONENTS:]
    targets = [((levels(teacher, batch, size) - mean[:, None]) @ axes).half()
               for batch in progress(frames.split(16), "teacher")]
    return torch.cat(targets, 1), values[:, -COMPONENTS:].sum(1)


def unexplained(output, target, variance):
    """-> (4,): the share of each level's variance that the student does not explain."""
    return (output - target).square().sum(-1).mean((1, 2)) / variance


def make_dinov2(args, generator):
    """-> the student's tensors, and a line about its quality on frames that it has not seen."""
    steps = args.steps or 12000
    held_out = max(16, args.frames // 20)
    teacher = load_dinov2("dinov2_vits14", args.dinov2_weights)
    paths = progress(frames_of(args.data, args.frames + held_out), "reading")
    frames = cropped((read_frame(path, FRAME) for path in paths), generator)
    frames = frames[torch.randperm(len(frames), generator=generator)]
    target, variance = targets_of(teacher, frames, args.dino_size)
    # The student: the tiny ViT, and for each level a linear map to the teacher's components.
    vit = DinoVisionTransformer(*DINOV2[TINY])
    maps = nn.ModuleList(nn.Linear(vit.embed_dim, COMPONENTS) for _ in range(4))

    def student(frames):
        """Frames (N, 3, H, W) in 0..1 -> (4, N, L, COMPONENTS)."""
        tokens = levels(vit, frames, args.dino_size)
        return torch.stack([linear(t) for linear, t in zip(maps, tokens, strict=True)])

    def loss_of_step():
        # A spoiled frame's target stays that of the clean one.
        index = torch.randint(args.frames, (16,), generator=generator) + held_out
        is_spoiled = torch.rand(16, 1, 1, 1, generator=generator) < 0.5
        views = torch.where(is_spoiled, spoiled(frames[index], generator), frames[index])
        return unexplained(student(views), target[:, index], variance).mean()

    optimizer = optim.AdamW([*vit.parameters(), *maps.parameters()], 3e-3)
    fit(optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), steps, loss_of_step)
    with torch.no_grad():
        shares = 1 - unexplained(student(frames[:held_out]), target[:, :held_out], variance)
    words = " ".join(f"{share:.2f}" for share in shares)
    return vit.state_dict(), f"variance explained on other frames, by level: {words}"


# ----------------------------------------------------- language and image ----

def load_people(path):
    """A folder of walkers -> frames of N people by day and by night, uint8 (N, 2, EACH, 3, H, W),
    their sentences' words (N, L), and the index of the end token (N,). Raises UserError."""
    sentences = read_json(f"{path}/sentences.json")
    pids = sorted(os.listdir(f"{path}/Train"))
    paths = [frame for pid in pids for modality in ("rgb", "ir")
             for frame in frames_of(f"{path}/Train/{pid}/{modality}", EACH)]
    frames = read_frames(progress(paths, "reading"), FRAME).view(-1, 2, EACH, 3, *FRAME)
    return frames, *clip.tokenized([sentences[str(int(pid))] for pid in pids])


def image_features(model, frames):
    """Frames (N, 3, H, W) in 0..1 -> (N, dim), of length 1."""
    return F.normalize(model.encode_image((frames - MEAN) / STD), dim=1)


def text_features(model, words, end):
    """words (N, L), end (N,) -> (N, dim), of length 1."""
    return F.normalize(model.encode_text(model.token_embedding(words), end), dim=1)


def contrastive_loss(a, b, scale):
    """a, b (N, dim) of length 1, scale: 1 / temperature -> scalar. Cross-entropy: which b belongs
    to each a, and which a to each b?"""
    table = scale * a @ b.t()
    own = torch.arange(len(table))
    return (F.cross_entropy(table, own) + F.cross_entropy(table.t(), own)) / 2


def make_clip(args, generator):
    """-> CLIP's tensors, and a line about its quality on people that it has not seen."""
    people, words, end = load_people(args.data)
    steps = args.steps or 8000
    held_out = min(HELD_OUT, len(people) // 2)
    model = clip.CLIP(**clip.TINY_SIZES)

    def loss_of_step():
        chosen = torch.randperm(len(people) - held_out, generator=generator)[:64] + held_out
        which = torch.randint(EACH, chosen.shape, generator=generator)
        frames = photographed(cropped(people[chosen, 0, which], generator), generator)
        return contrastive_loss(
            image_features(model, frames), text_features(model, words[chosen], end[chosen]),
            model.logit_scale.exp().clamp(max=100))

    optimizer = optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    # The learning rate rises for a tenth of the steps, then falls along a cosine.
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    fit(optimizer, schedule, steps, loss_of_step)
    # By night too, though it has learned from daytime frames alone.
    with torch.no_grad():
        text = text_features(model, words[:held_out], end[:held_out])
        image = image_features(model, people[:held_out, :, 0].flatten(0, 1) / 255)
        nearest = (image @ text.t()).argmax(1).view(held_out, 2)
        day, night = (nearest == torch.arange(held_out)[:, None]).float().mean(0)
    return model.state_dict(), (f"of {held_out} other people, the own sentence is the nearest for "
                                f"{day:.0%} by day, {night:.0%} by night")


def main():
    parser = Parser(description="Make the small priors of the offline demo.")
    option = parser.add_argument
    option("prior", choices=["dinov2", "clip"])
    option("--data", required=True, help="folder of frames (dinov2) or of walkers (clip)")
    option("--out", default="tiny.pt", help="the file to write (tiny.pt)")
    option("--steps", type=int, default=0, help="(dinov2: 12000, clip: 8000)")
    option("--dinov2-weights", default="", help="file of the teacher's tensors (downloaded)")
    option("--frames", type=int, default=4800, help="to train on; 5 %% more are held out (4800)")
    option("--dino-size", type=int, nargs=2, default=(336, 168), help="multiples of 14 (336 168)")
    args = parser.parse_args()
    torch.manual_seed(1)
    make = make_dinov2 if args.prior == "dinov2" else make_clip
    tensors, words = make(args, torch.Generator().manual_seed(1))
    tensors = {name: tensor.half() for name, tensor in tensors.items()}
    write_atomic(args.out, lambda file: torch.save(tensors, file))
    print(f"{args.out}: {words}")


if __name__ == "__main__":
    cli(main)
