"""Put De3 in front of a timm classifier, attack both, and count the predictions that survive.

    python examples/de3_before_timm.py *.jpg --classifier vit_small_patch16_224 --pretrained --denoiser runs/nim/model

Without --denoiser the script builds an untrained one, which shows the interface and defends nothing.
"""

from __future__ import annotations

import argparse

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from denim.defense import Attack, De3
from denim.nim import Autoencoder, preset


class Normalized(nn.Module):
    """A classifier of pixels in [0, 1]: De3 and the attacks work on pixels, so it normalises inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.normalize = transforms.Normalize(model.default_cfg["mean"], model.default_cfg["std"])

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0, 1] to logits (B, K)."""
        return self.model(self.normalize(pixels))


parser = argparse.ArgumentParser(description="De3 in front of a timm classifier")
parser.add_argument("images", nargs="+", help="pictures")
parser.add_argument("--classifier", default="vit_tiny_patch16_224", help="name of a timm model")
parser.add_argument("--pretrained", action="store_true", help="download the weights of the classifier")
parser.add_argument("--denoiser", help="folder of a denoiser, or owner/name on the hub")
parser.add_argument("--sigma", type=float, default=70.0, help="noise level in 0-255 pixel levels")
parser.add_argument("--attack", default="pgd:4/255,steps=10,eot=10", help="text form of an attack")
args = parser.parse_args()

model = timm.create_model(args.classifier, pretrained=args.pretrained)
side = model.default_cfg["input_size"][-1]
denoiser = Autoencoder.from_pretrained(args.denoiser) if args.denoiser else Autoencoder(preset("tiny", img_size=side))
classifier = Normalized(model).eval().requires_grad_(False)
defense = De3(denoiser.eval().requires_grad_(False), classifier, sigma=args.sigma, draws=4)

view = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()])
pixels = torch.stack([view(Image.open(path).convert("RGB")) for path in args.images])
labels, ids = classifier(pixels).argmax(-1), torch.arange(len(pixels))  # ids key the attack's randomness
for name, network in (("classifier", De3(None, classifier, sigma=None)), ("De3", defense)):  # sigma=None: defense off
    attacked = Attack.parse(args.attack).run(network, pixels, labels, ids, seed=0).pixels
    survive = int((network(attacked).argmax(-1) == labels).sum())
    print(f"{name}: {survive} of {len(pixels)} predictions survive {args.attack}")
