"""What a process makes of a photograph: a digest of its views and the probe, of each of some view configs."""

import hashlib
import json
import random
from typing import Any

import torch

from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.data.views import Replay, decode_image


def view_digests(configs: dict[str, dict[str, Any]], photograph: str) -> dict[str, list]:
    digests = {}
    for name, arguments in configs.items():
        replay, digest = Replay(ViewConfig.from_dict(arguments), 17), hashlib.sha256()
        for index in reversed(range(8)):
            digest.update(replay(decode_image(photograph), 1, index).numpy().tobytes())
        digests[name] = [digest.hexdigest(), replay.probe()]
    return digests


def print_view_digests(configs: dict[str, dict[str, Any]], photograph: str) -> None:
    """Print them as JSON, after other random numbers were drawn."""
    torch.randn(5), random.random()
    print(json.dumps(view_digests(configs, photograph)))
