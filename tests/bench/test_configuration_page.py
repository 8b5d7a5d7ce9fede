"""The page of the configuration is written from the configuration's sections."""

from __future__ import annotations

import configuration


def test_the_page_of_the_configuration_has_every_key() -> None:
    text = configuration.PAGE.read_text()
    assert configuration.page(text) == text
