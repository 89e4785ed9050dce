"""The demo's page holds what was found and every stage's report, and nothing from outside."""

import re

from realjax.apps.demo_page import Finding, StageResult, extract_body, format_number, write_page
from realjax.record.report import ReportParts, write_report


def make_result(folder, name: str) -> StageResult:
    folder.mkdir()
    report = write_report(folder, ReportParts(title=f"run {name}", summary={"trick": "</body> & <body>"}))
    finding = Finding(subject=f"what {name} is <for>", before=1.0, after=0.25, num_steps=7)
    return StageResult(name=name, title=f"Stage {name}", findings=(finding,), report=report)


def test_page_holds_findings_and_reports_in_order(tmp_path):
    results = [make_result(tmp_path / name, name) for name in ("one", "two")]
    page = write_page(tmp_path / "report.html", results).read_text(encoding="utf-8")
    places = [page.index(f"<h1>run {name}</h1>") for name in ("one", "two")]
    assert places == sorted(places)
    for result in results:
        assert page.count(f'id="{result.name}"') == page.count(f'href="#{result.name}"') == 1
        assert extract_body(result.report.read_text(encoding="utf-8")) in page
        assert f"what {result.name} is &lt;for&gt;" in page
    assert page.count("<body>") == page.count("</body>") == page.count("<style>") == 1
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_numbers_are_short_and_a_rounded_zero_has_no_sign():
    assert [format_number(x) for x in (-2e-9, 0.95312, 1031.98, 12.0)] == ["0", "0.9531", "1032", "12"]
