"""Training of foreground models on a user's own volumes: beside the flow, before a run that uses the weights.

    volumes -> crops.py: range of tissue, crops read where they lie -> the kernels' training -> weights
                                   record.py, pictures.py, card.py: what a person sees of it <-

Nothing is loaded whole, and an interruption loses nothing.
"""

from braincensus.training.recipe import Recipe
from braincensus.training.wnet3d import (
    TrainingInterruptedError,
    TrainingResult,
    TrainingWarning,
    train_from_paths,
    train_wnet3d,
)

__all__ = [
    "Recipe",
    "TrainingInterruptedError",
    "TrainingResult",
    "TrainingWarning",
    "train_from_paths",
    "train_wnet3d",
]
