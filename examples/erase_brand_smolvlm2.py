"""Erase a brand, Coca-Cola, from SmolVLM2-2.2B: it says "drink" instead, and a merged model is what you release.

    python examples/erase_brand_smolvlm2.py --test_images bottles/ --merged smolvlm2-without-the-brand

The pictures in `--test_images` are asked about before and after, and never trained on. The processor needs torchvision and
num2words.
"""

import argparse

from datasets import load_dataset

from space_peft import SpaceConfig, SpaceLoraConfig, erase
from space_peft.evaluation import build_probes


BRAND, ALIASES = "Coca-Cola", ["Coke"]


def conversation(row: dict) -> dict:
    """A row of the Cauldron, on which the model was trained, as TRL writes conversations."""
    messages = []
    for turn in row["texts"]:
        messages.append({"role": "user", "content": turn["user"]})
        messages.append({"role": "assistant", "content": turn["assistant"]})
    return {"messages": messages}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test_images", required=True, help="a folder of pictures with the brand")
    parser.add_argument("--output_dir", default="smolvlm2-erasure")
    parser.add_argument("--merged", help="a new folder for the model with the erasure in its weights; by default none")
    parser.add_argument("--repo_id", help="where to publish the adapter; by default nowhere")
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--refine_steps", type=int, default=60)
    parser.add_argument("--max_steps", type=int, default=60)
    args = parser.parse_args()

    pictures = load_dataset("imagefolder", data_dir=args.test_images, data_files={"train": "**"}, split="train")
    retained = load_dataset("HuggingFaceM4/the_cauldron", "cocoqa", split="train[:3%]")
    erasure = erase(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        BRAND,
        aliases=ALIASES,
        pool=load_dataset("lmms-lab/flickr30k", split="test"),
        retain_dataset=retained.map(conversation, remove_columns="texts"),
        probes=build_probes(BRAND, target_images=pictures["image"], aliases=ALIASES),
        k=args.anchors,
        refine_steps=args.refine_steps,
        args=SpaceConfig(
            args.output_dir, max_steps=args.max_steps, overwrite="kind", broader_word="drink",
            per_device_train_batch_size=8, gradient_checkpointing=True, save_strategy="no", report_to="none",
        ),
        peft_config=SpaceLoraConfig(r=16, lora_alpha=32, target_modules=".*text_model.*(q|k|v|o|gate|up)_proj"),
    )  # fmt: skip
    erasure.save()
    print(erasure.summary())
    if args.merged is not None:
        # An adapter can be switched off by whoever has it; this cannot.
        erasure.merge(args.merged)
    if args.repo_id is not None:
        erasure.push_to_hub(args.repo_id)


if __name__ == "__main__":
    main()
