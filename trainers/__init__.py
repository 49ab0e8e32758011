"""Trainers: what a user of `transformers.Trainer` or TRL reaches for."""

from .callbacks import ForgottenStoppingCallback, GradientHealthCallback
from .cvf_trainer import CVFConfig, CVFTrainer
from .erasure_config import ErasureConfig
from .erasure_trainer import ErasureTrainer
from .forget_config import ForgetConfig
from .forget_trainer import ForgetTrainer
from .grad_diff_trainer import GradDiffConfig, GradDiffTrainer
from .ledger import ErasureLedger
from .mmunlearner_trainer import MMUnlearnerConfig, MMUnlearnerTrainer
from .npo_trainer import NPOConfig, NPOTrainer
from .risk_control import calibrate
from .space_config import SpaceConfig
from .space_trainer import SpaceTrainer


__all__ = [
    "CVFConfig",
    "CVFTrainer",
    "ErasureConfig",
    "ErasureLedger",
    "ErasureTrainer",
    "ForgetConfig",
    "ForgetTrainer",
    "ForgottenStoppingCallback",
    "GradDiffConfig",
    "GradDiffTrainer",
    "GradientHealthCallback",
    "MMUnlearnerConfig",
    "MMUnlearnerTrainer",
    "NPOConfig",
    "NPOTrainer",
    "SpaceConfig",
    "SpaceTrainer",
    "calibrate",
]
