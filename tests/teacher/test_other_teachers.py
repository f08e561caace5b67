"""Teachers that are no classifiers of timm: those of transformers, and image towers with texts of the classes."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from support.flags import DATA, ROOT, small_data
from support.programs import refusal
from timm_tinyvit import save_logits
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.data.sources import load_split
from timm_tinyvit.models import loading
from timm_tinyvit.models.loading import create_pretrained
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.store.local import LogitStore
from timm_tinyvit.teacher.teacher import Teacher
from timm_tinyvit.teacher.zero_shot import ZeroShotClassifier

transformers = pytest.importorskip('transformers')

CPU, NAMES = torch.device('cpu'), ['coat', 'bag', 'boot']


def save_vit(folder, names=NAMES, kind=transformers.ViTForImageClassification, **processor):
    """A toy of transformers with random weights, and its image processor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        num_labels=len(names), id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)})
    kind(config).save_pretrained(folder)
    transformers.ViTImageProcessor(**{'size': {'height': 32, 'width': 32}} | processor).save_pretrained(folder)
    return folder


@pytest.mark.parametrize('processor', [
    {}, {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.25, 0.3]}, {'do_normalize': False},
    {'rescale_factor': 1 / 127.5, 'image_mean': [1.] * 3, 'image_std': [1.] * 3}, {'do_rescale': False}])
