"""Recreate the bundled images: the first 200 of each class of Fashion-MNIST's training set, as PNG.

python dataset/make_slice.py --data_dir data --download True
"""

import argparse
from pathlib import Path

PER_CLASS = 200


def main() -> None:
    """Write dataset/CLASS/NUMBER.png, NUMBER being the image's position in the original training set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="where FashionMNIST/raw lies or is downloaded to")
    parser.add_argument("--download", default="False", choices=["True", "False"])
    parser.add_argument("--out", default=Path(__file__).parent, type=Path)
    args = parser.parse_args()

    from torchvision.datasets import FashionMNIST

    source = FashionMNIST(args.data_dir, train=True, download=args.download == "True")
    counts = dict.fromkeys(source.classes, 0)
    for index, (image, label) in enumerate(source):
        name = source.classes[label]
        if counts[name] < PER_CLASS:
            counts[name] += 1
            folder = args.out / name.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index:05d}.png", optimize=True)
    print(f"{sum(counts.values())} images of {len(counts)} classes in {args.out}")


if __name__ == "__main__":
    main()
