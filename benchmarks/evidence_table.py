"""The tables and the plot of evidence.py, from the files of its finished runs and from nothing else."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from timm_tinyvit.base.errors import InputError

__all__ = ['plot', 'read_records', 'summaries', 'table']

PROBES = ('knn', 'linear')
DASH = '\N{EN DASH}'
MINUS = '\N{MINUS SIGN}'


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What the finished runs of a grid have measured, by their names.

    Raises:
        InputError: No run is finished.
    """
    records = {file.stem: json.loads(file.read_text(encoding='utf-8')) for file in sorted(folder.glob('*.json'))}
    if not records:
        raise InputError(f'{folder} has no finished run; run the grid first, without --table, --plot and --json')
    return records


def summaries(rows: Sequence[Any], records: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Accuracy of each row that has a finished run, and its difference to another row over the seeds that both have."""
    runs = {row.name: {record['seed']: record for record in records.values() if record.get('row') == row.name}
            for row in rows}
    scores = {name: {seed: record['top1'] for seed, record in found.items() if record['top1'] is not None}
              for name, found in runs.items()}
    groups = list(dict.fromkeys(row.group for row in rows))
    for row in sorted(rows, key=lambda row: groups.index(row.group)):
        if not runs[row.name]:
            continue
        other = scores[row.against] if row.against in scores else {}
        store = records.get(f'store-{row.store}')
        yield {
            'row': row.name, 'group': row.group, 'title': row.title, 'against': row.against,
            'top1': dict(sorted(scores[row.name].items())),
            'differences': [top1 - other[seed] for seed, top1 in sorted(scores[row.name].items()) if seed in other],
            'bytes_per_view': store and store['store']['bytes_per_view'],
            **{probe: {seed: record['probes'][probe] for seed, record in sorted(runs[row.name].items())}
               for probe in (PROBES if row.is_probed else ())}}


def spread(values: Sequence[float], sign: str = '') -> str:
    """Mean and, of several values, standard deviation; `sign` is as in format."""
    if not values:
        return DASH
    text = f'{mean(values):{sign}.2f}'.replace('-', MINUS)
    return f'{text} ± {stdev(values):.2f}' if len(values) > 1 else text


def table(note: str, rows: Sequence[Any], records: dict[str, dict[str, Any]]) -> str:
    """Markdown: how it was measured, the students plain and distilled, and what else was changed."""
    found = {row['row']: row for row in summaries(rows, records)}
    runs = [record for record in records.values() if 'row' in record]
    parts = [f'{note} {setting(runs, records)}']
    missing = dict.fromkeys(row.title for row in rows if row.name not in found)
    if missing:
        parts[0] += f' Not run yet: {"; ".join(missing)}.'
    distilled = [row for row in found.values() if row['group'] == 'student' and row['against'] in found]
    if distilled:
        lines = ['| student | labels only | distilled | gain | seeds |', '|---|---|---|---|---|']
        for row in distilled:
            plain = found[row['against']]
            lines.append(
                f'| {row["title"]} | {spread([*plain["top1"].values()])} | {spread([*row["top1"].values()])} '
                f'| {spread(row["differences"], "+")} | {len(row["differences"])} |')
        parts.append('\n'.join(lines))
    backbones = [row for row in found.values() if row['group'] == 'backbone']
    if backbones:
        lines = ['| learned from | nearest neighbours | linear probe | own classifier | seeds |',
                 '|---|---|---|---|---|']
        for row in backbones:
            seeds = row.get('knn') or row['top1']
            values = (spread([*row.get(name, {}).values()]) for name in (*PROBES, 'top1'))
            lines.append(f'| {row["title"]} | {" | ".join(values)} | {len(seeds)} |')
        parts.append('\n'.join(lines))
    others = [row for row in found.values() if row['group'] not in ('student', 'backbone')]
    if others:
        lines = ['| changed | to | top-1 | difference | seeds | bytes per view |', '|---|---|---|---|---|---|']
        base = found.get(others[0]['against'])
        unchanged = base and base | {'group': 'nothing', 'title': f'{base["title"]}, as above', 'differences': []}
        for row in [unchanged, *others] if unchanged else others:
            lines.append(
                f'| {row["group"]} | {row["title"]} | {spread([*row["top1"].values()])} '
                f'| {spread(row["differences"], "+")} | {len(row["top1"])} | {row["bytes_per_view"] or DASH} |')
        parts.append('\n'.join(lines))
    return '\n\n'.join(parts)


def setting(runs: Sequence[dict[str, Any]], records: dict[str, dict[str, Any]]) -> str:
    """Some sentences: budget, teacher, what filling cost, and on what machine."""
    flags = runs[0]['settings']
    words = [f'Top-1 in percent on `{flags["val_split"]}` after {flags["epochs"]} epochs of `{flags["train_split"]}` '
             f'in batches of {flags["batch_size"]}, ± standard deviation over seeds of weights, order and dropout.']
    if 'teacher' in records:
        words.append(f'The teacher has {records["teacher"]["top1"]:.2f}.')
    stores = [record for name, record in records.items() if name.startswith('store-') and not record.get('resumed')]
    if stores:
        views = max(record['store']['views'] for record in stores)
        filled = [record['wall_seconds'] for record in stores if record['store']['views'] == views]
        trained = [record['train_seconds'] for record in runs if record['settings']['epochs'] == flags['epochs']]
        words.append(f'A student sees {views:,} views and trained for {extent(trained)} s; a store of as many took '
                     f'{extent(filled)} s to fill.')
    machines = [record['machine'] for record in records.values()]
    devices = dict.fromkeys(f'{machine["device"]}, {machine["cores"]} cores' for machine in machines)
    versions = dict.fromkeys(f'torch {record["versions"]["torch"]}' for record in records.values())
    loads = [machine['load'] for machine in machines]
    busy = ''
    if any(machine['load'] > machine['cores'] for machine in machines):
        busy = f', with other work on the machine (load {min(loads):.0f} to {max(loads):.0f})'
    words.append(f'{" and ".join(devices)}, {" and ".join(versions)}{busy}.')
    return ' '.join(words)


def extent(values: Sequence[float]) -> str:
    """The smallest and the largest of some values, or the one that there is."""
    return ' to '.join(dict.fromkeys(f'{value:.0f}' for value in (min(values), max(values))))


def digest(records: dict[str, dict[str, Any]]) -> str:
    """What tells these records from all others: the SHA-256 of their values, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def plot(rows: Sequence[Any], records: dict[str, dict[str, Any]]) -> bytes:
    """A PNG: the students plain and distilled, and by how much each change moves TinyViT-5M; a dot is a run.

    Its text chunk `records` is the digest of the records that it shows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib; pip install '.[plots]'")
    found = {row['row']: row for row in summaries(rows, records)}
    distilled = [row for row in found.values() if row['group'] == 'student' and row['against'] in found]
    others = [row for row in found.values() if row['group'] != 'student' and row['differences']]
    figure = Figure(figsize=(11, 4.4), layout='constrained')
    FigureCanvasAgg(figure)
    students, changes = figure.subplots(1, 2, width_ratios=(1, 1.35))
    for place, (label, colour, names) in enumerate((
            ('labels only', 'tab:gray', [row['against'] for row in distilled]),
            ('distilled', 'tab:orange', [row['row'] for row in distilled]))):
        for number, name in enumerate(names):
            values, x = [*found[name]['top1'].values()], number + (place - 0.5) * 0.3
            students.plot([x - 0.1, x + 0.1], [mean(values)] * 2, color=colour, linewidth=2)
            students.plot([x] * len(values), values, 'o', color=colour, alpha=0.7, label=None if number else label)
    students.set_xticks(range(len(distilled)), [row['title'] for row in distilled])
    students.set(xlim=(-0.6, len(distilled) - 0.4), ylabel='top-1 accuracy (%)', title='same views')
    students.legend(loc='upper left')
    for number, row in enumerate(others):
        changes.plot([mean(row['differences'])] * 2, [number - 0.25, number + 0.25], color='tab:orange', linewidth=2)
        changes.plot(row['differences'], [number] * len(row['differences']), 'o', color='tab:orange', alpha=0.7)
    base = [*found.get('tiny_vit_5m-distilled', {'top1': {}})['top1'].values()]
    if len(base) > 1:
        changes.axvspan(-stdev(base), stdev(base), color='tab:blue', alpha=0.12, label='spread of seeds, unchanged')
        changes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.13), frameon=False)
    changes.axvline(0, color='tab:blue', linewidth=1)
    changes.set_yticks(range(len(others)), [row['title'] for row in others])
    changes.invert_yaxis()
    changes.set(xlabel='difference in top-1 (points)', title='TinyViT-5M, one thing changed')
    for axes in (students, changes):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format='png', metadata={'records': digest(records)})
    return buffer.getvalue()
