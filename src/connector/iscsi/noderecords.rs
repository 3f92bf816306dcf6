//! The node records that a login needs, beside those of others.
//!
//! open-iscsi keeps a record as `ADDRESS,PORT,TAG/IFACE`, TAG being that of the target's portal group, or, where
//! that is not known, as the one file `ADDRESS,PORT`. The file takes the place of any record there, is met first
//! whatever iface is asked for, and goes when one with a tag is made (usr/idbm.c). So a portal has room for
//! several ifaces only where all of its records have their tag. What we make for the iface `default` has none
//! as long as it is alone at its portal: the tag would have to be asked for.

use std::collections::{BTreeSet, HashMap};
use std::io;

use super::login::Made;
use super::records::our_settings;
use super::session;
use super::{Inner, Job};
use crate::connector::error::Error;
use crate::host::iscsidb::Record;
use crate::host::place::is_place_error;
use crate::types::{IfaceName, Nexus, Portal};

/// So many portals are asked for tags: the first mostly lists all.
const ASKED: usize = 2;

/// What there is of records for a login.
pub(super) struct Records {
    /// The target's records are exactly those that are needed, and all ours.
    pub(super) alone: bool,
    /// The user's name, for those that have a volume's credentials.
    pub(super) given: HashMap<Portal, String>,
    /// Portals that cannot have a record beside another's.
    pub(super) without: Vec<Portal>,
}

impl Inner {
    /// Has a record of the right kind at each of `need`.
    pub(super) async fn records(&self, job: &Job, need: &[Portal]) -> Result<Records, Error> {
        let target = &job.source.target;
        self.put_iface(job).await?;
        let found = self.known_records(target).await?;
        let made: Made = self.leases.made(target.as_str()).await?;
        let (mut ours, mut missing) = self.sort_out(target, &found, &made, need).await?;
        let tags = self.tags(job, &found, &missing).await?;
        let without = self.make_room(job, &found, &mut missing, &tags).await?;
        let need: Vec<Portal> = need.iter().copied().filter(|p| !without.contains(p)).collect();
        ours.extend(&missing);
        let missing = self.without_chap(job, &made, &ours, missing, &need).await?;
        let mine: Vec<Portal> = need.iter().copied().filter(|p| ours.contains(p)).collect();
        let (intent, chap) = (ours.clone(), job.with.chap.is_some());
        let note = |made: &mut Made| {
            made.records.extend(intent);
            made.chap.extend(mine.iter().filter(|_| chap));
        };
        self.leases.update_made(target.as_str(), note).await?;
        for portal in &missing {
            self.iscsiadm(target).new_record(*portal, tags.get(portal).copied()).await?;
        }
        self.configure(job, &mine).await?;
        let is_ours = |r: &Record| is_by(r, target) && ours.contains(&r.portal);
        let needed = |r: &Record| need.contains(&r.portal);
        let alone = found.iter().all(|r| is_ours(r) && needed(r)) && mine.len() == need.len();
        let given = job.with.chap.as_ref().map(|chap| chap.out.name.clone());
        let given = mine.into_iter().filter_map(|p| Some((p, given.clone()?))).collect();
        Ok(Records { alone, given, without })
    }

    /// Those that are ours, by the lease or their mark, and the portals of `need` that have none. A damaged
    /// one is removed.
    async fn sort_out(
        &self,
        target: &Nexus,
        found: &[Record],
        made: &Made,
        need: &[Portal],
    ) -> Result<(BTreeSet<Portal>, Vec<Portal>), Error> {
        let (mut ours, mut missing) = (made.records.clone(), Vec::new());
        for &portal in need {
            match found.iter().find(|r| r.portal == portal && is_by(r, target)) {
                Some(record) if record.corrupt => {
                    self.remove_corrupt(target, record).await?;
                    missing.push(portal);
                }
                Some(_) if ours.contains(&portal) => {}
                Some(_) => {
                    // Perhaps ours of an earlier boot.
                    if self.is_ours(target, portal).await? {
                        ours.insert(portal);
                    }
                }
                None => missing.push(portal),
            }
        }
        Ok((ours, missing))
    }

    /// Whether a record that no lease knows is ours: by its mark, or because nobody else goes by that iface,
    /// also where its maker was cut off before it had the mark.
    pub(super) async fn is_ours(&self, target: &Nexus, portal: Portal) -> Result<bool, Error> {
        Ok(target.iface().is_own() || self.iscsiadm(target).is_marked(portal).await?)
    }

    /// Writes our settings, and the job's credentials, into records of ours.
    async fn configure(&self, job: &Job, mine: &[Portal]) -> Result<(), Error> {
        let target = &job.source.target;
        let settings = our_settings(&self.settings, job.multipath);
        for &portal in mine {
            let doing = || format!("writing the record of {target} at {portal}");
            let set = || self.doors.iscsidb.set(target, portal, &settings, job.with.chap.as_ref());
            let mut written = set().await;
            if self.was_locked(target, &written, doing).await? {
                written = set().await;
            }
            written.map_err(|source| match source.kind() {
                io::ErrorKind::InvalidData => corrupt(target, portal, source),
                _ => Error::Io { doing: doing(), source },
            })?;
        }
        Ok(())
    }

