"""run.json: what it keeps of the launches of a run."""

import json

from timm_tinyvit.train.record import RUN_RECORD, launches_of


def test_a_launch_is_recorded_where_its_surroundings_are_others(tmp_path):
    """And forgotten by one that goes on from before it."""

    def launch(epoch, threads, commit='aaaa'):
        launches = launches_of(tmp_path, epoch, {'commit': commit, 'environment': {'threads per process': threads}})
        (tmp_path / RUN_RECORD).write_text(json.dumps({'launches': launches}))
        return [(launch['epoch'], launch['commit'], *launch['environment'].values()) for launch in launches]

    assert [launch(0, 1), launch(2, 1)] == [[(0, 'aaaa', 1)]] * 2
    assert [launch(5, 2), launch(5, 2)] == [[(0, 'aaaa', 1), (5, 'aaaa', 2)]] * 2
    assert launch(4, 1) == [(0, 'aaaa', 1)]
    assert launch(4, 1, 'bbbb') == [(0, 'aaaa', 1), (4, 'bbbb', 1)]


def test_a_damaged_record_costs_the_launches_before(tmp_path):
    for damaged in ('{', '{"launches": 3}', '{"launches": [{"epoch": "x"}]}', '[]'):
        (tmp_path / RUN_RECORD).write_text(damaged)
        assert launches_of(tmp_path, 1, {'commit': None}) == [{'epoch': 1, 'commit': None}]
