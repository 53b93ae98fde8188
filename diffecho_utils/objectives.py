"""What is minimised, one class a network: each brings the network, and its forward returns the loss.

Chapters 02 to 06, 09 and 10. `draw(batch, generator)` draws whatever is random in a batch, so that `training.fit`
can make all of it a function of (seed, step); `forward(**batch, **drawn)` returns (loss, its parts).
"""

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, JukeboxLoss
from torch import nn

from diffecho_utils import data, models


class ReconstructionObjective(nn.Module):
    """First stage of the autoencoder: L1, amplitude spectrum (MONAI's JukeboxLoss) and a whiff of KL.

    Trains on random crops of `images` (N, 1, H, W) in [-1, 1].
    """

    def __init__(self, vae, crop):
        super().__init__()
        self.network, self.crop = vae, crop
        self.spectrum = JukeboxLoss(spatial_dims=2, fft_norm="ortho")

    def draw(self, batch, generator):
        drawn, n = _draw_crops(batch, self, generator), len(batch["images"])
        dither = torch.randn(n, 1, self.crop, self.crop, generator=generator)
        return drawn | {"dither": dither}

    def forward(self, images, corners, noise, dither):
        crops = _crop(images, corners, self.crop)
        posterior = self.network.encode(crops).latent_dist
        reconstruction = self.network.decode(posterior.mean + posterior.std * noise).sample
        faint = dither / 255  # an amplitude of exactly 0, as in black crops, has no gradient: NaN
        parts = {
            "l1": F.l1_loss(reconstruction, crops),
            "spectral": self.spectrum(reconstruction + faint, crops + faint),
            "kl": 1e-6 * posterior.kl().mean(),
        }
        return sum(parts.values()), parts


class TextureObjective(nn.Module):
    """Second stage: the decoder alone, against a patch discriminator that knows real speckle.

    Speckle is noise to a pixel loss, whose best guess is its mean: blur. Here L1 acts mostly at a
    quarter of the resolution, the standard deviations of the differences of neighbouring pixels in
    four directions must match (a texture with stripes would not), and the discriminator (hinge
    loss) judges the rest. It is shown the high frequencies, amplified, beside the picture: without
    them it does not learn to tell real from reconstructed. A little noise on the latents prepares
    the decoder for those of a generator, which are never exact.
    """

    def __init__(
        self, vae, discriminator, crop, adversarial=0.03, fine=0.2, deviation=1.0, noise=0.05
    ):
        super().__init__()
        self.network, self.discriminator, self.crop = vae, discriminator, crop
        self.adversarial, self.fine, self.deviation = adversarial, fine, deviation
        self.noise = noise  # in standard deviations of the latents
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def draw(self, batch, generator):
        return _draw_crops(batch, self, generator)

    def forward(self, images, corners, noise):
        crops = _crop(images, corners, self.crop)
        with torch.no_grad():
            latents = self.network.encode(crops).latent_dist.mean
        reconstruction = self.network.decode(latents + self.noise * latents.std() * noise).sample
        self.discriminator.requires_grad_(False)
        fooled = -self._judge(reconstruction).mean()
        self.discriminator.requires_grad_(True)
        caught = F.relu(1 + self._judge(reconstruction.detach())).mean()
        believed = F.relu(1 - self._judge(crops)).mean()
        quarter = (F.avg_pool2d(x, 4) for x in (reconstruction, crops))
        deviations = (_deviations(x) for x in (reconstruction, crops))
        parts = {
            "l1_quarter": F.l1_loss(*quarter),
            "l1": self.fine * F.l1_loss(reconstruction, crops),
            "deviation": self.deviation * F.l1_loss(*deviations),
            "adversarial": self.adversarial * fooled,
            "discriminator": (caught + believed) / 2,
        }
        return sum(parts.values()), parts

    def _judge(self, images):
        fine = images - data.blurred(images)  # finer than about five pixels
        return self.discriminator(torch.cat([images, 10 * fine], dim=1))


