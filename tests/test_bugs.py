"Every bug's check fails with the bug and passes without it, and a bug is gone when its block ends."

import json
import math

import pytest
import torch
from PIL import Image

from house import ROOT
from pvtblip import bugs
from pvtblip.bugs import (
    NOT_MEASURED,
    SIX,
    SPECIMENS,
    TABLE,
    ablation_table,
    bug,
    fails,
    interval,
    look,
    photos_table,
    rows_of,
    specimen,
    unseen,
    used,
)
from pvtblip.pipeline import caption_many


@pytest.mark.parametrize('name', SPECIMENS)
def test_the_check_fails_with_the_bug_and_passes_without(taught, name):
    model, _ = taught
    with bug(name):
        assert fails(name, model)
    assert fails(name, model) == ''


@pytest.mark.parametrize('name', SPECIMENS)
def test_a_bug_is_gone_when_its_block_ends_in_an_error(name):
    before = [owner.__dict__.get(attribute) for owner, attribute, _ in SPECIMENS[name].overrides]
    with pytest.raises(KeyError), bug(name):
        now = [owner.__dict__.get(attribute) for owner, attribute, _ in SPECIMENS[name].overrides]
        assert all(one is not other for one, other in zip(before, now))
        raise KeyError(name)
    after = [owner.__dict__.get(attribute) for owner, attribute, _ in SPECIMENS[name].overrides]
    assert all(one is other for one, other in zip(before, after))


def test_the_six_together_each_fail_their_check(taught):
    model, _ = taught
    with bug(*SIX):
        assert all(fails(name, model) for name in SIX if name != 'rebuilt_vocabulary')


def test_an_unknown_name_is_named_and_nothing_is_changed():
    with pytest.raises(ValueError, match="no bug is called 'pixels'"), bug('prompt_mismatch', 'pixels'):
        pass
    with pytest.raises(ValueError, match='there are'):
        specimen('')


def test_every_lesson_is_a_notebook_and_every_text_is_there():
    for one in SPECIMENS.values():
        assert (ROOT / f'nbs/{one.lesson}.ipynb').is_file()
        assert all((one.symptom, one.cause, one.fix)) and one.when in ('training', 'use')


def test_what_the_famous_bugs_do_to_captions(taught):
    model, _ = taught
    scenes = unseen(40)
    sound = look(model, scenes)
    assert sound['gap'] > 0.2
    with bug('pixels_twice'):
        dark = look(model, scenes)
    assert dark['distinct'] == 1 / 40 and abs(dark['gap']) < 0.02
    with bug('prompt_mismatch'):
        other = look(model, scenes)
    assert (other['loss'], other['gap']) == (sound['loss'], sound['gap']) and other['says'] != sound['says']
    with bug('rebuilt_vocabulary'):
        salad = look(used(model), scenes)
    assert salad['true'] == 0 and salad['loss'] == math.inf


def test_pixels_are_divided_twice_wherever_photos_are_read(taught):
    model, _ = taught
    photo = Image.new('RGB', (32, 32), 'white')
    for _ in range(2):  # with the bug, and without it again
        with bug('pixels_twice'):
            load, normalise = model.pixel_reader()
            alone = model.photo_transform()(photo)
        torch.testing.assert_close(normalise(load(photo)), alone)
        assert (alone < model.photo_transform()(photo) - 1).all()
    load, normalise = model.pixel_reader()
    torch.testing.assert_close(normalise(load(photo)), model.photo_transform()(photo))


