"""Every known bug has a test: the table at the end of pytest's output names them."""

import ast
from pathlib import Path

import pytest
from conftest import KNOWN_BUGS


def guarded(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.known_bug"):
            yield from (argument.value for argument in node.args)


@pytest.fixture(scope="module")
def numbers():
    return {number for path in Path(__file__).parent.glob("test_*.py") for number in guarded(path)}


def test_every_known_bug_has_a_test(numbers):
    assert set(KNOWN_BUGS) - numbers == set()


def test_every_marked_test_names_a_known_bug(numbers):
    assert numbers <= set(KNOWN_BUGS)
