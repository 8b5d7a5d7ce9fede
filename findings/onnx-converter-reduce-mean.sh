#!/bin/sh
# onnx: the version converter leaves ReduceMean an attribute that its older version does not have.
#
# Versions: onnx 1.23.2, onnxruntime 1.32.0, Python 3.11, CPU.
# Guess:    `convert_version(model, 17)` of a valid model at opset 20 is valid at opset 17: for
#           ReduceMean it turns the input `axes` of opset 18 into the attribute of opset 17.
# Seen:     it does that, and keeps the attribute `noop_with_empty_axes`, which came with opset 18.
#           The converter reports nothing; the checker and onnxruntime refuse the model. It is valid
#           once the attribute is deleted, and also if the attribute was never written (its default
#           is the value 0 that torch's exporter writes for every mean, such as global pooling).
# Output:   opset 20: valid
#           converted to 17: Unrecognized attribute: noop_with_empty_axes for operator ReduceMean
#           converted to 17, without the attribute: valid
#           opset 20 without the attribute, converted to 17: valid
#
# Run: sh findings/onnx-converter-reduce-mean.sh   (installs into a temporary folder)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cat >"$folder/run.py" <<'PYTHON'
import onnx
import onnxruntime
from onnx import TensorProto, helper, version_converter


def mean(**attributes):
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1, **attributes)],
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 1, 1])],
        [helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def verdict(model):
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        checked = str(error).strip().splitlines()[0]
    else:
        checked = "valid"
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except Exception:
        assert checked != "valid"
    else:
        assert checked == "valid"
    return checked


model = mean(noop_with_empty_axes=0)
print("opset 20:", verdict(model))
converted = version_converter.convert_version(model, 17)
print("converted to 17:", verdict(converted))
(node,) = [node for node in converted.graph.node if node.op_type == "ReduceMean"]
kept = [one for one in node.attribute if one.name != "noop_with_empty_axes"]
del node.attribute[:]
node.attribute.extend(kept)
print("converted to 17, without the attribute:", verdict(converted))
print(
    "opset 20 without the attribute, converted to 17:",
    verdict(version_converter.convert_version(mean(), 17)),
)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" >"$folder/seen" 2>"$folder/log"
cat "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
opset 20: valid
converted to 17: Unrecognized attribute: noop_with_empty_axes for operator ReduceMean
converted to 17, without the attribute: valid
opset 20 without the attribute, converted to 17: valid
EXPECTED
