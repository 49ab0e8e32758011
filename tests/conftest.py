"""Fixtures shared by the tests: the embedded model, and a small erasure on it."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pickle

import pytest
import torch
from sharing import made_once


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

CONCEPT = "fox"


# Of a minute or more. Where two processes test, each takes a file at a time: with these first both end at about the same time.
LONG = (
    "test_space_trainer.py", "test_forget_trainers.py", "test_processes.py", "test_verify.py", "test_trainer_push.py",
    "test_ledger.py", "test_faults.py", "test_tampering.py", "test_given_adapter.py", "test_mmunlearner.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


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
def demo_erasure_data(demo_images, tmp_path_factory):
    """Refined anchors and retained rows for `CONCEPT`, made once: `(anchors, retained rows)`."""
    from datasets import load_from_disk

    from space_peft import refine_anchors, select_anchors
    from space_peft.demo import DEMO_QUESTIONS, load_demo_model
    from space_peft.demo.probes import demo_retain_rows, demo_split

    def make(folder):
        model, processor = load_demo_model()
        public, _ = demo_split(demo_images)
        pool = public.filter(lambda name: name != CONCEPT, input_columns="name")
        anchors = select_anchors(CONCEPT, pool, model=model, processor=processor, k=8, cache_dir=False, progress=False)
        anchors = refine_anchors(
            anchors, model=model, processor=processor, questions=DEMO_QUESTIONS, steps=25, progress=False
        )
        anchors.save_to_disk(folder / "anchors")
        # A part is enough to test the machinery; the whole is what the benchmark uses.
        (folder / "retained.pkl").write_bytes(pickle.dumps(demo_retain_rows(CONCEPT, public, seed=0)[:160]))

    folder = made_once(tmp_path_factory, "demo_erasure_data", make)
    return load_from_disk(folder / "anchors"), pickle.loads((folder / "retained.pkl").read_bytes())
