"""Models on the Hub, over the real client and a local server: pushed whole or not at all, and pulled by plain timm."""

import json
import shlex
import shutil

import pytest
import timm
import torch
from support import plain_timm
from support.flags import ROOT, SMALL_VIT, small_data
from support.hub_server import READ_TOKEN, TOKEN
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_distill
from timm_tinyvit import cli
from timm_tinyvit.hub import push_model as publish
from timm_tinyvit.hub.model_card import CARD, NO_REPO, read_weights
from timm_tinyvit.models.saving import export_model
from timm_tinyvit.train.checkpoint import FREE_FLAGS

REPO = 'org/student'
FILES = {'README.md', 'config.json', 'model.safetensors', 'metrics.csv', 'metrics.png', 'recipe.yaml'}
FLAGS = [*small_data(32, 40), '-b', '16', '--lr', '1e-3', '--epochs', '1', '--warmup-epochs', '0', '--quiet']
VIT = [*FLAGS, *SMALL_VIT, '--model-ema']


@pytest.fixture(scope='module')
def runs(tmp_path_factory, teacher):
    """A TinyViT of another size than its own, distilled, a student of another family, and one without classes."""
    output = tmp_path_factory.mktemp('runs')
    train_distill.main([
        *FLAGS, '--img-size', '64', '--model', 'tiny_vit_5m_224', '--teacher', teacher, '--logits',
        str(output / 'logits'), '--topk', '3', '--shard-size', '32', '--output', str(output), '--experiment', 'tiny'])
    train_distill.main([*VIT, '--output', str(output), '--experiment', 'vit'])
    train_distill.main([
        *FLAGS, '--model', 'test_resnet', '--num-classes', '0', '--teacher', teacher, '--logits',
        str(output / 'features'), '--targets', 'features', '--output', str(output), '--experiment', 'backbone'])
    for name in ('tiny', 'vit', 'backbone'):
        publish.model_files(output / name, REPO)  # measures the speed, once
    return output


@pytest.fixture
def vit(runs, tmp_path):
    return shutil.copytree(runs / 'vit', tmp_path / 'vit')


def push(hub, hub_children, folder, home, *flags, status=0):
    return hub_children.run(
        ['-m', 'timm_tinyvit', 'publish', folder, '--repo', REPO, *flags], hub.environment(home), status=status)


def sentence_of(result, one_sentence, *words):
    """The one line in which a program said why it failed."""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'Traceback' not in result.stderr
    one_sentence(last, *words)
    return last


def test_a_run_is_pushed_in_one_commit_and_unchanged_in_none(hub, hub_children, vit, tmp_path):
    hub.require_parent = True
    result = push(hub, hub_children, vit, tmp_path, '--private', '--license', 'apache-2.0')
    assert f'published: {hub.endpoint}/{REPO}' in result.stdout
    files, commits = hub.files(REPO), hub.commits(REPO)
    assert set(files) == FILES and len(commits) == 2
    chosen = read_weights(vit)[0].name
    assert chosen.startswith('best') and f'**`{chosen}`, published here**' in files[CARD].decode()
    for name in ('config.json', 'model.safetensors'):
        assert files[name] == (vit / chosen / name).read_bytes()
    assert files['metrics.png'] == (vit / 'metrics.png').read_bytes()
    assert ModelCard(files['README.md'].decode()).data.license == 'apache-2.0'
    assert hub.repos['model', REPO].private

    again = push(hub, hub_children, vit, tmp_path)
    assert 'had all of it already' in again.stdout
    assert len(hub.commits(REPO)) == 2


def test_what_others_put_in_the_repo_stays_and_what_a_push_no_longer_has_goes(hub, hub_children, vit, tmp_path):
    push(hub, hub_children, vit, tmp_path)
    card = hub.files(REPO)[CARD].decode().replace('library_name: timm\n', 'library_name: timm\nlicense: cc-by-4.0\n')
    hub.add_commit(REPO, {'LICENSE': b'terms', CARD: card.encode()})
    (vit / 'metrics.png').unlink()
    push(hub, hub_children, vit, tmp_path)
    files = hub.files(REPO)
    assert set(files) == (FILES | {'LICENSE'}) - {'metrics.png'}
    assert ModelCard(files[CARD].decode()).data.license == 'cc-by-4.0'
    assert 'metrics.png' not in files[CARD].decode()


