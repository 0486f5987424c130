"""The one place that calls Microsoft SEAL, through TenSEAL: numbers in, numbers out.

SEAL reads and writes its objects through files only, so they pass through a file that has no name and no disk. What is
read back into SEAL was written here, header and all, from numbers that `fedkit.crypto.chunks` has checked.

TenSEAL holds the interpreter's lock, and native code that crashes takes its process along: encrypt, add and decrypt in
processes of which that is no loss, never in an agent or a coordinator.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkit.crypto.chunks import DEGREE, Full, Numbers, Scheme, Seeded
from fedkit.errors import ConfigError, PayloadError, SumSpoiled

__all__ = ["Engine", "require_library"]

_MAGIC, _HEADER = b"\x5e\xa1\x10", 16  # the last byte of the magic is the header's length
_COMPRESSION = 5  # where the header says how the rest is compressed: not at all, zlib, Zstandard
_MEMBERS = struct.Struct("<4QB3QdQ")  # parameters, whether it is transformed, polynomials, degree, primes, scale, 1
_PLAIN_MEMBERS = struct.Struct("<4QQd")  # parameters, coefficients, scale
_SEED_INFO = 16 + 1 + 64  # header, kind of generator, seed
_BLAKE2XB = 1
_NO_PARAMETERS = (0, 0, 0, 0)  # of a plaintext that is not transformed
_MOST = 1 << 18  # bytes of the largest object, unpacked


def require_library() -> None:
    """Raises `ConfigError` where TenSEAL is not installed; loads nothing."""
    missing = [name for name in ("tenseal", "zstandard") if importlib.util.find_spec(name) is None]
    if missing:
        raise _missing(f"no module named {missing[0]}")


def _library() -> tuple[Any, Any]:
    try:
        import tenseal.sealapi  # the one import of it: it takes a second, and no other aggregation needs it
        import zstandard
    except ImportError as error:
        raise _missing(str(error)) from None
    return tenseal.sealapi, zstandard


def _missing(why: str) -> ConfigError:
    return ConfigError(
        f"bfv and ckks need TenSEAL ({why}): pip install 'fedkit[he]'. There is no wheel of it for ARM Linux; there, "
        "build it from source, or use masked aggregation, which needs nothing"
    )


class _Scratch:
    """A file for SEAL to write to and read from, which nobody else can open and which ends with the process."""

    def __init__(self) -> None:
        self._file: Any = None
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("fedkit"), "w+b", buffering=0)
            self.path = f"/proc/self/fd/{self._file.fileno()}"
        if self._file is None or not Path(self.path).exists():
            self.close()
            self._file = tempfile.NamedTemporaryFile(buffering=0)  # noqa: SIM115 mode 0600, gone when closed
            self.path = self._file.name

    def write(self, data: bytes) -> None:
        self._file.truncate(len(data))
        os.pwrite(self._file.fileno(), data, 0)

    def read(self) -> bytes:
        return os.pread(self._file.fileno(), _MOST, 0)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        raise PayloadError(f"{what}: {error}") from None


class Engine:
    """SEAL, set up for one scheme. With a key it encrypts and decrypts, without one it adds.

    To be closed, or used in a `with`. Ciphertexts that it hands out are SEAL's own objects, good for its `add`, `full`,
    `decrypt` and `noise_budget` alone. Raises `ConfigError` where TenSEAL is missing, `PayloadError` for what SEAL
    refuses.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._api, zstandard = _library()
        self._inflate = (bytes, zlib.decompress, zstandard.ZstdDecompressor().decompress)
        self.scheme, self._is_bfv = scheme, scheme.name == "bfv"
        self._context = self._make_context()
        self._evaluator = self._api.Evaluator(self._context)
        self._coder = None if self._is_bfv else self._api.CKKSEncoder(self._context)
        self._scratch = _Scratch()
        self._version = self._library_version()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives up its file."""
        self._scratch.close()

    def _make_context(self) -> Any:
        api = self._api
        settings = api.EncryptionParameters(getattr(api.SCHEME_TYPE, self.scheme.name.upper()))
        settings.set_poly_modulus_degree(DEGREE)
        settings.set_coeff_modulus([api.Modulus(prime) for prime in self.scheme.key_primes])
        if self._is_bfv:
            settings.set_plain_modulus(api.Modulus(self.scheme.plain_modulus))
        context = api.SEALContext(settings, True, api.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():
            raise ConfigError(f"{self.scheme}: {context.parameters_error_message()}")
        return context

    @property
    def _residues(self) -> int:
        return len(self.scheme.primes) * DEGREE

    # -- keys ----------------------------------------------------------------------------------------------------------

    def make_key(self) -> Numbers:
        """A fresh secret key, one polynomial for each of the scheme's `key_primes`: uint64[4096 * primes]."""
        key = self._api.KeyGenerator(self._context).secret_key()
        head = self._plain_head(len(self.scheme.key_primes) * DEGREE, self._context.key_parms_id())
        found = _numbers(self._saved(key, head))
        self._scratch.write(b"")
        return found

    def use_key(self, key: Numbers) -> None:
        """Encrypts and decrypts with this secret key from now on."""
        secret = self._api.SecretKey()
        head = self._plain_head(len(self.scheme.key_primes) * DEGREE, self._context.key_parms_id())
        self._load(secret, head + key.tobytes(), "not a secret key")
        self._scratch.write(b"")
        self._encryptor = self._api.Encryptor(self._context, secret)
        self._decryptor = self._api.Decryptor(self._context, secret)

    # -- values --------------------------------------------------------------------------------------------------------

    def encrypt(self, values: npt.NDArray[Any]) -> Seeded:
        """A fresh ciphertext of `scheme.values` values.

        For BFV residues, two in each coefficient, which is all that addition needs; for CKKS float64, two in a slot.
        """
        plain, count = self._plain(values), self._residues
        with _refusing("not to be encrypted"):
            found = self._encryptor.encrypt_symmetric(plain)
        rest = self._saved(found, self._head(count), count * 8 + _SEED_INFO)
        return Seeded(rest[-64:], _numbers(rest[: count * 8]))

    def _plain(self, values: npt.NDArray[Any]) -> Any:
        plain = self._api.Plaintext()
        if self._coder is None:
            body = self._plain_head(DEGREE, _NO_PARAMETERS) + _paired(self.scheme, values).tobytes()
            self._load(plain, body, "not to be encrypted")
        else:
            with _refusing("not to be encrypted"):
                self._coder.encode(values.view(np.complex128).tolist(), self.scheme.scale, plain)
        return plain

    def decrypt(self, ciphertext: Any) -> npt.NDArray[Any]:
        """The `scheme.values` values of a sum; under another key, noise for CKKS, and `SumSpoiled` for BFV."""
        plain = self._api.Plaintext()
        with _refusing("not to be decrypted"):
            self._decryptor.decrypt(ciphertext, plain)
            if self._coder is not None:
                return np.array(self._coder.decode_complex(plain), dtype=np.complex128).view(np.float64)
        count = plain.coeff_count()  # zeros at the end are left out
        coefficients = np.zeros(DEGREE, dtype=np.uint64)
        coefficients[:count] = _numbers(self._saved(plain, self._plain_head(count, _NO_PARAMETERS), count * 8))
        return _unpaired(self.scheme, coefficients)

    def noise_budget(self, ciphertext: Any) -> int:
        """How many bits of BFV's noise are left; 0 where the ciphertext is none under this key, or is spoiled."""
        return int(self._decryptor.invariant_noise_budget(ciphertext))

    # -- ciphertexts ---------------------------------------------------------------------------------------------------

    def ciphertext(self, chunk: Seeded | Full) -> Any:
        """The chunk as SEAL's own object."""
        if isinstance(chunk, Seeded):
            info = self._header(_SEED_INFO) + bytes([_BLAKE2XB]) + chunk.seed
            body = self._head(self._residues) + chunk.first.tobytes() + info
        else:
            body = self._head(2 * self._residues) + chunk.first.tobytes() + chunk.second.tobytes()
        found = self._api.Ciphertext()
        self._load(found, body, "not a ciphertext")
        if found.size() != 2 or found.is_transparent() or not self._api.is_valid_for(found, self._context):
            raise PayloadError("not a ciphertext")
        return found

    def add(self, total: Any, other: Any) -> None:
        """Adds another ciphertext to `total`, in place."""
        with _refusing("not to be added"):
            self._evaluator.add_inplace(total, other)

    def full(self, ciphertext: Any) -> Full:
        """The ciphertext's two polynomials."""
        numbers = _numbers(self._saved(ciphertext, self._head(2 * self._residues)))
        return Full(numbers[: self._residues], numbers[self._residues :])

    # -- SEAL's format -------------------------------------------------------------------------------------------------

    def _library_version(self) -> bytes:
        self._api.Plaintext().save(self._scratch.path)
        found = self._scratch.read()
        if found[:3] != _MAGIC:
            raise ConfigError("this TenSEAL writes another format: pip install tenseal==0.3.18")
        return found[3:5]

    def _header(self, size: int) -> bytes:
        """Of an object that takes so many bytes with it, not compressed."""
        return _MAGIC + self._version + bytes(3) + size.to_bytes(8, "little")

    def _array(self, count: int) -> bytes:
        return self._header(_HEADER + 8 + 8 * count) + count.to_bytes(8, "little")

    def _head(self, count: int) -> bytes:
        """What stands before a ciphertext's `count` numbers."""
        primes = len(self.scheme.primes)
        ours = (*self._context.first_parms_id(), not self._is_bfv, 2, DEGREE, primes, self.scheme.scale, 1)
        return _MEMBERS.pack(*ours) + self._array(count)

    def _plain_head(self, count: int, parameters: Iterable[int]) -> bytes:
        return _PLAIN_MEMBERS.pack(*parameters, count, 1.0) + self._array(count)

    def _load(self, target: Any, body: bytes, refusal: str) -> None:
        self._scratch.write(self._header(_HEADER + len(body)) + body)
        with _refusing(refusal):
            target.load(self._context, self._scratch.path)

    def _saved(self, source: Any, head: bytes, size: int | None = None) -> bytes:
        """What SEAL writes for an object behind `head`, which must be as it is written here."""
        source.save(self._scratch.path)
        written = self._scratch.read()
        body: bytes = self._inflate[written[_COMPRESSION]](written[_HEADER:])
        if body[: len(head)] != head or (size is not None and len(body) != len(head) + size):
            raise ConfigError("this TenSEAL writes another format: pip install tenseal==0.3.18")
        return body[len(head) :]


