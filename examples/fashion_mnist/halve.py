"""Copy an exported model with its weights in half precision.

    python examples/fashion_mnist/halve.py runs/teacher/best examples/fashion_mnist/teacher
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

source, target = map(Path, sys.argv[1:])
target.mkdir(parents=True, exist_ok=True)
weights = load_file(source / 'model.safetensors')
halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
save_file(halved, target / 'model.safetensors', metadata={'format': 'pt'})
shutil.copy(source / 'config.json', target)