@pytest.mark.parametrize('name, size', [('tiny', 64), ('vit', 32), ('backbone', 32)])
def test_a_pushed_model_is_pulled_with_its_tensors_logits_labels_and_preprocessing(
        hub, hub_children, runs, tmp_path, name, size):
    push(hub, hub_children, runs / name, tmp_path / 'pusher', '--which', 'last')
    model = timm.create_model(f'local-dir:{runs / name / "last"}', pretrained=True).eval()
    expected, data = load_file(runs / name / 'last' / 'model.safetensors'), timm.data.resolve_model_data_config(model)
    for imported, package in (('timm', 'timm'), ('timm_tinyvit', 'timm_tinyvit' if name == 'tiny' else 'timm')):
        pulled = hub_children.run(
            plain_timm.pull, hub.environment(tmp_path / package, token=None), imported, folder=tmp_path)
        said, tensors = json.loads(pulled.stdout), load_file(tmp_path / 'pulled.safetensors')
        assert said['module'].partition('.')[0] == package
        images, logits, last = (tensors.pop(key) for key in ('images', 'logits', 'map'))
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
        with torch.no_grad():
            assert (model(images) - logits).abs().max() <= 1e-4
            maps = model.forward_intermediates(images, indices=1, output_fmt='NCHW', intermediates_only=True)
            assert (maps[-1] - last).abs().max() <= 1e-4 * last.abs().max()
        assert said['data'] == json.loads(json.dumps(data)) and said['data']['input_size'] == [3, size, size]
        assert (said['names'] is None) == (model.num_classes == 0) == (name == 'backbone')
        assert name == 'backbone' or said['names'][0] == 'T-shirt/top' and len(said['names']) == 10
    card = hub.files(REPO)[CARD].decode()
    assert ('cosine of' in card) == ('without a classifier' in card) == (name == 'backbone')


def test_a_backbone_that_nothing_evaluated_has_a_card(runs, tmp_path):
    folder = shutil.copytree(runs / 'backbone', tmp_path / 'run')
    record = json.loads((folder / 'run.json').read_text())
    record['val']['images'] = 0  # as of a data set without another split
    (folder / 'run.json').write_text(json.dumps(record))
    metrics = (folder / 'metrics.csv').read_text()
    (folder / 'metrics.csv').write_text(metrics.replace('eval_knn', 'other'))
    card = publish.model_files(folder, REPO, 'last')[CARD].decode()
    assert 'These weights were not evaluated.' in card and '--probe knn' in card


def test_the_card_of_a_pushed_model_does_what_it_says(hub, hub_children, runs, tmp_path):
    """Its first example in plain timm, and its evaluation command, which gives the accuracy of its table."""
    push(hub, hub_children, runs / 'tiny', tmp_path)
    card = ModelCard(hub.files(REPO)[CARD].decode())
    blocks = card.text.split('```')
    example = next(block.removeprefix('python\n') for block in blocks if block.startswith('python\nimport timm'))
    from PIL import Image
    Image.effect_noise((80, 60), 50).save(tmp_path / 'image.jpg')
    shown = hub_children.run(
        plain_timm.run_example, hub.environment(tmp_path, token=None), example, folder=tmp_path)
    assert len(shown.stdout.splitlines()) == 5 and '% ' in shown.stdout

    command = next(block for block in blocks if block.startswith('\ntimm-tinyvit eval'))
    words = shlex.split(command.replace('\\\n', ''))[1:]
    measured = hub_children.run(
        ['-m', 'timm_tinyvit', *words, '-j', '0'], hub.environment(tmp_path, token=None), folder=ROOT / 'examples')
    assert f'top1 {100 * card.data.eval_results[0].metric_value:.3f}' in measured.stdout


