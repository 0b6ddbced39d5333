"""Many prompts over many workers: a file of prompts becomes a folder of clips, each once.

A line of the file is a `Prompt`, what became of it stands in the `Journal`, `Dispatch` gives prompts to `Workers`. Those of
Ray are in `ray_workers`, which alone knows Ray.
"""

from vramkit.batch.dispatch import Dispatch, Watcher
from vramkit.batch.journal import Journal
from vramkit.batch.prompts import Prompt, read_prompts
from vramkit.batch.workers import Event, Job, Workers

__all__ = ["Dispatch", "Event", "Job", "Journal", "Prompt", "Watcher", "Workers", "read_prompts"]
