"""What a service may be told: where it listens, whom it lets in, how much it takes."""

from pathlib import Path

from pydantic import Field

from logitlake_shared.config import StrictModel

__all__ = ["ServiceSettings"]


class ServiceSettings(StrictModel):
    """The part of a service's configuration that both services share."""

    host: str = "127.0.0.1"
    """address to listen on; one that other machines reach needs `tokens` with a token in it"""
    port: int = Field(default=8321, ge=0, le=65535)
    """port to listen on; 0 takes a free one"""
    host_names: tuple[str, ...] = ()
    """names under which clients reach the service, without port; others are refused. Empty: any, or without tokens
    this machine's"""
    tokens: Path | None = None
    """file of the tokens that open the service; made by `token create`. Without it only this machine gets in"""
    max_body_bytes: int = Field(default=2**20, gt=0)
    """largest body of a request"""
    request_s: float = Field(default=60.0, gt=0)
    """seconds that the headers of a request may take to come, and then its body; answers have bounds of their own"""
    requests_per_minute: int = Field(default=6000, gt=0)
    """requests that one token may make, in the long run; a tenth of it at once"""
    max_concurrent: int = Field(default=256, gt=0)
    """requests under way at once; more are told to come again"""
    max_streams: int = Field(default=2000, gt=0)
    """answers that go on for as long as somebody listens, e.g. a job's events; beside `max_concurrent`"""
    traces: bool = False
    """send a span for each request to the collector that `OTEL_EXPORTER_OTLP_ENDPOINT` names; needs the extra `otel`"""
    drain_s: float = Field(default=20.0, ge=0)
    """seconds that requests under way have to end after SIGTERM"""
