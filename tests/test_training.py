"""The loop: exact resume, two processes as one, the state survives, a diverging loss stops it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

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
        training.fit(objective, tensors, recipe, state, progress=said.append, watch=({at}, stop))
    return said


def test_resumed_run_ends_with_the_same_weights(smoke, latents, tmp_path):
    whole = diffusion(smoke)
    log = training.fit(whole, latents, RECIPE, tmp_path / "whole", progress=lambda line: None)
    said = interrupt(diffusion(smoke), latents, tmp_path / "parts", at=3)
    assert "interrupted at step 3" in said[-1] and "parts keeps step 2" in said[-1]
    resumed, said = diffusion(smoke, seed=99), []  # its own weights must not matter
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training.fit(resumed, latents, RECIPE, tmp_path / "parts", progress=said.append)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers were used"
    assert said[0] == "resumed at step 2 of 6"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    for name, tensor in load_file(tmp_path / "whole").items():
        assert torch.equal(tensor, load_file(tmp_path / "parts")[name]), name
    assert log["step"].is_monotonic_increasing and log["step"].iloc[-1] == 6


def test_gan_stage_resumes_too_and_leaves_the_encoder_alone(smoke, frames, tmp_path):
    tensors = {"images": frames.images[:8]}

    def objective():
        torch.manual_seed(0)
        vae, discriminator = models.build_autoencoder(smoke), models.build_discriminator((8, 8))
        return objectives.TextureObjective(vae, discriminator, 32)

    before = weights(objective())
    whole, parts = objective(), objective()
    training.fit(whole, tensors, RECIPE, None, progress=str)
    interrupt(objective(), tensors, tmp_path / "s", at=3)
    training.fit(parts, tensors, RECIPE, tmp_path / "s", progress=str)
    after = weights(whole)
    for name, tensor in after.items():
        assert torch.equal(tensor, weights(parts)[name]), name
        if name.startswith("network.encoder") or name.startswith("network.quant_conv"):
            assert torch.equal(tensor, before[name]), name
    changed = [n for n in after if not torch.equal(after[n], before[n])]
    assert any(n.startswith("network.decoder") for n in changed)
    assert any(n.startswith("discriminator") for n in changed)


def test_batch_statistics_are_of_the_averaged_weights(latents):
    """On the way as at the end: what the network's normalisation expects is what its weights give."""

    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layers = torch.nn.Linear(256, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)
            self.network = torch.nn.Sequential(*layers)

        def draw(self, batch, generator):
            return {}

        def forward(self, latents):
            return (self.network(latents.flatten(1)) - 5).square().mean(), {}

    latents = {"latents": latents["latents"][:8]}  # two batches are all
    objective, gaps = Normalised(), []

    def look(step=None):
        linear, norm, _ = objective.network
        given = linear(latents["latents"].flatten(1))
        gaps.append((norm.running_mean - given.mean(0)).abs().max().item())

    recipe = replace(RECIPE, steps=60, learning_rate=0.03)
    plain = Normalised()
    training.fit(plain, latents, recipe, None, progress=str)
    training.fit(objective, latents, recipe, None, progress=str, watch=({20, 40}, look))
    look()
    assert max(gaps) < 1e-4
    assert distance(weights(plain), weights(objective)) == 0, "looking changed the training"


def test_accumulation_is_a_larger_batch(smoke, latents):
    start, large, small = diffusion(smoke), diffusion(smoke), diffusion(smoke)
    training.fit(large, latents, replace(RECIPE, batch=8), None, progress=str)
    training.fit(small, latents, replace(RECIPE, batch=4, accumulation=2), None, progress=str)
    moved = distance(weights(large), weights(start))
    assert distance(weights(large), weights(small)) < 0.02 * moved


