"""What train.py and evaluate.py need from a method: the whole contract, with its defaults.

A method is a subclass. It must have `Options`, `embed` and `forward`, and may override the rest:
see docs/method.md."""
from torch import nn


class Method(nn.Module):
    """A method is made by CLASS(options, classes, size, pretrained).
    options: an instance of its Options; classes: number of training identities; size: height and
    width of the frames; pretrained: False where a checkpoint will fill the trained tensors."""
    Options = None      # a dataclass: each field is an option of the command line
    recipe = {}         # {option of train.Config: the default that this method wants}
    small = {}          # {option of either: what `--preset small` sets}
    sampler = None      # None: data.IdentitySampler
    augment = None      # None: data.augment; as a class attribute: staticmethod(my_augment)
    frozen = ()         # names of submodules that are not trained: checkpoints leave them out
    whole_batch = ()    # names of submodules that are given the gathered batch of all processes
    of_identities = ()  # beginnings of names of what belongs to the training identities
    sasgl = None        # the SASGL whose silhouettes are drawn and measured
    warm_up_steps = 0   # steps that train warm_up_module alone, before the rest uses it
    warm_up_module = ""    # its name
    warm_up_lr = 1e-2   # the rate falls from here to 0

    @property
    def device(self):
        return next(self.parameters()).device

    def embed(self, frames, modality):
        """Normalised frames (B, T, 3, H, W), modality (B,), 0 visible, 1 infrared -> embeddings
        (B, parts, dim). Parts of fewer numbers are padded with zeros: distances stay the same."""
        raise NotImplementedError

    def forward(self, frames, modality, label):
        """A training step -> named losses, already weighted (their sum is the loss), and other
        named numbers to show."""
        raise NotImplementedError

    def warm_up_losses(self, frames):
        """Frames (B, T, 3, H, W) -> named losses of warm_up_module."""
        raise NotImplementedError

    def parameter_groups(self):
        """-> groups for the optimizer, each with its factor on the learning rate."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "factor": 1}]

    def streams_of(self, embeddings):
        """What embed gives for N tracklets -> {stream: (N, parts, dim)}, each ranked alone too."""
        return {}

    def seen(self, frames):
        """For pictures: normalised frames (B, T, 3, H, W) -> {name: what the method makes of the
        B * T frames, (N, h, w) or (N, 3, h, w) in 0..1, or codes (N, C, h, w)}, and words below the
        pictures of each tracklet, a list of lists, or []."""
        return {}, []
