"""Metrics against torchmetrics, closed forms and brute force."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import skew
from sklearn.metrics.pairwise import polynomial_kernel
from torchmetrics.image.fid import FrechetInceptionDistance

from diffecho_utils import DiffEchoError, assets, camus, checkpoints, metrics, models, synthetic
from diffecho_utils.__main__ import main


@pytest.fixture(scope="module")
def real():
    """The shipped features of CAMUS's frames (chapter 03): a dict of arrays, features in float64."""
    arrays = load_file(assets.features("camus", "cpu", "03_features"))
    return arrays | {"features": arrays["features"].astype(float)}


def theirs(a, b):
    """torchmetrics' Frechet distance, computed on the same numbers."""
    features = torch.nn.Identity()
    features.num_features = a.shape[1]
    fid = FrechetInceptionDistance(features, normalize=False)
    fid.set_dtype(torch.float64)
    fid.update(torch.from_numpy(a), real=True)
    fid.update(torch.from_numpy(b), real=False)
    return fid.compute().item()


def test_frechet_distance_agrees_with_torchmetrics(real):
    rng = np.random.default_rng(0)
    for sizes in ((300, 500), (7, 8), (4, 400)):
        a, b = (rng.normal(size=(n, 6)) @ rng.normal(size=(6, 6)) + 1 for n in sizes)
        assert metrics.frechet_distance(a, b) == pytest.approx(theirs(a, b), rel=1e-4, abs=1e-4)
    a, b = (real["features"][real["split"] == split][:, :64] for split in (1, 0))
    assert metrics.frechet_distance(a, b) == pytest.approx(theirs(a, b), rel=1e-6)


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(50, 200))  # fewer images than dimensions
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(200 * 0.25)
    one = rng.normal(size=(1000, 1))
    expected = (2 * one.std(ddof=1) - one.std(ddof=1)) ** 2 + one.mean() ** 2
    assert metrics.frechet_distance(one, 2 * one) == pytest.approx(expected)
    for bad in ((a[:1], a), (a, a[:, :5]), (a[0], a[0])):
        with pytest.raises(DiffEchoError, match="needs"):
            metrics.frechet_distance(*bad)
    a[7, 1] = np.nan
    with pytest.raises(DiffEchoError, match="1 of 50 images are not finite .first: row 7"):
        metrics.frechet_distance(a, a)


@pytest.mark.parametrize("sizes", [(30, 20), (8, 500), (300, 200)])
def test_a_fitted_reference_changes_nothing(sizes):
    rng = np.random.default_rng(4)
    a, b = (rng.normal(size=(n, 12)) * scale + scale for n, scale in zip(sizes, (1, 2)))  # noqa: B905
    kept = metrics.fitted(b)
    assert metrics.frechet_distance(a, kept) == metrics.frechet_distance(a, b)
    np.testing.assert_allclose(kept.root.T @ kept.root, np.cov(b.T), atol=1e-12)
    assert metrics.frechet_at_infinity(a, kept) == metrics.frechet_at_infinity(a, b)


def test_extrapolation_removes_most_of_the_bias():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(300, 40)), rng.normal(size=(4000, 40))
    biased = metrics.frechet_distance(a, b)
    assert abs(metrics.frechet_at_infinity(a, b)) < 0.25 * biased


def test_extrapolation_keeps_the_shares_of_classes():
    """Without, what random shares add looks like bias, and is taken away: equal sets come out below zero."""
    rng = np.random.default_rng(3)
    classes = np.repeat(range(4), 25)
    centres = 10 * np.eye(4)[classes]
    found = []
    for seed in range(20):
        a = centres + rng.normal(size=(100, 4))
        b = np.tile(centres, (40, 1)) + rng.normal(size=(4000, 4))
        found.append([metrics.frechet_at_infinity(a, b, kinds, seed) for kinds in (None, classes)])
    plain, kept = np.mean(found, 0)
    assert plain < kept - 0.1 and abs(kept) < 0.1


def test_balanced_draws_have_equal_classes():
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.repeat(range(3), [5, 9, 7]))
    drawn = [metrics.balanced(classes, 12, rng) for _ in range(2)]
    assert all(np.bincount(classes[rows]).tolist() == [4] * 3 for rows in drawn)
    assert len(set(drawn[0])) == 12 and set(drawn[0]) != set(drawn[1])
    for n in (10, 18):
        with pytest.raises(DiffEchoError, match="take a multiple of 3, at most 15"):
            metrics.balanced(classes, n, rng)