SCRIPT = """
import sys, torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from diffecho_utils import models, objectives, profiles, training
from diffecho_utils.profiles import Recipe
torch.set_num_threads(1)
torch.manual_seed(0)
denoiser = models.Unconditional([models.build_unconditional(profiles.get("smoke"))])
objective = objectives.DiffusionObjective(denoiser, models.build_scheduler())
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
    objective = objectives.ReconstructionObjective(models.build_autoencoder(smoke), 32)
    recipe = replace(RECIPE, steps=60, learning_rate=2e-2, batch=8)
    log = training.fit(objective, {"images": frames.images}, recipe, None, progress=str)
    assert log["loss"].iloc[-3:].mean() < 0.8 * log["loss"].iloc[:3].mean()
    assert {"l1", "spectral", "kl", "learning_rate", "images_per_second"} <= set(log.columns)


class Poisoned(torch.nn.Module):
    """An objective whose loss, or only its gradient, is not finite in one step."""

    def __init__(self, step, loss):
        super().__init__()
        self.network, self.left, self.poison = torch.nn.Linear(2, 1), step, loss

    def draw(self, batch, generator):
        return {}

    def forward(self, latents):
        self.left -= 1
        answer = self.network(latents.flatten(1)[:, :2]).square().mean()
        if self.left:
            return answer, {}
        if self.poison:
            return answer * float("nan"), {}
        # The square root of zero: a finite value with an infinite slope
        return answer + (answer - answer.detach()).sqrt(), {}


@pytest.mark.parametrize("step", (3, 4), ids=("before a save", "in the step that is saved"))
@pytest.mark.parametrize("what", ("loss", "gradient norm"))
def test_what_is_not_finite_stops_and_keeps_the_last_state(latents, tmp_path, step, what):
    torch.manual_seed(0)
    with pytest.raises(
        DiffEchoError, match=f"the {what} is (nan|inf) between steps [34] and {step}"
    ):
        training.fit(Poisoned(step, what == "loss"), latents, RECIPE, tmp_path / "s", progress=str)
    facts, tensors = training._read_state(tmp_path / "s", with_tensors=True)
    assert facts["step"] == 2 and all(t.isfinite().all() for t in tensors.values())


def test_networks_with_dropout_resume_exactly(latents, tmp_path):
    """What a network draws itself is a function of seed and step, too."""

    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.network = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(256, 1))

        def draw(self, batch, generator):
            return {}

        def forward(self, latents):
            return self.network(latents.flatten(1)).square().mean(), {}

    whole, parts, other = Dropped(), Dropped(), Dropped()
    training.fit(whole, latents, RECIPE, None, progress=str)
    interrupt(Dropped(), latents, tmp_path / "s", at=3)
    training.fit(parts, latents, RECIPE, tmp_path / "s", progress=str)
    training.fit(other, latents, RECIPE, None, progress=str, seed=1)
    assert distance(weights(whole), weights(parts)) == 0 < distance(weights(whole), weights(other))


def test_unusable_states_are_named(smoke, latents, tmp_path):
    path = tmp_path / "s"
    interrupt(diffusion(smoke), latents, path, at=3)
    whole = path.read_bytes()

    def go_on(objective, recipe=RECIPE, **changed):
        training.fit(objective, latents, recipe, path, progress=str, **changed)

    with pytest.raises(DiffEchoError, match=r"another learning_rate \(0.001, now 1.0\)"):
        go_on(diffusion(smoke), replace(RECIPE, learning_rate=1.0))
    with pytest.raises(DiffEchoError, match=r"another seed \(0, now 3\); repeat that command"):
        go_on(diffusion(smoke), seed=3)
    with pytest.raises(DiffEchoError, match=r"another world \(None, now camus\)"):
        go_on(diffusion(smoke), made_from={"world": "camus"})
    with pytest.raises(DiffEchoError, match="another architecture"):
        go_on(diffusion(replace(smoke, unconditional_channels=(32, 32))))
    assert path.read_bytes() == whole
    path.write_bytes(whole[:1000])
    with pytest.raises(DiffEchoError, match="damaged"):
        go_on(diffusion(smoke))
    path.write_bytes(whole)
    said = []
    training.fit(diffusion(smoke), latents, RECIPE, path, restart=True, progress=said.append)
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
        training.fit(diffusion(smoke), latents, RECIPE, tmp_path / "s", progress=str)
    assert (tmp_path / "s").read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_learning_rate_schedules():
    recipe = replace(RECIPE, steps=100, warmup=10, learning_rate=1.0)
    assert training.learning_rate(0, recipe) == pytest.approx(0.1)
    assert training.learning_rate(10, recipe) == pytest.approx(1.0)
    assert training.learning_rate(55, recipe) == pytest.approx(0.5)
    assert training.learning_rate(99, replace(recipe, schedule="constant")) == 1.0


@pytest.fixture(scope="module")
def trained(smoke, frames, tmp_path_factory):
    """Every model of the engine, trained for a moment on the phantom: {model: folder}."""
    root = tmp_path_factory.mktemp("trained")
    folders = {model: root / model for model in training.MODELS}
    for model, needs in training.MODELS.items():
        built_on = {name: folders[name] for name in needs}
        training.train(model, frames, smoke, folders[model], needs=built_on, progress=str)
    return folders


def test_every_model_trains_and_says_how(trained, frames):
    vae = checkpoints.load_autoencoder(trained["autoencoder"])
    assert data.encode(vae, frames.images).std().item() == pytest.approx(1, rel=0.05)
    for model, folder in trained.items():
        facts = checkpoints.read_training(folder)
        assert facts["model"] == model and facts["world"] == "phantom" and facts["frames"] == 40
        assert set(facts["needs"]) == set(training.MODELS[model])
        assert all(rows[-1]["step"] == 4 for rows in facts["log"].values())
    assert set(checkpoints.read_training(trained["unconditional"])["recipes"]) == set(
        camus.CLASS_NAMES
    )


@pytest.mark.parametrize("model", models.GENERATORS)
def test_every_generator_samples_what_it_is_told(trained, frames, model):
    generator = checkpoints.load_generator(trained[model])
    assert generator.latent_shape == (4, 8, 8) and not generator.denoiser.training
    table, masks = synthetic.plan(model, 1, frames)
    given = {"classes": range(4), "prompts": table["prompt"].tolist(), "masks": masks}
    given = {name: given[name] for name in sampling.CONDITIONS[model]}
    guidance = 1 if model == "unconditional" else 2
    images = sampling.sample(generator, range(4), 3, guidance=guidance, **given)
    alone = {name: values[2:3] for name, values in given.items()}
    alone = sampling.sample(generator, [2], 3, guidance=guidance, **alone)
    assert images.shape == (4, 1, 64, 64)
    torch.testing.assert_close(images[2:3], alone, atol=1e-4, rtol=0)


def test_text_model_stays_frozen_under_its_controlnet(trained):
    text, both = (checkpoints.load_generator(trained[name]) for name in ("text", "text-seg"))
    for name, tensor in text.denoiser.unet.state_dict().items():
        assert torch.equal(tensor, both.denoiser.unet.state_dict()[name]), name
    moved = both.denoiser.controlnet.controlnet_mid_block.weight.abs().max()
    assert moved > 0, "the zero convolutions have learned nothing"


def test_conditions_are_dropped_for_guidance(smoke):
    """With dropout 1 the denoiser sees the null prompt and the empty label map, whatever it is given."""

    class Recorder(torch.nn.Module):
        def forward(self, noisy, timesteps, **given):
            self.given = given
            return noisy

    batch = {"latents": torch.randn(3, 4, 8, 8), "prompts": torch.tensor([[1, 2]] * 3)}
    states = torch.arange(3.0).view(3, 1, 1)
    for dropout, rows in ((1.0, {0.0}), (0.0, {1.0, 2.0})):
        recorder = Recorder()
        objective = objectives.DiffusionObjective(
            recorder, models.build_scheduler(), states, dropout
        )
        drawn = objective.draw(batch, torch.Generator().manual_seed(0))
        objective(**batch, **drawn)
        assert set(recorder.given["text"].flatten().tolist()) <= rows
    masks = {"latents": batch["latents"], "masks": torch.ones(3, 64, 64, dtype=torch.uint8)}
    objective = objectives.DiffusionObjective(recorder, models.build_scheduler(), dropout=1.0)
    objective(**masks, **objective.draw(masks, torch.Generator().manual_seed(0)))
    assert recorder.given["unlabelled"].all()


def test_min_snr_weighs_as_published(smoke):
    """Hang et al. 2023: min(SNR, gamma) / (SNR + 1) for v-prediction, here at a single timestep."""
    scheduler = models.build_scheduler()
    torch.manual_seed(0)
    unet = models.Unconditional([models.build_unconditional(smoke)])
    latents, noise = torch.randn(2, 2, 4, 8, 8).unbind(0)
    for t in (10, 500, 990):
        drawn = dict(noise=noise, timesteps=torch.full((2,), t), dropped=torch.zeros(2, dtype=bool))
        plain, _ = objectives.DiffusionObjective(unet, scheduler)(latents, **drawn)
        weighted, _ = objectives.DiffusionObjective(unet, scheduler, snr_gamma=5.0)(
            latents, **drawn
        )
        alpha_bar = scheduler.alphas_cumprod[t]
        snr = alpha_bar / (1 - alpha_bar)
        torch.testing.assert_close(weighted / plain, snr.clamp(max=5.0) / (snr + 1))


def test_missing_and_foreign_parts_are_named(smoke, frames, trained, tmp_path):
    with pytest.raises(DiffEchoError, match="no model 'gan'; train one of autoencoder, clip"):
        training.train("gan", frames, smoke, tmp_path)
    with pytest.raises(DiffEchoError, match=r"text builds on \['clip'\]"):
        needs = {"autoencoder": trained["autoencoder"]}
        training.train("text", frames, smoke, tmp_path, needs=needs)
    with pytest.raises(DiffEchoError, match="train an autoencoder with this profile"):
        other = replace(smoke, latent_channels=8)
        training.train("unconditional", frames, other, tmp_path, needs=needs, progress=str)
    with pytest.raises(DiffEchoError, match="weights fit this network"):
        training.train("clip", frames, smoke, tmp_path, start=trained["classifier"], progress=str)


def test_start_and_minutes(smoke, frames, trained, tmp_path):
    """Fine-tuning begins at the checkpoint's loss; a time budget becomes a number of steps."""
    before = checkpoints.load_network(trained["segmenter"]).state_dict()
    frozen = replace(smoke, segmentation=replace(smoke.segmentation, learning_rate=0.0))
    training.train(
        "segmenter", frames, frozen, tmp_path / "a", start=trained["segmenter"], progress=str
    )
    after = checkpoints.load_network(tmp_path / "a").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoints.read_training(tmp_path / "a")["started_from"]["model"] == "segmenter"
    text = {"text": trained["text"]}
    frozen = replace(smoke, text_seg=replace(smoke.text_seg, learning_rate=0.0))
    start = {"needs": text, "start": trained["text-seg"], "progress": str}
    training.train("text-seg", frames, frozen, tmp_path / "c", **start)
    before, after = (checkpoints.load_generator(f) for f in (trained["text-seg"], tmp_path / "c"))
    after = after.denoiser.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.denoiser.state_dict().items())
    said, long = [], replace(smoke, segmentation=replace(smoke.segmentation, steps=100_000))
    training.train("segmenter", frames, long, tmp_path / "b", minutes=0.05, progress=said.append)
    steps = checkpoints.read_training(tmp_path / "b")["recipes"]["segmenter"]["steps"]
    assert said[0] == f"segmenter: {steps} steps fit in 0.05 minutes" and steps < 100_000
    said.clear()
    again = {"minutes": 5.0, "progress": said.append}
    training.train("segmenter", frames, long, tmp_path / "b", **again)
    assert said[-1] == f"resumed at step {steps} of {steps}", "a resumed run keeps its steps"


