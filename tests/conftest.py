"Options that all tests share: `pytest --slow` also runs the tests marked slow."

import os, subprocess, sys

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import matplotlib.pyplot as plt
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')
    parser.addoption(
        '--metrics',
        metavar='FOLDER',
        help="folder with coco_vectors.json and coco_demo.json: scores that the COCO server's code gave",
    )


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes longer than a few seconds; runs with --slow')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'):
        return
    for item in items:
        if 'slow' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    "What a test draws is closed after it: the next one may count the figures that are open."
    yield
    plt.close('all')


@pytest.fixture(scope='session')
def clip(tmp_path_factory):
    "A CLIP of a few thousand random weights, as transformers saves it."
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp('clip')
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = {
        piece: i
        for i, piece in enumerate(
            [*letters, *(f'{letter}</w>' for letter in letters), '<|startoftext|>', '<|endoftext|>']
        )
    }
    config = CLIPConfig(
        text_config=dict(
            small,
            vocab_size=len(vocabulary),
            max_position_embeddings=77,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=len(vocabulary) - 1,
        ),
        vision_config=dict(small, image_size=32, patch_size=16),
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    CLIPProcessor(
        CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)), tokenizer
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def one_seed():
    "The same random numbers in every test, on one thread."
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def run_in_two(tmp_path):
    """A function that runs a script in two processes that share the work; its arguments are the folder of the
    tests and the test's own.
    """

    def run(text, timeout):
        script = tmp_path / 'script.py'
        script.write_text(text)
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            script,
            os.path.dirname(__file__),
            tmp_path,
        ]
        done = subprocess.run(
            command,
            timeout=timeout,
            capture_output=True,
            text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope='session')
def taught(tmp_path_factory):
    "A small captioner that has learnt for half a minute, and the language model that it began from."
    from pvtblip.bugs import language_model, small_captioner, teach

    words = language_model(tmp_path_factory.mktemp('words'), 60)
    model = small_captioner(language_model=words)
    teach(model, 240)
    return model, words
