"""The loop: exact resume, two processes as one, the state survives, a diverging loss stops it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffecho_utils import (
    DiffEchoError,
    assets,
    camus,
    chapter,
    checkpoints,
    data,
    files,
    models,
    objectives,
    profiles,
    sampling,
    synthetic,
    training,
)
from diffecho_utils.profiles import Recipe

RECIPE = Recipe(steps=6, batch=4, learning_rate=1e-3, warmup=2, ema=0.9, save_every=2)


def diffusion(smoke, seed=0):
    torch.manual_seed(seed)
    denoiser = models.Unconditional([models.build_unconditional(smoke)])
    return objectives.DiffusionObjective(denoiser, models.build_scheduler())


def gan(smoke, seed=0):
    torch.manual_seed(seed)
    vae, discriminator = models.build_autoencoder(smoke), models.build_discriminator((8, 8))
    return objectives.TextureObjective(vae, discriminator, 32)


class Toy(torch.nn.Module):
    """An objective of `network`, of numbers (N, 256); poison: its loss, or only its gradient, from a call on."""

    def __init__(self, *layers, target=0, poison=None, calls=0):
        super().__init__()
        self.network, self.target = torch.nn.Sequential(*layers), target
        self.poison, self.left = poison, calls

    def draw(self, batch, generator):
        return {}

    def forward(self, latents):
        self.left -= 1
        loss = (self.network(latents.flatten(1)) - self.target).square().mean()
        if self.poison and not self.left:
            # The square root of zero: a finite value with an infinite slope
            nan, steep = loss * float("nan"), loss + (loss - loss.detach()).sqrt()
            return nan if self.poison == "loss" else steep, {}
        return loss, {}


def dropping(smoke, seed=0):
    torch.manual_seed(seed)
    return Toy(torch.nn.Dropout(0.5), torch.nn.Linear(256, 1))


@pytest.fixture(scope="module")
def latents():
    generator = torch.Generator().manual_seed(1)
    return {"latents": torch.randn(10, 4, 8, 8, generator=generator)}


def weights(objective):
    return {name: tensor.clone() for name, tensor in objective.state_dict().items()}


def distance(a, b):
    """Euclidean distance of two sets of weights. One by one they differ by how sums are rounded."""
    return sum((a[name] - b[name]).double().square().sum() for name in a).sqrt()


def interrupt(objective, tensors, state, at, recipe=RECIPE):
    """Interrupt a run of `fit` after step `at`, as Ctrl-C does; returns what it said."""
    said = []

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.fit(objective, tensors, recipe, state, say=said.append, watch=({at}, stop))
    return said


@pytest.mark.parametrize("build", (diffusion, gan, dropping))
def test_resumed_run_ends_with_the_same_weights(build, smoke, latents, frames, tmp_path):
    """What a network draws itself, as for dropout, is a function of seed and step, too."""
    tensors = {"images": frames.images[:8]} if build is gan else latents
    whole, other = build(smoke), build(smoke)
    log = training.fit(whole, tensors, RECIPE, tmp_path / "whole", say=str)
    training.fit(other, tensors, RECIPE, None, say=str, seed=1)
    said = interrupt(build(smoke), tensors, tmp_path / "parts", at=3)
    assert "interrupted at step 3" in said[-1] and "parts keeps step 2" in said[-1]
    resumed, said = build(smoke, seed=99), []  # its own weights must not matter
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training.fit(resumed, tensors, RECIPE, tmp_path / "parts", say=said.append)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers were used"
    assert said[0] == "resumed at step 2 of 6"
    assert (
        distance(weights(whole), weights(resumed)) == 0 < distance(weights(whole), weights(other))
    )
    states = [load_file(tmp_path / name) for name in ("whole", "parts")]
    assert distance(*states) == 0
    assert log["step"].is_monotonic_increasing and log["step"].iloc[-1] == 6


def test_gan_stage_leaves_the_encoder_alone(smoke, frames):
    before, objective = gan(smoke).state_dict(), gan(smoke)
    training.fit(objective, {"images": frames.images[:8]}, RECIPE, None, say=str)
    after = objective.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert not any(n.startswith(("network.encoder", "network.quant_conv")) for n in changed)
    for moved in ("network.decoder", "discriminator"):
        assert any(name.startswith(moved) for name in changed)


def test_batch_statistics_are_of_the_averaged_weights(latents):
    """On the way as at the end: what the network's normalisation expects is what its weights give."""

    def toy():
        torch.manual_seed(0)
        layers = torch.nn.Linear(256, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)
        return Toy(*layers, target=5)

    latents = {"latents": latents["latents"][:8]}  # two batches are all
    objective, plain, gaps = toy(), toy(), []

    def look(step=None):
        linear, norm, _ = objective.network
        given = linear(latents["latents"].flatten(1))
        gaps.append((norm.running_mean - given.mean(0)).abs().max().item())

    recipe = replace(RECIPE, steps=60, learning_rate=0.03)
    training.fit(plain, latents, recipe, None, say=str)
    training.fit(objective, latents, recipe, None, say=str, watch=({20, 40}, look))
    look()
    assert len(gaps) == 3 and max(gaps) < 1e-4
    assert distance(weights(plain), weights(objective)) == 0, "looking changed the training"


