"""Trainers: what a user of `transformers.Trainer` or TRL reaches for."""

from .callbacks import ForgottenStoppingCallback, GradientHealthCallback
from .space_config import SpaceConfig
from .space_trainer import SpaceTrainer


__all__ = ["ForgottenStoppingCallback", "GradientHealthCallback", "SpaceConfig", "SpaceTrainer"]
