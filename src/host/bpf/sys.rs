//! bpf(2) by hand: one function a command, owned descriptors, nothing but the kernel's own structs
//! (`union bpf_attr` in include/uapi/linux/bpf.h; a shorter struct than the kernel's is taken as
//! filled with zeros).
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;

use super::asm::Insn;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const MAP_GET_FD_BY_ID: libc::c_int = 14;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;

const MAP_TYPE_HASH: u32 = 1;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const PROG_TYPE_TRACING: u32 = 26;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const ATTACH_TRACE_ITER: u32 = 28;
/// Memory for an entry is taken when it is put.
const F_NO_PREALLOC: u32 = 1;
const F_ALLOW_MULTI: u32 = 2;
const F_QUERY_EFFECTIVE: u32 = 1;

/// A name as the kernel keeps it: at most 15 bytes and a NUL.
type Name = [u8; 16];

/// `text`, cut at 15 bytes.
pub(super) fn name(text: &str) -> Name {
    let mut name = [0; 16];
    let len = text.len().min(15);
    name[..len].copy_from_slice(&text.as_bytes()[..len]);
    name
}

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live, exclusively borrowed struct of the size that is passed; the callers
    // put only pointers into it that stay valid for the call, with the lengths the kernel is told.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn bpf_fd<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(bpf(command, attr)?).map_err(io::Error::other)?;
    // SAFETY: these commands return a new descriptor (close-on-exec) that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: impl AsFd) -> u32 {
    // Never negative: an owned or borrowed descriptor is open.
    fd.as_fd().as_raw_fd().unsigned_abs()
}

fn pointer<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>().addr() as u64
}

fn pointer_mut<T: ?Sized>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).cast::<u8>().expose_provenance() as u64
}

/// Creates a hash map.
pub(super) fn map_create(
    map_name: Name,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
        inner_map_fd: u32,
        numa_node: u32,
        map_name: Name,
    }
    bpf_fd(
        MAP_CREATE,
        &mut Attr {
            map_type: MAP_TYPE_HASH,
            key_size,
            value_size,
            max_entries,
            map_flags: F_NO_PREALLOC,
            inner_map_fd: 0,
            numa_node: 0,
            map_name,
        },
    )
}

/// A key or value of a map: plain bytes, without padding.
pub(super) type Bytes<const N: usize> = [u8; N];

#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    _pad: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

fn elem(map: &OwnedFd, key: u64, value: u64) -> ElemAttr {
    ElemAttr { map_fd: raw(map), _pad: 0, key, value, flags: 0 }
}

/// `None` where there is nothing (`ENOENT`).
fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The value of a key. `K` and `V` must be the map's sizes.
pub(super) fn map_get<const K: usize, const V: usize>(
    map: &OwnedFd,
    key: &Bytes<K>,
) -> io::Result<Option<Bytes<V>>> {
    let mut value = [0u8; V];
    let mut attr = elem(map, pointer(key), pointer_mut(&mut value));
    Ok(absent(bpf(MAP_LOOKUP_ELEM, &mut attr))?.map(|_| value))
}

/// Sets the value of a key. `K` and `V` must be the map's sizes.
pub(super) fn map_put<const K: usize, const V: usize>(
    map: &OwnedFd,
    key: &Bytes<K>,
    value: &Bytes<V>,
) -> io::Result<()> {
    bpf(MAP_UPDATE_ELEM, &mut elem(map, pointer(key), pointer(value))).map(drop)
}

/// Removes a key; whether it was there. `K` must be the map's size.
pub(super) fn map_delete<const K: usize>(map: &OwnedFd, key: &Bytes<K>) -> io::Result<bool> {
    Ok(absent(bpf(MAP_DELETE_ELEM, &mut elem(map, pointer(key), 0)))?.is_some())
}

