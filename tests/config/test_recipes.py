"""The recipes against the official code's numbers, and each of them for two updates on real images."""

import csv
import json
import math

import pytest
import timm
import torch
from accelerate.state import AcceleratorState

import train_distill
from timm_tinyvit import save_logits
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.config.arguments import recipe_names
from timm_tinyvit.data.view_config import ViewConfig
from timm_tinyvit.models.imagenet22k import NUM_CLASSES_22K, classifier_22k_to_1k
from support.flags import DATA, ROOT, small_data
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.train.optimization import create_optimizer, create_schedule, learning_rates
from timm_tinyvit.train.student import create_student, freeze_batch_norm

OFFICIAL = json.loads((ROOT / 'tests' / 'golden' / 'training.json').read_text())
STAGES = OFFICIAL['stages']


pytestmark = pytest.mark.usefixtures('one_launch_each')


def settings_of(stage, *flags):
    return train_distill.settings(['--dataset', DATA, '--config', stage, *flags])


def optimizer_of(args, images_per_update):
    model = timm.create_model(args.model, num_classes=8)
    rates = learning_rates(args, images_per_update)
    return model, create_optimizer(args, model, rates['lr']), rates


def test_further_arguments_of_an_optimiser_are_timms(refused):
    args = settings_of('in22k_to_in1k_tiny_vit_5m', '--opt-kwargs', 'layer_decay_min_scale=0.5', 'amsgrad=True')
    _, optimizer, _ = optimizer_of(args, 1024)
    assert optimizer.defaults['amsgrad'] is True
    assert min(group['lr_scale'] for group in optimizer.param_groups) == 0.5
    for pair, words in (('lr=1', "multiple values for keyword argument 'lr'"), ('nothing=1', "'nothing'")):
        with refused(words, '--opt-kwargs'):
            optimizer_of(settings_of('in1k_tiny_vit_5m', '--opt-kwargs', pair), 1024)


def test_a_model_without_gradient_checkpointing_is_refused(refused):
    args = settings_of('in1k_tiny_vit_5m', '--model', 'coat_tiny', '--grad-checkpointing')
    with refused('coat_tiny has no gradient checkpointing', 'leave --grad-checkpointing out'):
        create_student(args, num_classes=10)


def test_weights_of_a_checkpoint_need_no_others_from_elsewhere(tmp_path):
    torch.manual_seed(0)
    export_model(tmp_path, timm.create_model('test_vit', num_classes=10))
    # There are no weights of this name on the machine, nor a way to fetch them.
    args = settings_of('in1k_tiny_vit_5m', '--model', 'test_vit.r160_in1k', '--pretrained', '--pretrained-path',
                       str(tmp_path))
    assert create_student(args, num_classes=10).num_classes == 10


@pytest.mark.parametrize('stage', STAGES)
def test_a_recipe_has_every_value_of_the_official_configuration(stage):
    args, official = settings_of(stage), dict(STAGES[stage]['settings'])
    squash = ('squash', 1.) if not official.pop('test_crop') else ('center', 224 / 256)
    assert (args.crop_mode, args.crop_pct) == squash
    assert args.interpolation == 'bicubic'
    assert (args.layer_decay or 1.) == official.pop('layer_decay')
    assert (args.amp_dtype == 'float16') is official.pop('amp')
    topk = official.pop('distill_topk')
    assert args.topk == (topk if 'distill' in stage else None)
    given = {key: value for key, value in vars(args).items() if value is not None}
    assert {key: given.get(key, getattr(ViewConfig, key, None)) for key in official} == official
    assert (args.batch_size, args.grad_accum_steps) == (STAGES[stage]['batch_size'], STAGES[stage]['grad_accum_steps'])
    assert (args.scale, args.ratio, args.hflip) == (None, None, None)  # the defaults of timm, then and now
    assert (ViewConfig.scale, ViewConfig.ratio, ViewConfig.hflip) == ((0.08, 1.), (3 / 4, 4 / 3), 0.5)


