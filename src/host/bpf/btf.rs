//! The kernel's own description of its types: where a field lies in a struct of the running kernel.
//!
//! The format is that of Documentation/bpf/btf.rst. Of each type there is a head of three words (name, information,
//! size or type) and, by its kind, more.

use std::io;

/// Where the kernel shows it.
const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// Size of a type's head, and of a struct's member (name, type, offset).
const WORDS_3: usize = 12;

/// The running kernel's types.
pub(super) struct Btf {
    bytes: Vec<u8>,
    types: std::ops::Range<usize>,
    strings: std::ops::Range<usize>,
}

/// One type.
struct Type<'a> {
    id: u32,
    kind: u32,
    name: u32,
    members: &'a [u8],
}

impl Btf {
    /// That of the running kernel. `NotFound` where it was built without.
    pub(super) fn of_kernel() -> io::Result<Self> {
        Self::new(std::fs::read(PATH)?)
    }

    fn new(bytes: Vec<u8>) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("{PATH} is no BTF"));
        let word = |at: usize| word(&bytes, at).map(|word| word as usize).ok_or_else(damaged);
        if bytes.get(..2) != Some(&MAGIC.to_ne_bytes()) {
            return Err(damaged());
        }
        let head = word(4)?;
        let part = |at: usize, length: usize| {
            let begin = head.checked_add(at).ok_or_else(damaged)?;
            let end = begin.checked_add(length).filter(|end| *end <= bytes.len());
            Ok::<_, io::Error>(begin..end.ok_or_else(damaged)?)
        };
        let types = part(word(8)?, word(12)?)?;
        let strings = part(word(16)?, word(20)?)?;
        Ok(Self { bytes, types, strings })
    }

    /// The id of a function.
    pub(super) fn function(&self, name: &str) -> io::Result<u32> {
        let found = self.types().find(|t| t.kind == FUNC && self.is_named(t.name, name));
        found.map(|t| t.id).ok_or_else(|| missing(name))
    }

    /// Where a field lies in a struct, in bytes.
    pub(super) fn offset(&self, structure: &str, field: &str) -> io::Result<i16> {
        let members = |t: Type<'_>| {
            let all = t.members.chunks_exact(WORDS_3);
            let field = { all }.find(|m| self.is_named(word(m, 0).unwrap_or(0), field))?;
            // Of bits; the high byte is a bit field's size.
            let bits = word(field, 8)?;
            i16::try_from(bits / 8).ok().filter(|_| bits % 8 == 0 && bits >> 24 == 0)
        };
        let structs = self.types().filter(|t| t.kind == STRUCT && self.is_named(t.name, structure));
        { structs }.find_map(members).ok_or_else(|| missing(&format!("{structure}.{field}")))
    }

    fn types(&self) -> impl Iterator<Item = Type<'_>> {
        let (mut rest, mut id) = (&self.bytes[self.types.clone()], 0);
        std::iter::from_fn(move || {
            let (name, info) = (word(rest, 0)?, word(rest, 4)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let more = match kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => WORDS_3,
                STRUCT | UNION | DATASEC | ENUM64 => count * WORDS_3,
                ENUM | FUNC_PROTO => count * 8,
                _ => 0,
            };
            let members = rest.get(WORDS_3..WORDS_3 + more)?;
            rest = &rest[WORDS_3 + more..];
            id += 1;
            Some(Type { id, kind, name, members })
        })
    }

    fn is_named(&self, at: u32, name: &str) -> bool {
        let strings = &self.bytes[self.strings.clone()];
        let text = strings.get(at as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn missing(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("this kernel has no {what}"))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A head, types and strings.
    fn btf(types: &[u32], strings: &str) -> Vec<u8> {
        let length = u32::try_from(types.len() * 4).unwrap();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        let words = [24, 0, length, length, u32::try_from(strings.len()).unwrap()];
        for word in words.iter().chain(types) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(strings.as_bytes());
        bytes
    }

    #[test]
    fn functions_and_fields_are_found_by_their_names() {
        let types = [
            [1, INT << 24, 4, 32].as_slice(),
            // struct ab { int a:3 bits in, int ab }; two of them, the second one with more.
            &[3, STRUCT << 24 | 1, 8, 1, 1, 64],
            &[3, STRUCT << 24 | 2, 8, 1, 1, 3, 3, 1, 32],
            &[6, FUNC << 24, 1],
        ];
        let btf = Btf::new(btf(&types.concat(), "\0a\0ab\0f\0")).unwrap();
        assert_eq!(btf.function("f").unwrap(), 4);
        assert_eq!(btf.offset("ab", "a").unwrap(), 8);
        assert_eq!(btf.offset("ab", "ab").unwrap(), 4);
        for (structure, field) in [("ab", "b"), ("a", "a"), ("f", "a")] {
            let error = btf.offset(structure, field).unwrap_err();
            assert_eq!(error.to_string(), format!("this kernel has no {structure}.{field}"));
        }
        assert!(btf.function("a").is_err());
    }

    #[test]
    fn what_is_damaged_is_an_error_or_ends_early() {
        let whole = btf(&[1, FUNC << 24, 1], "\0f\0");
        for length in 0..whole.len() {
            assert!(Btf::new(whole[..length].to_vec()).is_err(), "{length}");
        }
        // A struct that says that it has more members than there are bytes.
        let cut = Btf::new(btf(&[1, STRUCT << 24 | 9, 8, 1, 1, 0], "\0f\0")).unwrap();
        assert!(cut.offset("f", "f").is_err());
        assert!(Btf::new(vec![0; 64]).is_err());
    }
}
