//! The override program: the last word on a block device that the container runtime's own program
//! refused.

use super::asm::{Assembler, Helper, Insn, Reg};

/// The program's and the map's name, as bpftool shows them.
pub(super) const NAME: &str = "lunplug_grants";

/// How deep below the root a granted cgroup may lie. Containers lie at 2 to 8.
pub(super) const MAX_DEPTH: u32 = 32;

/// The map's key: cgroup id (u64), major (u32), minor (u32).
pub(super) const KEY_SIZE: usize = 16;
/// The map's value: access bits (u32).
pub(super) const VALUE_SIZE: usize = 4;

/// `BPF_DEVCG_DEV_BLOCK`.
const TYPE_BLOCK: i32 = 1;
/// `BPF_DEVCG_ACC_MKNOD`.
const ACC_MKNOD: i32 = 1;
/// `BPF_DEVCG_ACC_READ`.
pub(super) const ACC_READ: u32 = 2;
/// `BPF_DEVCG_ACC_WRITE`.
pub(super) const ACC_WRITE: u32 = 4;

/// The program for the map behind `map_fd`. `None` only by a bug in the assembler's use.
///
/// Context (`struct bpf_cgroup_dev_ctx`): u32 access << 16 | type, u32 major, u32 minor.
/// Stack: the map's key at r10-16.
pub(super) fn assemble(map_fd: i32) -> Option<Vec<Insn>> {
    use Reg::{R0, R1, R2, R6, R7, R8, R10};
    let mut a = Assembler::default();

    // Step in only where a program before us refused, and refused as device programs do. What they
    // allowed stays allowed, another error stays that error.
    a.mov(R6, R1).call(Helper::GetRetval).if_ne32(R0, -nix::libc::EPERM, "out");

    // Block devices only.
    a.load32(R1, R6, 0).mov32(R2, R1).and32_imm(R2, 0xffff).if_ne32(R2, TYPE_BLOCK, "out");

    // r7 = the access asked for: read, write or both. mknod is never given, nor is nothing.
    a.mov32(R7, R1).shr32_imm(R7, 16);
    a.if_any32(R7, ACC_MKNOD, "out").if_eq32(R7, 0, "out");

    // The key's second half: the device.
    a.load32(R1, R6, 4).store32(R10, -8, R1);
    a.load32(R1, R6, 8).store32(R10, -4, R1);

    // The caller's cgroup and its ancestors, from the deepest level (r8) to level 1; the root, level
    // 0, never has a grant. Levels below the caller's own have no id.
    a.mov_imm(R8, MAX_DEPTH as i32);
    a.label("level").mov(R1, R8).call(Helper::GetCurrentAncestorCgroupId).if_eq(R0, 0, "up");

    // The key's first half, and the look-up.
    a.store64(R10, -16, R0).load_map(R1, map_fd).mov(R2, R10).add_imm(R2, -16);
    a.call(Helper::MapLookupElem).if_eq(R0, 0, "up");

    // Only a grant that covers all of what is asked for counts: ~granted & asked == 0.
    a.load32(R1, R0, 0).not32(R1).and32(R1, R7).if_ne32(R1, 0, "up");

    // Granted: the refusal is lifted.
    a.mov_imm(R1, 0).call(Helper::SetRetval).goto("out");

    a.label("up").add_imm(R8, -1).if_ne(R8, 0, "level");

    // 1 leaves the verdict as it now is (0 would mean a refusal of our own).
    a.label("out").mov_imm(R0, 1).exit();
    a.finish()
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_assembles() {
        assert!(super::assemble(3).is_some_and(|p| p.len() > 20));
    }
}
