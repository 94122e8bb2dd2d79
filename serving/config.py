"""The recipe section that describes the endpoint. Names are Ray Serve's own."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.schema import Section
from serving.records.config import RecordConfig
from serving.rollout.config import RolloutConfig

APPLICATION, PREDICTOR = "helio", "Predictor"
"""What the endpoint is called in Ray Serve."""
LEAVE_S = 10.0
"""What a leaving replica has beyond a request's time. It goes as soon as all have heard that it does, what it still
holds is answered, and its records are written."""
SILENT_S = 2.0
"""Beyond `request_timeout_s`: when a replica that has said nothing is given up."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeConfig(Section):
    """The HTTP endpoint and how it scales."""

    keys: Literal["auto", "required", "none"] = "auto"
    """Whether requests want an API key (`helio keys create`). auto: only where `host` is not this machine's own."""
    records: RecordConfig = RecordConfig()
    rollout: RolloutConfig = RolloutConfig()
    models: list[str] = []
    """Other models of the registry that the endpoint answers for beside its own, each by its champion."""
    models_in_memory: int = Field(default=2, ge=1)
    """How many of them a replica keeps loaded; each is loaded when it is asked for, and the one used least recently
    leaves."""
    host: str = "127.0.0.1"
    """Address to bind; `0.0.0.0` opens it to the network."""
    port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Where the Open Inference Protocol is spoken over gRPC; none: over HTTP alone."""
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=2, ge=1)
    target_ongoing_requests: float = Field(default=8, gt=0)
    """Requests in flight per replica that autoscaling aims at."""
    upscale_delay_s: float = Field(default=5.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that one replica works on at once."""
    max_queued_requests: int = Field(default=256, ge=1)
    """Requests that wait for one replica; past it the answer is 503."""
    max_batch_size: int = Field(default=16, ge=1)
    batch_wait_timeout_s: float = Field(default=0.0, ge=0)
    """How long a batch that is not full waits for company; 0: what waits while the model works is its next batch."""
    max_request_bytes: int = Field(default=20 * 2**20, ge=1024)
    max_images: int = Field(default=64, ge=1)
    """Images in one request."""
    max_pixels: int = Field(default=50_000_000, ge=1, le=100_000_000)
    """Height times width of an image as it is sent."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """How long a request may take to arrive, past which the answer is 408, and then to be answered: 504. The head of a
    request has 10 s."""
    top_k: int = Field(default=5, ge=1)
    """Labels in an answer."""
    check_images: int = Field(default=50, ge=1)
    """Held-out images that `helio run` sends to the endpoint."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can ask."""
        return self.host in LOOPBACK

    @property
    def wants_keys(self) -> bool:
        """Whether requests want a key."""
        return self.keys == "required" or (self.keys == "auto" and not self.is_local)

    @model_validator(mode="after")
    def _replica_range(self) -> "ServeConfig":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})")
        return self