def test_start_counts_for_each_network_once(smoke, frames, trained, tmp_path):
    """A later stage goes on from the earlier one; each class's network starts from its own."""
    still = replace(smoke.texture, learning_rate=0.0)
    moving = replace(smoke, texture=still, autoencoder=replace(smoke.autoencoder, steps=8))
    training.train(
        "autoencoder", frames, moving, tmp_path / "a", start=trained["autoencoder"], progress=str
    )
    before, after = (
        checkpoints.load_autoencoder(f) for f in (trained["autoencoder"], tmp_path / "a")
    )
    moved = (
        after.state_dict()["decoder.conv_in.weight"] - before.state_dict()["decoder.conv_in.weight"]
    )
    assert moved.abs().max() > 0, "the second stage has thrown the first one away"
    frozen = replace(smoke, unconditional=replace(smoke.unconditional, learning_rate=0.0))
    needs = {"autoencoder": trained["autoencoder"]}
    start = {"needs": needs, "start": trained["unconditional"], "progress": str}
    training.train("unconditional", frames, frozen, tmp_path / "u", **start)
    before, after = (
        checkpoints.load_generator(f) for f in (trained["unconditional"], tmp_path / "u")
    )
    after = after.denoiser.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.denoiser.state_dict().items())


def test_pixels_instead_of_latents_as_the_paper_does(smoke, frames, tmp_path):
    """No autoencoder, the noise predicted, and the weights still make whole images."""
    recipe = replace(smoke.unconditional, prediction="epsilon")
    pixels = replace(smoke, unconditional_pixels=32, unconditional=recipe)
    training.train("unconditional", frames, pixels, tmp_path / "u", progress=str)
    generator = checkpoints.load_generator(tmp_path / "u")
    assert generator.vae is None and generator.latent_shape == (1, 32, 32)
    assert generator.scheduler.config.prediction_type == "epsilon"
    images = sampling.sample(generator, range(4), 3, classes=range(4))
    assert images.shape == (4, 1, 32, 32) and images.abs().max() <= 1
    assert images.flatten(1).std(1).min() > 0


