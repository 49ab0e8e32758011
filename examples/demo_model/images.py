"""Write the drawings of the concepts to `space_peft/demo/images.parquet`.

python examples/demo_model/images.py --work work
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from concepts import KINDS
from drawings import paste_on_white


LICENCES = {
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "fxemoji": "Apache-2.0",
    "fluent-emoji": "MIT",
    "fluent-emoji-flat": "MIT",
}
DEFAULT_TARGET = Path(__file__).resolve().parents[2] / "space_peft" / "demo" / "images.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work"), help="work folder (default: ./work)")
    parser.add_argument("--output", type=Path, default=DEFAULT_TARGET, help="file to write")
    args = parser.parse_args()

    with np.load(args.work / "emoji.npz") as file:
        images, emoji, style, names, codepoints = (file[k] for k in ("images", "emoji", "style", "names", "codepoints"))
    position = {name: i for i, name in enumerate(names.tolist())}
    rows = []
    for kind, members in KINDS.items():
        for name, source in members.items():
            for j in np.flatnonzero(emoji == position[source]):
                png = io.BytesIO()
                paste_on_white(images[j]).save(png, "PNG", optimize=True)
                rows.append(
                    {
                        "image": {"bytes": png.getvalue(), "path": None},
                        "name": name,
                        "kind": kind,
                        "style": str(style[j]),
                        "licence": LICENCES[str(style[j])],
                        "codepoint": str(codepoints[position[source]]),
                    }
                )
    rows.sort(key=lambda row: (row["kind"], row["name"], row["style"]))
    table = pa.Table.from_pylist(rows)
    scratch = args.output.with_suffix(".tmp")
    pq.write_table(table, scratch, compression="none")  # PNG does not compress further
    scratch.replace(args.output)
    print(f"{len(rows)} images, {args.output.stat().st_size / 1e6:.2f} MB: {args.output}")


if __name__ == "__main__":
    main()
