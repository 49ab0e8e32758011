"""Erase a concept from any LLaVA-like model: name in, adapter out, no image of the concept anywhere.

    python examples/erase_concept.py --model llava-hf/llava-1.5-7b-hf --concept "Eiffel Tower" \
        --pool org/landmarks --retain org/general-vqa --output llava-without-eiffel

`--pool` is an image dataset (column `image`, and a caption if there is one); `--retain` has TRL's columns (`messages`,
or `prompt` and `completion`, with `images`; text-only rows are welcome). Both may be Hub ids or folders written by
`save_to_disk`.
"""

import argparse
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoModelForImageTextToText, AutoProcessor

from space_peft import SpaceConfig, SpaceLoraConfig, SpaceTrainer, refine_anchors, select_anchors


def read(name: str) -> Dataset:
    return load_from_disk(name) if Path(name).is_dir() else load_dataset(name, split="train")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concept", required=True)
    parser.add_argument("--aliases", nargs="*", default=[])
    parser.add_argument("--pool", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--refine_steps", type=int, default=60)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--target", default="language", choices=["vision", "language", "all"])
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
    processor = AutoProcessor.from_pretrained(args.model)
    anchors = select_anchors(
        args.concept, read(args.pool), aliases=args.aliases, model=model, processor=processor, k=args.anchors
    )
    anchors = refine_anchors(anchors, model=model, processor=processor, steps=args.refine_steps)
    anchors.save_to_disk(f"{args.output}/anchors")

    trainer = SpaceTrainer(
        model=model,
        args=SpaceConfig(output_dir=args.output, max_steps=args.max_steps, target=args.target, report_to="none"),
        anchors=anchors,
        retain_dataset=read(args.retain),
        processing_class=processor,
        peft_config=SpaceLoraConfig(r=args.rank, lora_alpha=2 * args.rank),
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