def test_out_of_memory_says_what_to_lower(smoke, latents, tmp_path):
    """PyTorch's own words for it on a CPU, asked for a tensor that no machine has room for."""

    class Huge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Linear(1, 1)

        def draw(self, batch, generator):
            return {}

        def forward(self, latents):
            return self.network(torch.empty(2**60, 1)).mean(), {}

    said = "out of memory in step 1 with 4 images at once on cpu; halve the batch"
    with pytest.raises(DiffEchoError, match=said):
        training.fit(Huge(), latents, RECIPE, tmp_path / "state", progress=str)


def test_other_errors_are_not_taken_for_memory(smoke, latents):
    with pytest.raises(RuntimeError, match="size"):
        short = {"latents": latents["latents"][:, :3]}  # a channel too few
        training.fit(diffusion(smoke), short, RECIPE, None, progress=str)


def test_chapters_train_from_scratch_once(smoke, phantom_root, tmp_path, monkeypatch):
    """On the shipped autoencoder, whatever the profile's side; the second call only names the folder."""
    monkeypatch.setattr(assets, "workspace", lambda: tmp_path)
    table, said = camus.read_table(phantom_root), []
    folder = chapter.from_scratch("sdm", table, smoke, progress=said.append)
    assert folder.match("trained/phantom-smoke-*/sdm") and said
    generator = checkpoints.load_generator(folder)
    shipped = checkpoints.load_generator(assets.checkpoint("camus", "sdm"))
    assert generator.latent_shape == shipped.latent_shape
    made = checkpoints.read_training(folder)
    assert made["world"] == "phantom" and made["patients"] == 6 and made["profile"] == "smoke"
    said.clear()
    assert chapter.from_scratch("sdm", table, smoke, progress=said.append) == folder
    assert not said


