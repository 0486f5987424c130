"""How an answer is put into numbers for a secure sum, and how their sum is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedkit.aggregation import Mean, Total
from fedkit.config import Privacy
from fedkit.crypto import bfv, ckks
from fedkit.crypto.chunks import Scheme
from fedkit.crypto.ring import FULL_WEIGHT, FixedPoint, Floats, Integers, Reals, Ring, Words, weight_of
from fedkit.errors import ConfigError, PayloadError, Reason, Refused, SumSpoiled
from fedkit.rounds.noise import LEAST_RATE, SharedNoise
from fedkit.weights import Entry, Manifest, Vector, Weights
from fedkit.work import Answer, MetricSums, Parts, Reply, Summary, Update

__all__ = ["Layout", "Secrecy", "Secret", "words_manifest"]

Secrecy: TypeAlias = Literal["masked", "bfv", "ckks"]

_MOST_BITS = 24  # as many as float32 holds
_CKKS_BITS = 16  # of the whole numbers beside a CKKS mean: few enough that its error never moves one
_EXACT = 3  # of a mean: loss times rows, rows with a loss, all rows
_TAIL = 11  # standard deviations, beyond which noise of so large a rate is with a probability below 2^-78


def words_manifest(words: int) -> Manifest:
    """What a vector of so many 32-bit words is announced as."""
    return Manifest((Entry("words", (words,)),))


@dataclass(frozen=True, slots=True)
class Secret:
    """How a run adds answers up so that nobody sees one alone; `bits` None: as many as the cohort leaves room for."""

    scheme: Secrecy
    clip: float
    bits: int | None = None

    @classmethod
    def of(cls, privacy: Privacy) -> Secret | None:
        """How a run with this privacy does; None where answers are plain."""
        kind = privacy.aggregation
        return None if kind is None or kind == "plain" else cls(kind, privacy.clip, privacy.bits)

    def mean(self, size: int, cohort: int, cap: int, extras: tuple[tuple[str, int], ...] = ()) -> Layout:
        """The layout of the updates of at most so many; raises `ConfigError` where they do not fit."""
        return Layout("mean", size, cohort, self.clip, self._bits(cohort), cap, extras, self.scheme)

    def sums(self, kind: Literal["integers", "reals"], size: int, cohort: int) -> Layout:
        """The layout of sums of at most so many."""
        return Layout(kind, size, cohort, bits=self._bits(cohort), scheme=self.scheme)

    def _bits(self, cohort: int) -> int:
        if self.scheme == "masked":
            return self.bits or min(_MOST_BITS, 31 - max(cohort - 1, 1).bit_length())
        return self.bits or bfv.Parameters.fitting(max(cohort, 1)).bits if self.scheme == "bfv" else _CKKS_BITS


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole numbers that one answer becomes, for a sum over at most `cohort` clients.

    A "mean" is an update of `size` elements with `extras` behind it, each clipped to +-`clip`, times the client's
    weight: min(rows, cap) / cap, or 1 where `cap` is 0. Behind it are the weight, the loss and the rows. "integers" and
    "reals" are `size` sums, and the rows. `scheme` says how they are kept secret. Raises `ConfigError` where the sum
    might overflow.

    With `noise`, each client adds its part of that to the elements of its mean. There is room in the ring for eleven
    standard deviations of all parts together: beyond them (2^-40 in 2^30 elements) a sum is off, and as private.
    """

    kind: Literal["mean", "integers", "reals"]
    size: int
    cohort: int
    clip: float = 1.0
    bits: int = 20
    cap: int = 0
    extras: tuple[tuple[str, int], ...] = ()
    scheme: Secrecy = "masked"
    noise: SharedNoise | None = None

    def __post_init__(self) -> None:
        """Makes the ring, which refuses what does not fit."""
        if min(self.size, self.cap) < 0 or any(length < 0 for _, length in self.extras):
            raise PayloadError("a layout has no negative sizes")
        if self.noise is not None:
            self._require_noise(self.noise)
        _ = self._point if self.kind == "mean" else self._reals

    @property
    def _ring(self) -> Ring:
        if self.scheme == "bfv":
            return bfv.Parameters(self.cohort, self.bits).ring
        return Ring(self.cohort) if self.scheme == "masked" else Ring(self.cohort, (self.cohort << _CKKS_BITS) + 1)

    @property
    def encryption(self) -> Scheme:
        """What an encrypted sum's key is for."""
        if self.scheme == "bfv":
            return bfv.Parameters(self.cohort, self.bits).scheme
        return ckks.Parameters(self.cohort).scheme

    @property
    def _point(self) -> FixedPoint:
        return FixedPoint(self._ring, self.clip, self.bits, self._spare)

    @property
    def _reals(self) -> Reals:
        return Reals(self._ring)

    @property
    def _integers(self) -> Integers:
        return Integers(self._ring)

    @property
    def _values(self) -> int:
        return self.size + sum(length for _, length in self.extras)

    @property
    def words(self) -> int:
        """How many words an answer becomes."""
        limbs = self._integers.limbs
        return self._values + 1 + limbs * _EXACT if self.kind == "mean" else limbs * (self.size + 1)

    @property
    def sent(self) -> int:
        """How many words of 32 bits one client sends."""
        return self.words if self.scheme == "masked" else self.encryption.words_of_upload(self.words)

    @property
    def opened(self) -> int:
        """How many words of 32 bits an encrypted sum has, once it is decrypted."""
        return self.words * (2 if self.scheme == "ckks" else 1)

    # -- noise in parts ------------------------------------------------------------------------------------------------

    def _require_noise(self, noise: SharedNoise) -> None:
        if (self.kind, self.scheme, self.extras, self.cap) != ("mean", "masked", (), 0):
            raise PayloadError("noise in parts goes on a masked mean without extras, of clients of one weight")
        noise.require(self.cohort)
        if not noise.multiplier * self._unit(noise) <= self._ring.largest:
            raise ConfigError(f"noise of {noise.multiplier:g} clips does not fit the ring: take fewer bits")
        if self.noise_rate < LEAST_RATE:
            text = f"noise of {noise.multiplier:g} clips is finer than {self.bits} bits tell: take more bits"
            raise ConfigError(text)

    def _unit(self, noise: SharedNoise) -> float:
        """How many steps of the ring a clip is long."""
        return noise.norm / FixedPoint(self._ring, self.clip, self.bits).step

    @property
    def least(self) -> int:
        """How many clients' vectors a sum must hold to be opened: with noise in parts, all but those who may drop."""
        return 0 if self.noise is None else self.cohort - self.noise.dropouts

    @property
    def parts(self) -> Parts | None:
        """Whose noise it takes, in steps of the ring."""
        if self.noise is None:
            return None
        return Parts(self.cohort, self.noise.dropouts, self.noise.colluders, self._unit(self.noise), self.size)

    @property
    def noise_rate(self) -> int:
        """Each client's noise is the difference of two Poisson numbers of this rate, rounded up.

        A difference has a variance of twice its rate, and the parts that count have (multiplier * unit)² in all.
        """
        parts = self.parts
        if self.noise is None or parts is None:
            return 0
        return math.ceil((self.noise.multiplier * parts.unit) ** 2 / (2 * parts.honest))

    @property
    def _spare(self) -> int:
        """Room in the ring for the noise of all clients together."""
        return math.ceil(_TAIL * math.sqrt(2.0 * self.noise_rate * self.cohort))

    def error_bound(self, clients: int, weight: int) -> float:
        """How far an element of the mean over `clients` may be off, whose weights in 1/4096 add up to `weight`."""
        return self._point.error_bound(clients, weight)

    # -- at a client ---------------------------------------------------------------------------------------------------

    def encode(self, answer: Answer, noise: npt.NDArray[np.int64] | None = None) -> Words:
        """One client's words; raises `Refused` for an answer of another shape, or one that does not fit.

        `noise` is this client's part, `size` whole numbers of `noise_rate`, where the layout asks for it.
        """
        rows = np.array([answer.examples], dtype=np.int64)
        if (0 if noise is None else noise.size) != (0 if self.noise is None else self.size):
            raise ConfigError("a part of the noise goes with a layout that asks for it, one number an element")
        if isinstance(answer, Update):
            words = self._encode_mean(answer, rows)
            if noise is not None:
                words[: self.size] += self._ring.words(noise)
            return words
        is_summary = isinstance(answer, Summary) and answer.vector.dtype == np.int64 and self.kind == "integers"
        is_scores = isinstance(answer, MetricSums) and self.kind == "reals"
        if isinstance(answer, Reply) or not (is_summary or is_scores) or answer.vector.shape != (self.size,):
            raise Refused(Reason.SHAPE, f"the answer is not {self.size} {self.kind}")
        if is_summary:
            return self._integers.encode(np.concatenate([answer.vector.astype(np.int64), rows]))
        return np.concatenate([self._reals.encode(answer.vector.astype(np.float64)), self._integers.encode(rows)])

    def _encode_mean(self, update: Update, rows: Any) -> Words:
        if self.kind != "mean" or (update.weights.manifest.size, tuple(sorted(update.sizes.items()))) != (
            self.size,
            self.extras,
        ):
            raise Refused(Reason.SHAPE, f"the update brings the vectors {update.sizes}, expected {dict(self.extras)}")
        words = np.empty(self.words, dtype=np.uint32)
        self._point.encode(self._vector(update), self._weight(update), words[: self._values + 1])
        known = (0.0, 0.0) if update.loss is None else (update.loss * update.examples, float(update.examples))
        limbs = self._integers.limbs
        words[self._values + 1 : -limbs] = self._reals.encode(np.array(known))
        words[-limbs:] = self._integers.encode(rows)
        return words

    def floats(self, answer: Answer) -> Floats:
        """One client's words for CKKS, within +-1: a mean's values as they are, whole numbers scaled down.

        Raises `Refused` as `encode` does.
        """
        found = self.encode(answer) / (1 << _CKKS_BITS)
        if isinstance(answer, Update):
            values = ckks.Clipped(self.clip).encode(self._vector(answer), self._weight(answer))
            found[: self._values + 1] = values
        return found

    def _vector(self, update: Update) -> Vector:
        vector = update.weights.vector
        return np.concatenate([vector, *(update.extra[name] for name, _ in self.extras)]) if self.extras else vector

    def _weight(self, update: Update) -> int:
        return weight_of(update.examples, self.cap) if self.cap else FULL_WEIGHT

    # -- at the coordinator --------------------------------------------------------------------------------------------

    def mean(self, opened: Words, clients: tuple[str, ...], manifest: Manifest) -> Mean:
        """The mean from the opened sum of these clients' words; raises `SumSpoiled` for what is none."""
        limbs, out = self._integers.limbs, np.empty(self._values, dtype=np.float32)
        total = self._whole(opened, len(clients))
        if self.scheme == "ckks":
            ckks.Clipped(self.clip).decode(opened.view(np.float64)[: self._values + 1], len(clients), out)
        else:
            self._point.decode(total[: self._values + 1], len(clients), out)
        losses, counted = self._reals.decode(total[self._values + 1 : -limbs], len(clients))
        [rows] = self._integers.decode(total[-limbs:], len(clients))
        extra: dict[str, Vector] = {}
        start = self.size
        for name, length in self.extras:
            extra[name] = out[start : start + length]
            start += length
        loss = float(losses / counted) if counted else None
        return Mean(Weights(manifest, out[: self.size]), int(rows), clients, loss, extra)

    def sums(self, opened: Words, clients: tuple[str, ...]) -> Total:
        """The sums from the opened sum of these clients' words; raises `SumSpoiled` for what is none."""
        total = self._whole(opened, len(clients))
        if self.kind == "integers":
            whole = self._integers.decode(total, len(clients))
            return Total(whole[:-1], int(whole[-1]), clients)
        limbs = self._integers.limbs
        [rows] = self._integers.decode(total[-limbs:], len(clients))
        return Total(self._reals.decode(total[:-limbs], len(clients)), int(rows), clients)

    def _whole(self, opened: Words, clients: int) -> Words:
        """The whole numbers in an opened sum: of CKKS, rounded to what they must have been, a mean's values as 0."""
        if self.scheme != "ckks":
            return opened
        scaled = opened.view(np.float64) * (1 << _CKKS_BITS)
        scaled[: self._values + 1 if self.kind == "mean" else 0] = 0
        if not np.abs(scaled).max(initial=0) <= clients << _CKKS_BITS:
            raise SumSpoiled(f"the numbers of {clients} clients add up to more than they can")
        return np.abs(np.rint(scaled)).astype(np.uint32)

    # -- as it travels -------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The layout as text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """What `to_json` wrote; raises `PayloadError` for anything else."""
        try:
            fields = json.loads(text)
            extras = tuple((str(name), int(length)) for name, length in fields.pop("extras"))
            checked = {name: kind(fields.pop(name)) for name, kind in _FIELDS.items()}
            noise = SharedNoise.from_dict(fields.pop("noise"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PayloadError(f"not a layout: {type(error).__name__}") from None
        known = checked["kind"] in ("mean", "integers", "reals") and checked["scheme"] in ("masked", "bfv", "ckks")
        if fields or not known:
            raise PayloadError("not a layout")
        return cls(**checked, extras=extras, noise=noise)


_FIELDS: Mapping[str, type] = {
    "kind": str,
    "size": int,
    "cohort": int,
    "clip": float,
    "bits": int,
    "cap": int,
    "scheme": str,
}
