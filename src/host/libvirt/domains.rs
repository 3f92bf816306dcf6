//! Domains that were looked up by name: libvirt knows them by their UUID from then on, so a call need not look again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use virt::connect::Connect;
use virt::domain::Domain;
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};

/// Those of one connection. What happens to a domain's life makes it be looked up anew: it may be another one that has
/// the name then, and this one another name.
#[derive(Default)]
pub(super) struct Domains(Mutex<Looked>);

#[derive(Default)]
struct Looked {
    found: HashMap<String, Domain>,
    /// How often something was forgotten.
    forgotten: u64,
}

impl Domains {
    /// Does something with the domain of that name; once more where it turns out to be there no longer as it was
    /// when it was looked up. Nothing was done with it then.
    pub(super) fn with<T>(
        &self,
        connect: &Connect,
        name: &str,
        work: impl Fn(&Domain) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (known, forgotten) = {
            let looked = self.looked();
            (looked.found.get(name).cloned(), looked.forgotten)
        };
        if let Some(known) = known {
            match work(&known) {
                Err(error) if error.code() == Enum::Known(ErrorNumber::NoDomain) => {
                    self.forget(name)
                }
                done => return done,
            }
        }
        let found = connect.lookup_domain_by_name(name)?;
        let mut looked = self.looked();
        if looked.forgotten == forgotten {
            looked.found.insert(name.to_owned(), found.clone());
        }
        drop(looked);
        work(&found)
    }

    /// Has a domain looked up anew.
    pub(super) fn forget(&self, name: &str) {
        let mut looked = self.looked();
        looked.forgotten += 1;
        looked.found.remove(name);
    }

    /// Lets go of all of them, and by that of their connection.
    pub(super) fn clear(&self) {
        self.looked().found.clear();
    }

    fn looked(&self) -> MutexGuard<'_, Looked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Defines a domain in libvirt's built-in test driver.
    fn define(connect: &Connect, name: &str) -> Domain {
        let xml = format!(
            "<domain type='test'><name>{name}</name><memory>1024</memory><os><type>hvm</type></os></domain>"
        );
        connect.define_domain_xml(&xml).unwrap()
    }

    #[test]
    fn a_domain_is_looked_up_once_and_another_of_its_name_is_found_all_the_same() {
        virt::error::clear_error_callback();
        // A state of this test's own: of "default" there is one in the process.
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "<node/>").unwrap();
        let connect = Connect::open(Some(&format!("test://{}", file.path().display()))).unwrap();
        let domains = Domains::default();
        let uuid = || domains.with(&connect, "vm", Domain::uuid_string);
        assert!(uuid().is_err(), "there is none yet");
        let first = define(&connect, "vm");
        assert_eq!(uuid().unwrap(), first.uuid_string().unwrap());
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let state = || {
            domains.with(&connect, "vm", |domain| {
                asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                domain.info().map(|_| domain.uuid_string())?
            })
        };
        state().unwrap();
        assert_eq!(asked.swap(0, std::sync::atomic::Ordering::Relaxed), 1);
        first.undefine().unwrap();
        assert_eq!(uuid().unwrap(), first.uuid_string().unwrap(), "it is remembered");
        let second = define(&connect, "vm");
        assert_eq!(state().unwrap(), second.uuid_string().unwrap(), "the one that is there");
        assert_eq!(asked.into_inner(), 2, "the one that is not was asked first");
        domains.forget("vm");
        second.undefine().unwrap();
        assert!(uuid().is_err(), "it is looked up anew");
    }
}
