"""Draw the demo's images from Fashion-MNIST, as a folder of parquet files that `--dataset` takes.

    python examples/fashion_mnist/draw.py --output examples/fashion_mnist
    python examples/fashion_mnist/draw.py --output runs/fashion_mnist --train 60000 --test 10000

The full data comes from the Hub, or with `--source` from a folder with the four original IDX files: the Debian
package dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist.
"""

import argparse
import gzip
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

CLASSES = [
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']
DEBIAN = Path('/usr/share/datasets/fashion-mnist')
HUB = 'zalando-datasets/fashion_mnist'


def read_idx(file: Path) -> np.ndarray:
    """The array of a gzipped IDX file: two zero bytes, type 8 for uint8, number of dimensions, sizes, data."""
    data = gzip.decompress(file.read_bytes())
    sizes = np.frombuffer(data, '>i4', count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)


def read_split(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [N, 28, 28], and labels, int [N], of `train` or `test`."""
    if Path(source).is_dir():
        stem = 'train' if split == 'train' else 't10k'
        return tuple(read_idx(Path(source) / f'{stem}-{kind}-ubyte.gz') for kind in ('images-idx3', 'labels-idx1'))
    rows = datasets.load_dataset(source, split=split)
    return np.stack([np.asarray(image) for image in rows['image']]), np.asarray(rows['label'])


def draw(images: np.ndarray, labels: np.ndarray, count: int, seed: int) -> datasets.Dataset:
    """`count` random images as PNG, as many of each class as of any other."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    place = np.empty(len(labels), dtype=int)  # how many of its class come before an image in the random order
    for label in range(len(CLASSES)):
        rows = order[labels[order] == label]
        place[rows] = np.arange(len(rows))
    picked = np.lexsort((order.argsort(), place))[:count]
    picked = picked[np.argsort(order.argsort()[picked])]

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, 'PNG', optimize=True)
        return file.getvalue()

    columns = {
        'image': [{'bytes': png(images[row]), 'path': None} for row in picked],
        'label': labels[picked].astype(int).tolist(),
    }
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict(columns, features=features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--source', default=str(DEBIAN) if DEBIAN.is_dir() else HUB, help='folder, or Hub name')
    parser.add_argument('--output', required=True, type=Path, help='folder for train.parquet and test.parquet')
    parser.add_argument('--train', type=int, default=1000, help='training images')
    parser.add_argument('--test', type=int, default=2500, help='test images')
    parser.add_argument('--seed', type=int, default=0, help='which images')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for split, count in (('train', args.train), ('test', args.test)):
        file = args.output / f'{split}.parquet'
        # 1 MB of images at most in a row group, so that a reader of few rows reads little.
        draw(*read_split(args.source, split), count, args.seed).to_parquet(file, batch_size=1000)
        print(f'{file}: {count} images, {file.stat().st_size / 1024:.0f} KiB')


if __name__ == '__main__':
    main()