def test_kernel_distance_of_equal_sets_is_skewed_about_zero():
    rng = np.random.default_rng(1)
    known = rng.normal(size=(500, 8))
    found = np.array([metrics.kernel_distance(rng.normal(size=(50, 8)), known) for _ in range(300)])
    assert (
        abs(found.mean()) < 3 * found.std() / 300**0.5 + found.std() / 3
    )  # the reference is one draw
    assert (found < found.mean()).mean() > 0.52 and skew(found) > 0.3


def test_psnr_and_ms_ssim_by_hand(frames):
    images = frames.images[:4]
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    expected = 10 * torch.log10(4 / (noisy - images).square().mean((1, 2, 3)))
    torch.testing.assert_close(metrics.psnr(noisy, images), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(metrics.ms_ssim(images, images).float(), torch.ones(4))
    assert (metrics.ms_ssim(noisy, images) < 0.99).all()
    for side in (32, 64, 128, 176):
        picture = torch.rand(1, 1, side, side) * 2 - 1
        assert metrics.ms_ssim(picture, picture).item() == pytest.approx(1)


def test_spectra_find_a_wave():
    columns = torch.arange(128.0)
    wave = torch.sin(2 * torch.pi * 0.25 * columns).expand(2, 1, 128, 128)
    frequencies, power = metrics.radial_spectrum(wave)
    assert frequencies[power.argmax()] == pytest.approx(0.25, abs=0.01)
    sideways, along_depth = metrics.power_by_direction(wave), metrics.power_by_direction(wave.mT)
    assert sideways.shape == (2, 18) and set(sideways.argmax(1)) <= {0, 17}
    assert set(along_depth.argmax(1)) <= {8, 9}


def test_high_frequencies_are_what_a_blur_removes():
    noise = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, 64).expand(3, 1, 64, 64)
    expected = (1 - 1 / 25) ** 0.5  # the variance a 5 x 5 mean leaves of white noise is 1/25
    deviation = metrics.high_frequency_deviation(noise)
    torch.testing.assert_close(deviation, torch.full((3,), expected), atol=0.05, rtol=0)
    assert metrics.high_frequency_deviation(ramp).max() < 0.02


def test_fine_detail_counts_inside_the_label_maps_only():
    """A bright edge outside changes what a whole frame has of it, and not what is inside."""
    torch.manual_seed(0)
    images, masks = 0.1 * torch.randn(2, 1, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 20:50, 20:50] = 1
    masks[:, 30:40, 30:40] = 3
    inside = metrics.inside(masks, pixels=4)
    assert inside[:, 24:46, 24:46].all() and inside.sum() == 2 * 22**2
    edged = images.clone()
    edged[..., 10] += 1
    whole, part = (
        [metrics.high_frequency_deviation(x, where=where) for x in (images, edged)]
        for where in (None, inside)
    )
    assert (whole[1] > 1.2 * whole[0]).all() and torch.equal(*part)
    torch.testing.assert_close(part[0], whole[0], rtol=0.1, atol=0)
    (_, quiet), (_, loud) = (metrics.speckle_spectrum(x, masks) for x in (images, 2 * images))
    np.testing.assert_allclose(loud - quiet, 20 * np.log10(2), atol=1e-3)


def test_the_sector_holds_its_dark_chambers_and_not_its_border():
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    fan = (column - 32).abs() <= row // 2
    image = torch.where(fan, 0.2, -1.0)
    image[30:50, 28:36] = -1  # a chamber without an echo
    assert torch.equal(metrics.sector(image[None, None], pixels=0)[0], fan)
    within = metrics.sector(image[None, None])[0]
    assert within[40, 32] and not (within & ~fan).any()
    border = fan & ~(fan.roll(1, 1) & fan.roll(-1, 1))
    assert not (within & border).any() and within.sum() > fan.sum() / 2
    faint = torch.where(fan, 0.2, -0.97)[None, None]  # a surround that is not quite black
    assert torch.equal(metrics.sector(faint, pixels=0, black=-0.95)[0], fan)


