"""A run written down where people compare runs: in MLflow, in TensorBoard, or by a function of yours.

A tracker is a function that takes one `Event` after another. It stands outside the run: it is told what the run's
history holds of all clients together, and the first time that it fails is the last time that it is told anything.
"""

from fedkit.tracking.events import About, Begun, Ended, Event, Scored, Shipped, shipped, story
from fedkit.tracking.teller import Teller, Track, Tracker, Tracking, tracker_for

__all__ = [
    "About",
    "Begun",
    "Ended",
    "Event",
    "Scored",
    "Shipped",
    "Teller",
    "Track",
    "Tracker",
    "Tracking",
    "shipped",
    "story",
    "tracker_for",
]
