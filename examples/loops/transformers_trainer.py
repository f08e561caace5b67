"""Distillation from a store with the Trainer of Hugging Face's transformers; a run that is resumed sees what it missed.

    python examples/loops/transformers_trainer.py
"""

from typing import Any

import timm
import torch
from transformers import Trainer, TrainingArguments

from timm_tinyvit import SparseLogitTask, ViewConfig, create_loader, fill_store, load_split

DATA = 'examples/fashion_mnist'


class DistillTrainer(Trainer):
    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return create_loader(store, images, self.args.train_batch_size, num_workers=2)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any):
        task.trainable_module = model  # the student, as the Trainer has wrapped it
        return task(inputs['view'], inputs)['loss']


if __name__ == '__main__':
    images = load_split(DATA, 'train[:500]', is_training=True)
    teacher = timm.create_model(f'local-dir:{DATA}/teacher', pretrained=True)
    views = ViewConfig(input_size=(3, 32, 32), scale=(0.6, 1.), color_jitter=0.)
    store = fill_store(teacher, images, 'runs/loops/logits', views, epochs=3, topk=3)
    student = timm.create_model('tiny_vit_5m_224', img_size=32, num_classes=10)
    task = SparseLogitTask(student, store.codec)
    arguments = TrainingArguments(
        'runs/loops/trainer', num_train_epochs=3, per_device_train_batch_size=50, learning_rate=1e-3,
        weight_decay=0.05, save_strategy='epoch', report_to='none')
    DistillTrainer(student, arguments).train()
