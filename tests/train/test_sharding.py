"""FSDP2 on two gloo ranks: a sharded run ends as a whole one does, is resumed to the bit, and leaves whole models."""

import copy
import csv
import os
import random
import shutil
import sys
import time

import pytest
import timm
import torch
import torch.distributed as dist
import yaml
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from support.flags import ROOT, small_data
from support.launches import (
    FSDP, SHARDED, assert_same, checkpoints, finish, free_port, kill, launches, needs_sharding, wait_for, weights,
)
from timm_tinyvit.base import launch
from timm_tinyvit.base.errors import InputError
from timm_tinyvit.base.launch import create_accelerator
from timm_tinyvit.train.checkpoint import is_finite, what_changes
from timm_tinyvit.train.optimization import clip_gradients
from timm_tinyvit.train.sharding import (
    SHARDED_OPTIMIZERS, ModelEma, block_classes, load_whole_state, local, prepare_student, whole, whole_state,
)

# Batch norms, groups of parameters by layer, summed gradients, and draws of numpy's and torch's generators. Without a
# large epsilon AdamW makes whole steps of gradients that are nothing but rounding.
RUN = [
    *small_data(160, 17), '--model', 'test_efficientnet', '--drop-path', '0.2', '--drop', '0.1', '--mixup', '0.8',
    '--model-ema', '--model-ema-decay', '0.9', '--layer-decay', '0.8', '--opt-eps', '1e-2', '--lr', '1e-4',
    '--warmup-epochs', '1', '--epochs', '2']
TWO = ['-b', '8', '--grad-accum-steps', '2']


@pytest.fixture(scope='module')
def launched(tmp_path_factory, hub_children):
    """A finished run of two epochs by accelerate's own launcher and configuration file: (folder, what it said)."""
    folder = tmp_path_factory.mktemp('launched')
    config = folder / 'fsdp.yaml'
    config.write_text(yaml.safe_dump({
        'compute_environment': 'LOCAL_MACHINE', 'distributed_type': 'FSDP', 'mixed_precision': 'no', 'num_machines': 1,
        'num_processes': 2, 'machine_rank': 0, 'main_process_port': free_port(), 'fsdp_config': FSDP}))
    done = hub_children.run([
        '-m', 'accelerate.commands.accelerate_cli', 'launch', '--config_file', config, ROOT / 'train_distill.py', *RUN,
        *TWO, '--output', folder, '--experiment', 'run', '--checkpoint-hist', '9',
    ], os.environ | {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}, timeout=300)
    return folder / 'run', done.stdout + done.stderr


@pytest.fixture
def start(warm_processes, tmp_path):
    """`start(argv, processes)` gives the running ranks of one launch, sharded or not."""
    with launches(warm_processes, tmp_path) as ranks:
        yield lambda argv, processes=2, sharded=True: ranks(argv, processes, launcher=SHARDED if sharded else None)


def rows(folder):
    return list(csv.DictReader(open(folder / 'metrics.csv')))


def state_of(folder, number=-1):
    return torch.load(folder / checkpoints(folder)[number], weights_only=True)


def stopped_after_one_epoch(run, folder):
    """A copy of a run of two epochs as it was after the first."""
    shutil.copytree(run, folder)
    for name in checkpoints(folder):
        if name > 'checkpoint-000001-000000000000.pt':
            (folder / name).unlink()
    return folder


def assert_close(one, two, limit):
    """Weights, whose updates have the size of the learning rate; what batch norms have seen depends on batches."""
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked')):
            assert (one[name] - two[name]).abs().max() <= limit, name


@needs_sharding
def test_a_sharded_run_killed_at_random_steps_ends_with_the_same_bits(launched, start, tmp_path):
    """As the same run in peace by accelerate's launcher and configuration."""
    run, said = launched
    assert 'the student is sharded over 2 process(es), in 7 unit(s)' in said
    assert all(words in said for words in ('5 steps of 32 an epoch, ', ', 2 process(es) on cpu')), said
    assert 'warning' not in said.lower(), said
    argv = [*RUN, *TWO, '--recovery-interval', '1', '--experiment', 'killed']
    draw, folder = random.Random(0), tmp_path / 'killed'
    for _ in range(2):
        before = checkpoints(folder)
        ranks = start(argv)
        wait_for(lambda: checkpoints(folder) != before, ranks)  # noqa: B023  called in this turn
        time.sleep(draw.uniform(0, 0.1))
        kill(ranks)
    said = finish(start(argv), tmp_path)
    assert said.count('resuming') == 2 and 'can no longer be identical' not in said
    for name in ('last', 'last_ema'):
        assert_same(weights(run, name), weights(folder, name))
    for key in ('loss', 'lr', 'grad_norm', 'eval_loss', 'eval_top1', 'eval_loss_ema'):
        assert [row[key] for row in rows(run)] == [row[key] for row in rows(folder)]


