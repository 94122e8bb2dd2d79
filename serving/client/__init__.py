"""The client of an endpoint, for programs (`Client`, `AsyncClient`) and for the command line (`helio predict`).

It needs neither Ray nor TensorFlow.
"""

from serving.client.answers import (
    ImageError,
    NotAllowed,
    OverLimit,
    Overloaded,
    Prediction,
    StatusError,
)
from serving.client.clients import AsyncClient, Client
from serving.client.command import endpoint_url, predict_command
from serving.client.heat_map import overlay
from serving.client.pixels import Image
from serving.client.retries import Retries

__all__ = [
    "AsyncClient",
    "Client",
    "Image",
    "ImageError",
    "NotAllowed",
    "OverLimit",
    "Overloaded",
    "Prediction",
    "Retries",
    "StatusError",
    "endpoint_url",
    "overlay",
    "predict_command",
]
