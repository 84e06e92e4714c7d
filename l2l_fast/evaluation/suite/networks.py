"""The suite's networks: ordinary torch.nn modules on ordinary data, what users of an optimizer train, only small.

They are *test* networks. No optimizer may be trained, chosen or tuned on them, and they are none of those that
:mod:`l2l_fast.problems.zoo` trains on: other sizes, other code, PyTorch's own initialisation, seeds that nothing else
uses. Baselines alone are tuned on them, network by network, on a seed that no result comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.checks import meant
from ...problems.data.text import VOCABULARY
from .material import Batch, Folder, picture_batches, text_batches
from .modules import CharTransformer, GRULanguageModel, Point, ResidualBlock, VisionTransformer

FIRST_SEED = 7_700_000_000  # of the test seeds; far from all that trainers and other tests draw
TUNING_SEED = 7_800_000_000  # baselines are tuned on it, and no result comes from it
CLASSES = 10
_STANDARD = {"mean": 0.1307, "scale": 0.3081}  # MNIST's, as everybody's first script has it

Batches = Callable[[torch.Generator], Iterator[Batch]]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Network:
    """A network to be trained, with its data and loss.

    Attributes:
        name, about: for tables.
        kind: of data, one of :data:`~.material.KINDS`.
        build: makes the module, from torch's global generator as modules do.
        loss: of the module and a minibatch's tensors.
        batches: of a folder of data, how minibatches are drawn.
        version: of the definition: results are kept under it, and anything that changes a loss must raise it.
    """

    name: str
    about: str
    kind: str
    build: Callable[[], nn.Module]
    loss: Loss
    batches: Callable[[Folder], Batches]
    version: int = 1


def seeds(count: int = 3) -> range:
    """The test seeds: each is an initial theta and a sequence of minibatches, for every optimizer alike.

    Raises:
        ValueError: ``count`` is not in 1..1000.
    """
    if not 0 < count <= 1000:
        raise ValueError(f"seeds: expected 1..1000, got {count}")
    return range(FIRST_SEED, FIRST_SEED + count)


def choose(names: Iterable[str] | None = None) -> list[Network]:
    """The networks of these names, in the suite's order; None: all.

    Raises:
        ValueError: there is none of a name, or none is asked for.
    """
    if names is None:
        return list(NETWORKS.values())
    names = list(names)
    unknown = [name for name in names if name not in NETWORKS]
    if unknown or not names:
        hint = meant(unknown[0], NETWORKS) if unknown else ""
        raise ValueError(f"networks: expected some of {', '.join(NETWORKS)}, got {', '.join(unknown) or 'none'}{hint}")
    return [network for name, network in NETWORKS.items() if name in names]


def _classify(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module(x), labels)


def _continue(module: nn.Module, symbols: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(module(symbols).flatten(0, 1), following.flatten())


def _copy(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(module(x), x)


def _fit(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(module(x), y)


def _quadratic_loss(module: nn.Module, curvatures: Tensor, minimum: Tensor) -> Tensor:
    return 0.5 * (curvatures * (module() - minimum).square()).sum()


def _perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def _autoencoder() -> nn.Sequential:
    return nn.Sequential(*_perceptron(784, 22, 6, 22, 784, activation=nn.ELU), nn.Sigmoid())


def _convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def _normalised_convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 14, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(14), nn.ReLU(),
        nn.Conv2d(14, 20, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, CLASSES),
    )  # fmt: skip


def _resnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        ResidualBlock(12, 20, 2), ResidualBlock(20, 20, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, CLASSES),
    )  # fmt: skip


def _noisy_quadratic(folder: Folder) -> Batches:
    """Curvatures log-spaced over four decades; the minimum, drawn once per seed, jumps from step to step by a tenth."""
    size = 600

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        curvatures = torch.logspace(0, -4, size, dtype=torch.float32, device="cpu")
        centre = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        while True:
            noise = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
            yield curvatures, centre + 0.1 * noise

    return draw


def _sinusoid(folder: Folder) -> Batches:
    """y = A sin(w x + b) with noise of a tenth, x in [-4, 4]; A, w and b are drawn once per seed."""
    batch = 48

    def draw(generator: torch.Generator) -> Iterator[Batch]:
        amplitude, frequency, phase = torch.rand(3, generator=generator, dtype=torch.float32, device="cpu").tolist()
        amplitude, frequency, phase = 1 + 3 * amplitude, 1 + 1.5 * frequency, math.pi * phase
        while True:
            x = torch.rand(batch, 1, generator=generator, dtype=torch.float32, device="cpu") * 8 - 4
            noise = torch.randn(batch, 1, generator=generator, dtype=torch.float32, device="cpu")
            yield x, amplitude * torch.sin(frequency * x + phase) + 0.1 * noise

    return draw


def _images(kind: str, side: int, batch: int, *shape: int, **scaling: float) -> Callable[[Folder], Batches]:
    """Minibatches of pictures, flat unless a shape is given, standardised unless a scaling is."""
    return lambda folder: picture_batches(folder, kind, side, batch, shape or (side**2,), **(scaling or _STANDARD))


def _text(kind: str, batch: int, length: int) -> Callable[[Folder], Batches]:
    return lambda folder: text_batches(kind, batch, length)


_ALL = (
    Network("softmax", "softmax regression 784-10, digits, batch 50",
            "digits", lambda: nn.Linear(784, CLASSES), _classify, _images("digits", 28, 50)),
    Network("mlp-relu", "784-40-24-10 ReLU, digits, batch 50",
            "digits", lambda: _perceptron(784, 40, 24, CLASSES), _classify, _images("digits", 28, 50)),
    Network("mlp-tanh", "784-36-10 tanh, fashion, batch 32",
            "fashion", lambda: _perceptron(784, 36, CLASSES, activation=nn.Tanh), _classify,
            _images("fashion", 28, 32)),
    Network("mlp-gelu", "196-56-52-10 GELU, fashion, batch 64",
            "fashion", lambda: _perceptron(196, 56, 52, CLASSES, activation=nn.GELU), _classify,
            _images("fashion", 14, 64)),
    Network("mlp-deep", "196-32 x 8-10 ReLU, digits, batch 40",
            "digits", lambda: _perceptron(196, *[32] * 8, CLASSES), _classify, _images("digits", 14, 40)),
    Network("mlp-batch-512", "196-36-10 ReLU, digits, batch 512",
            "digits", lambda: _perceptron(196, 36, CLASSES), _classify, _images("digits", 14, 512)),
    Network("mlp-batch-4", "196-64-32-10 ReLU, digits, batch 4",
            "digits", lambda: _perceptron(196, 64, 32, CLASSES), _classify, _images("digits", 14, 4)),
    Network("autoencoder", "784-22-6-22-784 ELU, mean squares, digits, batch 32",
            "digits", _autoencoder, _copy, _images("digits", 28, 32, mean=0.0, scale=1.0)),
    Network("conv", "two convolutions and two linear layers, ReLU, 14 x 14 digits, batch 16",
            "digits", _convolutions, _classify, _images("digits", 14, 16, 1, 14, 14)),
    Network("conv-batchnorm", "two convolutions with batch norm, 14 x 14 fashion, batch 20",
            "fashion", _normalised_convolutions, _classify, _images("fashion", 14, 20, 1, 14, 14)),
    Network("resnet", "two residual blocks with batch norm, 14 x 14 digits, batch 16",
            "digits", _resnet, _classify, _images("digits", 14, 16, 1, 14, 14)),
    Network("vit", "vision transformer, 16 patches and a token, width 28, one block, digits, batch 16",
            "digits", lambda: VisionTransformer(28, 7, 28, 4, 1, CLASSES), _classify,
            _images("digits", 28, 16, 1, 28, 28)),
    Network("char-transformer", "width 32, one block, 28 characters of English, batch 8",
            "english", lambda: CharTransformer(VOCABULARY, 28, 32, 4, 1), _continue, _text("english", 8, 28)),
    Network("gru", "GRU language model, width 20, 40 units, 10 characters of Middle English, batch 20",
            "middle-english", lambda: GRULanguageModel(VOCABULARY, 20, 40), _continue,
            _text("middle-english", 20, 10)),
    Network("quadratic", "noisy quadratic, 600 dimensions, curvatures over four decades",
            "none", lambda: Point(600), _quadratic_loss, _noisy_quadratic),
    Network("sinusoid", "1-72-72-1 tanh on a noisy sine, batch 48",
            "none", lambda: _perceptron(1, 72, 72, 1, activation=nn.Tanh), _fit, _sinusoid),
)  # fmt: skip
NETWORKS: dict[str, Network] = {network.name: network for network in _ALL}
