//! A look at a VM's volumes: is everything as it was made? Changes nothing, runs no program, and asks
//! libvirt twice (three times where a volume is in the persistent definition), however many volumes
//! there are. What differs is then repaired by walking the attach again.
//!
//! A daemon that starts looks first, too. A volume is taken as good only if its attach had come to its end,
//! all that was noted of it then is seen again, and its identity is the one that it must have: what an attach
//! that finds everything done would have found. All else is walked.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::discover::{self, Place, PodPlace};
use super::disk::{desired_disk, source_of};
use super::failure::Failure;
use super::file;
use super::media;
use super::steps::{LookedAt, Sight};
use super::ways::Ways;
use crate::cgroup::GrantRecord;
use crate::connector::Health;
use crate::devnode::InPlace;
use crate::domain::diff::{self, Plan, Views};
use crate::journal::{Effects, Identities, StoredVolume};
use crate::spec::VolumeSpec;
use crate::step::Step;
use crate::types::{DevNum, VolumeName};

/// Looks at volumes. An error is about the VM as a whole.
pub(super) async fn look(
    ways: &Ways,
    volumes: &[LookedAt],
) -> Result<BTreeMap<VolumeName, Sight>, Failure> {
    let connection = ways.libvirt().await?;
    let persist = volumes.iter().any(|v| v.volume.spec.persist);
    let limit = ways.settings().libvirt;
    let views = crate::domain::observe(&*connection, &ways.vm.domain, persist, limit).await?;
    let place = ways.present_place().await?;
    let owned = |v: &LookedAt| (ways.key(&v.volume.spec.name), v.volume.spec.source.clone());
    let owned: Vec<_> = volumes.iter().map(owned).collect();
    let health = ways.host.connector.inspect(&owned).await;
    let keys: Vec<_> = owned.into_iter().map(|(key, _)| key).collect();
    // What cannot be read of one volume is no other's trouble.
    let effects = ways.effects.get_each(&keys).await;
    let effects: Vec<_> = effects.into_iter().map(|e| e.map_err(Failure::from)).collect();
    let records: Vec<_> =
        effects.iter().flatten().flatten().filter_map(|e| e.grant.clone()).collect();
    let hold = ways.host.grants.hold(&records).await?;
    let granted: BTreeSet<_> =
        records.iter().zip(hold).filter(|(_, holds)| *holds).map(|(r, _)| r.dev).collect();
    let identities = match volumes.iter().any(|v| v.anew) {
        true => ways.desired.identities(&ways.vm.id).await?,
        false => Identities::new(),
    };
    let with_node =
        |effects: &Effects| effects.device.as_ref().is_some_and(|device| device.file.is_none());
    let with_nodes = volumes
        .iter()
        .zip(&effects)
        .filter(|(_, e)| e.as_ref().is_ok_and(|e| e.as_ref().is_some_and(with_node)));
    let names = with_nodes.map(|(v, _)| v.volume.spec.disk.clone()).collect();
    let nodes = nodes(ways, &place, names).await;
    let mut found = BTreeMap::new();
    for ((LookedAt { volume: stored, anew }, health), effects) in
        volumes.iter().zip(health).zip(effects)
    {
        let volume = &stored.spec;
        let seen = Seen { ways, views: &views, place: &place, volume };
        let wrong = match &effects {
            // The attach that is walked for it says so in its own words.
            Err(damaged) => Some(damaged.message.clone()),
            Ok(None) => Some("nothing is recorded of it in this boot".into()),
            Ok(Some(effects)) => {
                let unproven = if *anew { unproven(stored, effects, &identities) } else { None };
                match unproven {
                    Some(why) => Some(why.into()),
                    None => seen.wrong(effects, node_of(&nodes, volume), &granted).await,
                }
            }
        };
        let sight = match (wrong, health) {
            (Some(why), _) => Sight::Differs(why),
            (None, Ok(Health::Differs(why))) => Sight::Differs(why),
            // What cannot be read now is not wrong for that; the next look is soon enough.
            (None, Err(error)) => Sight::Unclear(Failure::from(error)),
            (None, Ok(Health::Right { attachment, paths })) => {
                let given = effects.iter().flatten().find_map(|e| e.device.as_ref());
                if given.is_some_and(|given| given.is_same(&attachment)) {
                    let disk = effects.iter().flatten().find_map(|e| e.disk.as_ref());
                    let target = disk.and_then(|disk| disk.target.clone());
                    Sight::Right { attachment, paths, target }
                } else {
                    Sight::Differs("the host has another device for it".into())
                }
            }
        };
        found.insert(volume.name.clone(), sight);
    }
    Ok(found)
}

/// What is in the nodes' places, or why nobody can say so.
type Nodes = Result<HashMap<VolumeName, Result<InPlace, String>>, String>;

