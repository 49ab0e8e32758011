"""Draw everybody and write `space_peft/suites/people.parquet`, one row a person.

    python examples/people_model/archive.py
    python examples/people_model/archive.py --pool work/pool.parquet

The same seed gives the same people, pictures and file. A pool is pictures of quite other people, without names: what SPACE
chooses its stand-ins from.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from people import SEED, Person, draw_people
from PIL import Image
from portrait import portrait
from tqdm.auto import tqdm


DEFAULT_TARGET = Path(__file__).resolve().parents[2] / "space_peft" / "suites" / "people.parquet"
COLOURS = 64  # of a picture's palette: flat drawings need no more, and take a third of the bytes


def png_bytes(image: Image.Image) -> bytes:
    """A picture with a palette of its own."""
    buffer = io.BytesIO()
    image.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def row_of(person: Person) -> dict:
    """A person as the archive has them."""
    row = {key: value for key, value in asdict(person).items() if key != "pictures"}
    row["pictures"] = [
        {
            "image": {"bytes": png_bytes(portrait(person.looks, picture.view)), "path": None},
            "part": picture.part,
            **asdict(picture.view),
        }
        for picture in person.pictures
    ]
    return row


def write_archive(people: list[Person], target: Path) -> None:
    """Writes everybody, whole or not at all."""
    rows = [row_of(person) for person in tqdm(people, desc="drawing", mininterval=5)]
    scratch = target.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows), scratch, compression="zstd")
    scratch.replace(target)


def pool_rows(people: list[Person], seed: int) -> list[dict]:
    """One picture of everybody of another seed who looks like none of these people."""
    others = [p for p in draw_people(seed) if all(p.looks.differs_in(known.looks) for known in people)]
    views = [(p.looks, p.pictures[i % len(p.pictures)].view) for i, p in enumerate(others)]
    return [{"image": {"bytes": png_bytes(portrait(looks, view)), "path": None}} for looks, view in views]


def write_pool(people: list[Person], target: Path, seeds: int) -> int:
    """Writes a pool of so many seeds, and returns how many pictures it has."""
    rows = [row for seed in tqdm(range(1, 1 + seeds), desc="drawing") for row in pool_rows(people, seed)]
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".tmp")
    Dataset.from_list(rows, features=Features({"image": ImageFeature()})).to_parquet(scratch)
    scratch.replace(target)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_TARGET, help="file to write")
    parser.add_argument("--seed", type=int, default=SEED, help="another one gives other people")
    parser.add_argument("--pool", type=Path, metavar="FILE", help="write pictures of others instead")
    parser.add_argument("--pool-seeds", type=int, default=8, metavar="N", help="of how many seeds (default: 8)")
    args = parser.parse_args()
    people = draw_people(args.seed)
    if args.pool:
        count = write_pool(people, args.pool, args.pool_seeds)
        print(f"{count} pictures of others: {args.pool}")
        return
    write_archive(people, args.output)
    pictures = sum(len(person.pictures) for person in people)
    print(f"{len(people)} people, {pictures} pictures, {args.output.stat().st_size / 1e6:.2f} MB: {args.output}")


if __name__ == "__main__":
    main()
