"""How good are the images: fidelity of reconstructions, and distances between distributions.

Chapters 02 to 08. Images are (N, 1, H, W) in [-1, 1], features (N, D) throughout.
"""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial.distance import cdist
from torch import nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)
from torchmetrics.image.fid import NoTrainInceptionV3

from diffecho_utils import DiffEchoError, anatomy, assets, camus, checkpoints, data, models

_MANIFOLD = ("precision", "recall", "density", "coverage")
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
    """Mean power spectrum over direction: (frequencies in cycles a pixel, power in dB), each (H/2 - 1,).

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


def spoilt(images):
    """Frames changed in ways that can be named: {what was done: images}, the first as they are.

    From what nobody sees (8 bits) over what programs do in passing (JPEG, resizing, stretching each
    frame's grey values to the full range, colour and back) to what everybody sees.
    """
    check_images(images)
    side = images.shape[-1]

    def resized(mode, **how):
        small = F.interpolate(images, side // 2, mode=mode, **how)
        return F.interpolate(small, side, mode="bilinear", align_corners=False)

    def stored(file_format=None, colour=False, **how):
        found = []
        for image in images:
            picture = Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy())
            if colour:
                picture = picture.convert("RGB")
            if file_format:
                file = BytesIO()
                picture.save(file, file_format, **how)
                picture = Image.open(file)
            found.append(torch.from_numpy(np.array(picture.convert("L"))).float())
        return torch.stack(found)[:, None] / 127.5 - 1

    low, high = (pick(images, (1, 2, 3)).view(-1, 1, 1, 1) for pick in (torch.amin, torch.amax))
    odd = torch.arange(len(images)).view(-1, 1, 1, 1) % 2 == 1
    blurred = F.avg_pool2d(F.pad(images, (2,) * 4, mode="reflect"), 5, stride=1)
    return {
        "as they are": images,
        "8 bits": stored(),
        "grey, colour, grey": stored(colour=True),
        "JPEG, quality 75": stored("JPEG", quality=75),
        "JPEG, quality 25": stored("JPEG", quality=25),
        "stretched to full range": 2 * (images - low) / (high - low) - 1,
        "half size, filtered": resized("bilinear", antialias=True),
        "half size, every 2nd pixel": resized("nearest"),
        "blurred by 5 x 5": blurred,
        "a fifth darker": 0.8 * (images + 1) - 1,
        "every second one mirrored": torch.where(odd, images.flip(-1), images),
    }


def feature_space(name, autoencoder=None, inception=None):
    """A function of images to features, by the network called `name`, on the device there is.

    "autoencoder", "classifier" and "clip" are the shipped ones, "inception" is `load_inception`'s;
    autoencoder: another checkpoint's folder; inception: a file of weights.
    """
    if name == "inception":
        network, see = load_inception(inception), inception_features
    elif name == "clip":
        network, see = checkpoints.load_clip(assets.checkpoint("camus", name))[0], clip_features
    elif name == "classifier":
        network, see = checkpoints.load_network(assets.checkpoint("camus", name)), network_features
    else:
        folder = autoencoder or assets.checkpoint("camus", name)
        side = checkpoints.read_training(folder)["side"]
        vae = checkpoints.load_autoencoder(folder).to(models.device())
        return lambda images: features(vae, data.resized(images, side))
    network = network.to(models.device())
    return lambda images: see(network, images)


def network_features(network, images, batch=64):
    """What the last linear layer of `network` (a classifier) is given: (N, D) float64.

    One pass of the network, overheard by a hook.
    """
    layer, heard = [m for m in network.modules() if isinstance(m, nn.Linear)][-1], []
    hook = layer.register_forward_pre_hook(lambda _, given: heard.append(given[0].flatten(1).cpu()))
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            for part in images.split(batch):
                network(part.to(device))
    finally:
        hook.remove()
    return torch.cat(heard).double().numpy()


@torch.no_grad()
def clip_features(clip, images, batch=64):
    """Vectors of length 1 from the image tower of a CLIP (`checkpoints.load_clip`): (N, D) float64."""
    device, images = clip.device, data.resized(images, clip.config.vision_config.image_size)
    parts = [
        clip.visual_projection(clip.vision_model(pixel_values=part.to(device)).pooler_output).cpu()
        for part in images.split(batch)
    ]
    return F.normalize(torch.cat(parts).double()).numpy()


def load_inception(weights=None):
    """The Inception-v3 of published FIDs: a module (N, 3, H, W) uint8 -> (N, 2048).

    weights: a TorchScript file of it (StyleGAN's inception-2015-12-05.pt), which needs no further
    package; loading it runs its code, so take it from a source you trust. None: torchmetrics' own,
    which needs torch-fidelity and fetches its weights once. Both resize to 299 pixels themselves.
    Raises DiffEchoError where neither can be had.
    """
    if weights is not None:
        try:
            return torch.jit.load(str(weights), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DiffEchoError(
                f"{weights}: no TorchScript file ({reason}); give StyleGAN's inception-2015-12-05.pt"
            ) from None
    try:
        return NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
    except (ImportError, OSError) as error:
        raise DiffEchoError(
            f"no Inception-v3 here ({error}); install torch-fidelity, or give a file of its weights"
        ) from None


@torch.no_grad()
def inception_features(inception, images, batch=32):
    """What Inception-v3 (`load_inception`) sees in grey images as 8-bit RGB: (N, D) float64."""
    flags = {"return_features": True} if isinstance(inception, torch.jit.ScriptModule) else {}
    tensors = [*inception.parameters(), *inception.buffers()]  # a traced network may have neither
    device, parts = tensors[0].device if tensors else images.device, []
    for part in images.split(batch):
        grey = ((part.to(device).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts.append(inception(grey.expand(-1, 3, -1, -1), **flags).flatten(1).cpu())
    return torch.cat(parts).double().numpy()


def nearest(a, b):
    """Distance of each row of `a` from the nearest row of `b`, root mean square: (N, ...), (M, ...) -> (N,).

    Generated frames that lie closer to the training frames than held-out real ones do are copies.
    """
    a, b = (torch.as_tensor(x).flatten(1).double() for x in (a, b))
    return (torch.cdist(a, b).min(1).values / a.shape[1] ** 0.5).numpy()


@dataclass(frozen=True)
class Gaussian:
    """What a Frechet distance keeps of a set of features: mean (D,) and covariance root.T @ root."""

    mean: np.ndarray
    root: np.ndarray  # (R, D), R = min(N, D)


def fitted(features):
    """The `Gaussian` of features (N, D); to be kept where many sets are compared with one.

    Raises DiffEchoError for fewer than two rows, and for values that are not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise DiffEchoError(f"features of shape {x.shape}: a Gaussian needs (N, D), N > 1")
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        raise DiffEchoError(
            f"features of {len(rows)} of {len(x)} images are not finite (first: row {rows[0]}); "
            "look at these images"
        )
    mean = x.mean(0)
    root = (x - mean) / np.sqrt(len(x) - 1)
    # With more images than features, a D x D root of the same covariance
    return Gaussian(mean, root if len(x) <= x.shape[1] else np.linalg.qr(root, mode="r"))


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017). The trace of the matrix
    root is the sum of the singular values of X_a X_b^T, with X the centred features over
    sqrt(n - 1): no matrix root, and exact for fewer images than dimensions. Either may be `fitted`
    already.
    """
    a, b = (x if isinstance(x, Gaussian) else fitted(x) for x in (a, b))
    if len(a.mean) != len(b.mean):
        raise DiffEchoError(
            f"Frechet distance of {len(a.mean)} and {len(b.mean)} features: needs the same ones"
        )
    overlap = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    traces = (a.root**2).sum() + (b.root**2).sum()
    return float(((a.mean - b.mean) ** 2).sum() + traces - 2 * overlap)


def frechet_at_infinity(a, b, seed=0, points=10, repeats=5):
    """Frechet distance extrapolated to infinitely many `a` (Chong and Forsyth 2020).

    The bias falls as 1/N: distances of random subsets of a, from half of it to all, are fitted by a
    line in 1/N, whose value at 0 is returned.
    """
    rng = np.random.default_rng(seed)
    b = b if isinstance(b, Gaussian) else fitted(b)
    sizes = np.linspace(len(a) // 2, len(a), points).astype(int)
    draws = [
        (n, frechet_distance(a[rng.permutation(len(a))[:n]], b)) for n in np.repeat(sizes, repeats)
    ]
    inverse, distances = 1 / np.array([n for n, _ in draws]), np.array([d for _, d in draws])
    return float(np.polyfit(inverse, distances, 1)[1])


def kernel_distance(a, b):
    """Kernel distance (KID, Binkowski et al. 2018) of features (N, D), (M, D): unbiased at any N > 1.

    Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, over all pairs, none left out;
    around zero, and as often below it as above, for two draws from one distribution.
    """
    a, b = _two_sets(a, b, 2, "a kernel distance")
    within_a, within_b, across = (
        (x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))
    )
    pairs = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (within_a, within_b)]
    return float(sum(pairs) - 2 * across.mean())


def manifold_scores(a, b, k=5):
    """How two sets of features (N, D), (M, D) cover each other: a dict of four numbers.

    Around each point lies a ball that reaches to its `k`-th neighbour of the same set.
    precision: share of `a` in a ball of the reference `b`; recall: share of `b` in a ball of `a`
    (Kynkaanniemi et al. 2019); density: balls of `b` an `a` lies in, on average, over k; coverage:
    share of b's balls that hold an `a` (Naeem et al. 2020). Raises DiffEchoError for N or M <= k.
    """
    a, b = _two_sets(a, b, k + 1, f"precision and recall with k = {k}")
    across, (reach_a, reach_b) = cdist(b, a), [_reach(x, k) for x in (a, b)]
    inside = across < reach_b[:, None]
    return {
        "precision": float(inside.any(0).mean()),
        "recall": float((across < reach_a).any(1).mean()),
        "density": float(inside.sum(0).mean() / k),
        "coverage": float((across.min(1) < reach_b).mean()),
    }


def _reach(x, k):
    """Distance of each point from its k-th neighbour."""
    return np.partition(cdist(x, x), k, axis=1)[:, k]


def _two_sets(a, b, least, what):
    """Both as float64 arrays; DiffEchoError where one has fewer than `least` rows."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < least:
        raise DiffEchoError(
            f"{what} of features {a.shape} and {b.shape}: needs the same features of at least "
            f"{least} images in each set"
        )
    return a, b


def self_similarity(images, pairs=200, seed=0):
    """Mean MS-SSIM of random pairs of different images: low is diverse, 1 is one image repeated.

    Of all pairs where there are fewer than `pairs`.
    """
    check_images(images, 2)
    first, second = np.triu_indices(len(images), 1)
    chosen = np.random.default_rng(seed).permutation(len(first))[:pairs]
    return float(
        torch.cat(
            [
                ms_ssim(images[first[part]], images[second[part]])
                for part in np.array_split(chosen, -(-len(chosen) // 64))
            ]
        ).mean()
    )


def check_images(images, least=1, names=None):
    """Raise DiffEchoError for images that no metric can say anything about; `names` to say which.

    Fewer than `least`, not finite, or of one grey value throughout.
    """
    if len(images) < least:
        raise DiffEchoError(f"{len(images)} images: needs at least {least}; sample more")
    flat = images.flatten(1)
    problems = {
        "not finite": ~flat.isfinite().all(1),
        "of one grey value throughout": flat.amax(1) == flat.amin(1),
    }
    for problem, where in problems.items():
        if where.any():
            first = int(where.nonzero()[0])
            raise DiffEchoError(
                f"{int(where.sum())} of {len(images)} images are {problem} (first: "
                f"{names[first] if names is not None else f'image {first}'}); "
                "leave them out, or look at the generator that drew them"
            )


def ejection_fractions(frames, masks):
    """EF in % of each patient of `frames` (data.Frames) with other label maps, NaN if unmeasurable.

    masks: (N, H, W), as a segmenter reads them or as they were asked for. A Series by patient, of
    those who have all four frames.
    """
    measured = anatomy.patients_ef(data.Frames(frames.images, masks, frames.table))
    return measured.set_index("patient")["ef"]


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
        target = fitted(of[1])
        low, high = bootstrap_interval(
            lambda r, x=of[0], target=target: frechet_distance(x[r], target), range(len(of[0]))
        )
        floor = bootstrap_interval(
            lambda r, x=of[2], target=target: frechet_distance(x[r], target), members
        )
        rows[name] = {
            "n": len(of[0]),
            "distance": frechet_distance(of[0], target),
            "low": low,
            "high": high,
            "at_infinity": frechet_at_infinity(of[0], target),
            "floor_n": len(of[2]),
            "floor": frechet_distance(of[2], target),
            "floor_low": floor[0],
            "floor_high": floor[1],
        }
    return pd.DataFrame(rows).T


def panel(images, classes, reference, reference_classes, held_out, held_out_classes, patients, k=5):
    """`distance_panel` and beside it what a Frechet distance cannot see; arguments as there.

    Further columns: floor_at_infinity, and of each of the following the value of the images and, as
    <name>_floor, of the held-out frames. kernel: `kernel_distance`; precision, recall, density,
    coverage: `manifold_scores`, NaN where a class has too few images for it (`k` + 1); nearest: the
    5th percentile of the distance from the nearest training frame.
    """
    table = distance_panel(
        images, classes, reference, reference_classes, held_out, held_out_classes, patients
    )
    for index, name in [*enumerate(camus.CLASS_NAMES), (None, "all")]:
        mine, target, real = (
            np.asarray(x) if index is None else np.asarray(x)[np.asarray(c) == index]
            for x, c in (
                (images, classes),
                (reference, reference_classes),
                (held_out, held_out_classes),
            )
        )
        table.loc[name, "floor_at_infinity"] = frechet_at_infinity(real, target)
        for suffix, x in (("", mine), ("_floor", real)):
            scores = {"kernel": kernel_distance(x, target)} | dict.fromkeys(_MANIFOLD, np.nan)
            if min(len(x), len(target)) > k:
                scores |= manifold_scores(x, target, k)
            scores["nearest"] = np.quantile(nearest(x, target), 0.05)
            for score, value in scores.items():
                table.loc[name, f"{score}{suffix}"] = value
    return table
