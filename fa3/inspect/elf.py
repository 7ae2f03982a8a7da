"""The little of ELF that a cubin needs: its sections, its symbols' names and its SM version."""

import struct
from dataclasses import dataclass

EM_CUDA = 190
ABI_VERSION = 8  # the byte of the header; 7 is CUDA 12's, 8 CUDA 13's
SHT_SYMTAB, SHT_NOBITS = 2, 8
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")


@dataclass(frozen=True)
class Section:
    name: str
    size: int  # bytes; of memory where the file holds none (shared memory)
    data: bytes


@dataclass(frozen=True)
class Cubin:
    """A compiled image for one architecture."""

    sm: int  # 90 for sm_90 and sm_90a
    sections: tuple[Section, ...]
    symbols: tuple[str, ...]  # by symbol index

    @classmethod
    def parse(cls, image: bytes) -> "Cubin":
        """Raises ValueError when `image` is not a 64-bit little-endian CUDA ELF image."""
        if image[:6] != b"\x7fELF\x02\x01" or len(image) < HEADER.size:
            raise ValueError(
                f"not a cubin: {len(image)} bytes that start with {image[:6].hex(' ')}"
            )
        _, _, machine, *_, table, flags, _, _, _, _, count, names = HEADER.unpack_from(image)
        if machine != EM_CUDA:
            raise ValueError(f"not a cubin: ELF machine {machine}, CUDA is {EM_CUDA}")
        try:
            headers = [SECTION.unpack_from(image, table + i * SECTION.size) for i in range(count)]
            strings = _content(image, headers[names])
            sections = tuple(
                Section(_string(strings, h[0]), h[5], _content(image, h)) for h in headers
            )
            sm = (flags if image[ABI_VERSION] < 8 else flags >> 8) & 0xFF
            return cls(sm, sections, tuple(_symbols(image, headers)))
        except (struct.error, IndexError) as error:
            raise ValueError(f"damaged cubin of {len(image)} bytes: {error}") from error

    def section(self, name: str) -> Section | None:
        return next((s for s in self.sections if s.name == name), None)

    def kernels(self) -> list[str]:
        """Names of the entry points and device functions."""
        prefix = ".text."
        return [s.name[len(prefix) :] for s in self.sections if s.name.startswith(prefix)]


def _content(image: bytes, header: tuple) -> bytes:
    kind, offset, size = header[1], header[4], header[5]
    if kind == SHT_NOBITS:
        return b""
    if offset + size > len(image):
        raise struct.error(f"a section ends at {offset + size}")
    return image[offset : offset + size]


def _string(strings: bytes, start: int) -> str:
    return strings[start : strings.index(0, start)].decode()


def _symbols(image: bytes, headers: list[tuple]):
    for header in headers:
        if header[1] == SHT_SYMTAB:
            strings = _content(image, headers[header[6]])
            for entry in SYMBOL.iter_unpack(_content(image, header)):
                yield _string(strings, entry[0])
