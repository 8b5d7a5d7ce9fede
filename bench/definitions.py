"""Small networks after published definitions, for kinds of networks that no package offers.

Restoration, signals, and several inputs. Widths are small, the structure is the paper's; each class
names its source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class ResidualBlock(nn.Module):
    """Two convolutions and a skip connection; with norms as in SRResNet, without as in EDSR."""

    def __init__(self, width: int, *, has_norm: bool, scale: float = 1.0) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if has_norm else nn.Identity
        activation = nn.PReLU() if has_norm else nn.ReLU()
        self.body = nn.Sequential(
            _conv(width, width), norm(width), activation, _conv(width, width), norm(width)
        )
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` and what the convolutions add to it."""
        output: Tensor = x + self.scale * self.body(x)
        return output


class EDSR(nn.Module):
    """Super-resolution with residual blocks without norms (Lim et al. 2017, arXiv:1707.02921)."""

    mean: Tensor

    def __init__(self, width: int = 32, blocks: int = 4, scale: int = 2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
        self.head = _conv(3, width)
        self.body = nn.Sequential(
            *(ResidualBlock(width, has_norm=False, scale=0.1) for _ in range(blocks)),
            _conv(width, width),
        )
        self.tail = nn.Sequential(
            _conv(width, width * scale**2), nn.PixelShuffle(scale), _conv(width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return images of twice the height and width."""
        x = self.head(x - self.mean)
        output: Tensor = self.tail(x + self.body(x)) + self.mean
        return output


class SRResNet(nn.Module):
    """The generator of SRGAN (Ledig et al. 2017, arXiv:1609.04802)."""

    def __init__(self, width: int = 32, blocks: int = 4, doublings: int = 2) -> None:
        super().__init__()
        self.head = nn.Sequential(_conv(3, width, 9), nn.PReLU())
        self.body = nn.Sequential(
            *(ResidualBlock(width, has_norm=True) for _ in range(blocks)),
            _conv(width, width),
            nn.BatchNorm2d(width),
        )
        upsampling: list[nn.Module] = []
        for _ in range(doublings):
            upsampling += [_conv(width, 4 * width), nn.PixelShuffle(2), nn.PReLU()]
        self.tail = nn.Sequential(*upsampling, _conv(width, 3, 9))

    def forward(self, x: Tensor) -> Tensor:
        """Return images of four times the height and width."""
        x = self.head(x)
        output: Tensor = self.tail(x + self.body(x))
        return output


class ESPCN(nn.Sequential):
    """Sub-pixel convolution (Shi et al. 2016, arXiv:1609.05158)."""

    def __init__(self, scale: int = 3) -> None:
        super().__init__(
            _conv(1, 64, 5),
            nn.Tanh(),
            _conv(64, 32),
            nn.Tanh(),
            _conv(32, scale**2),
            nn.PixelShuffle(scale),
        )


class M5(nn.Module):
    """Keywords from the waveform (Dai et al. 2017, arXiv:1610.00087)."""

    def __init__(self, classes: int = 12, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = ((1, width, 80, 16), (width, width, 3, 1), (width, 2 * width, 3, 1))
        for inputs, outputs, kernel, stride in (*sizes, (2 * width, 2 * width, 3, 1)):
            layers += [nn.Conv1d(inputs, outputs, kernel, stride), nn.BatchNorm1d(outputs)]
            layers += [nn.ReLU(), nn.MaxPool1d(4)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return log probabilities."""
        x = self.features(x)
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.classifier(x), dim=2).squeeze(1)


class TemporalBlock(nn.Module):
    """Two convolutions over time beside a skip connection (TC-ResNet)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 9, stride, 4, bias=False)
        self.first_norm = nn.BatchNorm1d(outputs)
        self.second = nn.Conv1d(outputs, outputs, 9, 1, 4, bias=False)
        self.second_norm = nn.BatchNorm1d(outputs)
        self.shortcut = nn.Sequential(
            nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[signal, channel, time]`."""
        out = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(out)) + self.shortcut(x))


class TCResNet8(nn.Module):
    """Keywords from MFCCs as channels (Choi et al. 2019, arXiv:1904.03814)."""

    def __init__(self, coefficients: int = 40, classes: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv1d(coefficients, 16, 3, 1, 1, bias=False)
        widths = (16, 24, 32, 48)
        self.blocks = nn.Sequential(
            *(TemporalBlock(a, b, 2) for a, b in itertools.pairwise(widths))
        )
        self.classifier = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean(-1))
        return logits


