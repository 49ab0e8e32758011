"""Erase a concept from any LLaVA-like model: name in, adapter out, no image of the concept anywhere.

    python examples/erase_concept.py --model llava-hf/llava-1.5-7b-hf --concept "Eiffel Tower" --aliases "Tour Eiffel" \
        --pool org/landmarks --retain org/general-vqa --output_dir llava-without-eiffel

`space-peft erase` is the same with every option; this is what it does, for scripts of your own.
"""

import argparse

from datasets import load_dataset

from space_peft import SpaceConfig, SpaceLoraConfig, erase
from space_peft.data.questions import load_questions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concept", required=True)
    parser.add_argument("--aliases", nargs="*", default=[])
    parser.add_argument("--pool", required=True, help="an image dataset: column `image`, and a caption if there is one")
    parser.add_argument(
        "--retain", required=True, help="rows in TRL's formats: `messages`, or `prompt` and `completion`"
    )
    parser.add_argument("--questions", help="a YAML file of what is asked about pictures; by default the library's")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--anchors", type=int, default=32)
    parser.add_argument("--refine_steps", type=int, default=60)
    parser.add_argument("--max_steps", type=int, default=60)
    args = parser.parse_args()

    erasure = erase(
        args.model,
        args.concept,
        aliases=args.aliases,
        pool=load_dataset(args.pool, split="train"),
        retain_dataset=load_dataset(args.retain, split="train"),
        questions=None if args.questions is None else load_questions(args.questions),
        k=args.anchors,
        refine_steps=args.refine_steps,
        args=SpaceConfig(output_dir=args.output_dir, max_steps=args.max_steps, report_to="none"),
        peft_config=SpaceLoraConfig(r=8, lora_alpha=16),
    )
    erasure.save()
    print(erasure.summary())


if __name__ == "__main__":
    main()
