# SPDX-License-Identifier: Apache-2.0
"""The README's table of versions: `make versions` writes it from what ran here last.

tests/ran.json, which is committed, has one record (ran.py) for each name; those of `.ci/ran` replace it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
DATA = REPO / "tests" / "ran.json"
BEGIN, END = "<!-- versions table -->", "<!-- end of versions table -->"
WHAT = {
    "suite": "all tests but those of GPUs",
    "smoke": "tests of units and kernels, a few servers",
    "gpu": "tests of GPUs",
}
# The table's own test fails while the table is out of date, which must not keep it so.
OWN_TEST = "tests/unit/test_versions.py"


def main() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in sorted((REPO / ".ci" / "ran").glob("*.json"))}
    for name, record in found.items():
        check(name, record)
    records = {**read(), **found}
    readme = REPO / "README.md"
    readme.write_text(with_table(readme.read_text(), table(records)))
    DATA.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n")
    print(table(records))


def read() -> dict[str, dict[str, Any]]:
    return json.loads(DATA.read_text()) if DATA.exists() else {}


def check(name: str, record: dict[str, Any]) -> None:
    """Ends the program if the record says nothing about versions that work."""
    if name not in WHAT:
        sys.exit(f".ci/ran: expected one of {', '.join(WHAT)}, got {name}")
    failed = [test for test in record["failed"] if not test.startswith(OWN_TEST)]
    if failed or not record["passed"]:
        sys.exit(f".ci/ran/{name}.json: expected passed tests alone, got {record['passed']} and failed {failed}")


def table(records: dict[str, dict[str, Any]]) -> str:
    """A row for each kind of run, without counts: those change with every commit."""
    rows = ["| SGLang | Python | PyTorch | Triton | FlashInfer | on | what ran |", "|---|---|---|---|---|---|---|"]
    for name, what in WHAT.items():
        if name in records:
            ran = records[name]
            packages = (ran[key] for key in ("sglang", "python", "torch", "triton", "flashinfer-python"))
            rows.append(f"| {' | '.join(packages)} | {ran['device']} | {what} |")
    return "\n".join(rows)


def with_table(readme: str, new: str) -> str:
    """The README with the table between its two marks replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md: expected {BEGIN!r} and {END!r}, got no such marks")
    return f"{before}{begin}\n{new}\n{end}{after}"


if __name__ == "__main__":
    main()
