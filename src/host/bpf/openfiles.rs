//! Which block devices each process has open, told by the kernel as it walks its own tables: an iterator
//! (Documentation/bpf/bpf_iterators.rst) over the open files of all tasks, whose program passes on the block devices.
//!
//! By /proc each descriptor of each process is a name that is looked up: a node of a thousand VMs has hundreds of
//! thousands. The iterator sees the same tasks: those of the reader's pid namespace, each table of descriptors once.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;

use nix::libc;

use super::asm::{Assembler, Helper, Insn, Reg};
use super::btf::Btf;
use super::sys;
use crate::types::DevNum;

/// The program's name, as bpftool shows it.
const NAME: &str = "lunplug_openers";
/// The kernel's function whose arguments are the program's (kernel/bpf/task_iter.c).
const ITERATES: &str = "bpf_iter_task_file";
/// The initial pid namespace (`PROC_PID_INIT_INO` of include/linux/proc_ns.h). The program tells of processes by their
/// numbers there.
const INITIAL: &str = "pid:[4026531836]";

/// A record: process and device (u32 each), and the process's name (`TASK_COMM_LEN` bytes).
const RECORD: usize = 8 + COMM;
const COMM: usize = 16;

/// Asks the kernel for the block devices that are open.
pub struct OpenFiles {
    link: OwnedFd,
}

/// A process that has a block device open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Of the process.
    pub pid: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// The device.
    pub dev: DevNum,
}

impl OpenFiles {
    /// Loads the program. Fails where the kernel has no such iterator (before 5.8), does not tell its types, or does not
    /// let us, and outside the initial pid namespace.
    pub fn load() -> io::Result<Self> {
        if std::fs::read_link("/proc/self/ns/pid")?.as_os_str() != INITIAL {
            return Err(io::Error::other("this is not the host's pid namespace"));
        }
        let btf = Btf::of_kernel()?;
        let fields = Fields {
            inode: btf.offset("file", "f_inode")?,
            mode: btf.offset("inode", "i_mode")?,
            device: btf.offset("inode", "i_rdev")?,
            process: btf.offset("task_struct", "tgid")?,
            name: btf.offset("task_struct", "comm")?,
        };
        let insns = assemble(&fields)
            .ok_or_else(|| io::Error::other("the program for open files does not assemble"))?;
        let kind = sys::ProgKind::iterator(btf.function(ITERATES)?);
        // The helpers that it calls are for programs that may be had under the GPL: this one may.
        let prog = sys::prog_load(sys::name(NAME), &insns, c"Dual BSD/GPL", kind);
        let prog = prog.map_err(|(error, log)| {
            io::Error::new(error.kind(), format!("{error}: {}", log.trim()))
        })?;
        Ok(Self { link: sys::iterator_link(&prog)? })
    }

    /// The block devices that any process but this one has open, once for each descriptor.
    pub fn block_devices(&self) -> io::Result<Vec<Opened>> {
        let bytes = read_whole(File::from(sys::iterate(&self.link)?))?;
        let (records, rest) = bytes.as_chunks::<RECORD>();
        if !rest.is_empty() {
            return Err(io::Error::other("the kernel told of half an open file"));
        }
        Ok(records.iter().map(Opened::of).collect())
    }
}

/// The kernel returns `EAGAIN` where it has gone through a million of files in one read without having anything to tell
/// (kernel/bpf/bpf_iter.c, `MAX_ITER_OBJECTS`): the next read goes on from there.
fn read_whole(mut file: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        match file.read_to_end(&mut bytes) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            ended => return ended.map(|_| bytes),
        }
    }
}

impl Opened {
    fn of(record: &[u8; RECORD]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|n| record[at + n]));
        let (pid, device) = (word(0), word(4));
        let name = record[8..].split(|byte| *byte == 0).next().unwrap_or_default();
        Self {
            pid,
            name: String::from_utf8_lossy(name).into_owned(),
            // `MKDEV` of include/linux/kdev_t.h.
            dev: DevNum { major: device >> 20, minor: device & 0xf_ffff },
        }
    }
}

/// Where the running kernel has what is read.
struct Fields {
    inode: i16,
    mode: i16,
    device: i16,
    process: i16,
    name: i16,
}

/// The program. Context (`struct bpf_iter__task_file`): pointers to meta, task, (u32 fd), file; null at the end.
/// Stack: the record at r10-24.
fn assemble(fields: &Fields) -> Option<Vec<Insn>> {
    use Reg::{R0, R1, R2, R3, R6, R7, R8, R10};
    const AT: i16 = -(RECORD as i16);
    let mut a = Assembler::default();
    // r7 = the file's inode, r8 = the task.
    a.mov(R6, R1).load64(R7, R6, 24).if_eq(R7, 0, "out").load64(R7, R7, fields.inode);
    a.load64(R8, R6, 8).if_eq(R8, 0, "out");
    a.load16(R1, R7, fields.mode).and32_imm(R1, libc::S_IFMT as i32);
    a.if_ne32(R1, libc::S_IFBLK as i32, "out");

    // The process, but for the one that reads this.
    a.call(Helper::GetCurrentPidTgid).shr_imm(R0, 32);
    a.load32(R1, R8, fields.process).if_same(R1, R0, "out").store32(R10, AT, R1);

    a.load32(R1, R7, fields.device).store32(R10, AT + 4, R1);
    a.mov(R1, R10).add_imm(R1, i32::from(AT) + 8).mov_imm(R2, COMM as i32);
    a.mov(R3, R8).add_imm(R3, i32::from(fields.name)).call(Helper::ProbeReadKernel);

    // Into the file that is read: the first field of meta.
    a.load64(R1, R6, 0).load64(R1, R1, 0).mov(R2, R10).add_imm(R2, AT.into());
    a.mov_imm(R3, RECORD as i32).call(Helper::SeqWrite);
    a.label("out").mov_imm(R0, 0).exit();
    a.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_assembles() {
        let fields = Fields { inode: 32, mode: 0, device: 76, process: 1268, name: 1864 };
        assert!(assemble(&fields).is_some());
    }

    #[test]
    fn a_kernel_that_can_tell_does() {
        match OpenFiles::load() {
            Ok(files) => drop(files.block_devices().expect("told")),
            Err(error) => eprintln!("skipped: {error}"),
        }
    }

    #[test]
    fn a_walk_that_pauses_is_read_to_its_end() {
        struct Pausing(Vec<io::Result<&'static [u8]>>);
        impl Read for Pausing {
            fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                let part = self.0.pop().unwrap_or(Ok(b""))?;
                into[..part.len()].copy_from_slice(part);
                Ok(part.len())
            }
        }
        let again = || Err(io::ErrorKind::WouldBlock.into());
        let walk = vec![Ok(b"cd".as_slice()), again(), again(), Ok(b"ab".as_slice()), again()];
        assert_eq!(read_whole(Pausing(walk)).unwrap(), b"abcd");
        let failing = Pausing(vec![Err(io::ErrorKind::NotFound.into()), again()]);
        assert_eq!(read_whole(failing).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_record_is_read() {
        let mut record = [0; RECORD];
        record[..4].copy_from_slice(&4711_u32.to_ne_bytes());
        record[4..8].copy_from_slice(&0x0080_0011_u32.to_ne_bytes());
        record[8..12].copy_from_slice(b"qemu");
        let dev = DevNum { major: 8, minor: 17 };
        assert_eq!(Opened::of(&record), Opened { pid: 4711, name: "qemu".into(), dev });
    }
}