def test_region_means_by_hand():
    masks = torch.tensor([[[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [3, 3, 1]]], dtype=torch.uint8)
    images = torch.tensor([[[0.0, 1, 2], [4, -1, 0]], [[0, 3, 0], [1, 0, -1]]])[:, None]
    expected = [[0.5, 3, -0.5, float("nan")], [1, -1, float("nan"), 0.5]]
    means = metrics.region_means(images, masks)
    torch.testing.assert_close(means, torch.tensor(expected), equal_nan=True)


def test_nearest_by_hand():
    a = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 2.0]])
    assert metrics.nearest(a, b) == pytest.approx([2 / 2**0.5, 0])
    assert metrics.nearest(a.view(2, 1, 2, 1), b.view(3, 1, 2, 1)) == pytest.approx([2 / 2**0.5, 0])


def test_planted_copies_are_found_and_nothing_else():
    """Also copies of frames far from all others, which a distance alone would let pass."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.3, 2, 400)[:, None]  # crowded at first, then sparse
    known, others = (
        spread[rows] * rng.normal(size=(len(rows), 64)) for rows in (range(400), range(1, 400, 2))
    )
    copies = known[::10] + 0.4 * spread[::10] * rng.normal(size=(40, 64))
    ratios = {
        name: metrics.copied(x, known)[1] for name, x in (("copies", copies), ("others", others))
    }
    limit = np.quantile(metrics.copied(spread * rng.normal(size=(400, 64)), known)[1], 0.01)
    assert (ratios["copies"] < limit).all() and (ratios["others"] < limit).mean() < 0.05
    away, ratio, index = metrics.copied(copies, known)
    assert index.tolist() == [*range(0, 400, 10)] and away == pytest.approx(
        metrics.nearest(copies, known)
    )
    assert away[-1] > np.median(metrics.nearest(others[:40], known))  # told by the ratio alone
    apart = np.sort(np.linalg.norm(copies[3] - known, axis=1))
    assert ratio[3] == pytest.approx(apart[0] / apart[1:51].mean())


def test_copies_of_ones_own_do_not_count():
    x = np.array([[0.0], [0.1], [3.0], [7.0]])
    away, ratio, index = metrics.copied(x, x, k=1, owners=([0, 0, 1, 2],) * 2)
    assert index.tolist() == [2, 2, 1, 2] and away == pytest.approx([3, 2.9, 2.9, 4])
    assert ratio == pytest.approx([3 / 7, 2.9 / 6.9, 2.9 / 3, 4 / 6.9])
    with pytest.raises(
        DiffEchoError, match="4 known frames: the next 3 after the nearest need more"
    ):
        metrics.copied(x, x, k=3, owners=([0, 0, 1, 2],) * 2)


def test_kernel_distance_agrees_with_scikit_learn():
    """By the formula without the diagonals, which has no bias."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(25, 7)), 1.3 * rng.normal(size=(40, 7)) + 0.2
    within = [polynomial_kernel(x, degree=3) for x in (a, b)]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    expected = sum(means) - 2 * polynomial_kernel(a, b, degree=3).mean()
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(DiffEchoError, match="a kernel distance .* at least 2 images"):
        metrics.kernel_distance(a[:1], b)


@pytest.mark.parametrize(
    ("k", "published"),
    # Of prdc 0.2 by the authors of density and coverage (Naeem et al. 2020), on these features
    [
        (3, {"precision": 0.925, "recall": 0.566666667, "density": 1.145833333, "coverage": 0.683333333}),
        (5, {"precision": 0.95, "recall": 0.683333333, "density": 1.2225, "coverage": 0.875}),
    ],
)  # fmt: skip
def test_precision_recall_density_coverage_are_the_published_implementations(k, published):
    rng = np.random.default_rng(0)
    b, a = rng.normal(size=(120, 8)), 0.8 * rng.normal(size=(80, 8)) + 0.3
    assert metrics.manifold_scores(a, b, k) == pytest.approx(published, abs=1e-8)
    with pytest.raises(DiffEchoError, match=f"k = {k} .* at least {k + 1} images"):
        metrics.manifold_scores(a[:k], b, k)


def panel_of(real, rows):
    """The panel of these shipped features against the training and the validation frames'."""
    known, features, classes = real["split"] == 0, real["features"], real["classes"]
    of_real = [x for part in (known, ~known) for x in (features[part], classes[part])]
    return metrics.panel(features[rows], classes[rows], *of_real, real["patient"][~known])