/// All keys. Complete for keys that stay; one that is put meanwhile may be missed. `K` must be the
/// map's size.
pub(super) fn map_keys<const K: usize>(map: &OwnedFd) -> io::Result<Vec<Bytes<K>>> {
    let mut keys = std::collections::BTreeSet::new();
    let mut last: Option<Bytes<K>> = None;
    // The kernel starts over when the last key was deleted meanwhile, so the walk is bounded.
    for _ in 0..1 << 18 {
        let mut next = [0u8; K];
        let from = last.as_ref().map_or(0, pointer);
        let mut attr = elem(map, from, pointer_mut(&mut next));
        if absent(bpf(MAP_GET_NEXT_KEY, &mut attr))?.is_none() {
            break;
        }
        keys.insert(next);
        last = Some(next);
    }
    Ok(keys.into_iter().collect())
}

/// What a program is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProgKind {
    prog_type: u32,
    attach_type: u32,
    /// Of iterators: the id of the kernel's function whose arguments they get.
    attach_btf_id: u32,
}

impl ProgKind {
    /// Says which devices a cgroup may use.
    pub(super) const DEVICE: Self = Self {
        prog_type: PROG_TYPE_CGROUP_DEVICE,
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_btf_id: 0,
    };

    /// Is called for each of something, by `function`.
    pub(super) fn iterator(function: u32) -> Self {
        let (prog_type, attach_type) = (PROG_TYPE_TRACING, ATTACH_TRACE_ITER);
        Self { prog_type, attach_type, attach_btf_id: function }
    }
}

/// Loads a program. The error comes with the verifier's log.
pub(super) fn prog_load(
    prog_name: Name,
    insns: &[Insn],
    license: &CStr,
    kind: ProgKind,
) -> Result<OwnedFd, (io::Error, String)> {
    #[repr(C)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: Name,
        prog_ifindex: u32,
        expected_attach_type: u32,
        prog_btf_fd: u32,
        func_info_rec_size: u32,
        func_info: u64,
        func_info_cnt: u32,
        line_info_rec_size: u32,
        line_info: u64,
        line_info_cnt: u32,
        attach_btf_id: u32,
    }
    let mut attr = Attr {
        prog_type: kind.prog_type,
        insn_cnt: u32::try_from(insns.len()).unwrap_or(u32::MAX),
        insns: pointer(insns),
        license: pointer(license),
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: kind.attach_type,
        prog_btf_fd: 0,
        func_info_rec_size: 0,
        func_info: 0,
        func_info_cnt: 0,
        line_info_rec_size: 0,
        line_info: 0,
        line_info_cnt: 0,
        attach_btf_id: kind.attach_btf_id,
    };
    let error = match bpf_fd(PROG_LOAD, &mut attr) {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    // Once more for the log, which costs time that a good load need not spend.
    let mut log = vec![0u8; 64 * 1024];
    attr.log_level = 1;
    attr.log_size = 64 * 1024;
    attr.log_buf = pointer_mut(log.as_mut_slice());
    match bpf_fd(PROG_LOAD, &mut attr) {
        Ok(fd) => Ok(fd),
        Err(_) => {
            let text = CStr::from_bytes_until_nul(&log).map(|c| c.to_string_lossy().into_owned());
            Err((error, text.unwrap_or_default()))
        }
    }
}

/// Makes an iterator's program one that can be read from. It goes with the descriptor.
pub(super) fn iterator_link(prog: &OwnedFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
    }
    let mut attr =
        Attr { prog_fd: raw(prog), target_fd: 0, attach_type: ATTACH_TRACE_ITER, flags: 0 };
    bpf_fd(LINK_CREATE, &mut attr)
}

/// A file whose reading goes through all of what the iterator is for, once.
pub(super) fn iterate(link: &OwnedFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        flags: u32,
    }
    bpf_fd(ITER_CREATE, &mut Attr { link_fd: raw(link), flags: 0 })
}

#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// Attaches a program to a cgroup, beside others.
pub(super) fn prog_attach(cgroup: impl AsFd, prog: &OwnedFd) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: raw(cgroup),
        attach_bpf_fd: raw(prog),
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: F_ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    bpf(PROG_ATTACH, &mut attr).map(drop)
}

/// Detaches it again; whether it was attached.
pub(super) fn prog_detach(cgroup: impl AsFd, prog: &OwnedFd) -> io::Result<bool> {
    let mut attr = AttachAttr {
        target_fd: raw(cgroup),
        attach_bpf_fd: raw(prog),
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: 0,
        replace_bpf_fd: 0,
    };
    Ok(absent(bpf(PROG_DETACH, &mut attr))?.is_some())
}

