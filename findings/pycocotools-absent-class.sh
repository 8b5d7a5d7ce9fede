#!/bin/sh
# pycocotools: a class without annotations has AP -1, and wrong boxes of that class cost nothing.
#
# Versions: pycocotools 2.0.11, numpy 2.4.6, Python 3.11.
# Guess:    a box of a class that no image shows is a false positive, so the mean AP falls when a
#           detector returns such boxes.
# Seen:     the AP of the class is -1, and `summarize` takes the mean over values above -1 alone: the
#           mean AP is 1.000 with a hundred wrong boxes, as without any. A mean of the per-class values
#           that leaves -1 in is too small.
# Output:   no wrong boxes: mean AP 1.000, cat 1.000, dog -1.000
#           100 wrong boxes of dogs: mean AP 1.000, cat 1.000, dog -1.000
#
# Run: sh findings/pycocotools-absent-class.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pycocotools==2.0.11 numpy==2.4.6
cat >"$folder/run.py" <<'PYTHON'
import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

box = {"bbox": [10, 10, 20, 20], "image_id": 1}
truth = COCO()
truth.dataset = {
    "info": {},
    "images": [{"id": 1, "height": 50, "width": 50}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [{"id": 1, "category_id": 1, "area": 400, "iscrowd": 0, **box}],
}
for title, count in (("no wrong boxes", 0), ("100 wrong boxes of dogs", 100)):
    boxes = [{"category_id": 1, "score": 0.9, **box}]
    boxes += count * [{"category_id": 2, "score": 0.9, **box}]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(boxes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    cat, dog = evaluation.eval["precision"][:, :, :, 0, 2].mean((0, 1))
    print(f"{title}: mean AP {evaluation.stats[0]:.3f}, cat {cat:.3f}, dog {dog:.3f}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" >"$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
no wrong boxes: mean AP 1.000, cat 1.000, dog -1.000
100 wrong boxes of dogs: mean AP 1.000, cat 1.000, dog -1.000
EXPECTED