class SubSpectralNorm(nn.Module):
    """Batch norm for each band of frequencies (Chang et al. 2021, arXiv:2103.13620)."""

    def __init__(self, channels: int, bands: int) -> None:
        super().__init__()
        self.bands = bands
        self.norm = nn.BatchNorm2d(channels * bands)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[signal, channel, frequency, time]`."""
        signals, channels, frequencies, times = x.shape
        x = x.view(signals, channels * self.bands, frequencies // self.bands, times)
        normed: Tensor = self.norm(x).view(signals, channels, frequencies, times)
        return normed


class BroadcastedBlock(nn.Module):
    """A 2-D part over frequencies and a 1-D part over time, broadcast and added (BC-ResNet)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.widen = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )
            if inputs != outputs
            else None
        )
        self.frequencies = nn.Conv2d(
            outputs, outputs, (3, 1), (stride, 1), (1, 0), groups=outputs, bias=False
        )
        self.norm = SubSpectralNorm(outputs, 5)
        self.times = nn.Sequential(
            nn.Conv2d(
                outputs,
                outputs,
                (1, 3),
                padding=(0, dilation),
                dilation=(1, dilation),
                groups=outputs,
                bias=False,
            ),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 1),
            nn.Dropout2d(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[signal, channel, frequency, time]`."""
        out = x if self.widen is None else self.widen(x)
        frequencies = self.norm(self.frequencies(out))
        out = self.times(frequencies.mean(2, keepdim=True)) + frequencies
        return F.relu(out if self.widen is not None else out + x)


class BCResNet(nn.Module):
    """Broadcasted residual learning for keywords (Kim et al. 2021, arXiv:2106.04140)."""

    def __init__(self, width: int = 8, classes: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 2 * width, 5, (2, 1), 2, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            BroadcastedBlock(2 * width, width),
            BroadcastedBlock(width, width),
            BroadcastedBlock(width, 3 * width // 2, stride=2, dilation=2),
            BroadcastedBlock(3 * width // 2, 3 * width // 2, dilation=2),
            BroadcastedBlock(3 * width // 2, 2 * width, stride=2, dilation=4),
            BroadcastedBlock(2 * width, 5 * width // 2, dilation=8),
        )
        last = 5 * width // 2
        self.head = nn.Sequential(
            nn.Conv2d(last, last, 5, padding=(0, 2), groups=last, bias=False),
            nn.Conv2d(last, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(4 * width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.head(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)
        return logits


class SignalBlock(nn.Module):
    """A block before activation, with pooling beside it (Hannun et al. 2019)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm1d(inputs),
            nn.ReLU(),
            nn.Conv1d(inputs, outputs, 15, stride, 7),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv1d(outputs, outputs, 15, 1, 7),
        )
        self.shortcut = nn.MaxPool1d(stride) if stride > 1 else nn.Identity()
        self.added = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return `[signal, channel, time]`; new channels of the skip connection are zeros."""
        skip = F.pad(self.shortcut(x), (0, 0, 0, self.added))
        output: Tensor = self.body(x) + skip
        return output


class ResNet1D(nn.Module):
    """Heart rhythms from one lead (Hannun et al. 2019, doi:10.1038/s41591-018-0268-3)."""

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 15, padding=7)
        self.blocks = nn.Sequential(
            SignalBlock(width, width, 2),
            SignalBlock(width, width, 1),
            SignalBlock(width, 2 * width, 2),
            SignalBlock(2 * width, 2 * width, 2),
        )
        self.norm = nn.BatchNorm1d(2 * width)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.classifier(x.mean(-1))
        return logits


class WaveNet(nn.Module):
    """Gated dilated causal convolutions (van den Oord et al. 2016, arXiv:1609.03499)."""

    def __init__(self, width: int = 16, skips: int = 32, layers: int = 6, levels: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 2, dilation=2**layer) for layer in range(layers)
        )
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skip = nn.ModuleList(nn.Conv1d(width, skips, 1) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv1d(skips, skips, 1), nn.ReLU(), nn.Conv1d(skips, levels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each sample's level, `[signal, level, time]`."""
        x = self.stem(x)
        total: Tensor | None = None
        for conv, residual, skip in zip(self.gated, self.residual, self.skip, strict=True):
            assert isinstance(conv, nn.Conv1d)
            values, gates = conv(F.pad(x, (conv.dilation[0], 0))).chunk(2, dim=1)
            out = torch.tanh(values) * torch.sigmoid(gates)
            skipped = skip(out)
            total = skipped if total is None else total + skipped
            x = x + residual(out)
        logits: Tensor = self.head(total)
        return logits


