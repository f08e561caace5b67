"""Model cards: what a model is, how well it does, how it was made, and how to use it.

The words stand in the templates of `cards/`, the facts come from the files that a run left, and nothing depends on the
time or the place of the rendering: the same run gives the same card. Metadata are huggingface_hub's own classes, so
that the Hub shows the results.
"""

import functools
import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote
from collections.abc import Iterable, Mapping

import jinja2
import timm
import torch
import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from torch.utils.flop_counter import FlopCounterMode

from ..base.errors import InputError
from ..base.escaping import Markdown, code_block, code_span, for_markdown, printable, shown, without_secrets
from ..base.text import counted, readable_bytes
from ..base.yaml_reader import HEAD, card_head
from ..models.config_file import CONFIG, image_config, read_config
from ..train.metrics import METRICS, accuracy_of, rank_of, read_metrics, suffixed
from ..train.record import read_run

__all__ = [
    'CARD', 'CITATION', 'NO_REPO', 'PACKAGE', 'PICTURE', 'TAG', 'ModelFacts', 'Weights', 'accuracy_results',
    'card_metadata', 'evaluation_command', 'has_text', 'kept_metadata', 'model_facts', 'read_weights', 'recipe_yaml',
    'render_card', 'run_card',
]

HUB = 'https://huggingface.co'
# What cards of this package have among their tags.
TAG = 'timm_tinyvit'
CARD, PICTURE = 'README.md', 'metrics.png'
# Where this package is found, as in pyproject.toml.
PACKAGE = 'https://pypi.org/project/timm-tinyvit/'
# What stands for the repo in a card that is made before it is known.
NO_REPO = 'ORG/NAME'
# What a card keeps of the one before it, if its owners have written it there, with the terms of a gated repo.
KEPT_METADATA = ('license', 'license_name', 'license_link', 'language', 'annotations_creators', 'gated')
GATED_PREFIX = 'extra_gated_'
# What the Hub's results say in place of a data set's name there.
LOCAL_DATA = 'local-folder'
# Class names that a card lists.
MAX_NAMES = 12
COMMAND_WIDTH = 100
CITATION = """\
@InProceedings{tiny_vit,
  title = {TinyViT: Fast Pretraining Distillation for Small Vision Transformers},
  author = {Wu, Kan and Zhang, Jinnian and Peng, Houwen and Liu, Mengchen and Xiao, Bin and Fu, Jianlong and Yuan, Lu},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year = {2022}
}"""


@dataclass(frozen=True)
class ModelFacts:
    """What a card says of a model, whatever its weights.

    Attributes:
        architecture: timm's name.
        parameters: Their number, in words.
        macs: Multiply-accumulates for one image, in words; empty where they cannot be counted.
        size: Height and width of its images.
        crop: How an image is brought to this size, in words.
        num_classes: Classes of its head.
        label_names: Their names, where the configuration has them.
        label_descriptions: What the names mean, where it says that.
    """
    architecture: str
    parameters: str
    macs: str
    size: tuple[int, int]
    crop: str
    num_classes: int
    label_names: tuple[str, ...] = ()
    label_descriptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def pixels(self) -> str:
        return f'{self.size[0]}x{self.size[1]}'

    @property
    def classes(self) -> Markdown:
        more = f' and {self.num_classes - MAX_NAMES:,} more' if self.num_classes > MAX_NAMES else ''
        # A description is a list of synonyms.
        names = [self.label_descriptions.get(name, name).partition(', ')[0] for name in self.label_names[:MAX_NAMES]]
        listed = ', '.join(for_markdown(' '.join(name.split())) for name in names)
        return Markdown(f'{self.num_classes:,}: {listed}{more}' if listed else f'{self.num_classes:,}')

    @property
    def other_size(self) -> int:
        """A larger size, for an example."""
        return (self.size[0] // 32 + 1) * 32


def model_facts(folder: Path) -> ModelFacts:
    """What the `config.json` of a folder says of its model; the weights need not be there.

    Raises:
        InputError: There is no such file, or timm makes no model of it.
    """
    config = read_config(folder)
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=False, device='meta').eval()
    except Exception as error:
        # timm fails in as many ways as there are wrong files.
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        raise InputError(f'timm makes no model of {folder / CONFIG} ({reason}); name the folder of a timm model')
    data, descriptions = image_config(model, str(folder)), config.get('label_descriptions')
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False  # the counter knows matrix products
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *data['input_size'], device='meta'))
        macs = _large(counter.get_total_flops() / 2)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError):
        # Some models look at values, and there are none; some take no images of the size that is said.
        macs = ''
    return ModelFacts(
        architecture=config['architecture'], macs=macs, size=tuple(data['input_size'][-2:]), crop=_crop_words(data),
        parameters=_large(sum(parameter.numel() for parameter in model.parameters())),
        num_classes=model.num_classes,
        label_names=tuple(map(str, config.get('label_names') or ())),
        label_descriptions=descriptions if isinstance(descriptions, dict) else {})


