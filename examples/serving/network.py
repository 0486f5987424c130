"""An MLServer runtime for the network of a bundle. It runs where the server does, which needs no fedkit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor

TYPES = {"tensor(float)": "FP32", "tensor(float16)": "FP16", "tensor(double)": "FP64", "tensor(int64)": "INT64"}


class Network(MLModel):
    """The Open Inference Protocol over one ONNX file, which must be the one that was signed."""

    async def load(self) -> bool:
        """Reads the file; raises `ValueError` for any other than the one that is expected."""
        content = Path(self.settings.parameters.uri).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.settings.parameters.extra["sha256"]:
            raise ValueError("this is not the network of the bundle")
        self.session = onnxruntime.InferenceSession(content)
        self.inputs = [tensor(one) for one in self.session.get_inputs()]
        self.outputs = [tensor(one) for one in self.session.get_outputs()]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The outputs for one request."""
        feed = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        names = [one.name for one in self.outputs]
        found = zip(names, self.session.run(names, feed), strict=True)
        outputs = [NumpyCodec.encode_output(name, array) for name, array in found]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)


def tensor(one: onnxruntime.NodeArg) -> MetadataTensor:
    """An input or output, for whoever asks the server for the model's metadata; -1 is a dimension that varies."""
    shape = [dim if isinstance(dim, int) else -1 for dim in one.shape]
    return MetadataTensor(name=one.name, datatype=TYPES[one.type], shape=shape)