def test_a_model_of_transformers_sees_images_as_its_processor_makes_them(tmp_path, processor):
    save_vit(tmp_path / 'vit', **processor)
    teacher = Teacher(create_pretrained(f'hf:{tmp_path / "vit"}'), 'vit', CPU)
    images = load_split(DATA, 'train[:6]', True)['image']
    views = torch.from_numpy(np.stack([np.asarray(image.convert('RGB').resize((32, 32))) for image in images]))
    views = views.permute(0, 3, 1, 2)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'vit').eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'vit')(list(views), return_tensors='pt')
    with torch.no_grad():
        torch.testing.assert_close(teacher(views), model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (teacher.class_names, teacher.size, teacher.num_classes) == (NAMES, (32, 32), 3)


def texts(path, vectors, scale='20', names=NAMES):
    about = {'logit_scale': scale, 'class_names': names if isinstance(names, str) else json.dumps(names)}
    save_file({'class_embeddings': vectors}, path, {key: value for key, value in about.items() if value is not None})
    return str(path)


@pytest.mark.parametrize('kind', ['transformers', 'CLIP, with a projection', 'SigLIP, pooled'])
def test_a_store_is_filled_by_any_of_them_and_says_whose_it_is(tmp_path, kind):
    if kind == 'transformers':
        argv, name = ['--teacher', f'hf:{save_vit(tmp_path / "toy")}'], 'ViTForImageClassification (toy)'
        model = create_pretrained(argv[1])
    else:
        torch.manual_seed(0)
        tower = timm.create_model('test_vit', num_classes=16 if 'CLIP' in kind else 0, img_size=32)
        export_model(tmp_path / 'tower', tower, data_config={'input_size': (3, 32, 32)})
        vectors = torch.randn(3, 16 if 'CLIP' in kind else tower.num_features)
        argv = ['--teacher', str(tmp_path / 'tower'), '--class-embeddings', texts(tmp_path / 'texts.st', vectors)]
        name = 'test_vit (tower) with texts.st'

        def model(images):
            images = torch.nn.functional.normalize(tower.eval()(images), dim=1)
            return 20 * images @ torch.nn.functional.normalize(vectors, dim=1).T

        model.pretrained_cfg = create_pretrained(argv[1], needs_classifier=False).pretrained_cfg
    save_logits.main([*small_data(8), *argv, '--logits', str(tmp_path / 'store'), '--epochs', '1', '--topk', '3',
                      '--codec', 'float16', '--no-aug', '--quiet'])
    store = LogitStore.open(tmp_path / 'store')
    assert (store.manifest.teacher['name'], store.manifest.class_names) == (name, NAMES)
    images = load_split(DATA, 'train[:8]', True)['image']
    views = np.stack([np.asarray(image.convert('RGB').resize((32, 32), 3)) for image in images])
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():
        logits = model((torch.from_numpy(views).permute(0, 3, 1, 2) / 255 - mean) / std)
    stored = store.codec.decode(torch.from_numpy(store.read(0, range(8)))).densify()
    torch.testing.assert_close(stored, logits.softmax(dim=1), rtol=0.02, atol=2e-3)


def without_a_head(folder):
    save_vit(folder, kind=transformers.ViTModel)


def without_a_processor(folder):
    (save_vit(folder) / 'preprocessor_config.json').unlink()


@pytest.mark.parametrize('make, words', [
    (without_a_head, 'drawn at random'), (without_a_processor, 'preprocessor_config.json'),
    (lambda folder: folder.mkdir(), 'image classifier of transformers'), (lambda folder: None, 'there is no folder'),
    (lambda folder: save_vit(folder, image_std=[0.] * 3), 'std')])
def test_what_is_no_classifier_of_transformers_is_one_sentence(tmp_path, make, words, refused):
    make(tmp_path / 'vit')
    with refused(words):
        create_pretrained(f'hf:{tmp_path / "vit"}')


@pytest.mark.parametrize('vectors, changes, words', [
    (torch.ones(3, 7), {}, 'vectors of 7 numbers, and the teacher gives [4]'), (torch.zeros(3, 4), {}, 'holds zeros'),
    (torch.full((3, 4), torch.nan), {}, 'NaN'), (torch.ones(4), {}, 'is [4]'), (None, {}, 'logit_scale'),
    (torch.ones(3, 4), {'scale': '-1'}, 'logit_scale is -1'), (torch.ones(3, 4), {'scale': 'x'}, "'x'"),
    (torch.ones(3, 4), {'names': ['a']}, '1 class_names for 3'), (torch.ones(3, 4), {'names': '[1, 2, 3]'}, 'text'),
    (torch.ones(3, 4), {'names': '{'}, 'no file of text vectors')])
def test_a_file_that_holds_no_vectors_of_the_tower_is_one_sentence(tmp_path, vectors, changes, words, refused):
    tower = timm.create_model('test_resnet', num_classes=4)
    if vectors is None:
        save_file({'class_embeddings': torch.ones(3, 4)}, tmp_path / 'x')
    else:
        texts(tmp_path / 'x', vectors, **changes)
    with refused(words, '--class-embeddings'):
        ZeroShotClassifier(tower, str(tmp_path / 'x'))


def test_other_files_and_flags_are_one_sentence(tmp_path, teacher, refused, capsys):
    (tmp_path / 'x').write_bytes(b'no safetensors')
    for path, words in (('x', 'no file of text vectors'), ('y', 'cannot be read')):
        with refused(words):
            ZeroShotClassifier(timm.create_model('test_resnet', num_classes=4), str(tmp_path / path))
    argv = [*small_data(8), '--teacher', teacher, '--class-embeddings', 'x', '--logits', tmp_path / 'store', '--epochs',
            '1', '--targets', 'features']
    assert 'leave one of them out' in refusal(save_logits.main, argv, capsys)


def test_the_page_shows_how_text_vectors_are_made(tmp_path, monkeypatch):
    """Its function is run with an imitation of open_clip, which is not installed here."""
    page = (ROOT / 'docs' / 'teacher.md').read_text()
    code, = (block for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL) if 'import open_clip' in block)
    clip = SimpleNamespace(
        encode_text=lambda tokens: torch.eye(4)[tokens].half(), logit_scale=torch.tensor(50.).log())
    monkeypatch.setitem(sys.modules, 'open_clip', SimpleNamespace(
        create_model_and_transforms=lambda model, pretrained: (clip, None, None),
        get_tokenizer=lambda model: lambda lines: [len(line) % 4 for line in lines]))
    exec(code, space := {})
    space['write_class_embeddings'](tmp_path / 'classes.safetensors', 'ViT-B-32', 'openai', ['coat', 'bag'])
    model = ZeroShotClassifier(timm.create_model('test_resnet', num_classes=4), str(tmp_path / 'classes.safetensors'))
    assert model.scale == pytest.approx(50) and model.pretrained_cfg['label_names'] == ['coat', 'bag']


def test_the_config_of_a_repo_is_checked_before_timm_makes_a_model_of_it(tmp_path, monkeypatch):
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'test_resnet', 'num_classes': 1 << 60}))
    monkeypatch.setattr(loading, 'hf_hub_download', lambda *args, **options: str(tmp_path / 'config.json'))
    monkeypatch.setattr(timm, 'create_model', None)
    with pytest.raises(InputError, match='config.json of hf-hub:org/model is not that of a timm model: num_classes'):
        create_pretrained('hf-hub:org/model')
