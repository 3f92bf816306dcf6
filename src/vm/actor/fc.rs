//! Whether the VM may have Fibre Channel volumes: the rules of [`fc`], applied to its volumes.

use super::Actor;
use crate::journal;
use crate::spec::VolumeSpec;
use crate::types::{VolumeKey, VolumeName};
use crate::vm::facade::Refusal;
use crate::vm::plan::fc::{self, Ability, Change, Power, Verdict};

impl Actor {
    fn fc_ability(&self) -> Ability {
        Ability::of(self.tools.rules.fc, self.fc_marked)
    }

    /// Whether a volume may be added to the VM, and whether that marks it.
    pub(super) fn admit_fc(&self, spec: &VolumeSpec, power: Power) -> Result<bool, Refusal> {
        if !spec.source.is_fc() {
            return Ok(false);
        }
        let rules = self.tools.rules;
        match fc::decide(self.fc_ability(), Change::Attach(power), rules.after_last_fc) {
            Verdict::PowerOffFirst => Err(fc::power_off_first(&self.vm)),
            verdict => Ok(verdict == Verdict::Mark),
        }
    }

    /// Whether a volume is one for which the VM is marked.
    pub(super) fn needs_hba(&self, spec: &VolumeSpec) -> bool {
        spec.source.is_fc() && self.fc_ability() == Ability::Marked
    }

    /// Publishes it of all volumes.
    pub(super) fn tell_who_needs_hbas(&self) {
        for (name, volume) in &self.volumes {
            let needs = self.needs_hba(&volume.stored.spec);
            self.tools.board.update(&self.key(name), |status| status.vm_needs_hba = needs);
        }
    }

    /// Forgets that a volume is wanted, and the VM's mark with it where it was the last that needs it.
    pub(super) async fn disown(&mut self, key: &VolumeKey) -> Result<(), journal::Error> {
        let (ability, rules) = (self.fc_ability(), self.tools.rules);
        let unmarks = self.is_last_fc(&key.volume).is_some_and(|last| {
            let change = Change::Detach { last };
            fc::decide(ability, change, rules.after_last_fc) == Verdict::Unmark
        });
        self.tools.desired.delete_volume(key, unmarks).await?;
        self.fc_marked &= !unmarks;
        Ok(())
    }

    /// Whether no other volume is had by Fibre Channel; `None` where this one is not.
    fn is_last_fc(&self, name: &VolumeName) -> Option<bool> {
        let is_fc = |volume: &super::Volume| volume.stored.spec.source.is_fc();
        self.volumes.get(name).filter(|volume| is_fc(volume))?;
        let mut others = self.volumes.iter().filter(|(other, v)| *other != name && !v.failed);
        Some(!others.any(|(_, volume)| is_fc(volume)))
    }
}
