//! A small assembler of BPF instructions, with labels. Names and encodings are those of the kernel's
//! Documentation/bpf/standardization/instruction-set.rst.

use std::collections::HashMap;

/// One instruction as the kernel takes it (`struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Insn {
    code: u8,
    /// Destination in the low, source in the high four bits (little endian; see `regs`).
    regs: u8,
    off: i16,
    imm: i32,
}

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reg {
    /// Return value.
    R0,
    /// First argument, clobbered by calls.
    R1,
    /// Second argument, clobbered by calls.
    R2,
    /// Third argument, clobbered by calls.
    R3,
    /// Kept across calls.
    R6 = 6,
    /// Kept across calls.
    R7,
    /// Kept across calls.
    R8,
    /// Frame pointer, read only.
    R10 = 10,
}

/// A kernel helper, by its number in `enum bpf_func_id`.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(super) enum Helper {
    MapLookupElem = 1,
    GetCurrentPidTgid = 14,
    /// Since Linux 5.5.
    ProbeReadKernel = 113,
    GetCurrentAncestorCgroupId = 123,
    /// Since Linux 5.7.
    SeqWrite = 127,
    /// Since Linux 5.18.
    GetRetval = 186,
    /// Since Linux 5.18.
    SetRetval = 187,
}

/// A place to jump to.
pub(super) type Label = &'static str;

const LDX_W: u8 = 0x61;
const LDX_H: u8 = 0x69;
const LDX_DW: u8 = 0x79;
const STX_W: u8 = 0x63;
const STX_DW: u8 = 0x7b;
const MOV64_X: u8 = 0xbf;
const MOV64_K: u8 = 0xb7;
const ADD64_K: u8 = 0x07;
const MOV32_X: u8 = 0xbc;
const AND32_K: u8 = 0x54;
const AND32_X: u8 = 0x5c;
const XOR32_K: u8 = 0xa4;
const RSH32_K: u8 = 0x74;
const RSH64_K: u8 = 0x77;
const JA: u8 = 0x05;
const JEQ_K: u8 = 0x15;
const JEQ_X: u8 = 0x1d;
const JNE_K: u8 = 0x55;
const JNE32_K: u8 = 0x56;
const JEQ32_K: u8 = 0x16;
const JSET32_K: u8 = 0x46;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const LD_IMM64: u8 = 0x18;
/// Source register of `LD_IMM64` that makes its immediate a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

