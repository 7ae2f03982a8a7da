"""Which PTX a loaded device image was assembled from.

The emulator runs PTX, but host code loads a cubin (inside a fatbin).  Each
compilation reports its pair, and an image is recognised by the cubin in it.
Kernel names would not do: different specialisations share a name.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

_ELF = b"\x7fELF"


def _elf_size(blob: bytes, at: int) -> int:
    """Bytes of the ELF file at an offset: up to the end of its last header table."""
    programs, sections = struct.unpack_from("<QQ", blob, at + 0x20)
    program_size, num_programs, section_size, num_sections = struct.unpack_from(
        "<4H", blob, at + 0x36
    )
    return max(programs + program_size * num_programs, sections + section_size * num_sections)


def _digests(image: bytes):
    """A digest of each ELF file inside an image."""
    at = image.find(_ELF)
    while at >= 0:
        if at + 0x40 <= len(image):
            yield hashlib.sha256(image[at : at + _elf_size(image, at)]).digest()
        at = image.find(_ELF, at + 4)


class Images:
    def __init__(self):
        self._ptx: dict[bytes, bytes] = {}  # digest of a cubin -> deflated PTX

    def remember(self, cubin: bytes, ptx: str) -> None:
        for digest in _digests(cubin):
            self._ptx[digest] = zlib.compress(ptx.encode(), 1)

    def find(self, image: bytes) -> str | None:
        """The PTX of the cubin inside an image, None if it was never remembered."""
        for digest in _digests(image):
            if digest in self._ptx:
                return zlib.decompress(self._ptx[digest]).decode()
        return None