@dataclass(frozen=True)
class Weights:
    """Weights that a run exported, and how they did.

    Attributes:
        name: Their folder: `best`, `last`, `best_ema` or `last_ema`.
        epoch: After how many epochs.
        top1: Accuracy in percent; None where they were not evaluated, like the next two.
        top5: The same for the five most probable classes.
        loss: Cross-entropy in nats.
        knn: Of weights without a classifier, the accuracy of the vote of the nearest neighbours in percent.
    """
    name: str
    epoch: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    knn: float | None = None

    @property
    def is_average(self) -> bool:
        """Whether they are an average over updates."""
        return self.name.endswith('_ema')


def read_weights(run: Path) -> list[Weights]:
    """The weights that a run has exported, the most accurate first.

    Raises:
        InputError: There is no `metrics.csv`, or it is not readable.
    """
    rows, exported = read_metrics(run), []
    for weights in ('student', 'ema'):
        columns = {name: suffixed(f'eval_{name}', weights) for name in ('top1', 'top5', 'loss', 'knn')}
        evaluated = [row for row in rows if accuracy_of(row, weights) >= 0]
        # Like the run, the first of equals.
        best = max(evaluated, key=lambda row, weights=weights: rank_of(row, weights), default=None)
        for name, row in ((suffixed('best', weights), best), (suffixed('last', weights), rows[-1])):
            if row is not None and (run / name / 'config.json').is_file():
                values = {name: row[column] for name, column in columns.items() if column in row}
                exported.append(Weights(name, int(row['epoch']) + 1, **values))
    return sorted(exported, key=lambda weights: -(weights.top1 or weights.knn or 0.))


def accuracy_results(
        dataset: str,
        split: str,
        top1: float,
        top5: float | None = None,
        name: str | None = None,
        source: tuple[str, str] | None = None,
) -> list[EvalResult]:
    """Accuracies as entries of the Hub's `model-index`, which has them as shares of one.

    Args:
        dataset: Name of the data set, on the Hub where it is there.
        split: Its split.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        name: Name of the data set for readers.
        source: Name and address of who measured, where it was not the publisher.
    """
    return [
        EvalResult(
            task_type='image-classification', task_name='Image Classification', dataset_type=dataset,
            dataset_name=name or dataset, dataset_split=split, metric_type='accuracy', metric_name=metric,
            metric_value=round(value / 100, 6), source_name=source and source[0], source_url=source and source[1])
        for metric, value in (('Top-1 accuracy', top1), ('Top-5 accuracy', top5)) if value is not None]


def evaluation_command(repo: str, dataset: str, split: str, *flags: str) -> str:
    """The command that measures the accuracy of a published model."""
    data = shlex.join(['--dataset', dataset, '--val-split', split, *flags])
    return f'timm-tinyvit eval --pretrained --model hf-hub:{repo} \\\n    {data}'


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('timm_tinyvit.hub', 'cards'), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=for_markdown)
    environment.filters.update(
        block=code_block, bytes=readable_bytes, code=code_span, counted=counted, data_flag=_data_flag,
        data_link=_data_link, link=_link, listed=_listed, markdown=Markdown, model_link=_model_link,
        number=lambda value: f'{value:,}', percent=lambda value: f'{value:.2f}%', rate=_rate, repr=_literal,
        standard_error=_standard_error, store_link=_store_link, store_name=_store_name)
    return environment


