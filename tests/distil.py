"""How assets/tiny_dinov2.pt was made: distillation (Hinton et al., 2015).

    python walkers.py runs/prior --seed 77 --train-identities 300 --tracklets 1 --cameras 99
    python -m tests.distil --data runs/prior/Train --dinov2-weights FILE

A small network, the student, learns to reproduce the tokens of a large one, the teacher. Both see
the frames (N,3,128,64), enlarged to 336x168:

    clean frames -> teacher, 12 blocks of 384 -> tokens after each quarter of the blocks
                      -> layer norm -> 48 principal components (most of the variance) -----+
    half of them spoiled -> student, 4 blocks of 32 -> a linear map for each of 4 levels --+-> loss

The target stays that of the clean frame, so features become similar by day and by night.
"""
from support.dinov2 import DINOV2, TINY, DinoVisionTransformer, levels_of, load_dinov2
from support.footage import read_frame
from support.options import Parser, cli, progress
from support.priors import FRAME, MEAN, STD, cropped, fit, frames_of, write

import torch
import torch.nn.functional as F
from torch import nn, optim

COMPONENTS = 48    # principal components of a level


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
    fit(optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps), args.steps,
        loss_of_step)
    with torch.no_grad():
        shares = 1 - unexplained(student(frames[:held_out]), target[:, :held_out], variance)
    words = " ".join(f"{share:.2f}" for share in shares)
    return vit.state_dict(), f"variance explained on other frames, by level: {words}"


def main():
    parser = Parser(description="Make the tiny DINOv2 of the offline demo.")
    option = parser.add_argument
    option("--data", required=True, help="folder of frames")
    option("--out", default="tiny.pt", help="the file to write (tiny.pt)")
    option("--steps", type=int, default=12000, help="(12000)")
    option("--dinov2-weights", default="", help="file of the teacher's tensors (downloaded)")
    option("--frames", type=int, default=4800, help="to train on; 5 %% more are held out (4800)")
    option("--dino-size", type=int, nargs=2, default=(336, 168), help="multiples of 14 (336 168)")
    args = parser.parse_args()
    torch.manual_seed(1)
    write(args.out, *make_dinov2(args, torch.Generator().manual_seed(1)))


if __name__ == "__main__":
    cli(main)
