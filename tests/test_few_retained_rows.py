"""Next to no retained rows, or none with an image: the user is told what was got, and what to do."""

import warnings

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from space_peft import NullSpaceCallback
from space_peft.modeling.prompts import conversation
from space_peft.retained.reading import FEW_ROWS, RetainedRows
from space_peft.trainers import GradDiffConfig, GradDiffTrainer


def rows(count, images=0):
    return [
        conversation(f"what is {i}?", answer="a thing", image=Image.new("RGB", (4, 4)) if i < images else None)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "images", "said"),
    [
        (1, 1, "has 1 row, 1 of them with an image"),
        (1, 0, "has 1 row, 0 of them with an image"),
        (FEW_ROWS - 1, 5, f"has {FEW_ROWS - 1} rows, 5 of them with an image"),
        (FEW_ROWS, 0, f"has {FEW_ROWS} rows, none shows an image"),
        (FEW_ROWS, 1, None),
    ],
)
def test_few_rows_are_said(count, images, said):
    retained = RetainedRows(rows(count, images))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        retained.warn_if_few()
        NullSpaceCallback(DataLoader(retained, collate_fn=lambda rows: rows))
        with pytest.raises(OSError, match="nowhere"):  # No such model: what is said of the rows is said before.
            GradDiffTrainer(
                "nowhere/at/all", GradDiffConfig("out", use_cpu=True, report_to="none"), forget_dataset=rows(1, 1),
                retain_dataset=retained.rows, concept="fox",
            )  # fmt: skip
    told = [str(warning.message) for warning in caught if "the retained dataset has" in str(warning.message)]
    assert len(told) == (3 if said else 0)
    assert all(said in text and "retained_answers(model, processor, images)" in text for text in told)
    assert {warning.filename for warning in caught if "the retained dataset" in str(warning.message)} <= {__file__}