def test_start_counts_for_networks_that_have_no_state_yet(smoke, frames, trained, tmp_path):
    """Interrupted in the second of four networks: the others still start from the checkpoint."""
    said, calls = [], []

    def stop(line):
        said.append(line)
        calls.append(line.startswith("step"))
        if sum(calls) == 5:  # four lines a network here
            raise KeyboardInterrupt

    frozen = replace(smoke, unconditional=replace(smoke.unconditional, learning_rate=0.0))
    run = {"needs": {"autoencoder": trained["autoencoder"]}, "start": trained["unconditional"]}
    with pytest.raises(KeyboardInterrupt):
        training.train("unconditional", frames, frozen, tmp_path / "u", progress=stop, **run)
    training.train("unconditional", frames, frozen, tmp_path / "u", progress=said.append, **run)
    assert any("resumed at step 4 of 4" in line for line in said)
    before, after = (
        checkpoints.load_generator(f) for f in (trained["unconditional"], tmp_path / "u")
    )
    after = after.denoiser.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.denoiser.state_dict().items())


def test_start_that_is_no_checkpoint_is_noticed_before_training(smoke, frames, tmp_path):
    said = []
    with pytest.raises(DiffEchoError, match="training.json: missing"):
        training.train("segmenter", frames, smoke, tmp_path, start=tmp_path, progress=said.append)
    assert not said


