"""Checkpoints are standard folders; damaged ones and those of another network say so."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors.torch import load_file

from diffecho_utils import DiffEchoError, models, profiles


@pytest.fixture
def saved(smoke, tmp_path):
    torch.manual_seed(0)
    vae, unet = models.build_autoencoder(smoke), models.build_unet(smoke)
    models.save_autoencoder(vae, tmp_path / "autoencoder", {"world": "phantom"})
    models.save_unconditional(unet, tmp_path / "unconditional", tmp_path / "autoencoder", {})
    return tmp_path, vae, unet


def test_stock_diffusers_loads_the_folders(saved):
    root, vae, unet = saved
    stock = AutoencoderKL.from_pretrained(root / "autoencoder", local_files_only=True)
    assert models.count_parameters(stock) == models.count_parameters(vae)
    stored = load_file(root / "autoencoder" / models.WEIGHTS)
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())
    stock = UNet2DModel.from_pretrained(root / "unconditional" / "unet", local_files_only=True)
    weights = unet.state_dict()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(tensor.float(), weights[name], atol=1e-3, rtol=1e-3)
    assert next(unet.parameters()).dtype == torch.float32, "saving must not change the model"


def test_generator_finds_its_autoencoder(saved):
    root, vae, _ = saved
    generator = models.load_unconditional(root / "unconditional")
    assert generator.latent_shape == (4, 8, 8) and not generator.unet.training
    assert next(generator.vae.parameters()).dtype == torch.float32
    moved = root / "elsewhere"
    (root / "autoencoder").rename(moved)
    with pytest.raises(DiffEchoError, match="no config.json"):
        models.load_unconditional(root / "unconditional")


def test_another_autoencoder_is_refused(saved, smoke):
    root, _, _ = saved
    models.save_autoencoder(models.build_autoencoder(smoke), root / "autoencoder", {})
    with pytest.raises(DiffEchoError, match="SHA-256 differs"):
        models.load_unconditional(root / "unconditional")


def test_damage_is_named(saved):
    root, _, _ = saved
    folder = root / "autoencoder"
    weights = folder / models.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DiffEchoError, match="half-written or missing"):
        models.load_autoencoder(folder)
    weights.unlink()
    with pytest.raises(DiffEchoError, match="half-written or missing"):
        models.load_autoencoder(folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(DiffEchoError, match="different architectures"):
        models.load_autoencoder(folder)
    (folder / "config.json").write_text(json.dumps(config)[:40])
    with pytest.raises(DiffEchoError, match="half-written"):
        models.load_autoencoder(folder)
    with pytest.raises(DiffEchoError, match="holds a UNet2DModel, expected a AutoencoderKL"):
        models.load_autoencoder(root / "unconditional" / "unet")
    with pytest.raises(DiffEchoError, match="no config.json"):
        models.load_autoencoder(root)


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_networks_fit_together(name):
    profile = profiles.get(name)
    with torch.device("meta"):
        vae, unet = models.build_autoencoder(profile), models.build_unet(profile)
    side = profile.side // models.autoencoder_factor(profile)
    assert vae.config.latent_channels == unet.config.in_channels
    assert unet.config.sample_size == side and side % 2 ** (len(profile.unet_channels) - 1) == 0
    assert profile.crop % models.autoencoder_factor(profile) == 0 and profile.crop <= profile.side


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(DiffEchoError, match="smoke, cpu, gpu, paper"):
        profiles.get("laptop")
