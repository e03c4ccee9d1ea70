"""What judges waveforms while the vocoder trains, and is then thrown away: distances of spectra, and discriminators.

Shape letters: B rows, N samples, T frames of a transform, F its frequency bins, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

#: Added to magnitudes before the logarithm, as a share of full scale per bin: about -70 dB.
FLOOR = 3e-4
PERIODS = (2, 3, 5, 7, 11)
RESOLUTIONS = (2048, 1024, 512)
SLOPE = 0.1


class LogSpectra(nn.Module):
    """Logarithms of magnitudes at several resolutions, by frequency bin and by mel bin.

    The distance of two waveforms is the mean absolute difference of these. Between random waveforms, twice their distance less
    that among the ones and less that among the others is smallest, in expectation, where they are alike in distribution (an
    energy distance; Gritsenko et al. 2020, arXiv 2008.01160): noise must be as noisy as the target's, not its mean.
    """

    def __init__(self, sample_rate: int, sizes: Sequence[int] = (2048, 1024, 512, 256)) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        for size in self.sizes:
            filters_FM = AF.melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, size // 16, sample_rate, None, "htk")
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
            self.register_buffer(f"filters_{size}", filters_FM / filters_FM.sum(0).clamp(min=1e-6), persistent=False)

    def forward(self, waveform_BN: Tensor) -> list[Tensor]:
        """One tensor `(B, T, F)` for each resolution and kind of bins."""
        spectra = []
        with torch.autocast(waveform_BN.device.type, enabled=False):
            for size in self.sizes:
                window = self.get_buffer(f"window_{size}")
                spectrum_BFT = torch.stft(
                    waveform_BN.float(), size, size // 4, window=window, center=False, return_complex=True
                )
                power_BTF = torch.view_as_real(spectrum_BFT / window.square().sum().sqrt()).square().sum(-1).mT
                power_BTM = power_BTF @ self.get_buffer(f"filters_{size}")
                spectra += [0.5 * (power + FLOOR**2).log() for power in (power_BTF, power_BTM)]
        return spectra


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of each row's spectra `(B,)`."""
    means = [(a - b).abs().mean((1, 2)) for a, b in zip(left, right, strict=True)]
    return torch.stack(means).mean(0)


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample (Kong et al. 2020, arXiv 2010.05646)."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        sizes = [1, channels, 2 * channels, 4 * channels, 8 * channels]
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in pairwise(sizes))
        self.convs.append(weight_norm(nn.Conv2d(sizes[-1], sizes[-1], (5, 1), padding=(2, 0))))
        self.head = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform_BN: Tensor) -> list[Tensor]:
        """Features of each layer, the scores last."""
        n_samples = waveform_BN.shape[1] // self.period * self.period
        return _layers(waveform_BN[:, None, :n_samples].unflatten(2, (-1, self.period)), self.convs, self.head)


class SpectrumDiscriminator(nn.Module):
    """Looks at a complex spectrogram (as in Zeghidour et al. 2021, arXiv 2107.03312)."""

    window: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size), persistent=False)
        self.convs = nn.ModuleList([weight_norm(nn.Conv2d(2, channels, (3, 9), padding=(1, 4)))])
        self.convs += [weight_norm(nn.Conv2d(channels, channels, (3, 9), (1, 2), (1, 4))) for _ in range(3)]
        self.convs.append(weight_norm(nn.Conv2d(channels, channels, 3, padding=1)))
        self.head = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, waveform_BN: Tensor) -> list[Tensor]:
        """Features of each layer, the scores last."""
        with torch.autocast(waveform_BN.device.type, enabled=False):
            spectrum_BFT = torch.stft(
                waveform_BN.float(), self.size, self.size // 4, window=self.window, center=False, return_complex=True
            )
            parts_BCTF = torch.view_as_real(spectrum_BFT / self.window.square().sum().sqrt()).permute(0, 3, 2, 1)
            # Loud bins are a thousand times stronger than soft ones; the root brings them closer and keeps the phase.
            parts_BCTF = parts_BCTF / (parts_BCTF.square().sum(1, keepdim=True) + FLOOR**2) ** 0.25
        return _layers(parts_BCTF, self.convs, self.head)


def _layers(x: Tensor, convs: nn.ModuleList, head: nn.Module) -> list[Tensor]:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        features.append(x)
    return [*features, head(x)]


class Discriminators(nn.Module):
    """Several that look at different things; `channels` is that of a first layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [PeriodDiscriminator(period, channels) for period in PERIODS]
        parts += [SpectrumDiscriminator(size, -(-channels // 2)) for size in RESOLUTIONS]
        self.parts = nn.ModuleList(parts)

    def forward(self, waveform_BN: Tensor) -> list[list[Tensor]]:
        """Features of each layer, the scores last, of each discriminator."""
        return [part(waveform_BN) for part in self.parts]


def deceived(scores: Sequence[Tensor], target: float) -> Tensor:
    """How far each row's scores are from a target: least squares, `(B,)`."""
    return torch.stack([(score.float() - target).square().flatten(1).mean(1) for score in scores]).mean(0)


def unlike(real: Sequence[Sequence[Tensor]], made: Sequence[Sequence[Tensor]]) -> Tensor:
    """How far features are from those of the real waveforms, relative to how large these are, `(B,)`."""
    terms = []
    for real_layers, made_layers in zip(real, made, strict=True):
        for a, b in zip(real_layers[:-1], made_layers[:-1], strict=True):
            a, b = a.detach().float().flatten(1), b.float().flatten(1)
            terms.append((a - b).abs().mean(1) / a.abs().mean(1).clamp(min=1e-3))
    return torch.stack(terms).mean(0)
