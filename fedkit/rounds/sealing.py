"""A client's part in sealed hops: it opens what was sealed for it, and seals what it makes for those it is told."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedkit.crypto.box import Box
from fedkit.crypto.ceremony import refused
from fedkit.crypto.messages import DIGEST_BYTES
from fedkit.crypto.sealing import Header, Stamp, Subject, header_of, manifest_of, seal, sealed_words, unseal
from fedkit.errors import PayloadError, Reason, Refused
from fedkit.gate import BEFORE, VERDICT, Verdict
from fedkit.rounds.assignment import Assignment, Parcel
from fedkit.weights import Manifest, Weights
from fedkit.work import Answer, Evaluate, Fit, Reply, Update

__all__ = ["Letters", "answered_box", "letters_for"]

_MODEL = ""  # beside the names of extra vectors


@dataclass(frozen=True, slots=True)
class Letters:
    """What work takes that gets or gives sealed models: the content keys of what came, and how the answer is sealed.

    Both hold for one assignment, and no roster key is among them. `contents` are by the name of the extra vector, that
    of the model by the empty name.
    """

    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    header: Header | None = None
    stamp: Stamp | None = field(default=None, repr=False)

    def open(self, parcel: Parcel) -> Parcel:
        """What came, as it was before it was sealed; raises `Refused` (encryption)."""
        if not self.contents:
            return parcel
        model = unseal(parcel.model, self.contents[_MODEL]) if _MODEL in self.contents else parcel.model
        extra = dict(parcel.extra)
        for name in extra.keys() & self.contents.keys():
            extra[name] = unseal(sealed_words(extra[name]), self.contents[name]).vector
        return Parcel(model, extra)

    def close(self, answer: Answer) -> Answer:
        """The answer as it may leave; raises `Refused` for vectors beside it that would leave as they are."""
        if self.header is None or self.stamp is None:
            return answer
        assert isinstance(answer, Update)  # a hop is a Fit
        beside = sorted(set(answer.sizes) - {VERDICT})
        if beside:
            raise Refused(
                Reason.SHAPE, f"the vectors {', '.join(beside)} would travel beside the sealed model, unsealed"
            )
        if answer.weights.manifest.to_json() != self.header.subject.manifest:
            raise Refused(Reason.SHAPE, "the task's model has other tensors than the one that came")
        sealed = seal(self.header, self.stamp, answer.weights.vector)
        return replace(answer, weights=sealed, extra=Verdict.without_numbers(answer.extra))

    def to_dict(self) -> dict[str, Any]:
        """As it goes to the process that works."""
        found: dict[str, Any] = {"contents": {name: _text(key) for name, key in self.contents.items()}}
        if self.header is not None and self.stamp is not None:
            found["seal"] = [_text(part) for part in (self.header.to_bytes(), self.stamp.content, self.stamp.voice)]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Letters:
        """What `to_dict` wrote."""
        contents = {name: base64.b64decode(text) for name, text in values["contents"].items()}
        if "seal" not in values:
            return cls(contents)
        header, content, voice = map(base64.b64decode, values["seal"])
        return cls(contents, Header.from_bytes(header), Stamp(content, voice))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def answered_box(assignment: Assignment, box: Box | None) -> Reply:
    """The answer to whoever asks for a site's box key; raises `Refused` for a site that has none."""
    return Reply(_required(box).offer(assignment.run).to_bytes())


def letters_for(assignment: Assignment, parcel: Parcel, box: Box | None) -> Letters:
    """What the work takes; raises `Refused` (encryption) for what is not to be opened here, or sealed as is asked.

    Of sealed vectors in `parcel` only the headers are read.
    """
    is_sealed, sealing = parcel.model.manifest.is_sealed, assignment.sealing
    if not is_sealed and sealing is None:
        return Letters()
    mine, at = _required(box), (assignment.run, assignment.round)
    if is_sealed and sealing is None and not isinstance(assignment.work, Evaluate):
        raise refused("a sealed model is trained on its way to others, and then sealed again, or scored: nothing else")
    contents = {_MODEL: mine.content_key(parcel.model, *at)} if is_sealed else {}
    header = header_of(parcel.model) if is_sealed else None
    plain = parcel.model.manifest if header is None else _manifest_in(header)
    before = _before(parcel, plain)
    _require_parent(parcel.model, header, before)
    if before is not None and before.manifest.is_sealed:
        contents[BEFORE] = mine.content_key(before, *at)
    if sealing is None:
        return Letters(contents)
    if not isinstance(assignment.work, Fit) or assignment.returns != "weights" or not sealing.boxes:
        raise refused("what is to be sealed is the model after a hop, for one recipient at least")
    parents = _parents(assignment.client, parcel.model, header, before)
    subject = Subject(*at, assignment.id, assignment.client, plain.to_json(), parents)
    if manifest_of(subject, [one.name for one in sealing.boxes], plain.size).size != sealing.words:
        raise Refused(Reason.SHAPE, f"this model does not make {sealing.words} words when it is sealed")
    return Letters(contents, *mine.address(subject, sealing.boxes))


def _before(parcel: Parcel, plain: Manifest) -> Weights | None:
    """The model before, where one came along; only the first one of a run is not sealed."""
    vector = parcel.extra.get(BEFORE)
    if vector is None:
        return None
    return Weights(plain, vector) if vector.size == plain.size else sealed_words(vector)


def _require_parent(model: Weights, header: Header | None, before: Weights | None) -> None:
    """Raises `Refused` unless a model is compared with what its sealer has signed that it was trained from.

    Compared with enough models of somebody's choice, it would be given away.
    """
    if before is None or before.digest == model.digest:
        return
    if header is None or not header.subject.comes_from(before.digest):
        raise refused("the model that came to be compared with is not the one before")


def _parents(client: str, model: Weights, header: Header | None, before: Weights | None) -> bytes:
    """What the client's own model will be compared with; two visits of one client in a row count as one."""
    if header is not None and header.subject.sealer == client:
        return header.subject.parents
    digests = [bytes.fromhex(one.digest) for one in (model, before) if one is not None]
    return b"".join(digests).ljust(2 * DIGEST_BYTES, b"\0")


def _manifest_in(header: Header) -> Manifest:
    try:
        return Manifest.from_json(header.subject.manifest)
    except PayloadError as error:
        raise refused(str(error)) from None


def _required(box: Box | None) -> Box:
    if box is None:
        raise refused("sealed hops are between members of this site's roster: give --roster, --identity")
    return box
