"""The README.md beside a saved adapter: PEFT's empty one does not stay, and a person's is not edited."""

import pytest
from peft import LoraConfig, PeftModel
from tiny_models import tiny_llama

from space_peft.hub_cards.card import GENERATED
from space_peft.trainers.publishing import PublishingMixin


@pytest.fixture(scope="module")
def model():
    return PeftModel(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("before", "same", "kept"),
    [
        (None, False, False),
        (None, True, False),
        ("# My own words\n", False, True),
        ("---\nlicense: mit\n---\n# My own words\n", True, True),
        (f"{GENERATED} 0.1.0 -->\n# A model without fox\n", True, True),
        (f"{GENERATED} 0.1.0 -->\n# A model without fox\n", False, False),
    ],
)
def test_the_card_after_saving(model, tmp_path, before, same, kept):
    readme = tmp_path / "README.md"
    if before is not None:
        readme.write_text(before)
    card = PublishingMixin._card_before(tmp_path)
    model.save_pretrained(str(tmp_path))
    assert readme.is_file() and readme.read_text() != before, "PEFT writes one, or edits what is there"
    PublishingMixin._keep_card(tmp_path, card, same=same)
    assert readme.exists() == kept and (not kept or readme.read_text() == before)
