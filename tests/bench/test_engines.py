from __future__ import annotations

from engines import ENGINES, PAGE, RESULTS, engine_table
from rows import Row, read_rows
from tables import with_table


def test_an_engine_pays_from_the_images_whose_saving_is_its_cost() -> None:
    seconds = dict(zip(ENGINES, ([0.02], [0.010, 0.010, 0.5], [0.012], [0.005]), strict=True))
    row: Row = {
        "network": "resnet50",
        "outcome": "ok",
        "seconds_an_image": seconds,
        "seconds_to_make": dict(zip(ENGINES, (0.0, 0.0, 60.0, 10.0), strict=True)),
        "differences": dict.fromkeys(ENGINES, 1e-6),
    }
    failed = {"network": "vgg16_bn", "outcome": "failed", "reason": "It broke"}
    table = engine_table([row, failed])
    assert "| resnet50 | secateur's passes | 10.0 |  |  | 1e-06 |" in table
    assert "| resnet50 | inductor, frozen | 12.0 | 60.0 | never | 1e-06 |" in table
    assert "| resnet50 | onnxruntime | 5.0 | 10.0 | 2,000 images | 1e-06 |" in table
    assert "| vgg16_bn | failed: It broke |" in table


def test_the_page_shows_the_result_file() -> None:
    text = PAGE.read_text()
    assert with_table(text, "engines", engine_table(read_rows(RESULTS))) == text
