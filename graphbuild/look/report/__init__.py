"""The report page: what came out of a job, in numbers and charts (`graphbuild report`)."""

from graphbuild.look.report.page import write_report

__all__ = ["write_report"]
