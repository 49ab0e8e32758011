"""The session's erasure, with all that attacks are tried on. Tests leave it as it is."""

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def erasure(erasure_folder, demo_erasure_data, demo_images):
    """`model` (PeftModel), `processor`, `concept`, `target` (its images), `others` (images of other concepts)."""
    from peft import PeftModel

    from space_peft import anchor_info
    from space_peft.demo import load_demo_model

    concept = anchor_info(demo_erasure_data[0])["concept"]
    model, processor = load_demo_model()
    model = PeftModel.from_pretrained(model, erasure_folder, is_trainable=True).eval()  # as trained
    others = [row["image"] for row in demo_images.select(range(0, len(demo_images), 24)) if row["name"] != concept]
    return SimpleNamespace(
        model=model,
        processor=processor,
        concept=concept,
        target=[row["image"] for row in demo_images if row["name"] == concept],
        others=others,
        folder=erasure_folder,
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
