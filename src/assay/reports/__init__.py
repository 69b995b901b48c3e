"""What people read of a run: an HTML file, a summary in the terminal, live progress. Free of torch."""

from assay.reports.html import write_report
from assay.reports.live import live
from assay.reports.summary import points
from assay.reports.table import compare_table, print_run, verdict

__all__ = ["compare_table", "live", "points", "print_run", "verdict", "write_report"]