def test_accumulation_is_a_larger_batch(smoke, latents):
    start, large, small = diffusion(smoke), diffusion(smoke), diffusion(smoke)
    training.fit(large, latents, replace(RECIPE, batch=8), None, say=str)
    training.fit(small, latents, replace(RECIPE, batch=4, accumulation=2), None, say=str)
    moved = distance(weights(large), weights(start))
    assert distance(weights(large), weights(small)) < 0.02 * moved


SCRIPT = """
import sys, torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from diffecho_utils import models, objectives, profiles, training
from diffecho_utils.profiles import Recipe
torch.set_num_threads(1)
torch.manual_seed(0)
denoiser = models.Unconditional([models.build_unconditional(profiles.get("smoke"))])
objective = objectives.DiffusionObjective(denoiser, models.build_scheduler())
recipe = Recipe(steps=6, batch=int(sys.argv[1]), learning_rate=1e-3, warmup=2, ema=0.9)
training.fit(objective, load_file("latents.safetensors"), recipe, None, say=str)
if PartialState().is_main_process:
    save_file(objective.state_dict(), sys.argv[2])
print("processes", PartialState().num_processes)
"""


def test_processes_and_precision(smoke, latents, tmp_path):
    """Two processes train what one with twice the batch does; `--mixed_precision bf16` overrules no recipe."""
    save_file(latents, tmp_path / "latents.safetensors")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1"  # gloo
    launch += " --mixed_precision=no --dynamo_backend=no --main_process_port=0"  # any free port
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    runs = {
        "one": ("", "8", {}),
        "mixed": ("", "8", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        "two": (launch, "4", {}),
    }
    for name, (launcher, batch, given) in runs.items():
        command = [sys.executable, *launcher.split(), "script.py", batch, name]
        how = {"cwd": tmp_path, "env": os.environ | path | given}
        done = subprocess.run(command, **how, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"processes {2 if name == 'two' else 1}" in done.stdout
    one, mixed, two = (load_file(tmp_path / name) for name in runs)
    assert distance(one, mixed) == 0
    assert distance(one, two) < 0.02 * distance(one, weights(diffusion(smoke)))


def test_loss_falls(smoke, frames):
    torch.manual_seed(0)
    objective = objectives.ReconstructionObjective(models.build_autoencoder(smoke), 32)
    recipe = replace(RECIPE, steps=60, learning_rate=2e-2, batch=8)
    log = training.fit(objective, {"images": frames.images}, recipe, None, say=str)
    assert log["loss"].iloc[-3:].mean() < 0.8 * log["loss"].iloc[:3].mean()
    assert {"l1", "spectral", "kl", "learning_rate", "images_per_second"} <= set(log.columns)


@pytest.mark.parametrize("step", (3, 4), ids=("before a save", "in the step that is saved"))
@pytest.mark.parametrize("what", ("loss", "gradient norm"))
def test_what_is_not_finite_stops_and_keeps_the_last_state(latents, tmp_path, step, what):
    torch.manual_seed(0)
    said = f"the {what} is (nan|inf) between steps [34] and {step}"
    with pytest.raises(DiffEchoError, match=said):
        poisoned = Toy(torch.nn.Linear(256, 1), poison=what, calls=step)
        training.fit(poisoned, latents, RECIPE, tmp_path / "s", say=str)
    facts, tensors = training._read_state(tmp_path / "s")
    assert facts["step"] == 2 and all(t.isfinite().all() for t in tensors.values())


def test_unusable_states_are_named(smoke, latents, tmp_path):
    path = tmp_path / "s"
    interrupt(diffusion(smoke), latents, path, at=3)
    whole = path.read_bytes()
    other = diffusion(replace(smoke, unconditional_channels=(32, 32)))
    cases = {
        r"another learning_rate \(0.001, now 1.0\)": {"recipe": replace(RECIPE, learning_rate=1.0)},
        "another architecture": {"objective": other},
    }
    run = {"objective": diffusion(smoke), "tensors": latents, "recipe": RECIPE, "state": path}
    for said, changed in cases.items():
        with pytest.raises(DiffEchoError, match=said):
            training.fit(**run | {"say": str} | changed)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:1000])
    with pytest.raises(DiffEchoError, match="damaged"):
        training.fit(**run, say=str)
    path.write_bytes(whole)
    said = []
    training.fit(**run, restart=True, say=said.append)
    assert "resumed" not in said[0] and path.read_bytes() != whole


