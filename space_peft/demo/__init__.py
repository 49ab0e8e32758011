"""A small real multimodal model with its images, to show and test an erasure without any download."""

from .data import TRAINED_STYLES, UNSEEN_STYLE, demo_concepts, demo_model_path, load_demo_images, load_demo_model
from .questions import (
    DEMO_QUESTIONS,
    KIND_QUESTIONS,
    NO,
    TEXT_CONFIRM_QUESTIONS,
    TEXT_KIND_QUESTIONS,
    YES,
)


__all__ = [
    "DEMO_QUESTIONS",
    "KIND_QUESTIONS",
    "NO",
    "TEXT_CONFIRM_QUESTIONS",
    "TEXT_KIND_QUESTIONS",
    "TRAINED_STYLES",
    "UNSEEN_STYLE",
    "YES",
    "demo_concepts",
    "demo_model_path",
    "load_demo_images",
    "load_demo_model",
]
