"""Report of an evaluation: a table for the terminal, a CSV, the trade-off curve, and one self-contained HTML page."""

from denim.defense.report.pictures import Curve, curves, resubmissions, tradeoff
from denim.defense.report.report import write_report
from denim.defense.report.tables import print_table

__all__ = ["Curve", "curves", "print_table", "resubmissions", "tradeoff", "write_report"]