def test_a_converted_folder_is_pushed_with_the_name_of_its_repo_in_its_card(hub, hub_children, tmp_path, refused):
    export_model(tmp_path / 'converted', timm.create_model('test_resnet', num_classes=3))
    (tmp_path / 'converted' / CARD).write_text(f'---\nlicense: mit\n---\nhf-hub:{NO_REPO}\n')
    for action in (publish.model_files, publish.publish):  # of which the second asks the Hub for nothing
        with refused('has no tag timm_tinyvit', 'add it to the tags'):
            action(tmp_path / 'converted', REPO)
    (tmp_path / 'converted' / CARD).write_text(f'---\nlicense: mit\ntags: [timm_tinyvit]\n---\nhf-hub:{NO_REPO}\n')
    push(hub, hub_children, tmp_path / 'converted', tmp_path)
    files = hub.files(REPO)
    assert set(files) == {CARD, 'config.json', 'model.safetensors'}
    assert f'hf-hub:{REPO}\n' in files[CARD].decode()


@pytest.mark.parametrize('match, how, options, words', [
    (r'POST /api/models/org/student/commit/', '500', dict(times=99), 'in trouble (HTTP 500)'),
    (r'PUT /storage/upload/', 'cut', dict(times=99), 'cannot push to the model repo org/student'),
    (r'PUT /storage/upload/', '500', dict(times=99), 'in trouble'),
    (r'POST /api/models/org/student/preupload/', '503', dict(times=99), 'in trouble'),
    (r'POST /api/models/org/student/commit/', '412', dict(times=99), 'org/student'),
    (r'POST /api/models/org/student/commit/', 'commit-between', dict(files={'config.json': b'{}'}),
     'somebody else has just changed config.json'),
], ids=['commit 500', 'upload cut', 'upload 500', 'preupload 503', 'commit 412', 'commit between'])
def test_a_push_that_breaks_leaves_the_repo_as_it_was(
        hub, hub_children, vit, tmp_path, one_sentence, match, how, options, words):
    before = {'config.json': b'{"architecture": "another"}', 'model.safetensors': b'other weights', 'LICENSE': b'terms',
              CARD: b'---\ntags: [timm_tinyvit]\n---\n# A student\n'}
    hub.add_commit(REPO, before)
    hub.fail(match, how, **options)
    result = push(hub, hub_children, vit, tmp_path, status=2)
    sentence_of(result, one_sentence, words)
    # Nor the signatures of addresses, where huggingface_hub says what it tries again.
    assert not leaks(vit, tmp_path, {}, result) and 'Signature' not in result.stderr
    assert hub.files(REPO) == {**before, **options.get('files', {})}
    assert len(hub.commits(REPO)) == 2 + (how == 'commit-between')


@pytest.mark.parametrize('files, found', [
    ({CARD: b'---\ntags: [timm]\n---\n# My model\n'}, 'README.md'),
    ({CARD: b'---\ntags: not_timm_tinyvit\n---\n', 'weights.h5': b'weights'}, 'weights.h5'),
    ({CARD: b'---\ntags: 5\ndate: 2024-02-30\n---\n', 'config.json': b'{}'}, 'config.json'),
    ({'metrics.csv': b'epoch'}, 'metrics.csv'),
    ({CARD: b'# My model\n'}, 'README.md'),
    ({'pytorch_model.bin': b'pickle'}, 'pytorch_model.bin'),
    ({CARD: b'---\nlicense: mit\n---\n', 'model.safetensors': b'weights'}, 'model.safetensors'),
], ids=['another card', 'another tag', 'odd head', 'metrics', 'no metadata', 'no card', 'no text'])
def test_the_model_of_somebody_else_is_left_alone(hub, hub_children, vit, tmp_path, one_sentence, files, found):
    hub.add_commit(REPO, files)
    result = push(hub, hub_children, vit, tmp_path, status=2)
    sentence_of(result, one_sentence, f'org/student holds something else, {found}', 'name another repo')
    assert hub.files(REPO) == files


def test_nothing_is_trained_for_the_repo_of_somebody_else(hub, hub_children, tmp_path, one_sentence):
    hub.add_commit(REPO, {CARD: b'# My model\n'})
    trained = hub_children.run(
        ['-m', 'train_distill', *VIT, '--output', tmp_path, '--experiment', 'new', '--push-to-hub', REPO],
        hub.environment(tmp_path), status=2)
    sentence_of(trained, one_sentence, 'holds something else, README.md', 'or leave --push-to-hub out')
    assert hub.files(REPO) == {CARD: b'# My model\n'} and not (tmp_path / 'new' / 'metrics.csv').exists()