def test_interrupted_before_the_first_save_names_no_state(smoke, latents, tmp_path):
    said = interrupt(diffusion(smoke), latents, tmp_path / "s", at=1)
    assert said == ["interrupted at step 1; nothing was saved before it"]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "failure", (OSError(28, "no space left on device"), SafetensorError("No space left")), ids=type
)
def test_interrupted_save_leaves_the_previous_state(smoke, latents, tmp_path, monkeypatch, failure):
    """A full disk and a kill in the middle of the file: the one name holds the old state or the new."""
    interrupt(diffusion(smoke), latents, tmp_path / "s", at=3)
    good = (tmp_path / "s").read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(good[:1000])
        raise failure

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(OSError, match="(?i)no space left"):
        training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "s", say=str)
    assert (tmp_path / "s").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_learning_rate_schedules():
    recipe = replace(RECIPE, steps=100, warmup=10, learning_rate=1.0)
    rates = [training.learning_rate(step, recipe) for step in (0, 10, 55)]
    assert rates == pytest.approx([0.1, 1.0, 0.5])
    assert training.learning_rate(99, replace(recipe, schedule="constant")) == 1.0


def test_every_model_trains_and_says_how(trained, frames):
    vae = checkpoints.load_autoencoder(trained["autoencoder"])
    assert data.encode(vae, frames.images).std().item() == pytest.approx(1, rel=0.05)
    made = {model: checkpoints.read_training(folder) for model, folder in trained.items()}
    for model, facts in made.items():
        assert facts["model"] == model and facts["world"] == "phantom" and facts["frames"] == 40
        assert facts["processes"] == 1 and facts["side"] == 64
        assert set(facts["needs"]) == set(training.MODELS[model])
        assert all(rows[-1]["step"] == 4 for rows in facts["log"].values())
    assert set(made["unconditional"]["recipes"]) == {"shared", *camus.CLASS_NAMES}
    one, four = (checkpoints.training_curve(made["sdm"] | {"processes": n}, "sdm") for n in (1, 4))
    assert (four["images"] == 4 * one["images"]).all()


