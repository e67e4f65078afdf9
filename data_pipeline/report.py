"""The report of a data set: report.json, report.txt and report.html in its directory."""

from data_pipeline.ledger import Ledger
from data_pipeline.plan import Settings
from data_pipeline.report_html import page
from data_pipeline.report_record import HTML_FILE, JSON_FILE, TEXT_FILE, Report, report_of
from data_pipeline.report_text import as_text
from wemmu.config import Curriculum
from wemmu.config.files import replace_text
from wemmu.config.shards import SETTINGS_FILE, DataSet


def write_report(curriculum: Curriculum, dataset: DataSet) -> Report:
    """Write the report of a complete data set; the JSON comes last."""
    root = curriculum.data.shards
    report = report_of(curriculum, dataset, Ledger(root).entries(Settings.load(root / SETTINGS_FILE).parts))
    replace_text(root / TEXT_FILE, as_text(report))
    replace_text(root / HTML_FILE, page(report, dataset))
    report.save(root / JSON_FILE)
    return report