def test_a_repo_that_its_owner_has_only_opened_is_pushed_to(hub, hub_children, vit, tmp_path):
    """As the Hub makes it, with a card that is a head alone, and a licence of the owner's."""
    hub.add_commit(REPO, {CARD: b'\xef\xbb\xbf\n---\nlicense: other\nlicense_name: mine\n---\n', 'LICENSE': b'terms',
                          '.gitattributes': b''})
    push(hub, hub_children, vit, tmp_path, '--license', 'other')
    data = ModelCard(hub.files(REPO)[CARD].decode()).data
    assert (data.license, data.license_name) == ('other', 'mine')
    assert hub.files(REPO)['LICENSE'] == b'terms'


def test_a_licence_that_the_hub_does_not_know_is_found_out_first(hub, hub_children, vit, tmp_path, one_sentence):
    result = push(hub, hub_children, vit, tmp_path, '--license', 'apache2', status=2)
    sentence_of(result, one_sentence, "'apache2' is no licence that the Hub knows", 'or write other')
    trained = hub_children.run(
        ['-m', 'train_distill', *VIT, '--output', tmp_path, '--experiment', 'new', '--push-to-hub', REPO,
         '--hub-license', 'apache2'], hub.environment(tmp_path), status=2)
    sentence_of(trained, one_sentence, "'apache2' is no licence", 'or leave --push-to-hub out')
    assert ('model', REPO) not in hub.repos and not (tmp_path / 'new' / 'metrics.csv').exists()


def test_no_repo_is_made_for_data_that_are_not_there(hub, hub_children, tmp_path, one_sentence):
    trained = hub_children.run(
        ['-m', 'train_distill', *VIT, '--val-split', 'validation', '--output', tmp_path, '--push-to-hub', REPO],
        hub.environment(tmp_path), status=2)
    sentence_of(trained, one_sentence, 'has no split validation')
    assert ('model', REPO) not in hub.repos


@pytest.mark.parametrize('match, how', [
    (r'POST /api/models/org/student/commit/', '500'), (r'POST /api/models/org/student/commit/', 'lost'),
    (r'PUT /storage/upload/', 'cut'), (r'POST /api/models/org/student/preupload/', '429'),
])
def test_what_passes_by_itself_is_tried_again_and_ends_in_one_commit(hub, hub_children, vit, tmp_path, match, how):
    hub.fail(match, how)
    push(hub, hub_children, vit, tmp_path)
    assert set(hub.files(REPO)) == FILES and len(hub.commits(REPO)) == 2


@pytest.mark.parametrize('token, words', [
    (None, 'log in with `hf auth login`'), ('hf_wrong', 'your token is wrong or expired'),
    (READ_TOKEN, 'take one with write access'),
], ids=['none', 'wrong', 'read-only'])
def test_a_token_that_may_not_push_is_found_out_before_anything_is_trained(
        hub, hub_children, tmp_path, one_sentence, token, words):
    hub.add_repo(REPO)
    trained = hub_children.run(
        ['-m', 'train_distill', *VIT, '--output', tmp_path, '--experiment', 'new', '--push-to-hub', REPO],
        hub.environment(tmp_path, token), status=2)
    sentence = sentence_of(trained, one_sentence, words, 'or leave --push-to-hub out')
    assert token is None or token not in sentence
    assert not list((tmp_path / 'new').iterdir())
    assert len(hub.commits(REPO)) == 1


def test_a_training_run_ends_with_its_model_on_the_hub_and_its_token_nowhere(hub, hub_children, teacher, tmp_path):
    """The token once from the environment, once from the file where huggingface_hub keeps it."""
    pytest.importorskip('tensorboard')
    for number, token in enumerate(('', None)):
        home, folder = tmp_path / f'home{number}', tmp_path / f'out{number}'
        repo = f'org/run{number}'
        home.mkdir()
        if token is None:
            (home / 'token').write_text(TOKEN)
        result = hub_children.run(
            ['-m', 'train_distill', *VIT, '--teacher', teacher, '--logits', folder / 'logits', '--topk', '3',
             '--shard-size', '32', '--output', folder, '--experiment', 'run', '--log', 'tensorboard',
             '--recovery-interval', '1', '--push-to-hub', repo, '--hub-license', 'mit'],
            hub.environment(home, token))
        assert f'published: {hub.endpoint}/{repo}' in result.stdout
        assert set(hub.files(repo)) == FILES and len(hub.commits(repo)) == 2
        assert not leaks(folder, home, hub.files(repo), result)
        made = {file.name for file in folder.rglob('*')}
        assert {'run.json', 'store.json', 'shard-00000.arrow'} <= made
        assert any(name.startswith('events.out') for name in made) and any(name.endswith('.pt') for name in made)
        assert json.loads((folder / 'run' / 'run.json').read_text())['flags']['push_to_hub'] == repo