def test_a_run_goes_on_only_with_what_it_was_made_from(smoke, frames, trained, tmp_path):
    """Another folder, seed, world, split, autoencoder, stretching or setting is another run."""
    other = data.Frames(frames.images, frames.masks.flip(0), frames.table)

    def told(**attrs):
        table = frames.table.assign(split=attrs.pop("split", frames.table["split"]))
        table.attrs = frames.table.attrs | attrs
        return data.Frames(frames.images, frames.masks, table)

    folder, autoencoder = tmp_path / "run", shutil.copytree(trained["autoencoder"], tmp_path / "ae")
    run = {"needs": {"autoencoder": autoencoder}, "progress": str}
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
    }
    for name, (given, changed) in cases.items():
        with pytest.raises(DiffEchoError, match=f"another {name} "):
            training.train("sdm", given, smoke, folder, **run | changed)
    checkpoints.save(
        [("", checkpoints.load_autoencoder(autoencoder))], autoencoder, {"made": "anew"}
    )
    weights = load_file(autoencoder / checkpoints.WEIGHTS)
    weights["decoder.conv_in.bias"] += 1
    save_file(weights, autoencoder / checkpoints.WEIGHTS)
    with pytest.raises(DiffEchoError, match="another autoencoder "):
        training.train("sdm", frames, smoke, folder, **run)
    assert (folder / "state" / "sdm.safetensors").read_bytes() == whole
    training.train("sdm", frames, smoke, folder, **run | {"seed": 1, "restart": True})
    assert checkpoints.read_training(folder)["seed"] == 1


def test_classes_without_frames_are_left_out(smoke, frames, trained, tmp_path):
    one_view = frames.where(frames.table["view"] == "4CH")
    needs = {"autoencoder": trained["autoencoder"]}
    training.train("unconditional", one_view, smoke, tmp_path, needs=needs, progress=str)
    generator = checkpoints.load_generator(tmp_path)
    assert generator.classes == (2, 3)
    assert sampling.sample(generator, [0, 1], 2, classes=[2, 3]).shape == (2, 1, 64, 64)
    with pytest.raises(DiffEchoError, match="trained without frames of 2CH-ED"):
        sampling.sample(generator, [0], 2, classes=[0])
    table, _ = synthetic.plan("unconditional", 2, classes=generator.classes)
    assert table["view"].tolist() == ["4CH"] * 4


def test_precision_is_the_recipe_s_and_not_the_environment_s(smoke, latents, tmp_path):
    """`accelerate launch --mixed_precision bf16` must not overrule `bf16=False`."""
    script = SCRIPT.replace(
        "PartialState().num", "PartialState().distributed_type, PartialState().num"
    )
    (tmp_path / "script.py").write_text(script)
    save_file(latents, tmp_path / "latents.safetensors")
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name, given in (("plain", {}), ("mixed", {"ACCELERATE_MIXED_PRECISION": "bf16"})):
        command = [sys.executable, "script.py", "latents.safetensors", "4", f"{name}.safetensors"]
        subprocess.run(command, cwd=tmp_path, env=os.environ | path | given, check=True)
    plain, mixed = (load_file(tmp_path / f"{n}.safetensors") for n in ("plain", "mixed"))
    assert all(torch.equal(tensor, mixed[name]) for name, tensor in plain.items())


def test_processes_are_recorded_and_counted(trained):
    facts = checkpoints.read_training(trained["sdm"])
    assert facts["processes"] == 1 and facts["side"] == 64
    one, four = (checkpoints.training_curve(facts | {"processes": n}, "sdm") for n in (1, 4))
    assert (four["images"] == 4 * one["images"]).all()
