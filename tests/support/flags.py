"""Where the committed images are, and the flags of runs and stores that are small enough for tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = str(ROOT / 'examples' / 'fashion_mnist')
SMALL_VIEWS = ['--img-size', '32', '--scale', '0.6', '1', '--color-jitter', '0']
SMALL_VIT = ['--model', 'test_vit', '--model-kwargs', 'img_size=32']
# Of a TinyViT, for --model-kwargs.
SMALL_TINY_VIT = ['embed_dims=[16,32,64,80]', 'depths=[1,1,2,1]', 'num_heads=[1,2,4,5]']


def small_data(train: int, test: int | None = None) -> list[str]:
    """The first training images, and test images where they are asked for, at 32 pixels and without workers."""
    test_split = [] if test is None else ['--val-split', f'test[:{test}]']
    return ['--dataset', DATA, '--train-split', f'train[:{train}]', *test_split, '--img-size', '32', '-j', '0']