def test_panel_of_eight_hundred_images(real):
    """All scores in a minute on two cores; a copy of training frames is found out."""
    known = np.flatnonzero(real["split"] == 0)
    rng = np.random.default_rng(8)
    copied = [rng.choice(known[real["classes"][known] == c], 200, replace=False) for c in range(4)]
    started = time.process_time()
    table = panel_of(real, np.concatenate(copied))
    assert time.process_time() - started < 120  # processor seconds: a minute of two cores
    assert table.index.tolist() == ["2CH-ED", "2CH-ES", "4CH-ED", "4CH-ES", "all"]
    assert table["n"].tolist() == [200] * 4 + [800] and (table["low"] <= table["high"]).all()
    assert (table["distance"] < table["floor"]).all()  # a good distance,
    assert (table["nearest"] < 1e-6).all() and (table["nearest_floor"] > 0.01).all()  # for copies
    for name in ("kernel", "precision", "recall", "density", "coverage"):
        assert table[[name, f"{name}_floor"]].notna().all(axis=None)
    path = assets.record("camus", "cpu", "03_unconditional")
    recorded = json.loads(path.read_text())["values"]["panel"]
    for name in table.index:
        for column in ("floor_n", "floor", "floor_low", "floor_high"):
            assert table.loc[name, column] == pytest.approx(recorded[name][column], rel=1e-4)


def test_panel_of_few_images(real):
    rows = np.flatnonzero(real["split"] == 1)
    of = [rows[real["classes"][rows] == c] for c in range(4)]
    table = panel_of(real, np.concatenate([of[0][:20], *(part[:5] for part in of[1:])]))
    assert table["precision"].notna().tolist() == [True, False, False, False, True]
    assert table["precision_floor"].notna().all() and table["kernel"].notna().all()
    with pytest.raises(DiffEchoError, match=r"2CH-ED: a Frechet distance needs 4 .*'generated': 3"):
        panel_of(real, of[0][:3])


def test_features_are_a_raster_of_the_latents(frames, smoke):
    torch.manual_seed(0)
    vae = models.build_autoencoder(smoke).eval()
    assert metrics.features(vae, frames.images).shape == (40, 64)
    with torch.no_grad():
        means = vae.encode(frames.images[:2]).latent_dist.mean.mean((2, 3))
    scaled = means * vae.config.scaling_factor
    np.testing.assert_allclose(metrics.features(vae, frames.images[:2], 1), scaled, rtol=1e-4)


def test_hook_hears_what_the_last_layer_is_given(frames):
    classifier = checkpoints.load_network(assets.checkpoint("camus", "classifier"))
    images, calls = frames.images[:33].repeat(2, 1, 1, 1), []
    counting = classifier.register_forward_hook(lambda *_: calls.append(1))
    found = metrics.network_features(classifier, images)
    counting.remove()
    assert found.shape == (66, 128) and found.dtype == np.float64
    assert len(calls) == 2  # one pass, of 64 at a time
    with torch.no_grad():
        logits = classifier.network.fc(torch.from_numpy(found).float())
        torch.testing.assert_close(logits, classifier(images))
    assert not classifier.network.fc._forward_pre_hooks


def test_vectors_of_clip_are_its_image_embeddings(frames):
    clip, tokenizer = checkpoints.load_clip(assets.checkpoint("camus", "clip"))
    images = torch.nn.functional.interpolate(frames.images[:3], 128)
    with torch.no_grad():
        ids = models.tokens(tokenizer, ["a heart"])
        theirs = clip(input_ids=ids, pixel_values=images).image_embeds.double().numpy()
    np.testing.assert_allclose(metrics.clip_features(clip, images), theirs, atol=1e-5)
    assert metrics.clip_features(clip, frames.images[:3]).shape == (3, 128)  # 64 pixels


