"""Records usage from Python: buffered, in batches, exactly once; see docs/python-client.md.

recorder                           AsyncRecorder and Recorder, the two to use
rest_transport, grpc_transport     the ways to the server
events, errors                     what is recorded, and what can go wrong
engine, buffer, delivery           what both recorders are made of
loop                               what the thread of a Recorder runs
"""

from usameter_client.engine import Options
from usameter_client.errors import (
    BufferFull,
    CallRefused,
    ClientError,
    EventRefused,
    InvalidEvent,
    RecorderClosed,
    Unavailable,
    Undelivered,
)
from usameter_client.events import UsageEvent
from usameter_client.grpc_transport import GrpcTransport
from usameter_client.recorder import AsyncRecorder, Recorder
from usameter_client.rest_transport import RestTransport
from usameter_client.transport import Transport

__all__ = [
    "AsyncRecorder",
    "BufferFull",
    "CallRefused",
    "ClientError",
    "EventRefused",
    "GrpcTransport",
    "InvalidEvent",
    "Options",
    "Recorder",
    "RecorderClosed",
    "RestTransport",
    "Transport",
    "Unavailable",
    "Undelivered",
    "UsageEvent",
]
