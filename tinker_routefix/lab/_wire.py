"""The bodies on the wire: JSON and protobuf, plain and compressed.

The lab has to read what every release sends and to answer what every release reads, without
importing tinker. The messages are therefore declared here, only the fields that the lab looks
at (protobuf skips the others), in a descriptor pool of their own: the process that runs the lab
usually has tinker's own ``tinker_public.proto`` in the default pool.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import TYPE_CHECKING, Any, Final, Literal

import zstandard
from google.protobuf import (  # type: ignore[import-untyped,unused-ignore]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOBUF: Final = "application/x-protobuf"

_PACKAGE: Final = "tinker_public"

# message -> (name, number, type); "*" repeats, "map:" is a map from strings, a leading dot names
# another message.
_MESSAGES: Final[dict[str, tuple[tuple[str, int, str], ...]]] = {
    "EncodedTextChunk": (("tokens", 1, "bytes"),),
    "Chunk": (("encoded_text", 1, ".EncodedTextChunk"),),
    "Tensor": (("dense", 1, "bytes"), ("dtype", 3, "int32"), ("shape", 4, "*int64")),
    "Datum": (("model_input", 1, "*.Chunk"), ("loss_fn_inputs", 2, "map:.Tensor")),
    "ForwardBackwardRequest": (
        ("model_id", 1, "string"),
        ("seq_id", 2, "int32"),
        ("data", 3, "*.Datum"),
        ("loss_fn", 4, "string"),
        ("forward_only", 6, "bool"),
    ),
    "BatchedTensor": (
        ("data", 1, "bytes"),
        ("offsets", 2, "bytes"),
        ("dtype", 3, "int32"),
        ("trailing_shape", 4, "*int64"),
    ),
    "ArrayRecord": (
        ("type_tag", 1, "string"),
        ("fields", 2, "map:.BatchedTensor"),
        ("num_datums", 3, "int64"),
    ),
    "ForwardBackwardOutput": (
        ("loss_fn_output_type", 1, "string"),
        ("loss_fn_outputs", 2, "*.ArrayRecord"),
        ("metrics", 3, "map:double"),
    ),
    "SampledSequence": (
        ("stop_reason", 1, "int32"),
        ("tokens", 2, "bytes"),
        ("logprobs", 3, "bytes"),
    ),
    "SampleResponse": (
        ("sequences", 1, "*.SampledSequence"),
        ("prompt_logprobs", 2, "bytes"),
    ),
}

# Enumerations travel like int32, so that they need no declaration of their own.
_FLOAT32: Final = 1
_STOP_REASONS: Final = {"stop": 0, "length": 1}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    "bytes": _Field.TYPE_BYTES,
    "string": _Field.TYPE_STRING,
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "double": _Field.TYPE_DOUBLE,
}


def _set_type(field: Any, kind: str) -> None:
    if kind.startswith("."):
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}{kind}"
    else:
        field.type = _SCALARS[kind]


def _declare(message: Any, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind.startswith("map:"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _declare(entry, "key", 1, "string")
        _declare(entry, "value", 2, kind.removeprefix("map:"))
        field.label = _Field.LABEL_REPEATED
        _set_type(field, f".{message.name}.{entry.name}")
        return
    if kind.startswith("*"):
        field.label = _Field.LABEL_REPEATED
    _set_type(field, kind.removeprefix("*"))


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="tinker_routefix_lab.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _declare(message, *field)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES: Final = _classes()


def _unzip(raw: bytes) -> bytes:
    return zlib.decompress(raw, 16 + zlib.MAX_WBITS)


def _unzstd(raw: bytes) -> bytes:
    # A plain decompress() needs a length in the frame's header, which is optional.
    return zstandard.ZstdDecompressor().decompressobj().decompress(raw)


_DECOMPRESS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "zstd": _unzstd,
    "gzip": _unzip,
    "deflate": zlib.decompress,
}


def read_body(raw: bytes, content_type: str, encoding: str) -> dict[str, Any] | None:
    """Read what a request says, in the shape of its JSON form; None when it is unreadable."""
    try:
        if encoding:
            raw = _DECOMPRESS[encoding](raw)
        if content_type.startswith(PROTOBUF):
            return _forward_backward(raw)
        said = json.loads(raw) if raw else {}
    except (KeyError, ValueError, zlib.error, zstandard.ZstdError):
        return None
    except Exception as error:
        # protobuf's DecodeError has lived in more than one module.
        if type(error).__name__ != "DecodeError":
            raise
        return None
    return said if isinstance(said, dict) else None


def _forward_backward(raw: bytes) -> dict[str, Any]:
    request = _CLASSES["ForwardBackwardRequest"].FromString(raw)
    data = [
        {
            "model_input": {
                "chunks": [
                    {"tokens": [0] * (len(chunk.encoded_text.tokens) // 4)}
                    for chunk in datum.model_input
                ]
            },
            "loss_fn_inputs": {
                name: {"shape": list(tensor.shape)} for name, tensor in datum.loss_fn_inputs.items()
            },
        }
        for datum in request.data
    ]
    return {
        "model_id": request.model_id,
        "seq_id": request.seq_id,
        "forward_only": request.forward_only,
        "forward_backward_input": {"data": data, "loss_fn": request.loss_fn},
    }


def datum_shapes(said: dict[str, Any]) -> list[list[int]]:
    """List the shape of every datum's log probabilities: that of its target tokens."""
    given = said.get("forward_backward_input") or said.get("forward_input") or {}
    return [_shape(datum) for datum in given.get("data", ())]