/// The ids of the device programs at a cgroup, in the order in which they run: those attached there,
/// or (`effective`) those in force there, the ancestors' included.
pub(super) fn prog_query(cgroup: impl AsFd, effective: bool) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attr {
        target_fd: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        _pad: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        /// Written by the kernel since 6.17, whatever size it was told: it must be there.
        revision: u64,
    }
    // The kernel allows 64 programs at one cgroup; with the ancestors' it may be more.
    let mut ids = vec![0u32; 1024];
    let mut attr = Attr {
        target_fd: raw(cgroup),
        attach_type: ATTACH_CGROUP_DEVICE,
        query_flags: if effective { F_QUERY_EFFECTIVE } else { 0 },
        attach_flags: 0,
        prog_ids: pointer_mut(ids.as_mut_slice()),
        prog_cnt: 1024,
        _pad: 0,
        prog_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    bpf(PROG_QUERY, &mut attr)?;
    ids.truncate(usize::try_from(attr.prog_cnt).unwrap_or(0));
    Ok(ids)
}

fn by_id(command: libc::c_int, id: u32) -> io::Result<Option<OwnedFd>> {
    #[repr(C)]
    struct Attr {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    absent(bpf_fd(command, &mut Attr { id, next_id: 0, open_flags: 0 }))
}

/// A program by its id; `None` when it is gone.
pub(super) fn prog_by_id(id: u32) -> io::Result<Option<OwnedFd>> {
    by_id(PROG_GET_FD_BY_ID, id)
}

/// A map by its id; `None` when it is gone.
pub(super) fn map_by_id(id: u32) -> io::Result<Option<OwnedFd>> {
    by_id(MAP_GET_FD_BY_ID, id)
}

fn info<T>(object: &OwnedFd, info: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    bpf(OBJ_GET_INFO_BY_FD, &mut Attr { bpf_fd: raw(object), info_len, info: pointer_mut(info) })
        .map(drop)
}

/// What is known of a loaded program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ProgInfo {
    pub(super) id: u32,
    /// A digest of its instructions, the same for the same program whatever its map.
    pub(super) tag: [u8; 8],
    pub(super) name: Name,
    pub(super) maps: Vec<u32>,
}

/// Asks for a program's particulars.
pub(super) fn prog_info(prog: &OwnedFd) -> io::Result<ProgInfo> {
    /// The head of `struct bpf_prog_info`.
    #[repr(C)]
    struct Info {
        prog_type: u32,
        id: u32,
        tag: [u8; 8],
        jited_prog_len: u32,
        xlated_prog_len: u32,
        jited_prog_insns: u64,
        xlated_prog_insns: u64,
        load_time: u64,
        created_by_uid: u32,
        nr_map_ids: u32,
        map_ids: u64,
        name: Name,
    }
    let mut maps = vec![0u32; 8];
    let mut raw = Info {
        prog_type: 0,
        id: 0,
        tag: [0; 8],
        jited_prog_len: 0,
        xlated_prog_len: 0,
        jited_prog_insns: 0,
        xlated_prog_insns: 0,
        load_time: 0,
        created_by_uid: 0,
        nr_map_ids: 8,
        map_ids: pointer_mut(maps.as_mut_slice()),
        name: [0; 16],
    };
    info(prog, &mut raw)?;
    maps.truncate(usize::try_from(raw.nr_map_ids).unwrap_or(0));
    Ok(ProgInfo { id: raw.id, tag: raw.tag, name: raw.name, maps })
}

/// What is known of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct MapInfo {
    map_type: u32,
    id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    max_entries: u32,
    map_flags: u32,
    pub(super) name: Name,
}

/// Asks for a map's particulars.
pub(super) fn map_info(map: &OwnedFd) -> io::Result<MapInfo> {
    let mut raw = MapInfo {
        map_type: 0,
        id: 0,
        key_size: 0,
        value_size: 0,
        max_entries: 0,
        map_flags: 0,
        name: [0; 16],
    };
    info(map, &mut raw)?;
    Ok(raw)
}