    /// Gives our records of other ifaces their tag, where they have none, so that there can be one more at
    /// that portal. A portal with another's record of that kind is taken out of `missing` and told; it is an
    /// error where no other is left.
    async fn make_room(
        &self,
        job: &Job,
        found: &[Record],
        missing: &mut Vec<Portal>,
        tags: &HashMap<Portal, u16>,
    ) -> Result<Vec<Portal>, Error> {
        let target = &job.source.target;
        let in_the_way =
            |r: &&Record| r.group.is_none() && !is_by(r, target) && missing.contains(&r.portal);
        let old: Vec<&Record> = found.iter().filter(in_the_way).collect();
        let (mut without, mut failed) = (Vec::new(), None);
        for record in old {
            let portal = record.portal;
            if record.corrupt {
                self.remove_corrupt(target, record).await?;
                continue;
            }
            let made = match record.iface.parse::<IfaceName>().ok() {
                Some(iface) if iface.is_own() => true,
                Some(iface) => self.made_by(target, iface).await?.records.contains(&portal),
                None => false,
            };
            match tags.get(&portal).filter(|_| made) {
                Some(tag) => self.set_group(target, portal, *tag).await?,
                None => {
                    let error = untagged(target, record);
                    tracing::warn!(%target, %portal, %error, "no login there");
                    failed.get_or_insert(error);
                    without.push(portal);
                }
            }
        }
        missing.retain(|portal| !without.contains(portal));
        match failed {
            Some(error) if job.source.routes.iter().all(|p| without.contains(p)) => Err(error),
            _ => Ok(without),
        }
    }

    async fn made_by(&self, target: &Nexus, iface: IfaceName) -> Result<Made, Error> {
        let other = Nexus::new(target.target().clone(), iface);
        self.leases.made(other.as_str()).await
    }

    async fn set_group(&self, target: &Nexus, portal: Portal, tag: u16) -> Result<(), Error> {
        let doing = || format!("giving the record of {target} at {portal} its portal group tag");
        let set = || self.doors.iscsidb.set_group(target.target(), portal, tag);
        let mut written = set().await;
        if self.was_locked(target, &written, doing).await? {
            written = set().await;
        }
        written.map_err(|source| Error::Io { doing: doing(), source })
    }

    /// The portal group tags that new records at `missing` are to have: those of the records beside them,
    /// or what sessions and the target itself say, where others are to have room. A portal whose tag
    /// nobody tells has none.
    async fn tags(
        &self,
        job: &Job,
        found: &[Record],
        missing: &[Portal],
    ) -> Result<HashMap<Portal, u16>, Error> {
        let target = &job.source.target;
        let known = found.iter().filter_map(|r| Some((r.portal, r.group?)));
        let mut tags: HashMap<Portal, u16> = known.collect();
        let plain = *target.iface() == IfaceName::default();
        let shared = |p: &Portal| found.iter().any(|r| r.portal == *p && !is_by(r, target));
        let lacks = |tags: &HashMap<Portal, u16>| {
            missing.iter().any(|p| !tags.contains_key(p) && (!plain || shared(p)))
        };
        if !lacks(&tags) {
            return Ok(tags);
        }
        let sessions = session::of_target(&*self.doors.sysfs, target.target()).await?;
        for session in &sessions {
            tags.extend(session.group.map(|tag| (session.portal, tag)));
        }
        // One that is logged in to answers.
        let mut ask = job.source.routes.clone();
        ask.sort_by_key(|portal| !sessions.iter().any(|s| s.up && s.portal == *portal));
        for portal in ask.into_iter().take(ASKED) {
            if !lacks(&tags) {
                break;
            }
            tags.extend(self.iscsiadm(target).groups(portal).await);
        }
        Ok(tags)
    }

    pub(super) async fn known_records(&self, target: &Nexus) -> Result<Vec<Record>, Error> {
        let found = self.doors.iscsidb.records(target.target()).await;
        found.map_err(Error::io(format!("reading the records of {target}")))
    }

    /// Removes a damaged record.
    async fn remove_corrupt(&self, target: &Nexus, record: &Record) -> Result<(), Error> {
        tracing::warn!(%target, portal = %record.portal, "removing a damaged node record");
        self.remove_record(target, record).await
    }

    /// Removes a record of ours that nobody is logged in by, whatever state it is in.
    pub(super) async fn remove_record(&self, target: &Nexus, record: &Record) -> Result<(), Error> {
        let doing = || format!("removing a record of {target}");
        let remove = || self.doors.iscsidb.remove(target.target(), record);
        let mut removed = remove().await;
        if self.was_locked(target, &removed, doing).await? {
            removed = remove().await;
        }
        removed.map_err(|source| match source.kind() {
            // Locked again, in this very moment.
            io::ErrorKind::WouldBlock => Error::Io { doing: doing(), source },
            _ if is_place_error(&source) || !record.corrupt => Error::Io { doing: doing(), source },
            _ => corrupt(target, record.portal, source),
        })
    }

    /// Whether a change of the database met a lock of others', which has been waited for now.
    async fn was_locked(
        &self,
        target: &Nexus,
        changed: &io::Result<()>,
        doing: impl Fn() -> String,
    ) -> Result<bool, Error> {
        if !changed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
            return Ok(false);
        }
        let unlocked = self.iscsiadm(target).unlocked().await;
        unlocked.map_err(|source| Error::Command { doing: doing(), source })?;
        Ok(true)
    }
}

fn corrupt(target: &Nexus, portal: Portal, source: io::Error) -> Error {
    Error::RecordCorrupt { target: target.to_string(), portal: portal.to_string(), source }
}

/// Whether a record is by the iface of that nexus.
pub(super) fn is_by(record: &Record, nexus: &Nexus) -> bool {
    record.iface == nexus.iface().as_str()
}

fn untagged(target: &Nexus, record: &Record) -> Error {
    Error::RecordInTheWay {
        target: target.target().to_string(),
        portal: record.portal,
        iface: record.iface.clone(),
    }
}