def _shape(datum: dict[str, Any]) -> list[int]:
    target = datum.get("loss_fn_inputs", {}).get("target_tokens") or {}
    if target.get("shape"):
        return list(target["shape"])
    if target.get("data") is not None:
        return [len(target["data"])]
    return [prompt_length(datum.get("model_input", {}))]


def prompt_length(model_input: dict[str, Any]) -> int:
    """Count the tokens of a model input in its JSON form."""
    return sum(len(chunk.get("tokens", ())) for chunk in model_input.get("chunks", ()))


_METRICS: Final = {"loss:sum": 1.0}
_OUTPUT_TYPE: Final = "ArrayRecord"
_LOGPROB: Final = -0.5


def forward_backward_json(shapes: list[list[int]]) -> dict[str, Any]:
    """Write a ``ForwardBackwardOutput`` with one output per datum, as JSON."""
    return {
        "loss_fn_output_type": _OUTPUT_TYPE,
        "loss_fn_outputs": [
            {
                "logprobs": {
                    "data": [_LOGPROB] * math.prod(shape),
                    "dtype": "float32",
                    "shape": shape,
                }
            }
            for shape in shapes
        ],
        "metrics": dict(_METRICS),
    }


def forward_backward_proto(shapes: list[list[int]]) -> bytes:
    """Write the output of :func:`forward_backward_json` as protobuf, one record per datum."""
    output = _CLASSES["ForwardBackwardOutput"](loss_fn_output_type=_OUTPUT_TYPE)
    for shape in shapes:
        record = output.loss_fn_outputs.add(type_tag=_OUTPUT_TYPE, num_datums=1)
        tensor = record.fields["logprobs"]
        tensor.data = _floats([_LOGPROB] * math.prod(shape))
        tensor.offsets = struct.pack("<2q", 0, len(tensor.data))
        tensor.dtype = _FLOAT32
        tensor.trailing_shape.extend(shape[1:])
    output.metrics.update(_METRICS)
    return bytes(output.SerializeToString())


def sample_json(sequences: list[list[int]], prompt: int | None) -> dict[str, Any]:
    """Write a ``SampleResponse`` as JSON; ``prompt`` is its length, if it is to be scored."""
    stop: Literal["stop", "length"] = "length"
    return {
        "type": "sample",
        "sequences": [
            {"stop_reason": stop, "tokens": tokens, "logprobs": [_LOGPROB] * len(tokens)}
            for tokens in sequences
        ],
        "prompt_logprobs": prompt and [None] + [_LOGPROB] * (prompt - 1),
    }


def sample_proto(sequences: list[list[int]], prompt: int | None) -> bytes:
    """Write the answer of :func:`sample_json` as protobuf."""
    response = _CLASSES["SampleResponse"]()
    for tokens in sequences:
        response.sequences.add(
            stop_reason=_STOP_REASONS["length"],
            tokens=struct.pack(f"<{len(tokens)}i", *tokens),
            logprobs=_floats([_LOGPROB] * len(tokens)),
        )
    if prompt:
        response.prompt_logprobs = _floats([math.nan] + [_LOGPROB] * (prompt - 1))
    return bytes(response.SerializeToString())


def _floats(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