def _numbers(data: bytes) -> Numbers:
    return np.frombuffer(data, dtype="<u8")


def _paired(scheme: Scheme, words: npt.NDArray[np.uint32]) -> Numbers:
    """Residues as plaintext coefficients, two in each: the signed numbers of least magnitude, a + `base` b."""
    half, base = scheme.modulus // 2, np.uint64(scheme.base)
    low, high = _below(words + np.uint32(half), scheme.modulus).reshape(2, DEGREE)  # from 0 on, whatever the signs
    numbers: Numbers = high.astype(np.uint64) * base + low
    return _below(numbers + np.uint64(scheme.plain_modulus - half * (scheme.base + 1)), scheme.plain_modulus)


def _below(numbers: npt.NDArray[Any], modulus: int) -> npt.NDArray[Any]:
    """Unsigned numbers below twice the modulus, modulo it: a difference below 0 wraps around, and is the larger one."""
    found: npt.NDArray[Any] = np.minimum(numbers, numbers - numbers.dtype.type(modulus))
    return found


def _unpaired(scheme: Scheme, coefficients: Numbers) -> npt.NDArray[np.uint32]:
    """The residues of a sum of such pairs; raises `SumSpoiled` where it is none."""
    half, base = scheme.modulus // 2, scheme.base
    shifted = _below(coefficients + np.uint64(half * (base + 1)), scheme.plain_modulus)  # as `_paired` had them
    high, low = np.divmod(shifted, np.uint64(base))
    both = np.concatenate([low, high])
    if int(both.max()) >= half + scheme.modulus:
        raise SumSpoiled("an encrypted sum is spoiled, or it is of another key")
    return _below(both + np.uint64(scheme.modulus - half), scheme.modulus).astype(np.uint32)
