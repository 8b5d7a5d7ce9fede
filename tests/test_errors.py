from __future__ import annotations

import re

import pytest

from secateur.runtime import errors
from secateur.runtime.errors import SecateurError, UnknownName, UsageError


def test_every_error_is_one_of_ours_and_drawn_in_the_tree() -> None:
    error_classes = [value for value in vars(errors).values() if isinstance(value, type)]
    classes = [one for one in error_classes if one.__module__ == errors.__name__]
    assert all(issubclass(one, SecateurError) for one in classes)
    assert errors.__doc__ is not None
    drawn = re.findall(r"^[│├└─ ]*([A-Z]\w+)  ", errors.__doc__, re.MULTILINE)
    assert sorted(drawn) == sorted(one.__name__ for one in classes)


def test_the_tree_shows_who_inherits_from_whom() -> None:
    assert errors.__doc__ is not None
    parents: list[str] = []
    for line in errors.__doc__.splitlines():
        entry = re.match(r"^([│├└─ ]*)([A-Z]\w+)  ", line)
        if entry is None:
            continue
        depth = len(entry[1]) // 4 - 1  # the drawing is indented once
        parents[depth:] = [entry[2]]
        if depth:
            assert getattr(errors, entry[2]).__base__ is getattr(errors, parents[depth - 1])


def test_an_unknown_name_is_a_wrong_request() -> None:
    with pytest.raises(UsageError, match="unknown fruit 'aple': did you mean apple"):
        raise UnknownName("fruit", "aple", ["pear", "apple"])


def test_an_unknown_name_far_from_all_lists_them_in_order() -> None:
    message = str(UnknownName("fruit", "zzz", iter(["pear", "apple"])))
    assert message == "unknown fruit 'zzz': known: apple, pear"


def test_several_near_names_are_joined_by_or() -> None:
    message = str(UnknownName("model", "resnet2", ["resnet20", "resnet32", "vgg16_bn"]))
    assert "did you mean resnet" in message
    assert " or " in message
    assert "vgg" not in message
