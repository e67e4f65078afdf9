"""`wemmu config upgrade`: files of earlier versions, with their comments, in today's form."""

from pathlib import Path

import pytest
import yaml

from tests.config.curricula import tree, write
from wemmu.config import ConfigError, load_curriculum
from wemmu.config.rewrite import rewritten
from wemmu.show_config import upgrade

ROSS_STAGE = tree()["stages"][0] | {
    "trains": ["projector", "llm", "head"],
    "objective": {"kind": "reconstructive"},
    "mixture": {"understanding": 1.0},
}
# What the file says beside the small curriculum of these tests -> the lines that an upgrade writes instead.
FORMS = {
    "a block": (
        "# The bridge of the paper, größer.\nbridge:  # OPEN\n  queries: {design: noisy}\n"
        "  # px / 32\n  position_table: 9\n\n# What follows.\nseed: 3\n",
        "# The bridge of the paper, größer.\nrecipe:\n  kind: wemmu\n  bridge:  # OPEN\n    queries: {design: noisy}\n"
        "    # px / 32\n    position_table: 9\n\n# What follows.\nseed: 3\n",
    ),
    "in braces": (
        "bridge: {position_table: 9}  # GPU: {}\n",
        "recipe: {kind: wemmu, bridge: {position_table: 9}}  # GPU: {}\n",
    ),
    "ross": ("reconstruction:  # small\n  target: pixels\n", "recipe:  # small\n  kind: ross\n  target: pixels\n"),
    "ross in braces": ("reconstruction: {target: pixels}\n", "recipe: {kind: ross, target: pixels}\n"),
    "of a run folder": (
        "bridge:\n  position_table: 9\nreconstruction:\n  target: pixels\n",
        "recipe:\n  kind: wemmu\n  bridge:\n    position_table: 9\n\n",
    ),
    "overrides": (
        "overrides:\n  - bridge.position_table=9  # larger\n  - 'memory.cached_pictures=3'\n",
        "overrides:\n  - recipe.bridge.position_table=9  # larger\n  - 'memory.cached_images=3'\n",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_upgraded_file_is_read_equal_and_without_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture, form: str
) -> None:
    content = tree() | ({"stages": [ROSS_STAGE]} if form.startswith("ross") else {})
    content["memory"]["cached_pictures"] = 7
    content["data"]["prepare"] = {"sources": [{"kind": "shapes", "samples": {"t2i": 9}}], "pictures": {"unit": 16}}
    content["stages"][0] |= {"resolution": [32, 64], "next_rung": {"samples": 32}}
    before, after = FORMS[form]
    old = write(tmp_path, yaml.safe_dump(content) + before)
    expected = load_curriculum(old)
    assert ("wemmu config upgrade" in capsys.readouterr().err) == (form != "of a run folder")
    upgrade(old)
    assert yaml.safe_load(old.read_text())["memory"]["cached_pictures"] == 7
    new = tmp_path / "curriculum.upgraded.yaml"
    assert new.read_text().endswith(after)
    assert capsys.readouterr().err == ""
    assert load_curriculum(new) == expected
    assert capsys.readouterr().err == ""
    assert rewritten(new.read_text()) == new.read_text()


def test_a_file_is_written_over_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = write(tmp_path, yaml.safe_dump(tree()) + FORMS["in braces"][0])
    text = old.read_text()
    for options in ({"output": old}, {"output": tmp_path / "elsewhere" / "x.yaml"}, {"in_place": True, "output": old}):
        with pytest.raises(SystemExit) as error:
            upgrade(old, **options)
        assert error.value.code == 2
    assert old.read_text() == text
    upgrade(old, in_place=True)
    assert old.read_text().endswith(FORMS["in braces"][1])
    upgrade(old, in_place=True)
    assert "no field of an earlier version" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["curriculum.yaml"]


@pytest.mark.parametrize("wrong", ["[", "recipe: {kind: wemmu}\nbridge: {position_table: 9}\n"])
def test_what_cannot_be_moved_is_left_to_a_person(tmp_path: Path, wrong: str) -> None:
    old = write(tmp_path, yaml.safe_dump(tree()) + wrong)
    with pytest.raises(SystemExit) as error:
        upgrade(old)
    assert error.value.code == 78
    assert isinstance(error.value.__cause__, ConfigError)
    assert [file.name for file in tmp_path.iterdir()] == ["curriculum.yaml"]