@pytest.mark.parametrize("model", models.GENERATORS)
def test_every_generator_samples_what_it_is_told(trained, frames, model):
    generator = checkpoints.load_generator(trained[model])
    assert generator.latent_shape == (4, 8, 8) and not generator.denoiser.training
    table, masks = synthetic.plan(model, 1, frames)
    given = {"classes": range(4), "prompts": table["prompt"].tolist(), "masks": masks}
    given = {name: given[name] for name in sampling.CONDITIONS[model]}
    images = sampling.sample(generator, range(4), 3, guidance=2, **given)
    alone = {name: values[2:3] for name, values in given.items()}
    alone = sampling.sample(generator, [2], 3, guidance=2, **alone)
    assert images.shape == (4, 1, 64, 64)
    torch.testing.assert_close(images[2:3], alone, atol=1e-4, rtol=0)


def test_the_null_condition_is_the_shared_network_and_the_text_model_without_its_controlnet(
    trained,
):
    noisy, times = torch.randn(2, 4, 8, 8), torch.full((2,), 500)
    four, text, both = (
        checkpoints.load_generator(trained[name]).denoiser
        for name in ("unconditional", "text", "text-seg")
    )
    unknown = four(noisy, times, classes=torch.full((2,), -1))
    assert torch.equal(unknown, four.shared(noisy, times).sample)
    assert not torch.equal(unknown, four(noisy, times, classes=torch.zeros(2, dtype=int)))
    words, masks = torch.randn(2, 48, 32), torch.ones(2, 64, 64, dtype=torch.uint8)
    alone = text(noisy, times, text=words)
    unlabelled = torch.tensor([True, False])
    for rows in (unlabelled, ~unlabelled):
        mixed = both(noisy, times, text=words, masks=masks, unlabelled=rows)
        torch.testing.assert_close(mixed[rows], alone[rows])
        assert not torch.allclose(mixed[~rows], alone[~rows])


def test_guidance_weighs_against_what_the_generator_calls_null(trained, frames):
    """The words alone, as stock pipelines do, or the map as well, or no map and the opposite words."""
    both, masks = checkpoints.load_generator(trained["text-seg"]), frames.masks[:2]
    said, other = ["two-chamber view", "es phase"], ["four-chamber view", "ed phase"]
    told = {"prompts": said, "masks": masks, "decoded": False}
    noise, last = sampling.initial_noise([1, 2], both.latent_shape), torch.full((2,), 999)
    words, none, other = map(both.text, (said, ["", ""], other))
    alpha_bar = both.scheduler.alphas_cumprod[-1]
    given = both.denoiser(noise, last, text=words, masks=masks)
    nulls = {
        "words": both.denoiser(noise, last, text=none, masks=masks),
        "all": both.denoiser.unet(noise, last, none).sample,
        "opposite": both.denoiser.unet(noise, last, other).sample,
    }
    for null, without in nulls.items():
        drawn = sampling.sample(replace(both, null=null, guidance=2.0), [1, 2], 1, **told)
        velocity = without + 2 * (given - without)
        clean = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * velocity
        torch.testing.assert_close(drawn, clean.detach(), atol=1e-3, rtol=0)
    digests = {synthetic.digest(replace(both, null=null)) for null in nulls}
    assert len(digests) == 3 and synthetic.digest(both) in digests


def test_a_network_of_all_classes_comes_first_where_the_profile_has_one(
    smoke, frames, trained, tmp_path
):
    needs = {"autoencoder": trained["autoencoder"]}
    alone = replace(smoke, shared=None)
    assert set(profiles.recipes(alone, "unconditional")) == {"unconditional"}
    training.train("unconditional", frames, alone, tmp_path / "four", needs=needs, say=str)
    generator = checkpoints.load_generator(tmp_path / "four")
    with pytest.raises(DiffEchoError, match="no network of all classes"):
        sampling.sample(generator, [0], 2, guidance=1.5, classes=[0])
    weights = checkpoints.weights_digest(tmp_path / "four")
    assert weights != checkpoints.weights_digest(trained["unconditional"])


