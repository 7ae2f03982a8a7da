"""Where TMA puts the rows of a stage in shared memory, for warps that read or write them there."""

from dataclasses import dataclass

ROWS = 8  # of an atom of the swizzle
CHUNK = 16  # bytes
COLUMNS = 32 // ROWS  # chunks of a row that a warp copies at a time


@dataclass(frozen=True)
class RowLayout:
    """hopper_helpers' swizzled layouts of rows of bytes, of either major mode.

    Column blocks of 128, 64 or 32 bytes, each of them row after row; the chunks of a row are
    permuted by the address: its bits 4 to 6 (5, 4) are xor-ed with bits 7 to 9 (8, 7).
    """

    rows: int
    width: int  # bytes of a row

    @property
    def span(self) -> int:
        """Bytes of a row in a column block."""
        return next(span for span in (128, 64, 32) if self.width % span == 0)

    @property
    def bytes(self) -> int:
        return self.rows * self.width

    def within(self, row, byte):
        """Offset in a column block of a byte of one of its rows."""
        offset = row * self.span + byte
        return offset ^ (offset >> 3 & self.span - CHUNK)

    def first(self, row, chunk):
        """Offset of a chunk below COLUMNS of a row below ROWS."""
        chunks = self.span // CHUNK
        block = chunk // chunks * (self.rows * self.span)
        return block + self.within(row, chunk % chunks * CHUNK)

    def later(self, first, row: int, chunk: int):
        """Of the chunk so many rows and chunks on: multiples of ROWS and of COLUMNS."""
        block, inside = divmod(chunk * CHUNK, self.span)
        return (first ^ inside) + (block * self.rows + row) * self.span
