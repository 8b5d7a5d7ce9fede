#!/bin/sh
# OpenCV: its ONNX reader takes every product with a HardSigmoid for a HardSwish.
#
# Versions: opencv-python-headless 5.0.0.93, onnx 1.23.2, onnxruntime 1.32.0, Python 3.11, CPU.
# Guess:    `HardSigmoid(a) * b` is fused to `HardSwish(a)` where `a` and `b` are the same tensor.
# Seen:     it is fused whatever `b` is, and `b` is dropped, without a warning. The gate of a
#           squeeze-and-excitation block, `x * HardSigmoid(conv(mean(x)))`, even gets the shape of
#           `mean(x)`. So every MobileNetV3 answers nonsense.
# Output:   HardSigmoid(x): right
#           x * HardSigmoid(x): right
#           x * HardSigmoid(conv(x)): that of HardSwish(conv(x))
#           x * HardSigmoid(mean(x)): shape (1, 4, 1, 1) in place of (1, 4, 6, 6)
#
# Run: sh findings/opencv-hard-sigmoid-gate.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    opencv-python-headless==5.0.0.93 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cat >"$folder/run.py" <<'PYTHON'
import sys

import cv2
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

generator = np.random.default_rng(0)
x = generator.standard_normal((1, 4, 6, 6)).astype(np.float32)
kernel = generator.standard_normal((4, 4, 1, 1)).astype(np.float32)
hard_sigmoid = {"alpha": 1 / 6, "beta": 0.5}
conv = np.einsum("oi,nihw->nohw", kernel[:, :, 0, 0], x)
hard_swish = conv * np.clip(conv / 6 + 0.5, 0, 1)


def case(title, *nodes):
    shape = list(x.shape)
    graph = helper.make_graph(
        [helper.make_node(name, inputs, [output], **attributes)
         for name, inputs, output, attributes in nodes],
        "gate",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    path = f"{sys.argv[1]}/model.onnx"
    with open(path, "wb") as file:
        file.write(content)
    network = cv2.dnn.readNetFromONNX(path)
    network.setInput(x)
    seen = network.forward()
    if seen.shape != expected.shape:
        verdict = f"shape {seen.shape} in place of {expected.shape}"
    elif np.allclose(seen, expected, atol=1e-5):
        verdict = "right"
    elif np.allclose(seen, hard_swish, atol=1e-5):
        verdict = "that of HardSwish(conv(x))"
    else:
        verdict = "wrong"
    print(f"{title}: {verdict}")


product = ("Mul", ["x", "gate"], "y", {})
case("HardSigmoid(x)", ("HardSigmoid", ["x"], "y", hard_sigmoid))
case("x * HardSigmoid(x)", ("HardSigmoid", ["x"], "gate", hard_sigmoid), product)
case(
    "x * HardSigmoid(conv(x))",
    ("Conv", ["x", "kernel"], "c", {}),
    ("HardSigmoid", ["c"], "gate", hard_sigmoid),
    product,
)
case(
    "x * HardSigmoid(mean(x))",
    ("GlobalAveragePool", ["x"], "mean", {}),
    ("HardSigmoid", ["mean"], "gate", hard_sigmoid),
    product,
)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder" >"$folder/seen" 2>"$folder/log"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
HardSigmoid(x): right
x * HardSigmoid(x): right
x * HardSigmoid(conv(x)): that of HardSwish(conv(x))
x * HardSigmoid(mean(x)): shape (1, 4, 1, 1) in place of (1, 4, 6, 6)
EXPECTED
