"""The loop: exact resume, two processes as one, the state survives, a diverging loss stops it."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffecho_utils import DiffEchoError, models, training
from diffecho_utils.profiles import Recipe

RECIPE = Recipe(steps=6, batch=4, learning_rate=1e-3, warmup=2, ema=0.9, save_every=2)


def diffusion(smoke, seed=0):
    torch.manual_seed(seed)
    return training.DiffusionObjective(models.build_unet(smoke), models.build_scheduler())


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(10, 4, 8, 8, generator=generator),
        "class_labels": torch.arange(10) % 4,
    }


def weights(objective):
    return {name: tensor.clone() for name, tensor in objective.state_dict().items()}


def distance(a, b):
    """Euclidean distance of two sets of weights. One by one they differ by how sums are rounded."""
    return sum((a[name] - b[name]).double().square().sum() for name in a).sqrt()


def test_resumed_run_ends_with_the_same_weights(smoke, latents, tmp_path):
    whole = diffusion(smoke)
    log = training.fit(whole, latents, RECIPE, tmp_path / "whole", progress=lambda line: None)
    training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "parts", stop_after=3, progress=str)
    resumed = diffusion(smoke, seed=99)  # its own weights must not matter
    said = []
    training.fit(resumed, latents, RECIPE, tmp_path / "parts", resume=True, progress=said.append)
    assert said[0] == "resumed at step 3 of 6"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    for name, tensor in load_file(tmp_path / "whole" / "state.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "parts" / "state.safetensors")[name]), name
    assert log["step"].is_monotonic_increasing and log["step"].iloc[-1] == 6


def test_gan_stage_resumes_too_and_leaves_the_encoder_alone(smoke, frames, tmp_path):
    tensors = {"images": frames.images[:8]}

    def objective():
        torch.manual_seed(0)
        vae, discriminator = models.build_autoencoder(smoke), models.build_discriminator((8, 8))
        return training.TextureObjective(vae, discriminator, 32)

    before = weights(objective())
    whole, parts = objective(), objective()
    training.fit(whole, tensors, RECIPE, None, progress=str)
    training.fit(objective(), tensors, RECIPE, tmp_path / "s", stop_after=3, progress=str)
    training.fit(parts, tensors, RECIPE, tmp_path / "s", resume=True, progress=str)
    after = weights(whole)
    for name, tensor in after.items():
        assert torch.equal(tensor, weights(parts)[name]), name
        if name.startswith("network.encoder") or name.startswith("network.quant_conv"):
            assert torch.equal(tensor, before[name]), name
    changed = [n for n in after if not torch.equal(after[n], before[n])]
    assert any(n.startswith("network.decoder") for n in changed)
    assert any(n.startswith("discriminator") for n in changed)


def test_accumulation_is_a_larger_batch(smoke, latents):
    start, large, small = diffusion(smoke), diffusion(smoke), diffusion(smoke)
    training.fit(large, latents, replace(RECIPE, batch=8), None, progress=str)
    training.fit(small, latents, replace(RECIPE, batch=4, accumulation=2), None, progress=str)
    moved = distance(weights(large), weights(start))
    assert distance(weights(large), weights(small)) < 0.02 * moved


SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from diffecho_utils import models, profiles, training
from diffecho_utils.profiles import Recipe
torch.set_num_threads(1)
torch.manual_seed(0)
objective = training.DiffusionObjective(models.build_unet(profiles.get("smoke")), models.build_scheduler())
recipe = Recipe(steps=6, batch=int(sys.argv[2]), learning_rate=1e-3, warmup=2, ema=0.9)
training.fit(objective, load_file(sys.argv[1]), recipe, None, progress=str)
from accelerate import PartialState
if PartialState().is_main_process:
    save_file(objective.state_dict(), sys.argv[3])
print("processes", PartialState().num_processes)
"""


