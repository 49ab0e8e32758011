"""Every entry that takes rows, images or batches refuses what it would misread, by name."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image
from tiny_models import text_batch, tiny_llama
from torch.utils.data import DataLoader

from space_peft import NullSpaceCallback, SpaceLoraConfig, fit_null_space, refine_anchors
from space_peft.anchors import anchor_info, select_random_anchors
from space_peft.data.questions import DEFAULT_QUESTIONS
from space_peft.evaluation import Probe, build_probes, evaluate_probes
from space_peft.null_space.certificate import measure_certificate
from space_peft.retained.reading import RetainedRows
from space_peft.retained.self_distillation import retained_answers
from trainers import GradDiffTrainer, SpaceTrainer
from trainers.forget_trainer import forget_conversations


PICTURE = Image.new("RGB", (4, 4))
ROW = {"prompt": "what is this?", "completion": "fox", "image": PICTURE, "question": "what is this?", "answer": "fox"}


def _rows():
    return Dataset.from_list([{"image": PICTURE, "question": "q", "answer": "a"}]).cast_column("image", ImageFeature())


def _trainer(**data):
    return GradDiffTrainer("nowhere", forget_dataset=[{"image": PICTURE}], concept="fox", **data)


ENTRIES = {
    "RetainedRows": RetainedRows,
    "retain_dataset": lambda rows: _trainer(retain_dataset=rows),
    "forget_dataset": lambda rows: GradDiffTrainer("nowhere", forget_dataset=rows, retain_dataset=[], concept="fox"),
    "anchors": lambda rows: SpaceTrainer("nowhere", anchors=rows, retain_dataset=[]),
    "anchor_info": anchor_info,
    "refine_anchors": lambda rows: refine_anchors(rows, model=None, processor=None),
    "pool": lambda rows: select_random_anchors("fox", rows),
    "Probe": lambda rows: Probe("retain", rows, "equals"),
    "retain_rows": lambda rows: build_probes("fox", questions=DEFAULT_QUESTIONS, retain_rows=rows),
    "text_rows": lambda rows: build_probes("fox", questions=DEFAULT_QUESTIONS, text_rows=rows),
    "target_images": lambda rows: build_probes("fox", questions=DEFAULT_QUESTIONS, target_images=rows),
    "retained_answers": lambda rows: retained_answers(None, None, rows),
    "NullSpaceCallback": NullSpaceCallback,
    "fit_null_space": lambda rows: fit_null_space(_adapted(), rows, progress=False),
    "measure_certificate": lambda rows: _certificate(rows),
}
GIVEN = {
    "DatasetDict": lambda: DatasetDict({"train": _rows()}),
    "IterableDataset": lambda: _rows().to_iterable_dataset(),
    "IterableDatasetDict": lambda: IterableDatasetDict({"train": _rows().to_iterable_dataset()}),
    "text": lambda: "rows.jsonl",
}


def _certificate(rows):
    model = _adapted()
    return measure_certificate(model, fit_null_space(model, [text_batch()], progress=False), rows, progress=False)


def _adapted():
    return get_peft_model(tiny_llama(), SpaceLoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_names_what_it_got(entry, kind):
    says = f"got an? {kind}" if kind != "text" else "got (the text 'rows.jsonl'|a str)"
    with pytest.raises(TypeError, match=says):
        ENTRIES[entry](GIVEN[kind]())


@pytest.mark.parametrize("entry", ["NullSpaceCallback", "fit_null_space", "measure_certificate"])
def test_rows_are_no_batches(entry):
    with pytest.raises(TypeError, match="got a Dataset where batches .*DataLoader"):
        ENTRIES[entry](_rows())


@pytest.mark.parametrize("entry", ["NullSpaceCallback", "fit_null_space", "measure_certificate"])
def test_a_loader_of_rows_needs_a_collator(entry):
    given = Dataset.from_list([ROW]).cast_column("image", ImageFeature())
    for rows in (given, [ROW], RetainedRows(given)):
        with pytest.raises(
            TypeError, match=r"no `collate_fn`, .*keys.*completion.*encode_conversations\(processor, rows\)"
        ):
            ENTRIES[entry](DataLoader(rows, batch_size=2))
    with pytest.raises(TypeError, match="no `collate_fn`, and its rows .of type str"):
        ENTRIES[entry](DataLoader(["a"], batch_size=2))


def test_a_loader_of_encoded_rows_needs_none():
    batch = text_batch(rows=4)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    assert fit_null_space(_adapted(), DataLoader(rows, batch_size=2), progress=False)


@pytest.mark.parametrize(
    "batch, says",
    [
        ({"input_ids": [1, 2, 3]}, "`input_ids` of batch 0 is a list"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"of shape \(4,\); expected a tensor \(rows, length\)"),
        ([1, 2], "a batch is a list"),
    ],
)
def test_batches_are_tensors(batch, says):
    with pytest.raises(TypeError, match=says):
        fit_null_space(_adapted(), [batch], progress=False)


class _EndsEarly(torch.utils.data.Dataset):
    """Rows of which one runs into a `StopIteration`, as a `next` without a default does."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 3:
            next(iter(()))
        return text_batch(rows=1, seed=index)


