"Whole folders: killed at every step, on a full disk, over an old one, beside the files of others."

import errno, os
from pathlib import Path

import pytest

from pvtblip.files import whole_folder

NEW, OLD = {'config.json': '{"new": 1}', 'model': 'new'}, {'config.json': '{}', 'model': 'old'}


class Killed(BaseException):
    "Nothing catches it, as nothing catches SIGKILL."


def write(folder, content, last=None):
    with whole_folder(folder, last) as temporary:
        for name, text in content.items():
            (temporary / name).write_text(text)


def content(folder):
    return {file.name: file.read_text() for file in Path(folder).iterdir() if file.is_file()}


def kill_at(monkeypatch, number):
    "The process dies before its `number`-th move; nothing that it would do afterwards is done."
    moves = iter(range(1, 99))
    real = os.replace

    def replace(*paths):
        if next(moves) == number:
            monkeypatch.setattr('shutil.rmtree', lambda *args, **kwargs: None)  # the dead clean nothing up
            raise Killed
        real(*paths)

    monkeypatch.setattr(os, 'replace', replace)


@pytest.mark.parametrize('number', range(1, 4))
def test_a_kill_leaves_the_old_folder_or_the_next_writer_finds_it(tmp_path, monkeypatch, number):
    write(tmp_path / 'state', OLD)
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        try:
            write(tmp_path / 'state', NEW)
            killed = False
        except Killed:
            killed = True
    assert killed == (number < 3)
    if number == 1:
        assert content(tmp_path / 'state') == OLD
    if number == 2:  # between the two names: a writer that fails brings the old one back
        with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / 'state'):
            1 / 0
        assert content(tmp_path / 'state') == OLD
    write(tmp_path / 'state', NEW)
    assert content(tmp_path / 'state') == NEW and os.listdir(tmp_path) == ['state']


@pytest.mark.parametrize('number', range(1, 4))
def test_in_a_folder_of_several_owners_a_kill_leaves_no_mixture(tmp_path, monkeypatch, number):
    folder = tmp_path / 'model'
    write(folder, OLD, 'model')
    (folder / 'log.txt').write_text('of somebody else')
    with monkeypatch.context() as patch:
        kill_at(patch, number)
        try:
            write(folder, NEW, 'model')
        except Killed:
            pass
    found = content(folder)
    assert found.pop('log.txt') == 'of somebody else'
    assert found == NEW if number == 3 else 'model' not in found
    write(folder, NEW, 'model')
    assert content(folder) == NEW | {'log.txt': 'of somebody else'}
    assert {path.name for path in folder.iterdir()} == {*NEW, 'log.txt'}


def test_where_one_file_changes_a_kill_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path / 'model', OLD, 'model')
    for number in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, number)
            write(tmp_path / 'model', OLD | {'model': 'new'}, 'model')
        assert content(tmp_path / 'model') == OLD


@pytest.mark.parametrize('last', [None, 'model'])
def test_a_full_disk_is_said_and_leaves_the_old_folder(tmp_path, monkeypatch, last):
    folder = tmp_path / 'state'
    write(folder, OLD, last)
    with pytest.raises(OSError, match=r'state: cannot be written \(No space left.*\); wait$'):
        with whole_folder(folder, last, remedy='wait') as temporary:
            (temporary / 'config.json').write_text('{')
            raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match=r'state: cannot be written \(.* MB needed, .* MB free\); make room'):
        with whole_folder(folder, last, needed=10**18):
            pytest.fail('work began')
    with monkeypatch.context() as patch:  # the second name cannot be given
        real = os.replace
        names = []

        def replace(old, new):
            names.append(new)
            if len(names) == 2:
                raise OSError(errno.EIO, 'Input/output error')
            real(old, new)

        patch.setattr(os, 'replace', replace)
        if last is None:
            with pytest.raises(OSError, match='Input/output error'):
                write(folder, NEW, last)
    assert content(folder) == OLD and os.listdir(tmp_path) == ['state']
    assert not [path for path in folder.iterdir() if path.name.endswith('.tmp')]


def test_a_link_to_a_folder_is_replaced_and_its_target_stays(tmp_path):
    write(tmp_path / 'far', OLD)
    (tmp_path / 'state').symlink_to(tmp_path / 'far')
    write(tmp_path / 'state', NEW)
    assert content(tmp_path / 'far') == OLD and content(tmp_path / 'state') == NEW