def test_pairs_are_what_one_exact_step_of_ddim_joins(trained, frames):
    """With the noise that `pairs` gives, the true velocity at the last timestep leads to the picture."""
    sdm = checkpoints.load_generator(trained["sdm"])
    seeds, masks = range(3), frames.masks[:3]
    pairs = sampling.pairs(sdm, seeds, 2, guidance=1.5, masks=masks)
    shown = sampling.sample(sdm, seeds, 2, guidance=1.5, masks=masks)
    torch.testing.assert_close(data.decode(sdm.vae, pairs["latents"]), shown)
    last = torch.full((3,), sdm.scheduler.config.num_train_timesteps - 1)
    begun = sdm.scheduler.add_noise(pairs["latents"], pairs["noise"], last)
    torch.testing.assert_close(begun, sampling.initial_noise(seeds, sdm.latent_shape))

    class Straight(torch.nn.Module):
        def forward(self, noisy, timesteps, masks):
            return sdm.scheduler.get_velocity(pairs["latents"], pairs["noise"], timesteps)

    ideal = replace(sdm, denoiser=Straight().eval())
    ideal.denoiser.register_parameter("nothing", torch.nn.Parameter(torch.zeros(())))
    for steps in (1, 2, 4):
        drawn = sampling.sample(ideal, seeds, steps, masks=masks, decoded=False)
        torch.testing.assert_close(drawn, pairs["latents"], atol=1e-3, rtol=0)


def test_reflow_learns_what_the_teacher_makes_of_each_noise(smoke, trained, frames):
    """Its loss falls to where one step lands nearer to the teacher's picture than the teacher's own step."""
    sdm = checkpoints.load_generator(trained["sdm"])
    masks = frames.masks[:4]
    pairs = sampling.pairs(sdm, range(4), 8, masks=masks)
    before = sampling.sample(sdm, range(4), 1, masks=masks, decoded=False)
    objective = objectives.ReflowObjective(sdm.denoiser.requires_grad_(True), sdm.scheduler)
    recipe = replace(smoke.reflow, steps=60, learning_rate=3e-3, ema=0.9)
    log = training.fit(objective, pairs | {"masks": masks}, recipe, None, say=str)
    after = sampling.sample(sdm, range(4), 1, masks=masks, decoded=False)
    gaps = [(x - pairs["latents"]).square().mean() for x in (before, after)]
    assert gaps[1] < 0.7 * gaps[0] and log["loss"].iloc[-1] < log["loss"].iloc[0]


def test_a_student_is_drawn_as_its_teacher_and_with_the_small_decoder(trained, frames, tmp_path):
    student = checkpoints.load_generator(trained["sdm-student"])
    small = checkpoints.load_generator(trained["sdm-student"], decoder=trained["small-decoder"])
    masks = frames.masks[:2]
    images, others = (sampling.sample(g, [1, 2], 1, masks=masks) for g in (student, small))
    assert student.model == "sdm" and images.shape == others.shape and small.side == student.side
    assert not torch.equal(images, others)
    foreign = shutil.copytree(trained["autoencoder"], tmp_path / "autoencoder")
    weights = load_file(foreign / checkpoints.WEIGHTS)
    save_file({k: v + 1 for k, v in weights.items()}, foreign / checkpoints.WEIGHTS)
    training.train(
        "sdm",
        frames,
        profiles.get("smoke"),
        tmp_path / "sdm",
        needs={"autoencoder": foreign},
        say=str,
    )
    with pytest.raises(DiffEchoError, match="latents of another autoencoder.*--decoder"):
        checkpoints.load_generator(tmp_path / "sdm", decoder=trained["small-decoder"])


def test_small_decoder_is_asked_to_be_as_lively_everywhere():
    vae = torch.nn.ModuleDict({"encoder": torch.nn.Identity()})
    vae.decode = lambda latents: SimpleNamespace(sample=latents)  # the picture itself
    objective, rng = objectives.DecoderObjective(vae), torch.Generator().manual_seed(0)
    bright = torch.rand(2, 1, 64, 64, generator=rng) - 0.5
    bright[..., 32:] *= 0.2
    images = ((bright + 1) * 127.5).round().byte()
    same, faint, moved = (
        objective(x, images)[1]["deviation"] for x in (bright, 0.75 * bright, bright.flip(-1))
    )
    turned = objective(bright.flip(-2), images)[1]["deviation"]  # other pixels, as lively
    assert same < 1e-3 and turned < 0.2 * faint and moved > 2 * faint


