"""Configuration: one typed value, saved and read back, with errors that name the key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from secateur.config import RunConfig, Section, from_dict, read_config, to_toml
from secateur.runtime.errors import TargetError, UnknownName, UsageError

SMALLEST: dict[str, object] = {"model": {"name": "resnet20"}, "data": {"source": "digits"}}


def test_toml_round_trip() -> None:
    config = from_dict({**SMALLEST, "plan": {"target": "params=0.25"}, "seed": 4}, RunConfig)
    assert from_dict(tomllib.loads(to_toml(config)), RunConfig) == config


def test_every_field_has_a_docstring() -> None:
    sections: list[type[Section]] = [RunConfig, *Section.__subclasses__()]
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and not _is_section(field.annotation)
    ]
    assert undocumented == []


def _is_section(annotation: object) -> bool:
    """Whether a field is a table, which is described where its keys are."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model": {"nam": "resnet20"}}, "model.name"),
        ({"data": {"source": "digits", "calibration_images": 0}}, "data.calibration_images"),
        ({"finetune": {"label_weight": 1.5}}, "finetune.label_weight"),
        ({"finetune": {"precision": "float8"}}, "finetune.precision"),
        ({"refit": {"layers": "all"}}, "refit.layers"),
        ({"refit": {"form": "both"}}, "refit.form"),
        ({"refit": {"memory_mib": 0}}, "refit.memory_mib"),
        ({"distill": {"batch_size": 1}}, "distill.batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_errors_name_the_key(change: dict[str, object], key: str) -> None:
    with pytest.raises(UsageError, match=f"configuration, {key}: "):
        from_dict({**SMALLEST, **change}, RunConfig)


@pytest.mark.parametrize(
    ("change", "near"),
    [({"modle": {}}, "model.task or model.name"), ({"plan": {"roundto": 8}}, "plan.round_to")],
)
def test_errors_name_the_key_that_was_meant(change: dict[str, object], near: str) -> None:
    with pytest.raises(UnknownName, match=f"did you mean {near}"):
        from_dict({**SMALLEST, **change}, RunConfig)


def test_target_is_checked_at_once() -> None:
    with pytest.raises(TargetError, match="out of range"):
        from_dict({**SMALLEST, "plan": {"target": "macs=7"}}, RunConfig)


def test_files_that_are_not_toml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("seed = = 3")
    with pytest.raises(UsageError, match=r"a\.toml is not TOML"):
        read_config(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read"):
        read_config(tmp_path / "b.toml")


def test_values_can_not_be_changed() -> None:
    config = from_dict(SMALLEST, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
