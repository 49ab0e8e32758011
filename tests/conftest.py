"""Fixtures shared by the tests: the embedded model, and a small erasure on it."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

CONCEPT = "fox"


@pytest.fixture
def demo_model():
    """A fresh copy of the embedded model and its processor: tests may train it."""
    from space_peft.demo import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="session")
def demo_images():
    from space_peft.demo import load_demo_images

    return load_demo_images()


@pytest.fixture(scope="session")
def demo_erasure_data(demo_images):
    """Refined anchors and retained rows for `CONCEPT`, made once: `(anchors, retained rows)`."""
    from space_peft import refine_anchors, select_anchors
    from space_peft.demo import DEMO_QUESTIONS, load_demo_model
    from space_peft.demo.probes import demo_retain_rows, demo_split

    model, processor = load_demo_model()
    public, _ = demo_split(demo_images)
    pool = public.filter(lambda name: name != CONCEPT, input_columns="name")
    anchors = select_anchors(CONCEPT, pool, model=model, processor=processor, k=8, cache_dir=False, progress=False)
    anchors = refine_anchors(
        anchors, model=model, processor=processor, questions=DEMO_QUESTIONS, steps=25, progress=False
    )
    # A part is enough to test the machinery; the whole is what the benchmark uses.
    return anchors, demo_retain_rows(CONCEPT, public, seed=0)[:160]