def _stages(widths: Sequence[int], inputs: int = 3) -> nn.Sequential:
    """Return convolutions that halve the image each."""
    stages: list[nn.Module] = []
    for before, width in zip((inputs, *widths), widths, strict=False):
        stages += [_conv(before, width, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stages)


class Siamese(nn.Module):
    """One encoder for two images, whose embeddings are compared (Koch et al. 2015)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = _stages((width, 2 * width, 4 * width))
        self.embedding = nn.Linear(4 * width, 64)
        self.head = nn.Linear(64, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the logit of "the same", `[pair, 1]`."""
        embeddings = [
            torch.sigmoid(self.embedding(self.encoder(image).mean((2, 3))))
            for image in (one, other)
        ]
        logit: Tensor = self.head((embeddings[0] - embeddings[1]).abs())
        return logit


class FlowNetC(nn.Module):
    """Optical flow from a correlation of features (Dosovitskiy et al. 2015, arXiv:1504.06852)."""

    def __init__(self, width: int = 16, reach: int = 2) -> None:
        super().__init__()
        self.encoder = _stages((width, 2 * width))
        self.redirect = _conv(2 * width, 8, 1)
        self.reach = reach
        self.after = nn.Sequential(_conv(8 + (2 * reach + 1) ** 2, 2 * width), nn.LeakyReLU(0.1))
        self.down = nn.Sequential(_conv(2 * width, 4 * width, stride=2), nn.LeakyReLU(0.1))
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1)
        self.flow = _conv(4 * width, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the flow in pixels at a quarter of the size, `[pair, 2, height, width]`."""
        one, other = self.encoder(one), self.encoder(other)
        height, width = other.shape[-2:]
        shifted = F.pad(other, 4 * [self.reach])
        steps = range(2 * self.reach + 1)
        correlation = torch.stack(
            [
                (one * shifted[:, :, y : y + height, x : x + width]).mean(1)
                for y in steps
                for x in steps
            ],
            dim=1,
        )
        x = self.after(torch.cat([self.redirect(one), F.leaky_relu(correlation, 0.1)], dim=1))
        flow: Tensor = self.flow(torch.cat([x, F.leaky_relu(self.up(self.down(x)), 0.1)], dim=1))
        return flow


class FCSiamDiff(nn.Module):
    """Change detection: skips hold differences (Daudt et al. 2018, arXiv:1810.08462)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                _conv(before, after), nn.BatchNorm2d(after), nn.ReLU(), _conv(after, after)
            )
            for before, after in zip((3, *widths), widths, strict=False)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(after, after, 2, 2) for after in reversed(widths)
        )
        self.decoders = nn.ModuleList(
            nn.Sequential(_conv(2 * before, after), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in ((4 * width, 2 * width), (2 * width, width), (width, width))
        )
        self.head = _conv(width, 2, 1)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the logits of "unchanged" and "changed", `[pair, 2, height, width]`."""
        differences: list[Tensor] = []
        for stage in self.stages:
            before, after = stage(before), stage(after)
            differences.append((before - after).abs())
            before, after = F.max_pool2d(before, 2), F.max_pool2d(after, 2)
        x = after
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([up(x), differences.pop()], dim=1))
        logits: Tensor = self.head(x)
        return logits


class ImageAndVector(nn.Module):
    """An image and a table's row; the row also scales channels (FiLM, arXiv:1709.07871)."""

    def __init__(self, values: int = 10, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        self.encoder = _stages((width, 2 * width, 4 * width))
        self.vector = nn.Sequential(nn.Linear(values, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.film = nn.Linear(32, 8 * width)
        self.head = nn.Sequential(nn.Linear(4 * width + 32, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        """Return logits."""
        maps, row = self.encoder(image), self.vector(vector)
        scale, shift = self.film(row)[:, :, None, None].chunk(2, dim=1)
        maps = F.relu(maps * (1 + scale) + shift)
        logits: Tensor = self.head(torch.cat([maps.mean((2, 3)), row], dim=1))
        return logits


class ChangeUnet(nn.Module):
    """Change detection with the encoder and decoder of a package's U-Net, for two images."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Return `[pair, class, height, width]`."""
        pairs = zip(self.unet.encoder(before), self.unet.encoder(after), strict=True)  # type: ignore[operator]
        features = [(one - other).abs() for one, other in pairs]
        maps: Tensor = self.unet.segmentation_head(self.unet.decoder(features))  # type: ignore[operator]
        return maps
