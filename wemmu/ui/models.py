"""The models that a page offers: an export and the earlier stages of its run, or the stages of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wemmu.config import load_stages
from wemmu.config.checkpoints import CHECKPOINTS, own_checkpoints, stage_folder
from wemmu.config.exported import PARITY
from wemmu.published.layout import read_json
from wemmu.shapes.vocabulary import WORLD
from wemmu.source import EXPORT, Source, is_tuned_vlm, open_source


@dataclass
class Models:
    """folders: name of a model on the page -> its folder, in the order of training. newest: the model opened first.

    All models of the miniature stay open. Otherwise only one is open, because two may not fit into memory.
    """

    folders: Mapping[str, Path]
    newest: str
    device: str | None = None
    _open: dict[str, Source] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Path, device: str | None = None) -> "Models":
        """Find the models of an export, a run or a stage. Raises ConfigError as `stage_folder`."""
        if (source / EXPORT).is_file():
            last = _stage_of(source)
            earlier = {name: folder for name, folder in _stages(source.resolve().parent).items() if name != last}
            newest = last or source.resolve().name
            return cls({**earlier, newest: source} if last else {newest: source}, newest, device)
        if is_tuned_vlm(source):
            # The stage has what its export leaves out, so it is offered beside it.
            name = source.resolve().name
            return cls({**_stages(source.resolve().parent), name: source}, name, device)
        folder = stage_folder(source)
        return cls({**_stages(folder.resolve().parent), folder.resolve().name: folder}, folder.resolve().name, device)

    def open(self, name: str) -> Source:
        """Load a model, or return it if it is open. Raises as `open_source`."""
        if name not in self._open:
            if any(source.world != WORLD for source in self._open.values()):
                self._open.clear()
            self._open[name] = open_source(self.folders[name], device=self.device)
        return self._open[name]


def _stage_of(export: Path) -> str | None:
    """The stage that an export was made of."""
    report = export / PARITY
    return read_json(report).get("origin", {}).get("stage") if report.is_file() else None


def _stages(run: Path) -> dict[str, Path]:
    """The stages of a run folder that have a checkpoint."""
    return {folder.name: folder for folder, _ in load_stages(run) if own_checkpoints(folder / CHECKPOINTS)}
