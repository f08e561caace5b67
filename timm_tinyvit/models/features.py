"""Features of any timm backbone, with or without a classifier: its pooled vector, or its last map as a grid of vectors.

The pooled vector is what the classifier would see, as timm's own `FeatureDistillationTask` takes it. The map is what
`forward_features` gives, without class and register tokens, in whichever of timm's layouts: NCHW, NHWC or tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['feature_map', 'feature_vectors']


def feature_vectors(model: nn.Module, features: torch.Tensor, size: tuple[int, int], grid: int = 0) -> torch.Tensor:
    """Vectors of images.

    Args:
        model: A timm model, or one without `forward_head`, whose features are taken as they are.
        features: What its `forward_features` made of the images.
        size: Height and width of the images.
        grid: Pool the map to this many cells a side; 0 for the pooled vector.

    Returns:
        [B, cells, C], the cells in rows from the top left, or the one vector as [B, 1, C].

    Raises:
        ValueError: The model has no such features; the message says what it has.
    """
    if not grid:
        vectors = model.forward_head(features, pre_logits=True) if hasattr(model, 'forward_head') else features
        if vectors.ndim != 2:
            raise ValueError(f'its pooled features are {list(vectors.shape[1:])} for an image, expected one vector; '
                             f'give --feature-grid for its map')
        return vectors[:, None]
    cells = feature_map(model, features, size)
    height, width = cells.shape[-2:]
    if grid > min(height, width):
        raise ValueError(f'its map of an image of {size[0]}x{size[1]} pixels has {height}x{width} cells, '
                         f'fewer than the {grid}x{grid} of --feature-grid')
    if (height, width) != (grid, grid):
        cells = F.adaptive_avg_pool2d(cells, grid)
    return cells.flatten(2).transpose(1, 2)


def feature_map(model: nn.Module, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The last map [B, C, H, W] of a timm model, of what its `forward_features` made of images of this size.

    Raises:
        ValueError: It has none.
    """
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else features
    if features.ndim == 3:
        tokens = features[:, getattr(model, 'num_prefix_tokens', 0):]
        rows = round((tokens.shape[1] * size[0] / size[1]) ** 0.5)
        if rows and tokens.shape[1] % rows == 0:
            return tokens.transpose(1, 2).unflatten(2, (rows, -1))
    raise ValueError(f'its features are {list(features.shape[1:])} for an image of {size[0]}x{size[1]} pixels, which '
                     f'is no map of cells; choose another model, or leave --feature-grid out')
