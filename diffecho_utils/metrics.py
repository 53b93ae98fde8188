"""How good are the images: fidelity of reconstructions, and distances between distributions.

Chapters 02 to 08. Images are (N, 1, H, W) in [-1, 1], features (N, D) throughout.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)
from torchmetrics.image.fid import NoTrainInceptionV3

from diffecho_utils import DiffEchoError, assets, camus, checkpoints, data, intervals, models

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

    Without the images' means, under a Hann window.
    """
    side = images.shape[-1]
    power, depth, sideways = _power(images - images.mean((2, 3), keepdim=True))
    power, rings = power.mean(0), (torch.hypot(depth, sideways) * side).round()
    frequencies = torch.arange(1, side // 2)
    levels = torch.stack([power[rings == ring].mean() for ring in frequencies])
    return (frequencies / side).numpy(), (10 * torch.log10(levels)).numpy()


def power_by_direction(images, low=0.125, high=0.375, bins=18):
    """Power of fine detail by direction, 0 degrees sideways, 90 along depth: (N, bins) over 180 degrees.

    Of frequencies between `low` and `high` cycles a pixel, under a Hann window.
    """
    power, depth, sideways = _power(images)
    radius = torch.hypot(depth, sideways)
    ring = (radius > low) & (radius < high)
    wedge = (torch.atan2(depth, sideways) / torch.pi * bins).floor() % bins
    return torch.stack([power[:, ring & (wedge == b)].mean(1) for b in range(bins)], 1).numpy()


def _power(images):
    """(power (N, H, W) under a Hann window, frequencies along depth (H, 1) and sideways (1, W))."""
    side = images.shape[-1]
    window, cycles = torch.hann_window(side, periodic=False), torch.fft.fftfreq(side)
    power = torch.fft.fft2(images[:, 0] * window[:, None] * window).abs().square()
    return power, cycles[:, None], cycles[None]


def high_frequency_deviation(images, pixels=5, where=None):
    """Standard deviation of what a mean over `pixels` x `pixels` removes: (N,), speckle and noise.

    where: (N, H, W) bool, the pixels that count, for example `inside` label maps, since three fifths of
    what is fine in a whole frame is the edge of its sector; None: all.
    """
    fine = (images - data.blurred(images, pixels))[:, 0]
    if where is None:
        return fine.std((1, 2))
    return torch.stack([of_one[there].std() for of_one, there in zip(fine, where, strict=True)])


def inside(masks, pixels=3):
    """Pixels of any structure that lie `pixels` within its outer border: (N, H, W) labels -> bool."""
    outside = (masks == 0).float()[:, None]
    return F.max_pool2d(outside, 2 * pixels + 1, 1, pixels)[:, 0] == 0


def sector(images, pixels=3, black=-1.0):
    """Pixels `pixels` within the border of the lit sector: (N, 1, H, W) images in [-1, 1] -> (N, H, W) bool.

    In each row the sector reaches from the first to the last pixel that is brighter than `black`.
    """
    lit = images > black
    dark = ~((lit.cumsum(3) > 0) & (lit.flip(3).cumsum(3).flip(3) > 0))
    return F.max_pool2d(dark.float(), 2 * pixels + 1, 1, pixels)[:, 0] == 0


def speckle_spectrum(images, masks):
    """`radial_spectrum` of what is finer than about five pixels, `inside` label maps, zero outside them."""
    fine = (images - data.blurred(images)) * inside(masks)[:, None]
    return radial_spectrum(fine)


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


def network_features(network, images):
    """What the last linear layer of `network` (a classifier) is given, overheard by a hook: (N, D) float64."""
    layer, heard = [m for m in network.modules() if isinstance(m, nn.Linear)][-1], []
    hook = layer.register_forward_pre_hook(lambda _, given: heard.append(given[0].flatten(1).cpu()))
    try:
        data.in_batches(network, images, network)
    finally:
        hook.remove()
    return torch.cat(heard).double().numpy()


def clip_features(clip, images):
    """Vectors of length 1 from the image tower of a CLIP (`checkpoints.load_clip`): (N, D) float64."""

    def look(part):
        return clip.visual_projection(clip.vision_model(pixel_values=part).pooler_output)

    images = data.resized(images, clip.config.vision_config.image_size)
    return F.normalize(data.in_batches(look, images, clip).double()).numpy()


def load_inception(weights=None):
    """The Inception-v3 of published FIDs: a module (N, 3, H, W) uint8 -> (N, 2048).

    weights: a TorchScript file of it (StyleGAN's inception-2015-12-05.pt), whose code is run, so take it
    from a source you trust. None: torchmetrics' own, which needs torch-fidelity and fetches its weights
    once. Both resize to 299 pixels themselves. Raises DiffEchoError where neither can be had.
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


def inception_features(inception, images):
    """What Inception-v3 (`load_inception`) sees in grey images as 8-bit RGB: (N, D) float64."""
    flags = {"return_features": True} if isinstance(inception, torch.jit.ScriptModule) else {}

    def look(part):
        grey = ((part.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return inception(grey.expand(-1, 3, -1, -1), **flags).flatten(1)

    return data.in_batches(look, images, inception, batch=32).double().numpy()


def nearest(a, b):
    """Distance of each row of `a` from the nearest of `b`, root mean square: (N, ...), (M, ...) -> (N,).

    Generated frames that lie closer to the training frames than held-out real ones do are copies.
    """
    a, b = (torch.as_tensor(x).flatten(1).double() for x in (a, b))
    return (torch.cdist(a, b).min(1).values / a.shape[1] ** 0.5).numpy()


def copied(images, known, k=50, owners=None):
    """How near images come to single frames of `known`: (distance, ratio, index), each (N,).

    Of features (N, D), (M, D); for copies whose grain differs `latent_features` at half the latents' side.
    distance: from the nearest frame, root mean square; ratio: that over the mean of the next `k`, small
    where one frame is meant and not the whole crowd (Carlini et al. 2023); index: of the nearest. Those
    with ratios that one held-out frame in a hundred has are suspects. owners: of both, the patients;
    pairs of one patient do not count.
    """
    a, b = _two_sets(images, known, 1, "nearest frames")
    apart = cdist(a, b) / a.shape[1] ** 0.5
    if owners is not None:
        apart[np.equal.outer(*map(np.asarray, owners))] = np.inf
    if not np.isfinite(apart).sum(1).min() > k:
        raise DiffEchoError(f"{len(b)} known frames: the next {k} after the nearest need more")
    order = apart.argsort(1)[:, : k + 1]
    sorted_ = np.take_along_axis(apart, order, 1)
    return sorted_[:, 0], sorted_[:, 0] / sorted_[:, 1:].mean(1), order[:, 0]


@dataclass(frozen=True)
class Gaussian:
    """What a Frechet distance keeps of a set of features: mean (D,) and covariance root.T @ root."""

    mean: np.ndarray
    root: np.ndarray  # (R, D), R = min(N, D)


def fitted(features):
    """The `Gaussian` of features (N, D), N > 1 and finite; to be kept where many sets are compared with one."""
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

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017). The trace of the matrix root
    is the sum of the singular values of X_a X_b^T, with X the centred features over sqrt(n - 1): exact
    for fewer images than dimensions. Either may be `fitted` already.
    """
    a, b = (x if isinstance(x, Gaussian) else fitted(x) for x in (a, b))
    if len(a.mean) != len(b.mean):
        raise DiffEchoError(
            f"Frechet distance of {len(a.mean)} and {len(b.mean)} features: needs the same ones"
        )
    overlap = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    traces = (a.root**2).sum() + (b.root**2).sum()
    return float(((a.mean - b.mean) ** 2).sum() + traces - 2 * overlap)


def frechet_at_infinity(a, b, classes=None, seed=0, points=10, repeats=5):
    """Frechet distance extrapolated to infinitely many `a` (Chong and Forsyth 2020).

    Its bias falls as 1/N: those of random subsets, from half of a to all, are fitted by a line in 1/N.
    classes: (N,), whose shares the subsets keep.
    """
    rng, b = np.random.default_rng(seed), b if isinstance(b, Gaussian) else fitted(b)
    sizes = np.repeat(np.linspace(len(a) // 2, len(a), points).astype(int), repeats)
    classes = np.zeros(len(a)) if classes is None else np.asarray(classes)
    distances = [frechet_distance(a[_shuffled(classes, rng)[:n]], b) for n in sizes]
    return float(np.polyfit(1 / sizes, distances, 1)[1])


def balanced(classes, n, rng):
    """Rows of n images, at random but with as many of each class: (n,), of classes (N,).

    Raises DiffEchoError where n is no multiple of the classes, or a class has too few images.
    """
    classes = np.asarray(classes)
    kinds, there = np.unique(classes, return_counts=True)
    if n % len(kinds) or n > len(kinds) * there.min():
        raise DiffEchoError(
            f"{n} images of {len(kinds)} classes, of which the smallest has {there.min()}: take a "
            f"multiple of {len(kinds)}, at most {len(kinds) * there.min()}"
        )
    share = n // len(kinds)
    rows = [rng.permutation(np.flatnonzero(classes == kind))[:share] for kind in kinds]
    return np.concatenate(rows)


def _shuffled(classes, rng):
    """All rows at random, but so that every beginning has the classes in their shares."""
    place, order = np.empty(len(classes)), rng.permutation(len(classes))
    for kind in np.unique(classes):
        rows = order[classes[order] == kind]
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return place.argsort()


def kernel_distance(a, b):
    """Kernel distance (KID, Binkowski et al. 2018) of features (N, D), (M, D): unbiased at any N > 1.

    Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 over all pairs. For two independent
    draws from one distribution its mean is zero and it is skewed: more often below zero than above, and
    farther above. With equal numbers of each class, draws are not independent, and the mean is below zero.
    """
    a, b = _two_sets(a, b, 2, "a kernel distance")
    pairs = (a, a), (b, b), (a, b)
    within_a, within_b, across = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in pairs)
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (within_a, within_b)]
    return float(sum(means) - 2 * across.mean())


def manifold_scores(a, b, k=5):
    """How two sets of features (N, D), (M, D) cover each other: a dict of four numbers.

    Around each point lies a ball that reaches to its `k`-th neighbour of the same set.
    precision: share of `a` in a ball of the reference `b`; recall: share of `b` in a ball of `a`
    (Kynkaanniemi et al. 2019); density: balls of `b` an `a` lies in, on average, over k; coverage:
    share of b's balls that hold an `a` (Naeem et al. 2020). Raises DiffEchoError for N or M <= k.
    """
    a, b = _two_sets(a, b, k + 1, f"precision and recall with k = {k}")
    across = cdist(b, a)
    reach_a, reach_b = (np.partition(cdist(x, x), k, axis=1)[:, k] for x in (a, b))
    inside = across < reach_b[:, None]
    return {
        "precision": float(inside.any(0).mean()),
        "recall": float((across < reach_a).any(1).mean()),
        "density": float(inside.sum(0).mean() / k),
        "coverage": float((across.min(1) < reach_b).mean()),
    }


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
    """Mean MS-SSIM of (at most) so many random pairs: low is diverse, 1 is one image repeated."""
    check_images(images, 2)
    first, second = np.triu_indices(len(images), 1)
    chosen = np.random.default_rng(seed).permutation(len(first))[:pairs]
    parts = np.array_split(chosen, -(-len(chosen) // 64))
    scores = [ms_ssim(images[first[part]], images[second[part]]) for part in parts]
    return float(torch.cat(scores).mean())


def check_images(images, least=1, names=None):
    """Raise DiffEchoError for images of which no metric can say anything, naming one by its `names`.

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


def by_class(*classes):
    """One class after the other and, last, all: (name, rows of the first set, rows of the second, ...).

    classes: (N,) class indices of each set of images; rows: where they are this class.
    """
    classes = [np.asarray(of_set) for of_set in classes]
    for index, name in enumerate(camus.CLASS_NAMES):
        yield name, *(np.flatnonzero(of_set == index) for of_set in classes)
    yield "all", *(np.arange(len(of_set)) for of_set in classes)


def panel(
    images,
    classes,
    reference,
    reference_classes,
    held_out,
    held_out_classes,
    patients,
    owners=None,
    k=5,
):
    """Distances of generated images from training frames, class by class, beside what real frames get.

    Each argument pair is (features, class index): of the generated images, of the training frames (the
    reference) and of held-out real frames, whose patients are given. owners: the patients whose label
    maps the generated images were drawn to, if any. Returns a DataFrame indexed by
    class ("all" last): n, distance (Frechet), low, high (`intervals.distance`, over patients where there
    are) and at_infinity, then the same of the held-out frames as floor_n, floor, floor_low, ...; the bias of
    small samples cancels only where n and floor_n agree. Then what a Frechet distance cannot see, of the
    held-out frames as <name>_floor: kernel (`kernel_distance`); precision, recall, density, coverage
    (`manifold_scores`, NaN where a class has no more than `k` images); nearest, the 5th percentile of
    the distance from the nearest training frame.
    """
    sets, patients = [np.asarray(x) for x in (images, reference, held_out)], np.asarray(patients)
    classes, held_out_classes = np.asarray(classes), np.asarray(held_out_classes)
    owners, table = np.arange(len(images)) if owners is None else np.asarray(owners), {}
    for name, *rows in by_class(classes, reference_classes, held_out_classes):
        mine, known, real = (x[r] for x, r in zip(sets, rows, strict=True))
        counts = {"generated": len(mine), "training": len(known), "held-out": len(real)}
        if min(counts.values()) < 4:
            raise DiffEchoError(
                f"{name}: a Frechet distance needs 4 images of each, found {counts}"
            )
        target = fitted(known)
        floor = _distances(real, target, patients[rows[2]], held_out_classes[rows[2]])
        table[name] = _distances(mine, target, owners[rows[0]], classes[rows[0]])
        table[name] |= {f"floor_{score}": value for score, value in floor.items()}
        table[name] |= _scores(mine, known, k)
        table[name] |= {f"{score}_floor": v for score, v in _scores(real, known, k).items()}
    return pd.DataFrame(table).T.rename(columns={"floor_distance": "floor"})


def _distances(x, target, groups, classes):
    found = intervals.distance(lambda rows: frechet_distance(x[rows], target), groups)
    measured = dict(zip(("distance", "low", "high"), found, strict=True))
    return {"n": len(x)} | measured | {"at_infinity": frechet_at_infinity(x, target, classes)}


def _scores(x, known, k):
    names = ("precision", "recall", "density", "coverage")
    enough = min(len(x), len(known)) > k
    manifold = manifold_scores(x, known, k) if enough else dict.fromkeys(names, np.nan)
    closest = np.quantile(nearest(x, known), 0.05)
    return {"kernel": kernel_distance(x, known)} | manifold | {"nearest": closest}