@needs_sharding
def test_a_sharded_run_ends_as_one_with_the_whole_model_on_each_process(launched, start, tmp_path):
    run, _ = launched
    said = finish(start([*RUN, *TWO, '--experiment', 'whole'], sharded=False), tmp_path)
    assert 'is sharded' not in said
    for name in ('last', 'last_ema'):
        one, two = weights(run, name), weights(tmp_path / 'whole', name)
        assert_close(one, two, 1e-6)
        torch.testing.assert_close(one['bn2.running_var'], two['bn2.running_var'], rtol=1e-4, atol=0)
    for key in ('loss', 'grad_norm', 'eval_loss', 'eval_loss_ema'):
        assert [float(row[key]) for row in rows(run)] == pytest.approx(
            [float(row[key]) for row in rows(tmp_path / 'whole')], rel=1e-3)


@needs_sharding
def test_what_a_sharded_run_leaves_is_whole(launched):
    """Checkpoints as of one process, and models for plain timm."""
    run, _ = launched
    state = state_of(run)
    model = timm.create_model(f'local-dir:{run / "last"}', pretrained=True)
    assert_same(state['model'], model.state_dict())
    assert_same(state['ema'], weights(run, 'last_ema'))
    assert any(not torch.equal(state['model'][name], state['ema'][name]) for name in state['model'])
    optimizer = create_optimizer_v2(model, 'adamw', weight_decay=0.05, layer_decay=0.8)
    optimizer.load_state_dict(state['optimizer'])
    for group in optimizer.param_groups:
        for weight in group['params']:
            assert optimizer.state[weight]['exp_avg_sq'].shape == weight.shape
            assert optimizer.state[weight]['step'] == 10
    assert len({group['lr_scale'] for group in state['optimizer']['param_groups']}) > 2


@needs_sharding
def test_a_run_goes_on_in_another_kind_of_launch(start, tmp_path):
    """Where nothing is drawn and no statistics are those of a batch, all kinds give the same weights to rounding."""
    steady = [*RUN, '--drop', '0', '--drop-path', '0', '--mixup', '0', '--freeze-bn', '--checkpoint-hist', '9']
    alone = [*steady, '-b', '32']
    finish(start([*steady, *TWO, '--experiment', 'sharded']), tmp_path)
    finish(start([*alone, '--experiment', 'alone'], 1, sharded=False), tmp_path)
    stopped_after_one_epoch(tmp_path / 'sharded', tmp_path / 'then-alone')
    said = finish(start([*alone, '--experiment', 'then-alone'], 1, sharded=False), tmp_path)
    assert f'resuming {tmp_path / "then-alone"} at epoch 1, step 0' in said
    assert 'of 2 process(es), now there are 1' in said
    stopped_after_one_epoch(tmp_path / 'alone', tmp_path / 'then-sharded')
    said = finish(start([*steady, *TWO, '--experiment', 'then-sharded']), tmp_path)
    assert f'resuming {tmp_path / "then-sharded"} at epoch 1, step 0' in said
    assert 'of 1 process(es), now there are 2' in said
    states = [state_of(tmp_path / name) for name in ('alone', 'sharded', 'then-alone', 'then-sharded')]
    assert [state['is_sharded'] for state in states] == [False, True, False, True]
    for state in states[1:]:
        for name in ('model', 'ema'):
            assert_close(states[0][name], state[name], 1e-6)
        for here, there in zip(states[0]['optimizer']['state'].values(), state['optimizer']['state'].values()):
            torch.testing.assert_close(here['exp_avg_sq'], there['exp_avg_sq'], rtol=1e-3, atol=1e-9)


