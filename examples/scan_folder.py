"""Is a set of labelled images poisoned? Scan it, print the verdict, write the report.

python examples/scan_folder.py photos/ scan/
"""

import sys
from pathlib import Path

from unpoison import load_clip, open_images, read_run, scan_dataset, write_report


def main(source: str, output: str) -> None:
    images = open_images(source)
    outcome = scan_dataset(images, clip=load_clip("tiny"))
    folder = Path(output)
    folder.mkdir(parents=True)
    outcome.scores.save(folder / "scores.parquet")
    outcome.split.save(folder / "split.parquet")
    outcome.scan.save(folder / "scan.json")
    write_report(folder / "report.html", [read_run(folder)])
    print("poisoned" if outcome.scan.estimate.poisoned else "no evidence of poison")
    print(outcome.scan.estimate.reason)


if __name__ == "__main__":
    main(*sys.argv[1:])