def test_a_bug_of_use_reaches_the_command_too(taught, tmp_path):
    model, _ = taught
    scenes = unseen(12)
    for i, photo in enumerate(bugs.photos(scenes)):
        photo.save(tmp_path / f'{i:02}.png')
    model.save_pretrained(tmp_path / 'model')

    def captions(*names):
        "As a program says them, and as `pvtblip caption --jsonl` writes them."
        with bug(*names):
            torch.manual_seed(0)  # two of them draw
            said = bugs.say(used(model), scenes)
            file = tmp_path / f'{"".join(names)}.jsonl'
            torch.manual_seed(0)
            caption_many([tmp_path], tmp_path / 'model', file, progress=False, log=lambda line: None)
        return said, [json.loads(line)['caption'] for line in file.read_text(encoding='utf-8').splitlines()]

    # the last reads the answers of drawn scenes, which photos have not
    names = {name for name, one in SPECIMENS.items() if one.when == 'use'} - {'teacher_forced_scores'}
    for name in [None, *sorted(names - set(NOT_MEASURED))]:
        said, written = captions(*filter(None, [name]))
        # images repeated for their beams give a caption for each beam; the command writes one a photo
        assert len(written) == 12 and said[:12] == written, name


def test_a_sound_captioner_is_the_same_inside_and_after_a_bug_of_devices(taught):
    model, _ = taught
    scenes = unseen(8)
    before = bugs.say(model, scenes)
    with bug('mixed_devices'):
        assert bugs.say(model, scenes) == before
    assert bugs.say(model, scenes) == before


def test_intervals_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / math.sqrt(3))
    assert interval([5.0]) == (5.0, None)


def test_the_table_of_costs_by_hand():
    kinds = dict(kind=0.5, colour=1.0, size=0.5)
    one = lambda cider, loss=1.0: dict(
        loss=loss, gap=0.5, true=0.6, by_kind=kinds, distinct=0.3, says=[], cider=cider
    )
    results = {
        'none|0': one(2.0),
        'none|1': one(1.0),
        'pixels_twice|0': one(0.5, 'inf'),
        'pixels_twice|1': one(0.75, 'inf'),
        'mixed_devices|0': one(2.0),
        'mixed_devices|1': one(1.0),
        'fresh_head|1': one(0.5, 'nan'),
        'shifted_twice|2': one(0.5),
    }
    table = ablation_table(results)
    assert '| none | 2 | 1.00 | 0.50 | 0.60 ± 0.00 | 0.50 / 1.00 / 0.50 | 0.30 | 1.50 ± 6.3' in table
    assert '| `pixels_twice` | 2 | infinite |' in table and '| 0.50 ± 3.18, not told from 0 |' in table
    assert '| `mixed_devices` | 2 | 1.00 |' in table and '| nothing at all |' in table
    assert '| `fresh_head` | 1 | no number |' in table and '| 0.50 | 0.50, one seed |' in table
    alone = next(line for line in table.splitlines() if 'shifted_twice' in line)
    assert alone.endswith('| 0.50 |  |')  # nothing to compare it with
    assert set(rows_of(results, ('pixels_twice',))) == {'0', '1'}


def test_every_bug_has_a_row_or_a_reason():
    measured = {names[0] for names in TABLE if len(names) == 1}
    assert measured | set(NOT_MEASURED) == set(SPECIMENS) and not measured & set(NOT_MEASURED)


def test_the_stored_table_is_whole():
    stored = json.loads((ROOT / 'benchmarks/bugs.json').read_text(encoding='utf-8'))
    assert stored['settings']['steps'] == 300
    for names in TABLE:
        assert len(rows_of(stored['results'], names)) == 3, names


def test_the_stored_table_of_photos_has_the_six_that_one_device_shows():
    stored = json.loads((ROOT / 'benchmarks/bugs_photos.json').read_text(encoding='utf-8'))['results']
    assert set(stored) == {'none', *SIX, 'all six'} - {'mixed_devices'}
    low, high = stored['none']['interval']
    assert low < stored['none']['CIDEr'] < high
    # what the chapter says of the six together
    assert min(stored, key=lambda title: stored[title]['loss']) == 'all six'
    assert stored['all six']['CIDEr'] == 0
    assert photos_table(stored | {'x': dict(refused='no')}).endswith('| `x` | refused: no | | | | |')


def test_random_numbers_of_the_caller_are_not_what_makes_a_bug(taught):
    model, _ = taught
    for seed in (0, 1):
        torch.manual_seed(seed)
        with bug('beams_that_sample'):
            assert fails('beams_that_sample', model)
