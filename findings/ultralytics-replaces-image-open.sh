#!/bin/sh
# ultralytics: importing it replaces Pillow's `Image.open`, for every other user of it, too.
#
# Versions: ultralytics 8.4.190, pillow 13.0.0, torch 2.14.1, torchvision 0.29.1, Python 3.11.
# Guess:    importing a detector's package changes nothing in Pillow: a file that is no image raises
#           PIL.UnidentifiedImageError, which is what programs catch to skip it.
# Seen:     after `import ultralytics.data`, `Image.open` is a function of ultralytics. For a file that
#           nothing identifies it imports `pi_heif`, and a program that catches UnidentifiedImageError
#           ends in ModuleNotFoundError. (Without YOLO_AUTOINSTALL=False it first tries to install
#           the package.)
# Output:   before: PIL.Image, UnidentifiedImageError
#           after: ultralytics.utils.patches, ModuleNotFoundError
#
# Run: sh findings/ultralytics-replaces-image-open.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    torch==2.14.1 torchvision==0.29.1 ultralytics==8.4.190 pillow==13.0.0
cat >"$folder/run.py" <<'PYTHON'
import sys

from PIL import Image


def seen() -> str:
    try:
        Image.open(sys.argv[1])
    except Exception as error:
        return f"{Image.open.__module__}, {type(error).__name__}"
    return "opened"


print("before:", seen())
import ultralytics.data  # noqa: E402

print("after:", seen())
PYTHON
echo "no image" >"$folder/a.png"
export YOLO_AUTOINSTALL=False YOLO_CONFIG_DIR="$folder"
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder/a.png" 2>"$folder/log" |
    grep -E "^(before|after):" >"$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
before: PIL.Image, UnidentifiedImageError
after: ultralytics.utils.patches, ModuleNotFoundError
EXPECTED
