//! The whole set of a VM's volumes, as it is asked for at once.
//!
//! ```text
//! set ─ newest? ─ revision durable ─ what is there beside it ─ wishes, as from anybody ─► answers
//!         └ no: refused            (nothing of an older set is taken on from here)
//! ```
//! The revision comes first, so that whatever a kill leaves, an older set can never undo a newer one; who
//! asked has no answer then, and asks again, which goes on from there. See docs/adr/0010-revisions.md.

use std::collections::BTreeSet;

use tracing::{Span, info};

use super::Actor;
use crate::types::VolumeName;
use crate::vm::facade::{Refusal, Set, Wish};
use crate::vm::failure::Failure;
use crate::vm::handler::{Asked, Promises};
use crate::vm::plan::{Admission, set};

impl Actor {
    /// Takes a set on, unless it is not the newest; the answers about its volumes come later.
    pub(super) async fn sync(&mut self, set: Set, span: &Span) -> Result<Promises, Refusal> {
        if let Some(refusal) = self.moves() {
            return Err(refusal);
        }
        let Set { revision, volumes, others, removals } = set;
        let admission = set::admit_set(self.revision.as_ref(), &revision)?;
        // A dry run is not recorded, so it is of no revision.
        let of = (!removals.dry_run).then_some(revision.number);
        if of.is_some() && admission == Admission::Accept {
            let recorded = self.tools.desired.put_revision(&self.vm, &revision).await;
            recorded.map_err(Failure::from)?;
            info!(revision = revision.number, volumes = volumes.len(), "set of volumes accepted");
            self.revision = Some(revision);
        }
        let names = volumes.iter().map(|(spec, _)| spec.name.clone());
        let names: BTreeSet<VolumeName> = names.chain(others).collect();
        let surplus = set::surplus(&self.known(), &names);
        let mut asked = Vec::new();
        let mut ask = |wish| {
            let (wish, promise) = Asked::new(wish, span.clone());
            asked.push(wish);
            promise
        };
        let add = |(spec, options)| Wish::Add { spec: Box::new(spec), options };
        let volumes = volumes.into_iter().map(|volume| ask(add(volume))).collect();
        let remove = |name| Wish::Remove { name, options: removals };
        let removed = surplus.into_iter().map(|name| (name.clone(), ask(remove(name)))).collect();
        self.wishes(asked, of).await;
        Ok(Promises { volumes, removed })
    }
}