def test_a_model_that_is_no_longer_sharded_is_told():
    state = {'world_size': 2, 'images_per_update': 8, 'is_sharded': False}
    assert what_changes(state, 2, 8, False) is None
    assert what_changes({**state, 'is_sharded': True}, 2, 8, True) is None
    assert 'was sharded and is whole on each process' in what_changes({**state, 'is_sharded': True}, 2, 8, False)
    assert 'was whole on each process and is sharded' in what_changes(state, 2, 8, True)


@needs_sharding
def test_one_process_alone_takes_the_configuration_too(start, tmp_path):
    said = finish(start([*RUN, '-b', '32', '--epochs', '1', '--experiment', 'run', '--channels-last', '--freeze-bn',
                         '--amp-dtype', 'bfloat16', '--compile', 'eager'], 1), tmp_path)
    assert 'the student is sharded over 1 process(es), in 7 unit(s)' in said
    assert weights(tmp_path / 'run')['bn2.running_mean'].count_nonzero() == 0


def run_checks(rank, port, out):
    """In one of two ranks: all that needs no training run."""
    sys.stdout = sys.stderr = open(out, 'a', buffering=1)
    torch.set_num_threads(1)
    os.environ.update({**SHARDED, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2',
                       'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)})
    accelerator = create_accelerator()
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    for check in (check_gradients, check_optimizers, check_average, check_clipping, check_finite):
        check(rank)
    check_refusals(accelerator)


def shard(model, classes=()):
    for module in reversed(list(model.modules())):
        if type(module).__name__ in classes:
            fully_shard(module)
    return fully_shard(model)


def small_model():
    """Neither its rows nor its layers are even numbers; of one layer the second rank has nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.GELU(), nn.Flatten(), nn.Linear(5 * 4, 7),
        nn.Linear(7, 1))


def learn(model, seed):
    torch.manual_seed(seed)
    model(torch.randn(8, 3, 4, 4)).square().mean().backward()


def check_gradients(rank):
    """Of TinyViT, whose blocks return views: those of the whole model, averaged over the ranks."""
    torch.manual_seed(0)
    model = timm.create_model('tiny_vit_5m_224', num_classes=10, drop_path_rate=0.)
    model.set_input_size(64)
    plain = copy.deepcopy(model)
    shard(model, block_classes(model))
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 13
    torch.manual_seed(rank)
    views = torch.randn(2, 3, 64, 64)
    for net in (model, plain):
        net(views).square().mean().backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters()):
        dist.all_reduce(two.grad)
        torch.testing.assert_close(whole(one.grad), two.grad / 2, msg=name)


def train_small(name, parts):
    """Weights after three updates with an optimiser and the same data on both ranks; parts go on from a checkpoint."""

    def create():
        model = small_model()
        if parts:
            shard(model, ('Conv2d', 'Linear'))
        return model, create_optimizer_v2(model, name, lr=1e-2, weight_decay=0.05)

    model, optimizer = create()
    for seed in range(3):
        learn(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        if parts and seed == 1:
            states = [whole_state(model), whole_state(optimizer)]
            assert dist.get_rank() == 0 or states[0]['4.weight'] is None
            dist.broadcast_object_list(states)
            model, optimizer = create()
            load_whole_state(model, states[0])
            load_whole_state(optimizer, states[1])
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def check_optimizers(rank):
    """Each that is allowed trains parts as the whole, and goes on from its whole state."""
    names = {}
    for name in list_optimizers():
        try:
            names.setdefault(type(create_optimizer_v2(small_model(), name, lr=1e-2)).__name__, name)
        except AssertionError:  # needs a GPU
            pass
    for kind in sorted(SHARDED_OPTIMIZERS):
        parts, plain = (train_small(names[kind], parts) for parts in (True, False))
        for name in plain:
            torch.testing.assert_close(parts[name], plain[name], msg=f'{kind} {name}')


def check_average(rank):
    """timm's average of parts is the one of the whole, statistics included."""
    averages = []
    for parts in (False, True):
        model = small_model()
        ema = ModelEma(model, 0.5)
        if parts:
            shard(model)
            shard(ema.module)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            learn(model, seed)
            optimizer.step()
            ema.update(model, step=seed + 2)
        averages.append({name: whole(tensor) for name, tensor in ema.module.state_dict().items()})
    for name in averages[0]:
        torch.testing.assert_close(*(average[name] for average in averages), msg=name)


def check_clipping(rank):
    for mode, limit in (('norm', 1e-3), ('value', 1e-4), ('norm', 0)):
        norms, gradients = [], []
        for parts in (False, True):
            model = shard(small_model()) if parts else small_model()
            learn(model, 0)
            norms.append(clip_gradients(list(model.parameters()), limit, mode))
            gradients.append([whole(parameter.grad) for parameter in model.parameters()])
        torch.testing.assert_close(*norms)
        torch.testing.assert_close(*gradients)


def check_finite(rank):
    """Each rank looks at its part, and waits for no other."""
    model = shard(small_model())
    assert is_finite(model)
    if rank == 1:
        local(model[4].weight.detach())[0] = float('nan')
    assert is_finite(model) == (rank == 0)


def check_refusals(accelerator):
    """Of students and optimisers that cannot be sharded, before anything is changed."""
    for model, name, classes, words in (
        ('test_efficientnet', 'muon', None, 'Muon does not train a sharded model'),
        ('test_efficientnet', 'cadamw', None, 'choose --opt adamw'),
        ('test_efficientnet', 'adamw', ['Nothing'], 'layer class Nothing in the model.*InvertedResidual'),
        ('test_vit', 'adamw', ['Block'], 'scalar parameters.*--multi_gpu'),
    ):
        student = timm.create_model(model)
        student.scale = nn.Parameter(torch.ones(())) if 'scalar' in words else None
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = classes
        with pytest.raises(InputError, match=words):
            prepare_student(accelerator, student, create_optimizer_v2(student, name, lr=1e-3))


@needs_sharding
def test_parts_on_two_ranks_are_trained_as_the_whole(warm_processes, tmp_path):
    """Gradients of TinyViT, all optimisers that are allowed, the average, clipping and the guard."""
    out, port = tmp_path / 'out.txt', free_port()
    ranks = [warm_processes.Process(target=run_checks, args=(rank, port, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0, out.read_text()


def test_versions_that_shard_otherwise_are_refused(monkeypatch, refused):
    for name, value in (('ACCELERATE_USE_FSDP', 'true'), ('FSDP_VERSION', '2')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, 'SHARDING_NEEDS', {'torch': '2.7', 'accelerate': '99.1'})
    with refused('FSDP needs accelerate 99.1 or newer; upgrade', '--multi_gpu'):
        create_accelerator()


def test_units_are_the_blocks_of_timm():
    found = {name: block_classes(timm.create_model(name)) for name in ('tiny_vit_5m_224', 'test_vit', 'test_resnet')}
    assert found == {'tiny_vit_5m_224': ['MBConv', 'TinyVitBlock'], 'test_vit': ['Block'], 'test_resnet': []}


@pytest.mark.parametrize('environment, words', [
    ({'ACCELERATE_USE_FSDP': 'true'}, ('FSDP1', '--fsdp_version 2')),
    ({'ACCELERATE_USE_DEEPSPEED': 'true'}, ('DeepSpeed', '--multi_gpu')),
    ({'ACCELERATE_USE_MEGATRON_LM': 'true'}, ('Megatron-LM', '--multi_gpu')),
    ({**SHARDED, 'ACCELERATE_USE_PARALLELISM_CONFIG': 'true'}, ('parallelism configuration', '--use_fsdp')),
    ({**SHARDED, 'FSDP_ACTIVATION_CHECKPOINTING': 'true'}, ('fsdp_activation_checkpointing', 'leave it out')),
    ({**SHARDED, 'FSDP_OFFLOAD_PARAMS': 'true'}, ('fsdp_offload_params', 'leave it out')),
    ({**SHARDED, 'FSDP_IGNORED_MODULES': 'head'}, ('fsdp_ignored_modules', 'leave it out')),
    pytest.param(
        {**SHARDED, 'FSDP_RESHARD_AFTER_FORWARD': 'FULL_SHARD'}, ('full_shard', 'correct them'), marks=needs_sharding),
])
def test_other_ways_to_share_a_model_out_are_refused(monkeypatch, refused, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with refused(*words):
        create_accelerator()


@needs_sharding
def test_a_clip_mode_that_needs_whole_weights_is_refused(start, tmp_path, one_sentence):
    said = finish(start([*RUN, *TWO, '--clip-mode', 'agc'], 1), tmp_path, status=2)
    one_sentence(said.strip().splitlines()[-1], '--clip-mode agc', 'norm or value', '--multi_gpu')
