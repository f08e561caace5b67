"""The arguments of a training view: plain data, which flags, manifests and cards are made of without torch or timm."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..base.errors import InputError
from ..base.types import is_like

__all__ = ['VIEW_FLAGS', 'ViewConfig', 'view_flag']

MAX_NUMBER = 4096
# Flag of timm's train.py -> entry of ViewConfig.
VIEW_FLAGS = {
    'no_aug': 'no_aug', 'train_crop_mode': 'train_crop_mode', 'scale': 'scale', 'ratio': 'ratio', 'hflip': 'hflip',
    'vflip': 'vflip', 'color_jitter': 'color_jitter', 'color_jitter_prob': 'color_jitter_prob',
    'grayscale_prob': 'grayscale_prob', 'gaussian_blur_prob': 'gaussian_blur_prob', 'aa': 'auto_augment',
    'train_interpolation': 'interpolation', 'view_mean': 'mean', 'view_std': 'std', 'reprob': 're_prob',
    'remode': 're_mode', 'recount': 're_count', 'mixup': 'mixup', 'cutmix': 'cutmix',
    'cutmix_minmax': 'cutmix_minmax', 'mixup_prob': 'mixup_prob', 'mixup_switch_prob': 'mixup_switch_prob',
    'decoder': 'decoder',
}


def view_flag(entry: str) -> str:
    """The flag that sets an entry of the view config, for error messages."""
    flags = {entry: flag for flag, entry in VIEW_FLAGS.items()} | {'input_size': 'img_size'}
    return f'--{flags.get(entry, entry).replace("_", "-")}'


@dataclass(frozen=True)
class ViewConfig:
    """Every argument of timm's `create_transform` and `Mixup` that has a hand in a training view, and the decoder.

    `mean` and `std` belong to the view, not to a model: RandAugment fills with the mean, and erasing writes what is
    noise of unit variance once normalised with them.

    Raises:
        InputError: A value that timm's factory does not take.
    """
    input_size: tuple[int, int, int] = (3, 224, 224)
    no_aug: bool = False
    train_crop_mode: str = 'rrc'
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.
    color_jitter: float | tuple[float, ...] = 0.4
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.
    gaussian_blur_prob: float = 0.
    auto_augment: str | None = None
    interpolation: str = 'bicubic'
    # of ImageNet, as in timm
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    re_prob: float = 0.
    re_mode: str = 'pixel'
    re_count: int = 1
    mixup: float = 0.
    cutmix: float = 0.
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.
    mixup_switch_prob: float = 0.5
    decoder: str = 'pillow'
    exif: str = 'transpose'

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            optional = {'auto_augment': '', 'color_jitter_prob': 0., 'cutmix_minmax': (0., 0.)}
            example = optional.get(item.name, item.default)
            if item.name == 'color_jitter' and isinstance(value, tuple):
                example = (0.,) * len(value)
            if not is_like(value, example) and (value, item.default) != (None, None):
                raise InputError(
                    f'the view config has {view_flag(item.name)} {value!r}; expected values as in {example!r}')
            numbers = [number for number in (value if isinstance(value, tuple) else (value,))
                       if isinstance(number, (int, float))]
            # A manifest may come from anywhere, and a view of this size is made to probe it.
            if not all(-MAX_NUMBER <= number <= MAX_NUMBER for number in numbers):
                raise InputError(f'the view config has {view_flag(item.name)} {value!r}; expected {MAX_NUMBER} at most')
        probabilities = (
            'hflip', 'vflip', 'grayscale_prob', 'gaussian_blur_prob', 're_prob', 'mixup_prob', 'mixup_switch_prob')
        for name in probabilities:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f'the view config has {view_flag(name)} {getattr(self, name)}; expected a probability, 0 to 1')
        for name in ('scale', 'ratio', 're_count'):
            value = getattr(self, name)
            if not min(value if isinstance(value, tuple) else (value,)) > 0:
                raise InputError(f'the view config has {view_flag(name)} {getattr(self, name)}; expected more than 0')
        if self.input_size[0] != 3 or min(self.input_size) < 1:
            raise InputError(f'the view config has --img-size {self.input_size}; expected (3, height, width)')
        if self.decoder not in ('pillow', 'torch') or self.exif != 'transpose':
            raise InputError(
                f'the view config has --decoder {self.decoder} and the EXIF rule {self.exif!r}; this version of '
                f'timm_tinyvit knows pillow and torch, and transpose')
        if self.decoder == 'torch' and (self.no_aug or self.train_crop_mode != 'rrc'):
            raise InputError('--decoder torch needs --train-crop-mode rrc; give --decoder pillow for the others')
        if self.re_mode not in ('const', 'rand', 'pixel'):
            raise InputError(f'the view config has --remode {self.re_mode}; expected const, rand or pixel')
        for name in ('mixup', 'cutmix'):
            if getattr(self, name) < 0:
                raise InputError(
                    f'the view config has {view_flag(name)} {getattr(self, name)}; expected 0 for none, or more')
        low, high = self.cutmix_minmax or (0., 1.)
        if not 0 <= low < high <= 1 or any(int(side * low) == int(side * high) for side in self.input_size[1:]):
            raise InputError(
                f'the view config has --cutmix-minmax {self.cutmix_minmax}; expected two shares of height and '
                f'width, from 0 to 1 and at least one pixel apart')

    @property
    def is_mixed(self) -> bool:
        """Whether views are mixed in pairs, by Mixup or CutMix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def to_dict(self) -> dict[str, Any]:
        """The view config as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ViewConfig':
        """The view config of a manifest.

        Raises:
            InputError: It has entries that this version does not know, or lacks some.
        """
        odd = sorted(set(values) ^ {item.name for item in fields(cls)})
        if odd:
            raise InputError(f'the view config has unknown or missing entries: {", ".join(odd)}')
        return cls(**values)
