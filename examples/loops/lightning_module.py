"""Distillation from a store with PyTorch Lightning, which tells the loader the epoch: after a resumption too.

    python examples/loops/lightning_module.py
"""

import lightning
import timm
import torch

from timm_tinyvit import SparseLogitTask, ViewConfig, create_loader, fill_store, load_split

DATA = 'examples/fashion_mnist'


class Distilled(lightning.LightningModule):
    def __init__(self, task: SparseLogitTask):
        super().__init__()
        self.task = task

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        losses = self.task(batch['view'], batch)
        self.log('loss', losses['loss'], prog_bar=True)
        return losses['loss']

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.task.student.parameters(), lr=1e-3, weight_decay=0.05)


if __name__ == '__main__':
    images = load_split(DATA, 'train[:500]', is_training=True)
    teacher = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True)
    views = ViewConfig(input_size=(3, 32, 32), scale=(0.6, 1.), color_jitter=0.)
    store = fill_store(teacher, images, 'runs/loops/logits', views, epochs=3, topk=3)
    student = timm.create_model('tiny_vit_5m_224', img_size=32, num_classes=10)
    trainer = lightning.Trainer(max_epochs=3, default_root_dir='runs/loops/lightning', log_every_n_steps=5)
    trainer.fit(
        Distilled(SparseLogitTask(student, store.codec)), create_loader(store, images, batch_size=50, num_workers=2))
