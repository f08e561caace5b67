"""What `pip install .` installs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import fresh_programs
from support.flags import ROOT


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    built = subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', str(folder), str(ROOT)],
        capture_output=True, text=True)
    if built.returncode and 'No matching distribution found for setuptools' in built.stderr:
        pytest.skip('the wheel needs setuptools from a package registry, and none is reached')
    assert built.returncode == 0, built.stderr
    return next(folder.glob('*.whl'))


def test_the_wheel_holds_the_package_its_recipes_and_the_programs(wheel):
    files = zipfile.ZipFile(wheel)
    names = set(files.namelist())
    assert {'train_distill.py', 'timm_tinyvit/data/probe.jpg', 'timm_tinyvit/config/recipes/demo.yaml'} <= names
    scripts, = (name for name in names if name.endswith('entry_points.txt'))
    assert b'timm-tinyvit = timm_tinyvit.cli:main' in files.read(scripts)
    modules = {f'timm_tinyvit/{file.name}' for file in (ROOT / 'timm_tinyvit').glob('*.py')}
    assert modules <= names
    assert not [name for name in names if name.startswith(('tests/', 'examples/', 'benchmarks/'))]


def test_the_installed_wheel_works_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / 'site'
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', site, wheel]
    subprocess.run(install, check=True)
    code = 'import timm, timm_tinyvit; timm.create_model("tiny_vit_5m_224"); print(timm_tinyvit.__file__)'
    environment = os.environ | {'PYTHONPATH': str(site)}
    program = [site / 'bin' / 'timm-tinyvit', 'train', '--config', 'demo', '--help']
    for command in ([sys.executable, '-c', code], program):
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert said.returncode == 0 and (str(site) in said.stdout or '--logits' in said.stdout), said.stderr
    assert (site / 'timm_tinyvit' / 'py.typed').is_file()


def test_the_training_script_runs_as_a_module_from_the_wheel_alone(wheel, hub_children, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    said = hub_children.run(fresh_programs.help_from, os.environ, tmp_path / 'site', folder=tmp_path)
    assert '--logits' in said.stdout