def render_card(template: str, metadata: CardData, /, **facts: Any) -> str:
    """A card, of a model or of a store, from a template of this package.

    What a template puts into the card is text, and escaped as such, unless it comes from a filter that makes Markdown.

    Args:
        template: Name of the file in `cards/`.
        metadata: Of the Hub.
        facts: What the template asks for.
    """
    head = printable(metadata.to_yaml(), lines=True)
    text = _templates().get_template(template).render(
        card_data=Markdown(head), license=metadata.get('license_name') or metadata.get('license'),
        package=Markdown(f'[timm_tinyvit]({PACKAGE})'), **facts)
    # What is left out leaves blank lines.
    return without_secrets(re.sub(r'\n{3,}', '\n\n', text).strip()) + '\n'


def run_card(
        run: Path,
        which: str,
        repo: str,
        license: str | None = None,
        notes: str = '',
        speed: dict[str, Any] | None = None,
        before: str = '',
) -> ModelCard:
    """The card of a model that a run has trained.

    Args:
        run: Folder of the run.
        which: The weights: `best`, `last`, `best_ema` or `last_ema`.
        repo: ORG/NAME.
        license: The licence of the weights, as the Hub spells it, in place of the one before.
        notes: Markdown by the publisher, put near the top.
        speed: Speed of inference: `images_per_second`, `batch_size`, `device`, `threads`, `torch`.
        before: The card that it replaces; what its owners say of licence and languages is kept.

    Raises:
        InputError: The folder lacks something that a run leaves.
    """
    record, rows = read_run(run, is_whole=True), read_metrics(run)
    rates, waits = ([row[name] for row in rows if name in row] for name in ('images_per_second', 'data_wait'))
    if not rates or not waits:
        raise InputError(f'{run / METRICS} has no images_per_second or no data_wait, as a run writes them; start the '
                         f'run again, which writes it anew')
    model, weights = model_facts(run / which), read_weights(run)
    published = next((item for item in weights if item.name == which), None)
    if published is None:
        raise InputError(f'{run} has no weights {which}; name others with --which')
    shown = [published]
    for item in weights:
        # Those of the same epoch are the same.
        if (item.epoch, item.is_average) not in [(other.epoch, other.is_average) for other in shown]:
            shown.append(item)
    base, val = record['base'], record['val']
    # Records of earlier versions know of no features.
    stores = [{'features': {}} | store for store in record['stores']]
    with_top5 = model.num_classes > 5
    title = repo.partition('/')[2]
    results = [] if published.top1 is None else accuracy_results(
        val['name'] if val['on_hub'] else LOCAL_DATA, val['split'], published.top1,
        published.top5 if with_top5 else None, val['name'])
    metadata = model_metadata(
        title, results, bool(stores), _hub_datasets(record), base['name'] if base and base['on_hub'] else None,
        has_classes=bool(model.num_classes), **kept_metadata(before, license))
    return ModelCard(render_card(
        'run_card.md', metadata, title=title, repo=repo, model=model, published=published,
        notes=Markdown(notes.strip()),
        weights=shown, with_top5=with_top5, record=record, train=record['train'], val=val, stores=stores, base=base,
        environment=record['environment'], teachers=list(dict.fromkeys(map(_teacher_words, stores))),
        recipe=recipe_yaml(record).strip(), command=_training_command(record),
        filling=[_filling_command(record, store) for store in stores if not store['on_hub'] and store['flags']],
        evaluation=evaluation_command(
            repo, _data_flag(val), val['split'], *val['flags'], *(() if model.num_classes else ('--probe', 'knn'))),
        unpublished=[*(code_span(store['name']) for store in stores if not store['on_hub']),
                     *([_model_link(base)] if base and base['is_local'] else [])],
        label_weight=1 - record['recipe'].get('alpha', 1.) if stores else 0.,
        picture=PICTURE if (run / PICTURE).is_file() else '', rows=rows, speed=speed,
        training_rate=median(rates), waiting=median(waits),
        citation=CITATION if stores or model.architecture.startswith('tiny_vit') else ''))


