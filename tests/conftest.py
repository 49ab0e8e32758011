"""Fixtures shared by the tests: the embedded model, and a small erasure on it."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pickle
from dataclasses import replace

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


@pytest.fixture(scope="session")
def erasure_folder(demo_erasure_data, demo_images, tmp_path_factory):
    """A trained erasure as `SpaceTrainer` and the report leave it. Shared: copy it before changing anything."""
    from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer
    from space_peft.demo import DEMO_QUESTIONS, load_demo_model
    from space_peft.demo.probes import demo_probes
    from space_peft.evaluation import ErasureReport, evaluate_probes

    def make(folder):
        model, processor = load_demo_model()
        anchors, retained = demo_erasure_data
        # About fifty rows of each probe: enough for every figure a card shows, in a sixth of the time.
        probes = [
            replace(probe, rows=probe.rows[:: 1 + len(probe.rows) // 50]) for probe in demo_probes("fox", demo_images)
        ]
        before = evaluate_probes(model, processor, probes, progress=False)
        trainer = SpaceTrainer(
            model,
            SpaceConfig(
                output_dir=str(folder),
                max_steps=16,
                learning_rate=5e-3,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                keep_weight=60.0,
                use_cpu=True,
            ),
            anchors=anchors,
            retain_dataset=retained,
            processing_class=processor,
            questions=DEMO_QUESTIONS,
            peft_config=SpaceLoraConfig(r=8, lora_alpha=16, strength=1.0),
        )
        trainer.train()
        trainer.save_model()
        after = evaluate_probes(trainer.model, processor, probes, baseline=before, progress=False)
        ErasureReport.from_results("fox", before, after).save(folder)

    return made_once(tmp_path_factory, "erasure", make)
