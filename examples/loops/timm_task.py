"""Distillation from a store with timm's own parts: a `TrainingTask`, its average of weights, optimiser and schedule.

    python examples/loops/timm_task.py
"""

import timm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from timm_tinyvit import SparseLogitTask, ViewConfig, create_loader, fill_store, load_split

DATA = 'examples/fashion_mnist'


def main() -> None:
    images = load_split(DATA, 'train[:500]', is_training=True)
    teacher = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True)
    views = ViewConfig(input_size=(3, 32, 32), scale=(0.6, 1.), color_jitter=0.)
    store = fill_store(teacher, images, 'runs/loops/logits', views, epochs=3, topk=3)
    loader = create_loader(store, images, batch_size=50, num_workers=2)

    student = timm.create_model('tiny_vit_5m_224', img_size=32, num_classes=10)
    task = SparseLogitTask(student, store.codec, alpha=0.9)  # the labels have the other tenth
    task.setup_ema(decay=0.99)
    optimizer = create_optimizer_v2(student, opt='adamw', lr=1e-3, weight_decay=0.05)
    scheduler, num_epochs = create_scheduler_v2(optimizer, num_epochs=3, warmup_epochs=1)
    for epoch in range(num_epochs):
        task.train()
        for batch in loader:
            losses = task(batch['view'], batch)
            optimizer.zero_grad()
            losses['loss'].backward()
            optimizer.step()
            task.update_ema()
        scheduler.step(epoch + 1)
        print(f'epoch {epoch + 1}: ' + ', '.join(f'{name} {losses[name].item():.3f}' for name in task.losses))


if __name__ == '__main__':
    main()