def test_a_loader_that_ends_early_is_an_error():
    loader = DataLoader(_EndsEarly(), batch_size=1, collate_fn=lambda rows: rows[0])
    with pytest.raises(RuntimeError, match="ended after 3 of 6 batches; look for a StopIteration"):
        fit_null_space(_adapted(), loader, progress=False)


def test_a_pool_with_a_transform_is_refused():
    with pytest.raises(ValueError, match="transform, which would not be applied"):
        select_random_anchors("fox", _rows().with_transform(lambda batch: batch))


@pytest.mark.parametrize(
    "rows, says",
    [
        (["fox.png"], "row 0 of `forget_dataset` is a str"),
        ([{"image": PICTURE}, {"image": "missing.png"}], "row 1 of `forget_dataset`: .*no such file"),
        ([{"image": PICTURE}, {"img": PICTURE}], r"row 1 of `forget_dataset` has the columns \['img'\]"),
        (
            [{"prompt": "q", "completion": "fox", "image": PICTURE}, {"image": PICTURE}],
            "row to forget 1: .*no 'prompt'",
        ),
        ([{"prompt": "q", "completion": "fox"}], "row 0 of `forget_dataset` has no image"),
        ([{"prompt": "q", "completion": "fox", "picture": PICTURE}], "row to forget 0: the column 'picture'"),
    ],
)
def test_rows_to_forget_are_named(rows, says):
    with pytest.raises(ValueError, match=says):
        forget_conversations(rows, ["fox"], DEFAULT_QUESTIONS)


@pytest.mark.parametrize(
    "row, says",
    [
        ("what?", "row 1 of `retain_rows` has a str"),
        ({"answer": "a"}, r"row 1 of `retain_rows` has the keys \['answer'\]"),
    ],
)
def test_rows_of_probes_are_named(row, says):
    good = {"question": "q", "answer": "a"}
    with pytest.raises(ValueError, match=says):
        build_probes("fox", questions=DEFAULT_QUESTIONS, retain_rows=[good, row])
    with pytest.raises(ValueError, match="probe 'text', row 1"):
        evaluate_probes(None, None, [Probe("text", [good, row], "equals")])


def test_images_as_rows_are_named():
    with pytest.raises(TypeError, match=r"target_images\['image'\]"):
        build_probes("fox", questions=DEFAULT_QUESTIONS, target_images=_rows())
    with pytest.raises(ValueError, match="image 1: .*expected a PIL image, got str"):
        retained_answers(*_demo(), [PICTURE, "fox.png"], questions=["what is this?"], progress=False)


def _demo():
    from space_peft.demo import load_demo_model

    return load_demo_model()
