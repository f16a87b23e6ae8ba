"""Claims about ``import opsin``: it is quick, and its names are those of the wings."""

import importlib
import subprocess
import sys

import pytest

import opsin


@pytest.mark.parametrize("name", opsin.__all__)
def test_a_name_of_the_package_is_the_one_of_its_wing(name):
    assert getattr(opsin, name) is getattr(importlib.import_module(opsin.LAZY_NAMES[name]), name)


def test_the_list_of_names_is_complete_and_an_unknown_name_is_an_attribute_error():
    assert set(opsin.__all__) == set(opsin.LAZY_NAMES) <= set(dir(opsin))
    with pytest.raises(AttributeError, match="levitate"):
        _ = opsin.levitate


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, opsin; print([name for name in ('torch', 'lightning', 'wandb') if name in sys.modules])"
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert made.stdout.strip() == "[]"
