//! Whether a VM may have Fibre Channel volumes. Pure: the whole table is [`decide`].
//!
//! A VM has them by the HBAs of its node, so its pod must have been scheduled to one that has some. Who
//! registers the VM knows whether it was, and a VM that is off can be scheduled anew.
//!
//! ```text
//!                  registered as:  unspecified, supported   unsupported     unsupported, marked
//! attach, VM runs                  allowed                  power it off    allowed
//! attach, VM is off                allowed                  allowed: mark   allowed
//! detach                           allowed                  allowed         allowed; after the last one
//!                                                                           the setting: keep or drop it
//! ```

use serde::{Deserialize, Serialize};

use crate::reason::Reason;
use crate::spec::FcSupport;
use crate::types::VmId;
use crate::vm::facade::Refusal;

/// What becomes of a VM's mark once its last Fibre Channel volume is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AfterLast {
    /// The mark stays: further volumes can be added while the VM runs.
    #[default]
    Keep,
    /// The mark goes: the VM may be scheduled anywhere again.
    Drop,
}

/// Whether a VM is able to have Fibre Channel volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ability {
    /// It is, or nobody said that it is not.
    Able,
    /// It is not.
    Unable,
    /// It was not, then one was wanted while it was off: it is to be once it is scheduled anew.
    Marked,
}

impl Ability {
    /// By what was said of the VM, and whether it is marked.
    pub fn of(support: FcSupport, marked: bool) -> Self {
        match (support, marked) {
            (FcSupport::Unspecified | FcSupport::Supported, _) => Self::Able,
            (FcSupport::Unsupported, false) => Self::Unable,
            (FcSupport::Unsupported, true) => Self::Marked,
        }
    }
}

/// Whether a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// There is a guest, perhaps a paused one.
    On,
    /// There is none.
    Off,
}

/// What is to happen to a Fibre Channel volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is added to a VM that runs, or does not.
    Attach(Power),
    /// It goes; whether it is the VM's last one.
    Detach {
        /// No other is left.
        last: bool,
    },
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Let it happen.
    Allow,
    /// Let it happen, and mark the VM.
    Mark,
    /// Let it happen, and take the mark from the VM.
    Unmark,
    /// The VM must be powered off first.
    PowerOffFirst,
}

/// The whole table.
pub fn decide(ability: Ability, change: Change, after_last: AfterLast) -> Verdict {
    match (change, ability) {
        (Change::Attach(_), Ability::Able | Ability::Marked) => Verdict::Allow,
        (Change::Attach(Power::Off), Ability::Unable) => Verdict::Mark,
        (Change::Attach(Power::On), Ability::Unable) => Verdict::PowerOffFirst,
        (Change::Detach { last: true }, Ability::Marked) if after_last == AfterLast::Drop => {
            Verdict::Unmark
        }
        (Change::Detach { .. }, _) => Verdict::Allow,
    }
}

/// The refusal of [`Verdict::PowerOffFirst`].
pub fn power_off_first(vm: &VmId) -> Refusal {
    let message = format!(
        "VM {vm} runs and is registered without support for Fibre Channel: power the VM off first"
    );
    Refusal::new(Reason::FcNotSupported, message).field("volume.source")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table() {
        use Ability::{Able, Marked, Unable};
        use AfterLast::{Drop, Keep};
        use Verdict::{Allow, Mark, PowerOffFirst, Unmark};
        let (hot, cold) = (Change::Attach(Power::On), Change::Attach(Power::Off));
        let (one, last) = (Change::Detach { last: false }, Change::Detach { last: true });
        for (ability, change, keep, drop) in [
            (Able, hot, Allow, Allow),
            (Able, cold, Allow, Allow),
            (Able, one, Allow, Allow),
            (Able, last, Allow, Allow),
            (Unable, hot, PowerOffFirst, PowerOffFirst),
            (Unable, cold, Mark, Mark),
            (Unable, one, Allow, Allow),
            (Unable, last, Allow, Allow),
            (Marked, hot, Allow, Allow),
            (Marked, cold, Allow, Allow),
            (Marked, one, Allow, Allow),
            (Marked, last, Allow, Unmark),
        ] {
            for (after, expected) in [(Keep, keep), (Drop, drop)] {
                let verdict = decide(ability, change, after);
                assert_eq!(verdict, expected, "{ability:?} {change:?} {after:?}");
            }
        }
    }

    #[test]
    fn only_a_vm_that_is_said_not_to_support_it_needs_a_mark() {
        for (support, unmarked, marked) in [
            (FcSupport::Unspecified, Ability::Able, Ability::Able),
            (FcSupport::Supported, Ability::Able, Ability::Able),
            (FcSupport::Unsupported, Ability::Unable, Ability::Marked),
        ] {
            assert_eq!(Ability::of(support, false), unmarked);
            assert_eq!(Ability::of(support, true), marked);
        }
    }
}
