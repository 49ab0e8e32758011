"""One small erasure, trained once a session, that all attacks are tried on. Tests leave it as it is."""

from types import SimpleNamespace

import pytest
from sharing import made_once


@pytest.fixture(scope="session")
def erasure(demo_erasure_data, demo_images, tmp_path_factory):
    """`model` (PeftModel), `processor`, `concept`, `target` (its images), `others` (images of other concepts)."""
    from peft import PeftModel

    from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, anchor_info
    from space_peft.demo import DEMO_QUESTIONS, load_demo_model

    anchors, retained = demo_erasure_data
    concept = anchor_info(anchors)["concept"]
    settings = {"max_steps": 40, "learning_rate": 4e-3, "canary_items": 0, "certificate_share": 0.0}
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}

    def make(folder):
        model, processor = load_demo_model()
        trainer = SpaceTrainer(
            model,
            SpaceConfig(str(folder), **settings, **quiet),
            anchors=anchors,
            retain_dataset=retained,
            processing_class=processor,
            questions=DEMO_QUESTIONS,
            peft_config=SpaceLoraConfig(r=8, lora_alpha=16),
        )
        trainer.train()
        trainer.save_model()

    folder = made_once(tmp_path_factory, "attacked", make)
    model, processor = load_demo_model()
    model = PeftModel.from_pretrained(model, folder, is_trainable=True).eval()  # as trained
    others = [row["image"] for row in demo_images.select(range(0, len(demo_images), 24)) if row["name"] != concept]
    return SimpleNamespace(
        model=model,
        processor=processor,
        concept=concept,
        target=[row["image"] for row in demo_images if row["name"] == concept],
        others=others,
        folder=folder,
    )


@pytest.fixture
def unchanged(erasure):
    """Fails the test if an attack leaves the erased model's weights, mode or gradients other than it found them."""
    state = {name: value.clone() for name, value in erasure.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in erasure.model.parameters()]
    yield
    assert not erasure.model.training
    assert flags == [parameter.requires_grad for parameter in erasure.model.parameters()]
    for name, value in erasure.model.state_dict().items():
        assert value.equal(state[name]), name