def test_text_model_stays_frozen_under_its_controlnet(trained):
    text, both = (checkpoints.load_generator(trained[name]) for name in ("text", "text-seg"))
    for name, tensor in text.denoiser.unet.state_dict().items():
        assert torch.equal(tensor, both.denoiser.unet.state_dict()[name]), name
    moved = both.denoiser.controlnet.controlnet_mid_block.weight.abs().max()
    assert moved > 0, "the zero convolutions have learned nothing"


def test_conditions_are_dropped_for_guidance():
    """With dropout 1 the denoiser sees the null prompt and the empty label map, whatever it is given."""

    class Recorder(torch.nn.Module):
        def forward(self, noisy, timesteps, **given):
            self.given = given
            return noisy

    def given(dropout, states=None, **batch):
        batch["latents"] = torch.randn(3, 4, 8, 8)
        recorder, scheduler = Recorder(), models.build_scheduler()
        objective = objectives.DiffusionObjective(recorder, scheduler, states, dropout)
        objective(**batch, **objective.draw(batch, torch.Generator().manual_seed(0)))
        return recorder.given

    for dropout, rows in ((1.0, {0.0}), (0.0, {1.0, 2.0})):
        states, ids = torch.arange(3.0).view(3, 1, 1), torch.tensor([[1, 2]] * 3)
        assert set(given(dropout, states, prompts=ids)["text"].flatten().tolist()) <= rows
    masks = torch.ones(3, 64, 64, dtype=torch.uint8)
    assert given(1.0, masks=masks)["unlabelled"].all()


def test_min_snr_weighs_as_published(smoke):
    """Hang et al. 2023: min(SNR, gamma) / (SNR + 1) for v-prediction, here at a single timestep."""
    scheduler = models.build_scheduler()
    torch.manual_seed(0)
    unet = models.Unconditional([models.build_unconditional(smoke)])
    plain, weighted = (
        objectives.DiffusionObjective(unet, scheduler, snr_gamma=gamma) for gamma in (None, 5.0)
    )
    latents, noise = torch.randn(2, 2, 4, 8, 8).unbind(0)
    for t in (10, 500, 990):
        drawn = dict(noise=noise, timesteps=torch.full((2,), t), dropped=torch.zeros(2, dtype=bool))
        alpha_bar = scheduler.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        ratio = weighted(latents, **drawn)[0] / plain(latents, **drawn)[0]
        torch.testing.assert_close(ratio, snr.clamp(max=5.0) / (snr + 1))


def test_missing_and_foreign_parts_are_named(smoke, frames, trained, tmp_path):
    run = {"needs": {"autoencoder": trained["autoencoder"]}, "say": str}
    other = replace(smoke, latent_channels=8)
    for model, profile, changed, said in (
        ("gan", smoke, {}, "no model 'gan'; train one of autoencoder, clip"),
        ("text", smoke, {}, r"text builds on \['clip'\]"),
        ("unconditional", other, {}, "train an autoencoder with this profile"),
        ("clip", smoke, {"start": trained["classifier"]}, "weights fit this network"),
    ):
        with pytest.raises(DiffEchoError, match=said):
            training.train(model, frames, profile, tmp_path, **run | changed)
    said = []
    with pytest.raises(DiffEchoError, match="training.json: missing"):
        training.train("segmenter", frames, smoke, tmp_path, start=tmp_path, say=said.append)
    assert not said, "noticed before the training"


def still(smoke, *rows):
    """The profile whose `rows` move no weights."""
    return replace(smoke, **{r: replace(getattr(smoke, r), learning_rate=0.0) for r in rows})