async fn nodes(ways: &Ways, place: &Place, disks: Vec<VolumeName>) -> Nodes {
    let (pods, vm) = (&ways.host.pods, &ways.vm);
    let on_host;
    let dir = match &place.pod {
        Some(pod) => &pod.hotplug,
        None => {
            let settings = &ways.settings().discover;
            let dir = discover::node_dir(pods, settings, &vm.id, &vm.place).await;
            on_host = dir.map_err(|error| Failure::from(error).message)?;
            &on_host
        }
    };
    let seen = ways.nodes.observe_each(dir, &disks).await;
    let seen = seen.into_iter().map(|seen| seen.map_err(|error| Failure::from(error).message));
    Ok(disks.into_iter().zip(seen).collect())
}

fn node_of(nodes: &Nodes, volume: &VolumeSpec) -> Result<InPlace, String> {
    let unseen = || Err("its node was not looked at".to_owned());
    nodes.as_ref().map_err(String::clone)?.get(&volume.disk).cloned().unwrap_or_else(unseen)
}

/// Why an attach that was begun before this daemon has to be walked again, whatever is seen of it.
fn unproven(
    stored: &StoredVolume,
    effects: &Effects,
    identities: &Identities,
) -> Option<&'static str> {
    let spec = &stored.spec;
    let ended = effects.step == Some(Step::Ready);
    if !ended || effects.disk.as_ref().is_none_or(|disk| disk.target.is_none()) {
        return Some("its attach was not finished");
    }
    if effects.spec.source != spec.source {
        return Some("it was made of another source");
    }
    let Some(device) = &effects.device else { return Some("it has no device") };
    let known = identities.get(&(spec.name.clone(), spec.source.key()));
    let expected = spec.expect_wwid.as_ref().unwrap_or(&device.device.wwid);
    if known != Some(&device.device.wwid) || expected != &device.device.wwid {
        return Some("it has another identity than the one that is known of it");
    }
    // What only the unit itself can say, or is yet to be accepted.
    let asks = spec.expect_unit_serial.is_some() || stored.accept_new_identity;
    asks.then_some("its identity has to be read anew")
}

/// One volume, and what was found of its VM.
struct Seen<'a> {
    ways: &'a Ways,
    views: &'a Views,
    place: &'a Place,
    volume: &'a VolumeSpec,
}

impl Seen<'_> {
    /// What is not as it was made, between the host's device and the guest.
    async fn wrong(
        &self,
        effects: &Effects,
        node: Result<InPlace, String>,
        granted: &BTreeSet<DevNum>,
    ) -> Option<String> {
        if effects.incarnation != self.ways.incarnation() {
            return Some("it was made for another pod".into());
        }
        let Some(device) = &effects.device else { return Some("it has no device".into()) };
        let wrong = match &self.place.pod {
            Some(pod) => match &device.file {
                Some(given) => file::wrong(self.ways, pod, self.volume, given).await,
                None => wrong_in_pod(pod, device.device.dev, node, effects, granted),
            },
            None => wrong_on_host(device.device.dev, node),
        };
        if wrong.is_some() {
            return wrong;
        }
        let source = source_of(self.ways, self.place, self.volume);
        if self.volume.device.is_cdrom() {
            return media::wrong(self.views, self.volume, effects, source);
        }
        let desired = desired_disk(self.ways, self.volume, source, self.place.pod.is_some());
        match diff::plan(self.views, &desired, &BTreeSet::new()) {
            Ok(Plan::Already { limits, .. }) if limits.any() => {
                Some("its I/O limits are others than wanted".into())
            }
            Ok(Plan::Already { .. }) => None,
            Ok(Plan::Attach(_)) => Some("the domain lacks its disk".into()),
            Err(error) => Some(error.to_string()),
        }
    }
}

fn wrong_on_host(dev: DevNum, node: Result<InPlace, String>) -> Option<String> {
    match node {
        Ok(node) if node.dev() == Some(dev) => None,
        Ok(_) => Some("its node on the host is missing or another".into()),
        Err(why) => Some(why),
    }
}

fn wrong_in_pod(
    pod: &PodPlace,
    dev: DevNum,
    node: Result<InPlace, String>,
    effects: &Effects,
    granted: &BTreeSet<DevNum>,
) -> Option<String> {
    match node {
        Ok(node) if node.is_right(dev, pod.owner) => {}
        Ok(_) => return Some("its node in the pod is missing or another".into()),
        Err(why) => return Some(why),
    }
    let right = |g: &GrantRecord| g.cgroup == pod.cgroup && g.dev == dev;
    let right = effects.grant.as_ref().is_some_and(right);
    (!right || !granted.contains(&dev)).then(|| "its grant is lost".into())
}
