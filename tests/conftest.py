"Options that all tests share: `pytest --slow` also runs the tests marked slow."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--metrics", metavar="FOLDER", help="folder with coco_vectors.json and coco_demo.json: scores that the COCO server's code gave")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than a few seconds; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
