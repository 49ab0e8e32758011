"""Runs a script, or `-m` a module, as Python would, where torchvision is missing: `run_unchanged.py SCRIPT ARGUMENT ...`.

Processors with a part for videos cannot be loaded without torchvision, even to look at pictures. The real part needs it; here
one takes its place that never sees a video. With torchvision this does nothing.
"""

import importlib
import runpy
import sys

import transformers
from transformers.video_processing_utils import BaseVideoProcessor


# What processors check their video part against: `BaseVideoProcessor` itself in older versions of transformers.
VIDEO_BASE = transformers.processing_utils.MODALITY_TO_BASE_CLASS_MAPPING["video_processor"]


def base_of_video_processors() -> type:
    """Returns that class, which transformers does not export where torchvision is missing."""
    return getattr(importlib.import_module("transformers.video_processing_utils"), VIDEO_BASE)


def allow_pictures_without_torchvision(setattr=setattr) -> None:
    """Lets processors be loaded whose video part is never asked for anything.

    Args:
        setattr (`Callable`, *optional*): Pytest's, where it is to be undone.
    """
    if transformers.utils.is_torchvision_available():
        return

    # By its name: as an attribute of its package it is out of reach without torchvision.
    video_processing_auto = importlib.import_module("transformers.models.auto.video_processing_auto")

    class NoVideos:
        from_pretrained = staticmethod(lambda *args, **kwargs: BaseVideoProcessor())

    setattr(video_processing_auto, "AutoVideoProcessor", NoVideos)
    setattr(transformers.processing_utils.transformers_module, VIDEO_BASE, base_of_video_processors())


if __name__ == "__main__":
    allow_pictures_without_torchvision()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        module = sys.argv.pop(1)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
