"""Sealed hops from the coordinator's side: who has a box, for whom each visit is sealed, and who can go on from there.

All that the coordinator knows of a sealed model is its header. It decides who is named as a recipient, and every site
checks the names against its own roster; so it can leave members out, and cannot add anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedkit.config import Privacy
from fedkit.crypto.box import about_run, require_boxes
from fedkit.crypto.ceremony import BoxKey, refused
from fedkit.crypto.sealing import SealedModel, Subject, header_of, manifest_of
from fedkit.errors import ConfigError, PayloadError, Refused
from fedkit.rounds.assignment import Sealing
from fedkit.rounds.call import Refusal
from fedkit.weights import Manifest, Weights

__all__ = ["AHEAD", "SealedHops", "can_open", "readers"]

AHEAD = 3  # the next site, and two that may take its place


def readers(model: Weights) -> frozenset[str] | None:
    """Who can open a sealed model; None for a plain one, which everybody can."""
    return header_of(model).names if model.manifest.is_sealed else None


def can_open(client: str, model: Weights) -> bool:
    """Whether a client can go on from this model."""
    known = readers(model)
    return known is None or client in known


@dataclass(frozen=True)
class SealedHops:
    """What is the same for all hops of a run: its name, the manifest of the model, the roster as it is known here.

    `owner` is who gets every model that may stand, and `box` its key, where it does not attend. Raises `ConfigError`
    for an owner who is not on the roster, or whose key is not one.
    """

    run: str
    manifest: Manifest
    members: Mapping[str, str]
    owner: str | None = None
    box: BoxKey | None = None

    @classmethod
    def of(cls, privacy: Privacy, run: str, manifest: Manifest, members: Mapping[str, str]) -> SealedHops:
        """By the run's settings."""
        box = None
        if privacy.owner_box is not None:
            try:
                box = BoxKey.from_bytes(bytes.fromhex(privacy.owner_box))
            except (PayloadError, ValueError):
                raise ConfigError("privacy.owner_box is no signed box key; it is made where the run is begun") from None
        return cls(run, manifest, members, privacy.owner, box)

    def __post_init__(self) -> None:
        """Checks the owner, so that nobody trains for somebody whom the sites do not know."""
        if self.owner is None:
            return
        if self.owner not in self.members:
            raise ConfigError(f"the owner {self.owner} is not on the roster: the members add it, fedkit roster propose")
        if self.box is not None and (self.box.name != self.owner or not self._is_signed(self.box)):
            raise ConfigError(f"the box key that was sent is not one that {self.owner} has signed for this run")

    def _is_signed(self, box: BoxKey) -> bool:
        return box.is_signed(about_run(self.run), self.members)

    def boxes(self, replies: Mapping[str, bytes], refuse: Callable[[Refusal], None]) -> dict[str, BoxKey]:
        """The box keys by name, of what clients say; bad ones are put on record."""
        found = {}
        for name in sorted(replies):
            try:
                found[name] = self.box_of(name, replies[name])
            except Refused as why:
                refuse(Refusal(name, why.reason, why.detail))
        return found

    def box_of(self, name: str, reply: bytes) -> BoxKey:
        """What a client says when it is asked for its box key; raises `Refused` (encryption)."""
        try:
            box = BoxKey.from_bytes(reply)
        except PayloadError as error:
            raise refused(str(error)) from None
        require_boxes(self.run, [box], self.members)
        if box.name != name:
            raise refused(f"{name} speaks for {box.name}")
        return box

    def sealing(self, client: str, then: Sequence[str], boxes: Mapping[str, BoxKey]) -> Sealing:
        """For whom `client` is to seal: the next `AHEAD` sites, or all, where its model may be the round's.

        All are the round's clients, who score what stands, and the owner. Raises `Refused` where a key is missing.
        """
        if client not in boxes:
            raise refused(f"{client} has given no box key in this round")
        chosen = [boxes[name] for name in then if name in boxes][:AHEAD]
        if len(chosen) < AHEAD:
            chosen = [*boxes.values(), *self._owner(boxes)]
        chosen.sort(key=lambda one: one.name)
        subject = Subject(self.run, 0, "0" * 32, client, self.manifest.to_json())
        names = [one.name for one in chosen]
        return Sealing(tuple(chosen), manifest_of(subject, names, self.manifest.size).size)

    def _owner(self, boxes: Mapping[str, BoxKey]) -> Iterable[BoxKey]:
        if self.owner is None or self.owner in boxes:
            return
        if self.box is None:
            raise refused(
                f"the owner {self.owner} does not attend, and its box key was not sent: begin the run with the owner's "
                "identity and roster (fedkit run --identity FOLDER --roster ROSTER.json)",
            )
        yield self.box

    def taken(self, weights: Weights, client: str, asked: str, sealing: Sealing) -> SealedModel:
        """A hop's model; raises `Refused` (encryption) for one that is not what was asked of this client."""
        found = SealedModel.of(weights)
        try:
            about, names = found.header.subject, found.header.names
        except PayloadError as error:
            raise refused(str(error)) from None
        if (about.run, about.asked, about.sealer) != (self.run, asked, client):
            raise refused(f"{client} sends a model that was not sealed for this hop")
        if names != {one.name for one in sealing.boxes}:
            raise refused(f"{client} has sealed its model for others than it was asked to")
        found.header.check(self.run, -1, self.members)
        return found

    def is_stuck(self, model: Weights, round: int, then: Sequence[str], boxes: Collection[str]) -> bool:
        """Whether nobody can go on from a model: of those who come next in its own round, or of all in a later one.

        A model that is sealed for all is not stuck: it stands as it is.
        """
        if not model.manifest.is_sealed:
            return False
        header = header_of(model)
        left = then if header.subject.round == round else boxes
        return not header.names & set(left) and not header.names >= set(boxes)
