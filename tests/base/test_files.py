"""Temporary files: beside what they become, and gone with their writers."""

import os
import subprocess
import tempfile

import pytest
import timm

from support.files import tree
from timm_tinyvit.base.files import remove_leftovers, temporary_beside, write_atomic
from timm_tinyvit.base.machine import machine_name
from timm_tinyvit.models.saving import export_model


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    ended = subprocess.Popen(['true'])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize('kind', ['file', 'folder', 'link', 'ending'])
def test_whatever_a_dead_writer_left_goes_and_what_it_leads_to_stays(kind, dead, tmp_path):
    folder, elsewhere = tmp_path / 'folder', tmp_path / 'elsewhere'
    folder.mkdir()
    write_atomic(elsewhere / 'precious', b'precious')
    left = folder / f'.model.{machine_name()}.{dead}.tmp{".pt2" if kind == "ending" else ""}'
    if kind == 'folder':
        write_atomic(left / 'part', b'half')
    elif kind == 'link':
        left.symlink_to(elsewhere)
    else:
        left.write_bytes(b'half')
    remove_leftovers(folder)
    assert tree(tmp_path) == {'elsewhere': None, 'elsewhere/precious': b'precious', 'folder': None}


def test_temporary_files_of_others_and_of_other_names_stay(dead, tmp_path):
    kept = ['.notes.tmp', '.vim.swp.tmp', f'.x.{machine_name()}.{os.getpid()}.tmp', '.a.1.tmp', '.b.elsewhere.2.tmp']
    for name in kept:
        (tmp_path / name).write_bytes(b'')
    for name in kept[:2]:
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f'.other.{machine_name()}.{dead}.tmp').write_bytes(b'')
    (tmp_path / f'.model.{machine_name()}.{dead}.tmp').write_bytes(b'')
    remove_leftovers(tmp_path, 'model')
    assert set(tree(tmp_path)) == {*kept, f'.other.{machine_name()}.{dead}.tmp'}
    remove_leftovers(tmp_path)
    assert set(tree(tmp_path)) == set(kept)


def test_a_temporary_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / 'precious').write_bytes(b'precious')
    with temporary_beside(tmp_path / 'file') as temporary:
        pass
    temporary.symlink_to(tmp_path / 'precious')
    write_atomic(tmp_path / 'file', b'new')
    assert tree(tmp_path) == {'precious': b'precious', 'file': b'new'}


def test_a_model_is_written_where_the_folder_for_temporary_files_takes_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'full'))
    with pytest.raises(OSError):
        tempfile.mkstemp()
    export_model(tmp_path / 'model', timm.create_model('test_resnet', num_classes=10))
    assert set(tree(tmp_path)) == {'model', 'model/config.json', 'model/model.safetensors'}
