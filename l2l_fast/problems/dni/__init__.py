"""Decoupled layers and truncation boundaries: gradients that are predicted instead of waited for (Jaderberg et al.
2017, "Decoupled Neural Interfaces using Synthetic Gradients")."""

from .decoupled import Backward, Decoupled, Update
from .predictors import ConvPredictor, Predictor, predictor_for
from .recurrent import Recurrent, Segment
from .sequences import CopyTask, Curriculum, Episode
from .stage import Local, Stage

__all__ = [
    "Backward",
    "ConvPredictor",
    "CopyTask",
    "Curriculum",
    "Decoupled",
    "Episode",
    "Local",
    "Predictor",
    "Recurrent",
    "Segment",
    "Stage",
    "Update",
    "predictor_for",
]
