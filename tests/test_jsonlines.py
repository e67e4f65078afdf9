"""Files of one JSON object a line."""

import json
from pathlib import Path

from wemmu.jsonlines import stage_events


def test_the_events_of_a_stage_are_those_of_its_resolutions_and_evaluation_too(tmp_path: Path):
    jobs = ["data", "stage2", "stage2@32", "stage2@64", "stage2/evaluation", "stage20", "stage20@32"]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps({"job": job}) + "\n" for job in jobs))
    (tmp_path / "stage2").mkdir()
    assert [event["job"] for event in stage_events(tmp_path / "stage2")] == jobs[1:5]
