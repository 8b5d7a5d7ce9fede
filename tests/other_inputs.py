"""Networks that take something else than one picture: signals, volumes, clips, several inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Features = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def _head(dims: int, width: int) -> list[nn.Module]:
    pools = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    return [nn.ReLU(), pools[dims - 1](1), nn.Flatten(), nn.Linear(width, 4)]


class LogMel(nn.Module):
    """Keyword spotting on raw sound `[image, sample]`: its log spectrogram, then a 1-D network."""

    def __init__(self) -> None:
        super().__init__()
        self.window: Tensor
        self.mel: Tensor
        self.register_buffer("window", torch.hann_window(32))
        self.register_buffer("mel", torch.rand(17, 12, generator=torch.Generator().manual_seed(0)))
        self.body = nn.Sequential(
            nn.Conv1d(12, 32, 3, padding=1),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 32, 3, groups=32),
            nn.Conv1d(32, 32, 3),
            *_head(1, 32),
        )

    def forward(self, sound: Tensor) -> Tensor:
        frames = sound.unfold(1, 32, 16) * self.window  # [image, frame, sample]
        count = torch.arange(17)[:, None] * torch.arange(32) * (2 * torch.pi / 32)
        power = (frames @ count.cos().T).square() + (frames @ count.sin().T).square()
        logits: Tensor = self.body((power @ self.mel + 1e-6).log().transpose(1, 2))
        return logits


class Clips(nn.Module):
    """Clips `[image, time, channel, height, width]`: features of each frame, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3))
        self.head = nn.Sequential(*_head(2, 16)[:-1])
        self.linear = nn.Linear(16, 4)

    def forward(self, clips: Tensor) -> Tensor:
        features = self.head(self.body(clips.flatten(0, 1)))
        logits: Tensor = self.linear(features.unflatten(0, clips.shape[:2]).mean(1))
        return logits


class Siamese(nn.Module):
    """Two pictures of the same size."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)]
        self.body = nn.Sequential(*layers, *_head(2, 16))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        difference: Tensor = self.body(before) - self.body(after)
        return difference


class WithFeatures(nn.Module):
    """A picture and a vector of features beside it; returns the scores and what they come from."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)]
        self.body = nn.Sequential(*layers, *_head(2, 16)[:-1])
        self.beside = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        self.head = nn.Linear(24, 4)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.body(image), self.beside(features)], 1))
        return logits


def signals() -> nn.Module:
    """Return a network for signals of two channels."""
    layers = [nn.Conv1d(2, 16, 9, padding=4), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 5)]
    return nn.Sequential(*layers, *_head(1, 16))


def volumes() -> nn.Module:
    """Return a network for volumes of one channel."""
    layers = [nn.Conv3d(1, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, 3)]
    return nn.Sequential(*layers, *_head(3, 16))


def flat_pictures() -> nn.Module:
    """Return a network for pictures of two rows."""
    layers = [nn.Conv2d(1, 16, (1, 9)), nn.ReLU(), nn.Conv2d(16, 16, (2, 1))]
    return nn.Sequential(*layers, *_head(2, 16))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "signals": (signals, ((2, 50),)),
    "sound": (LogMel, ((320,),)),
    "volumes": (volumes, ((1, 8, 8, 8),)),
    "clips": (Clips, ((3, 3, 10, 10),)),
    "two rows": (flat_pictures, ((1, 2, 24),)),
    "two pictures": (Siamese, ((3, 12, 12), (3, 12, 12))),
    "features": (WithFeatures, ((3, 12, 12), (5,))),
}
"""Name -> a function that builds the network, and the shape of each input."""


def make(name: str) -> nn.Module:
    """Return the network of a case with random weights and norm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CASES[name][0]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                assert module.running_mean is not None
                module.running_mean.normal_()
    return model.eval()


def inputs(name: str, count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random inputs of a case, `count` of each."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *shape, generator=generator) for shape in CASES[name][1])
