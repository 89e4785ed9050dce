"""Exit codes: one meaning each, and one table of them in the documentation."""

import re

from realjax.core.exit_codes import FINAL, FINISHED, MEANINGS
from tests.given.processes import ROOT


def test_the_table_of_the_documentation_is_that_of_the_code():
    text = (ROOT / "docs" / "processes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+?) \|([^|]*)\|$", text, re.M)
    found = {int(code): meaning.replace("`", "") for code, meaning, _ in rows}
    assert found == MEANINGS
    retried = {int(code) for code, _, again in rows if again.strip() == "yes"}
    assert retried == MEANINGS.keys() - set(FINAL) and FINISHED not in retried