def leaks(folder, home, files, *results):
    """Where the token is found outside the file that huggingface_hub keeps it in."""
    found = [str(file) for root in (folder, home) for file in root.rglob('*')
             if file.is_file() and file != home / 'token' and TOKEN.encode() in file.read_bytes()]
    found += [name for name, content in files.items() if TOKEN.encode() in content]
    return found + [text for result in results for text in (result.stdout, result.stderr) if TOKEN in text]


def test_a_push_that_fails_at_the_end_leaves_the_models_and_says_how_to_push_them(
        hub, hub_children, tmp_path, one_sentence):
    home, folder = tmp_path / 'home', tmp_path / 'out'
    command = ['-m', 'train_distill', *VIT, '--output', folder, '--experiment', 'run', '--push-to-hub', REPO,
               '--hub-license', 'mit']
    hub.fail(r'POST /api/models/org/student/commit/', '500', times=99)
    result = hub_children.run(command, hub.environment(home), status=2)
    again = f'timm-tinyvit publish {folder / "run"} --repo {REPO} --license mit'
    sentence = sentence_of(result, one_sentence, 'the run is finished', again)
    assert 'finished:' in result.stdout and len(hub.commits(REPO)) == 1
    assert all((folder / 'run' / name / 'model.safetensors').is_file() for name in ('best', 'last', 'best_ema'))
    hub.fail(r'POST /api/models/org/student/commit/', 'cut', times=99)
    second = hub_children.run(command, hub.environment(home), status=2)
    sentence_of(second, one_sentence, 'nothing was pushed')
    assert not leaks(folder, home, hub.files(REPO), result, second)

    hub.forget()
    words = shlex.split(sentence.partition('to push them: timm-tinyvit ')[2])
    hub_children.run(['-m', 'timm_tinyvit', *words], hub.environment(home))
    assert set(hub.files(REPO)) == FILES
    assert ModelCard(hub.files(REPO)[CARD].decode()).data.license == 'mit'


def test_the_flags_of_a_push_do_not_hinder_a_resume():
    assert {'push_to_hub', 'hub_private', 'hub_license'} <= FREE_FLAGS


def test_a_dry_run_writes_what_would_be_pushed(vit, tmp_path, capsys):
    (tmp_path / 'notes.md').write_text('Seen on a Tuesday.')
    command = ['publish', str(vit / 'last'), '--repo', REPO, '--notes', str(tmp_path / 'notes.md'), '--dry-run']
    cli.main([*command, str(tmp_path / 'dry')])
    assert {file.name for file in (tmp_path / 'dry').iterdir()} == FILES
    card = (tmp_path / 'dry' / CARD).read_text()
    assert '**`last`, published here**' in card and 'Seen on a Tuesday.' in card
    assert 'Inference: ' in card and json.loads((vit / 'speed.json').read_text())['batch_size'] > 0
    cli.main([*command, str(tmp_path / 'again')])
    assert (tmp_path / 'again' / CARD).read_text() == card


def test_bad_input_gets_one_clear_sentence(vit, tmp_path, refused, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['publish', str(vit), '--repo', REPO, '--notes', str(tmp_path / 'none.md')])
    assert stop.value.code == 2 and 'none.md cannot be read' in capsys.readouterr().err
    with refused('is neither a run'):
        publish.model_files(tmp_path, REPO)
    with refused("'student' is no name of a repo"):
        publish.model_files(vit, 'student')
    shutil.rmtree(vit / 'best_ema')
    with refused('has no weights best_ema, only best, last'):
        publish.model_files(vit, REPO, 'best_ema')
    for flags, words in (
        (['--push-to-hub', 'student'], "'student' is no name of a repo"),
        (['--hub-private'], 'need a repo'),
    ):
        with refused(words):
            train_distill.settings([*VIT, *flags])
