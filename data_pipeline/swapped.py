"""Evidence that inputs and targets of an edit set are swapped, from edits that add or remove something.

An added object makes an image harder to compress, a removed one easier. In a stream all images are stored at one size
in one format, so log(bytes of target / bytes of input) is higher for "add ..." than for "remove ..."; it is lower if
the columns are swapped. What all targets have in common, such as a generator's smoothness, cancels. English only.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from wemmu.config.shards import Bytes, StreamSettings, unpack
from wemmu.config.task import Task

ADD, REMOVE = ("add", "insert"), ("remove", "delete", "erase")
# Edits of both kinds that a verdict needs, and the probability under which chance is ruled out.
LEAST, CHANCE = 20, 1e-4
# (source, whether the edit adds something, log(bytes of target / bytes of input)).
Growth = tuple[str, bool, float]


def growth(columns: Mapping[str, Bytes], settings: StreamSettings) -> Growth | None:
    """Return the growth of an undamaged record; None if its instruction says neither add nor remove."""
    if settings.task is not Task.EDIT or settings.mixed or not len(columns["target"]):
        return None
    word = (str(columns["prompt"], "utf-8").split() or [""])[0].lower()
    if word not in (*ADD, *REMOVE):
        return None
    source = str(columns["id"], "utf-8").partition("/")[0]
    return source, word in ADD, math.log(len(columns["target"]) / len(unpack(columns["images"])[0]))


def suspects(found: Iterable[Growth]) -> Iterator[str]:
    """Yield a warning for each source whose inputs and targets look swapped."""
    by_source = defaultdict[str, tuple[list[float], list[float]]](lambda: ([], []))
    for source, adds, value in found:
        by_source[source][0 if adds else 1].append(value)
    for source, (added, removed) in sorted(by_source.items()):
        if min(len(added), len(removed)) >= LEAST and (p := lower(added, removed)) < CHANCE:
            yield (
                f"source {source}: its inputs and targets look swapped. The targets of {len(added)} edits that add "
                f"something grew less, in stored bytes, than those of {len(removed)} that remove something (rank-sum "
                f"test, p = {p:.0e}, threshold {CHANCE:.0e}). Compare the first pairs in report.html; if they are, "
                "exchange `input` and `target` of the source and write the data set into another folder"
            )


def lower(x: list[float], y: list[float]) -> float:
    """Return the probability that chance ranks x as low against y as it is (Mann and Whitney, normal limit)."""
    # Only a verdict needs it, and it is slow to import.
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(x, y, use_continuity=False, alternative="less", method="asymptotic").pvalue)
