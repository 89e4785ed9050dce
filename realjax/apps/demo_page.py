"""One page for the demo: what each stage achieved, then the stages' reports one after the other."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from realjax.record.metrics import replace_text
from realjax.record.page import make_page, table_html

TITLE = "realjax demo: SFT, reward model, PPO"
COLUMNS = ("stage", "what was measured", "before", "after", "steps")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A measure of the model before a stage's first step and after its last."""

    subject: str
    before: float
    after: float
    num_steps: int

    def text(self) -> str:
        """Returns it as a line."""
        before, after = map(format_number, (self.before, self.after))
        return f"{self.subject}: {before} before, {after} after {self.num_steps} steps"


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: what it achieved, and the file of its report."""

    name: str
    title: str
    findings: tuple[Finding, ...]
    report: Path


def write_page(path: Path, results: Sequence[StageResult]) -> Path:
    """Writes a page that needs nothing from outside, and returns its path."""
    rows = [
        (result.name, finding.subject, format_number(finding.before), format_number(finding.after), finding.num_steps)
        for result in results
        for finding in result.findings
    ]
    links = " · ".join(f'<a href="#{result.name}">{html.escape(result.title)}</a>' for result in results)
    parts = [f"<h1>{html.escape(TITLE)}</h1>", f"<p>{links}</p>", table_html(COLUMNS, rows)]
    for result in results:
        parts.append(f'<hr id="{result.name}"><p>{html.escape(result.title)}</p>')
        parts.append(extract_body(result.report.read_text(encoding="utf-8")))
    replace_text(path, make_page(TITLE, "\n".join(parts)))
    return path


def format_number(value: float) -> str:
    """Returns at most four digits; what is left of a 0 after rounding is 0."""
    return f"{round(value, 4) + 0.0:.4g}"


def extract_body(page: str) -> str:
    """Returns what stands in the body of a report."""
    return page.partition("<body>")[2].rpartition("</body>")[0]
