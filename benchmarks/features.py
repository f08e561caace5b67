"""Bytes of a view and cosine to the true vector of a model's stored features, by size of the vector.

    python benchmarks/features.py --model FOLDER --dataset FOLDER_OF_PHOTOS --grid 7

Vectors are projected to D numbers by the principal components of the same images. Mean and least cosine are over all
vectors that are not zero; the variance is the share that the projection keeps. docs/features.md has the figures of an
EfficientNet-Lite0 trained on ImageNet-1k.
"""

import argparse
import json

import torch
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import cosine_similarity

import timm_tinyvit  # noqa: F401  registers the models
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models.features import feature_vectors
from timm_tinyvit.models.loading import create_pretrained
from timm_tinyvit.targets import FeatureTargets, create_feature_codec

SIZES = (64, 128, 256, 384, 512, 768)


@torch.inference_mode()
def vectors_of(model: torch.nn.Module, images: torch.Tensor, grids: list[int]) -> dict[int, torch.Tensor]:
    """Vectors [N, cells, C] of normalised images [N, 3, H, W], for each grid."""
    found: dict[int, list[torch.Tensor]] = {grid: [] for grid in grids}
    for part in images.split(16):
        features = model.forward_features(part)
        for grid in grids:
            found[grid].append(feature_vectors(model, features, part.shape[-2:], grid))
    return {grid: torch.cat(parts) for grid, parts in found.items()}


def projected(vectors: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
    """Vectors [N, cells, D] in their principal components, and the share of the variance that they keep."""
    flat = vectors.flatten(0, 1).double()
    mean = flat.mean(dim=0)
    variances, components = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    kept = (variances[-dim:].sum() / variances.sum()).item()
    return ((vectors.double() - mean) @ components[:, -dim:]).float(), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', required=True, help='timm name, or a folder')
    parser.add_argument('--dataset', required=True, help='images, as of timm-tinyvit fill')
    parser.add_argument('--train-split', help='their split')
    parser.add_argument('--grid', type=int, default=7, help='cells of one side, beside the pooled vector')
    parser.add_argument('--json', action='store_true', help='print a line of JSON for each row')
    args = parser.parse_args()
    model = create_pretrained(args.model, needs_classifier=False).eval()
    transform = create_transform(**resolve_model_data_config(model))
    dataset = load_split(args.dataset, args.train_split, is_training=True)
    images = torch.stack([transform(image.convert('RGB')) for image in dataset['image']])
    for grid, vectors in vectors_of(model, images, [0, args.grid]).items():
        for dim in (*(size for size in SIZES if size < vectors.shape[2]), vectors.shape[2]):
            stored, variance = (vectors, 1.) if dim == vectors.shape[2] else projected(vectors, dim)
            for name in ('int8', 'float16'):
                codec = create_feature_codec(name, dim, grid)
                again = codec.decode(torch.from_numpy(codec.encode(FeatureTargets(stored)))).vectors
                cosine = cosine_similarity(again, stored, dim=-1)[stored.abs().amax(dim=-1) > 0]
                row = dict(grid=grid, dim=dim, codec=name, bytes=codec.width, cosine=cosine.mean().item(),
                           least=cosine.min().item(), variance=variance)
                print(json.dumps(row) if args.json else '  '.join(
                    f'{key} {value:.6f}' if isinstance(value, float) else f'{key} {value}'
                    for key, value in row.items()), flush=True)


if __name__ == '__main__':
    main()
