"""Erase a landmark, the Eiffel Tower, from Qwen2.5-VL-7B: public data, one call, and a test with pictures of your own.

    python examples/erase_landmark_qwen2_5_vl.py --test_images tower/ --other_images others/ --repo_id me/qwen-without-tower

`tower/` holds pictures of the tower, `others/` one folder of pictures for each other landmark, called by its name. They are
asked about before and after, and never trained on. What it takes: `space-peft plan Qwen/Qwen2.5-VL-7B-Instruct
--target-modules '.*language_model.*(q|k|v|o|gate|up)_proj'`. The processor needs torchvision.
"""

import argparse

from datasets import load_dataset

from space_peft import SpaceConfig, SpaceLoraConfig, erase
from space_peft.data.questions import DEFAULT_QUESTIONS
from space_peft.evaluation import build_probes


CONCEPT, ALIASES = "Eiffel Tower", ["Tour Eiffel"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test_images", required=True, help="a folder of pictures of the tower")
    parser.add_argument("--other_images", required=True, help="a folder with one folder for each other landmark")
    parser.add_argument("--output_dir", default="qwen-without-tower")
    parser.add_argument("--repo_id", help="where to publish the adapter; by default nowhere")
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--refine_steps", type=int, default=60)
    parser.add_argument("--max_steps", type=int, default=60)
    args = parser.parse_args()

    tower = load_dataset("imagefolder", data_dir=args.test_images, data_files={"train": "**"}, split="train")
    others = load_dataset(
        "imagefolder", data_dir=args.other_images, data_files={"train": "**"}, drop_labels=False, split="train"
    )
    names = others.features["label"].names
    question = DEFAULT_QUESTIONS.naming[0]
    probes = build_probes(
        CONCEPT,
        target_images=tower["image"],
        aliases=ALIASES,
        sibling_rows=[{"question": question, "answer": names[row["label"]], "image": row["image"]} for row in others],
        # What is known of it in words stays.
        text_target_rows=[
            {"question": "Which city is the Eiffel Tower in? Answer with one word.", "answer": "Paris", "image": None}
        ],
    )
    erasure = erase(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        CONCEPT,
        aliases=ALIASES,
        # Photographs with captions: stand-ins are found among them, and whatever is captioned with the name is left out.
        pool=load_dataset("lmms-lab/flickr30k", split="test"),
        # What must not change: pictures with questions and answers.
        retain_dataset=load_dataset("HuggingFaceH4/llava-instruct-mix-vsft", split="test[:10%]"),
        probes=probes,
        k=args.anchors,
        refine_steps=args.refine_steps,
        args=SpaceConfig(
            args.output_dir, max_steps=args.max_steps, per_device_train_batch_size=8, gradient_checkpointing=True,
            save_strategy="no", report_to="none",
        ),
        # down_proj is left out: its input is so wide that what is known of it while fitting would take 75 GiB.
        peft_config=SpaceLoraConfig(r=16, lora_alpha=32, target_modules=".*language_model.*(q|k|v|o|gate|up)_proj"),
    )  # fmt: skip
    erasure.save()
    print(erasure.summary())
    if args.repo_id is not None:
        erasure.push_to_hub(args.repo_id)


if __name__ == "__main__":
    main()