/// A program in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    insns: Vec<Insn>,
    labels: HashMap<Label, usize>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn push(&mut self, code: u8, dst: u8, src: u8, off: i16, imm: i32) -> &mut Self {
        let regs = if cfg!(target_endian = "little") { dst | src << 4 } else { dst << 4 | src };
        self.insns.push(Insn { code, regs, off, imm });
        self
    }

    fn jump(&mut self, code: u8, dst: Reg, imm: i32, to: Label) -> &mut Self {
        self.jumps.push((self.insns.len(), to));
        self.push(code, dst as u8, 0, 0, imm)
    }

    /// The next instruction is `label`.
    pub(super) fn label(&mut self, label: Label) -> &mut Self {
        self.labels.insert(label, self.insns.len());
        self
    }
    /// dst = src
    pub(super) fn mov(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.push(MOV64_X, dst as u8, src as u8, 0, 0)
    }
    /// dst = imm
    pub(super) fn mov_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.push(MOV64_K, dst as u8, 0, 0, imm)
    }
    /// dst += imm
    pub(super) fn add_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.push(ADD64_K, dst as u8, 0, 0, imm)
    }
    /// dst = (u32) src
    pub(super) fn mov32(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.push(MOV32_X, dst as u8, src as u8, 0, 0)
    }
    /// dst = (u32) dst & imm
    pub(super) fn and32_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.push(AND32_K, dst as u8, 0, 0, imm)
    }
    /// dst = (u32) dst & src
    pub(super) fn and32(&mut self, dst: Reg, src: Reg) -> &mut Self {
        self.push(AND32_X, dst as u8, src as u8, 0, 0)
    }
    /// dst = !(u32) dst
    pub(super) fn not32(&mut self, dst: Reg) -> &mut Self {
        self.push(XOR32_K, dst as u8, 0, 0, -1)
    }
    /// dst = (u32) dst >> imm
    pub(super) fn shr32_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.push(RSH32_K, dst as u8, 0, 0, imm)
    }
    /// dst = dst >> imm
    pub(super) fn shr_imm(&mut self, dst: Reg, imm: i32) -> &mut Self {
        self.push(RSH64_K, dst as u8, 0, 0, imm)
    }
    /// dst = *(u16 *)(src + off)
    pub(super) fn load16(&mut self, dst: Reg, src: Reg, off: i16) -> &mut Self {
        self.push(LDX_H, dst as u8, src as u8, off, 0)
    }
    /// dst = *(u64 *)(src + off)
    pub(super) fn load64(&mut self, dst: Reg, src: Reg, off: i16) -> &mut Self {
        self.push(LDX_DW, dst as u8, src as u8, off, 0)
    }
    /// dst = *(u32 *)(src + off)
    pub(super) fn load32(&mut self, dst: Reg, src: Reg, off: i16) -> &mut Self {
        self.push(LDX_W, dst as u8, src as u8, off, 0)
    }
    /// *(u32 *)(dst + off) = src
    pub(super) fn store32(&mut self, dst: Reg, off: i16, src: Reg) -> &mut Self {
        self.push(STX_W, dst as u8, src as u8, off, 0)
    }
    /// *(u64 *)(dst + off) = src
    pub(super) fn store64(&mut self, dst: Reg, off: i16, src: Reg) -> &mut Self {
        self.push(STX_DW, dst as u8, src as u8, off, 0)
    }
    /// dst = the map behind descriptor `fd`
    pub(super) fn load_map(&mut self, dst: Reg, fd: i32) -> &mut Self {
        self.push(LD_IMM64, dst as u8, PSEUDO_MAP_FD, 0, fd).push(0, 0, 0, 0, 0)
    }
    /// r0 = helper(r1, r2, ...)
    pub(super) fn call(&mut self, helper: Helper) -> &mut Self {
        self.push(CALL, 0, 0, 0, helper as i32)
    }
    /// return r0
    pub(super) fn exit(&mut self) -> &mut Self {
        self.push(EXIT, 0, 0, 0, 0)
    }
    /// goto to
    pub(super) fn goto(&mut self, to: Label) -> &mut Self {
        self.jump(JA, Reg::R0, 0, to)
    }
    /// if (dst == imm) goto to
    pub(super) fn if_eq(&mut self, dst: Reg, imm: i32, to: Label) -> &mut Self {
        self.jump(JEQ_K, dst, imm, to)
    }
    /// if (dst == src) goto to
    pub(super) fn if_same(&mut self, dst: Reg, src: Reg, to: Label) -> &mut Self {
        self.jumps.push((self.insns.len(), to));
        self.push(JEQ_X, dst as u8, src as u8, 0, 0)
    }
    /// if (dst != imm) goto to
    pub(super) fn if_ne(&mut self, dst: Reg, imm: i32, to: Label) -> &mut Self {
        self.jump(JNE_K, dst, imm, to)
    }
    /// if ((u32) dst == imm) goto to
    pub(super) fn if_eq32(&mut self, dst: Reg, imm: i32, to: Label) -> &mut Self {
        self.jump(JEQ32_K, dst, imm, to)
    }
    /// if ((u32) dst != imm) goto to
    pub(super) fn if_ne32(&mut self, dst: Reg, imm: i32, to: Label) -> &mut Self {
        self.jump(JNE32_K, dst, imm, to)
    }
    /// if ((u32) dst & imm) goto to
    pub(super) fn if_any32(&mut self, dst: Reg, imm: i32, to: Label) -> &mut Self {
        self.jump(JSET32_K, dst, imm, to)
    }

    /// The finished program. `None` when a label is missing or too far away: a bug in the caller.
    pub(super) fn finish(mut self) -> Option<Vec<Insn>> {
        for (at, label) in self.jumps {
            let target = i64::try_from(*self.labels.get(label)?).ok()?;
            let next = i64::try_from(at).ok()? + 1;
            self.insns[at].off = i16::try_from(target - next).ok()?;
        }
        Some(self.insns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_are_relative_to_the_next_instruction() {
        let mut asm = Assembler::default();
        asm.label("top").mov_imm(Reg::R0, 1).if_eq(Reg::R0, 1, "end").goto("top");
        asm.label("end").exit();
        let insns = asm.finish().expect("both labels exist");
        assert_eq!(insns[1].off, 1);
        assert_eq!(insns[2].off, -3);
        assert_eq!(std::mem::size_of::<Insn>(), 8);
    }

    #[test]
    fn a_missing_label_is_noticed() {
        let mut asm = Assembler::default();
        asm.goto("nowhere");
        assert!(asm.finish().is_none());
    }
}