class ContrastiveObjective(nn.Module):
    """CLIP's loss: which of the batch's prompts belongs to which of its frames, asked both ways.

    `images` (N, 1, H, W), `masks` (N, H, W; moved with them, unused), `prompts` (N, P) ids into
    `tokens` (K, L). Many frames share a prompt, so a prompt may have several right frames: the
    targets are shared evenly among them (as in supervised contrastive learning, Khosla et al. 2020).
    """

    def __init__(self, clip, tokens):
        super().__init__()
        self.network = clip
        self.register_buffer("tokens", tokens, persistent=False)

    def draw(self, batch, generator):
        n, wordings = batch["prompts"].shape
        return {
            "drawn": data.draw_jitter(n, generator),
            "wording": torch.randint(wordings, (n,), generator=generator),
        }

    def forward(self, images, masks, prompts, drawn, wording):
        moved, _ = data.jitter(images, masks, drawn)
        chosen = prompts[torch.arange(len(prompts), device=prompts.device), wording]
        found = self.network(input_ids=self.tokens[chosen], pixel_values=moved)
        fits = (prompts[:, None] == chosen[None, :, None]).any(-1).float()  # (frame, prompt)
        logits = found.logits_per_image
        loss = F.cross_entropy(logits, fits / fits.sum(1, keepdim=True))
        back = F.cross_entropy(logits.T, fits.T / fits.T.sum(1, keepdim=True))
        return (loss + back) / 2, {}


class DiffusionObjective(nn.Module):
    """Mean squared error of a denoiser's prediction (noise or v, as the scheduler says).

    Beside `latents` (N, C, h, w) the batch holds what the denoiser (`models`) is conditioned on:
    `masks` (N, H, W), `prompts` (N, P) ids into `states` (K, L, D), whose first row is the null
    prompt's. A share `dropout` of the conditions is replaced by the null condition, for guidance.
    `snr_gamma`: weights of min-SNR (Hang et al. 2023); None: all timesteps weigh the same.
    """

    def __init__(self, denoiser, scheduler, states=None, dropout=0.1, snr_gamma=None):
        super().__init__()
        self.network, self.scheduler = denoiser, scheduler
        self.dropout, self.snr_gamma = dropout, snr_gamma
        self.register_buffer("states", states, persistent=False)
        alpha_bar = scheduler.alphas_cumprod
        self.register_buffer("snr", alpha_bar / (1 - alpha_bar), persistent=False)

    def draw(self, batch, generator):
        shape, steps = batch["latents"].shape, self.scheduler.config.num_train_timesteps
        drawn = {
            "noise": torch.randn(shape, generator=generator),
            "timesteps": torch.randint(steps, shape[:1], generator=generator),
            "dropped": torch.rand(shape[0], generator=generator) < self.dropout,
        }
        if "prompts" in batch:
            wordings = batch["prompts"].shape[1]
            drawn["wording"] = torch.randint(wordings, shape[:1], generator=generator)
        return drawn

    def forward(self, latents, noise, timesteps, dropped, prompts=None, wording=None, masks=None):
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        given = {} if masks is None else {"masks": masks}
        if prompts is not None:
            chosen = prompts[torch.arange(len(prompts), device=prompts.device), wording]
            given["text"] = self.states[chosen.masked_fill(dropped, 0)]
        elif masks is not None:
            given["unlabelled"] = dropped
        predicted = self.network(noisy, timesteps, **given).float()
        errors = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        if self.snr_gamma is not None:
            snr = self.snr[timesteps]
            errors = errors * snr.clamp(max=self.snr_gamma) / (snr + 1 if is_v else snr)
        return errors.mean(), {}


class ReflowObjective(nn.Module):
    """One round of reflow (Liu et al. 2023): each noise to the picture that its teacher made of it, straight.

    `latents` and their `noise` (`sampling.pairs`), both (N, C, h, w), with the label maps `masks` (N, H, W) that
    they were drawn to. The straight line between the two, scaled to the variance that the network knows, is what
    the schedule mixes of them; so all that differs from `DiffusionObjective` is that the noise is not drawn
    any more. Half of the timesteps are the last one, where one step begins. The root of each image's mean
    square counts, so that no image outweighs the others.

    discriminator: with it the finish, against real `known` latents of frames with these very maps (as in
    adversarial distillation, Sauer et al. 2024): what a mean square smooths away it asks back.
    """

    def __init__(self, denoiser, scheduler, discriminator=None, adversarial=0.05):
        super().__init__()
        self.network, self.scheduler, self.discriminator = denoiser, scheduler, discriminator
        self.adversarial = adversarial
        self.register_buffer("alpha_bar", scheduler.alphas_cumprod, persistent=False)

    def draw(self, batch, generator):
        n, steps = len(batch["latents"]), self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (n,), generator=generator)
        last = torch.rand(n, generator=generator) < 0.5
        return {"timesteps": timesteps.masked_fill(last, steps - 1)}

    def forward(self, latents, noise, masks, timesteps, known=None):
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted = self.network(noisy, timesteps, masks=masks).float()
        errors = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
        parts = {"straight": (errors + 1e-6).sqrt().mean()}
        if self.discriminator is not None:
            alpha_bar = self.alpha_bar[timesteps].view(-1, 1, 1, 1)
            drawn = alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * predicted
            shares = models.label_shares(masks, latents.shape[-2:])
            fooled, losses = _against(self.discriminator, drawn, known, shares)
            parts |= {"adversarial": self.adversarial * fooled, "discriminator": losses}
        return sum(parts.values()), parts


