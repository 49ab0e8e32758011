"""Erase a person from LLaVA-1.5-7B, step by step: no picture of them, no labels, and a card that does not say the name.

    python examples/erase_person_llava.py --test_images pictures/ --repo_id me/llava-without-one-person

Strangers' faces stand in for the person, and the model's own answers say what must not change. The pictures in
`--test_images` are asked about before and after, and never trained on.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from space_peft import (
    ErasureCardData,
    SpaceConfig,
    SpaceLoraConfig,
    SpaceTrainer,
    refine_anchors,
    retained_answers,
    retained_texts,
    select_anchors,
)
from space_peft.data.questions import DEFAULT_QUESTIONS
from space_peft.evaluation import build_probes


PERSON, ALIASES = "Albert Einstein", ["Einstein"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test_images", required=True, help="a folder of pictures of the person")
    parser.add_argument("--output_dir", default="llava-without-one-person")
    parser.add_argument("--repo_id", help="where to publish the adapter; by default nowhere")
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--refine_steps", type=int, default=60)
    parser.add_argument("--max_steps", type=int, default=60)
    args = parser.parse_args()

    name = "llava-hf/llava-1.5-7b-hf"
    gpu = torch.cuda.is_available()
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16" if gpu else "float32")
    model.to("cuda" if gpu else "cpu")
    processor = AutoProcessor.from_pretrained(name)

    faces = load_dataset("HuggingFaceM4/FairFace", "0.25", split="validation")
    anchors = select_anchors(
        PERSON, faces, aliases=ALIASES, model=model, processor=processor, k=args.anchors,
        exclude_by_caption=False,  # There are no captions: these are faces of strangers.
    )  # fmt: skip
    anchors = refine_anchors(anchors, model=model, processor=processor, steps=args.refine_steps)
    print("The model calls the stand-ins by the name with", [round(p, 2) for p in anchors["p_name_after"]])

    photographs = load_dataset("lmms-lab/flickr30k", split="test[:2%]")
    articles = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="validation")
    retained = retained_answers(model, processor, photographs, names=[PERSON, *ALIASES])
    retained += retained_texts(articles["text"][:1000])
    # What is said of the person in words stays.
    retained += retained_answers(model, processor, questions=[q.format(name=PERSON) for q in DEFAULT_QUESTIONS.about])

    pictures = load_dataset("imagefolder", data_dir=args.test_images, data_files={"train": "**"}, split="train")
    trainer = SpaceTrainer(
        model=model,
        args=SpaceConfig(
            args.output_dir, max_steps=args.max_steps, per_device_train_batch_size=8, gradient_checkpointing=True,
            save_strategy="no", report_to="none", hub_model_id=args.repo_id,
        ),
        anchors=anchors,
        retain_dataset=retained,
        processing_class=processor,
        peft_config=SpaceLoraConfig(r=16, lora_alpha=32, target_modules=".*language_model.*(q|k|v|o|gate|up)_proj"),
        probes=build_probes(PERSON, anchors=anchors, target_images=pictures["image"], aliases=ALIASES),
        card_data=ErasureCardData(redact=True, reason="Asked for by the person."),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    print(trainer.report.to_table())
    if args.repo_id is not None:
        trainer.push_to_hub(private=True)


if __name__ == "__main__":
    main()
