"""What a run of `timm-tinyvit train` leaves in its folder, read back: metrics, settings, environment, predictions.

Whatever is missing or damaged beside the metrics costs its part of a report, not the report. What is shown of settings
names no user: home folders become `~`, and tokens are left out.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.escaping import shown, without_user
from ..train.metrics import rank_of, read_metrics, suffixed
from ..train.predictions import Evaluation
from ..train.record import RECORD, RUN_RECORD, read_run
from ..train.teacher_comparison import STORED_FEATURES, STORED_VIEWS, StoredFeatures, StoredViews

__all__ = ['WEIGHTS', 'TrainedRun', 'metric']

# What a training loss is measured by, beside the data.
MIXING = ('mixup', 'cutmix', 'cutmix_minmax')
# Each set of weights, and words for it that stand behind a name.
WEIGHTS = {'student': '', 'ema': ' (averaged weights)'}


@dataclass(frozen=True)
class TrainedRun:
    """A run, finished or not.

    Attributes:
        folder: Its folder.
        rows: Its metrics by epoch; what an epoch lacks is not in its row.
        settings: All flags, and what the store decided; empty where they are not known.
        launches: Epoch, commit and environment of each launch of the run; empty where they are not known.
        changed: The flags that are not the defaults; None where they are not known.
        evaluations: The last predictions of each set of weights, see `WEIGHTS`.
        stored_views: The student's predictions beside its teacher's, where it learned any.
        stored_features: The same of features.
        problems: A sentence for each file that cannot be read.
    """
    folder: Path
    rows: list[dict[str, float]]
    settings: dict[str, Any]
    launches: list[dict[str, Any]]
    changed: list[str] | None
    evaluations: dict[str, Evaluation]
    stored_views: StoredViews | None
    stored_features: StoredFeatures | None = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: str | Path) -> 'TrainedRun':
        """Read the folder of a run.

        Raises:
            InputError: There are no metrics in it, or none that can be read.
        """
        folder = Path(folder).expanduser()
        problems: list[str] = []

        def read(name: str, reader: Any) -> Any:
            if not (folder / name).is_file():
                return None
            try:
                return reader(folder / name)
            except InputError as error:
                problems.append(str(error).replace(f'{folder}/', ''))

        evaluations = {
            weights: read(f'{suffixed("predictions", weights)}.npz', Evaluation.read) for weights in WEIGHTS}
        record = read(RUN_RECORD, lambda file: read_run(file.parent)) or {}
        # Flags that a report relies on stay as they were checked.
        decided = {
            name: value for name, value in record.get('decided', {}).items() if f'{name}?' not in RECORD['flags']}
        settings = {name: value for name, value in (record.get('flags', {}) | decided).items() if value is not None}
        return cls(
            folder, read_metrics(folder), settings, record.get('launches', []), record.get('changed'),
            {weights: evaluation for weights, evaluation in evaluations.items() if evaluation is not None},
            read(STORED_VIEWS, StoredViews.read), read(STORED_FEATURES, StoredFeatures.read), problems)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.resolve().name

    @property
    def num_epochs(self) -> int:
        """Epochs that it is meant to have; those that it has where that is not known."""
        return self.settings.get('epochs', len(self.rows)) + self.settings.get('cooldown_epochs', 0)

    def column(self, name: str) -> list[tuple[int, float]]:
        """(epoch from 1, value) of a metric, where it has a finite value."""
        return metric(self.rows, name)

    def best(self, weights: str) -> tuple[int, float] | None:
        """The epoch, from 1, that the run calls its best, see `rank_of`, and its top-1; None without an evaluation."""
        name = suffixed('eval_top1', weights)
        evaluated = [row for row in self.rows if name in row]
        best = max(evaluated, key=lambda row: rank_of(row, weights), default=None)
        return best and (round(best['epoch']) + 1, best[name])

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        return self.column(name)[-1][1] if self.column(name) else None

    @cached_property
    def weights(self) -> str:
        """The weights whose accuracy counts: the average, where it ended higher than the student's own."""
        last = {weights: self.last(suffixed('eval_top1', weights)) for weights in WEIGHTS}
        return max(WEIGHTS, key=lambda weights: -1. if last[weights] is None else last[weights])

    @property
    def label(self) -> str:
        """Which weights those are, as words that stand behind a name; none for the student's own."""
        return WEIGHTS[self.weights]

    @property
    def evaluation(self) -> Evaluation | None:
        """Their predictions."""
        return self.evaluations.get(self.weights)

    @property
    def has_top5(self) -> bool:
        """Whether top-5 says something: of up to five classes it is always 100%."""
        return all(evaluation.num_classes > 5 for evaluation in self.evaluations.values())

    def loss_settings(self) -> dict[str, Any]:
        """The settings that say what its training loss is: losses of others are not the same quantity."""
        names = ['smoothing', *MIXING]
        if self.settings.get('logits'):
            names += ['alpha', 'temperature']
        if any(self.settings.get(name) for name in MIXING):
            names += ['mixup_mode', 'mixup_prob', 'mixup_switch_prob']
        # The same store may lie in two folders.
        return {'logits': self.settings.get('store_hash') or self.settings.get('logits')} | {
            name: self.settings.get(name) or None for name in names}

    def shown_settings(self) -> tuple[dict[str, str], dict[str, str]]:
        """Settings as they may be shown, folders by their names: those that are not the defaults, and the others."""
        texts = {name: shown(value) for name, value in self.settings.items()}
        changed = {'dataset', 'model', *(texts if self.changed is None else self.changed)}
        return ({name: text for name, text in texts.items() if name in changed},
                {name: text for name, text in texts.items() if name not in changed})

    def evaluation_command(self) -> str:
        """The command that evaluates its best weights again."""
        flags = ['dataset', 'val_dataset', 'val_split', 'input_key', 'target_key', 'model', 'model_kwargs', 'amp_dtype']
        words = ['timm-tinyvit', 'eval', str(self.folder / suffixed('best', self.weights))]
        for name in flags:
            value = self.settings.get(name)
            if value:
                words += [f'--{name.replace("_", "-")}']
                words += [f'{key}={item}' for key, item in value.items()] if isinstance(value, dict) else [str(value)]
        return ' '.join(map(_quoted, map(without_user, words)))


def metric(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """(epoch from 1, value) of a metric, where it has a finite value, by the rows of `read_metrics`."""
    return [(round(row['epoch']) + 1, row[name]) for row in rows if name in row and math.isfinite(row[name])]


def _quoted(word: str) -> str:
    """A word for a shell, which is to see `~` and `$USER`."""
    return word if re.fullmatch(r'[\w@%+=:,./~$-]+', word) else shlex.quote(word)