def model_metadata(
        title: str,
        results: list[EvalResult],
        is_distilled: bool,
        data_sets: list[str],
        base_model: str | None,
        has_classes: bool = True,
        **licence: Any,
) -> ModelCardData:
    """The metadata of a model on the Hub.

    Args:
        title: What it is called.
        results: Of `accuracy_results`.
        is_distilled: Whether it learned from a teacher.
        data_sets: Names on the Hub of what it learned from.
        base_model: Name on the Hub of the weights that it started from.
        has_classes: Whether it has a classifier.
        licence: Of `kept_metadata`, or `license` alone.
    """
    task = 'image-classification' if has_classes else 'image-feature-extraction'
    return ModelCardData(
        library_name='timm', pipeline_tag=task, datasets=data_sets or None, base_model=base_model,
        tags=[task, 'timm', TAG, *(['knowledge-distillation'] if is_distilled else [])], **licence,
        **(dict(metrics=['accuracy'], model_name=title, eval_results=results) if results else {}))


def recipe_yaml(record: dict[str, Any]) -> str:
    """The flags of a run that differ from their defaults, as a file for `--config`."""

    def public(value: Any) -> Any:
        # On the command line pairs are a list. Of a path only the name is shown.
        if isinstance(value, dict):
            return [f'{name}={shown(item) if isinstance(item, str) else item}' for name, item in value.items()]
        return [public(item) for item in value] if isinstance(value, list) else (
            shown(value) if isinstance(value, str) else value)

    recipe = {key: public(value) for key, value in record['recipe'].items()}
    # A line for each flag.
    return ''.join(
        yaml.safe_dump({key: value}, default_flow_style=None if isinstance(value, list) else False, width=1000)
        for key, value in recipe.items())


def card_metadata(card: str) -> dict[str, Any]:
    """The metadata of any card; empty where they cannot be read."""
    try:
        return card_head(card, 'the card')
    except InputError:
        return {}


def kept_metadata(before: str, license: str | None) -> dict[str, Any]:
    """What a new card takes over from the one that it replaces, of a model or a data set.

    Args:
        before: The card that it replaces, or an empty text.
        license: Name of a licence, in place of the one before.
    """
    kept = {key: value for key, value in card_metadata(before).items() if value and (
        key in KEPT_METADATA or str(key).startswith(GATED_PREFIX))}
    # A licence of one's own has a name and a link beside it.
    if license and license != kept.get('license'):
        kept = {key: value for key, value in kept.items() if not key.startswith('license')} | {'license': license}
    return kept


def has_text(card: str) -> bool:
    """Whether a card says anything beside its metadata."""
    head = HEAD.match(card)
    return bool(card[head.end() if head else 0:].strip())


def _training_command(record: dict[str, Any]) -> str:
    train, val = record['train'], record['val']
    data = ['--dataset', _data_flag(train)]
    if val['name'] != train['name']:
        data += ['--val-dataset', _data_flag(val)]
    data += ['--val-split', val['split']]
    if record['stores']:
        data += ['--logits', *(store['name'] for store in record['stores'])]
    base = record['base']
    if base and base['is_local'] and record['recipe']['model'] != f'local-dir:{base["name"]}':
        data += ['--initial-checkpoint', base['name']]
    processes = record['environment']['processes']
    program = 'timm-tinyvit train' if processes == 1 else 'accelerate launch -m train_distill'
    return _wrapped(f'{program} --config recipe.yaml', data)


def _filling_command(record: dict[str, Any], store: dict[str, Any]) -> str:
    """The command that makes a store which is not published."""
    train = record['train']
    data = ['--dataset', _data_flag(train), '--train-split', train['split']]
    for name in ('input_key', 'target_key'):
        if name in record['recipe']:
            data += [f'--{name.replace("_", "-")}', record['recipe'][name]]
    teacher = store['teacher']['name'] if store['teacher_repo'] else 'TEACHER'
    return _wrapped('timm-tinyvit fill', [
        *data, '--logits', store['name'], '--teacher', teacher, *store['flags']])


def _wrapped(command: str, words: list[str]) -> str:
    """A command in lines of a page's width, with the flags behind it never parted from their values."""
    parts: list[list[str]] = []
    for word in words:
        if word.startswith('--'):
            parts.append([])
        parts[-1].append(word)
    lines = [command]
    for part in map(shlex.join, parts):
        if len(lines) == 1 or len(lines[-1]) + len(part) > COMMAND_WIDTH:
            lines.append(f'    {part}')
        else:
            lines[-1] += f' {part}'
    return ' \\\n'.join(lines)