def test_two_processes_train_what_one_with_twice_the_batch_does(smoke, latents, tmp_path):
    save_file(latents, tmp_path / "latents.safetensors")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
    ]  # gloo without GPUs
    settings = "--num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    port = "--main_process_port=0"  # any free one
    runs = {
        "one": ([sys.executable], "8"),
        "two": ([*launch, *settings.split(), port], "4"),
    }
    for name, (launcher, batch) in runs.items():
        command = [*launcher, "script.py", "latents.safetensors", batch, f"{name}.safetensors"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"processes {2 if name == 'two' else 1}" in done.stdout
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in runs)
    assert distance(one, two) < 0.02 * distance(one, weights(diffusion(smoke)))


def test_loss_falls(smoke, frames):
    torch.manual_seed(0)
    objective = training.ReconstructionObjective(models.build_autoencoder(smoke), 32)
    recipe = replace(RECIPE, steps=60, learning_rate=2e-2, batch=8)
    log = training.fit(objective, {"images": frames.images}, recipe, None, progress=str)
    assert log["loss"].iloc[-3:].mean() < 0.8 * log["loss"].iloc[:3].mean()
    assert {"l1", "spectral", "kl", "learning_rate", "images_per_second"} <= set(log.columns)


def test_diverging_loss_stops_and_keeps_the_last_state(smoke, latents, tmp_path):
    training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "s", stop_after=2, progress=str)
    good = (tmp_path / "s" / "state.safetensors").read_bytes()
    poisoned = latents | {"latents": latents["latents"] * float("nan")}
    with pytest.raises(DiffEchoError, match="the loss is nan between steps"):
        training.fit(diffusion(smoke), poisoned, RECIPE, tmp_path / "s", resume=True, progress=str)
    assert (tmp_path / "s" / "state.safetensors").read_bytes() == good


def test_unusable_states_are_named(smoke, latents, tmp_path):
    training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "s", stop_after=2, progress=str)

    def resume(objective, recipe=RECIPE):
        training.fit(objective, latents, recipe, tmp_path / "s", resume=True, progress=str)

    with pytest.raises(DiffEchoError, match=r"another \['learning_rate'\]"):
        resume(diffusion(smoke), replace(RECIPE, learning_rate=1.0))
    with pytest.raises(DiffEchoError, match="another architecture"):
        resume(diffusion(replace(smoke, unet_channels=(32, 32))))
    path = tmp_path / "s" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DiffEchoError, match="half-written or damaged"):
        resume(diffusion(smoke))


def test_interrupted_save_leaves_the_previous_state(smoke, latents, tmp_path, monkeypatch):
    training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "s", stop_after=2, progress=str)
    good = (tmp_path / "s" / "state.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(training, "save_file", full_disk)
    with pytest.raises(OSError):
        training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "s", resume=True, progress=str)
    assert (tmp_path / "s" / "state.safetensors").read_bytes() == good


def test_learning_rate_schedules():
    recipe = replace(RECIPE, steps=100, warmup=10, learning_rate=1.0)
    assert training.learning_rate(0, recipe) == pytest.approx(0.1)
    assert training.learning_rate(10, recipe) == pytest.approx(1.0)
    assert training.learning_rate(55, recipe) == pytest.approx(0.5)
    assert training.learning_rate(99, replace(recipe, schedule="constant")) == 1.0


def test_whole_training_of_both_networks(smoke, frames, tmp_path):
    training.train_autoencoder(frames, smoke, tmp_path / "ae", progress=str)
    vae = models.load_autoencoder(tmp_path / "ae")
    from diffecho_utils import data

    assert data.encode(vae, frames.images).std().item() == pytest.approx(1, rel=0.05)
    log = training.train_unconditional(frames, tmp_path / "ae", smoke, tmp_path / "u", progress=str)
    assert len(log) and models.load_unconditional(tmp_path / "u").latent_shape == (4, 8, 8)
    facts = models.read_training(tmp_path / "u")
    assert facts["world"] == "phantom" and facts["frames"] == 40 and facts["log"]["unconditional"]
    with pytest.raises(DiffEchoError, match="train an autoencoder with this profile"):
        training.train_unconditional(
            frames, tmp_path / "ae", replace(smoke, latent_channels=8), tmp_path / "v", progress=str
        )
