"""ControlNet: it begins as the text model, refuses maps it cannot read, and needs no code of ours."""

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from diffecho_utils import DiffEchoError, checkpoints, models, prompts, sampling

SEEDS, STEPS = [3, 4], 3


@pytest.fixture(scope="module")
def told(frames):
    """Prompts and label maps of two frames."""
    two = frames.where(np.arange(len(frames)) < len(SEEDS))
    return {"prompts": prompts.make(two.table, "paper-seg"), "masks": two.masks}


def test_untrained_controlnet_is_the_text_model(trained, told):
    text = checkpoints.load_generator(trained["text"])
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


def test_label_maps_it_cannot_read_are_refused(trained, told):
    generator = checkpoints.load_generator(trained["text-seg"])
    masks = told["masks"]
    for given, said in (
        (
            told | {"masks": masks * 85},
            r"labels \[0, 85, 170, 255\]",
        ),  # as PNG re-packs store labels
        (told | {"masks": masks[:, ::2, ::2]}, r"\(32, 32\) pixels for images of \(64, 64\)"),
        (told | {"masks": masks[:1]}, "1 masks for 2 seeds"),
        ({"prompts": told["prompts"]}, "is told"),
    ):
        with pytest.raises(DiffEchoError, match=said):
            sampling.sample(generator, SEEDS, STEPS, **given)


@pytest.mark.parametrize("model", ["text", "text-seg"])
def test_stock_pipelines_draw_the_same_picture(trained, told, model):
    """Folders loaded by diffusers and transformers alone, in a stock pipeline, draw as `sample` does."""
    solver, there = diffusers.DPMSolverMultistepScheduler, trained["text"] / "scheduler"
    scheduler = solver.from_pretrained(there, steps_offset=1)  # stock pipelines insist on it
    parts = {
        "vae": diffusers.AutoencoderKL.from_pretrained(trained["autoencoder"]),
        "text_encoder": CLIPTextModel.from_pretrained(trained["clip"]),
        "tokenizer": CLIPTokenizer.from_pretrained(trained["clip"]),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(trained["text"] / "unet"),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    settings = {"guidance_scale": 2.0, "num_inference_steps": STEPS, "output_type": "np"}
    given = {"prompts": told["prompts"]}
    if model == "text":
        pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        parts["controlnet"] = diffusers.ControlNetModel.from_pretrained(
            trained["text-seg"] / "controlnet"
        )
        pipeline = diffusers.StableDiffusionControlNetPipeline(
            **parts, requires_safety_checker=False
        )
        given["masks"] = told["masks"]
        settings["image"] = models.control_image(told["masks"])
    pipeline = pipeline.to(torch.float32)  # checkpoints are kept in half precision
    pipeline.set_progress_bar_config(disable=True)
    generator = checkpoints.load_generator(trained[model])
    noise = sampling.initial_noise(SEEDS, generator.latent_shape)
    drawn = pipeline(told["prompts"], latents=noise, **settings).images
    ours = sampling.sample(generator, SEEDS, STEPS, guidance=2.0, scheduler=scheduler, **given)
    stock = torch.from_numpy(drawn).movedim(-1, 1) * 2 - 1
    assert ours.std() > 0.01
    torch.testing.assert_close(stock, ours, atol=1e-4, rtol=0)
