"""The families by name, with the weights they are drawn with."""

from __future__ import annotations

from . import heldout_images, heldout_others
from .analytic import logistic_regression, noisy_quadratic
from .convolutions import convolutions
from .optimizee import Family
from .perceptrons import (
    autoencoder,
    image_perceptron,
    sine_regression,
    softmax_regression,
    teacher_classification,
    teacher_regression,
)
from .recurrent import recurrent
from .transformers import transformer

# Half of the weight is on what people train most, perceptrons, convolutions and transformers; convex problems, where an
# optimizer learns to be exact, have an eighth.
TRAINING: dict[str, tuple[Family, float]] = {
    "perceptron": (image_perceptron, 4.0),
    "convolutions": (convolutions, 3.0),
    "transformer": (transformer, 3.0),
    "recurrent": (recurrent, 2.5),
    "autoencoder": (autoencoder, 2.0),
    "teacher-classification": (teacher_classification, 1.5),
    "teacher-regression": (teacher_regression, 1.5),
    "sine-regression": (sine_regression, 1.0),
    "noisy-quadratic": (noisy_quadratic, 1.0),
    "softmax-regression": (softmax_regression, 1.0),
    "logistic-regression": (logistic_regression, 0.5),
}
# Kinds that training does not have; all alike.
VALIDATION: dict[str, tuple[Family, float]] = {
    "residual-perceptron": (heldout_images.residual_perceptron, 1.0),
    "residual-convolutions": (heldout_images.residual_convolutions, 1.0),
    "patch-mixer": (heldout_images.patch_mixer, 1.0),
    "vision-transformer": (heldout_images.vision_transformer, 1.0),
    "variational-autoencoder": (heldout_images.variational_autoencoder, 1.0),
    "deep-gru": (heldout_others.deep_gru, 1.0),
    "embedding-bag": (heldout_others.embedding_bag, 1.0),
    "equation": (heldout_others.equation, 1.0),
    "flow": (heldout_others.flow, 1.0),
}
FAMILIES = {**TRAINING, **VALIDATION}