@pytest.mark.parametrize('stage', STAGES)
def test_the_learning_rate_of_every_update_is_the_official_one(stage):
    """The official code steps its schedule after an update with that update's number, timm before: one update apart."""
    args, official = settings_of(stage), STAGES[stage]
    images = official['batch_size'] * official['processes'] * official['grad_accum_steps']
    _, optimizer, rates = optimizer_of(args, images)
    scheduler = create_schedule(args, optimizer, rates, official['updates_per_epoch'])
    epochs = args.epochs + args.cooldown_epochs
    assert epochs == official['settings']['epochs']
    assert official['updates'][-1] == epochs * official['updates_per_epoch'] - 1
    for update, expected in zip(official['updates'], official['lr']):
        scheduler.step_update(max(update - 1, 0))
        rates = [group['lr'] for group in optimizer.param_groups]
        if update == 0:
            # Layers have their scale here from the first update on.
            assert max(rates) == pytest.approx(expected[1], rel=1e-9)
        else:
            assert [min(rates), max(rates)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('stage', STAGES)
def test_every_parameter_has_the_official_weight_decay_and_scale(stage):
    args, settings = settings_of(stage), STAGES[stage]['settings']
    model, optimizer, _ = optimizer_of(args, 512)
    official = {
        name: (settings['weight_decay'] if group['weight_decay'] else 0.,
               group['lr_scale'] if settings['layer_decay'] != 1 else 1.)
        for group in OFFICIAL['groups'] for name in group['names']}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[parameter]: (group['weight_decay'], group.get('lr_scale', 1.))
              for group in optimizer.param_groups for parameter in group['params']}
    assert len(groups) == len(official) == 215
    for name, (weight_decay, lr_scale) in official.items():
        assert groups[name] == (weight_decay, pytest.approx(lr_scale, rel=1e-9)), name
    assert {(tuple(group['betas']), group['eps']) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


def test_without_lr_all_rates_grow_with_the_images_of_an_update_and_with_lr_none():
    args = settings_of('in1k_tiny_vit_5m')
    assert learning_rates(args, 256) == dict(lr=2.5e-4, warmup_lr=2.5e-7, min_lr=2.5e-6)
    args = settings_of('in1k_tiny_vit_5m', '--lr', '0.001')
    assert learning_rates(args, 256) == dict(lr=0.001, warmup_lr=5e-7, min_lr=5e-6)


def test_a_linear_schedule_falls_in_a_straight_line():
    args = settings_of('demo', '--sched', 'linear', '--lr', '1', '--min-lr', '0.2', '--warmup-epochs', '0',
                       '--epochs', '4')
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
    scheduler = create_schedule(args, optimizer, learning_rates(args, 1), 10)
    for update, expected in ((0, 1.), (10, 0.8), (25, 0.5), (40, 0.2)):
        scheduler.step_update(update)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected)


