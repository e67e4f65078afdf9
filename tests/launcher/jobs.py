"""Real child processes with little to do, so that kills and interrupts are tried for what they are."""

import sys
from pathlib import Path

from launcher.job import Job, checkpoint
from wemmu.config.checkpoints import MANIFEST

# A trainer in small: a checkpoint every 0.1 s, goes on from the last one, exits with 75 when told to stop.
TRAINER = """
import json, os, signal, sys, time
folder, steps = sys.argv[1], int(sys.argv[2])
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: (told.append(n), open(folder + "/signals", "a").write(f"{n} ")))
os.makedirs(folder + "/checkpoints", exist_ok=True)
done = max([int(name[5:]) for name in os.listdir(folder + "/checkpoints")], default=0)
print("going on from", done)
while done < steps and not told:
    # Told to stop, it takes its time to save.
    time.sleep(0.1)
    if told:
        time.sleep(1)
    done += 1
    os.makedirs(f"{folder}/checkpoints/step_{done:08d}")
    with open(f"{folder}/checkpoints/step_{done:08d}/manifest.json", "w") as file:
        json.dump({"step": done}, file)
    print("step", done)
if told:
    open(folder + "/stopped_at", "w").write(str(done))
sys.exit(75 if done < steps else 0)
"""
# Runs the jobs described in a JSON file as `python -m launcher run` would.
LAUNCHER = """
import json, sys
from pathlib import Path
from launcher import local
from launcher.job import Job
from launcher.ledger import Ledger
from launcher.lock import locked
from wemmu.locks import LockedError
run, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
jobs = [
    Job(j["name"], tuple(j["command"]), Path(j["log"]), tuple(map(Path, j["products"])), (), j["steps"]) for j in jobs
]
try:
    with locked(run) as lock:
        sys.exit(local.run(jobs, Ledger(run / "ledger.jsonl"), lock))
except LockedError as error:
    sys.exit(f"refused: {error}")
"""


def script(run: Path, name: str, code: str, *products: Path) -> Job:
    """A job that runs `code`, with `sys.argv[1]` the run folder."""
    return Job(name, (sys.executable, "-c", code, str(run)), run / f"{name}.log", products)


def trainer(run: Path, name: str = "stage1", steps: int = 3) -> Job:
    """A training job that takes `steps` times 0.1 s."""
    folder = run / name
    command = (sys.executable, "-c", TRAINER, str(folder), str(steps))
    return Job(name, command, folder / "log.txt", (checkpoint(folder, steps) / MANIFEST,), steps=steps)
