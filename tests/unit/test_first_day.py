"""The page of the first day says of other tools what the benchmark's data says, and names every task once."""

import re
from pathlib import Path

from benchmarks.first_day import TASKS, report, shown
from benchmarks.first_day_peers import DSTACK, NOTES, PEERS, SKYPILOT

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "first-day.md").read_text()
CELLS = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def test_the_page_has_what_the_docs_of_others_ask_for():
    rows = {cells[0]: cells[2:4] for cells in CELLS if cells[0] in PEERS}
    assert rows == {task: [shown(ways[DSTACK]), shown(ways[SKYPILOT])] for task, ways in PEERS.items()}


def test_all_ten_tasks_are_done():
    assert TASKS.keys() == PEERS.keys()
    assert len(TASKS) == 10


def test_every_way_names_its_page_and_every_lack_what_comes_near():
    for task, ways in PEERS.items():
        for tool, way in ways.items():
            said = NOTES.get((task, tool), "") if way is None else way.page
            assert re.search(r"https://(dstack\.ai|docs\.skypilot\.co)/", said), (task, tool)


def test_a_task_that_takes_more_steps_than_a_peer_is_told():
    rows = [{"task": "t", "whaleflux": "2 + 1", DSTACK: "1 + 1", SKYPILOT: "none documented", "s": 1.0, "typed": ["c"]}]
    found = {target.id: target.value for target in report(rows).targets}
    assert found["longer_than_a_peer"] == 1
    assert found["tasks_done"] == 1
