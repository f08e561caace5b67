"""The example that fills a store on a Ray cluster, here of two nodes."""

import os
import re
import subprocess
import sys

import pytest

from support.files import tree
from support.flags import ROOT, SMALL_VIEWS, small_data

cluster_utils = pytest.importorskip('ray.cluster_utils')


@pytest.mark.launches
def test_two_nodes_of_a_ray_cluster_fill_one_store(filled_store, teacher, tmp_path, monkeypatch):
    for name, value in dict(PYTHONPATH=str(ROOT), RAY_DEDUP_LOGS='0', RAY_USAGE_STATS_ENABLED='0').items():
        monkeypatch.setenv(name, value)
    cluster = cluster_utils.Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
        ended = subprocess.run(
            [sys.executable, ROOT / 'examples' / 'fill_with_ray.py', *small_data(120), *SMALL_VIEWS,
             '--teacher', teacher, '--logits', tmp_path / 'logits', '--epochs', '4', '--topk', '3',
             '--shard-size', '20'],
            capture_output=True, text=True, timeout=900, env={**os.environ, 'RAY_ADDRESS': cluster.address})
    finally:
        cluster.shutdown()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(set(re.findall(r'pid=(\d+)', ended.stdout))) == 2, ended.stdout
    assert tree(tmp_path / 'logits', hidden=False) == tree(filled_store, hidden=False)
