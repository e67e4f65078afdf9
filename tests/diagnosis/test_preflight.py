"""What is told of a curriculum before anything of it is submitted."""

from pathlib import Path

from tests.data.handmade import make_curriculum, shapes, stream, write
from wemmu.config import Curriculum
from wemmu.config.task import Task
from wemmu.diagnosis import preflight


def test_the_data_set_must_have_every_rung_of_a_ladder(tmp_path: Path):
    px = (32, 48)
    streams = {stream(Task.T2I, s, s).model_copy(update={"resolution": s}): shapes(Task.T2I, 3, (s, s)) for s in px}
    write(tmp_path, streams)

    def checked(*resolutions: int) -> tuple[str, str]:
        ladder = {"resolution": resolutions, "next_rung": {"samples": 8}, "mixture": {"t2i": 1.0}}
        base = make_curriculum(tmp_path).model_dump()
        base["stages"] = [base["stages"][0] | ladder]
        found = preflight.data(Curriculum.model_validate(base))
        return found.status, found.found

    assert checked(32, 48)[0] == "ok"
    status, found = checked(32, 48, 64)
    assert (status, "t2i at 64 px" in found, "32 px" in found) == ("problem", True, False)
