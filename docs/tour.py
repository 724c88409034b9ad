"""Records usage, reads it back and meets a full quota, over gRPC."""

import os

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from usameter.common.v1.error_pb2 import QuotaExceededDetails
from usameter.ingest.v1.event_pb2 import EventInput, RecordEventsRequest
from usameter.ingest.v1.event_pb2_grpc import EventServiceStub
from usameter.ingest.v1.usage_pb2 import GetUsageRequest
from usameter.ingest.v1.usage_pb2_grpc import UsageServiceStub

channel = grpc.insecure_channel(os.environ["USAMETER_INGEST_ADDR"])
events, usage = EventServiceStub(channel), UsageServiceStub(channel)
metadata = [("authorization", f"Bearer {os.environ['USAMETER_API_KEY']}")]

batch = RecordEventsRequest(
    events=[
        EventInput(tenant_id="globex", event_type="tokens", quantity=1500, idempotency_key="call-1"),
        EventInput(tenant_id="globex", event_type="tokens", quantity_decimal="0.000001", idempotency_key="call-2"),
    ]
)
for _ in range(2):  # The second time both are known: retrying is always safe.
    answer = events.RecordEvents(batch, metadata=metadata, timeout=5)
    print(answer.new_events, "new,", answer.duplicate_events, "known")

for group in usage.GetUsage(GetUsageRequest(tenant_id="globex"), metadata=metadata, timeout=5).usage:
    print(group.event_type, group.total_quantity)

try:
    refused = RecordEventsRequest(tenant_id="acme", event_type="api_request", idempotency_key="call-3")
    events.RecordEvents(refused, metadata=metadata, timeout=5)
except grpc.RpcError as error:
    # The status code is for machines in between; the reason and its details are the same as in REST.
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info, details = ErrorInfo(), QuotaExceededDetails()
    status.details[0].Unpack(info)
    status.details[1].Unpack(details)
    print(error.code().name, info.domain, info.reason, details.current, "of", details.limit)
