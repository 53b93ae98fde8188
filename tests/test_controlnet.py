"""ControlNet: it begins as the text model, refuses maps it cannot read, and needs no code of ours."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from diffecho_utils import (
    DiffEchoError,
    checkpoints,
    models,
    prompts,
    sampling,
    training,
)

SEEDS, STEPS = [3, 4], 3


@pytest.fixture(scope="module")
def folders(frames, smoke, tmp_path_factory):
    """The four folders that text + segmentation guidance needs, each trained for a few steps."""
    root = tmp_path_factory.mktemp("checkpoints")
    needs = {"autoencoder": [], "clip": [], "text": ["autoencoder", "clip"], "text-seg": ["text"]}
    for model, others in needs.items():
        training.train(
            model,
            frames,
            smoke,
            root / model,
            needs={name: root / name for name in others},
            progress=lambda line: None,
        )
    return root


@pytest.fixture(scope="module")
def told(frames):
    """Prompts and label maps of two frames."""
    two = frames.where(np.arange(len(frames)) < len(SEEDS))
    return {"prompts": prompts.make(two.table, "paper-seg"), "masks": two.masks}


def test_untrained_controlnet_is_the_text_model(folders, told):
    text = checkpoints.load_generator(folders / "text")
    unet = text.denoiser.unet
    torch.manual_seed(0)
    controlnet = models.build_controlnet(unet)
    untrained = models.TextSegmentationGuided(unet, controlnet).eval()
    noisy = sampling.initial_noise(SEEDS, text.latent_shape)
    states, times = text.text(told["prompts"]), torch.tensor([10, 900])
    with torch.no_grad():
        before = untrained(noisy, times, states, told["masks"])
        assert torch.equal(before, text.denoiser(noisy, times, states))
        controlnet.controlnet_mid_block.bias += (
            0.1  # one zero convolution moves: so does the output
        )
        assert not torch.equal(before, untrained(noisy, times, states, told["masks"]))


def test_training_moves_the_copy_and_leaves_the_text_model(folders):
    trained = checkpoints.load_generator(folders / "text-seg").denoiser
    text = checkpoints.load_generator(folders / "text").denoiser
    before = text.unet.state_dict()
    assert all(torch.equal(before[k], v) for k, v in trained.unet.state_dict().items())
    zero = trained.controlnet.controlnet_mid_block.weight
    assert zero.abs().max() > 0


def test_control_image_is_the_label_map_in_colours(told):
    picture = models.control_image(told["masks"])
    assert picture.shape == (len(SEEDS), 3, *told["masks"].shape[1:])
    for channel, label in enumerate((1, 2, 3)):
        assert torch.equal(picture[:, channel] == 1, told["masks"] == label)
    assert picture.sum(1).max() == 1


def test_label_maps_it_cannot_read_are_refused(folders, told):
    generator = checkpoints.load_generator(folders / "text-seg")
    unknown = told | {"masks": told["masks"] * 85}  # as the PNG re-packs store labels
    with pytest.raises(DiffEchoError, match=r"labels \[0, 85, 170, 255\]"):
        sampling.sample(generator, SEEDS, STEPS, **unknown)
    small = told | {"masks": told["masks"][:, ::2, ::2]}
    with pytest.raises(DiffEchoError, match=r"\(32, 32\) pixels for images of \(64, 64\)"):
        sampling.sample(generator, SEEDS, STEPS, **small)
    with pytest.raises(DiffEchoError, match="1 masks for 2 seeds"):
        sampling.sample(generator, SEEDS, STEPS, **told | {"masks": told["masks"][:1]})
    with pytest.raises(DiffEchoError, match="is told"):
        sampling.sample(generator, SEEDS, STEPS, prompts=told["prompts"])


@pytest.mark.parametrize("model", ["text", "text-seg"])
def test_stock_pipelines_draw_the_same_picture(folders, told, model):
    """Folders loaded by diffusers and transformers alone, in a stock pipeline, draw as `sample` does."""
    scheduler = DPMSolverMultistepScheduler.from_pretrained(
        folders / "text" / "scheduler",
        steps_offset=1,  # stock pipelines insist on it
    )
    parts = {
        "vae": AutoencoderKL.from_pretrained(folders / "autoencoder"),
        "text_encoder": CLIPTextModel.from_pretrained(folders / "clip"),
        "tokenizer": CLIPTokenizer.from_pretrained(folders / "clip"),
        "unet": UNet2DConditionModel.from_pretrained(folders / "text" / "unet"),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    settings = {"guidance_scale": 2.0, "num_inference_steps": STEPS, "output_type": "np"}
    given = {"prompts": told["prompts"]}
    if model == "text":
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        parts["controlnet"] = ControlNetModel.from_pretrained(folders / "text-seg" / "controlnet")
        pipeline = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
        given["masks"] = told["masks"]
        settings["image"] = models.control_image(told["masks"])
    pipeline = pipeline.to(torch.float32)  # checkpoints are kept in half precision
    pipeline.set_progress_bar_config(disable=True)
    generator = checkpoints.load_generator(folders / model)
    noise = sampling.initial_noise(SEEDS, generator.latent_shape)
    drawn = pipeline(told["prompts"], latents=noise, **settings).images
    ours = sampling.sample(generator, SEEDS, STEPS, guidance=2.0, scheduler=scheduler, **given)
    stock = torch.from_numpy(drawn).movedim(-1, 1) * 2 - 1
    assert ours.std() > 0.01
    torch.testing.assert_close(stock, ours, atol=1e-4, rtol=0)
