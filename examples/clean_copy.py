"""Write a copy of an image set without the samples that a scan found suspect. The original stays as it is.

python examples/clean_copy.py photos/ clean.parquet
"""

import sys
from pathlib import Path

from unpoison import load_clip, open_images, scan_dataset, select_clean, write_clean_copy


def main(source: str, output: str) -> None:
    images = open_images(source)
    outcome = scan_dataset(images, clip=load_clip("tiny"))
    chosen = select_clean(outcome.split, decisions={})
    unreadable = write_clean_copy(images, chosen.rows, Path(output))
    print(f"{chosen.kept - len(unreadable)} of {len(images)} samples are in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