def network(model, folder):
    """The weights of a checkpoint of `model`."""
    if model in models.GENERATORS:
        return checkpoints.load_generator(folder).denoiser.state_dict()
    return checkpoints.load_network(folder).state_dict()


@pytest.mark.parametrize("model", ("segmenter", "unconditional", "text-seg"))
def test_start_is_where_training_begins(smoke, frames, trained, tmp_path, model):
    """Fine-tuning begins at the checkpoint's weights, in each network that the model has."""
    needs = {name: trained[name] for name in training.MODELS[model]}
    profile = still(smoke, *profiles.recipes(smoke, model))
    start = {"needs": needs, "start": trained[model], "say": str}
    training.train(model, frames, profile, tmp_path, **start)
    assert distance(network(model, trained[model]), network(model, tmp_path)) == 0
    assert checkpoints.read_training(tmp_path)["started_from"]["model"] == model


def test_start_counts_once_for_a_network_of_two_stages(smoke, frames, trained, tmp_path):
    moving = replace(smoke.reconstruction, steps=8)
    profile = replace(still(smoke, "texture"), reconstruction=moving)
    start = trained["autoencoder"]
    training.train("autoencoder", frames, profile, tmp_path, start=start, say=str)
    before, after = (checkpoints.load_autoencoder(folder) for folder in (start, tmp_path))
    assert distance(before.state_dict(), after.state_dict()) > 0, "the first stage was thrown away"


def test_start_counts_for_networks_that_have_no_state_yet(smoke, frames, trained, tmp_path):
    """Interrupted in the second of four networks: the others still start from the checkpoint."""
    said = []

    def stop(line):
        said.append(line)
        if sum(line.startswith("step") for line in said) == 5:  # four lines a network here
            raise KeyboardInterrupt

    model, profile = "unconditional", still(smoke, "shared", "unconditional")
    run = {"needs": {"autoencoder": trained["autoencoder"]}, "start": trained[model]}
    with pytest.raises(KeyboardInterrupt):
        training.train(model, frames, profile, tmp_path, say=stop, **run)
    training.train(model, frames, profile, tmp_path, say=said.append, **run)
    assert any("resumed at step 4 of 4" in line for line in said)
    assert distance(network(model, trained[model]), network(model, tmp_path)) == 0


def test_minutes_become_a_number_of_steps(smoke, frames, tmp_path):
    said, long = [], replace(smoke, segmenter=replace(smoke.segmenter, steps=100_000))
    run = {"model": "segmenter", "frames": frames, "profile": long, "folder": tmp_path}
    training.train(**run, minutes=0.05, say=said.append)
    steps = checkpoints.read_training(tmp_path)["recipes"]["segmenter"]["steps"]
    assert said[0] == f"segmenter: {steps} steps fit in 0.05 minutes" and steps < 100_000
    training.train(**run, minutes=5.0, say=said.append)
    assert said[-1] == f"resumed at step {steps} of {steps}", "a resumed run keeps its steps"


def test_pixels_instead_of_latents_as_the_paper_does(smoke, frames, tmp_path):
    """No autoencoder, the noise predicted, and the weights still make whole images."""
    recipe = replace(smoke.unconditional, prediction="epsilon")
    pixels = replace(smoke, unconditional_pixels=32, unconditional=recipe)
    training.train("unconditional", frames, pixels, tmp_path / "u", say=str)
    generator = checkpoints.load_generator(tmp_path / "u")
    assert generator.vae is None and generator.latent_shape == (1, 32, 32)
    assert generator.scheduler.config.prediction_type == "epsilon"
    images = sampling.sample(generator, range(4), 3, classes=range(4))
    assert images.shape == (4, 1, 32, 32) and images.abs().max() <= 1
    assert images.flatten(1).std(1).min() > 0