@pytest.mark.parametrize('recipe', recipe_names())
def test_every_recipe_runs_two_updates_on_real_images(recipe, teacher, tmp_path, capsys):
    flags = [
        '--config', recipe, *small_data(8, 4), '--target-key', 'label', '-b', '4', '--grad-accum-steps', '1',
        '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path), '--experiment', 'run']
    if recipe != 'demo_teacher':
        flags += ['--model', 'test_efficientnet']
    is_classes = 'distill' in recipe or recipe in ('cifar100', 'logits_and_features')
    stores = []
    if recipe == 'logits_and_features':
        stores = [str(tmp_path / 'classes'), str(tmp_path / 'features')]
        for store, more in zip(stores, (['--topk', '3'], ['--targets', 'features', '--feature-dim', '8'])):
            save_logits.main([
                '--config', recipe, '--dataset', DATA, '--train-split', 'train[:8]', '--img-size', '32', '--epochs',
                '1', '--teacher', teacher, '--logits', store, '--workers', '0', *more])
        AcceleratorState._reset_state(reset_partial_state=True)
        flags += ['--logits', *stores]
    elif is_classes:
        flags += ['--teacher', teacher, '--logits', str(tmp_path / 'logits'), '--topk', '3']
    elif recipe in ('backbone', 'sam_encoder'):
        flags += ['--teacher', teacher, '--logits', str(tmp_path / 'logits'), '--feature-grid', '1', '--feature-dim',
                  '8', '--store-epochs', '1']
    train_distill.main(flags)
    assert '2 steps of 4 an epoch' in capsys.readouterr().out
    row, = csv.DictReader(open(tmp_path / 'run' / 'metrics.csv'))
    assert math.isfinite(float(row['loss'])) and float(row['grad_norm']) > 0
    assert (float(row['distill_loss']) > 0) == is_classes
    assert (float(row.get('feature_loss', 0)) > 0) == (recipe in ('backbone', 'sam_encoder', 'logits_and_features'))


def test_the_classifier_of_22k_becomes_the_one_of_1k(tmp_path):
    """As the fine-tuning starts; the class map is tested with the model half."""
    torch.manual_seed(0)
    pretrained = timm.create_model('test_resnet', num_classes=NUM_CLASSES_22K)
    export_model(tmp_path, pretrained)
    args = settings_of('in22k_to_in1k_tiny_vit_5m', '--model', 'test_resnet', '--initial-checkpoint', str(tmp_path))
    student = create_student(args, num_classes=1000)
    expected = classifier_22k_to_1k(pretrained)
    assert student.num_classes == 1000
    for name, tensor in expected.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name


def test_a_classifier_of_other_classes_starts_from_zero_and_the_log_says_so(tmp_path):
    torch.manual_seed(0)
    pretrained = timm.create_model('test_resnet', num_classes=20)
    export_model(tmp_path, pretrained)
    args = settings_of('in22k_to_in1k_tiny_vit_5m', '--model', 'test_resnet', '--initial-checkpoint', str(tmp_path))
    lines = []
    student = create_student(args, num_classes=10, log=lines.append)
    assert len(lines) == 1 and '20 classes' in lines[0] and 'starts from zero' in lines[0]
    for name, tensor in student.state_dict().items():
        head = name.startswith('fc.')
        assert not tensor.any() if head else torch.equal(tensor, pretrained.state_dict()[name]), name
    with pytest.raises(InputError, match='of another model'):
        create_student(args, num_classes=10)


def test_windows_grow_from_one_resolution_to_the_next(tmp_path):
    torch.manual_seed(0)
    small = timm.create_model('tiny_vit_5m_224', img_size=224, num_classes=10)
    export_model(tmp_path, small)
    args = settings_of('in1k_tiny_vit_21m_384', '--model', 'tiny_vit_5m_224', '--initial-checkpoint', str(tmp_path))
    student = create_student(args, num_classes=10, size=(384, 384))
    small.set_input_size(384)
    weights = small.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in student.state_dict().items())


def test_frozen_batch_norms_keep_their_statistics_and_learn_their_weights(tmp_path):
    export_model(tmp_path, timm.create_model('test_resnet', num_classes=10))
    flags = [*small_data(8, 4), '-b', '4', '--model', 'test_resnet', '--initial-checkpoint', str(tmp_path), '--epochs',
             '1', '--warmup-epochs', '0', '--lr', '0.1', '--quiet', '--output', str(tmp_path), '--experiment']
    train_distill.main([*flags, 'frozen', '--freeze-bn'])
    train_distill.main([*flags, 'free'])
    before, frozen, free = (timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).state_dict()
                            for name in ('', 'frozen/last', 'free/last'))
    assert torch.equal(frozen['bn1.running_mean'], before['bn1.running_mean'])
    assert not torch.equal(free['bn1.running_mean'], before['bn1.running_mean'])
    assert not torch.equal(frozen['bn1.weight'], before['bn1.weight'])


def test_freezing_leaves_all_other_modules_in_training_mode():
    model = timm.create_model('tiny_vit_5m_224', img_size=64, num_classes=10).train()
    freeze_batch_norm(model)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(not module.training for module in norms)
    assert all(module.training for module in model.modules() if not isinstance(module, torch.nn.BatchNorm2d))
