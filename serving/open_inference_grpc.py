"""The Open Inference Protocol v2 over gRPC: the service `inference.GRPCInferenceService` of KServe and Triton.

    server = grpc.aio.server()
    add_to_server(InferenceService(model_of, named, max_images), server)

A Serve deployment that inherits from InferenceService answers it on its replicas, where Serve is started with
`grpc_options=serve_options(port, timeout_s)`.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Protocol

import grpc

from serving import open_inference_pb2 as messages
from serving.open_inference_tensors import (
    Asked,
    Model,
    Named,
    Tensor,
    check_counts,
    check_name,
    checked,
    images_of,
    malformed,
    model_metadata,
    outputs_of,
    server_metadata,
)
from serving.upload import Refusal

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

STATUS = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""What a Refusal's HTTP status is in gRPC; any other one is INVALID_ARGUMENT."""

LOOPBACK = ("ipv4:127.", "ipv6:[::1]:", "ipv6:%5B::1%5D:")
"""How gRPC names callers on the same machine."""

VALUES = {"BYTES": "bytes_contents", "FP32": "fp32_contents", "UINT8": "uint_contents"}
"""Where a tensor has its values that are not raw."""


class Context(Protocol):
    """What there is to know and to say of a call, in Serve as in grpc.aio."""

    def invocation_metadata(self) -> Iterable[tuple[str, str]]: ...

    def peer(self) -> str: ...

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


Method = Callable[[Any, Any, Context], Awaitable[Any]]


def _guarded(method: Method) -> Method:
    """Answers what is raised with the call's status and an empty reply.

    Serve would write a traceback for each exception to its log, and its text to the client.
    """
    reply = getattr(messages, f"{method.__name__}Response")

    @wraps(method)
    async def guarded(self: Any, request: Any, grpc_context: Context) -> Any:
        try:
            return await method(self, request, grpc_context)
        except Refusal as error:
            grpc_context.set_code(STATUS.get(error.status, grpc.StatusCode.INVALID_ARGUMENT))
            grpc_context.set_details(error.message)
        except Exception:
            logging.getLogger("ray.serve").exception("%s failed", method.__name__)
            grpc_context.set_code(grpc.StatusCode.INTERNAL)
            grpc_context.set_details("the endpoint failed on this request; its log has the details")
        return reply()

    return guarded


class InferenceService:
    """Answers the protocol's calls.

    `model_of(context, name, version, infers)` gives the model that answers a call, which may be for a version or, where
    that is empty, for any, and may infer from so many bytes; `named(context, name, version)` gives the same for who
    only wants to know whether it does, and loads nothing. They raise Refusal where none may. The server's metadata,
    liveness and readiness are answered without them. `local_only` refuses callers on other machines: a replica of Serve
    listens for calls on every address, also where the endpoint is at a loopback one. Serve calls methods by their name,
    and gives the context by its own.
    """

    def __init__(
        self,
        model_of: Callable[[Context, str, str, int | None], Awaitable[Model]],
        named: Callable[[Context, str, str], Awaitable[Named]],
        max_images: int,
        local_only: bool = False,
    ) -> None:
        self.__model_of, self.__named = model_of, named
        self.__max_images, self.__local_only = max_images, local_only

    async def ServerLive(
        self, request: messages.ServerLiveRequest, grpc_context: Context
    ) -> messages.ServerLiveResponse:
        """The process answers."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: messages.ServerReadyRequest, grpc_context: Context
    ) -> messages.ServerReadyResponse:
        """Serve opens a replica's port only after its model is loaded."""
        return messages.ServerReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: messages.ServerMetadataRequest, grpc_context: Context
    ) -> messages.ServerMetadataResponse:
        """Name, version and extensions."""
        return messages.ServerMetadataResponse(**server_metadata())

    @_guarded
    async def ModelReady(
        self, request: messages.ModelReadyRequest, grpc_context: Context
    ) -> messages.ModelReadyResponse:
        """This model answers."""
        self.__check_caller(grpc_context)
        check_name(await self.__named(grpc_context, request.name, request.version), request.name, request.version)
        return messages.ModelReadyResponse(ready=True)

    @_guarded
    async def ModelMetadata(
        self, request: messages.ModelMetadataRequest, grpc_context: Context
    ) -> messages.ModelMetadataResponse:
        """The model's tensors."""
        return messages.ModelMetadataResponse(
            **model_metadata(await self.__model(request.name, request.version, grpc_context))
        )

    @_guarded
    async def ModelInfer(
        self, request: messages.ModelInferRequest, grpc_context: Context
    ) -> messages.ModelInferResponse:
        """What the model says of the images; raw where the request is."""
        model = await self.__model(request.model_name, request.model_version, grpc_context, request.ByteSize())
        check_counts(request.inputs, request.outputs)
        asked = checked([Asked(output.name, _classification(output.parameters)) for output in request.outputs])
        answers = await model.predict(images_of(_tensor(request), model, self.__max_images))
        response = messages.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
        response.parameters["request_id"].string_param = answers.request_id
        for output in outputs_of(asked, model, answers):
            told = response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            if request.raw_input_contents:
                response.raw_output_contents.append(output.raw())
            else:
                values = output.values()
                encoded = [text.encode() for text in values] if output.datatype == "BYTES" else values
                getattr(told.contents, VALUES[output.datatype]).extend(encoded)
        return response

    async def __model(self, name: str, version: str, context: Context, infers: int | None = None) -> Model:
        self.__check_caller(context)
        model = await self.__model_of(context, name, version, infers)
        check_name(model, name, version)
        return model

    def __check_caller(self, context: Context) -> None:
        if self.__local_only and not context.peer().startswith(LOOPBACK):
            raise Refusal(403, "forbidden", "this endpoint answers callers on its own machine only")


def _tensor(request: messages.ModelInferRequest) -> Tensor:
    raw, entry = request.raw_input_contents, request.inputs[0]
    if raw and len(raw) != len(request.inputs):
        raise malformed(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs: send one for each"
        )
    if raw and entry.HasField("contents"):
        raise malformed("the inputs have contents beside raw_input_contents: send either")
    data = memoryview(raw[0]) if raw else getattr(entry.contents, VALUES.get(entry.datatype, "bytes_contents"))
    return Tensor(entry.name, entry.datatype, entry.shape, data)


def _classification(parameters: Mapping[str, messages.InferParameter]) -> int:
    if "classification" not in parameters:
        return 0
    if parameters["classification"].WhichOneof("parameter_choice") != "int64_param":
        raise malformed("classification of an output must be an int64_param")
    return parameters["classification"].int64_param


def add_to_server(service: InferenceService, server: grpc.aio.Server) -> None:
    """Let a server answer the protocol's calls by `service`."""
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(service, name),
            request_deserializer=getattr(messages, f"{name}Request").FromString,
            response_serializer=getattr(messages, f"{name}Response").SerializeToString,
        )
        for name in METHODS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def serve_options(port: int, timeout_s: float) -> dict[str, Any]:
    """Ray Serve's `grpc_options`, with which HAProxy takes calls at `port` and passes them on to the replicas."""
    return {
        "port": port,
        "grpc_servicer_functions": [f"{__name__}.add_to_server"],
        "request_timeout_s": timeout_s,
        # It would look the service up among messages of its own name, which are not here.
        "enable_reflection": False,
    }
