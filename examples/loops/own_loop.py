"""Distillation from a store in a loop of one's own: decode the records, compute the loss, step.

    python examples/loops/own_loop.py
"""

import timm
import torch

from timm_tinyvit import ViewConfig, create_loader, fill_store, load_split, sparse_soft_target_cross_entropy
from timm_tinyvit.models import Normalize

DATA = 'examples/fashion_mnist'


def main() -> None:
    images = load_split(DATA, 'train[:500]', is_training=True)
    teacher = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True)
    # The teacher is run once; from then on this opens the store that is there.
    views = ViewConfig(input_size=(3, 32, 32), scale=(0.6, 1.), color_jitter=0.)
    store = fill_store(teacher, images, 'runs/loops/logits', views, epochs=3, topk=3)
    loader = create_loader(store, images, batch_size=50, num_workers=2)

    student = timm.create_model('tiny_vit_5m_224', img_size=32, num_classes=10)
    normalize = Normalize(student.pretrained_cfg['mean'], student.pretrained_cfg['std'])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(3):
        for batch in loader:  # each pass is the next epoch: other views, in another order
            logits = student(normalize(batch['view']))
            loss = sparse_soft_target_cross_entropy(logits, store.codec.decode(batch['record']))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f'epoch {epoch + 1}: loss {loss.item():.3f}')


if __name__ == '__main__':
    main()