def test_out_of_memory_says_what_to_lower_and_other_errors_are_themselves(latents, tmp_path):
    """PyTorch's own words for it on a CPU, asked for a tensor that no machine has room for."""

    class Huge(torch.nn.Module):
        def forward(self, latents):
            return torch.empty(2**60, 1)

    said = "out of memory in step 1 with 4 images at once on cpu; halve the batch"
    with pytest.raises(DiffEchoError, match=said):
        training.fit(Toy(torch.nn.Linear(256, 1), Huge()), latents, RECIPE, tmp_path / "s", say=str)
    with pytest.raises(RuntimeError, match="shapes"):
        training.fit(Toy(torch.nn.Linear(255, 1)), latents, RECIPE, None, say=str)


def test_chapters_train_from_scratch_once(smoke, phantom_root, tmp_path, monkeypatch):
    """On the shipped autoencoder, whatever the profile's side; the second call only names the folder."""
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path)
    table, said = camus.read_table(phantom_root), []
    folder = chapter.from_scratch("sdm", table, smoke, say=said.append)
    assert folder.match("trained/phantom-smoke-*/sdm") and said
    generator = checkpoints.load_generator(folder)
    shipped = checkpoints.load_generator(assets.checkpoint("camus", "sdm"))
    assert generator.latent_shape == shipped.latent_shape
    made = checkpoints.read_training(folder)
    assert made["world"] == "phantom" and made["patients"] == 6 and made["profile"] == "smoke"
    said.clear()
    assert chapter.from_scratch("sdm", table, smoke, say=said.append) == folder
    assert not said


def test_a_run_goes_on_only_with_what_it_was_made_from(smoke, frames, trained, tmp_path):
    """Another folder, seed, world, split, autoencoder, stretching or setting is another run."""
    other = data.Frames(frames.images, frames.masks.flip(0), frames.table)

    def told(**attrs):
        table = frames.table.assign(split=attrs.pop("split", frames.table["split"]))
        table.attrs = frames.table.attrs | attrs
        return data.Frames(frames.images, frames.masks, table)

    folder, autoencoder = tmp_path / "run", shutil.copytree(trained["autoencoder"], tmp_path / "ae")
    run = {"needs": {"autoencoder": autoencoder}, "say": str}
    training.train("sdm", frames, smoke, folder, **run)
    whole = (folder / "state" / "sdm.safetensors").read_bytes()
    cases = {
        "frames": (other, {}),
        "seed": (frames, {"seed": 1}),
        "world": (told(world="camus"), {}),
        "stretched": (told(stretched=True), {}),
        "splits": (told(split="validation"), {}),
        "settings": (frames, {"dropout": 0.5}),
        "start": (frames, {"start": trained["sdm"]}),
        "autoencoder": (frames, {}),
    }
    for name, (given, changed) in cases.items():
        if name == "autoencoder":  # last: from now on it is another one
            tensors = load_file(autoencoder / checkpoints.WEIGHTS)
            tensors["decoder.conv_in.bias"] += 1
            save_file(tensors, autoencoder / checkpoints.WEIGHTS)
        with pytest.raises(DiffEchoError, match=f"another {name} .*; repeat that command"):
            training.train("sdm", given, smoke, folder, **run | changed)
    assert (folder / "state" / "sdm.safetensors").read_bytes() == whole
    training.train("sdm", frames, smoke, folder, **run | {"seed": 1, "restart": True})
    assert checkpoints.read_training(folder)["seed"] == 1


def test_classes_without_frames_are_left_out(smoke, frames, trained, tmp_path):
    one_view = frames.where(frames.table["view"] == "4CH")
    needs = {"autoencoder": trained["autoencoder"]}
    training.train("unconditional", one_view, smoke, tmp_path, needs=needs, say=str)
    generator = checkpoints.load_generator(tmp_path)
    assert generator.classes == (2, 3)
    assert sampling.sample(generator, [0, 1], 2, classes=[2, 3]).shape == (2, 1, 64, 64)
    with pytest.raises(DiffEchoError, match="trained without frames of 2CH-ED"):
        sampling.sample(generator, [0], 2, classes=[0])
    table, _ = synthetic.plan("unconditional", 2, classes=generator.classes)
    assert table["view"].tolist() == ["4CH"] * 4
