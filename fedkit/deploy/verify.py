"""Whether a bundle is what its signer handed over: every byte, every file, and what the files compute.

Nothing of a file is parsed as a network or run before the signature over its digest holds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from fedkit.deploy import onnxfile, runtime
from fedkit.deploy.folders import read_file
from fedkit.deploy.passport import Passport
from fedkit.deploy.probe import Probe, apart
from fedkit.deploy.signer import require_public, signer_of
from fedkit.errors import ConfigError, ExportError, FedkitError, PayloadError, TrustError
from fedkit.exam import Variant

__all__ = [
    "FP32",
    "MODELS",
    "PLOTS",
    "Check",
    "Examination",
    "Verified",
    "looks_like_a_bundle",
    "stamp_of",
    "verify_bundle",
]

FP32 = "model.onnx"
MODELS: Mapping[Variant, str] = {
    "fp32": FP32,
    "int8": "model.int8.onnx",
    "int8-dynamic": "model.int8.onnx",
    "fp16": "model.fp16.onnx",
}
PLOTS = ("learning.png", "clients.png", "variants.png")
_SEALS = ("passport.json", "SIGNATURE")
_NEEDED = ("card.md", "parity.json")
_PASSPORT_BYTES, _SIGNATURE_BYTES = 64 << 20, 4096

Step: TypeAlias = Callable[[], str]


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it is of, what it found in words, and the error where it failed.

    It is not `tried` where one that it rests on has failed.
    """

    name: str
    detail: str
    error: FedkitError | None = None
    tried: bool = True

    @property
    def passed(self) -> bool:
        """Whether it was tried and nothing is wrong."""
        return self.tried and self.error is None

    @property
    def result(self) -> Literal["ok", "failed", "not tried"]:
        """How it ended, in a word."""
        if not self.tried:
            return "not tried"
        return "ok" if self.error is None else "failed"


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle that has passed every check: its passport, who signed it (hexadecimal), its networks by file name."""

    folder: Path
    passport: Passport
    signer: str
    checks: tuple[Check, ...] = field(repr=False)
    models: Mapping[str, bytes] = field(repr=False)

    @property
    def shipped(self) -> bytes:
        """The network that is to be deployed."""
        return self.models[MODELS[self.passport.shipped]]


class _NotTried(Exception):
    """A check rests on another one that has failed."""


class Examination:
    """All checks of the bundle in a folder, in order; `signer` is who must have signed it, where that is known.

    Raises `ConfigError` for a signer that is none, or where there is no folder.
    """

    def __init__(self, folder: Path | str, signer: str | None = None) -> None:
        self.folder = Path(folder)
        self.passport: Passport | None = None
        self.signer: str | None = None
        self._expected = None if signer is None else require_public(signer)
        self._sealed = b""
        self._intact: dict[str, bytes] = {}
        self._sound: set[str] = set()
        self._outputs: dict[str, dict[str, runtime.Array]] = {}
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is no folder: name one that fedkit export wrote")

    def checks(self) -> Iterator[Check]:
        """One check after the other; those that rest on a failed one are not tried."""
        for name, step in self._steps():
            try:
                yield Check(name, step())
            except FedkitError as error:
                yield Check(name, str(error), error)
            except _NotTried as reason:
                yield Check(name, str(reason), tried=False)

    def verified(self, checks: tuple[Check, ...]) -> Verified:
        """The bundle, once all of `checks` have passed."""
        if self.passport is None or self.signer is None or not all(check.passed for check in checks):
            raise TrustError(f"{self.folder} has not passed every check")
        models = {name: content for name, content in self._intact.items() if name.endswith(".onnx")}
        return Verified(self.folder, self.passport, self.signer, checks, models)

    def _steps(self) -> Iterator[tuple[str, Step]]:
        yield "passport.json", self._read
        yield "SIGNATURE", self._signature
        yield "files", self._names
        names = sorted(self.passport.files) if self.passport else []
        for name in names:
            yield name, functools.partial(self._digest, name)
        models = [name for name in names if name in MODELS.values()]
        for name in models:
            yield f"{name}: network", functools.partial(self._network, name)
            yield f"{name}: metadata", functools.partial(self._metadata, name)
        yield f"{FP32}: parity", self._parity
        for name in models:
            if name != FP32:
                yield f"{name}: probe", functools.partial(self._nearness, name)

    def _read(self) -> str:
        path = self.folder / "passport.json"
        self._sealed = read_file(path, _PASSPORT_BYTES)
        try:
            self.passport = Passport.from_json(self._sealed.decode())
        except UnicodeDecodeError:
            raise PayloadError(f"{path} is not text") from None
        except FedkitError as error:
            raise type(error)(f"{path}: {error}") from None
        return f"run {self.passport.run.name}, {self.passport.created}"

    def _signature(self) -> str:
        path = self.folder / "SIGNATURE"
        signature = read_file(path, _SIGNATURE_BYTES)
        if not self._sealed:
            raise _NotTried("there is no passport")
        try:
            found = signer_of(self._sealed, signature)
        except TrustError as error:
            raise TrustError(f"{path}: {error}") from None
        if self._expected not in (None, found):
            raise TrustError(f"{path}: signed by {found}, and not by {self._expected}")
        self.signer = found
        return "over every byte of passport.json" + (", by the expected signer" if self._expected else "")

    def _names(self) -> str:
        passport = self._passport()
        shipped = MODELS[passport.shipped]
        needed, known = {FP32, shipped, *_NEEDED}, {FP32, shipped, *_NEEDED, *PLOTS}
        listed = set(passport.files)
        if needed - listed or listed - known:
            names = ", ".join(sorted(needed - listed | listed - known))
            raise PayloadError(f"{self.folder / 'passport.json'} lists other files than a bundle has: {names:.200}")
        found = {path.name for path in self.folder.iterdir()}
        wrong = sorted({*listed, *_SEALS} ^ found)
        if wrong:
            what = ", ".join(f"{name!r:.100} is {'not listed' if name in found else 'missing'}" for name in wrong[:5])
            raise TrustError(f"{self.folder}: {what}")
        return f"all {len(found)} there, and no other"

    def _digest(self, name: str) -> str:
        facts, path = self._passport().files[name], self.folder / name
        if name not in (*MODELS.values(), *_NEEDED, *PLOTS):
            raise _NotTried("no bundle has such a file")
        content = read_file(path, facts.size_bytes)
        if len(content) != facts.size_bytes or hashlib.sha256(content).hexdigest() != facts.sha256:
            raise TrustError(f"{path} is not the file that was signed: its bytes were changed")
        if name not in PLOTS:
            self._intact[name] = content
        return f"{facts.size_bytes:,} bytes, sha256 {facts.sha256[:16]}..."

    def _network(self, name: str) -> str:
        content = self._vouched(name)
        try:
            operators = onnxfile.check(content, self._passport().task)
        except PayloadError as error:
            raise PayloadError(f"{self.folder / name}: {error}") from None
        self._sound.add(name)
        return f"{operators} operators, self-contained, inputs and outputs are the passport's"

    def _metadata(self, name: str) -> str:
        passport = self._passport()
        if name not in self._sound:
            raise _NotTried("it is no network that could be read")
        variant = "fp32" if name == FP32 else passport.shipped
        if onnxfile.stamp(self._vouched(name)) != stamp_of(passport, variant):
            raise TrustError(f"{self.folder / name}: its metadata says something else than the passport")
        return "the same facts as the passport"

    def _parity(self) -> str:
        probe, allowed = self._probe(), self._passport().parity.allowed
        far = probe.apart(self._run(FP32, probe))
        if not far <= allowed:
            raise ExportError(
                f"{self.folder / FP32}: ONNX Runtime is {far:.1e} from PyTorch here, {allowed:.0e} is allowed"
            )
        return f"{far:.1e} from PyTorch, {allowed:.0e} is allowed"

    def _nearness(self, name: str) -> str:
        probe = self._probe()
        if name not in probe.variants:
            raise PayloadError(f"{self.folder / 'parity.json'} does not say how far {name} may be from float32")
        far, allowed = apart(self._run(name, probe), self._run(FP32, probe)), probe.variants[name].allowed
        if not far <= allowed:
            raise ExportError(f"{self.folder / name}: it is {far:.1e} from float32 here, {allowed:.1e} is allowed")
        return f"{far:.1e} from float32, {allowed:.1e} is allowed"

    def _run(self, name: str, probe: Probe) -> dict[str, runtime.Array]:
        if name not in self._sound:
            raise _NotTried(f"{name} is no network that could be read")
        try:
            if name not in self._outputs:
                self._outputs[name] = runtime.run(runtime.session(self._vouched(name), threads=1), probe.inputs)
        except ExportError as error:
            raise ExportError(f"{self.folder / name}: {error}") from None
        return self._outputs[name]

    def _probe(self) -> Probe:
        try:
            return Probe.from_json(self._vouched("parity.json"))
        except PayloadError as error:
            raise PayloadError(f"{self.folder / 'parity.json'}: {error}") from None

    def _passport(self) -> Passport:
        if self.passport is None:
            raise _NotTried("there is no passport")
        return self.passport

    def _vouched(self, name: str) -> bytes:
        """The bytes of a file that somebody has signed, and that are those."""
        if self.signer is None:
            raise _NotTried("nobody vouches for it")
        if name not in self._intact:
            raise _NotTried(f"{name} is not the file that was signed")
        return self._intact[name]


def verify_bundle(folder: Path | str, signer: str | None = None) -> Verified:
    """The bundle in `folder`, once it has passed every check; `signer` is the public key that must have signed it.

    Raises `TrustError` for another signer, signature or digest, `PayloadError` for a file that is not what it must be,
    `ExportError` for a network that computes something else here, `ConfigError` for arguments; each names the file.
    """
    examination = Examination(folder, signer)
    checks = []
    for check in examination.checks():
        if check.error is not None:
            raise check.error
        checks.append(check)
    return examination.verified(tuple(checks))


def stamp_of(passport: Passport, variant: Variant) -> dict[str, str]:
    """What is written into the metadata of an ONNX file: the passport without its files, and a few facts for people."""
    return {
        "fedkit.passport": passport.replace(files={}).to_json(),
        "fedkit.variant": variant,
        "fedkit.task": passport.task.name,
        "fedkit.run": passport.run.name,
        "fedkit.strategy": passport.run.strategy,
        "fedkit.aggregation": passport.privacy.aggregation,
        "fedkit.created": passport.created,
        "fedkit.version": passport.versions.get("fedkit", ""),
    }


def looks_like_a_bundle(folder: Path) -> bool:
    """Whether a folder holds the files of a bundle and nothing else; not whether they are any good."""
    names = {path.name for path in folder.iterdir()}
    return set(_SEALS) <= names <= {*_SEALS, *_NEEDED, *PLOTS, *MODELS.values()}