def _against(discriminator, drawn, known, *given):
    """(loss of what was drawn, loss of the discriminator): hinge losses, each alone moving its own network."""
    discriminator.requires_grad_(False)
    fooled = -discriminator(torch.cat([drawn, *given], 1)).mean()
    discriminator.requires_grad_(True)
    caught = F.relu(1 + discriminator(torch.cat([drawn.detach(), *given], 1))).mean()
    believed = F.relu(1 - discriminator(torch.cat([known, *given], 1))).mean()
    return fooled, (caught + believed) / 2


class DecoderObjective(nn.Module):
    """A small decoder after a large one: `latents` (N, C, h, w) and the `images` that the large one makes of them.

    Mean absolute error of the picture, as much again of what is finer than about five pixels, and twice as much
    of its deviation in windows of 16: errors alone are smallest where speckle is drawn too faint.
    """

    def __init__(self, vae, fine=1.0):
        super().__init__()
        self.network, self.fine = vae, fine
        vae.encoder.requires_grad_(False)

    def draw(self, batch, generator):
        return {}

    def forward(self, latents, images):
        drawn, images = self.network.decode(latents).sample, images.float() / 127.5 - 1
        finer = [x - data.blurred(x) for x in (drawn, images)]
        power = (F.avg_pool2d(x.square(), min(16, x.shape[-1]), stride=8) for x in finer)
        deviations = [(x + 1e-6).sqrt() for x in power]
        parts = {"l1": F.l1_loss(drawn, images), "fine": self.fine * F.l1_loss(*finer)}
        parts["deviation"] = 2 * self.fine * F.l1_loss(*deviations)
        return sum(parts.values()), parts


class SegmentationObjective(nn.Module):
    """Dice and cross-entropy loss (MONAI) of a segmenter on jittered frames.

    label_weights: cross-entropy alone, with these weights of the labels 0 to 3, as in the paper.
    """

    def __init__(self, network, label_weights=None, **amounts):
        super().__init__()
        self.network, self.amounts = network, amounts
        weights = None if label_weights is None else torch.tensor(label_weights)
        self.loss = DiceCELoss(
            to_onehot_y=True, softmax=True, weight=weights, lambda_dice=float(weights is None)
        )

    def draw(self, batch, generator):
        return {"drawn": data.draw_jitter(len(batch["images"]), generator)}

    def forward(self, images, masks, drawn):
        moved, labels = data.jitter(images, masks, drawn, **self.amounts)
        return self.loss(self.network(moved).float(), labels[:, None]), {}


class ClassificationObjective(nn.Module):
    """Cross-entropy of a classifier on jittered frames; `labels` (N,) int64."""

    def __init__(self, network, **amounts):
        super().__init__()
        self.network, self.amounts = network, amounts

    def draw(self, batch, generator):
        return {"drawn": data.draw_jitter(len(batch["images"]), generator)}

    def forward(self, images, masks, labels, drawn):
        moved, _ = data.jitter(images, masks, drawn, **self.amounts)
        return F.cross_entropy(self.network(moved).float(), labels), {}


def _draw_crops(batch, objective, generator):
    """The corners of an autoencoder's crops, and noise of the shape of their latents."""
    (n, _, height, width), crop = batch["images"].shape, objective.crop
    rows = torch.randint(height - crop + 1, (n,), generator=generator)
    columns = torch.randint(width - crop + 1, (n,), generator=generator)
    shape = models.latent_shape(objective.network, crop)
    noise = torch.randn(n, *shape, generator=generator)
    return {"corners": torch.stack([rows, columns], 1), "noise": noise}


def _crop(images, corners, crop):
    pairs = zip(images, corners.tolist(), strict=True)
    return torch.stack([image[:, r : r + crop, c : c + crop] for image, (r, c) in pairs])


def _deviations(images):
    """Standard deviations of neighbours' differences: right, down, two diagonals, two scales, (N, 8)."""
    found = []
    for x in (images, F.avg_pool2d(images, 2)):
        pairs = [(x[..., 1:], x[..., :-1]), (x[..., 1:, :], x[..., :-1, :])]
        pairs += [(x[..., 1:, 1:], x[..., :-1, :-1]), (x[..., 1:, :-1], x[..., :-1, 1:])]
        found += [(a - b).std(dim=(1, 2, 3)) for a, b in pairs]
    return torch.stack(found, 1)
