"""How good are the images: fidelity of reconstructions, and distances between distributions.

Chapters 02 and 03. Images are (N, 1, H, W) in [-1, 1] throughout.
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)

from diffecho_utils import DiffEchoError, camus, data

_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003


def psnr(images, reference):
    """Peak signal-to-noise ratio of each image: (N,) dB."""
    pairs = zip(images, reference, strict=True)
    return torch.stack([peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in pairs])


def ms_ssim(images, reference):
    """Multi-scale structural similarity of each image with its reference: (N,).

    Five scales need 176 pixels; smaller images get as many as fit, the weights rescaled to sum 1.
    """
    side = min(images.shape[-2:])
    scales = min(5, int(np.log2((side - 1) / 10)) + 1)
    weights = np.array(_SCALE_WEIGHTS[:scales])
    return multiscale_structural_similarity_index_measure(
        images, reference, data_range=2.0, betas=tuple(weights / weights.sum()), reduction="none"
    )


def radial_spectrum(images):
    """Mean power spectrum over direction: (frequencies in cycles a pixel, power in dB), each (H/2,).

    The images' means are removed and a Hann window keeps the borders out of it.
    """
    side = images.shape[-1]
    window = torch.hann_window(side, periodic=False)
    centred = (images - images.mean((2, 3), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(centred).abs().square().mean((0, 1))
    rings = (
        torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(side)] * 2, indexing="ij")) * side
    ).round()
    frequencies = torch.arange(1, side // 2)
    levels = torch.stack([power[rings == ring].mean() for ring in frequencies])
    return (frequencies / side).numpy(), (10 * torch.log10(levels)).numpy()


def power_by_direction(images, low=0.125, high=0.375, bins=18):
    """Power of fine detail by direction: (N, bins); 0 degrees varies sideways, 90 along depth.

    Frequencies between `low` and `high` cycles a pixel, under a Hann window; bin b covers the
    directions from b to b + 1 times 180 / bins degrees.
    """
    side = images.shape[-1]
    window = torch.hann_window(side, periodic=False)
    power = torch.fft.fft2(images[:, 0] * window[:, None] * window).abs().square()
    depth, sideways = torch.meshgrid(*[torch.fft.fftfreq(side)] * 2, indexing="ij")
    radius = torch.hypot(depth, sideways)
    ring = (radius > low) & (radius < high)
    wedge = (torch.atan2(depth, sideways) / torch.pi * bins).floor() % bins
    return torch.stack([power[:, ring & (wedge == b)].mean(1) for b in range(bins)], 1).numpy()


def high_frequency_deviation(images, pixels=5):
    """Standard deviation of what a mean over `pixels` x `pixels` removes: (N,), speckle and noise."""
    blurred = F.avg_pool2d(F.pad(images, (pixels // 2,) * 4, mode="reflect"), pixels, stride=1)
    return (images - blurred).std((1, 2, 3))


def region_means(images, masks):
    """Mean grey value of each label's region: (N, 4) float32, NaN where a frame lacks the label.

    images: (N, 1, H, W), masks: (N, H, W) CAMUS labels; columns as in `camus.LABELS`.
    """
    regions = torch.stack([masks == label for label in camus.LABELS.values()], 1).float()
    return (images * regions).sum((2, 3)) / regions.sum((2, 3))


def features(vae, images, grid=4):
    """What lies roughly where: latents averaged over a `grid` x `grid` raster, (N, C * grid**2) float64."""
    return latent_features(data.encode(vae, images), grid)


def latent_features(latents, grid=4):
    """`features` of images whose latents are known: (N, C, h, w) -> (N, C * grid**2) float64."""
    return F.adaptive_avg_pool2d(latents, grid).flatten(1).double().numpy()


def nearest(a, b):
    """Distance of each row of `a` from the nearest row of `b`, root mean square: (N, ...), (M, ...) -> (N,).

    Generated frames that lie closer to the training frames than held-out real ones do are copies.
    """
    a, b = (torch.as_tensor(x).flatten(1).double() for x in (a, b))
    return (torch.cdist(a, b).min(1).values / a.shape[1] ** 0.5).numpy()


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017). The trace of the matrix
    root is the sum of the singular values of X_a X_b^T, with X the centred features over
    sqrt(n - 1): no matrix root, and exact for fewer images than dimensions.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise DiffEchoError(
            f"Frechet distance of {a.shape} and {b.shape}: needs (N, D), (M, D), N, M > 1"
        )
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    if len(a) + len(b) > 2 * a.shape[1]:  # the D x D roots are smaller than the N x M product
        centred = [np.linalg.qr(x, mode="r") for x in centred]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    traces = sum((x**2).sum() for x in centred)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root)


def frechet_at_infinity(a, b, seed=0, points=10, repeats=5):
    """Frechet distance extrapolated to infinitely many `a` (Chong and Forsyth 2020).

    The bias falls as 1/N: distances of random subsets of a, from half of it to all, are fitted by a
    line in 1/N, whose value at 0 is returned.
    """
    rng = np.random.default_rng(seed)
    sizes = np.linspace(len(a) // 2, len(a), points).astype(int)
    draws = [
        (n, frechet_distance(a[rng.permutation(len(a))[:n]], b)) for n in np.repeat(sizes, repeats)
    ]
    inverse, distances = 1 / np.array([n for n, _ in draws]), np.array([d for _, d in draws])
    return float(np.polyfit(inverse, distances, 1)[1])


def bootstrap_interval(statistic, groups, repeats=200, level=0.95, seed=0):
    """Interval of `statistic(rows)` over resampled groups (patients): (low, high).

    groups: (N,) the group of each row; whole groups are drawn with replacement, because the frames
    of one patient are not independent. The interval is moved so that the resamples' mean falls on
    `statistic` of all rows: a resample repeats rows, and so raises a statistic with a small-sample
    bias, such as the Frechet distance, above its own estimate. For that one it is rather too wide.
    """
    rng = np.random.default_rng(seed)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rows_of = [np.flatnonzero(member == i) for i in range(len(names))]
    values = []
    for _ in range(repeats):
        drawn = rng.integers(len(names), size=len(names))
        values.append(statistic(np.concatenate([rows_of[i] for i in drawn])))
    tails = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    tails += statistic(np.arange(len(member))) - np.mean(values)
    return float(tails[0]), float(tails[1])


def distance_panel(
    images, classes, reference, reference_classes, held_out, held_out_classes, patients
):
    """Frechet distances to the training frames, class by class, beside what real frames get.

    Each argument pair is (features, class index): of the generated images, of the training frames
    (the reference of both columns) and of held-out real frames, whose patients are given. Returns a
    DataFrame indexed by class ("all" last) with columns n, distance, low, high, at_infinity, and
    the floor: floor_n, floor, floor_low, floor_high (95 % bootstrap, over patients for real frames).
    The bias of small samples cancels only where n and floor_n agree.
    """
    rows = {}
    for index, name in [*enumerate(camus.CLASS_NAMES), (None, "all")]:
        of = [
            x if index is None else x[np.asarray(c) == index]
            for x, c in (
                (images, classes),
                (reference, reference_classes),
                (held_out, held_out_classes),
            )
        ]
        if min(len(x) for x in of) < 4:
            counts = dict(zip(("generated", "training", "held-out"), map(len, of), strict=True))
            raise DiffEchoError(
                f"{name}: a Frechet distance needs 4 images of each, found {counts}"
            )
        members = patients if index is None else patients[np.asarray(held_out_classes) == index]
        low, high = bootstrap_interval(
            lambda r, of=of: frechet_distance(of[0][r], of[1]), range(len(of[0]))
        )
        floor = bootstrap_interval(lambda r, of=of: frechet_distance(of[2][r], of[1]), members)
        rows[name] = {
            "n": len(of[0]),
            "distance": frechet_distance(of[0], of[1]),
            "low": low,
            "high": high,
            "at_infinity": frechet_at_infinity(of[0], of[1]),
            "floor_n": len(of[2]),
            "floor": frechet_distance(of[2], of[1]),
            "floor_low": floor[0],
            "floor_high": floor[1],
        }
    return pd.DataFrame(rows).T
