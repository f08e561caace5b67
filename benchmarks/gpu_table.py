"""The figures of gpu.py as the tables of docs/results.md."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Figures = list[dict[str, Any]]
Rows = Iterator[list[str]]
TITLES = {
    'tiny_vit_5m_224': 'TinyViT-5M', 'tiny_vit_11m_224': 'TinyViT-11M', 'tiny_vit_21m_224': 'TinyViT-21M',
    'tiny_vit_21m_384': 'TinyViT-21M, 384 pixels', 'tiny_vit_21m_512': 'TinyViT-21M, 512 pixels'}


def by_peer(figures: Figures) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Figures of each model and mode by peer, without those that failed."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for figure in figures:
        if 'error' not in figure:
            found.setdefault((figure['model'], figure['mode']), {})[figure['peer']] = figure
    for (model, mode), peers in found.items():
        yield f'{TITLES[model]}, {mode}', peers


def models(figures: Figures) -> Rows:
    yield ['', 'timm', 'timm channels-last', 'this package', 'times timm', 'times channels-last', 'share of memory']
    for title, peers in by_peer(figures):
        timm, last, ours = (peers[name] for name in ('timm', 'timm channels-last', 'ours'))
        memory = f'{ours["peak_memory"] / timm["peak_memory"]:.2f}' if timm['peak_memory'] else ''
        yield [title, *(f'{peer["images_per_second"]:,.0f}' for peer in (timm, last, ours)),
               f'{ours["times_timm"]:.2f}', f'{ours["times_timm_channels_last"]:.2f}', memory]


def compiled(figures: Figures) -> Rows:
    yield ['compiled', 'timm channels-last', 'this package', 'times']
    for title, peers in by_peer(figures):
        if {'timm channels-last', 'ours'} <= peers.keys():
            last, ours = (peers[name]['images_per_second'] for name in ('timm channels-last', 'ours'))
            yield [title, f'{last:,.0f}', f'{ours:,.0f}', f'{ours / last:.2f}']


def loss(figures: Figures) -> Rows:
    yield ['views, classes, k', 'logits', 'dense', 'this package', 'times as fast', 'memory', 'times, one by one']
    dense = {}
    for figure in figures:
        key = (figure['batch_size'], figure['classes'], figure['k'], figure['dtype'])
        if figure['loss'] == 'dense':
            dense[key] = figure
        elif figure['loss'] == 'triton':
            yield ['{:,}, {:,}, {}'.format(*key[:3]), figure['dtype'], f'{dense[key]["device_ms"]:.3f} ms',
                   f'{figure["device_ms"]:.3f} ms', f'{figure["times_as_fast_on_device"]:.1f}',
                   f'{figure["share_of_memory"]:.2f}', f'{figure["times_as_fast"]:.1f}']


def decode(figures: Figures) -> Rows:
    yield ['codec', 'targets', 'bytes per view', 'views/s on the device', 'times the host']
    for figure in figures:
        yield [f'`{figure["codec"]}`', figure['shape'], f'{figure["bytes_per_view"]:,}',
               f'{figure["views_per_second"]:,}', f'{figure["milliseconds_on_host"] / figure["milliseconds"]:.1f}']


def guard(figures: Figures) -> Rows:
    yield ['guard', 'ms per step']
    titles = {'none': 'none', 'late': 'as in training, read one step late', 'each step': 'read in each step'}
    for figure in figures:
        yield [titles[figure['guard']], f'{figure["ms_per_step"]:.1f}']


def step(figures: Figures) -> Rows:
    yield ['a step', 'ms', 'times as long as', 'ratio', '95% interval']
    for figure in figures:
        for name, seconds in figure['seconds'].items():
            peers = [(peer, figure[f'times_{peer}'][name]) for peer in ('labels', 'store')
                     if name in figure[f'times_{peer}']]
            peer, times = peers[0] if peers else ('', None)
            interval = [f'{times["times"]:.3f}', f'{times["low"]:.3f} to {times["high"]:.3f}'] if times else ['', '']
            yield [name, f'{1e3 * seconds["trainer"]:.1f}', peer, *interval]


def resume(figures: Figures) -> Rows:
    yield ['killed and resumed', 'same weights and losses, to the bit']
    for figure in figures:
        yield [figure['dtype'], 'yes' if figure['identical'] else 'no']


def fsdp(figures: Figures) -> Rows:
    yield ['run', 'images/s', 'loss of the last epoch', 'largest relative difference of a weight']
    for figure in figures:
        yield [figure['peer'], f'{figure["images_per_second"]:,.0f}', f'{figure["loss"]:.4f}',
               f'{figure["largest_relative_difference"]:.1e}']


def loader(figures: Figures) -> Rows:
    yield ['decoder', 'views of an image', 'processes', 'views/s']
    for figure in figures:
        yield [f'`{figure["decoder"]}`', str(figure['views_per_image']), str(figure['workers']),
               f'{figure["views_per_second"]:,.0f}']


TABLES: dict[str, Callable[[Figures], Rows]] = {
    function.__name__: function
    for function in (models, compiled, loss, decode, guard, step, resume, fsdp, loader)}


def table(part: str, folder: Path) -> str:
    """The figures of a part as a Markdown table."""
    figures = [json.loads(line) for line in (folder / f'{part}.jsonl').read_text().splitlines()]
    head, *rows = TABLES[part]([figure for figure in figures if 'finished' not in figure])
    return '\n'.join(f'| {" | ".join(row)} |' if row is not head else f'| {" | ".join(row)} |\n|{"---|" * len(row)}'
                     for row in (head, *rows))


def tables(folder: Path) -> str:
    """All tables of a folder of results, each under the command that prints its figures."""
    return '\n\n'.join(
        f'`python benchmarks/gpu.py --part {part}`:\n\n{table(part, folder)}'
        for part in TABLES if (folder / f'{part}.jsonl').exists())