class StandIn(torch.nn.Module):
    """Called as StyleGAN's TorchScript Inception is; keeps the mean of each channel."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = images.float().mean((2, 3))
        return means if return_features else -means


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_inception_from_a_local_file(frames, tmp_path):
    path = tmp_path / "stand-in.pt"
    torch.jit.script(StandIn()).save(path)
    found = metrics.inception_features(metrics.load_inception(path), frames.images)
    grey = ((frames.images + 1) * 127.5).round().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(found, np.repeat(grey[:, None], 3, axis=1), rtol=1e-5)
    path.write_bytes(b"no network")
    with pytest.raises(DiffEchoError, match="stand-in.pt: no TorchScript file"):
        metrics.load_inception(path)


def test_inception_by_torchmetrics(frames, monkeypatch):
    """Without torch-fidelity it says what to do; with it, images reach it as 8-bit RGB."""
    given = []

    class Fidelity(torch.nn.Module):
        def __init__(self, name, features_list):
            super().__init__()
            given.extend([name, features_list])

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
            return images.float().mean((2, 3))

    monkeypatch.setattr(metrics, "NoTrainInceptionV3", Fidelity)
    found = metrics.inception_features(metrics.load_inception(), frames.images[:3])
    assert found.shape == (3, 3) and given == ["inception-v3-compat", ["2048"]]

    def missing(**settings):
        raise ModuleNotFoundError("requires that `Torch-fidelity` is installed")

    monkeypatch.setattr(metrics, "NoTrainInceptionV3", missing)
    with pytest.raises(DiffEchoError, match="install torch-fidelity, or give a file"):
        metrics.load_inception()


def test_self_similarity(frames):
    alike = frames.images[:1].repeat(4, 1, 1, 1)
    assert metrics.self_similarity(alike) == pytest.approx(1)
    different = metrics.self_similarity(frames.images[:6])
    pairs = [
        metrics.ms_ssim(frames.images[i : i + 1], frames.images[j : j + 1]).item()
        for i in range(6)
        for j in range(i)
    ]
    assert different == pytest.approx(np.mean(pairs), abs=1e-5) and different < 0.9
    assert metrics.self_similarity(frames.images[:6], pairs=3, seed=1) != pytest.approx(different)


def test_images_that_say_nothing_are_refused(frames):
    images = frames.images[:4].clone()
    metrics.check_images(images)
    images[2] = 0.25
    with pytest.raises(DiffEchoError, match="1 of 4 images are of one grey value .*first: c.png"):
        metrics.check_images(images, names=["a.png", "b.png", "c.png", "d.png"])
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(DiffEchoError, match="1 of 4 images are not finite .first: image 1"):
        metrics.check_images(images)
    with pytest.raises(DiffEchoError, match="1 images: needs at least 2"):
        metrics.self_similarity(frames.images[:1])


@pytest.fixture
def drawn_set(frames, as_set, tmp_path):
    """Ten images a class with label maps, one class after the other."""
    return as_set(tmp_path / "set", np.argsort(frames.classes.numpy(), kind="stable"))


@pytest.fixture
def evaluate(drawn_set, parted_root):
    """`evaluate` of that set, with options, on six training and four validation patients: exit status."""
    given = ["evaluate", drawn_set, "--data", parted_root, "--profile", "smoke"]
    return lambda *more: main([*given, *more])


def test_evaluate_prints_writes_draws_and_sees_maps_of_other_images(
    evaluate, drawn_set, tmp_path, capsys
):
    paths = [tmp_path / "made" / name for name in ("report.json", "panel.png", "wrong.json")]
    features = ["--features", "classifier"]
    assert evaluate(*features, "--json", paths[0], "--figure", paths[1]) == 0
    printed = capsys.readouterr().out
    values = json.loads(paths[0].read_text())["values"]
    assert list(values) == [*camus.CLASS_NAMES, "all"]
    for name in ("distance", "at_infinity", "kernel", "precision", "nearest", "similarity", "dice"):
        assert name in printed and values["all"][name] is not None
        assert name == "at_infinity" or values["all"].get(f"{name}_floor", 0) is not None
    assert values["all"]["nearest"] < 0.01  # six of its ten patients are the training patients
    assert "40 images, features of the classifier" in printed
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert evaluate("--figure", tmp_path / "panel.xyz") == 1
    assert "panel.xyz: a figure ends in one of .png" in capsys.readouterr().err
    for i in range(5):
        one, other = (drawn_set / f"label_maps/{k}.png" for k in (i, 30 + i))
        pixels = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(pixels)
    assert evaluate(*features, "--json", paths[2]) == 0
    wrong = json.loads(paths[2].read_text())["values"]
    assert wrong["2CH-ED"]["dice"] < values["2CH-ED"]["dice"]


def test_evaluate_refuses_what_it_cannot_judge(evaluate, drawn_set, capsys):
    def refused(*more):
        assert evaluate(*more) == 1
        return capsys.readouterr().err

    message = refused("--split", "testing")
    assert "split=testing" in message and "{'training': 6, 'validation': 4}" in message
    (drawn_set / "label_maps/3.png").unlink()
    assert "label_maps/3.png: named in metadata.csv" in refused()
    synthetic.save_image(torch.full((1, 64, 64), 0.3), drawn_set / "images/4.png")
    message = refused()
    assert "1 of 40 images are of one grey value" in message and "images/4.png" in message
