"""The examples of other people's loops, at toy size: each learns from the views of one epoch after another.

What counts is what reaches the student, so that is looked at: its inputs, in whichever way a loop has wrapped, copied
or shared out the loader.
"""

import pytest
import torch

from support.flags import DATA, ROOT
from timm_tinyvit import LogitStore, SparseLogitDataset, TinyVit, create_loader, load_split
from timm_tinyvit.models import Normalize

lightning = pytest.importorskip('lightning')
pytest.importorskip('transformers')

LOOPS = sorted(file.name for file in ROOT.glob('examples/loops/*.py'))
# Of the examples, made small.
SMALL = {'train[:500]': 'train[:40]', '=50': '=20', 'num_workers=2': 'num_workers=1'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder that all examples run in, and fill their one store in."""
    folder = tmp_path_factory.mktemp('loops')
    (folder / 'examples').symlink_to(ROOT / 'examples')
    return folder


@pytest.fixture
def seen():
    """The batches that reach a student in training, as they are when they do."""
    batches = []

    def keep(module, inputs):
        if isinstance(module, TinyVit) and module.training:
            batches.append(inputs[0].clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    yield batches
    hook.remove()


def views_of(store, images, epoch):
    """What a student is to see of an epoch, in no order."""
    data = SparseLogitDataset(images, store=store)
    samples = data.__getitems__([(epoch, row) for row in range(len(data))])
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return {view.numpy().tobytes() for view in normalize(torch.stack([sample['view'] for sample in samples]))}


@pytest.mark.parametrize('name', LOOPS)
def test_three_epochs_of_an_example_show_every_view_of_three_epochs_of_the_store(
        name, folder, seen, monkeypatch, one_launch_each):
    source = (ROOT / 'examples' / 'loops' / name).read_text()
    assert source.count('\n') <= 40 and not {'train[:500]', '=50'} - {word for word in SMALL if word in source}
    for large, small in SMALL.items():
        source = source.replace(large, small)
    monkeypatch.chdir(folder)
    exec(compile(source, name, 'exec'), {'__name__': '__main__'})
    store = LogitStore.open('runs/loops/logits')
    images = load_split(DATA, 'train[:40]', is_training=True)
    expected = [views_of(store, images, epoch) for epoch in range(3)]
    assert len(set.union(*expected)) == 120
    assert [len(batch) for batch in seen] == [20] * 6
    for epoch, views in enumerate(expected):
        batches = torch.cat(seen[2 * epoch:2 * epoch + 2])
        assert {view.numpy().tobytes() for view in batches} == views


class NewLoaders(lightning.LightningModule):
    """Asks for a new loader for every epoch, and keeps what it gets."""

    def __init__(self, store, images):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.store, self.images, self.shown = store, images, []

    def train_dataloader(self):
        return create_loader(self.store, self.images, 20)

    def training_step(self, batch, index):
        self.shown.append(batch['index'].tolist())
        return self.layer(batch['view'].float().mean()[None]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.)


def test_a_loop_that_makes_a_new_loader_for_each_epoch_goes_on_in_the_store(filled_store, tmp_path):
    store, images = LogitStore.open(filled_store), load_split(DATA, 'train[:120]', is_training=True)
    options = dict(
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator='cpu')
    module = NewLoaders(store, images)
    lightning.Trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, **options).fit(module)
    loader = create_loader(store, images, 20)
    assert module.shown == [batch['index'].tolist() for _ in range(3) for batch in loader]
