"""The records of a table's runs in one file: what every figure of the table can be computed from again."""

from __future__ import annotations

import json

from vkd.records.grouping import Table

_OF_THE_MACHINE = frozenset({"host", "package", "platform"})
"""Parts of an environment that say where a run was made and not what made it."""


def to_lines(table: Table) -> str:
    """One line of JSON for each finished run that a cell of the table is made of, in the order of the rows.

    A line is the run's `result.json` and `path`, its directory below the folder of all runs. Names of hosts and folders
    of the machine are left out; what the words of its command say stays.
    """
    lines: dict[str, str] = {}
    for row in table.rows:
        for cell in row.cells:
            runs = cell.group.runs if cell.group is not None else {}
            for _, run in sorted(runs.items()):
                content = {"path": run.path, **run.content}
                environment = content.get("environment")
                if isinstance(environment, dict):
                    content["environment"] = {
                        name: value for name, value in environment.items() if name not in _OF_THE_MACHINE
                    }
                lines[run.path] = json.dumps(content) + "\n"
    return "".join(lines.values())