def _hub_datasets(record: dict[str, Any]) -> list[str]:
    """The images and the stores that a run learned from, as far as they are on the Hub."""
    stores = [store['name'].removeprefix('hf://datasets/').partition('@')[0]
              for store in record['stores'] if store['on_hub']]
    return ([_repo_of(record['train'])] if record['train']['on_hub'] else []) + list(dict.fromkeys(stores))


def _repo_of(data: dict[str, Any]) -> str:
    """The repo of a data set, which its name may follow by a revision and a configuration."""
    return re.split('[@:]', data['name'])[0]


def _large(value: float) -> str:
    """A number in millions or billions."""
    value, unit = (value / 1e9, 'billion') if value >= 1e9 else (value / 1e6, 'million')
    return f'{value:.2f} {unit}' if value < 10 else f'{value:.1f} {unit}'


def _rate(value: float) -> str:
    return f'{value:,.0f}' if value >= 10 else f'{value:.1f}'


def _standard_error(percent: float, images: int) -> str:
    """What chance does to an accuracy over so many images."""
    share = percent / 100
    return f'{100 * math.sqrt(max(0., share * (1 - share)) / images):.2f}'


def _crop_words(data: dict[str, Any]) -> str:
    """How timm brings an image to its size."""
    size = tuple(data['input_size'][-2:])
    height, width = size
    scaled = tuple(math.floor(side / data['crop_pct']) for side in size)
    filter = f'{data["interpolation"]} interpolation'
    if data['crop_mode'] == 'squash':
        words = f'the whole image squashed to {scaled[0]}x{scaled[1]} with {filter}'
    elif data['crop_mode'] == 'border':
        words = f'the longer side resized to {max(scaled)} with {filter}, the rest filled up'
    else:
        words = f'the shorter side resized to {min(scaled)} with {filter}'
    return words if data['crop_mode'] != 'center' and scaled == size else f'{words}, then the middle {height}x{width}'


def _literal(text: str) -> Markdown:
    """A text as a literal of Python, within a block of code."""
    return Markdown(printable(ascii(without_secrets(text))).replace('`', r'\x60'))


def _link(name: str, path: str | None) -> Markdown:
    """A link to what the Hub has at this path; the name alone where that is not known."""
    text = name.removeprefix('hf-hub:').removeprefix('hf:')
    return Markdown(f'[{for_markdown(text)}]({HUB}/{quote(path)})') if path else code_span(name)


def _data_link(data: dict[str, Any]) -> Markdown:
    return _link(data['name'], f'datasets/{_repo_of(data)}') if data['on_hub'] else Markdown(
        f'{code_span(data["name"])} (a local folder)')


def _data_flag(data: dict[str, Any]) -> str:
    """A data set on a command line; of a folder, one that is not looked for on the Hub."""
    return data['name'] if data['on_hub'] else f'./{data["name"]}'


def _model_link(base: dict[str, Any]) -> Markdown:
    return _link(base['name'], base['name']) if base['on_hub'] else Markdown(f'the weights {code_span(base["name"])}')


def _teacher_words(store: dict[str, Any]) -> Markdown:
    link = _link(store['teacher']['name'], store['teacher_repo'])
    return link if store['teacher_repo'] else Markdown(f'a teacher called {link}')


def _store_name(store: dict[str, Any]) -> Markdown:
    return _store_link(store) if store['on_hub'] else code_span(store['name'])


def _store_link(store: dict[str, Any]) -> Markdown:
    if not store['on_hub']:
        return Markdown(f'{code_span(store["name"])} (identity {for_markdown(store["identity"])})')
    repo, _, commit = store['name'].removeprefix('hf://datasets/').partition('@')
    return _link(repo, f'datasets/{repo}' + (f'/tree/{commit}' if commit else ''))


def _listed(items: Iterable[str]) -> Markdown:
    *most, last = map(for_markdown, items)
    return Markdown(f'{", ".join(most)} and {last}' if most else last)
