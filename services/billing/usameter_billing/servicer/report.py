"""BillingReportService on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter.billing.v1 import report_pb2, report_pb2_grpc
from usameter_billing.domain.report import CurrencyReport, ReportSum
from usameter_billing.service.report import BillingReports
from usameter_billing.servicer.messages import period_from_proto
from usameter_core.grpc.context import current_principal
from usameter_core.money import format_amount

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class BillingReportServicer(report_pb2_grpc.BillingReportServiceServicer):
    """See report.proto."""

    def __init__(self, reports: BillingReports) -> None:
        self._reports = reports

    async def GetBillingReport(
        self, request: report_pb2.GetBillingReportRequest, context: Context
    ) -> report_pb2.BillingReport:
        """See report.proto."""
        found = await self._reports.get(
            current_principal().org_id, starting_in=period_from_proto(request.period_start, request.period_end)
        )
        return report_pb2.BillingReport(
            period_start=request.period_start,
            period_end=request.period_end,
            currencies=[report_to_proto(report) for report in found],
        )


def report_to_proto(report: CurrencyReport) -> report_pb2.CurrencyReport:
    """The sums of one currency."""

    def sum_to_proto(each: ReportSum) -> report_pb2.ReportSum:
        return report_pb2.ReportSum(amount=format_amount(each.amount, report.currency), count=each.count)

    return report_pb2.CurrencyReport(
        currency=report.currency,
        billed=sum_to_proto(report.billed),
        paid=sum_to_proto(report.paid),
        pending=sum_to_proto(report.pending),
        overdue=sum_to_proto(report.overdue),
        uncollectible=sum_to_proto(report.uncollectible),
        credited=sum_to_proto(report.credited),
        credit_drawn=sum_to_proto(report.credit_drawn),
        void=sum_to_proto(report.void),
        draft=sum_to_proto(report.draft),
    )
