"""Parsing nvdisasm's text."""

import pytest

from fa3.inspect import sass
from fa3.inspect.sass import Control, Instruction

from .listings import program

# A kernel of three instructions as nvdisasm -hex prints it. Control words, bits 105 to 125: stall 2
# and no barriers; stall 1, write barrier 0; stall 5, waits for scoreboards 0 and 2.
HEX = """
	.section	.text.first,"ax",@progbits
	.align	128
.text.first:
        /*0000*/                   FADD R0, R1, R2 ;                  /* 0x0000000201007221 */
                                                                      /* 0x000fc40000000000 */
        /*0010*/              @!P3 MUFU.EX2 R4, R0 ;                  /* 0x0000000000047308 */
                                                                      /* 0x000e220000000000 */
.L_x_0:
        /*0020*/                   STL [R1+0x40], R5 (*"SpillRefill"*);  /* 0x0000400501007387 */
                                                                      /* 0x005fea0000000000 */
.L_x_1:
	.section	.nv.shared.first,"aw",@nobits
        /*0030*/                   FADD R0, R1, R2 ;
	.section	.text.second,"ax",@progbits
.text.second:
        /*0000*/                   EXIT ;                             /* 0x000000000000794d */
                                                                      /* 0x000fea0003800000 */
"""  # noqa: E501


def test_parse_reads_instructions_labels_notes_and_control_bits():
    first, second = sass.parse(HEX)
    assert (first.name, second.name) == ("first", "second")
    assert first.labels == {".L_x_0": 2, ".L_x_1": 3}
    assert first.code == (
        Instruction(0, "", "FADD", "R0, R1, R2", Control(stall=2)),
        Instruction(16, "@!P3", "MUFU.EX2", "R4, R0", Control(stall=1, write_barrier=0)),
        Instruction(
            32, "", "STL", "[R1+0x40], R5", Control(stall=5, wait=0b101), note="SpillRefill"
        ),
    )
    assert second.code == (Instruction(0, "", "EXIT", "", Control(stall=5)),)


def test_text_shows_labels_control_and_instruction():
    first, _ = sass.parse(HEX)
    assert first.text.splitlines() == [
        "first:",
        "  /*0000*/  2 -- 000000  FADD R0, R1, R2",
        "  /*0010*/  1 0- 000000  @!P3 MUFU.EX2 R4, R0",
        ".L_x_0:",
        "  /*0020*/  5 -- 000101  STL [R1+0x40], R5",
    ]


def test_target_is_the_position_of_the_label():
    code = program("BRA ->end\n FADD R0, R1, R2\n end:\n EXIT")
    assert code.target(0) == 2
    assert code.target(1) is None


def test_mma_shape_and_kind():
    (x,) = program("HGMMA.64x176x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT").code
    assert x.is_mma
    assert not x.is_exp2
    assert x.mma_shape == (64, 176, 16)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("STL [R1], R0", 4),
        ("STL.64 [R1], R2", 8),
        ("LDL.LU.64 R2, [R1]", 8),
        ("LDL.128 R4, [R1+0x10]", 16),
        ("LDL.U8 R4, [R1+0x10]", 1),
        ("STL.U16 [R1], R4", 2),
    ],
)
def test_bytes_of_an_access(text, size):
    (x,) = program(text).code
    assert x.bytes == size


def test_a_missing_disassembler_says_what_to_install(monkeypatch):
    monkeypatch.delenv("NVDISASM", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sass, "PACKAGE", "a-package-that-is-not-there")
    with pytest.raises(sass.DisassemblerMissing, match=r"pip install 'fa3\[inspect\]'"):
        sass.nvdisasm()


def test_a_wrong_nvdisasm_variable_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NVDISASM", str(tmp_path / "nvdisasm"))
    with pytest.raises(sass.DisassemblerMissing, match="NVDISASM=.* is no executable file"):
        sass.nvdisasm()


def test_an_image_that_nvdisasm_refuses():
    with pytest.raises(ValueError, match="nvdisasm failed with"):
        sass.disassemble(b"\x7fELF\x02\x01 and no more")
