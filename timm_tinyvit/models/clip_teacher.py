"""The teacher of the paper: CLIP ViT-L/14, fine-tuned on the 21,841 classes of ImageNet-22k, as a timm model.

    timm.create_model('clip_vit_large_patch14_224.in22k', pretrained=True)

The official checkpoint loads into timm's `VisionTransformer`. Between the tower and the classifier it has CLIP's
projection, with nothing in between, so the two are one matrix: that is what the classifier holds here. Images are
normalised with CLIP's own mean and standard deviation.
"""

from functools import partial
from typing import Any

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, vision_transformer
from torch import nn

__all__ = ['checkpoint_filter_fn']


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Make a checkpoint of the official teacher, or one of timm, fit the model.

    Args:
        state_dict: Weights with the official or timm's names, bare or as the 'model' entry of a training checkpoint.
        model: Model whose image size the position embedding is resampled to.

    Returns:
        State dict with timm's names.
    """
    state_dict = dict(state_dict.get('model', state_dict))
    head = {}
    if 'visual.proj' in state_dict and 'head.weight' in state_dict:
        projection = state_dict.pop('visual.proj')  # [width, dim]
        weight = state_dict.pop('head.weight')  # [classes, dim]
        head['head.weight'] = (weight.double() @ projection.double().T).to(weight.dtype)
        head['head.bias'] = state_dict.pop('head.bias')
    return {**vision_transformer.checkpoint_filter_fn(state_dict, model), **head}


default_cfgs = generate_default_cfgs({
    'clip_vit_large_patch14_224.in22k': dict(
        url='https://github.com/wkcn/TinyViT-model-zoo/releases/download/pretrained_teacher/'
            'clip_vit_large_patch14_22k.pth',
        num_classes=21841,
        input_size=(3, 224, 224),
        fixed_input_size=True,
        crop_pct=0.875,
        interpolation='bicubic',
        mean=OPENAI_CLIP_MEAN,
        std=OPENAI_CLIP_STD,
        first_conv='patch_embed.proj',
        classifier='head',
        license='mit',
    ),
})


@register_model
def clip_vit_large_patch14_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CLIP ViT-L/14 with a classifier on its class token."""
    variant_args = dict(
        patch_size=14,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer='quick_gelu',
    )
    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        vision_transformer.VisionTransformer,
        'clip_vit_large_patch14_224',
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **{**variant_args, **kwargs},
    )
