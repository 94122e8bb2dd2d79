"""Who gets an answer: the Serve application, its deployment and the client.

What a program or a notebook uses is offered here; it is imported when it is asked for.
"""

from typing import TYPE_CHECKING

from cluster.catalog import on_demand

if TYPE_CHECKING:
    from serving.client import AsyncClient, Client, ImageError, Prediction, overlay
    from serving.config import ServeConfig
    from serving.deployed import Endpoint, deploy
else:
    __getattr__ = on_demand(
        __name__,
        {
            "ServeConfig": "serving.config",
            "Endpoint": "serving.deployed",
            "deploy": "serving.deployed",
            "Client": "serving.client",
            "AsyncClient": "serving.client",
            "Prediction": "serving.client",
            "ImageError": "serving.client",
            "overlay": "serving.client",
        },
    )

__all__ = [
    "AsyncClient",
    "Client",
    "Endpoint",
    "ImageError",
    "Prediction",
    "ServeConfig",
    "deploy",
    "overlay",
]
